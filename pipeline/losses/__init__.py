"""Losses by name, on logits and on features. Adding one is adding a file to this folder."""

from importlib import import_module
from pkgutil import iter_modules

from .base import FEATURE_LOSSES, LOSSES, Step

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FEATURE_LOSSES", "LOSSES", "Step"]
