"""ONNX files in QCDQ form: QuantizeLinear, Clip, DequantizeLinear, and codes of weights in int8.

The graph comes from torch.fx and its nodes are written here: a tracing exporter loses the Clip
without a word. Only standard operators, so any runtime reads the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..core import QTensor
from ..layers import QuantLayer
from ..swap import quant_layers
from .canonical import ChannelAffine
from .integer import Integers, as_integers
from .onnx_inputs import quantized_input
from .onnx_nodes import Nodes
from .onnx_operations import convert
from .thresholds import Staircase, staircase
from .tracing import CannotExport

OPSET, IR_VERSION = 21, 10  # what ONNX Runtime and OpenVINO of the last two years read
NARROW_OPSET, NARROW_IR_VERSION = 25, 13  # the first that have INT2
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
INT8 = (-128, 127)
NARROW = {(-2, 1): ml_dtypes.int2, (-8, 7): ml_dtypes.int4}
INT16_MAX = 2**15 - 1
NEEDS_VNNI = "openvino_needs", "VNNI"  # an entry of the file's metadata


@dataclass(frozen=True)
class BinaryLayer:
    """A convolution of two-level weights and two-level inputs, by names in the ONNX graph.

    Attributes:
        node: the convolution, with its bias where it has one.
        input: what its quantizer reads.
        threshold: (), or (C, 1, 1): the upper level from there on.
        levels: the lower and the upper one.
        signs: -1 and +1, int8, (O, I, h, w).
        scale: (O,), of the signs.
    """

    node: str
    input: str
    threshold: Tensor
    levels: tuple[float, float]
    signs: Tensor
    scale: Tensor
    strides: Sequence[int]
    padding: Sequence[int]
    dilations: Sequence[int]


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX model, and what its layers ask for.

    Attributes:
        binary: the convolutions that can run on bits.
        needs_vnni: whether sums of two products pass 16 bits. A processor without VNNI
            instructions saturates there, in runtimes that add whole numbers, such as OpenVINO.
            The file's metadata then has the entry `NEEDS_VNNI`.
    """

    model: onnx.ModelProto
    binary: tuple[BinaryLayer, ...]
    needs_vnni: bool


def onnx_qcdq(
    model: nn.Module,
    weights: Mapping[str, QTensor],
    image: Sequence[int],
    *,
    metadata: Mapping[str, str],
    in_int16: bool = False,
    narrow: bool = False,
) -> OnnxGraph:
    """A canonical network as an ONNX model: images (batch, C, H, W) to logits (batch, K).

    Args:
        weights: the coded weights by layer name.
        image: (C, H, W).
        metadata: for the file's metadata_props.
        in_int16: whether sums of two products stay within 16 bits, for processors without VNNI
            instructions. A layer whose sums could pass them is then two layers, with a part of
            the weight each; at 8 bits that doubles the work, below it none does.
        narrow: codes of weights as INT4 and INT2 where they fit: a smaller file, whose layers run
            in float32 (ONNX Runtime) or which is refused (OpenVINO).

    Raises:
        CannotExport: an operation or a quantizer that has no such form; it is named.
    """
    writer = _Writer(model, weights, in_int16, narrow)
    ShapeProp(writer.nodes.traced).propagate(torch.zeros(1, *image))
    result = writer.walk()
    nodes = writer.nodes
    nodes.node("Identity", [result], "logits")
    graph = helper.make_graph(
        nodes.nodes,
        "bitladder",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "classes"])],
        list(nodes.constants.values()),
    )
    found = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", NARROW_OPSET if narrow else OPSET)],
        ir_version=NARROW_IR_VERSION if narrow else IR_VERSION,
        producer_name="bitladder",
    )
    needs = dict([NEEDS_VNNI]) if writer.needs_vnni else {}
    helper.set_model_props(found, {**metadata, **needs})
    onnx.checker.check_model(found, full_check=True)
    return OnnxGraph(found, tuple(writer.binary), writer.needs_vnni)


