"""Oscillating weights: the dampening loss, the tracker, and what freezing promises."""

from __future__ import annotations

import pytest
import torch
from bitladder.quant import (
    QUANTIZERS,
    OscillationTracker,
    QTensor,
    QuantizerChoice,
    QuantLayer,
    Site,
    dampening,
    quant_layers,
    reestimate_batch_norm,
    weight_dampening,
)
from bitladder.quant.oscillation import Oscillation, follow, move_to_codes
from quant_networks import batches, images, quantized
from torch import nn

SHAPE = (6, 4, 3, 3)


def weights(seed=0, shape=SHAPE):
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_weight_quantizer():
    found = []
    for name in QUANTIZERS:
        factory = QUANTIZERS[name].factory
        for bits in (1, 2, 4) if "weight" in factory.targets else ():
            try:
                factory(Site("weight", bits, signed=True, channels=6))
            except ValueError:
                continue
            found.append((name, bits))
    return pytest.mark.parametrize(("name", "bits"), found)


def build(name, bits, x, **options):
    site = Site("weight", bits, signed=True, channels=len(x))
    quantizer = QUANTIZERS[name].factory(site, **options)
    quantizer.calibrate(x)
    return quantizer


class Layer(nn.Module):
    """One quantized linear layer of `shape`, under a name."""

    def __init__(self, name="lsq", bits=2, shape=(6, 8), **options):
        super().__init__()
        linear = nn.Linear(shape[1], shape[0], bias=False)
        linear.weight.data = weights(shape=shape)
        quantizer = build(name, bits, linear.weight.detach(), **options)
        self.one = QuantLayer(linear, quantizer, None)

    def forward(self, x):
        return self.one(x)


def codes_of(model):
    return [q.weight_quantizer.encode(q.weight).codes.clone() for q in quant_layers(model).values()]


