import math

import numpy as np
import pytest
import torch
from bitladder.pipeline.losses import FEATURE_LOSSES, LOSSES, Step
from bitladder.pipeline.losses.dist import correlation

TEACHERS = [name for name in LOSSES if name != "cross_entropy"]
UNLABELLED = [name for name in TEACHERS if name != "decoupled_kl"]


@pytest.fixture
def step():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 10, generator=generator)
    return Step(student.requires_grad_(), torch.zeros(6, dtype=torch.long), teacher)


def gradient(loss, step):
    return torch.autograd.grad(loss(step), step.logits)[0]


def test_a_teacher_that_agrees_costs_nothing():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    step = Step(logits, torch.zeros(4, dtype=torch.long), logits.clone())
    assert LOSSES["kl"].factory(temperature=3.0)(step).item() == pytest.approx(0.0, abs=1e-6)


def test_takd_is_kl_over_the_number_of_classes(step):
    kl, takd = (LOSSES[name].factory(temperature=4.0) for name in ("kl", "takd"))
    torch.testing.assert_close(takd(step), kl(step) / 10)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_distribution_loss_is_kl_and_the_teacher_s_entropy(step, temperature):
    kl, soft = (LOSSES[n].factory(temperature=temperature) for n in ("kl", "distribution"))
    entropy = torch.distributions.Categorical(logits=step.teacher_logits / temperature).entropy()
    torch.testing.assert_close(soft(step), kl(step) + temperature**2 * entropy.mean())
    torch.testing.assert_close(gradient(soft, step), gradient(kl, step))


@pytest.mark.parametrize("name", UNLABELLED)
def test_a_loss_on_the_teacher_reads_no_labels(step, name):
    loss = LOSSES[name].factory()
    others = Step(step.logits, torch.full((6,), 9), step.teacher_logits)
    assert torch.equal(loss(others), loss(step))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_loss_on_the_teacher_is_float32_in_half_precision_and_under_autocast(step, name):
    loss = LOSSES[name].factory()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(step)
    assert torch.equal(inside, loss(step))
    half = Step(step.logits.bfloat16(), step.targets, step.teacher_logits.bfloat16())
    assert loss(half).dtype == torch.float32


@pytest.mark.parametrize("name", TEACHERS)
def test_a_loss_on_the_teacher_says_that_it_needs_one(name):
    step = Step(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), None)
    with pytest.raises(ValueError, match=f"'{name}' needs a teacher"):
        LOSSES[name].factory()(step)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_temperature_of_zero_is_refused(name):
    with pytest.raises(ValueError, match="must be above 0"):
        LOSSES[name].factory(temperature=0.0)


def part(name, step, **options):
    return LOSSES[name].factory(**options)(step)


