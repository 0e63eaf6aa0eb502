"""Every golden number: what we compute against what the original implementations computed.

The folder is `BITLADDER_GOLDEN`, or `tests/golden`. No case is named here: entries come from its
index.json, and what an entry asks of which part is the business of `golden_adapter`.
`python tests/test_golden.py` prints the table alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_adapter import CHOICES, Answer, Case, NotOffered, Refused, adapt

DEFAULT = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("BITLADDER_GOLDEN") or DEFAULT)
GIVEN = {  # SHA-256 of the two files as they were given
    "index.json": "e9a94775800d26acee56209dca85bd64202ee9ca73c6105e50db86e86662965c",
    "golden.npz": "f4f3beacf9e47e7faece5af7dcd19fbdb10c99ad89fad60aa6ea2ecbfadb6782",
}

AGREED = "agreed"
DIFFERED = "differed"  # from a known bug, as it must
BY_CHOICE = "by choice"  # different, where an entry shows what its origin does
NOT_OFFERED = "not offered"
FAILED = "FAILED"
NO_REASON = "no reason known"
VERDICTS = (AGREED, DIFFERED, BY_CHOICE, NOT_OFFERED, FAILED)


@dataclass(frozen=True)
class Outcome:
    """What came of one entry, and why, where there is something to say."""

    id: str
    subject: str
    conformance: str
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Folder:
    entries: Sequence[Mapping[str, Any]]
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def open(cls, path: Path) -> Folder:
        with np.load(path / "golden.npz") as file:
            arrays = dict(file)
        return cls(json.loads((path / "index.json").read_text(encoding="utf-8"))["entries"], arrays)

    def case(self, entry: Mapping[str, Any]) -> Case:
        prefix = f"{entry.get('id')}/"
        return Case(
            entry,
            {
                key.removeprefix(prefix): torch.from_numpy(array.copy())
                for key, array in self.arrays.items()
                if key.startswith(prefix) and array.dtype.kind in "biuf"
            },
        )

    def outcomes(self) -> list[Outcome]:
        return [judge(self.case(entry)) for entry in self.entries]


def judge(case: Case) -> Outcome:
    """Runs one entry; whatever goes wrong in it is its outcome and not an exception."""
    conformance = case.text("conformance")
    verdict, why = FAILED, ""
    try:
        if conformance not in ("target", "variant", "known-bug", "edge"):
            raise NotOffered(f"conformance {conformance!r}")
        why = disagreement(case)
        if conformance == "known-bug":
            verdict = DIFFERED if why else FAILED
            why = why or "our default has the faulty behaviour"
        elif not why:
            verdict, why = AGREED, case.remark
        elif conformance == "edge":
            verdict = BY_CHOICE
            why = CHOICES.get((case.text("quantizer"), case.variant), f"{NO_REASON}: {why}")
    except NotOffered as reason:
        verdict, why = NOT_OFFERED, str(reason)
    except Refused as reason:
        verdict = DIFFERED if conformance == "known-bug" else NOT_OFFERED
        why = f"refused: {reason}"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    subject = " ".join(dict.fromkeys(filter(None, map(case.text, ("quantizer", "role")))))
    return Outcome(case.text("id"), subject, conformance, verdict, why)


def disagreement(case: Case) -> str:
    """The first array that is not what the entry says, and how far off; empty if all agree."""
    found = ""
    answers = adapt(case)
    if missing := set(case.entry.get("arrays") or ()) - set(case.arrays):
        raise NotOffered(f"array {', '.join(sorted(missing))} not in the file")
    for answer in answers:
        found = first_difference(case, answer)
        if not found:
            break
    return found


def first_difference(case: Case, answer: Answer) -> str:
    unread = set(case.arrays) - case.read - {name for name, _ in answer}
    unread = {name for name in unread if not name.startswith("valid")}
    if unread:
        raise NotOffered(f"array {', '.join(sorted(unread))}")
    compared = [(name, got) for name, got in answer if name in case.arrays]
    if not compared:
        raise NotOffered("nothing to compare")
    differences = (difference(case, name, got) for name, got in compared)
    return next(filter(None, differences), "")


def difference(case: Case, name: str, got: torch.Tensor) -> str:
    """Empty where |got - want| <= rtol * |want| + atol_rel_to_max * max|want|."""
    want = case.arrays[name].double()
    if got is None:
        return f"{name}: we have none"
    if got.numel() != want.numel():
        return f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    if not want.numel():
        return ""
    got = got.detach().double().reshape(want.shape)
    rtol, atol = case.entry.get("rtol", 1e-4), case.entry.get("atol_rel_to_max", 1e-5)
    bound = rtol * want.abs() + atol * want.abs().max()
    off = ~((got - want).abs() <= bound)  # nan is off
    mask = mask_of(case, name)
    if mask is not None:
        off &= mask.bool().view_as(off)
    if not off.any():
        return ""
    worst = (got - want).abs()[off].argmax()
    return (
        f"{name}: {int(off.sum())} of {want.numel()} differ, "
        f"{got[off][worst]:.6g} instead of {want[off][worst]:.6g}"
    )


def mask_of(case: Case, name: str) -> torch.Tensor | None:
    """`valid` masks y and grad_x; `valid2` those of the third call."""
    base = name.rstrip("0123456789")
    if base not in ("y", "grad_x"):
        return None
    return case.arrays.get("valid" + name.removeprefix(base))


def summary(outcomes: Iterable[Outcome]) -> list[str]:
    """The table: what was run and what came of it; then the reasons, grouped."""
    outcomes = list(outcomes)
    groups = {f"  {s}": [o for o in outcomes if o.subject == s] for s in subjects(outcomes)}
    for conformance in sorted({o.conformance for o in outcomes}):
        groups[f"all {conformance}"] = [o for o in outcomes if o.conformance == conformance]
    groups["all"] = outcomes
    rows = [["", "entries", *VERDICTS]]
    for title, group in groups.items():
        tally = Counter(o.verdict for o in group)
        rows.append([title, str(len(group)), *(str(tally[v] or "-") for v in VERDICTS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        first.ljust(widths[0]) + "".join(map(str.rjust, rest, (w + 2 for w in widths[1:])))
        for first, *rest in rows
    ]
    for verdict in (AGREED, DIFFERED, BY_CHOICE, NOT_OFFERED):
        reasons = Counter((o.subject, o.why) for o in outcomes if o.verdict == verdict and o.why)
        lines += [f"{verdict}: {n} x {what}: {why}" for (what, why), n in sorted(reasons.items())]
    lines += [f"{FAILED}: {o.id}: {o.why}" for o in outcomes if o.verdict == FAILED]
    offered = sum(o.verdict != NOT_OFFERED for o in outcomes)
    agreed = sum(o.verdict == AGREED for o in outcomes)
    lines.append(f"{offered} of {len(outcomes)} entries run, {agreed} agreed")
    return lines


def subjects(outcomes: Iterable[Outcome]) -> list[str]:
    return sorted({o.subject for o in outcomes})


# --------------------------------------------------------------------------------- tests


@cache
def folder_at(path: Path) -> Folder:
    return Folder.open(path)


@cache
def outcome_of(path: Path, position: int) -> Outcome:
    folder = folder_at(path)
    return judge(folder.case(folder.entries[position]))


@pytest.mark.parametrize(
    "position",
    range(len(folder_at(GOLDEN).entries)),
    ids=lambda position: str(folder_at(GOLDEN).entries[position].get("id", position)),
)
def test_entry(position, record_property):
    outcome = outcome_of(GOLDEN, position)
    record_property("golden", asdict(outcome))  # for the table at the end of the run
    assert outcome.verdict != FAILED, outcome.why


def test_the_numbers_are_as_they_were_given():
    for name, given in GIVEN.items():
        assert hashlib.sha256((DEFAULT / name).read_bytes()).hexdigest() == given, name


def test_no_target_of_the_given_folder_is_left_out_and_no_difference_is_without_a_reason():
    outcomes = [outcome_of(DEFAULT, i) for i in range(len(folder_at(DEFAULT).entries))]
    assert [o for o in outcomes if o.conformance == "target" and o.verdict != AGREED] == []
    assert [o for o in outcomes if o.why.startswith(NO_REASON)] == []


def sample() -> list[Mapping[str, Any]]:
    """Of every quantizer, role and variant the first target that agrees."""
    chosen = {}
    for position, entry in enumerate(folder_at(DEFAULT).entries):
        kind = tuple(str(entry.get(key)) for key in ("quantizer", "role", "variant"))
        agreed = outcome_of(DEFAULT, position).verdict == AGREED
        if kind not in chosen and entry["conformance"] == "target" and agreed:
            chosen[kind] = entry
    return list(chosen.values())


def changed(entry: Mapping[str, Any], **values: Any) -> Outcome:
    """The outcome of an entry with other values; None takes the key away."""
    case = folder_at(DEFAULT).case(entry)
    case.entry = {k: v for k, v in {**entry, **values}.items() if v is not None}
    return judge(case)


def moved(array: np.ndarray) -> np.ndarray:
    """The same shape and type with every number a little off."""
    if array.dtype == bool:
        return ~array
    return np.asarray(array * 1.01 + 0.01 * (1 + np.abs(array).max()), dtype=array.dtype)


def test_every_array_that_is_compared_can_fail():
    for entry in sample():
        case = folder_at(DEFAULT).case(entry)
        answer = next(adapt(case))
        given = case.arrays
        for name in {name for name, _ in answer} & set(given):
            other = torch.from_numpy(moved(given[name].numpy()))
            case.arrays = {**given, name: other}
            assert first_difference(case, answer), f"{entry['id']}/{name}"


def test_a_folder_with_wrong_numbers_fails(tmp_path):
    entries = sample()
    arrays = {}
    for entry in entries:
        case = folder_at(DEFAULT).case(entry)
        arrays |= {f"{entry['id']}/{name}": array.numpy() for name, array in case.arrays.items()}
        answered = next(name for name, _ in next(adapt(case)) if name in case.arrays)
        wrong = f"{entry['id']}/{answered}"
        arrays[wrong] = moved(arrays[wrong])
    stranger = {**entries[0], "id": "stranger", "quantizer": "quantum"}
    (tmp_path / "index.json").write_text(json.dumps({"entries": [*entries, stranger]}))
    np.savez(tmp_path / "golden.npz", **arrays)
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "BITLADDER_GOLDEN": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    failed = re.findall(rf"^{FAILED}: (\S+):", run.stdout, flags=re.M)
    assert failed == [entry["id"] for entry in entries]
    assert "not offered: 1 x quantum" in run.stdout


def test_what_is_unknown_is_not_offered():
    for entry in sample():
        for key in ("quantizer", "role", "variant", "conformance"):
            assert changed(entry, **{key: "unheard of"}).verdict == NOT_OFFERED, (entry["id"], key)
        for key in [*entry["config"], "unheard of"]:
            config = {**entry["config"], key: "unheard of"}
            assert changed(entry, config=config).verdict == NOT_OFFERED, (entry["id"], key)
        for bits in (12, "four"):
            assert changed(entry, bits=bits).verdict in (NOT_OFFERED, AGREED), entry["id"]
        case = folder_at(DEFAULT).case(entry)
        case.arrays = {**case.arrays, "param_unheard_of": torch.ones(1)}
        assert judge(case).verdict == NOT_OFFERED, entry["id"]


def test_what_is_missing_is_no_failure():
    for entry in sample():
        for key in ("id", "quantizer", "role", "variant", "conformance"):
            assert changed(entry, **{key: None}).verdict in (NOT_OFFERED, AGREED), entry["id"]
        for key in ("bits", "notes", "origin", "arrays", "param_semantics", "signed", "qn", "qp"):
            assert changed(entry, **{key: None}).verdict in (NOT_OFFERED, AGREED), entry["id"]
        case = folder_at(DEFAULT).case(entry)
        given = case.arrays
        for name in given:
            if name.startswith("valid"):  # without the mask, ties count
                continue
            case.arrays = {k: v for k, v in given.items() if k != name}
            case.entry = {k: v for k, v in entry.items() if k != "arrays"}
            case.read.clear()
            assert judge(case).verdict in (NOT_OFFERED, AGREED), f"{entry['id']}/{name}"


if __name__ == "__main__":
    results = Folder.open(GOLDEN).outcomes()
    print("\n".join(summary(results)))
    sys.exit(any(o.verdict == FAILED for o in results))
