"""The nodes and constants of an ONNX graph while it is written."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn

from .tracing import graph_of


class Nodes:
    """A traced network, and what has been written of it.

    Attributes:
        traced: the network.
        names: of the tensor that each step of it gives.
        nodes, constants: what was written, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.traced = graph_of(model)
        self.modules = dict(self.traced.named_modules())
        self.names: dict[fx.Node, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def module(self, step: Any) -> nn.Module | None:
        """What a step calls, where it calls a module."""
        called = isinstance(step, fx.Node) and step.op == "call_module"
        return self.modules.get(str(step.target)) if called else None

    def parameter(self, step: Any) -> Tensor:
        """The tensor of the network that a step reads."""
        found: Tensor = operator.attrgetter(str(step.target))(self.traced)
        return found

    def input(self, step: fx.Node, position: int = 0) -> str:
        """The name of an argument of a step: of a tensor, or of a number made one."""
        value: Any = step.args[position]
        if isinstance(value, fx.Node):
            return self.names[value]
        return self.constant(f"number_{value:g}", torch.tensor(float(value)))

    def node(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Writes an operation whose one output has its name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Tensor | np.ndarray[Any, Any] | float) -> str:
        """Writes a tensor, once under each name; a number is float32."""
        if name not in self.constants:
            if isinstance(value, Tensor):
                value = value.detach().cpu().numpy()
            array = np.asarray(value, np.float32) if isinstance(value, float) else value
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        """Writes int64 numbers: sizes, axes."""
        return self.constant(name, np.array(values, np.int64))
