"""From a mapping to a `RunConfig`, with every mistake in it reported at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..quant.registry import unknown
from .auto_ladder import label as rung_label
from .auto_ladder import possible_rungs
from .auto_plan import said_of_rungs, teachers_that_may_be_missing
from .config import AutoConfig, RunConfig, StageConfig
from .config_check import check_parts
from .epoch_shares import share_epochs
from .errors import ConfigError
from .overlay import overlay
from .precision import settle_precision
from .yaml_reader import apply_overrides, path_text, read_yaml_file

M = TypeVar("M", bound=BaseModel)
SHIPPED = Path(__file__).parent.parent / "flows" / "configs"
# sections that a rung takes over from above the ladder, each merged key by key
INHERITED = ("quantizer", "policy", "train", "distill", "bin_regularization", "oscillation")
RUN_KEYS = ("name", "seed", "data", "model", "runtime", "total_epochs", "ladder", "auto")
RUNG_KEYS = (
    *("name", "weight_bits", "activation_bits", "init", "model", "epochs", "share", "teacher"),
)
_IN_RUNG = re.compile(r"ladder\.(\d+)\.((\w+)[.:].*)", re.DOTALL)
AUTO_RUNG_KEYS = ("epochs", "teacher")  # the others the ladder itself decides
MAX_STAGES = 64
# for a required value that is missing or wrong, so that the rest is checked all the same
STAND_INS: dict[type[BaseModel], dict[str, Any]] = {
    StageConfig: {"weight_bits": 32, "activation_bits": 32},
    RunConfig: {"name": "unnamed", "ladder": ()},
    AutoConfig: {"weight_bits": 1, "activation_bits": 1, "budget": 1.0},
}


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name (`digits`, `br/paper_w2a4`, ...)."""
    found = sorted(SHIPPED.rglob("*.yaml"))
    return {str(path.relative_to(SHIPPED).with_suffix("")): path for path in found}


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a shipped config by name, or a YAML file.

    Raises:
        ConfigError: one line for each mistake, with its YAML path.
    """
    return parse_config(apply_overrides(read_config(source), list(overrides)))


def read_config(source: str | Path) -> dict[str, Any]:
    """What a shipped config or a YAML file says, unchecked.

    Raises:
        ConfigError: there is no such config or file, or it is no YAML mapping.
    """
    return read_yaml_file(shipped_or_file("config", source, shipped_configs()))


def shipped_or_file(kind: str, source: str | Path, shipped: Mapping[str, Path]) -> Path:
    """The file of something shipped, by its name, or the file that the source is.

    A folder is no file: one that has a shipped name, such as a store, does not hide it.

    Raises:
        ConfigError: there is neither; `kind` is what it calls them.
    """
    path, name = Path(source), str(source)
    if name in shipped and not path.is_file():
        return shipped[name]
    if path.exists() or path.suffix in (".yaml", ".yml") or name.startswith("/"):
        return path
    raise ConfigError([unknown(kind, name, shipped) + "; or give a YAML file"])


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """Checks a mapping and fills in the defaults.

    Raises:
        ConfigError: one line for each mistake, with its YAML path.
    """
    errors: list[str] = _not_finite(raw)
    top: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for key, value in raw.items():
        if key in INHERITED:
            defaults[key] = short_forms(key, value)
        elif key in RUN_KEYS:
            top[key] = short_forms(key, value)
        else:
            errors.append(unknown("key", str(key), (*RUN_KEYS, *INHERITED)))
    probe = {"weight_bits": 32, "activation_bits": 32, **defaults}
    errors += validated(StageConfig, probe, ())[1]  # the defaults by themselves
    rungs = top.pop("ladder", None)
    total = top.pop("total_epochs", None)
    section, auto = top.pop("auto", None), None
    if rungs == "auto":
        auto, rungs, mistakes_in_auto = _auto(section, total)
        errors += mistakes_in_auto
    elif section is not None:
        errors.append("auto: is for ladder: auto; take it out, or the list of rungs")
    if isinstance(rungs, list) and auto is None:
        rungs, mistakes = share_epochs(rungs, total)
        errors += [f"{path_text(where)}: {text}" for where, text in mistakes]
    stages, rung_errors = _stages(rungs, defaults)
    run, run_errors = validated(RunConfig, {**top, "ladder": ()}, ())
    run = run.model_copy(update={"ladder": tuple(stages)})
    errors += run_errors + rung_errors + _said_where_written(check_parts(run), rungs)
    if auto is not None:
        errors += teachers_that_may_be_missing(auto, stages)
        errors = said_of_rungs(errors, [stage.name for stage in stages])
        named = {stage.name: stage for stage in stages}
        run = run.model_copy(
            update={"ladder": (), "auto": auto.model_copy(update={"rungs": named})}
        )
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
    return settle_precision(run)


def _auto(section: Any, total_epochs: Any) -> tuple[AutoConfig, list[Any], list[str]]:
    """The rules of an automatic ladder, every rung it may come to, and the mistakes."""
    errors = []
    if total_epochs is not None:
        errors.append("total_epochs: is for a list of rungs; with ladder: auto give train.epochs")
    if not isinstance(section, dict):
        what = "is missing" if section is None else f"must be a mapping, not {_kind(section)}"
        example = "{weight_bits: 1, activation_bits: 1, budget: 0.02}"
        errors.append(f"auto: {what}; give target and budget, such as {example}")
        section = STAND_INS[AutoConfig]
    own = section.get("rungs", {})
    rules = {key: value for key, value in section.items() if key != "rungs"}
    auto, wrong = validated(AutoConfig, rules, ("auto",))
    rungs = {rung_label(widths): widths for widths in possible_rungs(auto)}
    if not isinstance(own, dict):
        errors.append(f"auto.rungs: must be a mapping of rungs to settings, not {_kind(own)}")
        own = {}
    own = {str(name): rung for name, rung in own.items()}
    for name, rung in own.items():
        if not isinstance(rung, dict):
            errors.append(f"auto.rungs.{name}: must be a mapping, not {_kind(rung)}")
            continue
        known = (*AUTO_RUNG_KEYS, *INHERITED)
        bad = [str(key) for key in rung if key not in known]
        errors += [f"auto.rungs.{name}.{key}: {unknown('key', key, known)}" for key in bad]
        if not wrong and not any(fnmatchcase(rung_name, name) for rung_name in rungs):
            errors.append(f"auto.rungs.{name}: fits no rung; there may be: {', '.join(rungs)}")
    raw = [_auto_rung(name, widths, own) for name, widths in rungs.items()]
    return auto, raw, wrong + errors


def _auto_rung(name: str, widths: tuple[int, int], own: Mapping[str, Any]) -> dict[str, Any]:
    """What is set for a rung, the globs that fit its name over each other in their order."""
    raw: dict[str, Any] = {"name": name, "weight_bits": widths[0], "activation_bits": widths[1]}
    if widths[0] == 1:  # latent weights are not shrunk: only their signs count
        raw["train"] = {"optimizer": {"weight_decay": 0.0}}
    for match, rung in own.items():
        if fnmatchcase(name, match) and isinstance(rung, dict):
            known = {k: v for k, v in rung.items() if k in (*AUTO_RUNG_KEYS, *INHERITED)}
            raw = merge_rung(raw, {k: short_forms(k, v) for k, v in known.items()})
    return raw


def _stages(rungs: Any, defaults: dict[str, Any]) -> tuple[list[StageConfig], list[str]]:
    if rungs is None:
        return [], ["ladder: is missing; give a list of rungs, such as {weight_bits: 8, ...}"]
    if not isinstance(rungs, list):
        return [], [f"ladder: must be a list of rungs, not {_kind(rungs)}"]
    if not rungs:
        return [], ["ladder: has no stage; give at least one rung, such as {weight_bits: 8, ...}"]
    if len(rungs) > MAX_STAGES:
        return [], [f"ladder: has {len(rungs)} rungs; at most {MAX_STAGES} are allowed"]
    stages: list[StageConfig] = []
    errors: list[str] = []
    names: set[str] = set()
    for index, rung in enumerate(rungs):
        where = ("ladder", index)
        if not isinstance(rung, dict):
            errors.append(f"{path_text(where)}: must be a mapping, not {_kind(rung)}")
            stages.append(StageConfig(**STAND_INS[StageConfig]))
            continue
        bad = [k for k in rung if k not in RUNG_KEYS and k not in INHERITED]
        known = (*RUNG_KEYS, *INHERITED)
        errors += [f"{path_text((*where, k))}: {unknown('key', str(k), known)}" for k in bad]
        own = {k: short_forms(k, v) for k, v in rung.items() if k not in bad}
        if isinstance(own.get("model"), dict) and "name" not in own["model"]:
            text = "is missing; a rung's model takes nothing over from the ladder's"
            errors.append(f"{path_text((*where, 'model', 'name'))}: {text}")
        merged = merge_rung(defaults, own)
        stage, found = validated(StageConfig, merged, where)
        found = [_as_written(e, own, where) for e in found]
        errors += [e for e in found if _said_here(e, own, where)]
        name = _unique(stage.name or label(stage), names, given=bool(stage.name))
        if name is None:
            errors.append(f"{path_text((*where, 'name'))}: {stage.name!r} is used twice")
            name = stage.name
        names.add(name)
        stages.append(stage.model_copy(update={"name": name}))
    return stages, errors


def label(stage: StageConfig) -> str:
    """A rung's name when it has none of its own: `fp32`, `w8a8`, `w1a2`."""
    if stage.full_precision:
        return "fp32"
    return f"w{stage.weight_bits}a{stage.activation_bits}"


