"""The page of a ladder and its figures, of real ladders."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from bitladder.flows.commands import show_report
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.figures import drawn, figures
from bitladder.pipeline.figures.pareto import Point, front
from bitladder.pipeline.figures.style import save
from bitladder.pipeline.look import make_missing_looks
from bitladder.pipeline.page.render import inlined
from bitladder.pipeline.report import render, reports, write_figures
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from tiny_ladder import TINY

RUNGS = [TINY["ladder"][0], TINY["ladder"][2]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The store of a ladder of two rungs that was looked into."""
    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("pages") / "artifacts")
    run_ladder(open_ladder(parse_config({**TINY, "ladder": RUNGS}), store, lambda event: None))
    make_missing_looks(store, store.run())
    return Store(store.root)  # all that is drawn comes from the files


@pytest.fixture(scope="module")
def page(finished):
    return page_of(finished)


def page_of(store):
    runs = store.runs()
    return render(reports(store, runs), "html", store, runs).decode()


class Addresses(HTMLParser):
    """Whatever a browser would follow or load."""

    def __init__(self, text):
        super().__init__()
        self.found, self.drawings = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.found += [attributes[name] for name in names if name in attributes]
        if tag == "svg":
            self.drawings.append(attributes["aria-label"])


def test_the_page_loads_nothing(page):
    found = Addresses(page).found
    assert found
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in found)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page


def test_the_page_says_what_was_run(finished, page):
    run = finished.run()
    environment = finished.read(run.trained[0]).environment
    for text in (run.run, "digits", "tiny_convnet", environment["device_name"], torch.__version__):
        assert text.partition("+")[0] in page


def test_the_page_draws_every_figure_in_its_own_colours(finished, page):
    drawings = Addresses(page).drawings
    assert len(drawings) == 11
    assert all(drawings)
    own, drawn_with = page.partition("</style>")[::2]
    assert "--ink: #1c1c1c" in own
    assert "#1c1c1c" not in drawn_with  # ink that a dark page would not show
    assert "fill: currentColor" in drawn_with
    assert len(page) < 3e6


def test_drawings_name_their_styles_once(page):
    rules, drawings = page.partition("</head>")[::2]
    used = set(re.findall(r'class="(s\d+)"', drawings))
    assert "style=" not in drawings.partition("<svg")[2]
    assert used == set(re.findall(r"\.(s\d+){[^}]+}", rules))
    assert len(used) < 200


def test_a_path_is_drawn_the_same_in_fewer_letters():
    svg = '<svg><path d="M 1.04 2.0 \nL 3.55 4.0 \nL 5 6 \nM 7 8 \nL 9.0 1 \nz\n"/></svg>'
    assert ' d="M 1 2 3.5 4 5 6 M 7 8 9 1 z "' in inlined(svg, "")
    curved = '<svg><path d="M 1 2 \nC 3 4 5 6 7 8 \nL 9 1 \n"/></svg>'
    assert ' d="M 1 2 C 3 4 5 6 7 8 L 9 1 "' in inlined(curved, "")


def test_the_first_column_of_a_table_stays_in_sight(page):
    (rule,) = re.findall(r"\.scroll td:first-child {([^}]*)}", page)
    assert "position: sticky; left: 0; background:" in rule
    assert page.count("<table>") == page.count('<div class="scroll"><table>') > 0


def test_each_rung_has_its_figures_and_each_a_file(finished, tmp_path):
    paths = write_figures(finished, finished.runs(), "svg", tmp_path / "new")
    together = {"accuracy-bytes", "accuracy-bitops", "curves-accuracy", "curves-loss"}
    of_low_bits = ("weights", "activations", "levels", "error", "steps", "teacher")
    expected = {*together, "fp32-weights", *(f"w1a2-{name}" for name in of_low_bits)}
    assert {path.stem for path in paths} == expected
    for path in paths:
        assert path.read_text().startswith("<?xml")
    ridges = (tmp_path / "new" / "w1a2-activations.svg").read_text()
    for layer in finished.read(finished.run().trained[1]).metrics["layers"]:
        assert f">{layer['layer']}<" in ridges


def test_figures_are_matplotlib_objects_and_the_same_bytes_again(finished):
    found = figures(finished, finished.runs())
    (again,) = (
        each.draw() for each in drawn(finished, finished.runs()) if each.name == "accuracy-bytes"
    )
    assert save(found["accuracy-bytes"], "svg") == save(again, "svg")
    assert save(again, "png").startswith(b"\x89PNG")
    assert again.axes[0].get_xlabel() == "size of the packed file, kB"


