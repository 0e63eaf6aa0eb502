"""Which rungs a rung stands on: whose weights it starts from, and whose outputs it follows.

Pure. `previous`, `fp32`, `dense` and `best` see only the rungs above that have the same network;
a rung of another network is a teacher where its own name is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..quant.registry import unknown
from .config import RunConfig, StageConfig
from .record import StageRecord

INIT_WORDS = ("previous", "fp32", "scratch")
TEACHER_WORDS = ("previous", "fp32", "dense", "best", "none")
RESERVED = frozenset({*INIT_WORDS, *TEACHER_WORDS})


@dataclass(frozen=True)
class Parents:
    """The positions of the rungs that a rung stands on.

    Attributes:
        init: whose weights it starts from; None: a file's, or fresh ones.
        teachers: in ladder order.
        chooses: whether the stage follows only the best of the teachers, known when it starts.
    """

    init: int | None
    teachers: tuple[int, ...]
    chooses: bool = False

    def roles(self) -> dict[str, int]:
        """The role of each, as a stage's spec names it; a lone teacher is `teacher`."""
        roles = {} if self.init is None else {"init": self.init}
        if len(self.teachers) == 1:
            return roles | {"teacher": self.teachers[0]}
        kind = "candidate" if self.chooses else "teacher"
        return roles | {f"{kind}-{n}": position for n, position in enumerate(self.teachers)}


def parents_of(run: RunConfig, index: int) -> Parents:
    """What the rung at `index` stands on.

    Raises:
        ValueError: no rung above is what the config asks for; the first of `parent_mistakes`.
    """
    stage = run.ladder[index]
    wanted = stage.distill.teacher
    if not is_distilled(stage):
        return Parents(_init(run, index), ())
    if wanted in ("dense", "best"):
        alike = _alike(run, index)
        return Parents(_init(run, index), alike, chooses=wanted == "best" and len(alike) > 1)
    found = {_teacher(run, index, name) for name in named_teachers(stage)}
    return Parents(_init(run, index), tuple(sorted(n for n in found if n is not None)))


def parent_mistakes(run: RunConfig, index: int) -> list[tuple[str, str]]:
    """Every mistake in what a rung says of its parents: the key, and what is wrong."""
    stage = run.ladder[index]
    mistakes = []
    if stage.name in RESERVED and not (stage.name == "fp32" and stage.full_precision):
        means = f"{stage.name!r} has a meaning of its own as teacher or init"
        mistakes.append(("name", f"{means}; give another name"))
    try:
        _init(run, index)
    except ValueError as error:
        mistakes.append(("init", str(error)))
    if not is_distilled(stage):
        return mistakes  # a teacher that stands above the ladder may be this very rung
    wanted = stage.distill.teacher
    if isinstance(wanted, tuple):
        mistakes += [("distill.teacher", text) for text in _list_mistakes(wanted)]
    for name in named_teachers(stage):
        try:
            _teacher(run, index, name)
        except ValueError as error:
            mistakes.append(("distill.teacher", str(error)))
    return mistakes


def is_distilled(stage: StageConfig) -> bool:
    """Whether a teacher would change anything: something is trained, and a loss of it weighs."""
    return stage.train.epochs > 0 and stage.distill.follows


def named_teachers(stage: StageConfig) -> Sequence[str]:
    """What a rung names its teachers one by one: `previous`, `fp32`, or rungs."""
    wanted = stage.distill.teacher
    names = wanted if isinstance(wanted, tuple) else (wanted,)
    return [name for name in names if name not in ("dense", "best", "none")]


def teachers_among(parents: Mapping[str, StageRecord]) -> tuple[list[StageRecord], bool]:
    """The stages to learn from, in ladder order, and whether one was chosen among several.

    Chosen is the candidate with the highest top-1 accuracy on validation; of equals, the nearest.
    """
    candidates = _numbered(parents, "candidate")
    if candidates:
        return [max(reversed(candidates), key=lambda record: record.metrics["val_top1"])], True
    if "teacher" in parents:
        return [parents["teacher"]], False
    return _numbered(parents, "teacher"), False


def _numbered(parents: Mapping[str, StageRecord], kind: str) -> list[StageRecord]:
    count = sum(role.startswith(f"{kind}-") for role in parents)
    return [parents[f"{kind}-{n}"] for n in range(count)]


def _alike(run: RunConfig, index: int) -> tuple[int, ...]:
    """The rungs above of the same network."""
    own = run.model_of(run.ladder[index])
    above = enumerate(run.ladder[:index])
    return tuple(n for n, stage in above if own.same_network(run.model_of(stage)))


def _list_mistakes(names: Sequence[str]) -> list[str]:
    if not names:
        return ["the list is empty; name rungs above, or give none"]
    alone = [n for n in dict.fromkeys(names) if n in ("dense", "best", "none")]
    twice = [n for n in dict.fromkeys(names) if names.count(n) > 1]
    return [f"{name!r} stands alone, not in a list" for name in alone] + [
        f"{name!r} is named twice" for name in twice
    ]


def _init(run: RunConfig, index: int) -> int | None:
    wanted = run.ladder[index].init
    alike = _alike(run, index)
    if wanted == "scratch":
        return None
    if wanted == "fp32":
        return _fp32(run, index)
    if wanted == "previous":
        return alike[-1] if alike and not _has_other_weights(run, index, alike[-1]) else None
    position = _named(run, index, wanted, "rung to start from", INIT_WORDS)
    if position not in alike:
        raise ValueError(
            f"{wanted!r} has another network, whose weights do not fit; give init: scratch (and "
            f"teacher: {wanted} to learn from it)"
        )
    return position


def _has_other_weights(run: RunConfig, index: int, above: int) -> bool:
    """Whether a rung brings a weights file of its own, which the one above did not start from."""
    own = run.ladder[index].model
    return own is not None and own.weights not in (None, run.model_of(run.ladder[above]).weights)


def _teacher(run: RunConfig, index: int, name: str) -> int | None:
    if name == "previous":
        alike = _alike(run, index)
        return alike[-1] if alike else None
    if name == "fp32":
        return _fp32(run, index)
    return _named(run, index, name, "teacher", TEACHER_WORDS)


def _fp32(run: RunConfig, index: int) -> int | None:
    """The first full-precision rung above of the same network; such a rung itself needs none."""
    found = [n for n in _alike(run, index) if run.ladder[n].full_precision]
    if found:
        return found[0]
    above = [stage.name for stage in run.ladder[:index]]
    if run.ladder[index].full_precision:
        if "fp32" in above:
            raise ValueError(
                f"'fp32' is a rung of the same model, and ladder.{above.index('fp32')} of that "
                "name has another one; give it a name of its own, such as big"
            )
        return None
    text = "'fp32' needs a rung above it with weight_bits: 32 and activation_bits: 32"
    if any(stage.full_precision for stage in run.ladder[:index]):
        text += " and the same model; a rung of another model is given by its name"
    raise ValueError(text)


def _named(run: RunConfig, index: int, name: str, kind: str, words: Sequence[str]) -> int:
    names = [stage.name for stage in run.ladder]
    if name in names[:index]:
        return names.index(name)
    if name in names:
        raise ValueError(f"{name!r} does not stand above this rung; {_listed(names[:index])}")
    hint = unknown(kind, name, [*names[:index], *words]).partition(" known:")[0]
    raise ValueError(f"{hint} {_listed(names[:index])}, and the words are {', '.join(words)}")


def _listed(names: Sequence[str]) -> str:
    return f"rungs above: {', '.join(names) or 'none'}"
