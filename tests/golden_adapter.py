"""From a golden entry to our answer: which part, with which options, and what it computes.

An entry is understood by `quantizer`, `role`, `variant`, `bits` and `config` alone. Whatever
stands in it that this file does not know is `NotOffered`, and says what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitladder.models.rprelu import RPReLU
from bitladder.pipeline.losses import LOSSES, Step
from bitladder.quant import QUANTIZERS, QTensor, Quantizer, Site, bin_regularization
from bitladder.quant.functional import per_channel_view, round_through, round_within
from bitladder.quant.initializers import rows_of, starting_steps
from bitladder.quant.level_sets import apot_levels, pot_levels, uniform_levels
from bitladder.quant.oscillation import Oscillation, dampening, follow
from bitladder.quant.quantizers.range_linear import extremes, linear_grid
from torch import Tensor

Answer = list[tuple[str, Tensor]]  # array name, what we make of it

LOWEST = 1e-30  # below every parameter of a case: its quantizer was never calibrated


class NotOffered(Exception):
    """We have no such part or option; the message says which."""


class Refused(Exception):
    """We have the part and it refuses; the message is its own."""


@dataclass
class Case:
    """One entry with its arrays, and a note of all that was read of it."""

    entry: Mapping[str, Any]
    arrays: Mapping[str, Tensor]
    read: set[str] = field(default_factory=set)
    remark: str = ""  # what the reader of the result should know

    def text(self, key: str) -> str:
        return str(self.entry.get(key, ""))

    @property
    def variant(self) -> str:
        return self.text("variant")

    @property
    def weight(self) -> bool:
        return self.text("role") == "weight"

    @property
    def bits(self) -> int:
        bits = self.entry.get("bits")
        if not isinstance(bits, int):
            raise NotOffered(f"bits {bits!r}")
        return bits

    @property
    def signed(self) -> bool:
        """As stated, or as the lowest level says; weights are signed."""
        signed, lowest = self.entry.get("signed"), self.entry.get("qn")
        if signed is None and isinstance(lowest, int):
            signed = lowest < 0
        if signed is None and not self.weight:
            raise NotOffered("signed None")
        return self.weight if signed is None else bool(signed)

    @property
    def config(self) -> Mapping[str, Any]:
        config = self.entry.get("config") or {}
        if not isinstance(config, Mapping):
            raise NotOffered(f"config {config!r}")
        return config

    def known(self, key: str, *known: Any) -> Any:
        """The value of a key of the config, which must be one of these; None if absent."""
        self.read.add(key)
        value = self.config.get(key)
        if key in self.config and not any(value == k for k in known):
            raise NotOffered(f"config {key} = {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of a key of the config, which must be a number."""
        self.read.add(key)
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise NotOffered(f"config {key} = {value!r}")
        return value

    def tensor(self, name: str) -> Tensor:
        self.read.add(name)
        if name not in self.arrays:
            raise NotOffered(f"no array {name!r}")
        x = self.arrays[name]
        return x.float() if x.is_floating_point() else x

    def input(self, name: str = "x") -> Tensor:
        """A weight (O, I, *) or an activation (N, C, *): flat ones count as one channel."""
        x = self.tensor(name)
        if x.dim() == 1:
            x = x[None] if self.weight else x[:, None]
        return x.clone().requires_grad_()

    def upstream(self, y: Tensor, name: str = "upstream") -> Tensor:
        return self.tensor(name).view_as(y)

    def layers(self, name: str) -> int:
        """How many arrays name0, name1, ... there are."""
        count = 0
        while f"{name}{count}" in self.arrays:
            count += 1
        if not count:
            raise NotOffered(f"no array '{name}0'")
        return count

    def all_known(self, *names: str) -> None:
        """Refuses what would change the numbers unseen: config keys, parameters."""
        strange = set(self.config) - self.read
        if strange:
            raise NotOffered(f"config {', '.join(sorted(strange))}")
        given = {name for name in self.arrays if name.startswith("param_")}
        if strange := given - self.read - {f"param_{name}" for name in names}:
            raise NotOffered(f"parameter {', '.join(sorted(strange))}")