class _Writer:
    """Layers with weights; everything else is `onnx_operations`."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, QTensor], in_int16: bool, narrow: bool
    ) -> None:
        layers = quant_layers(model)
        by_weight = {layers[name].latent: q for name, q in weights.items()}
        self.coded = {name: by_weight.get(layer.latent) for name, layer in layers.items()}
        self.in_int16, self.narrow = in_int16, narrow
        self.nodes = Nodes(model)
        self.binary: list[BinaryLayer] = []
        self.needs_vnni = False

    def walk(self) -> str:
        """Writes every step; the name of the network's output."""
        nodes, names = self.nodes, self.nodes.names
        affines = self._affines_behind_layers()
        behind = {affine: layer for layer, affine in affines.items()}
        for step in nodes.traced.graph.nodes:
            if step.op == "output":
                return nodes.input(step)
            if step.op == "placeholder":
                names[step] = "images"
            elif step in behind:
                names[step] = names[behind[step]]
            elif _plain(nodes.module(step)) is not None:
                names[step] = self._layer(step, nodes.module(affines.get(step)))
            else:
                names[step] = convert(nodes, step)
        raise CannotExport("the network gives nothing back")

    def _affines_behind_layers(self) -> dict[fx.Node, fx.Node]:
        """The affines that nothing but a layer called once comes before: it takes them over."""
        steps = self.nodes.traced.graph.nodes
        found = {}
        for step in steps:
            before: Any = step.args[0] if step.args else None
            if isinstance(self.nodes.module(step), ChannelAffine):
                layer = _plain(self.nodes.module(before))
                calls = [s for s in steps if s.op == "call_module" and s.target == before.target]
                if layer is not None and len(before.users) == len(calls) == 1:
                    found[before] = step
        return found

    def _layer(self, step: fx.Node, affine: Any) -> str:
        """A convolution or linear layer, quantized or not, with the affine behind it."""
        module: Any = self.nodes.module(step)
        layer, name = _plain(module), str(step.target)
        x = source = self.nodes.input(step)
        strides: Sequence[int] = getattr(layer, "stride", ())
        largest, stairs = 0, None
        if isinstance(module, QuantLayer) and module.input_quantizer is not None:
            if _skips_pixels(layer):
                # Of what is skipped nothing need be quantized. OpenVINO itself takes the pixels
                # from behind the quantizer, and then runs the layer in float32.
                ones = [1] * len(strides)
                kept = {"kernel_shape": ones, "strides": list(strides)}
                x, strides = self.nodes.node("MaxPool", [x], f"{step.name}.kept", **kept), ones
            try:
                stairs = staircase(module.input_quantizer)
            except ValueError as error:
                raise CannotExport(f"{name}: {error}") from None
            axis = module.input_quantizer.site.channel_axis
            x, largest = quantized_input(self.nodes, name, x, stairs, axis=axis)
        factor, bias = None, layer.bias
        if affine is not None:
            factor = affine.scale.double()
            own = 0.0 if bias is None else bias.double() * factor
            bias = (affine.shift.double() + own).float()
        q = self.coded.get(name)
        found = _scaled(as_integers(q), factor) if q is not None else None
        # Of a whole-number convolution that several steps read, such as the stem before the first
        # pre-activation block, OpenVINO (2026.4) adds another's output wrongly: in float32 it does
        # not, and its weights are the same values.
        in_codes = found if len(step.users) == 1 or affine is not None else None
        parts = self._weights(name, layer, factor, in_codes, largest)
        if len(parts) == 1:
            self._product(step.name, name, layer, x, parts[0], bias, strides)
        else:
            halves = [f"{step.name}.part{number}" for number in range(len(parts))]
            self._product(halves[0], name, layer, x, parts[0], bias, strides)
            self._product(halves[1], name, layer, x, parts[1], None, strides)
            self.nodes.node("Add", halves, step.name)
        if stairs is not None and found is not None:
            self._note_binary(step.name, layer, source, stairs, found)
        return step.name

    def _product(
        self,
        output: str,
        name: str,
        layer: Any,
        x: str,
        weight: str,
        bias: Tensor | None,
        strides: Sequence[int],
    ) -> None:
        """A convolution or linear layer of a weight that is there."""
        inputs = [x, weight]
        if bias is not None:
            inputs.append(self.nodes.constant(f"{name}.bias", bias))
        if isinstance(layer, nn.Linear):
            self.nodes.node("Gemm", inputs, output, transB=1)
            return
        if layer.padding_mode != "zeros":
            raise CannotExport(f"{name}: ONNX export has no {layer.padding_mode} padding")
        if isinstance(layer.padding, str):
            raise CannotExport(f"{name}: give the padding in pixels, not {layer.padding!r}")
        self.nodes.node(
            "Conv",
            inputs,
            output,
            kernel_shape=list(layer.kernel_size),
            strides=list(strides),
            pads=[*layer.padding, *layer.padding],
            dilations=list(layer.dilation),
            group=layer.groups,
        )

    def _weights(
        self,
        name: str,
        layer: Any,
        factor: Tensor | None,
        found: Integers | None,
        largest: int,
    ) -> list[str]:
        """Codes and their scale where int8 holds them, else the values; times the factor.

        Args:
            largest: code of the input, 0 where it has none.
        """
        whole = found.integers if found is not None else None
        if whole is None or not INT8[0] <= float(whole.amin()) <= float(whole.amax()) <= INT8[1]:
            weight = layer.weight.detach().double()
            if factor is not None:
                weight = weight * _rows(factor, weight)
            return [self.nodes.constant(f"{name}.weight", weight.float())]
        assert found is not None
        scale = found.unit.reshape(-1).float()
        axis = {"axis": 0} if len(scale) > 1 else {}
        steps = self.nodes.constant(f"{name}.scale", scale if axis else scale[0])
        parts = self._within_int16(name, whole, largest)
        written = []
        for number, part in enumerate(parts):
            suffix = str(number) if len(parts) > 1 else ""
            codes = self.nodes.constant(f"{name}.codes{suffix}", self._stored(part))
            weight = f"{name}.weight{suffix}"
            written.append(self.nodes.node("DequantizeLinear", [codes, steps], weight, **axis))
        return written

    def _stored(self, whole: Tensor) -> np.ndarray[Any, Any]:
        """Whole numbers in the type that holds them in the file."""
        low, high = float(whole.amin()), float(whole.amax())
        fitting = [kind for (least, most), kind in NARROW.items() if least <= low <= high <= most]
        array = whole.cpu().numpy()
        return array.astype(fitting[0] if self.narrow and fitting else np.int8)

    def _within_int16(self, name: str, whole: Tensor, largest: int) -> list[Tensor]:
        """A weight in one part or two whose products with inputs add up in pairs."""
        if largest == 0:
            return [whole]
        bound = INT16_MAX // (2 * largest)
        if float(whole.abs().amax()) <= bound:
            return [whole]
        if not self.in_int16:
            self.needs_vnni = True
            return [whole]
        first = whole.clamp(-bound, bound)
        if float((whole - first).abs().amax()) > bound:
            raise CannotExport(f"{name}: its sums do not fit into 16 bits, even in two parts")
        return [first, whole - first]

    def _note_binary(
        self, node: str, layer: Any, source: str, stairs: Staircase, weight: Integers
    ) -> None:
        """Writes down a layer that can run on bits alone."""
        if type(layer) is not nn.Conv2d or layer.groups > 1 or stairs.thresholds.shape[1] != 1:
            return
        if not bool((weight.integers.abs() == 1).all()):
            return
        threshold = stairs.thresholds.reshape(-1)
        low, high = stairs.levels.reshape(-1).tolist()
        padding: Any = layer.padding
        self.binary.append(
            BinaryLayer(
                node=node,
                input=source,
                threshold=threshold.view(-1, 1, 1) if len(threshold) > 1 else threshold[0],
                levels=(low, high),
                signs=weight.integers.to(torch.int8),
                scale=weight.unit.reshape(-1).expand(layer.out_channels).float(),
                strides=layer.stride,
                padding=padding,
                dilations=layer.dilation,
            )
        )


def _plain(module: nn.Module | None) -> Any:
    """The layer with weights that a step calls; None where it calls something else."""
    layer = module.layer if isinstance(module, QuantLayer) else module
    if isinstance(module, QuantLayer) and type(layer) not in LAYERS:
        raise CannotExport(f"ONNX export has no {type(layer).__name__}")
    return layer if type(layer) in LAYERS else None


def _skips_pixels(layer: Any) -> bool:
    """Whether it is a convolution of single pixels that does not read all of them."""
    if isinstance(layer, nn.Linear) or not any(stride > 1 for stride in layer.stride):
        return False
    return all(size == 1 for size in layer.kernel_size) and not any(layer.padding)


def _scaled(found: Integers | None, factor: Tensor | None) -> Integers | None:
    """Times a number for each output channel, whose sign goes to the integers."""
    if found is None or factor is None:
        return found
    sign = torch.where(factor < 0, -1.0, 1.0).double()
    rows = _rows(sign, found.integers)
    return Integers(found.integers * rows, found.unit * _rows(factor.abs(), found.integers))


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    return values.view([-1] + [1] * (weight.dim() - 1))
