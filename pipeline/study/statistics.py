"""Paired statistics of arms over seeds, on plain values.

n counts seeds: the folds of one seed share their training images, so they are pooled before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05
NAN = float("nan")
Verdict = Literal["arm better", "against better", "not resolved"]


@dataclass(frozen=True)
class Sample:
    """Values of one arm; `low` and `high` bound the mean's 95 % t-interval.

    What one value, or none, cannot give is nan.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Differences, arm minus against, over the seeds that both have.

    Attributes:
        low, high: 95 % t-interval of the mean difference, not adjusted for other comparisons.
        p: two-sided, of the paired t-test. Where all differences are the same there is no spread to
            test against: p is 1 if they are 0, else that of the sign-flip test, 2 / 2**n, and there
            is no interval.
        seeds: those that were paired.
    """

    n: int
    difference: float
    sd: float
    low: float
    high: float
    p: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """An arm that may be chosen: its validation accuracy by seed, and what it costs."""

    arm: str
    validation: Mapping[int, float]
    epochs: float
    teacher_forwards: float


@dataclass(frozen=True)
class Choice:
    """Which arm was chosen, and why.

    Attributes:
        chosen: None while no seed is finished in every arm.
        best: the arm of the best mean validation accuracy over `seeds`.
        ties: arms whose difference to the best is not resolved, the best included.
        differences: every other arm minus the best.
        means: validation accuracy by arm.
        costs: epochs and teacher forwards by arm.
    """

    chosen: str | None
    best: str | None
    ties: tuple[str, ...]
    differences: Mapping[str, Paired]
    means: Mapping[str, float]
    costs: Mapping[str, tuple[float, float]]
    seeds: tuple[int, ...]


def sample(values: Sequence[float]) -> Sample:
    """Mean, standard deviation (n - 1) and the mean's 95 % t-interval."""
    n = len(values)
    if n == 0:
        return Sample(0, NAN, NAN, NAN, NAN)
    mean = math.fsum(values) / n
    if n == 1:
        return Sample(1, mean, NAN, NAN, NAN)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t_quantile(n - 1) * sd / math.sqrt(n)
    return Sample(n, mean, sd, mean - half, mean + half)


def paired(arm: Mapping[int, float], against: Mapping[int, float]) -> Paired:
    """Compares two arms seed by seed.

    Args:
        arm: value by seed.
        against: the same of the other arm.
    """
    seeds = tuple(sorted(arm.keys() & against.keys()))
    differences = [arm[seed] - against[seed] for seed in seeds]
    of = sample(differences)
    low, high, p = of.low, of.high, NAN
    if of.n >= 2:
        if max(differences) - min(differences) <= 1e-12:  # the same but for rounding
            zero = abs(of.mean) <= 1e-12
            low, high, p = NAN, NAN, 1.0 if zero else 2.0 ** (1 - of.n)
            of = Sample(of.n, 0.0 if zero else of.mean, 0.0, low, high)
        else:
            p = _t_test(of.mean / (of.sd / math.sqrt(of.n)), of.n - 1)
    return Paired(of.n, of.mean, of.sd, low, high, p, seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for all of one family, in the same order.

    One that is not known yet (nan) counts as 1, so a family's size is what it was named to be.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted = [1.0] * len(known)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[index]))
        adjusted[index] = largest
    return adjusted


def verdict(difference: float, adjusted: float) -> Verdict:
    """What a comparison says at 0.05, by its Holm-adjusted p-value."""
    if not adjusted < LEVEL or difference == 0:
        return "not resolved"
    return "arm better" if difference > 0 else "against better"


def choose(candidates: Sequence[Candidate]) -> Choice:
    """The cheapest of the arms that validation cannot tell from the best.

    Over the seeds that all have. An arm ties with the best if the paired 95 % t-interval of their
    difference holds 0 (or p is 0.05 and more where there is no spread; or n is 1). The cheapest
    has the fewest epochs, then teacher forwards; then the better validation accuracy decides, then
    the order given.
    """
    seeds = sorted(set.intersection(*(set(c.validation) for c in candidates)))
    costs = {c.arm: (c.epochs, c.teacher_forwards) for c in candidates}
    if not seeds:
        return Choice(None, None, (), {}, {}, costs, ())
    values = {c.arm: {seed: c.validation[seed] for seed in seeds} for c in candidates}
    means = {arm: sample(list(own.values())).mean for arm, own in values.items()}
    best = max(means, key=means.__getitem__)
    differences = {arm: paired(own, values[best]) for arm, own in values.items() if arm != best}
    ties = tuple(arm for arm in means if arm == best or not differences[arm].p < LEVEL)
    chosen = min(ties, key=lambda arm: (*costs[arm], -means[arm]))
    return Choice(chosen, best, ties, differences, means, costs, tuple(seeds))


def _t_quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / 2, freedom))


def _t_test(statistic: float, freedom: int) -> float:
    from scipy.stats import t

    return float(2 * t.sf(abs(statistic), freedom))
