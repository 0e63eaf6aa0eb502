import re
from io import BytesIO, StringIO

import pandas as pd
import pytest
from bitladder.pipeline.errors import StoreError
from bitladder.pipeline.figures.style import save
from bitladder.pipeline.page.study import LEAST
from bitladder.pipeline.study import study_tables, text, write_study
from bitladder.pipeline.study.figure import LOST, study_figures
from bitladder.pipeline.study.write import FILES

ARMS = {
    "ladder": {},
    "direct": {"only": ["fp32", "w1a2"]},
    "long": {"control": "equal_compute", "of": "ladder"},
}
FAMILIES = {
    "claim": [
        {"arm": "ladder", "against": "direct"},
        {"arm": "ladder", "against": "long"},
    ]
}
# test accuracy of w1a2 by seed
VALUES = {"ladder": [0.80, 0.82, 0.81], "direct": [0.70, 0.715, 0.712], "long": [0.80, 0.81, 0.83]}


@pytest.fixture
def claim(study):
    sections = {"arms": ARMS, "families": FAMILIES, "choose": {"among": list(ARMS)}, "seeds": 3}
    return lambda **changes: study(**{**sections, **changes})


@pytest.fixture
def fill(finish):
    """Finishes the trials for which `VALUES` has one; of the ladder all its rungs."""

    def all_of(made, values=VALUES):
        for trial in made.trials:
            if trial.seed >= len(values[trial.arm]):
                continue
            for stage in trial.plan.stages:
                last = stage.name == "w1a2"
                test = values[trial.arm][trial.seed] if last else 0.9
                finish(trial, stage.name, test, val=test)

    return all_of


def told(made, store):
    return text(made, store, study_tables(made, store))


def written(made, store):
    return write_study(made, store, study_tables(made, store))


def drawn(made, store, name):
    return save(study_figures(made, study_tables(made, store))[name], "svg").decode()


