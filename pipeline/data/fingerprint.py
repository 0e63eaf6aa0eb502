"""The fingerprint of a data set, without decoding an image: stage keys are made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from ...quant.registry import Registry, unknown
from .bundle import DATASETS, DataError

# Beside the factory of a name: the hash of its content. It takes those of the factory's options
# that it needs, keyword-only.
CONTENTS: Registry[Callable[..., str]] = Registry("data set")

# where the data lie and how they are read; no number hangs on these
LOCATION = frozenset({"root", "download", "cache", "in_memory", "memory_limit", "workers"})


def fingerprint(name: str, options: Mapping[str, Any]) -> str:
    """The `fingerprint` of the bundle that these options make, 16 hex digits.

    Args:
        name: a registered data set.
        options: as the factory takes them; what is left out has its default.

    Raises:
        UnknownNameError: nothing is registered under the name.
        DataError: an option does not exist or is missing, or the data are not there.
    """
    factory = DATASETS[name]
    merged = _with_defaults(name, options)
    if name not in CONTENTS:
        return factory.factory(**merged).fingerprint
    content = CONTENTS[name]
    parts = {
        "name": name,
        "content": content.factory(**{key: merged[key] for key in content.options()}),
        "options": {key: value for key, value in merged.items() if key not in LOCATION},
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_defaults(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known = DATASETS[name].options()
    for option in options:
        if option not in known:
            raise DataError(unknown(f"option of data set {name!r}", option, known))
    merged = {key: p.default for key, p in known.items()} | dict(options)
    missing = [key for key, value in merged.items() if value is known[key].empty]
    if missing:
        raise DataError(f"data set {name!r} needs the option {missing[0]!r}")
    return merged