def shake(model, seed, size=0.1):
    """Moves every parameter, as an optimizer that has lost its way would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


# dampening


@every_weight_quantizer()
def test_dampening_is_zero_on_the_levels_and_pulls_towards_them(name, bits):
    x = weights().requires_grad_()
    quantizer = build(name, bits, x.detach())
    latent, q = quantizer.latent(x), quantizer.encode(x)
    assert dampening(q.dequantize(), q) == 0
    moved = latent.detach().requires_grad_()
    loss = dampening(moved, q)
    loss.backward()
    assert 0 < dampening(moved - 0.1 * moved.grad, q) < loss


def test_dampening_gives_values_beyond_the_range_no_gradient():
    x = torch.tensor([[-9.0, -0.4, 0.3, 9.0]], requires_grad=True)
    q = QTensor(torch.tensor([[0, 2, 2, 3]]), torch.tensor(1.0), bits=2, num_levels=4, zero_point=2)
    dampening(x, q).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, -0.8, 0.6, 0.0]]))


def test_the_aggregations_differ_by_their_counts():
    x = weights()
    q = build("lsq", 3, x).encode(x)
    total = dampening(x, q)
    torch.testing.assert_close(dampening(x, q, aggregation="mean"), total / x.numel())
    torch.testing.assert_close(dampening(x, q, aggregation="kernel_mean"), total / x[0].numel())


def test_dampening_sees_the_range_of_each_row_of_a_codebook():
    codebook = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-3.0, -1.0, 1.0, 3.0]])
    q = QTensor(
        torch.tensor([[3, 0], [3, 0]]), torch.ones(()), bits=2, num_levels=4, codebook=codebook,
        channel_axis=0,
    )  # fmt: skip
    x = torch.tensor([[5.0, -5.0], [2.5, -2.5]], requires_grad=True)
    loss = dampening(x, q)
    loss.backward()
    assert loss == 0.5
    assert x.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_dampening_refuses_codes_of_another_shape():
    q = QTensor(torch.zeros(4, 1), torch.tensor(1.0), bits=1, num_levels=2)
    with pytest.raises(ValueError, match="codes"):
        dampening(torch.zeros(4), q)


def test_the_dampening_of_a_network_sums_over_its_weights():
    model = quantized(2, 4)
    parts = [
        dampening(layer.weight, layer.weight_quantizer.encode(layer.weight))
        for layer in quant_layers(model).values()
    ]
    torch.testing.assert_close(weight_dampening(model), sum(parts))
    assert len(parts) == 5


# following


def look(codes, **options):
    state = Oscillation.start(torch.tensor([codes[0]]))
    for code in codes[1:]:
        state = follow(state, torch.tensor([code]), momentum=0.5, **options)
    return state


@pytest.mark.parametrize(
    ("codes", "count"),
    [
        ([0, 1, 2, 3], 0),  # one way
        ([0, 1, 0], 1),
        ([0, 1, 1, 1, 0], 1),  # a rest between is no change of direction
        ([0, 1, 0, 1, 0], 3),
        ([2, 1, 0, 1, 2], 1),
        ([3, 3, 3], 0),
    ],
)
def test_an_oscillation_is_a_change_against_the_last_one(codes, count):
    assert look(codes).count.item() == count


def test_unsigned_codes_fall_as_well_as_they_rise():
    state = Oscillation.start(torch.tensor([0], dtype=torch.uint8))
    for code in (255, 0, 255):
        state = follow(state, torch.tensor([code], dtype=torch.uint8), momentum=0.5)
    assert state.count.item() == 2
    assert state.direction.item() == -1


def test_freezing_takes_the_mean_code_or_the_last_and_keeps_it():
    moves = [0, 0, 0, 1, 0, 1]
    for freeze_to, kept in (("mean", 0), ("last", 1)):
        state = look([*moves, 1, 1], threshold=0.7, freeze_to=freeze_to)
        assert state.frozen.item()
        assert state.codes.item() == kept
    assert not look(moves).frozen.item()


# a model that is followed


def test_only_narrow_weights_are_followed():
    model = quantized(4, 4, first_last_bits=8)
    tracker = OscillationTracker(model)
    assert set(tracker.layer_shares()) == {"body.conv1", "body.conv2", "body.shortcut"}
    with pytest.raises(ValueError, match="3 bits or fewer"):
        OscillationTracker(model, max_bits=3)


def test_the_tracker_holds_its_own_state_and_no_part_of_the_model():
    model = quantized(2, 4)
    tracker = OscillationTracker(model)
    assert not list(tracker.parameters())
    assert set(tracker.state_dict()) == set(Oscillation.__dataclass_fields__)
    assert not any("tracker" in name or "frozen" in name for name in model.state_dict())


def test_shares_are_of_all_weights_and_a_frozen_one_does_not_oscillate():
    model = Layer(shape=(4, 4))
    tracker = OscillationTracker(model, momentum=0.1)
    tracker.frequency = torch.tensor([0.0, 0.004, 0.006, 1.0] * 4)
    tracker.frozen = torch.arange(16) >= 8
    shares = tracker.shares()
    assert (shares.oscillating, shares.frozen) == (0.25, 0.5)
    assert tracker.layer_shares() == {"one": shares}
    assert tracker.shares(above=0.5).oscillating == 0.125


def test_weights_that_jump_to_and_fro_count_as_oscillating_and_are_frozen():
    model = Layer(shape=(4, 4))
    weight, step = model.one.weight, model.one.weight_quantizer.scale.detach()
    with torch.no_grad():
        weight.zero_()
    tracker = OscillationTracker(model, momentum=0.1)
    for turn in range(9):
        with torch.no_grad():
            weight[0] = step * (0.4, 0.6)[turn % 2]
        tracker.update(threshold=0.5 if turn < 8 else None)
    assert tracker.shares().oscillating == 0.25
    tracker.update(threshold=0.2)
    assert (tracker.shares().oscillating, tracker.shares().frozen) == (0.0, 0.25)


def test_following_alone_touches_no_weight():
    model = quantized(2, 4)
    tracker = OscillationTracker(model, momentum=0.5)
    for seed in range(5):
        shake(model, seed)
        before = [p.clone() for p in model.parameters()]
        tracker.update()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert tracker.shares().oscillating > 0
    assert tracker.shares().frozen == 0


@every_weight_quantizer()
def test_a_frozen_weight_keeps_its_code_whatever_moves(name, bits):
    model = Layer(name, bits, shape=(6, 40))
    tracker = OscillationTracker(model, momentum=0.5)
    quantizer = model.one.weight_quantizer
    before = None
    for seed in range(20):
        shake(model, seed, size=0.01)
        quantizer.after_step(model.one.weight.detach())
        tracker.update(threshold=0.1 if seed > 3 else None)
        codes = quantizer.encode(model.one.weight).codes.flatten()
        frozen = tracker.frozen.clone()
        assert torch.equal(codes[frozen], tracker.frozen_codes[frozen])
        if before is not None:
            assert frozen[before[0]].all()
            assert torch.equal(codes[before[0]], before[1][before[0]])
        before = frozen, codes
    assert frozen.any()
    assert model.one.weight.abs().max() < 2
    with torch.no_grad():
        y = quantizer(model.one.weight)
    assert torch.equal(y, quantizer.encode(model.one.weight).dequantize())


@every_weight_quantizer()
def test_weights_move_to_the_codes_asked_for_and_others_stay(name, bits):
    x = weights(shape=(6, 60))
    quantizer = build(name, bits, x)
    wanted = quantizer.encode(x).codes.roll(1, 1)
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.05
    moved = x.clone()
    lost = move_to_codes(quantizer, moved, wanted, where=where)
    assert not lost.any()
    assert torch.equal(quantizer.encode(moved).codes[where], wanted[where])
    assert torch.equal(moved[~where], x[~where])


def test_weights_that_fit_nowhere_stay_where_they_were():
    x = torch.tensor([[0.3, -0.3]])
    quantizer = build("xnor", 1, x)  # centred: never all negative
    for where in ([[True, True]], [[True, False]]):
        moved, where = x.clone(), torch.tensor(where)
        lost = move_to_codes(quantizer, moved, torch.zeros(1, 2), where=where)
        assert torch.equal(
            quantizer.encode(moved).codes[where & ~lost], torch.zeros(1, 2)[where & ~lost]
        )
        assert lost.sum() == where.sum() - 1
        assert moved.abs().max() < 1


def test_a_frozen_weight_that_cannot_be_held_is_let_go():
    model = Layer("xnor", 1, shape=(2, 2))
    tracker = OscillationTracker(model, momentum=0.01)
    tracker.frozen = torch.ones(4, dtype=torch.bool)
    tracker.frozen_codes = torch.zeros(4, dtype=torch.uint8)
    tracker.update(threshold=0.9)
    codes = model.one.weight_quantizer.encode(model.one.weight).codes.flatten()
    assert 0 < tracker.frozen.sum() < 4
    assert not codes[tracker.frozen].any()


def frozen_layer(name="lsq", **options):
    """A layer with a third of its weights frozen, sitting anywhere in their bins."""
    model = Layer(name, **options)
    tracker = OscillationTracker(model)
    tracker.frozen = torch.arange(tracker.frozen.numel()) % 3 == 0
    tracker.frozen_codes = tracker.codes.clone()
    return model, tracker, tracker.frozen.view(model.one.weight.shape)


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"name": "uniq"}])
def test_a_frozen_weight_is_a_constant_times_the_learned_scale(options):
    model, tracker, frozen = frozen_layer(**options)
    quantizer, weight = model.one.weight_quantizer, model.one.weight
    upstream = weights(3, weight.shape)
    with tracker.holding():
        y = quantizer(weight)
    y.backward(upstream)
    scale, q = quantizer.scale.detach(), quantizer.encode(weight)
    level = q.codes - q.zero_point
    u = weight.detach() / q.scale
    inside = (u >= quantizer.low) & (u <= quantizer.high)
    own = torch.where(frozen, level, torch.where(inside, level - u, level))
    want = upstream * own * quantizer.grad_factor(weight)
    want = want.sum() if scale.dim() == 0 else want.sum(1)
    torch.testing.assert_close(quantizer.scale.grad, want)
    torch.testing.assert_close(weight.grad, upstream * (inside & ~frozen))


@every_weight_quantizer()
def test_holding_changes_no_value_and_stops_the_gradient_of_frozen_weights(name, bits):
    model, tracker, frozen = frozen_layer(name, bits=bits, shape=(6, 20))
    weight = model.one.weight
    plain = model.one.weight_quantizer(weight)
    with tracker.holding():
        held = model.one.weight_quantizer(weight)
    assert torch.equal(plain, held)
    assert not model.one.weight_quantizer._forward_hooks
    path = torch.where(frozen, plain, 0.0).sum()
    assert torch.autograd.grad(path, weight)[0].abs().sum() > 0
    (grad,) = torch.autograd.grad(held[frozen].sum(), weight, allow_unused=True)
    assert grad is None or not grad.any()


def test_a_transposed_convolution_is_followed_and_frozen_as_it_is_encoded():
    layer = nn.ConvTranspose2d(3, 5, 3)
    layer.weight.data = weights(shape=(3, 5, 3, 3))
    quantizer = build("lsq", 2, layer.weight.detach().transpose(0, 1))
    model = nn.Sequential(QuantLayer(layer, quantizer, None))
    tracker = OscillationTracker(model, momentum=0.5)
    for seed in range(6):
        shake(model, seed)
        tracker.update(threshold=0.3)
    frozen = tracker.frozen
    assert frozen.any()
    codes = quantizer.encode(model[0].weight).codes.flatten()
    assert torch.equal(codes[frozen], tracker.frozen_codes[frozen])
    with tracker.holding():
        model(images(size=5)).square().sum().backward()
    grad = model[0].latent.grad.transpose(0, 1).flatten()
    assert not grad[frozen].any()
    assert grad[~frozen].any()


def test_training_with_frozen_weights_never_changes_their_codes():
    model = quantized(2, 4, weight=QuantizerChoice("lsq"), first_last_bits=4)
    tracker = OscillationTracker(model, momentum=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    seen = None
    for step in range(25):
        with tracker.holding():
            model(images(8, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.update(threshold=0.2 if step > 5 else None)
        codes = torch.cat([c.flatten() for c in codes_of(model)])
        if seen is not None:
            assert torch.equal(codes[seen[0]], seen[1][seen[0]])
        seen = tracker.frozen.clone(), codes
    assert 0 < seen[0].float().mean() < 1
    reestimate_batch_norm(model, batches())
    model.eval()(images())
    assert torch.equal(torch.cat([c.flatten() for c in codes_of(model)]), seen[1])
    assert torch.equal(seen[1][seen[0]], tracker.frozen_codes[seen[0]])
