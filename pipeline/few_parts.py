"""A bound on what a network may be built of, where what says so is not to be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def few_parts(most: int) -> Iterator[None]:
    """Within, a network gets no more parameters than so many, those in common counted each time.

    Options such as a number of blocks can ask for more layers than anybody waits for, on the meta
    device too, and which options do that only the network's own code knows: so it is stopped.

    Raises:
        ValueError: from within the code that builds it.
    """
    mine, count = get_ident(), 0

    def count_one(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += get_ident() == mine  # the hook is called in all threads
        if count > most:
            raise ValueError(
                f"it has more than {most} parameters, and its file holds fewer tensors"
            )

    hook = register_module_parameter_registration_hook(count_one)
    try:
        yield
    finally:
        hook.remove()
