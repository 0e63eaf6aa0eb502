"""Which part of a training step the time goes to, without a second version of the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..quant.swap import quantizers
from .optimizer import OptimizerPair
from .training_step import TrainingStep

TEACHER, FORWARD, LOSSES = "teacher", "student forward", "losses"
WEIGHTS, INPUTS = "weight quantizers", "input quantizers"
BACKWARD, OPTIMIZER, AFTER, REST = "backward", "optimizer", "after the step", "rest"
PARTS = (TEACHER, FORWARD, WEIGHTS, INPUTS, LOSSES, BACKWARD, OPTIMIZER, AFTER, REST)

_ITSELF = ""  # the watching: counts for nothing


class Stopwatch:
    """Gives every instant to one part, so that the parts add up to the whole.

    On CUDA a mark is an event in the stream, and the time between two is the device's, idle or not:
    it includes the wait for a host that is slow to launch.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []  # a part and the instant at which it begins

    def begin(self, part: str) -> None:
        """From here on the time is this part's; what was running goes on afterwards."""
        self._open.append(part)
        self._mark()

    def end(self) -> None:
        """The part that began last is over."""
        self._open.pop()
        self._mark()

    def turn_to(self, part: str) -> None:
        """The part that began last is over, and this one begins."""
        self._open[-1] = part
        self._mark()

    def read(self) -> dict[str, float]:
        """The seconds of each part since the last reading; empty parts are 0."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            if part != _ITSELF:
                seconds[part] += start.elapsed_time(stop) / 1e3 if self._cuda else stop - start
        self._marks.clear()
        return seconds

    def _mark(self) -> None:
        instant: Any
        if self._cuda:
            instant = torch.cuda.Event(enable_timing=True)
            instant.record()
        else:
            instant = time.perf_counter()
        self._marks.append((self._open[-1] if self._open else _ITSELF, instant))


@contextmanager
def watched(watch: Stopwatch, step: TrainingStep) -> Iterator[None]:
    """While open, a call of the step tells the watch which of its parts is running.

    To be called in eager mode. The backward pass of a quantizer counts as the quantizer's: the
    nodes of the graph between its output and its input are watched as they run.
    """
    learner = step.learner
    parts = [(TEACHER, teacher) for teacher in step.teachers.networks]
    parts += [(FORWARD, learner.student), (LOSSES, learner.objective)]
    with ExitStack() as stack:

        def hang(handle: Any) -> None:
            stack.callback(handle.remove)

        for part, module in parts:
            hang(module.register_forward_pre_hook(_beginning(watch, part)))
            hang(module.register_forward_hook(lambda *_: watch.end()))
        for name, quantizer in quantizers(learner.student).items():
            part = WEIGHTS if name.endswith("weight_quantizer") else INPUTS
            # not by a hook, for which an activation that the quantizer absorbed comes back
            quantizer.forward = _watching(watch, part, quantizer.forward)  # type: ignore[method-assign]
            stack.callback(delattr, quantizer, "forward")
        hang(learner.register_forward_hook(lambda *_: watch.turn_to(BACKWARD)))
        optimizer = step.optimizer
        for each in optimizer.parts if isinstance(optimizer, OptimizerPair) else (optimizer,):
            hang(each.register_step_pre_hook(lambda *_: watch.turn_to(OPTIMIZER)))
            hang(each.register_step_post_hook(lambda *_: watch.turn_to(AFTER)))
        yield


def _beginning(watch: Stopwatch, part: str) -> Any:
    return lambda *_: watch.begin(part)


def _watching(watch: Stopwatch, part: str, forward: Callable[..., Tensor]) -> Any:
    """A quantizer's forward pass with its part around it, and around its nodes in the backward."""

    def watching(x: Tensor) -> Tensor:
        watch.begin(part)
        output = forward(x)
        watch.turn_to(_ITSELF)
        for node in _nodes_between(output, x):
            node.register_prehook(lambda _: watch.begin(part))
            node.register_hook(lambda *_: watch.end())
        watch.end()
        return output

    return watching


def _nodes_between(output: Tensor, x: Tensor) -> list[Any]:
    """The nodes of the graph from a quantizer's output back to its input, without the input's.

    Accumulation into parameters is left out: that into the weights is the layer's own.
    """
    found: list[Any] = []
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node is x.grad_fn or node in found:
            continue
        if type(node).__name__ == "AccumulateGrad":
            continue
        found.append(node)
        waiting += [node for node, _ in node.next_functions]
    return found