def adapt(case: Case) -> Iterator[Answer]:
    """Our answer; several where the entry leaves something open."""
    quantizer, role = case.text("quantizer"), case.text("role")
    for (name, roles), answer in ADAPTERS.items():
        if name == quantizer and role in roles:
            return answer(case)
    if any(name == quantizer for name, _ in ADAPTERS):
        raise NotOffered(f"role {role!r}")
    raise NotOffered("no such quantizer")


# ------------------------------------------------------------------------------- helpers


def chosen(case: Case, table: Mapping[Any, Any]) -> Any:
    """What the table has for the variant."""
    if case.variant not in table:
        raise NotOffered(f"variant {case.variant!r}")
    return table[case.variant]


def build(name: str, site: Site, **options: Any) -> Quantizer:
    factory = QUANTIZERS[name].factory
    try:
        return factory(site, **options)
    except ValueError as error:
        raise Refused(str(error)) from error


def site_of(case: Case, x: Tensor, bits: int | None = None) -> Site:
    target = "weight" if case.weight else "activation"
    channels = x.shape[0 if case.weight else 1]
    return Site(target, bits or case.bits, case.weight or case.signed, channels)


def set_parameters(quantizer: Quantizer, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        attribute = quantizer.get_parameter(name)
        attribute.data = value.reshape(attribute.shape).clone()
    for name, buffer in quantizer.named_buffers():
        if name.endswith("floor"):
            buffer.fill_(LOWEST)


def fake_quantize(
    case: Case,
    name: str,
    parameters: Mapping[str, str] | None = None,
    *,
    before: Callable[[Tensor], Tensor] = lambda x: x,
    **options: Any,
) -> Answer:
    """y and all gradients of a quantizer on `x`.

    Args:
        parameters: golden name -> name in our quantizer.
        before: what the network does to x first.
    """
    parameters = parameters or {}
    case.all_known(*parameters)
    x = case.input()
    quantizer = build(name, site_of(case, x), **options)
    values = {ours: case.tensor(f"param_{golden}") for golden, ours in parameters.items()}
    set_parameters(quantizer, values)
    y = quantizer(before(x))
    y.backward(case.upstream(y))
    answer: Answer = [("y", y), ("grad_x", x.grad)]
    for golden, ours in parameters.items():
        answer.append((f"grad_{golden}", quantizer.get_parameter(ours).grad))
    return answer


# ---------------------------------------------------------------------------- quantizers


def dorefa(case: Case) -> Iterator[Answer]:
    if not case.weight:
        chosen(case, dict.fromkeys(("clamp01", "ties and bounds", ONE_BIT_BUG)))
        yield fake_quantize(case, "dorefa")
        return
    unit_range = chosen(
        case,
        {"paper-rescaled": False, "unit-range": True, "sign(0)=0": False, "sign(0)=+1": True},
    )
    yield fake_quantize(case, "dorefa", unit_range=unit_range)


def wrpn(case: Case) -> Iterator[Answer]:
    if case.weight:
        if case.variant == "as-coded":
            raise NotOffered("variant 'as-coded': it has 2^b + 1 levels and is no b-bit code")
        chosen(case, {"paper": None})
        yield fake_quantize(case, "wrpn", unit_range=True)
        return
    chosen(case, dict.fromkeys(("clamp01 (also DoReFa)", "correct 1-bit unsigned")))
    case.known("clip_val", 1)
    yield fake_quantize(case, "wrpn", unit_range=True) + fake_quantize(case, "dorefa")


def pact(case: Case) -> Iterator[Answer]:
    chosen(case, dict.fromkeys(("relu-then-clip", "bounds")))
    yield fake_quantize(case, "pact", {"alpha": "clip"})


def range_linear_weight(case: Case) -> Iterator[Answer]:
    mode = chosen(case, RANGE_MODES)
    case.known("mode", case.variant)
    per_channel = bool(case.known("per_channel", False, True))
    case.all_known()
    x = case.input()
    if case.bits > 2:
        q = build("range_linear", site_of(case, x), mode=mode, per_channel=per_channel)
        y = q(x)
    else:
        case.remark = GRID_ALONE
        axis = 0 if per_channel else None
        low, high = (per_channel_view(end, x) for end in extremes(x, channel_axis=axis))
        y = round_through(x, *linear_grid(low, high, bits=case.bits, signed=True, mode=mode))
    y.backward(case.upstream(y))
    yield [("y", y), ("grad_x", x.grad)]


def range_linear_activation(case: Case) -> Iterator[Answer]:
    mode = chosen(case, RANGE_MODES)
    case.known("mode", case.variant)
    decay = case.number("ema_decay", 0.999)
    steps = int(case.number("steps", case.layers("x")))
    case.all_known()
    # the average does not depend on the width, so one that the class admits follows the range
    bits = max(case.bits, 3)
    q = build("range_linear", site_of(case, case.input("x0"), bits), mode=mode, decay=decay)
    answer: Answer = []
    for step in range(steps):
        x = case.input(f"x{step}")
        y = q(x)
        low, high = q.low.clone(), q.high.clone()
        grid = linear_grid(low, high, bits=case.bits, signed=case.signed, mode=mode)
        if case.bits < bits:
            case.remark = GRID_ALONE
            start, end = low, high
            if mode != "asymmetric":
                end = torch.maximum(low.abs(), high.abs())
                start = -end if case.signed else torch.zeros_like(end)
            y = round_within(x, *grid, start, end)
        y.backward(case.upstream(y, f"upstream{step}"))
        answer += [(f"y{step}", y), (f"grad_x{step}", x.grad)]
        answer += [(f"tracked_min{step}", low), (f"tracked_max{step}", high)]
        # the origin multiplies by its scale; its zero point is our lowest level, shifted by
        # half the codes where they are signed
        scale, lowest, _ = grid
        zero_point = torch.zeros(())
        if mode == "asymmetric":
            zero_point = lowest + (2 ** (case.bits - 1) if case.signed else 0)
        answer += [(f"scale{step}", 1 / scale), (f"zero_point{step}", zero_point)]
    yield answer


def lsq(case: Case) -> Iterator[Answer]:
    options: dict[str, Any] = {}
    normalized = chosen(case, LSQ_VARIANTS)
    if case.weight:
        per_channel, restricted = (case.known(key, False, True) for key in PER_CHANNEL_SYMMETRIC)
        options["per_channel"] = bool(per_channel or case.variant == "per-channel")
        options["restricted"] = bool(restricted or case.variant == "per-tensor symmetric")
    scales = grad_scales(case)
    before = clip_before(case) if "clip_value" in case.config else lambda x: x
    case.known("weight_norm", "LWN (gradient through mean and std)")
    step = "alpha" if "param_alpha" in case.arrays else "s"
    for grad_scale in scales:
        options["grad_scale"] = grad_scale
        if normalized:
            lsq_inside = {"method": "lsq", "options": options}
            yield fake_quantize(case, "weight_norm", {step: "inner.scale"}, **lsq_inside)
        else:
            yield fake_quantize(case, "lsq", {step: "scale"}, before=before, **options)


def grad_scales(case: Case) -> Sequence[str]:
    """The names of LSQ's gradient scale: one, unless an edge case leaves it open."""
    case.known("num_elements", "x.shape[1]", "numel")
    mode = case.known("grad_scale_mode", "none", "LSQ_grad_scale")
    if mode is not None:
        return ["none" if mode == "none" else "channel_count"]
    stated = case.known("grad_scale", *LSQ_FACTORS) or case.known("g", *LSQ_FACTORS)
    if case.text("conformance") == "edge" and not stated:
        return ["numel", "none"]
    return ["numel"]


def clip_before(case: Case) -> Callable[[Tensor], Tensor]:
    """The ReLU and the fixed clip that one origin counts as part of its quantizer."""
    case.read.add("clip_value")
    if case.config["clip_value"] is None:
        return torch.relu
    high = case.number("clip_value")
    return lambda x: x.relu().clamp(max=high)


def uniq(case: Case) -> Iterator[Answer]:
    chosen(case, {"layer-wise": None})
    case.known("g", UNIQ_FACTOR)
    yield fake_quantize(case, "uniq", {"delta": "scale"}, grad_scale="numel")


def lcq(case: Case) -> Iterator[Answer]:
    chosen(case, {"K=16": None})
    case.known("K", 16)
    case.known("num_elements", "numel" if case.weight else "x.shape[1]")
    case.known("grad_scale", 1, "sqrt(qp/num_elements)")
    mode = case.known("grad_scale_mode", "none", "LSQ_grad_scale")
    options = {"grad_scale": "lsq" if mode == "LSQ_grad_scale" else "none"}
    if case.weight:
        options["weight_norm"] = "none"
    parameters = {"threshold": "clip", "theta": "theta"}
    if "param_theta" not in case.arrays:
        del parameters["theta"]
    yield fake_quantize(case, "lcq", parameters, **options)


def level_sets(case: Case) -> Iterator[Answer]:
    options = dict(chosen(case, LEVEL_SET_VARIANTS))
    name = case.text("quantizer")
    case.known("additive", name != "pot")
    case.known("power", name != "apot_uniform")
    case.known("weight_norm", DETACHED_NORM)
    case.read.add("grad_scale")
    scale = case.config.get("grad_scale")
    if scale == "sqrt(qp/numel)":
        options["grad_scale"] = "lsq"
    elif scale is not None:
        options["grad_scale"] = float(case.number("grad_scale"))
    if not case.weight:
        options.pop("weight_norm", None)
    clip = "alpha" if "param_alpha" in case.arrays else "threshold"
    yield fake_quantize(case, name, {clip: "clip"}, **options)


def levels(case: Case) -> Iterator[Answer]:
    chosen(case, {"sorted, maximum 1": None})
    case.all_known()
    answer: Answer = []
    for name in case.arrays:
        kind, _, digits = name.rpartition("_B")
        if kind not in LEVELS or not digits.isdigit():
            raise NotOffered(f"levels {name!r}")
        try:
            units = torch.tensor(LEVELS[kind](int(digits)), dtype=torch.float64)
        except KeyError as error:
            raise NotOffered(f"levels {name!r}") from error
        answer.append((name, units / units.max()))
    yield answer


def nulsq(case: Case) -> Iterator[Answer]:
    sides = ("symmetric",) if case.weight else ("positive", LOWER_LEVEL)
    chosen(case, dict.fromkeys(sides))
    counted = case.known("num_elements", "x.shape[1]", "numel")
    case.known("grad_scale", 1, *NULSQ_FACTORS)
    mode = case.known("grad_scale_mode", "none", "LSQ_grad_scale")
    scales = ["channel_count" if counted == "x.shape[1]" else "numel"]
    if mode == "none":
        scales = ["none"]
    if mode is None and case.text("conformance") == "edge":
        scales = ["none", "channel_count", "numel"]
    for grad_scale in scales:
        yield fake_quantize(case, "nulsq", {"steps": "steps"}, grad_scale=grad_scale)


def n2uq_weight(case: Case) -> Iterator[Answer]:
    chosen(case, {"L1 entropy-preserving": None})
    case.read.add("param_clip_val")  # a constant: it gets no gradient
    yield fake_quantize(case, "n2uq", weight_gradient="over_scale")


def n2uq_activation(case: Case) -> Iterator[Answer]:
    chosen(
        case,
        dict.fromkeys(
            (
                "initial parameters",
                "moved parameters, one interval below eps",
                "thresholds exactly hit",
            )
        ),
    )
    case.known("eps", 0.001)
    case.known("range", 2.0)
    names = {name: name for name in ("start", "a", "scale1", "scale2")}
    yield fake_quantize(case, "n2uq", names, grad_scale="none")


def reactnet(case: Case) -> Iterator[Answer]:
    part = chosen(case, REACTNET)
    if part == "rprelu":
        yield rprelu(case)
    elif part == "rsign":
        yield fake_quantize(case, "reactnet", {"bias": "bias"})
    else:
        yield fake_quantize(case, "reactnet") + fake_quantize(case, "bireal")


def rprelu(case: Case) -> Answer:
    names = {"bias1": "shift_in", "slope": "slope", "bias2": "shift_out"}
    case.all_known(*names)
    x = case.input()
    module = RPReLU(x.shape[1])
    for golden, ours in names.items():
        parameter = module.get_parameter(ours)
        parameter.data = case.tensor(f"param_{golden}").reshape(parameter.shape).clone()
    y = module(x.view(*x.shape[:2], -1, 1))  # (N, C, H*W, 1)
    y.backward(case.upstream(y))
    gradients = [(f"grad_{golden}", module.get_parameter(names[golden]).grad) for golden in names]
    return [("y", y), ("grad_x", x.grad), *gradients]


def xnor(case: Case) -> Iterator[Answer]:
    chosen(case, {"mean-centred, clamped, L1 scale, scale-aware gradient": None})
    answer = fake_quantize(case, "xnor", count_factor=True)
    stored = case.input().detach()
    build("xnor", site_of(case, stored)).after_step(stored)
    yield [*answer, ("centered", stored)]


def minmax(case: Case) -> Iterator[Answer]:
    raise NotOffered("the signed maximum as the range of 8-bit weights; range_linear takes max|w|")


# -------------------------------------------------------------------------------- losses


def bin_loss(case: Case) -> Iterator[Answer]:
    binary = chosen(case, BIN_VARIANTS)
    attached = case.known("backprop_to_alpha", False, True)
    case.known("reduction", "sum over bins and over layers")
    layers = int(case.number("layers", case.layers("w")))
    case.all_known()
    attached = attached is not False and "grad_alpha0" in case.arrays
    signed_one_bit = case.bits == 1 and case.signed
    # of the levels -a, +a the step of the mid-rise grid is 2 a
    factor = 2.0 if binary or signed_one_bit else 1.0
    answer: Answer = []
    losses, values, alphas = [], [], []
    for layer in range(layers):
        x = case.tensor(f"w{layer}").clone().requires_grad_()
        alpha = case.tensor(f"alpha{layer}").clone().requires_grad_()
        target = "weight" if case.signed else "activation"
        site = Site(target, case.bits, case.signed, 1)
        quantizer = build("uniq" if signed_one_bit else "lsq", site)
        scale = alpha.squeeze() * factor
        set_parameters(quantizer, {"scale": scale.detach()})
        q = quantizer.encode(x)
        loss = bin_regularization(x, q, scale=scale if attached else None)
        losses.append(loss)
        values.append(x)
        alphas.append(alpha)
        answer.append((f"layer{layer}_loss_mse_var_bins", bin_terms(loss, x, q)))
    total = sum(losses)
    total.backward()
    answer.insert(0, ("loss", total))
    for layer, (x, alpha) in enumerate(zip(values, alphas, strict=True)):
        answer.append((f"grad_w{layer}", x.grad))
        if attached:
            answer.append((f"grad_alpha{layer}", alpha.grad))
    yield answer


@torch.no_grad()
def bin_terms(loss: Tensor, x: Tensor, q: QTensor) -> Tensor:
    """The loss; of our codes its two terms, and the number of bins in use."""
    bins = q.codes.unique()
    members = [x[q.codes == code] for code in bins]
    levels = q.scale * (bins - q.zero_point)
    distance = sum((m.mean() - level) ** 2 for m, level in zip(members, levels, strict=True))
    spread = sum(m.var(unbiased=False) for m in members)
    return torch.stack([loss.detach(), distance, spread, torch.tensor(float(len(bins)))])


def dampening_loss(case: Case) -> Iterator[Answer]:
    aggregation = chosen(case, {name: name for name in ("sum", "mean", "kernel_mean")})
    case.known("aggregation", aggregation)
    per_channel = bool(case.known("per_channel", False, True))
    case.all_known("delta")
    x, delta = case.tensor("x").clone(), case.tensor("param_delta")
    site = Site("weight", case.bits, True, x.shape[0])
    quantizer = build("lsq", site, per_channel=per_channel)
    set_parameters(quantizer, {"scale": delta})
    x.requires_grad_()
    scale = quantizer.learned_scale(x, gradient=1.0)
    loss = dampening(x, quantizer.encode(x), scale=scale, aggregation=aggregation)
    loss.backward()
    yield [("loss", loss), ("grad_x", x.grad), ("grad_delta", quantizer.scale.grad)]


def freezing(case: Case) -> Iterator[Answer]:
    to = chosen(case, {"ema integer": "mean", "last integer": "last"})
    case.known("use_ema_x_int", to == "mean")
    momentum, threshold = case.number("momentum"), case.number("freeze_threshold")
    x = case.tensor("x")
    case.known("steps", len(x))
    case.all_known()
    quantizer = build("lsq", Site("weight", case.bits, True, 1))
    set_parameters(quantizer, {"scale": case.tensor("delta")})
    state = None
    looks = []
    for weights in x:
        q = quantizer.encode(weights)
        codes = q.codes.int() - int(q.zero_point)
        if state is None:
            state = Oscillation.start(codes)
        state = follow(state, codes, momentum=momentum, threshold=threshold, freeze_to=to)
        looks.append(state)
    yield [
        ("x_int", torch.stack([look.codes for look in looks])),
        ("frozen", torch.stack([look.frozen for look in looks])),
        ("ema_oscillation", torch.stack([look.frequency for look in looks])),
        ("total_oscillation", looks[-1].count),
    ]


def distillation(case: Case) -> Iterator[Answer]:
    name = chosen(case, DISTILLATION)
    case.known("reduction", *KL_REDUCTIONS)
    temperature = case.number("T", 1)
    if name == "distribution" and temperature != 1:
        raise NotOffered(f"config T = {temperature} of a loss without a temperature")
    weight = case.number("lam", 1.0)
    case.all_known()
    logits = case.tensor("student_logits").clone().requires_grad_()
    labels = case.tensor("labels") if weight < 1 or "labels" in case.arrays else torch.zeros(0)
    step = Step(logits, labels, case.tensor("teacher_logits"))
    loss = weight * LOSSES[name].factory(temperature=float(temperature))(step)
    if weight < 1:
        loss = loss + (1 - weight) * LOSSES["cross_entropy"].factory()(step)
    loss.backward()
    yield [("loss", loss), ("grad_student", logits.grad)]


# ---------------------------------------------------------------------------- initialisers


def initial_steps(case: Case) -> Iterator[Answer]:
    chosen(case, {"all": None})
    case.all_known()
    rows = {side: rows_of(case.tensor(side), channel_axis=None) for side in "wa"}
    channels = rows_of(case.tensor("w"), channel_axis=0)
    answer: Answer = []
    for name in case.arrays:
        method, _, place = name.rpartition("_")
        if not method:
            continue
        side, digits = place[:1], place[1:]
        if method not in STARTS or side not in rows or not digits.isdigit():
            raise NotOffered(f"initial step {name!r}")
        weight, bits = side == "w", int(digits)
        high = max(2 ** (bits - 1) - 1, 1) if weight else 2**bits - 1
        step = starting_steps(
            channels if method == "lsq_pc" else rows[side],
            init=STARTS[method],
            low=float(-high - 1 if weight else 0),
            high=float(high),
            bits=bits,
            signed=weight,
        )
        answer.append((name, step))
    yield answer


# --------------------------------------------------------------------- the words of entries

SIGN_OF_ZERO = "sign(0)=0, gradient 2-2|x| inside [-1,1)"
REACTNET = {
    "sign with piecewise-quadratic gradient": "sign",
    SIGN_OF_ZERO: "sign",
    "per-channel L1 scale (also Bi-Real)": "weight",
    "RSign: learnable per-channel shift, then sign": "rsign",
    "RPReLU": "rprelu",
}
ONE_BIT_BUG = "1-bit bug: all positives become 1"
GRID_ALONE = "the functions of the grid; the class refuses a width at which it collapses"
RANGE_MODES = {
    "SYMMETRIC": "symmetric",
    "SYMMETRIC_RESTRICTED": "restricted",
    "ASYMMETRIC_UNSIGNED": "asymmetric",
    "ASYMMETRIC_SIGNED": "asymmetric",
}
LSQ_VARIANTS = {  # whether the weight is normalized first
    "per-tensor": False,
    "per-tensor symmetric": False,
    "per-channel": False,
    "per-tensor unsigned": False,
    "explicit autograd function": False,
    "channel-count grad scale": False,
    "bin-regularization repository": False,
    "relu, optional fixed clip, then LSQ": False,
    "ties and bounds": False,
    "inside LWN: normalise, quantise, multiply std back": True,
}
PER_CHANNEL_SYMMETRIC = ("per_channel", "symmetric")
LSQ_FACTORS = (
    "1/sqrt(qp*numel) with numel of the WHOLE tensor even per channel",
    "1/sqrt(qp*numel), numel includes the batch dimension",
    "1/sqrt(numel*qp)",
    "1/sqrt(numel*max(qp,1))",
)
DETACHED_NORM = "(w-mean)/std, std unbiased, statistics detached; not multiplied back"
LEVELS = {"apot": apot_levels, "pot": pot_levels, "uniform": uniform_levels}
LEVEL_SET_VARIANTS: dict[str, dict[str, Any]] = {
    "detached weight normalisation, unclipped weight gradient": {
        "form": "cifar",
        "weight_norm": "normalized",
    },
    "weight normalisation with gradient, clipped STE": {
        "form": "imagenet",
        "weight_norm": "normalized",
    },
    "no weight norm inside, LSQ-like grad scale": {"form": "imagenet", "weight_norm": "none"},
    "upper clip only": {"form": "cifar"},
    "no lower clip: negative input gives 0 forward but gradient 1, and alpha gets (q-x/alpha)": {
        "form": "cifar"
    },
    "clamp 0..1": {"form": "imagenet"},
}
LOWER_LEVEL = "thresholds exactly hit: the lower level is taken"
NULSQ_FACTORS = (
    "1/sqrt(num_elements*qp)",
    "2/sqrt(numel*|qn|) for the negative steps, 2/sqrt(numel*qp) for the positive",
)
UNIQ_FACTOR = "1/sqrt(numel*qp); weights use qp=max(2^(b-1)-1,1), activations 2^b-1"
BIN_VARIANTS = {  # whether the bins are those of a binary quantizer
    "binary bins {-alpha,+alpha}; alpha gets gradient": True,
    "binary bins {-alpha,+alpha}; alpha detached": True,
    "alpha gets gradient through the targets": False,
    "alpha detached": False,
    "activation-only repository": False,
}
DISTILLATION = {
    "batchmean": "kl",
    "takd-as-coded": "takd",
    "soft cross-entropy T=1, no labels (ReActNet, N2UQ)": "distribution",
}
KL_REDUCTIONS = ("batchmean", "KLDivLoss default 'mean': divides by N*C")
STARTS = {
    "nmse": "nmse",
    "uniq": "nmse",
    "lsq": "lsq",
    "lsq_pc": "lsq",
    "br": "lsq",
    "const": "constant",
}

ADAPTERS: dict[tuple[str, tuple[str, ...]], Callable[[Case], Iterator[Answer]]] = {
    ("dorefa", ("weight", "activation")): dorefa,
    ("wrpn", ("weight", "activation")): wrpn,
    ("pact", ("activation",)): pact,
    ("range_linear", ("weight",)): range_linear_weight,
    ("range_linear", ("activation-sequence",)): range_linear_activation,
    ("lsq", ("weight", "activation")): lsq,
    ("uniq", ("weight", "activation")): uniq,
    ("lcq", ("weight", "activation")): lcq,
    ("apot", ("weight", "activation")): level_sets,
    ("pot", ("weight", "activation")): level_sets,
    ("apot_uniform", ("weight", "activation")): level_sets,
    ("apot", ("levels",)): levels,
    ("nulsq", ("weight", "activation")): nulsq,
    ("n2uq", ("weight",)): n2uq_weight,
    ("n2uq", ("activation",)): n2uq_activation,
    ("reactnet", ("weight", "activation")): reactnet,
    ("xnor", ("weight",)): xnor,
    ("minmax", ("weight",)): minmax,
    ("bin_regularization", ("loss",)): bin_loss,
    ("oscillation_dampening", ("loss",)): dampening_loss,
    ("oscillation_freezing", ("sequence",)): freezing,
    ("distillation", ("loss",)): distillation,
    ("init", ("init",)): initial_steps,
}

# Where an origin and we part at exact ties, zeros and bounds, and why.
CHOICES = {
    ("dorefa", "sign(0)=0"): "sgn(0) = +1, so that one bit has two levels and not three",
    ("reactnet", SIGN_OF_ZERO): "sgn(0) = +1, so that one bit has two levels and not three",
    ("dorefa", ONE_BIT_BUG): "one bit has its threshold at 0.5, not at 0",
}
