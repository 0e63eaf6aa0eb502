"""From a model's name to the network, and to what identifies its code."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..quant.registry import UnknownNameError, unknown
from .blocks import initialise
from .registry import MODELS

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    options: Mapping[str, Any] = NO_OPTIONS,
    seed: int = 0,
    device: str = "cpu",
) -> nn.Module:
    """A new network, its weights drawn under `seed`.

    The same arguments give the same weights, and the global generator is left as it was.

    Args:
        name: a registered name (`preact_resnet20`), a torchvision model (`torchvision:resnet18`,
            or `resnet18` where no network of ours has that name), or `package.module:factory`.
        num_classes: logits of the network.
        in_channels: channels of the images. A torchvision network gets a new first convolution
            where this is not 3.
        image_size: height and width of the images.
        options: arguments of the network besides these. A foreign factory gets num_classes,
            in_channels and image_size only where its signature has them (or `**kwargs`).
        seed: of the initial weights.
        device: "cpu"; or "meta" for the shapes alone, which takes no memory.

    Raises:
        UnknownNameError: no such model, factory or option; the message lists the known ones.
        ValueError: the module cannot be imported, the factory failed or made no nn.Module.
    """
    structure = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
    }
    factory = MODELS[name].factory if name in MODELS else _foreign_factory(name)
    arguments = _arguments(name, factory, structure, options)
    # torch.manual_seed would also seed the CUDA generators, which nothing here puts back
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        if name in MODELS:
            return factory(**arguments)
        return _call(name, factory, arguments)


def source_hash(name: str) -> str:
    """What identifies a model's code in a stage key.

    `name/v1` with the version for a registered name, the package's version for a torchvision
    model, and for an import path the sha256 of the file that defines the factory. What that file
    imports in turn is not part of it.
    """
    if name in MODELS:
        return f"{name}/v{MODELS[name].version}"
    if (model := _torchvision_name(name)) is not None:
        import torchvision

        return f"torchvision:{model}/{torchvision.__version__}"
    factory = _imported(name)
    while isinstance(factory, functools.partial):
        factory = factory.func
    file = getattr(sys.modules.get(factory.__module__), "__file__", None)
    if file is None:
        raise ValueError(f"model {name!r} has no source file, so its work could not be found again")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _foreign_factory(name: str) -> Callable[..., nn.Module]:
    model = _torchvision_name(name)
    return _imported(name) if model is None else _torchvision_factory(model)


def _call(name: str, factory: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """The foreign network; whatever goes wrong in it is one ValueError that shows the call."""
    shown = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        model = factory(**arguments)
    except Exception as error:
        raise ValueError(f"{shown} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{shown} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def _arguments(
    name: str,
    factory: Callable[..., nn.Module],
    structure: Mapping[str, int],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The part of `structure` that the factory takes, and the options, checked by name."""
    parameters = inspect.signature(factory).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name for p in parameters if p.kind in by_name}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for option in options:
        if option in structure:
            raise ValueError(
                f"{option} follows from the data; take it out of the options of {name}"
            )
        if option not in named and not takes_any:
            raise UnknownNameError(unknown(f"{name} option", option, named - structure.keys()))
    return {k: v for k, v in structure.items() if takes_any or k in named} | dict(options)


def is_import_path(name: str) -> bool:
    """Whether a name stands for code that is neither ours nor torchvision's."""
    return name not in MODELS and _torchvision_name(name) is None


def _torchvision_name(name: str) -> str | None:
    """The torchvision classifier that `name` means; None for another package's import path."""
    package, colon, model = name.rpartition(":")
    if colon and package not in ("torchvision", "torchvision.models"):
        return None
    from torchvision import models

    known = models.list_models(module=models)
    if model in known:
        return model
    if colon:
        raise UnknownNameError(unknown("torchvision model", model, known))
    close = (difflib.get_close_matches(name, known, n=1) or ["resnet18"])[0]
    raise UnknownNameError(
        f"{unknown('model', name, list(MODELS))}; "
        f"or a torchvision model such as 'torchvision:{close}', or 'package.module:factory'"
    )


def _torchvision_factory(model: str) -> Callable[..., nn.Module]:
    def build(num_classes: int, in_channels: int, image_size: int, **options: Any) -> nn.Module:
        from torchvision import models

        if model.startswith("vit_"):  # the only ones with a weight for each position
            options["image_size"] = image_size
        network = models.get_model(model, weights=None, num_classes=num_classes, **options)
        stem = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        if stem.in_channels != in_channels:
            stem.in_channels = in_channels
            stem.weight = nn.Parameter(
                stem.weight.new_empty(stem.out_channels, in_channels, *stem.kernel_size)
            )
            initialise(stem)
        return network

    return build


def _imported(name: str) -> Callable[..., nn.Module]:
    """The factory at `package.module:factory`."""
    module_name, _, path = name.partition(":")
    parts = module_name.split(".") + path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"model {name!r} is not of the form 'package.module:factory'")
    # The console script, unlike `python -m`, does not look in the current folder. At the end of
    # the path, so that no file there hides an installed package; for good, because the network
    # may import more when it is built.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"model {name!r}: no module {error.name!r} in the current folder or installed"
            ) from error
        raise ValueError(f"model {name!r}: {module_name} needs a module: {error}") from error
    except Exception as error:
        raise ValueError(
            f"model {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    try:
        factory = operator.attrgetter(path)(module)
    except AttributeError as error:
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module_name]
        raise UnknownNameError(unknown(f"factory of {module_name}", path, own)) from error
    if not callable(factory):
        raise ValueError(f"model {name!r} is a {type(factory).__name__}, which cannot be called")
    return factory
