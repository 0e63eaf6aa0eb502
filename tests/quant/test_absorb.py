"""A ReLU in front of an unsigned quantizer may be left out: to the bit, nothing changes."""

from __future__ import annotations

import pickle
from collections import Counter
from copy import deepcopy
from itertools import product

import pytest
import torch
from bitladder.models import build_model
from bitladder.models.tapped import tapped
from bitladder.models.tiny import TinyConvNet
from bitladder.quant import (
    QUANTIZERS,
    WIDTHS,
    Quantizer,
    QuantizerChoice,
    QuantPolicy,
    Rule,
    Site,
    absorb_relus,
    activation_bin_regularization,
    bake,
    calibrate,
    collect_inputs,
    layer_plan,
    layer_report,
    quant_layers,
    quantize_model,
    reestimate_batch_norm,
    restore_relus,
)
from bitladder.quant.absorb import AbsorbedReLU
from quant_networks import quantized as foreign
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

CHANNELS = 4
OPTIONS = {
    "apot": [{"form": "imagenet"}, {"grad_scale": "lsq"}],
    "pot": [{"form": "imagenet"}],
    "apot_uniform": [{"form": "imagenet"}],
    "lsq": [{"grad_scale": "channel_count"}],
    "uniq": [{"grad_scale": "none"}],
    "wrpn": [{"unit_range": True}],
}
LSQ, UNIQ = QuantizerChoice("lsq"), QuantizerChoice("uniq")
RUNGS = {  # as `auto` chooses them
    "W4A4": QuantPolicy(4, 4, LSQ, LSQ),
    "W2A2": QuantPolicy(2, 2, LSQ, LSQ),
    "W1A1": QuantPolicy(1, 1, UNIQ, UNIQ),
}


def unsigned() -> list[tuple[str, int, dict[str, str]]]:
    found = []
    for name, bits in product(QUANTIZERS, sorted(WIDTHS)):
        for options in ({}, *OPTIONS.get(name, [])):
            try:
                build(name, bits, options)
            except ValueError:
                continue
            found.append((name, bits, options))
    return found


def build(name: str, bits: int, options: dict[str, str]) -> Quantizer:
    return QUANTIZERS[name].factory(Site("activation", bits, False, CHANNELS), **options)


UNSIGNED = unsigned()
CLAMPING = [setup for setup in UNSIGNED if build(*setup).clamps_at_zero]


