"""Folding of batch norm into the layer before it, for networks that only run in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .layers import QUANTIZABLE, TRANSPOSED, QuantLayer, hooked
from .probing import Inputs, call, names_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def fold_batch_norm(
    model: nn.Module, example: Inputs, *, keep: Collection[str] = ()
) -> tuple[str, ...]:
    """Takes batch norms into the weights of the layers before them, in place: less work.

    A batch norm is folded where its input is what a convolution (a transposed one too) or a linear
    layer gives, nothing else reads that, and both run once; `nn.Identity` takes its place. All
    others stay: behind an addition, after a layer that runs twice or whose weight others read.
    Who reads what is seen by running the model on the example, operation by operation; in a
    branch that it does not take nothing is folded.

    Outputs are the same up to float32's rounding. But a quantizer behind a folded batch norm
    rounds the other way where a value lies on the edge between two codes.

    Args:
        model: in evaluation mode. Weights that are quantized must be baked (see `bake`): they are
            scaled as they are, and quantizing them again would give others. So a layer that has
            its weight quantizer is left alone.
        example: an input, (N, ...), or a mapping of keyword arguments; any few samples.
        keep: names of layers and blocks whose own output is wanted, and stays what it is.

    Returns:
        The names of the batch norms that were folded.

    Raises:
        ValueError: a part of the model is in training mode.
    """
    if training := [name for name, module in model.named_modules() if module.training]:
        which = f"layer {training[0]!r}" if training[0] else "the model"
        raise ValueError(f"{which} is in training mode; call model.eval() first")
    names = names_of(model)
    inside = {module.layer for module in names if isinstance(module, QuantLayer)}
    layers = [m for m in names if m not in inside and _takes_norm(m)]
    norms = [m for m in names if _is_plain_norm(m)]
    kept = [model.get_submodule(name) for name in keep]
    folded = []
    for layer, norm in _pairs(model, example, layers, norms, kept):
        _scale(_plain(layer), norm)
        for place in names[norm]:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        _neutralise(norm)
        folded.append(names[norm][0])
    return tuple(folded)


def _plain(layer: nn.Module) -> Any:
    """The convolution or linear layer inside."""
    return layer.layer if isinstance(layer, QuantLayer) else layer


def _takes_norm(module: nn.Module) -> bool:
    """Whether a layer uses its weight as it is: nothing computes it, nothing is hung on it."""
    if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
        return False
    layer = _plain(module)
    weight = layer._parameters.get("weight") if type(layer) in QUANTIZABLE else None
    if weight is None or weight.layout is not torch.strided:
        return False
    return not (hooked(module) or hooked(layer))


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics of its own and nothing else."""
    return type(module) in NORMS and module.running_mean is not None and not hooked(module)


class _Readers(TorchDispatchMode):
    """Notes which modules read some tensors, in every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.running: nn.Module | None = None
        self._readers: dict[int, set[nn.Module | None]] = {}
        self._watched: list[Tensor] = []  # kept, so that their memory is not given to others

    def watch(self, tensor: Tensor) -> None:
        """From now on; with all that shares its memory."""
        self._readers[_memory(tensor)] = set()
        self._watched.append(tensor)

    def only(self, tensor: Tensor, reader: nn.Module) -> bool:
        """Whether a module has read it and nothing else has."""
        return self._readers[_memory(tensor)] == {reader}

    def read(self, values: Any) -> None:
        """Notes a look at all tensors in `values`."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self._readers.get(_memory(value), set()).add(self.running)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.read((args, kwargs))
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """What tells a tensor's memory from that of others."""
    return tensor.untyped_storage()._cdata


def _pairs(
    model: nn.Module,
    example: Inputs,
    layers: list[nn.Module],
    norms: list[nn.Module],
    kept: list[nn.Module],
) -> list[tuple[nn.Module, nn.Module]]:
    """The layers whose output goes into a batch norm and nowhere else, each with that."""
    readers = _Readers()
    calls = dict.fromkeys([*layers, *norms], 0)
    outputs: dict[nn.Module, Tensor] = {}  # of layers
    inputs: dict[nn.Module, Tensor] = {}  # of batch norms

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        readers.running = module
        calls[module] += 1
        inputs[module] = args[0] if args else kwargs["input"]

    def leave(module: nn.Module, _: Any, output: Tensor) -> None:
        readers.running = None
        if module in weights:
            outputs[module] = output
            readers.watch(output)

    weights = {layer: [*_plain(layer).parameters(recurse=False)] for layer in layers}
    for weight in (weight for own in weights.values() for weight in own):
        readers.watch(weight)
    with ExitStack() as stack:
        for module in calls:
            stack.enter_context(_hook(module.register_forward_pre_hook, enter, with_kwargs=True))
            stack.enter_context(_hook(module.register_forward_hook, leave))
        for module in kept:
            look = module.register_forward_hook
            stack.enter_context(_hook(look, lambda _, __, output: readers.read(output)))
        with readers:
            result = call(model, example)
    readers.read(result)  # by whoever called the model
    if not all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves(result)):
        return []  # an object that may hold any of them
    takers = {id(inputs[norm]): norm for norm in norms if calls[norm] == 1}
    return [
        (layer, takers[id(output)])
        for layer, output in outputs.items()
        if calls[layer] == 1
        and id(output) in takers
        and readers.only(output, takers[id(output)])
        and all(readers.only(weight, layer) for weight in weights[layer])
        and _has_channels_second(_plain(layer), output)
    ]


def _has_channels_second(layer: Any, output: Tensor) -> bool:
    """Whether the channels of a layer stand where batch norm takes them: (N, C, *).

    Of (N, L, C) from a linear layer, or of (C, L) from a convolution without a batch, it takes
    another axis.
    """
    return output.dim() == (2 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2)


def _scale(layer: Any, norm: Any) -> None:
    """Gives a layer the weight and the bias with which it does what both did."""
    scale = torch.rsqrt(norm.running_var.float() + norm.eps)  # (O,)
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    shift = -norm.running_mean.float() * scale
    if layer.bias is not None:
        shift = shift + layer.bias.float() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.float()
    old = layer.weight
    weight = (old.float() * _along_outputs(layer, scale)).to(old.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(shift.to(old.dtype), requires_grad=old.requires_grad)


def _along_outputs(layer: Any, scale: Tensor) -> Tensor:
    """One number for each output channel, (O,), broadcastable to the layer's weight."""
    rest = [1] * (layer.weight.dim() - 2)
    if not isinstance(layer, TRANSPOSED):
        return scale.view(-1, 1, *rest)
    groups = scale.view(layer.groups, -1)  # (G, O / G), where the weight is (I, O / G, *kernel)
    rows = groups.repeat_interleave(layer.in_channels // layer.groups, 0)
    return rows.view(*rows.shape, *rest)


def _neutralise(norm: Any) -> None:
    """Makes a batch norm give its input, for code that calls it by a reference of its own."""
    norm.running_mean = torch.zeros_like(norm.running_mean)
    norm.running_var = torch.ones_like(norm.running_var)
    norm.eps = 0.0
    norm.weight = norm.bias = None


@contextmanager
def _hook(register: Callable[..., Any], hook: Any, **options: Any) -> Iterator[None]:
    handle = register(hook, **options)
    try:
        yield
    finally:
        handle.remove()
