"""Networks: our own by name, torchvision's, and any `package.module:factory`."""

import importlib
import pkgutil

from .build import build_model, is_import_path, source_hash
from .registry import MODELS
from .weights import load_weights

for _file in pkgutil.iter_modules(__path__):  # a new file registers its networks by being here
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["MODELS", "build_model", "is_import_path", "load_weights", "source_hash"]
