"""Every block of code of docs/ runs, page by page in the order of the site, and every example.

All share one folder and its store, so that the ladder of the tutorial is trained once. Where a page
says more, it is one epoch and two seeds here, and `run` is without Prefect, whose server has tests
of its own. In shown outputs numbers and keys may differ, words and columns may not.
"""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitladder.flows.__main__ import main
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.report import COLUMNS
from bitladder.pipeline.yaml_reader import read_yaml

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
INDEX = (DOCS / "index.md").read_text(encoding="utf-8")
PAGES = [
    f"{name}.md"
    for text in re.findall(r"\{toctree\}.*?```", INDEX, re.S)
    for name in re.findall(r"^[a-z_-]+(?:/[a-z_-]+)?$", text, re.M)
]
WRITTEN = [page for page in PAGES if re.match(r"tutorial|how-to/|explanation/", page)]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


class Workshop:
    """A folder in which pages are followed as a reader would follow them."""

    def __init__(self, folder):
        self.folder = folder
        self.followed = {}

    def follow(self, page):
        """Runs the blocks of a page, if that was not done yet, and notes how many there are."""
        if page not in self.followed:
            text = (DOCS / page).read_text(encoding="utf-8")
            names, blocks = {"__name__": page}, list(BLOCK.finditer(text))
            self.followed[page] = len(blocks)  # also where one fails: it would fail again
            for block in blocks:
                line = text[: block.start()].count("\n") + 1
                self.run(block[1], block[2], names, f"{page}:{line}", line)

    def run(self, language, text, names, place, line):
        file = re.match(r"# ([\w.]+)\n", text)
        if language in ("python", "yaml") and file:
            (self.folder / file[1]).write_text(quick(text), encoding="utf-8")
            importlib.invalidate_caches()  # which has the folder as it was a moment ago
        elif language == "python":
            exec(compile("\n" * line + text, place, "exec"), names)
        elif language == "console":
            for words, shown in commands(text):
                check(words, shown, place)
        elif language == "yaml":
            rungs = [{"weight_bits": 32, "activation_bits": 32}, read_yaml(text, place)]
            assert parse_config({"name": "rung", "ladder": rungs}).ladder[1]
        else:
            assert language == "text", f"{place}: a block of {language} is not run"


def quick(text):
    """A file with one epoch where it has more, two seeds, and few batches for statistics."""
    text = re.sub(r'("?epochs"?[:=] ?)[1-9]\d*', r"\g<1>1", text)
    text = text.replace("train: {", "train: {batch_norm_batches: 2, calibration_batches: 2, ")
    return re.sub(r"(seeds: )\d+", r"\g<1>2", text)


def commands(text):
    """The commands of a console block, each with the lines that it is said to print."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        yield shlex.split(command), [line for line in shown.splitlines() if line != "..."]


def check(words, shown, place):
    """Runs a command in this process; what is shown has to be among what it prints, in order."""
    assert words[0] == "bitladder", f"{place}: {words[0]} is not run here"
    if words[1] == "run":
        words = [*words, "--runner", "plain"]
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", words)
        with contextlib.redirect_stderr(output), pytest.raises(SystemExit) as end:
            main()
    printed = output.getvalue()
    expected = 2 if any(line.startswith("error:") for line in shown) else 0
    assert (end.value.code or 0) == expected, f"{place}: {shlex.join(words)}\n{printed}"
    lines = iter(map(masked, printed.splitlines()))
    for line in shown:
        wanted = re.escape(masked(line)).replace(r"\.\.\.", ".*")
        found = any(re.fullmatch(wanted, each) for each in lines)
        assert found, f"{place}: {shlex.join(words)} does not print\n{line}\nbut\n{printed}"


def masked(line):
    """A line without what another machine or another number of epochs makes different."""
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "KEY", line)
    line = re.sub(r"[-+]?\d+(\.\d+)?", "#", line)
    return " ".join(line.split())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.delenv("BITLADDER_STORE", raising=False)
        patch.setenv("MPLBACKEND", "agg")
        yield Workshop(folder)
    torch.set_num_threads(threads)
    sys.modules.pop("my_nets", None)


# a study starts a process, which imports torch anew
SLOW = {"how-to/study.md", "study"}


def marked(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


@pytest.mark.parametrize("page", marked(WRITTEN))
def test_every_block_of_a_page_runs(workshop, page):
    workshop.follow("tutorial.md")  # what the other pages look at
    workshop.follow(page)
    assert workshop.followed[page] > 0


@pytest.mark.parametrize("name", marked(["ladder", "own_network", "study", "export"]))
def test_an_example_runs(workshop, name, capsys):
    workshop.follow("tutorial.md")
    for path in EXAMPLES.iterdir():
        text = path.read_text(encoding="utf-8")
        (workshop.folder / path.name).write_text(quick(text), encoding="utf-8")
    runpy.run_path(f"{name}.py", run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f"`{p.name}`" not in listed] == []


def test_every_page_is_on_the_site():
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert there - set(PAGES) - {"index.md"} == {p for p in there if p.startswith("studies/")}


def test_every_link_leads_somewhere():
    def anchors(path):
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}

    broken = []
    for page in [*DOCS.rglob("*.md"), *EXAMPLES.glob("*.md"), *ROOT.glob("*.md")]:
        for link in LINK.findall(re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))):
            target, _, anchor = link.partition("#")
            path = (page.parent / target) if target else page
            if link.startswith(("http", "mailto:")):
                continue
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_the_reference_is_what_the_code_says(tmp_path):
    # in a process of its own: what other tests import and register is none of its business
    command = [sys.executable, str(DOCS / "make_reference.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = sorted(tmp_path.iterdir())
    assert len(made) == 4
    for page in made:
        stored = (DOCS / "reference" / page.name).read_text(encoding="utf-8")
        assert stored == page.read_text(encoding="utf-8"), "write it anew with `make docs`"


def test_the_reference_of_the_store_has_every_column():
    page = (DOCS / "reference" / "store.md").read_text(encoding="utf-8")
    assert [column for column in COLUMNS if f"`{column}`" not in page] == []
