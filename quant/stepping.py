"""What quantizers do around each step of the optimizer, beside their forward pass."""

from __future__ import annotations

import torch
from torch import nn

from .core import Quantizer
from .swap import quantizers, weight_layers


class Stepping:
    """Calls `Quantizer.at_progress` before and `Quantizer.after_step` after each step.

    Which quantizers of the model define them is looked up once: where none does, both calls are
    free.
    """

    def __init__(self, model: nn.Module) -> None:
        self._annealed = [q for q in quantizers(model).values() if _defines(q, "at_progress")]
        self._mended = [
            (layer, layer.weight_quantizer)
            for layer in weight_layers(model).values()
            if layer.weight_quantizer is not None and _defines(layer.weight_quantizer, "after_step")
        ]

    @property
    def anneals(self) -> bool:
        """Whether some gradient changes with the progress of the stage."""
        return bool(self._annealed)

    def before(self, progress: float) -> None:
        """To be called before the forward pass.

        Args:
            progress: fraction of the stage done, 0 .. 1.
        """
        for quantizer in self._annealed:
            quantizer.at_progress(progress)

    @torch.no_grad()
    def after(self) -> None:
        """To be called after the optimizer's step."""
        for layer, quantizer in self._mended:
            quantizer.after_step(layer.weight)


def _defines(quantizer: Quantizer, name: str) -> bool:
    return getattr(type(quantizer), name) is not getattr(Quantizer, name)
