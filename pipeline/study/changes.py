"""An arm's changes put over its base: by the rules by which a rung stands over the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...quant.registry import unknown
from ..config import RunConfig
from ..config_load import merge_rung, parse_config, short_forms
from ..errors import ConfigError
from ..overlay import overlay
from .config import Changes

Raw = dict[str, Any]
_ELSEWHERE = {
    "name": "name stands at the top of the study",
    "seed": "the seeds are the study's: give seeds",
    "ladder": "give ladder beside set, not in it",
}


def parse_named(raw: Mapping[str, Any]) -> tuple[Raw, RunConfig]:
    """A config, and its mapping with every rung's name written out.

    Raises:
        ConfigError: one line for each mistake, with its path in the config.
    """
    if isinstance(raw.get("ladder"), str):
        text = f"ladder: {raw['ladder']!r} finds its rungs by results; a study's are named before"
        raise ConfigError([text])
    config = parse_config(raw)
    rungs = [
        {**rung, "name": stage.name}
        for rung, stage in zip(raw["ladder"], config.ladder, strict=True)
    ]
    return {**raw, "ladder": rungs}, config


def changed(raw: Raw, changes: Changes, where: str) -> tuple[Raw, RunConfig]:
    """A config with changes, checked; every rung of `raw` has its name.

    Args:
        where: YAML path of what holds the changes, such as `arms.direct`; "" at the top.

    Raises:
        ConfigError: one line for each mistake, with its path in the study.
    """
    errors = misplaced(changes, where)
    top = merge_top(raw, {k: v for k, v in changes.set_.items() if k not in _ELSEWHERE})
    rungs = list(raw["ladder"])
    if changes.ladder is not None:
        rungs, found = _picked(changes.ladder, rungs, _path(where, "ladder"))
        errors += found
    rungs, found = change_rungs(rungs, changes.rungs, _path(where, "rungs"))
    errors += found
    if changes.only is not None:
        path, known = _path(where, "only"), [_name(rung) for rung in rungs]
        errors += [f"{path}: {unknown('rung', n, known)}" for n in changes.only if n not in known]
        rungs = [rung for rung in rungs if _name(rung) in changes.only]
        if not rungs and not errors:
            errors.append(f"{path}: keeps no rung; known: {', '.join(known)}")
    if errors:
        raise ConfigError(errors)
    try:
        return parse_named({**top, "ladder": rungs})
    except ConfigError as error:
        names = [_name(rung) for rung in rungs]
        raise ConfigError([_placed(e, changes, where, names) for e in error.errors]) from None


def misplaced(changes: Changes, where: str) -> list[str]:
    """Mistakes: keys of `set` that the study says elsewhere."""
    wrong = [key for key in _ELSEWHERE if key in changes.set_]
    return [f"{_path(where, 'set', key)}: {_ELSEWHERE[key]}" for key in wrong]


def merge_top(raw: Mapping[str, Any], own: Mapping[str, Any]) -> Raw:
    """What stands above the rungs, with `own` merged over it."""
    return overlay(long_forms(raw), long_forms(own))


def change_rungs(
    rungs: Sequence[Raw], changes: Mapping[str, Raw], where: str
) -> tuple[list[Raw], list[str]]:
    """The rungs with changes by name, each merged over the rung's own words; and mistakes."""
    names = [_name(rung) for rung in rungs]
    wrong = [name for name in changes if name not in names]
    after = [
        merge_rung(merge_rung({}, long_forms(rung)), long_forms(changes[name]))
        if name in changes
        else rung
        for name, rung in zip(names, rungs, strict=True)
    ]
    return after, [f"{where}.{name}: {unknown('rung', name, names)}" for name in wrong]


def _name(rung: Raw) -> str:
    """A rung's name, also of a new one that does not say it."""
    bits = [rung.get("weight_bits"), rung.get("activation_bits")]
    return rung.get("name") or ("fp32" if bits == [32, 32] else f"w{bits[0]}a{bits[1]}")


def long_forms(section: Mapping[str, Any]) -> Raw:
    """Settings without YAML's short forms, so that they can be merged."""
    return {k: short_forms(k, v) for k, v in section.items()}


def _picked(
    ladder: Sequence[str | Raw], rungs: Sequence[Raw], where: str
) -> tuple[list[Raw], list[str]]:
    """A ladder of which each rung is one of those before, by name, or a new one."""
    by_name = {rung["name"]: rung for rung in rungs}
    errors = [
        f"{where}.{number}: {unknown('rung', rung, by_name)}"
        for number, rung in enumerate(ladder)
        if isinstance(rung, str) and rung not in by_name
    ]
    picked = [by_name.get(rung) if isinstance(rung, str) else rung for rung in ladder]
    return [rung for rung in picked if rung is not None], errors


def _placed(line: str, changes: Changes, where: str, names: Sequence[str]) -> str:
    """A mistake in the changed config, at the place in the study that is to blame."""
    path, _, text = line.partition(": ")
    first, *rest = path.split(".")
    if first == "ladder" and rest and rest[0].isdigit():
        number = int(rest[0])
        name = names[number] if number < len(names) else ""
        if changes.ladder is None and name in changes.rungs:
            return f"{_path(where, 'rungs', name, *rest[1:])}: {text}"
        if changes.ladder is not None:
            return f"{_path(where, path)}: {text}"
    elif first in changes.set_:
        return f"{_path(where, 'set', path)}: {text}"
    return f"{where}: {line}" if where else line


def _path(where: str, *parts: str) -> str:
    return ".".join((where, *parts) if where else parts)
