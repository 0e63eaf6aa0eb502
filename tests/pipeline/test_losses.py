import pytest
import torch
from bitladder.pipeline.losses import LOSSES, Step

SOFT = ("kl", "takd", "distribution")


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


@pytest.mark.parametrize("name", SOFT)
def test_a_loss_on_the_teacher_reads_no_labels_and_half_precision_in_float32(step, name):
    loss = LOSSES[name].factory()
    others = Step(step.logits, torch.full((6,), 9), step.teacher_logits)
    assert torch.equal(loss(others), loss(step))
    half = Step(step.logits.bfloat16(), step.targets, step.teacher_logits.bfloat16())
    assert loss(half).dtype == torch.float32


@pytest.mark.parametrize("name", SOFT)
def test_a_loss_on_the_teacher_says_that_it_needs_one(name):
    step = Step(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), None)
    with pytest.raises(ValueError, match=f"'{name}' needs a teacher"):
        LOSSES[name].factory()(step)


@pytest.mark.parametrize("name", SOFT)
def test_a_temperature_of_zero_is_refused(name):
    with pytest.raises(ValueError, match="must be above 0"):
        LOSSES[name].factory(temperature=0.0)
