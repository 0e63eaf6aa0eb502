"""OpenVINO models: the QCDQ graph, and binary layers on bits (xnor and popcount)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset1 as ops
from openvino.utils import replace_node

from .onnx_qdq import NEEDS_VNNI, BinaryLayer, OnnxGraph


@cache
def the_core() -> ov.Core:
    """OpenVINO's core, the only one of this process, and never given up.

    Its CPU plugin puts the thread on a signal stack of its own and takes that down with the core.
    Of two cores that end in the order in which they began, the second gives the thread the freed
    stack of the first, and the next signal, a Ctrl-C for one, is a segmentation fault (2026.4).
    """
    return ov.Core()


def needs_vnni(model: ov.Model) -> bool:
    """Whether a model, from an ONNX or an OpenVINO file, is right with VNNI instructions only."""
    key, value = NEEDS_VNNI
    path = ["framework", key]  # where OpenVINO puts the metadata of ONNX files
    return bool(model.has_rt_info(path)) and model.get_rt_info(path).astype(str) == value


@cache
def adds_in_int32() -> bool:
    """Whether OpenVINO adds products of 8-bit numbers rightly on this processor.

    It does with VNNI instructions, or what other makers have in their place. Without, it adds two
    products in 16 bits first, and gives back 2 * 32767 of the 4 * 255 * 127 that are asked here.
    """
    x = ops.parameter([1, 4, 1, 1], np.float32)
    ends = [ops.constant(np.float32(end)) for end in (0, 255, 0, 255)]
    codes = ops.convert(ops.constant(np.full((8, 4, 1, 1), 127, np.int8)), "f32")
    weight = ops.multiply(codes, ops.constant(np.float32(1)))
    y = ops.convolution(ops.fake_quantize(x, *ends, 256), weight, [1, 1], [0, 0], [0, 0], [1, 1])
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = the_core().compile_model(ov.Model([y], [x]), "CPU", hints)
    sums = compiled(np.full((1, 4, 1, 1), 255, np.float32))[0]
    return bool((sums == 4 * 255 * 127).all())


def openvino_model(graph: OnnxGraph, *, batch: int | None = None) -> ov.Model:
    """The network as an OpenVINO model.

    Args:
        graph: from `onnx_qcdq`; where it needs VNNI instructions, so does the model.
        batch: images at a time. With it the binary layers run on bits, which takes a fixed
            batch; without, they run in float and any batch goes.
    """
    model = the_core().read_model(graph.model.SerializeToString())
    if batch is not None:
        image = model.input(0).get_partial_shape()
        model.reshape(ov.PartialShape([batch, *list(image)[1:]]))
        outputs = {
            name: out for op in model.get_ops() for out in op.outputs() for name in out.names
        }
        for layer in filter(_can_run_on_bits, graph.binary):
            _run_on_bits(outputs[layer.node], outputs[layer.input], layer)
        model.validate_nodes_and_infer_types()
    return model


def _can_run_on_bits(layer: BinaryLayer) -> bool:
    """Whether OpenVINO is right about it: it reads the weights of each pixel from whole bytes.

    With input channels that are no multiple of 8 its sums are wrong without a word (2026.4).
    """
    low, high = layer.levels
    return layer.signs.shape[1] % 8 == 0 and low in (-high, 0.0)


def _run_on_bits(product: Any, source: Any, layer: BinaryLayer) -> None:
    """Puts a binary convolution in the place of a float one.

    Both inputs are read as -1 and +1. Inputs of levels -s and +s are padded with 0, those of 0
    and s with -1, which stands for 0; what their offset comes to is a constant behind.
    """
    low, high = layer.levels
    conv = _convolution(product)
    # upper from the threshold on, itself included; FakeQuantize has it strictly above
    below = layer.threshold.nextafter(torch.full_like(layer.threshold, -torch.inf)).numpy()
    edge = ops.constant(below if below.ndim == 0 else below[None])
    zero, one = ops.constant(np.float32(0)), ops.constant(np.float32(1))
    bits = ops.fake_quantize(source, edge, edge, zero, one, 2)
    counted = ops.binary_convolution(
        bits,
        _bits_of(layer.signs.numpy() > 0),
        list(layer.strides),
        list(layer.padding),
        list(layer.padding),
        list(layer.dilations),
        "xnor-popcount",
        0.0 if low else -1.0,
    )
    step = high if low else high / 2
    factor = (layer.scale.double() * step).float().numpy()
    y = ops.multiply(counted, ops.constant(factor[None, :, None, None]))
    if not low:
        sums = layer.signs.double().sum((1, 2, 3)) * layer.scale.double() * step
        y = ops.add(y, ops.constant(sums.float().numpy()[None, :, None, None]))
    replace_node(conv, y)


def _convolution(product: Any) -> Any:
    """The convolution behind a name, which may be that of the addition of its bias."""
    node = product.get_node()
    if node.get_type_name() == "Convolution":
        return node
    return node.input_value(0).get_node()


def _bits_of(values: np.ndarray[Any, Any]) -> Any:
    """A constant of type u1, the lowest bit first."""
    packed = np.packbits(values.reshape(-1), bitorder="little")
    return ov.op.Constant(ov.Tensor(packed, ov.Shape(list(values.shape)), ov.Type.u1), False)
