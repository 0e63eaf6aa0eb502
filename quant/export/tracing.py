"""A canonical network as a graph of layers and plain functions."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..layers import QuantLayer
from .canonical import ChannelAffine


class CannotExport(ValueError):
    """A network that has something which a format cannot say; the message names it."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own layers, and those of a canonical network."""
        ours = isinstance(m, (QuantLayer, ChannelAffine))
        return ours or super().is_leaf_module(m, module_qualified_name)


def graph_of(model: nn.Module) -> fx.GraphModule:
    """The steps of a canonical network in order.

    Raises:
        CannotExport: what it does depends on the values or shapes of its inputs.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the network's own code raises on a stand-in
        raise CannotExport(
            f"{type(model).__name__} cannot be traced: {error}; its forward pass must do the same "
            "for every input"
        ) from error
    found: Any = fx.GraphModule(tracer.root, graph)
    return found
