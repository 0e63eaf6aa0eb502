"""Which module's code reads which parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# take a parameter for its type and device alone
_LOOKS = frozenset(
    {"type_as", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
    | {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
)

Users = dict[nn.Parameter, dict[nn.Module, None]]  # parameter -> modules, in order of first use


@contextmanager
def watch_parameters(model: nn.Module) -> Iterator[Users]:
    """Fills in, while open, the modules whose own forward computes with each parameter.

    A convolution's weight is read by the convolution; the output weight of attention, which goes
    into a function, by the attention; a parameter of a module whose `forward` is called without
    the module's `__call__`, by the caller.
    """
    users: Users = {}
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        while running and running.pop() is not module:  # what an error left behind
            pass

    def note(parameter: nn.Parameter) -> None:
        users.setdefault(parameter, {})[running[-1] if running else model] = None

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))
    try:
        with _Calls(note):
            yield users
    finally:
        for hook in hooks:
            hook.remove()


class _Calls(TorchFunctionMode):
    """Tells of every parameter that a torch function makes tensors of."""

    def __init__(self, note: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # `weight.dtype` and `weight.size()` come by here too, and give no tensor
        made = next(_tensors([result]), None)
        if made is not None and getattr(func, "__name__", "") not in _LOOKS:
            for tensor in _tensors([*args, *kwargs.values()]):
                if isinstance(tensor, nn.Parameter):
                    self.note(tensor)
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