def test_every_letter_lies_within_its_figure(finished):
    for name, figure in figures(finished, finished.runs()).items():
        save(figure, "svg")
        for text in (text for panel in figure.axes for text in panel.texts):
            text.set_in_layout(True)
        needed, there = figure.get_tightbbox(), figure.bbox_inches
        assert needed.x0 >= 0 <= needed.y0, name
        assert needed.x1 <= there.x1, name
        assert needed.y1 <= there.y1, name


def test_a_ladder_that_has_not_begun_has_a_page(tiny, store):
    open_ladder(tiny(), store, lambda event: None)
    page = page_of(store)
    assert Addresses(page).drawings == []
    assert "is not finished" in page
    assert f"bitladder resume {store.run().run}" in page


def test_the_page_of_a_failed_ladder_says_why_and_how_to_go_on(tiny, store):
    ladder = open_ladder(tiny(), store, lambda event: None)
    store.fail(ladder.plan.stages[0].key, "the loss is nan at step 3 <&>")
    page = page_of(store)
    assert "fp32: the loss is nan at step 3 &lt;&amp;&gt;" in page
    assert f"bitladder resume {store.run().run} --store {store.root}" in page


def test_a_page_needs_no_import_of_torch(finished):
    script = (
        "import sys\n"
        "from bitladder.pipeline.report import render, reports\n"
        "from bitladder.pipeline.store import Store\n"
        "store = Store(sys.argv[1])\n"
        "assert b'<svg' in render(reports(store, store.runs()), 'html', store, store.runs())\n"
        "print('torch' in sys.modules)"  # two seconds, of three that a page may take
    )
    command = [sys.executable, "-c", script, str(finished.root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_page_reads_where_its_rungs_stand_once(finished, monkeypatch):
    read, states = [], Store.rung_states
    monkeypatch.setattr(
        Store, "rung_states", lambda store, run: read.append(run.run) or states(store, run)
    )
    page_of(Store(finished.root))
    assert read == [finished.run().run]


def test_runs_stand_side_by_side(tiny, store):
    for seed in (0, 7):
        open_ladder(tiny(seed=seed), store, lambda event: None)
    page = page_of(store)
    ids = "".join(f'<th scope="col">{run.run}</th>' for run in store.runs())
    assert f"<tr><td></td>{ids}</tr>" in page
    assert '<tr><th scope="row">seed</th><td>0</td><td>7</td></tr>' in page
    assert '<tr><th scope="row">data</th><td colspan="2">digits, batches of 128</td></tr>' in page
    named = re.findall(r'<th scope="rowgroup" colspan="(\d+)"><span>([^<]*)</span>', page)
    head = page.partition('<th scope="col" class="text">stage</th>')[2].partition("</thead>")[0]
    assert named == [(str(1 + head.count("<th")), run.run) for run in store.runs()]


def test_links_to_rungs_stand_by_run(finished, page):
    def lines(page):
        return [re.findall(r">([^<>]+)</", line) for line in re.findall(r"<nav>.*?</nav>", page)]

    assert lines(page) == [["fp32", "w1a2"]]
    (run,) = finished.runs()
    table, again = reports(finished, [run]), replace(run, run="again")
    frame = pd.concat([table, table.assign(run="again")])
    twice = render(frame, "html", finished, [run, again]).decode()
    assert lines(twice) == [[f"{name}:", "fp32", "w1a2"] for name in (run.run, "again")]
    anchors = re.findall(r'<a href="#([^"]*)"', twice)
    assert len(set(anchors)) == 4
    assert all(f'id="{anchor}"' in twice for anchor in anchors)


def test_examples_and_captions_say_what_they_are_of(run, tiny, store):
    first, second, third = tiny().model_dump(mode="json", exclude_unset=True)["ladder"]
    rungs = [first, second, {**third, "teacher": ["fp32", "w4a8"]}]
    run(tiny(ladder=rungs, train={**TINY["train"], "epochs": 1}), store)
    made = {each.name: each for each in drawn(store, store.runs())}
    assert "bars" not in made["fp32-weights"].caption
    assert "bars" in made["w1a2-weights"].caption
    assert "images" not in made["w1a2-weights"].caption
    page = page_of(store)
    for teacher in ("fp32", "w4a8"):
        assert f"student and its teacher {teacher} take for" in page
        assert f"w1a2 and its teacher {teacher}, on validation</text>" in page


def test_the_front_is_what_nothing_beats():
    points = [Point("r", "", cost, acc) for cost, acc in [(1, 5), (2, 4), (2, 7), (3, 7), (4, 9)]]
    assert [(p.cost, p.accuracy) for p in front(points)] == [(1, 5), (2, 7), (4, 9)]


def test_figures_of_several_files_need_a_folder(finished):
    with pytest.raises(ConfigError, match="--out DIR"):
        show_report([], "png", None, finished)