def row(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    (found,) = frame.to_dict("records")
    return found


def test_a_summary_has_mean_spread_count_and_every_value(claim, store, fill):
    made = claim()
    fill(made)
    found = row(study_tables(made, store).summary, arm="ladder", stage="w1a2")
    assert (found["n"], found["seeds"], found["diverged"]) == (3, 3, 0)
    assert found["mean"] == pytest.approx(0.81)
    assert found["sd"] == pytest.approx(0.01)
    assert found["drop"] == pytest.approx(0.09)
    assert found["values"].split() == ["0.8", "0.82", "0.81"]
    assert (found["epochs"], found["teacher_forwards"], found["seconds"]) == (9, 9, 6.0)


def test_an_unfinished_seed_is_left_out_and_said(claim, store, fill):
    made = claim()
    fill(made, {**VALUES, "direct": [0.7, 0.72]})
    found = study_tables(made, store)
    assert row(found.summary, arm="direct", stage="w1a2")["n"] == 2
    assert row(found.summary, arm="direct", stage="w1a2")["values"] == "0.7 0.72 -"
    compared = row(found.comparisons, against="direct")
    assert (compared["n"], compared["missing_seeds"]) == (2, "2")
    assert "8 of 9 trials have ended" in told(made, store)


def test_comparisons_are_paired_and_adjusted_over_their_family(claim, store, fill):
    made = claim()
    fill(made)
    found = study_tables(made, store).comparisons
    clear, close = row(found, against="direct"), row(found, against="long")
    assert clear["difference"] == pytest.approx((0.1 + 0.105 + 0.098) / 3)
    assert clear["p_holm"] == pytest.approx(2 * clear["p"])
    assert clear["verdict"] == "arm better"
    assert close["p_holm"] == pytest.approx(close["p"])
    assert close["verdict"] == "not resolved"


def test_one_more_comparison_in_a_family_makes_its_p_values_larger(claim, store, fill):
    families = {"one": FAMILIES["claim"][:1], "two": FAMILIES["claim"]}
    made = claim(families=families)
    fill(made)
    found = study_tables(made, store).comparisons
    alone = row(found, family="one")
    among = row(found, family="two", against="direct")
    assert among["p"] == alone["p"] == alone["p_holm"]
    assert among["p_holm"] == pytest.approx(2 * alone["p"])


def test_folds_of_a_seed_are_pooled_by_their_test_images(study, store, finish):
    made = study(arms={"one": {"only": ["fp32"]}}, seeds=2, folds=2)
    for trial, (test, images) in zip(
        made.trials, [(0.5, 100), (0.8, 300), (0.6, 100), (0.6, 300)], strict=True
    ):
        finish(trial, "fp32", test, images=images)
    found = row(study_tables(made, store).summary, arm="one", stage="fp32")
    assert [float(v) for v in found["values"].split()] == pytest.approx([0.725, 0.6])
    assert (found["n"], found["seeds"]) == (2, 2)


def test_a_seed_has_no_value_before_all_its_folds_have_one(study, store, finish):
    made = study(arms={"one": {"only": ["fp32"]}}, seeds=1, folds=2)
    finish(made.trials[0], "fp32", 0.5)
    found = row(study_tables(made, store).summary, arm="one", stage="fp32")
    assert (found["n"], found["values"]) == (0, "-")


def test_a_diverged_fold_counts_with_as_many_images_as_others_had(study, store, finish):
    made = study(arms={"one": {"only": ["fp32"]}}, seeds=2, folds=2)
    finish(made.trials[0], "fp32", 0.5, images=100)
    finish(made.trials[1], "fp32", 0.9, images=300)
    finish(made.trials[2], "fp32", 0.5, images=100)
    store.fail(made.trials[3].plan.stages[0].key, "the loss is nan", diverged=True)
    found = row(study_tables(made, store).summary, arm="one", stage="fp32")
    assert [float(v) for v in found["values"].split()] == pytest.approx([0.8, (50 + 30) / 400])
    assert found["diverged"] == 1


def test_a_diverged_trial_is_counted_and_named(claim, store, fill):
    made = claim()
    fill(made, {**VALUES, "direct": [0.70, 0.71]})
    lost = made.trials[5]
    store.fail(lost.plan.stages[-1].key, "the loss is nan", diverged=True)
    found = row(study_tables(made, store).summary, arm="direct", stage="w1a2")
    assert (found["n"], found["diverged"]) == (3, 1)
    assert found["values"] == "0.7 0.71 0.1"
    said = " ".join(told(made, store).split())
    assert "Diverged: direct, seed 2 at w1a2 (the loss is nan)" in said
    assert "9 of 9 trials have ended (8 done, 1 diverged)" in said


def test_the_choice_is_by_validation_and_cost_and_not_by_test(claim, store, finish):
    made = claim()
    validation = {"ladder": [0.80, 0.82, 0.81], "direct": [0.79, 0.83, 0.80], "long": [0.5] * 3}
    test = {"ladder": 0.9, "direct": 0.1, "long": 0.99}
    for trial in made.trials:
        for stage in trial.plan.stages:
            value = validation[trial.arm][trial.seed]
            finish(trial, stage.name, test[trial.arm], val=value)
    choice = study_tables(made, store).choice
    assert (choice.best, choice.ties, choice.chosen) == ("ladder", ("ladder", "direct"), "direct")
    said = " ".join(told(made, store).split())
    assert "Chosen on validation: direct" in said
    assert "long - ladder: -31.00 points" in said


def test_a_choice_tells_what_every_candidate_costs_and_what_a_tie_is(claim, store, fill):
    made = claim()
    fill(made)
    said = " ".join(told(made, store).split())
    assert "of ladder, direct, long at w1a2" in said
    assert re.search(r"direct - long: .*, 5 epochs and 5 teacher forwards: worse, not taken", said)
    assert "p of 0.05 or more" in said


def test_verdicts_are_provisional_until_every_trial_has_ended(claim, store, fill):
    made = claim()
    fill(made, {**VALUES, "direct": [0.7, 0.72]})
    assert "every verdict is provisional" in told(made, store)
    fill(made)
    assert "provisional" not in told(made, store)


def test_the_text_says_which_data_and_of_what_the_spread_is(claim, store):
    made = claim(set={"data": {"test": 100}})
    said = " ".join(told(made, store).split())
    assert "Data: digits (test=100)." in said
    assert "not about other data" in said


def test_what_all_arms_share_is_one_row_for_people(claim, store, fill):
    made = claim()
    fill(made)
    assert told(made, store).count("(all arms)") == 1


def test_a_study_that_has_not_begun_can_be_told_and_written(claim, store):
    made = claim()
    assert "0 of 9 trials have ended" in told(made, store)
    assert "Nothing is chosen yet" in told(made, store)
    figures = [f"{name}.{form}" for name in ("study", "differences") for form in ("png", "svg")]
    assert [path.name for path in written(made, store)] == [*FILES, *figures]


def test_the_files_hold_what_the_tables_hold(claim, store, fill):
    made = claim()
    fill(made)
    paths = {path.name: path for path in written(made, store)}
    assert {path.parent for path in paths.values()} == {store.root / "studies" / made.id}
    found = study_tables(made, store)
    for name, frame in (("values", found.rows), ("summary", found.summary)):
        read = pd.read_csv(BytesIO(paths[f"{name}.csv"].read_bytes()))
        column = "test_top1" if name == "values" else "mean"
        assert list(read[column]) == list(frame[column])
    read = pd.read_csv(StringIO(paths["comparisons.csv"].read_text()))
    assert list(read["verdict"]) == list(found.comparisons["verdict"])
    markdown = paths["study.md"].read_text()
    assert f"# {made.id}" in markdown
    assert re.search(r"\| ladder - direct at w1a2 +\| 3 +\| \+10.10 ", markdown)
    assert "80.00 82.00 81.00" in markdown


def test_the_figure_names_every_arm_and_every_stage_in_which_they_differ(claim, store, fill):
    made = claim()
    fill(made)
    paths = {path.name: path for path in written(made, store)}
    assert paths["study.png"].read_bytes().startswith(b"\x89PNG")
    svg = paths["study.svg"].read_text()
    for name in (*ARMS, "w1a2", made.id):
        assert f">{name}<" in svg
    assert ">fp32<" not in svg  # the same in all


def test_the_figure_tells_a_diverged_seed(claim, store, fill):
    made = claim()
    fill(made, {**VALUES, "direct": [0.70, 0.71]})
    figure = drawn(made, store, "study")
    assert "orange" not in figure
    store.fail(made.trials[5].plan.stages[-1].key, "the loss is nan", diverged=True)
    figure = drawn(made, store, "study")
    assert "orange: diverged" in figure
    assert figure.lower().count(LOST.lower()) > 0


def test_the_differences_are_drawn_with_their_intervals(claim, store, fill):
    made = claim()
    fill(made)
    figure = study_figures(made, study_tables(made, store))["differences"]
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "ladder - direct\nat w1a2",
        "ladder - long\nat w1a2",
    ]
    dots, mean = (c.get_offsets()[:, 0].tolist() for c in panel.collections[:2])
    assert dots == pytest.approx([10.0, 10.5, 9.8])
    assert mean == pytest.approx([10.1])
    found = row(study_tables(made, store).comparisons, against="direct")
    interval = panel.lines[1].get_xdata()
    assert list(interval) == pytest.approx(
        [100 * found["low_unadjusted"], 100 * found["high_unadjusted"]]
    )


def test_a_study_without_comparisons_or_values_has_its_page(study, store):
    made = study(arms={"ladder": {}})
    names = [path.name for path in written(made, store)]
    assert "differences.svg" not in names
    page = next(path for path in written(made, store) if path.name == "report.html").read_text()
    assert page.count("<svg") == 1
    assert made.id in page


def test_a_drawing_of_a_study_is_as_wide_as_its_letters_need(claim, store, fill):
    made = claim()
    fill(made)
    files = {path.name: path.read_text() for path in written(made, store) if path.suffix != ".png"}
    for name in ("study.svg", "differences.svg"):
        width = float(re.search(r'<svg [^>]*?width="([\d.]+)pt"', files[name])[1])
        assert f"min-width: {LEAST * width:.0f}px" in files["report.html"]


def test_written_again_the_files_are_the_same_bytes(claim, store, fill):
    made = claim()
    fill(made)
    first = [path.read_bytes() for path in written(made, store)]
    assert [path.read_bytes() for path in written(made, store)] == first


def test_a_store_that_cannot_be_written_is_told(claim, store):
    store.root.parent.mkdir(exist_ok=True)
    store.root.write_text("a file")
    with pytest.raises(StoreError, match="cannot be used"):
        written(claim(), store)
