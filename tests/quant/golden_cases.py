"""Reading the golden numbers: cases by quantizer, and the comparison that they come with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())["entries"]


@dataclass(frozen=True)
class Case:
    entry: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.entry[name]

    def has(self, name: str) -> bool:
        return name in self.entry["arrays"]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(_arrays()[f"{self.entry['id']}/{name}"].copy())

    def close(self, got: Tensor, name: str, where: str | None = None) -> None:
        """Asserts that `got` is the array `name`, within the case's tolerance."""
        want = self.tensor(name).double()
        got = got.detach().double().reshape(want.shape)
        bound = self.rtol * want.abs() + self.atol_rel_to_max * want.abs().max()
        off = (got - want).abs() > bound
        if where is not None and self.has(where):
            off &= self.tensor(where)
        assert not off.any(), f"{self.id}/{name}: {got[off][:3]} instead of {want[off][:3]}"


@cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


def cases(quantizer: str, prefix: str, *conformance: str) -> pytest.MarkDecorator:
    """Parametrizes `case` over the golden cases of a quantizer whose id starts with `prefix`."""
    found = [
        Case(e)
        for e in INDEX
        if e["quantizer"] == quantizer
        and e["id"].startswith(prefix)
        and e["conformance"] in (conformance or ("target",))
    ]
    assert found, f"no golden case of {quantizer} starts with {prefix}"
    return pytest.mark.parametrize("case", found, ids=lambda case: case.id)