def awkward(dtype: torch.dtype, quantizer: Quantizer) -> Tensor:
    """Values of both signs, zeros of both signs, levels, bounds; channels last."""
    x = torch.randn(8, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(1))
    flat = x.view(-1)
    flat[:40], flat[40:80], flat[80:120] = 0.0, -0.0, -1e-30
    levels = quantizer.encode(flat[:1]).levels().flatten()[:100]
    flat[200 : 200 + len(levels)] = levels
    flat[300 : 300 + len(levels)] = -levels
    flat[400], flat[401], flat[402] = 1e6, -1e6, 1e-30
    flat[403] = quantizer.range()[1]
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def run(quantizer: Quantizer, x: Tensor, *, relu: bool) -> tuple[Tensor, ...]:
    """Values, the gradient of the input and those of the parameters."""
    x = x.clone().requires_grad_()
    y = quantizer(x.relu() if relu else x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    quantizer.zero_grad()
    y.backward(grad)
    return y.detach(), x.grad, *(p.grad for p in quantizer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setup", CLAMPING, ids=str)
def test_quantizing_is_quantizing_after_a_relu(setup, dtype):
    quantizer = build(*setup)
    quantizer.calibrate(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    x = awkward(dtype, quantizer)
    behind = run(quantizer, x, relu=True)
    quantizer.absorbs = True
    for got, want in zip(run(quantizer, x, relu=False), behind, strict=True):
        assert torch.equal(got, want)
    # and once more where the ReLU is computed because somebody looks
    for got, want in zip(run(quantizer, x, relu=True), behind, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(quantizer.encode(x).codes, quantizer.encode(x.relu()).codes)


def test_which_methods_clamp_at_zero():
    assert {name for name, *_ in CLAMPING} == {
        *("lsq", "uniq", "dorefa", "wrpn", "pact", "apot", "apot_uniform", "pot", "lcq", "nulsq")
    }
    # the range follows the smallest value; the first threshold is learned
    assert {name for name, *_ in UNSIGNED} - {n for n, *_ in CLAMPING} == {"range_linear", "n2uq"}


@pytest.mark.parametrize("name", ["lsq", "dorefa", "pact", "apot", "lcq", "nulsq"])
@pytest.mark.parametrize("target", ["weight", "activation"])
def test_what_is_signed_does_not_clamp(name, target):
    try:
        quantizer = QUANTIZERS[name].factory(Site(target, 4, True, CHANNELS))
    except ValueError:
        return
    assert not quantizer.clamps_at_zero


def images(count: int = 16, seed: int = 0) -> Tensor:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def batches(count: int = 2) -> list[Tensor]:
    return [images(seed=10 + number) for number in range(count)]


def network(
    name: str = "preact_resnet8", policy: QuantPolicy = RUNGS["W4A4"], **options: object
) -> nn.Module:
    model = build_model(
        name,
        num_classes=10,
        in_channels=3,
        image_size=8,
        options={"width": 8} | options,
    ).to(memory_format=torch.channels_last)
    quantize_model(model, policy, batches=batches(1))
    calibrate(model, batches())
    return model


def learn(model: nn.Module, steps: int = 4, *, autocast: bool = False) -> list[float]:
    """A few steps of SGD; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    targets = torch.arange(16) % 10
    losses = []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(model.train()(images(seed=step)).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", ["preact_resnet8", "cifar_resnet8"])
@pytest.mark.usefixtures("one_thread")
def test_training_is_the_same_to_the_bit(name, rung, autocast):
    plain = network(name, RUNGS[rung])
    model = deepcopy(plain)
    assert absorb_relus(model) == {"preact_resnet8": 6, "cifar_resnet8": 5}[name]
    assert learn(model, autocast=autocast) == learn(plain, autocast=autocast)
    assert_same_state(model, plain)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("preact_resnet20", {"block": "bottleneck"}),
        ("preact_resnet20", {"block": "bireal", "activation": "relu", "shortcut": "conv"}),
        ("cifar_resnet20", {"block": "bottleneck"}),
        ("cifar_resnet8", {"block": "bireal", "activation": "relu"}),
        ("cifar_resnet8", {"block": "react", "activation": "relu", "shortcut": "conv"}),
        ("cifar_resnet18", {}),
        ("plane10", {}),
        ("tiny_convnet", {}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_thread")
def test_the_other_networks_learn_the_same_too(name, options):
    plain = network(name, **options)
    model = deepcopy(plain)
    assert absorb_relus(model) > 0
    assert learn(model, 2) == learn(plain, 2)
    assert_same_state(model, plain)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module) -> Counter[str]:
    with Operations() as seen:
        learn(model, 1)
    return seen.count


def test_an_absorbed_relu_does_not_run():
    model = network()
    before = operations(model)
    absorbed = absorb_relus(model)
    saved = before - operations(model)
    assert saved == Counter(relu=absorbed, threshold_backward=absorbed, detach=saved["detach"])


def test_names_state_and_plan_stay_and_a_relu_comes_back():
    model = network()
    names, state, plan = dict(model.named_modules()), model.state_dict(), layer_plan(model)
    count = absorb_relus(model)
    assert list(dict(model.named_modules())) == list(names)
    assert list(model.state_dict()) == list(state)
    assert layer_plan(model) == plan
    assert absorb_relus(model) == 0
    restore_relus(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in names.items()}
    assert not any(m.absorbs for m in model.modules() if isinstance(m, Quantizer))
    assert absorb_relus(model) == count


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_relu_stays(training):
    model = network().train(training)
    absorb_relus(model)
    assert all(m.training == training for m in model.modules())
    model.train(not training)
    restore_relus(model)
    assert all(m.training != training for m in model.modules())


def test_what_reads_activations_sees_them_after_the_relu():
    plain = network()
    model = deepcopy(plain)
    absorb_relus(model)
    name = "layer2.0.act1"
    seen = []
    for one in (plain, model):
        with collect_inputs(one) as inputs:
            outputs = tapped(one.train(), images(), [name, "layer1.0.conv2"])
            loss = (
                activation_bin_regularization(one, inputs) + outputs.features[name].square().sum()
            )
            (loss + outputs.logits.square().mean()).backward()
            values = {key: value.detach() for key, value in inputs.items()}
        gradients = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
        seen.append((values, {k: v.detach() for k, v in outputs.features.items()}, gradients))
    assert seen[1][1][name].min() == 0
    for ours, theirs in zip(*seen, strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_calibration_and_reports_are_the_same():
    plain = network()
    model = deepcopy(plain)
    absorb_relus(model)
    for one in (plain, model):
        calibrate(one, [3 * x for x in batches()])
        reestimate_batch_norm(one, batches())
    assert_same_state(model, plain)
    assert layer_report(model, batches()) == layer_report(plain, batches())


def test_an_input_that_is_not_quantized_for_now_comes_after_the_relu():
    model = network().eval()
    absorb_relus(model)
    plain = deepcopy(model)
    restore_relus(plain)
    for one in (plain, model):
        one.layer1[0].conv2.input_quantizer = None
    assert torch.equal(model(images()), plain(images()))


@pytest.mark.usefixtures("one_thread")
def test_copies_of_it_are_their_own():
    model = network()
    absorb_relus(model)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = set(copied.modules())
        absorbed = [m for m in own if isinstance(m, AbsorbedReLU)]
        assert len(absorbed) == 6
        assert all(reader in own for m in absorbed for reader in m.readers)
        assert learn(copied, 2) == learn(deepcopy(model), 2)


def test_a_state_dict_fits_both_ways():
    model, other = network(), network()
    absorb_relus(model)
    learn(model, 1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_a_baked_network_gives_the_same():
    plain = bake(network())
    model = deepcopy(plain)
    assert absorb_relus(model) == 6
    assert torch.equal(model(images()), plain(images()))
    after = network()
    absorb_relus(after)
    assert torch.equal(bake(after)(images()), plain(images()))


@pytest.mark.slow  # the first compilation in a process takes 10 to 20 seconds
def test_compiled_code_has_no_relu_in_it_and_sees_a_hook():
    model = network("tiny_convnet").eval()
    plain = deepcopy(model)
    assert absorb_relus(model) == 1
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    assert torch.equal(compiled(images()), plain(images()))
    assert len(graphs) == 1
    assert sum("relu" in target for target in graphs[0]) == 1  # before the classifier
    name = "_orig_mod.act1"
    assert tapped(compiled, images(), [name]).features[name].min() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"activation_clip": 6.0},
        {"activation_clip": 1.0},
        {"activation": "rprelu"},
        {"activation": "hardtanh"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["preact_resnet8", "cifar_resnet8", "plane4", "tiny_convnet"])
def test_other_activations_stay(name, options):
    assert absorb_relus(network(name, **options)) == 0


def test_a_relu_stays_before_a_layer_that_needs_it():
    def absorbed(*rules: Rule) -> set[str]:
        model = network(policy=QuantPolicy(4, 4, rules=rules))
        absorb_relus(model)
        return {n for n, m in model.named_modules() if isinstance(m, AbsorbedReLU)}

    every = absorbed()
    assert {"layer1.0.act1", "layer1.0.act2", "layer2.0.act1"} <= every
    assert "act" not in every  # pooled
    moving = QuantizerChoice("range_linear")
    assert absorbed(Rule("layer1.0.conv2", activation=moving)) == every - {"layer1.0.act2"}
    # of two readers one is enough
    unquantized = Rule("layer2.0.shortcut", activation_bits=32)
    assert absorbed(unquantized) == every - {"layer2.0.act1"}


def test_a_relu_with_a_hook_stays():
    model = network()
    seen = []
    model.layer1[0].act1.register_forward_hook(lambda _, args, y: seen.append(y))
    assert absorb_relus(model) == 5
    model(images())
    assert seen[0].min() == 0


def test_networks_of_others_stay():
    class Another(TinyConvNet):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act1(self.bn1(self.conv1(x)))
            z = self.act2(self.bn2(self.conv2(y)))
            return self.fc(z.mean((2, 3))) + y.sum()

    model = Another(10, 3, 8)
    quantize_model(model, RUNGS["W4A4"], batches=batches(1))
    calibrate(model, batches())
    assert absorb_relus(model) == absorb_relus(foreign()) == 0
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2
    assert quant_layers(model)


def test_a_float_network_stays():
    model = build_model("preact_resnet8", num_classes=10, in_channels=3, image_size=8)
    assert absorb_relus(model) == 0
