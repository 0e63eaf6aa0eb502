import math

import pytest
from bitladder.pipeline.study.statistics import Candidate, choose, holm, paired, sample, verdict
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)
accuracies = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8, unique_by=lambda x: x[0]
)


def by_seed(*values):
    return dict(enumerate(values))


def candidate(arm, *validation, epochs=10, teacher_forwards=0):
    return Candidate(arm, by_seed(*validation), epochs, teacher_forwards)


def test_holm_gives_what_is_worked_out_by_hand():
    # sorted: .005 x 4 = .02, .01 x 3 = .03, .03 x 2 = .06, .04 x 1 = .04 -> .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_leaves_a_single_comparison_as_it_is():
    assert holm([0.03]) == [0.03]


def test_a_comparison_without_a_p_value_counts_in_the_size_of_its_family():
    assert holm([0.02, math.nan, math.nan]) == pytest.approx([0.06, 1.0, 1.0])


@given(p_values)
def test_holm_never_lowers_a_p_value_and_stays_within_one(values):
    for raw, adjusted in zip(values, holm(values), strict=True):
        assert raw <= adjusted <= 1


@given(p_values)
def test_holm_keeps_the_order_of_the_p_values(values):
    pairs = sorted(zip(values, holm(values), strict=True))
    assert [adjusted for _, adjusted in pairs] == sorted(adjusted for _, adjusted in pairs)


@given(p_values)
def test_holm_is_never_above_bonferroni(values):
    for raw, adjusted in zip(values, holm(values), strict=True):
        assert adjusted <= min(1.0, len(values) * raw) + 1e-12


@given(st.permutations([0.001, 0.02, 0.02, 0.4, 0.9]))
def test_holm_does_not_look_at_the_place_of_a_comparison(values):
    adjusted = {0.001: 0.005, 0.02: 0.08, 0.4: 0.8, 0.9: 0.9}  # 5 x .001, 4 x .02, 2 x .4, 1 x .9
    assert holm(values) == pytest.approx([adjusted[p] for p in values])


def test_a_mean_has_the_t_interval_of_the_tables():
    found = sample([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)  # Student's 0.975 quantile at 4 degrees of freedom
    assert (found.n, found.mean) == (5, 3.0)
    assert found.sd == pytest.approx(math.sqrt(2.5))
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-6)


def test_one_value_has_a_mean_and_no_spread_and_none_has_nothing():
    one, none = sample([0.5]), sample([])
    assert one.mean == 0.5
    assert all(math.isnan(v) for v in (one.sd, one.low, one.high, none.mean))
    assert (one.n, none.n) == (1, 0)


@given(accuracies)
def test_paired_differences_are_those_of_scipy(pairs):
    a, b = by_seed(*(p[0] for p in pairs)), by_seed(*(p[1] for p in pairs))
    found = paired(a, b)
    differences = [x - y for x, y in pairs]
    if max(differences) - min(differences) <= 1e-6:
        return  # no spread: other tests
    expected = stats.ttest_rel(list(a.values()), list(b.values()))
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(float(expected.pvalue), rel=1e-6)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


@given(accuracies)
def test_the_other_way_round_the_difference_has_the_other_sign_and_the_same_p(pairs):
    a, b = by_seed(*(p[0] for p in pairs)), by_seed(*(p[1] for p in pairs))
    there, back = paired(a, b), paired(b, a)
    assert there.difference == pytest.approx(-back.difference)
    assert there.p == pytest.approx(back.p)


def test_only_seeds_that_both_arms_have_are_paired():
    found = paired({0: 0.9, 1: 0.8, 2: 0.7}, {1: 0.7, 2: 0.5, 3: 0.1})
    assert (found.n, found.seeds) == (2, (1, 2))
    assert found.difference == pytest.approx(0.15)


def test_identical_values_differ_by_nothing():
    found = paired(by_seed(0.9, 0.8, 0.7), by_seed(0.9, 0.8, 0.7))
    assert (found.difference, found.sd, found.p) == (0.0, 0.0, 1.0)
    assert math.isnan(found.low)
    assert verdict(found.difference, found.p) == "not resolved"


@pytest.mark.parametrize(("n", "p"), [(2, 0.5), (5, 0.0625), (6, 0.03125)])
def test_a_constant_difference_has_the_p_value_of_the_sign_flip_test(n, p):
    against = by_seed(*(0.1 * seed for seed in range(n)))
    found = paired({seed: value + 0.01 for seed, value in against.items()}, against)
    assert (found.sd, found.p) == (0.0, p)
    assert found.difference == pytest.approx(0.01)
    assert math.isnan(found.low)


@pytest.mark.parametrize("values", [(), (0.5,)])
def test_fewer_than_two_seeds_resolve_nothing(values):
    found = paired(by_seed(*values), by_seed(*(v - 0.4 for v in values)))
    assert math.isnan(found.p)
    assert verdict(found.difference, holm([found.p])[0]) == "not resolved"


def test_a_verdict_is_by_the_adjusted_p_value_and_the_sign():
    assert verdict(0.1, 0.049) == "arm better"
    assert verdict(-0.1, 0.049) == "against better"
    assert verdict(0.1, 0.05) == "not resolved"


def test_the_best_on_validation_is_chosen_where_the_others_are_resolved_from_it():
    cheap = candidate("cheap", 0.80, 0.81, 0.79, epochs=1)
    good = candidate("good", 0.90, 0.912, 0.889, epochs=50)
    found = choose([cheap, good])
    assert (found.chosen, found.best, found.ties) == ("good", "good", ("good",))


def test_of_ties_the_one_with_fewest_epochs_is_chosen():
    best = candidate("best", 0.90, 0.88, 0.91, epochs=50)
    cheap = candidate("cheap", 0.89, 0.89, 0.90, epochs=20)
    cheapest = candidate("cheapest", 0.50, 0.51, 0.49, epochs=1)
    found = choose([best, cheap, cheapest])
    assert (found.chosen, found.best, found.ties) == ("cheap", "best", ("best", "cheap"))


def test_at_equal_epochs_the_one_with_fewer_teacher_forwards_is_chosen():
    best = candidate("best", 0.90, 0.88, 0.91, teacher_forwards=10)
    alone = candidate("alone", 0.89, 0.89, 0.90)
    assert choose([best, alone]).chosen == "alone"


def test_at_equal_cost_the_better_validation_is_chosen():
    assert choose([candidate("a", 0.8, 0.9), candidate("b", 0.9, 0.81)]).chosen == "b"


def test_one_seed_ties_everything():
    found = choose([candidate("good", 0.9, epochs=2), candidate("cheap", 0.1, epochs=1)])
    assert (found.chosen, found.ties) == ("cheap", ("good", "cheap"))


def test_a_choice_is_over_the_seeds_that_all_have():
    short = Candidate("short", {0: 0.9, 1: 0.91}, 1, 0)
    full = Candidate("full", {0: 0.5, 1: 0.52, 2: 1.0}, 1, 0)
    found = choose([short, full])
    assert (found.seeds, found.best) == ((0, 1), "short")


def test_nothing_is_chosen_before_a_seed_is_finished_in_all():
    found = choose([candidate("a", 0.9), Candidate("b", {}, 1, 0)])
    assert found.chosen is None
