"""The methods, one a file. Every file here is imported, so adding a method is adding a file."""

from importlib import import_module
from pkgutil import iter_modules

from ..core import QUANTIZERS

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["QUANTIZERS"]
