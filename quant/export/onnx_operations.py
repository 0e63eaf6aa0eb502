"""Operations without quantizers as ONNX nodes, by torch's module or function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .canonical import ChannelAffine
from .onnx_nodes import Nodes
from .tracing import CannotExport

Convert = Callable[[Nodes, fx.Node, Any], str]  # the third is the module, None for a function


def convert(nodes: Nodes, step: fx.Node) -> str:
    """Writes a step of the traced network; the name of what it gives.

    Raises:
        CannotExport: it is not known here, or not with these arguments.
    """
    module = nodes.module(step)
    if step.op == "get_attr":
        return nodes.constant(str(step.target), nodes.parameter(step))
    if module is not None:
        known, what = MODULES.get(type(module)), type(module).__name__
    else:
        key = f".{step.target}" if step.op == "call_method" else step.target
        known, what = FUNCTIONS.get(key), getattr(step.target, "__name__", str(step.target))
    if known is None:
        raise CannotExport(f"{step.name}: ONNX export has no {what}")
    return known(nodes, step, module)


def _simple(kind: str, inputs: int = 1, **attributes: Any) -> Convert:
    def write(nodes: Nodes, step: fx.Node, _: Any) -> str:
        names = [nodes.input(step, position) for position in range(inputs)]
        return nodes.node(kind, names, step.name, **attributes)

    return write


def _same(nodes: Nodes, step: fx.Node, _: Any) -> str:
    """Nothing, in evaluation."""
    return nodes.input(step)


def _affine(nodes: Nodes, step: fx.Node, module: Any) -> str:
    """A scale and a shift that no layer took over."""
    scale = nodes.constant(f"{step.target}.scale", module.scale.view(-1, 1, 1))
    shift = nodes.constant(f"{step.target}.shift", module.shift.view(-1, 1, 1))
    product = nodes.node("Mul", [nodes.input(step), scale], f"{step.name}.scaled")
    return nodes.node("Add", [product, shift], step.name)


def _clip(nodes: Nodes, step: fx.Node, module: Any) -> str:
    """ReLU6 and its kind."""
    ends = [nodes.constant(f"clip_{v:g}", float(v)) for v in (module.min_val, module.max_val)]
    return nodes.node("Clip", [nodes.input(step), *ends], step.name)


def _prelu(nodes: Nodes, step: fx.Node, _: Any) -> str:
    """A slope of its own below zero, for each channel."""
    slope = nodes.parameter(step.args[1]).view(-1, 1, 1)
    beside = nodes.constant(f"{step.name}.slope", slope)
    return nodes.node("PRelu", [nodes.input(step), beside], step.name)


def _max_pool(nodes: Nodes, step: fx.Node, module: Any) -> str:
    return _pool(nodes, step, module, "MaxPool", dilations=_pair(module.dilation))


def _average_pool(nodes: Nodes, step: fx.Node, module: Any) -> str:
    counts = int(module.count_include_pad)
    return _pool(nodes, step, module, "AveragePool", count_include_pad=counts)


def _pool(nodes: Nodes, step: fx.Node, module: Any, kind: str, **attributes: Any) -> str:
    return nodes.node(
        kind,
        [nodes.input(step)],
        step.name,
        kernel_shape=_pair(module.kernel_size),
        strides=_pair(module.stride),
        pads=_pair(module.padding) * 2,
        ceil_mode=int(module.ceil_mode),
        **attributes,
    )


def _adaptive_pool(nodes: Nodes, step: fx.Node, module: Any) -> str:
    """The mean of the whole map, or of parts of it, by a matrix for each axis."""
    size = _pair(module.output_size if module is not None else step.args[1])
    if size == [1, 1]:
        return nodes.node("GlobalAveragePool", [nodes.input(step)], step.name)
    source: Any = step.args[0]
    given = list(source.meta["tensor_meta"].shape[2:])
    if given == size:
        return nodes.input(step)
    rows, columns = (_pooling(*pair) for pair in zip(given, size, strict=True))
    left = nodes.constant(f"{step.name}.rows", rows)
    right = nodes.constant(f"{step.name}.columns", columns.t())
    y = nodes.node("MatMul", [left, nodes.input(step)], f"{step.name}.high")
    return nodes.node("MatMul", [y, right], step.name)


def _mean(nodes: Nodes, step: fx.Node, _: Any) -> str:
    axes: Any = _argument(step, "dim", 1, None)
    keep = bool(_argument(step, "keepdim", 2, False))
    if axes is None:
        raise CannotExport(f"{step.name}: ONNX export has no mean over all axes")
    listed = [axes] if isinstance(axes, int) else list(axes)
    name = nodes.integers(f"axes_{'_'.join(map(str, listed))}", listed)
    return nodes.node("ReduceMean", [nodes.input(step), name], step.name, keepdims=int(keep))


def _flatten(nodes: Nodes, step: fx.Node, module: Any) -> str:
    """All axes from the second on in one."""
    ends = (_argument(step, "start_dim", 1, 0), _argument(step, "end_dim", 2, -1))
    if module is not None:
        ends = (module.start_dim, module.end_dim)
    if ends != (1, -1):
        raise CannotExport(f"{step.name}: ONNX export flattens from the second axis on only")
    return nodes.node("Flatten", [nodes.input(step)], step.name, axis=1)


def _view(nodes: Nodes, step: fx.Node, _: Any) -> str:
    """Another shape of a parameter."""
    source = step.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        raise CannotExport(f"{step.name}: ONNX export has no view of what is computed")
    shape: Any = step.args[1:]
    return nodes.constant(step.name, nodes.parameter(source).reshape(shape))


def _slice(nodes: Nodes, step: fx.Node, _: Any) -> str:
    """Steps along axes, as in x[:, :, ::2, ::2]."""
    parts = step.args[1]
    plain = isinstance(parts, tuple) and all(
        isinstance(part, slice) and part.start is None and part.stop is None for part in parts
    )
    if not plain:
        raise CannotExport(f"{step.name}: ONNX export has no index {parts}")
    steps = [part.step or 1 for part in parts]  # type: ignore[union-attr]
    count = len(steps)
    inputs = [
        nodes.integers(f"starts_{count}", [0] * count),
        nodes.integers(f"ends_{count}", [2**31 - 1] * count),
        nodes.integers(f"axes_{count}", list(range(count))),
        nodes.integers(f"{step.name}.steps", steps),
    ]
    return nodes.node("Slice", [nodes.input(step), *inputs], step.name)


def _pad(nodes: Nodes, step: fx.Node, _: Any) -> str:
    """Zeros around."""
    rest = (_argument(step, "mode", 2, "constant"), _argument(step, "value", 3, None) or 0)
    source: Any = step.args[0]
    axes = len(source.meta["tensor_meta"].shape)
    given: Any = _argument(step, "pad", 1, ())
    if rest != ("constant", 0):
        raise CannotExport(f"{step.name}: ONNX export pads with zeros only")
    counts = [int(v) for v in given] + [0] * (2 * axes - len(given))  # from the last axis on
    pads = nodes.integers(f"{step.name}.pads", [*counts[0::2][::-1], *counts[1::2][::-1]])
    return nodes.node("Pad", [nodes.input(step), pads], step.name)


def _concatenate(nodes: Nodes, step: fx.Node, _: Any) -> str:
    axis: Any = _argument(step, "dim", 1, 0)
    parts: Any = step.args[0]
    return nodes.node("Concat", [nodes.names[part] for part in parts], step.name, axis=axis)


def _argument(step: fx.Node, name: str, position: int, default: Any) -> Any:
    """An argument that may be given by name or by place."""
    if name in step.kwargs:
        return step.kwargs[name]
    return step.args[position] if len(step.args) > position else default


def _pooling(given: int, wanted: int) -> Tensor:
    """What adaptive average pooling does along one axis, (wanted, given)."""
    return F.adaptive_avg_pool1d(torch.eye(given).unsqueeze(0), wanted)[0].t()


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


MODULES: dict[type, Convert] = {
    ChannelAffine: _affine,
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Dropout2d: _same,
    nn.ReLU: _simple("Relu"),
    nn.ReLU6: _clip,
    nn.Hardtanh: _clip,
    nn.Hardswish: _simple("HardSwish"),
    nn.Hardsigmoid: _simple("HardSigmoid", alpha=1 / 6, beta=0.5),
    nn.Sigmoid: _simple("Sigmoid"),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _flatten,
}
FUNCTIONS: dict[Any, Convert] = {
    operator.add: _simple("Add", 2),
    operator.iadd: _simple("Add", 2),
    torch.add: _simple("Add", 2),
    operator.sub: _simple("Sub", 2),
    operator.mul: _simple("Mul", 2),
    operator.getitem: _slice,
    torch.flatten: _flatten,
    torch.cat: _concatenate,
    F.relu: _simple("Relu"),
    torch.relu: _simple("Relu"),
    F.prelu: _prelu,
    torch.prelu: _prelu,
    F.pad: _pad,
    F.adaptive_avg_pool2d: _adaptive_pool,
    ".flatten": _flatten,
    ".mean": _mean,
    ".view": _view,
    ".relu": _simple("Relu"),
}
