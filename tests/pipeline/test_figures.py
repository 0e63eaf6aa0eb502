"""What each figure of a ladder shows, drawn from made-up numbers."""

import pytest
from bitladder.pipeline.figures.curves import LINES, Course, loss_curves
from bitladder.pipeline.figures.pareto import BYTES, MANY, accuracy_against
from bitladder.pipeline.figures.ridges import ridges
from bitladder.pipeline.figures.steps import step_sizes
from bitladder.pipeline.figures.style import COLOURS, save
from bitladder.pipeline.figures.teachers import disagreement
from matplotlib.colors import to_hex

LOSSES = ("cross_entropy", "distillation", "features", "bins_weight", "bins_activation")


def course(stage, *losses, epochs=1):
    lines = [{**{f"train_{name}": 0.5 for name in losses}, "seconds": 2.0} for _ in range(epochs)]
    return Course(stage, lines, None)


def legend(figure):
    (found,) = figure.legends
    return {line.get_label(): line for line in found.get_lines()}


def test_every_loss_of_a_run_is_drawn_with_dashes_of_its_own():
    figure = loss_curves([course("w2a2", *LOSSES, "dampening", epochs=20)])
    lines = figure.axes[0].get_lines()
    assert len(lines) == len(LOSSES) + 1
    assert len({line._unscaled_dash_pattern for line in lines}) == len(lines)
    assert {line.get_marker() for line in lines} == {"None"}
    assert set(legend(figure)) == {LINES[f"train_{name}"][0] for name in (*LOSSES, "dampening")}
    assert figure.axes[0].get_ylabel() == "loss, each in its own unit"


def test_losses_that_a_run_does_not_have_are_not_in_its_legend():
    figure = loss_curves([course("fp32", "cross_entropy")])
    assert list(legend(figure)) == ["training: cross entropy"]
    assert figure.axes[0].get_ylabel() == "loss, nats"


def test_losses_of_a_single_epoch_are_told_apart_by_their_markers():
    figure = loss_curves([course("fp32", "cross_entropy"), course("w2a2", *LOSSES)])
    lines = [line for line in figure.axes[0].get_lines() if line.get_color() == COLOURS[1]]
    markers = [line.get_marker() for line in lines]
    assert len(set(markers)) == len(LOSSES)
    assert "None" not in markers
    assert {line.get_marker() for line in legend(figure).values()} == set(markers)


def test_the_bar_beside_step_sizes_has_the_colour_of_each_layer():
    names = [f"conv{number}.weight" for number in range(5)]
    epochs = [
        {"epoch": epoch, "scales": {name: 0.1 + place for place, name in enumerate(names)}}
        for epoch in (1, 2)
    ]
    (panel,) = step_sizes("w2a2", epochs).axes
    lines = [to_hex(line.get_color()) for line in panel.get_lines()]
    (bar,) = panel.collections
    assert [to_hex(colour) for colour in bar.get_colors()] == lines
    assert len(set(lines)) == len(names)
    heights = {text.get_text(): text.get_position()[1] for text in panel.texts}
    assert list(heights) == ["conv0", "conv2", "conv4"]
    pieces = [(piece[0][1], piece[1][1]) for piece in bar.get_segments()]
    for name, height in heights.items():
        low, high = pieces[int(name.removeprefix("conv"))]
        assert low < height < high


def view(levels, span, stairs):
    return {
        "bits": 2,
        "levels": levels,
        "after": [1 / len(levels)] * len(levels),
        "span": span,
        "before": [1] * 8,
        "stairs": stairs,
    }


def test_a_plateau_of_the_staircase_goes_on_to_the_edge_of_the_axis():
    stairs = [[-9.0, 0.5, 0.5, 1.5, 1.5, 2.5, 2.5, 20.0], [0, 0, 1, 1, 2, 2, 3, 3]]
    layer = {"layer": "conv", "activation": view([0, 1, 2, 3], [-9.0, 20.0], stairs)}
    panel = ridges("w2a2", [layer], "activation").axes[0]
    low, high = panel.get_xlim()
    assert -9 < low < high < 20
    (line,) = panel.get_lines()[:1]
    assert min(line.get_xdata()) <= low
    assert max(line.get_xdata()) >= high
    assert line.get_clip_on()


def test_a_figure_of_a_teacher_says_which_one():
    found = {"images": 4, "both": 4, "student": 0, "teacher": 0, "neither": 0, "pairs": []}
    figures = [disagreement("w2a2", teacher, found, ["a"]) for teacher in ("big", "fp32")]
    assert figures[0].get_suptitle() == "w2a2 and its teacher big, on validation"
    assert len({save(figure, "svg") for figure in figures}) == 2


def row(run, stage, size, accuracy, fp32=0.99):
    top1 = {"deployed_top1": None, "test_top1": accuracy, "fp32_top1": fp32}
    return {"run": run, "stage": stage, "packed_bytes": size, "ideal_bytes": None, **top1}


def names_in(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_of_many_rungs_those_on_the_front_are_named():
    rows = [row("a", f"w{n}", 1000 + n, 0.9 if n else 0.95) for n in range(MANY)]
    assert names_in(accuracy_against(rows, BYTES)) == [f"w{n}" for n in range(MANY)]
    rows.append(row("b", "best", 3000, 0.97))
    assert names_in(accuracy_against(rows, BYTES)) == ["w0", "best"]


@pytest.mark.parametrize("others", [0.97, 0.99])
def test_the_line_of_full_precision_has_the_colour_of_its_run(others):
    rows = [row("a", "w2", 1000, 0.9), row("b", "w2", 2000, 0.92, fp32=others)]
    figure = accuracy_against(rows, BYTES)
    lines = [line for line in figure.axes[0].get_lines() if line.is_dashed()]
    assert [(to_hex(line.get_color()), line.get_ydata()[0]) for line in lines] == [
        (COLOURS[0].lower(), 99.0),
        (COLOURS[1].lower(), 100 * others),
    ]
    assert len({line._unscaled_dash_pattern for line in lines}) == 2  # both in sight where equal
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Pareto front", "a", "b", "FP32, in the colour of its run"]
