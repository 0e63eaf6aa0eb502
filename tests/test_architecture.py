"""Who may import whom, and what every file keeps to; read from the source, nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant", "models", "pipeline", "flows")
FILES = sorted(
    path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)

MAY_IMPORT = {
    "quant": ("bitladder.quant",),
    "models": ("bitladder.models", "bitladder.quant.registry"),
    "pipeline": ("bitladder.pipeline", "bitladder.quant", "bitladder.models"),
    "flows": ("bitladder.flows", "bitladder.pipeline", "bitladder.quant", "bitladder.models"),
}
HOMES = {
    "prefect": ("flows/*",),
    **dict.fromkeys(("prefect_dask", "prefect_ray", "distributed", "ray"), ("flows/trials/*",)),
    "sqlalchemy": ("pipeline/store*",),
    "pydantic": (
        *("pipeline/config*", "pipeline/plan*", "pipeline/study/config.py"),
        *(
            "pipeline/packed_description.py",
            "pipeline/predict.py",
        ),  # what a shipped file says of itself
    ),
    "onnx": ("quant/export/onnx_*",),
    "openvino": ("quant/export/openvino_ir.py",),
    "tensorboard": ("pipeline/tensorboard.py",),
    "yaml": ("pipeline/config*", "pipeline/plan*", "pipeline/yaml_reader.py"),
    "pandas": ("pipeline/report*", "pipeline/study/*"),
    "scipy": ("pipeline/study/statistics.py",),
    "matplotlib": ("pipeline/figures/*", "pipeline/study/figure.py"),
}
# up to seconds each
HEAVY = {"torchvision", "prefect", "pandas", "matplotlib", "scipy", "sklearn", "tensorboard"}
MAX_LINES = 400
# not inside a longer path or word: only what begins at the root of a file system
MACHINE_PATHS = re.compile(r"(?<![\w.*-])/(?:work|root|tmp/(?:bash|dev))\b|\.\./shared")


@dataclass(frozen=True)
class Import:
    """One imported name in full, such as bitladder.quant.core.QTensor, and how it is imported."""

    name: str
    line: int
    relative: bool
    at_load: bool  # runs when the module is imported: in no function
    for_types: bool  # under `if TYPE_CHECKING`, so never runs

    def is_under(self, module: str) -> bool:
        return f"{self.name}.".startswith(f"{module}.")


def imports_of(source: str, file: Path) -> Iterator[Import]:
    package = ("bitladder", *file.parent.parts)

    def walk(node: ast.AST, at_load: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, False, at_load, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = (*base, *([node.module] if node.module else []))
            for alias in node.names:
                name = ".".join((*parts, alias.name))
                yield Import(name, node.lineno, node.level > 0, at_load, for_types)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_load = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            at_load, for_types = False, True
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_load, for_types)

    return walk(ast.parse(source), True, False)


@cache
def every_import() -> list[tuple[Path, Import]]:
    return [(file, i) for file in FILES for i in imports_of((ROOT / file).read_text(), file)]


def test_imports_are_read_as_python_resolves_them():
    source = """
from typing import TYPE_CHECKING
from . import base
from ..core import QTensor as Q
from ... import models
if TYPE_CHECKING:
    import pandas as pd
class A:
    import yaml
    def f(self):
        import prefect.tasks
"""
    found = list(imports_of(source, Path("quant/quantizers/lsq.py")))
    assert [i.name for i in found] == [
        "typing.TYPE_CHECKING",
        "bitladder.quant.quantizers.base",
        "bitladder.quant.core.QTensor",
        "bitladder.models",
        "pandas",
        "yaml",
        "prefect.tasks",
    ]
    assert [i.name for i in found if not i.at_load] == ["pandas", "prefect.tasks"]
    assert [i.name for i in found if i.for_types] == ["pandas"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_looked_at(package):
    assert any(file.parts[0] == package for file in FILES)


def test_imports_go_one_way():
    assert [
        f"{file}:{i.line} {i.name}"
        for file, i in every_import()
        if i.is_under("bitladder")
        and not any(i.is_under(module) for module in MAY_IMPORT[file.parts[0]])
    ] == []


def test_imports_inside_the_packages_are_relative():
    own = ("bitladder", *PACKAGES)
    assert [
        f"{file}:{i.line} {i.name}"
        for file, i in every_import()
        if not i.relative and any(i.is_under(module) for module in own)
    ] == []


def test_an_outside_library_is_imported_only_in_its_home():
    assert [
        f"{file}:{i.line} {i.name}"
        for file, i in every_import()
        for library, homes in HOMES.items()
        if i.is_under(library) and not i.for_types
        if not any(fnmatch(file.as_posix(), home) for home in homes)
    ] == []


def test_heavy_libraries_wait_for_the_call_that_needs_them():
    assert [
        f"{file}:{i.line} {i.name}"
        for file, i in every_import()
        if i.at_load and any(i.is_under(library) for library in HEAVY)
    ] == []


def test_a_module_has_a_docstring():
    assert [f for f in FILES if not ast.get_docstring(ast.parse((ROOT / f).read_text()))] == []


def test_a_file_is_short():
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in FILES}
    assert {file: count for file, count in lines.items() if count > MAX_LINES} == {}


def test_a_module_has_found_its_name():
    assert [file for file in FILES if "utils" in (file.stem, *file.parts)] == []


def test_no_text_names_a_path_of_one_machine():
    folders = [ROOT / name for name in (*PACKAGES, "tests", "benchmarks", ".ci")]
    paths = [path for folder in folders for path in folder.rglob("*")]
    paths += [ROOT / "artifacts" / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    paths += ROOT.glob("*.md")
    texts = [path for path in paths if path.suffix in {".py", ".md", ".toml", ".yaml", ".sh", ""}]
    assert [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        if path.is_file()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if MACHINE_PATHS.search(line)
    ] == []
