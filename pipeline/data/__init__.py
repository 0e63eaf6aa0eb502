"""Data sets by name, split into train, validation and test. A new one is a new file here."""

from __future__ import annotations

import importlib
import pkgutil

from .bundle import DATASETS, DataBundle, DataError
from .split import Split, TensorSplit

__all__ = ["DATASETS", "DataBundle", "DataError", "Split", "TensorSplit"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
