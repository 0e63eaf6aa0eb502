"""Options of named parts, checked against the part's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ..quant.registry import Entry, Registry, UnknownNameError, unknown

Mistake = tuple[str, str]  # the key ("" for the part as a whole), and what is wrong


def check_options(registry: Registry[Any], name: str, options: Mapping[str, Any]) -> list[Mistake]:
    """What is wrong with a part's name or options; empty if all is well."""
    try:
        entry = registry[name]
    except UnknownNameError as error:
        return [("", str(error))]
    known = entry.options()
    bad = [key for key in options if key not in known]
    what = f"option of {registry.kind} {name!r}"
    errors = [(key, unknown(what, key, known)) for key in bad]
    try:
        _schema(entry).model_validate({k: v for k, v in options.items() if k in known})
    except ValidationError as error:
        for e in error.errors():
            message = f"{e['msg'][0].lower()}{e['msg'][1:]}, not {e.get('input')!r}"
            errors.append((str(e["loc"][0]), message))
    return errors


@cache
def _schema(entry: Entry[Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {
        name: (
            _without_paths(p.annotation),
            ... if p.default is inspect.Parameter.empty else p.default,
        )
        for name, p in entry.options().items()
    }
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, strict=True)
    return create_model(f"{entry.name}_options", __config__=config, **fields)


def _without_paths(annotation: Any) -> Any:
    """The annotation as YAML can meet it: a path is text there."""
    if annotation is Path:
        return str
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return Union[tuple(_without_paths(a) for a in get_args(annotation))]  # noqa: UP007
    return annotation