def _unique(name: str, taken: set[str], *, given: bool) -> str | None:
    if name not in taken:
        return name
    if given:
        return None
    return next(f"{name}-{n}" for n in range(2, MAX_STAGES + 2) if f"{name}-{n}" not in taken)


def short_forms(key: str, value: Any) -> Any:
    """`quantizer: lsq` for both of its halves, `schedule: cosine` for its name, and the like."""
    if key == "quantizer":
        if isinstance(value, str) or (isinstance(value, dict) and "name" in value):
            value = {"weight": value, "activation": value}
        if isinstance(value, dict):
            return {k: _named(v) for k, v in value.items()}
    if key == "model":
        return _named(value)
    if key == "distill" and value in (None, "none"):
        return {"teacher": "none"}
    if key == "distill" and isinstance(value, dict):
        return {k: _named(v) if k == "features" else v for k, v in value.items()}
    if key == "train" and isinstance(value, dict):
        short = ("optimizer", "schedule", "averaging")
        return {k: _named(v) if k in short else v for k, v in value.items()}
    if key == "policy" and isinstance(value, dict):
        edges = ("first_last_weight", "first_last_activation")
        value = {k: _named(v) if k in edges else v for k, v in value.items()}
    if key == "policy" and isinstance(value, dict) and isinstance(value.get("rules"), list):
        rules = [
            {k: _named(v) if k in ("weight", "activation") else v for k, v in rule.items()}
            if isinstance(rule, dict)
            else rule
            for rule in value["rules"]
        ]
        return {**value, "rules": rules}
    return value


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def merge_rung(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The rung's own words over the defaults; a part with another name takes no old options."""
    own = dict(own)
    if "epochs" in own:
        own["train"] = _put(own.get("train"), "epochs", own.pop("epochs"))
    if "teacher" in own:
        own["distill"] = _put(own.get("distill"), "teacher", own.pop("teacher"))
    return overlay(defaults, own)


def _put(section: Any, key: str, value: Any) -> Any:
    if section is None:
        return {key: value}
    return {**section, key: value} if isinstance(section, dict) else section


def _as_written(error: str, own: Mapping[str, Any], where: tuple[Any, ...]) -> str:
    """The error with the short form's path where the rung used the short form."""
    for long, short in ((("train", "epochs"), "epochs"), (("distill", "teacher"), "teacher")):
        if short in own:
            error = error.replace(path_text((*where, *long)), path_text((*where, short)), 1)
    return error


def _said_here(error: str, own: Mapping[str, Any], where: tuple[Any, ...]) -> bool:
    """Whether a rung's error is the rung's own, not one of the defaults that is said there."""
    rest = error.removeprefix(path_text(where)).lstrip(".").partition(":")[0].split(".")
    return rest[0] not in INHERITED or rest[0] in own


def _said_where_written(errors: Sequence[str], rungs: Any) -> list[str]:
    """Mistakes in `ladder.N`: in its short forms; those of a section above the ladder said there.

    It is the section's where all rungs that take it over whole, of two or more, have the mistake.
    """
    own = [r if isinstance(r, dict) else {} for r in rungs] if isinstance(rungs, list) else []
    says = [merge_rung({}, rung) for rung in own]
    heirs = {part: {str(n) for n, has in enumerate(says) if part not in has} for part in INHERITED}
    found = [match for match in map(_IN_RUNG.fullmatch, errors) if match and match[3] in INHERITED]
    who: dict[str, set[str]] = {}
    for rung in found:
        who.setdefault(rung[2], set()).add(rung[1])
    above = {m[2] for m in found if len(heirs[m[3]]) > 1 and heirs[m[3]] <= who[m[2]]}
    said = []
    for error in errors:
        if not (match := _IN_RUNG.fullmatch(error)):
            said.append(error)
        elif match[2] in above and match[1] in heirs[match[3]]:
            said.append(match[2])
        else:
            index = int(match[1])
            said.append(_as_written(error, own[index], ("ladder", index)))
    return list(dict.fromkeys(said))


def validated(
    kind: type[M],
    raw: Mapping[str, Any],
    where: tuple[Any, ...],
    stand_ins: Mapping[str, Any] | None = None,
) -> tuple[M, list[str]]:
    """The section, with defaults in place of what is wrong in it, and its mistakes."""
    try:
        return kind.model_validate(dict(raw)), []
    except ValidationError as error:
        found = error.errors()
    wrong = {e["loc"][0] for e in found}
    right = {key: value for key, value in raw.items() if key not in wrong}
    instead = STAND_INS.get(kind, {}) if stand_ins is None else stand_ins
    section = kind.model_validate({**instead, **right})
    return section, [_line(e, where, kind) for e in found]


def _line(error: Any, where: tuple[Any, ...], kind: type[BaseModel]) -> str:
    loc = tuple(p for p in error["loc"] if p not in ("str", "int", "literal['same']"))
    loc = tuple(p for p in loc if not (isinstance(p, str) and p.startswith(("literal", "constr"))))
    text = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        text = _unknown_key(loc, kind)
    elif error["type"] == "missing":
        text = "is missing"
    elif isinstance(value, str | int | float | bool | None):
        text = f"{text[0].lower()}{text[1:]}, not {value!r}"
    return f"{path_text((*where, *loc))}: {text}" if loc or where else text


def _unknown_key(loc: tuple[Any, ...], kind: type[BaseModel]) -> str:
    """What is said of a key that its section, somewhere inside one of this kind, does not have."""
    *parts, key = loc
    section: type[BaseModel] | None = kind
    for part in parts:
        if section is not None and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation)
    known = [field.alias or name for name, field in section.model_fields.items()] if section else []
    if close := get_close_matches(str(key), known, n=1):
        return f"unknown key; did you mean {close[0]!r}?"
    if parts and key in kind.model_fields:
        return f"unknown key; {key} stands beside {parts[0]}, not in it"
    return f"unknown key; known: {', '.join(known)}" if known else "unknown key"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section among the types that a value may have."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)


def _not_finite(value: Any, where: tuple[Any, ...] = ()) -> list[str]:
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{path_text(where)}: must be a finite number, not {value}"]
    if isinstance(value, Mapping):
        return [e for k, v in value.items() for e in _not_finite(v, (*where, k))]
    if isinstance(value, list):
        return [e for i, v in enumerate(value) for e in _not_finite(v, (*where, i))]
    return []


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), "a number")


__all__ = ["load_config", "parse_config", "shipped_configs"]