@pytest.fixture
def labelled():
    """Labels of several classes, so that the target's place matters."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = 2 * torch.randn(2, 6, 5, generator=generator)
    return Step(student.requires_grad_(), torch.tensor([0, 4, 2, 1, 3, 4]), teacher)


def rows(step):
    """The step image by image."""
    for n in range(len(step.targets)):
        own = slice(n, n + 1)
        yield Step(step.logits[own], step.targets[own], step.teacher_logits[own])


def test_decoupled_kl_by_hand():
    # p = (1/2, 1/3, 1/6), q = (1/4, 1/4, 1/2), the label is the first class
    teacher, student = torch.tensor([[3.0, 2.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    step = Step(student, torch.tensor([0]), teacher)
    between = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    among = 2 / 3 * math.log((2 / 3) / (1 / 3)) + 1 / 3 * math.log((1 / 3) / (2 / 3))
    found = part("decoupled_kl", step, alpha=3.0, beta=5.0)
    assert found.item() == pytest.approx(3 * between + 5 * among, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_its_first_part_and_the_second_by_the_teacher_s_doubt(labelled, temperature):
    for row in rows(labelled):
        doubt = 1 - (row.teacher_logits / temperature).softmax(1)[0, row.targets[0]]
        t = {"temperature": temperature}
        first = part("decoupled_kl", row, alpha=1.0, beta=0.0, **t)
        second = part("decoupled_kl", row, alpha=0.0, beta=1.0, **t)
        torch.testing.assert_close(part("kl", row, **t), first + doubt * second)


def test_decoupled_kl_is_nothing_between_equals_and_finite_where_the_teacher_is_certain(labelled):
    same = Step(labelled.logits, labelled.targets, labelled.logits.detach().clone())
    assert part("decoupled_kl", same).item() == pytest.approx(0.0, abs=1e-5)
    sure = Step(labelled.logits, labelled.targets, 1000 * labelled.teacher_logits)
    assert gradient(LOSSES["decoupled_kl"].factory(), sure).isfinite().all()


def test_dist_by_hand():
    # numpy's own coefficients, row by row and column by column
    generator = torch.Generator().manual_seed(2)
    q, p = torch.randn(2, 4, 3, generator=generator).mul(2).softmax(-1)
    step = Step(q.log(), torch.zeros(4, dtype=torch.long), p.log())

    def distance(a, b):
        return 1 - np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])

    inter, intra = distance(q.numpy(), p.numpy()), distance(q.T.numpy(), p.T.numpy())
    found = part("dist", step, beta=2.0, gamma=3.0)
    assert found.item() == pytest.approx(2 * inter + 3 * intra, rel=1e-4)


def test_dist_is_nothing_between_equals_and_does_not_see_a_shift_of_logits(labelled):
    same = Step(labelled.logits, labelled.targets, labelled.logits.detach() - 3.0)
    assert part("dist", same, temperature=2.0).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_correlation_does_not_see_shift_and_scale(labelled, dim):
    a, b = labelled.logits.detach(), labelled.teacher_logits
    found = correlation(a, b, dim=dim)
    factor = torch.arange(1.0, found.numel() + 1).unsqueeze(dim)
    torch.testing.assert_close(correlation(factor * a - 2 * factor, b, dim=dim), found)
    torch.testing.assert_close(correlation(-a, b, dim=dim), -found)


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("value", [0.0, 5.0])
def test_gradients_on_an_answer_without_spread_are_finite_and_no_larger_than_logits(name, value):
    generator = torch.Generator().manual_seed(0)
    student = torch.full((6, 10), value, requires_grad=True)
    teacher = torch.randn(6, 10, generator=generator)
    step = Step(student, torch.zeros(6, dtype=torch.long), teacher)
    assert gradient(LOSSES[name].factory(), step).abs().max() < 10
    flat = Step(teacher.requires_grad_(), step.targets, student.detach())
    assert gradient(LOSSES[name].factory(), flat).abs().max() < 10


@pytest.mark.parametrize("gap", [30, 44, 48, 52, 90])
def test_dist_has_finite_gradients_where_no_image_has_a_class(gap):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 10, generator=generator)
    student[:, 3] -= gap
    teacher[:, 3] -= gap
    step = Step(student.requires_grad_(), torch.zeros(6, dtype=torch.long), teacher)
    assert gradient(LOSSES["dist"].factory(), step).abs().max() < 1


def feature(name, student, teacher, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return FEATURE_LOSSES[name].factory(student.shape, teacher.shape, generator, **options)


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_attention_transfer_by_hand():
    # one image of two pixels and two channels: mean squares (1, 4) and (8, 6), of lengths
    student = torch.tensor([1.0, 2.0, 1.0, 2.0]).view(1, 2, 1, 2)
    teacher = torch.tensor([4.0, 2.0, 0.0, math.sqrt(8.0)]).view(1, 2, 1, 2)
    own, other = np.array([1, 4]) / math.hypot(1, 4), np.array([8, 6]) / 10
    found = feature("attention_transfer", student, teacher)(student, teacher)
    assert found.item() == pytest.approx(np.mean((own - other) ** 2), rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_does_not_see_the_scale_of_an_image_or_the_order_of_channels(power):
    student = maps(3, 4, 5, 5)
    teacher = student.flip(1) * torch.tensor([0.5, 2.0, 7.0]).view(3, 1, 1, 1)
    loss = feature("attention_transfer", student, teacher, power=power)
    assert loss(student, teacher).item() == pytest.approx(0.0, abs=1e-9)
    assert loss(student, maps(3, 4, 5, 5, seed=1)) > 1e-3


def test_attention_maps_of_different_sizes_meet_at_the_smaller_one():
    small = maps(2, 3, 4, 4).abs().sqrt()
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for student, teacher in ((small, large), (large, small)):
        loss = feature("attention_transfer", student, teacher)
        assert loss(student, teacher).item() == pytest.approx(0.0, abs=1e-9)


def test_attention_between_vectors_needs_equal_sizes():
    vector = maps(4, 6)
    assert feature("attention_transfer", vector, vector)(vector, -2 * vector).item() < 1e-9
    for other in (maps(4, 5), maps(4, 6, 1, 1)):
        with pytest.raises(ValueError, match="use fitnets"):
            feature("attention_transfer", vector, other)


def test_attention_in_maps_of_one_pixel_is_refused():
    for student, teacher in ((maps(4, 6, 1, 1), maps(4, 6, 8, 8)), (maps(4, 6, 1, 1),) * 2):
        with pytest.raises(ValueError, match="one pixel only; use fitnets"):
            feature("attention_transfer", student, teacher)


def test_a_power_with_infinite_gradients_at_zero_is_refused():
    with pytest.raises(ValueError, match="power must be at least 1"):
        feature("attention_transfer", maps(1, 1, 2, 2), maps(1, 1, 2, 2), power=0.5)


def test_a_hint_between_equal_shapes_is_the_mean_square_and_learns_nothing():
    student, teacher = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    loss = feature("fitnets", student, teacher)
    assert not list(loss.parameters())
    torch.testing.assert_close(loss(student, teacher), (student - teacher).square().mean())
    assert loss(student, student) == 0


def test_a_projection_takes_the_student_s_channels_to_the_teacher_s():
    student, teacher = maps(2, 3, 8, 8), maps(2, 5, 4, 4, seed=1)
    loss = feature("fitnets", student, teacher)
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {
        "weight": (5, 3, 1, 1),
        "bias": (5,),
    }
    pooled = student.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    hint = torch.einsum("oc,nchw->nohw", loss.weight[:, :, 0, 0], pooled)
    torch.testing.assert_close(loss(student, teacher), (hint - teacher).square().mean())


def test_a_projection_starts_from_the_generator_and_from_nothing_else():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4)
    state = torch.get_rng_state()
    first, again, other = (feature("fitnets", student, teacher, seed=s).weight for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_hint_between_a_vector_and_a_map_is_one_between_pixels():
    student, teacher = maps(2, 3), maps(2, 3, 4, 4, seed=1)
    loss = feature("fitnets", student, teacher)
    torch.testing.assert_close(
        loss(student, teacher), (student - teacher.mean((2, 3))).square().mean()
    )


@pytest.mark.parametrize("name", list(FEATURE_LOSSES))
def test_a_feature_loss_is_finite_on_zeros_and_float32_under_autocast(name):
    student, teacher = torch.zeros(2, 3, 4, 4, requires_grad=True), maps(2, 5, 4, 4)
    loss = feature(name, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher)
    assert found.dtype == torch.float32
    assert torch.autograd.grad(found, student)[0].isfinite().all()
    half = loss(maps(2, 3, 4, 4).bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", list(FEATURE_LOSSES))
def test_a_feature_loss_refuses_what_is_neither_a_map_nor_a_vector(name):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\) or \(N, C\), not 3-dimensional"):
        feature(name, maps(2, 3, 4), maps(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "option"),
    [("dist", "beta"), ("dist", "gamma"), ("decoupled_kl", "alpha"), ("decoupled_kl", "beta")],
)
def test_a_weight_below_zero_is_refused(name, option):
    with pytest.raises(ValueError, match=f"{option} must not be below 0"):
        LOSSES[name].factory(**{option: -1.0})
