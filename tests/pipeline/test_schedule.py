import itertools

import pytest
from bitladder.pipeline.config import ScheduleConfig
from bitladder.pipeline.schedule import lr_factor


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "constant"])
def test_without_warmup_every_schedule_begins_at_the_full_rate(name):
    assert lr_factor(ScheduleConfig(name=name), 0, 100, 10) == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_falling_schedule_never_rises_and_ends_near_its_final_factor(name):
    schedule = ScheduleConfig(name=name, final=0.1)
    factors = [lr_factor(schedule, step, 200, 10) for step in range(200)]
    assert factors == sorted(factors, reverse=True)
    assert 0.1 <= factors[-1] < 0.11


def test_warmup_rises_linearly_to_the_full_rate():
    schedule = ScheduleConfig(name="constant", warmup_epochs=1.0)
    factors = [lr_factor(schedule, step, 100, 9) for step in range(10)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[-1] == 1.0
    rises = [b - a for a, b in itertools.pairwise(factors)]
    assert rises == pytest.approx([0.1] * 9)


def test_steps_fall_at_their_milestones():
    schedule = ScheduleConfig(name="step", milestones=(0.5, 0.75), gamma=0.1)
    found = [lr_factor(schedule, step, 100, 10) for step in (49, 50, 74, 75)]
    assert found == pytest.approx([1.0, 0.1, 0.1, 0.01])
