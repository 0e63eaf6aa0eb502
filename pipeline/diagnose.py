"""Where a network's numbers stop being numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_non_finite(model: nn.Module, x: Tensor | None) -> str:
    """Names the first parameter or layer output that is not finite, in words.

    Args:
        x: the images that gave the bad loss, (N, C, H, W), if they are still there.
    """
    if x is not None and not bool(x.isfinite().all()):
        return "the images themselves are not finite"
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the parameter {name} is not finite"
    if x is None:
        return "all parameters are finite"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"layer {found[0]} is the first whose output is not finite"
    return "all layers' outputs are finite: the loss itself overflows"
