"""The quantizers against numbers that the original implementations produced."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import QUANTIZERS, Quantizer, Site
from bitladder.quant.functional import learned_step, per_channel_view, round_through, round_within
from bitladder.quant.initializers import lsq_step, nmse_step, rows_of
from bitladder.quant.quantizers.range_linear import extremes, linear_grid
from golden_cases import Case, cases


def site_of(case: Case) -> Site:
    target = "weight" if case.role == "weight" else "activation"
    axis = 0 if target == "weight" else 1
    shape = case.tensor("x").shape
    channels = shape[axis] if len(shape) > axis else 1
    return Site(target, case.bits, target == "weight" or case.signed, channels)


def build(name: str, case: Case, step: str | None = None, **options: object) -> Quantizer:
    quantizer = QUANTIZERS[name].factory(site_of(case), **options)
    if step is not None:
        quantizer.scale.data = case.tensor(step).float().view_as(quantizer.scale)
    return quantizer


def run(quantizer: Quantizer, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    x = case.tensor("x").float().requires_grad_()
    y = quantizer(x)
    y.backward(case.tensor("upstream").float())
    return y, x.grad


def agrees(quantizer: Quantizer, case: Case, step: str | None = None) -> None:
    y, grad_x = run(quantizer, case)
    case.close(y, "y")
    case.close(grad_x, "grad_x")
    if step is not None:
        case.close(quantizer.scale.grad, step)


@cases("lsq", "lsq_weight_")
def test_lsq_weights_agree_with_the_original(case):
    options = {"per_channel": case.config["per_channel"], "restricted": case.config["symmetric"]}
    agrees(build("lsq", case, "param_s", **options), case, "grad_s")


@cases("lsq", "lsq_act_")
def test_lsq_activations_agree_with_the_original(case):
    agrees(build("lsq", case, "param_s"), case, "grad_s")


@cases("lsq", "lsq_function_")
def test_the_step_function_agrees_with_the_original(case):
    x = case.tensor("x").requires_grad_()
    step = case.tensor("param_s").squeeze().requires_grad_()
    factor = (x.numel() * case.qp) ** -0.5
    y = learned_step(x, step, float(case.qn), float(case.qp), grad_scale=factor)
    y.backward(case.tensor("upstream"))
    case.close(y, "y")
    case.close(x.grad, "grad_x")
    case.close(step.grad, "grad_s")


@cases("lsq", "lsq_brrepo_weight")
def test_lsq_weights_agree_with_the_bin_regularization_code(case):
    agrees(build("lsq", case, "param_alpha"), case, "grad_alpha")


@cases("lsq", "lsq_brrepo_act")
def test_lsq_after_a_clip_agrees_with_the_bin_regularization_code(case):
    quantizer = build("lsq", case, "param_alpha")
    x = case.tensor("x").requires_grad_()
    clipped = x.relu()
    if case.config["clip_value"] is not None:
        clipped = clipped.clamp(max=case.config["clip_value"])
    y = quantizer(clipped)
    y.backward(case.tensor("upstream"))
    case.close(y, "y")
    case.close(x.grad, "grad_x")
    case.close(quantizer.scale.grad, "grad_alpha")


@cases("lsq", "lsq_nulsqrepo", "variant")
def test_the_options_of_the_step_gradient_agree_with_nulsq_code(case):
    mode = "none" if case.config["grad_scale_mode"] == "none" else "channel_count"
    agrees(build("lsq", case, "param_s", grad_scale=mode), case, "grad_s")


@cases("lsq", "edge_lsq", "edge")
def test_lsq_ties_and_bounds_are_those_of_the_original(case):
    mode = "none" if "function" in case.id else "numel"  # the function was called with g = 1
    agrees(build("lsq", case, "param_s", grad_scale=mode), case, "grad_s")


@cases("lsq", "lsq_brrepo_weight_w1", "known-bug")
def test_one_bit_weights_never_become_ternary(case):
    with pytest.raises(ValueError, match="uniq"):
        build("lsq", case)
    quantizer = build("uniq", case)
    quantizer.calibrate(case.tensor("x"))
    assert len(case.tensor("y").unique()) == 3
    assert len(quantizer(case.tensor("x")).unique()) == 2


@cases("uniq", "uniq_", "variant")
def test_uniq_agrees_with_the_original(case):
    agrees(build("uniq", case, "param_delta"), case, "grad_delta")


@cases("dorefa", "dorefa_weight_w")
def test_dorefa_weights_agree_with_the_original(case):
    agrees(build("dorefa", case), case)


@cases("dorefa", "dorefa_weight_unscaled", "variant")
def test_dorefa_unit_range_agrees_with_the_original(case):
    agrees(build("dorefa", case, unit_range=True), case)


@cases("dorefa", "dorefa_act_")
def test_dorefa_activations_agree_with_the_original(case):
    agrees(build("dorefa", case), case)


@cases("wrpn", "clipped01_act_")
def test_clipped_activations_agree_with_the_original(case):
    agrees(build("dorefa", case), case)


@cases("dorefa", "edge_dorefa_act_a2", "edge")
def test_dorefa_activation_bounds_pass_the_gradient(case):
    agrees(build("dorefa", case), case)


@cases("wrpn", "edge_clipped01_act_a1", "edge")
def test_one_bit_activations_have_their_threshold_at_one_half(case):
    agrees(build("dorefa", case), case)


@cases("dorefa", "dorefa_act_a1", "known-bug")
def test_one_bit_activations_are_not_the_sign_of_the_clipped_input(case):
    y, _ = run(build("dorefa", case), case)
    assert not torch.equal(y, case.tensor("y"))
    assert torch.equal(y, (case.tensor("x") > 0.5).float())


@cases("dorefa", "edge_dorefa_weight_unscaled_w1_zero", "edge")
def test_a_zero_weight_counts_as_positive_at_one_bit(case):
    agrees(build("dorefa", case), case)
    case.close(build("dorefa", case, unit_range=True)(case.tensor("x")), "y")


@cases("dorefa", "edge_dorefa_weight_w1_zero", "edge")
def test_a_zero_weight_makes_no_third_level(case):
    assert len(case.tensor("y").unique()) == 3
    assert len(build("dorefa", case)(case.tensor("x")).unique()) == 2


def grid_of(case: Case, low: torch.Tensor, high: torch.Tensor, signed: bool) -> tuple:
    mode = {"SYMMETRIC": "symmetric", "SYMMETRIC_RESTRICTED": "restricted"}
    chosen = mode.get(case.config["mode"], "asymmetric")
    return linear_grid(low, high, bits=case.bits, signed=signed, mode=chosen)


@cases("range_linear", "rangelinear_weight", "target", "variant")
def test_range_linear_weights_agree_with_the_original(case):
    x = case.tensor("x").requires_grad_()
    axis = 0 if case.config["per_channel"] else None
    low, high = (per_channel_view(end, x) for end in extremes(x, channel_axis=axis))
    y = round_through(x, *grid_of(case, low, high, signed=True))
    y.backward(case.tensor("upstream"))
    case.close(y, "y", where="valid")
    case.close(x.grad, "grad_x")


@cases("range_linear", "rangelinear_act")
def test_range_linear_activations_follow_the_range_as_the_original(case):
    # the class refuses 2 bits, the grid does not: the sequence is checked on one of 8 bits
    modes = {"SYMMETRIC": "symmetric", "ASYMMETRIC_UNSIGNED": "asymmetric"}
    mode = modes[case.config["mode"]]
    site = Site("activation", max(case.bits, 3), case.signed, 4)
    quantizer = QUANTIZERS["range_linear"].factory(site, mode=mode, decay=case.config["ema_decay"])
    for step in range(case.config["steps"]):
        x = case.tensor(f"x{step}").requires_grad_()
        y = quantizer(x)
        case.close(quantizer.low, f"tracked_min{step}")
        case.close(quantizer.high, f"tracked_max{step}")
        scale, lowest, highest = grid_of(case, quantizer.low, quantizer.high, case.signed)
        case.close(1 / scale, f"scale{step}")
        if case.bits < 3:
            start, end = quantizer.low.clone(), quantizer.high.clone()
            if mode == "symmetric":
                end = torch.maximum(start.abs(), end.abs())
                start = -end
            y = round_within(x, scale, lowest, highest, start, end)
        y.backward(case.tensor(f"upstream{step}"))
        case.close(y, f"y{step}", where=f"valid{step}")
        case.close(x.grad, f"grad_x{step}")


@cases("minmax", "minmax8", "variant")
def test_eight_bit_first_and_last_weights_span_the_largest_size_not_the_largest_value(case):
    x = case.tensor("x")
    original = case.tensor("y")
    quantizer = build("range_linear", case)
    y = quantizer(x)
    assert (y - x).abs().max() <= x.abs().max() / 127 / 2 * 1.0001
    if x.max() == x.abs().max():
        torch.testing.assert_close(y, original)
    else:
        assert original.unique().numel() > 0
        assert original.min() / original.max() < -1  # beyond code -127 in the original
        assert y.abs().max() <= x.abs().max() * 1.0001


@cases("init", "initialisers")
def test_initial_steps_agree_with_the_originals(case):
    w, a = case.tensor("w"), case.tensor("a")
    flat = {"w": rows_of(w, channel_axis=None), "a": rows_of(a, channel_axis=None)}
    for name in case.arrays:
        method, _, place = name.rpartition("_")
        if method in ("", "const"):
            continue
        side, bits = place[0], int(place[1:])
        qmax = max(2 ** (bits - 1) - 1, 1) if side == "w" else 2**bits - 1
        if method in ("nmse", "uniq"):
            got = nmse_step(flat[side], bits=bits, signed=side == "w")
        elif method == "lsq_pc":
            got = lsq_step(rows_of(w, channel_axis=0), qmax=qmax)
        else:
            got = lsq_step(flat[side], qmax=qmax)
        case.close(got, name)


@pytest.mark.parametrize(("init", "golden"), [("nmse", "nmse"), ("lsq", "lsq")])
@cases("init", "initialisers")
def test_calibration_starts_where_the_option_says(case, init, golden):
    for side, site in (
        ("w", Site("weight", 4, True, 8)),
        ("a", Site("activation", 4, False, 4)),
    ):
        quantizer = QUANTIZERS["lsq"].factory(site, init=init)
        quantizer.calibrate(case.tensor(side))
        case.close(quantizer.scale, f"{golden}_{side}4")
