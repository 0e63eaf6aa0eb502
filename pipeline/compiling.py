"""Running a stage's networks through torch.compile, where that pays and where it can be done."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.probing import Probe
from ..quant.stepping import Stepping
from .config import TrainConfig
from .full_batches import FullBatches
from .learner import Learner
from .teachers import Teachers

# Rungs of one method share their compiled code, so a ladder needs few variants of one forward
# pass; beyond the limit torch runs everything uncompiled and only a log line tells.
VARIANTS = 64
TRIALS_OF_GRAPHS = 3  # they are warmed up, recorded and replayed

# What the estimate rests on, for two cores with AVX-512; without it nothing is gained.
FLOPS_PER_THREAD = 1e11  # a second, float32 convolutions
SECONDS_PER_CALL = 2.5e-4  # of a layer, however small: eager calls forward and backward
GAIN = 0.15  # of the time of a step: 0.19 with ResNet-20, 0.05 under a teacher with ResNet-18
COMPILE_SECONDS = (4.0, 1.0)  # in all, and for each layer
MARGIN = 2.0  # how often the gain must outweigh the compilation


def compile_networks(learner: Learner, teachers: Teachers, x: Tensor) -> float:
    """Compiles the student and its teachers, tries them on a batch; the seconds that it took.

    Nothing but speed changes: the trial's gradients, batch statistics and random draws are
    undone. Teachers whose inner layers are looked at stay as they are. On a GPU they run as CUDA
    graphs: the many kernels of a small network take longer to launch than to run.

    Args:
        learner: in training mode.
        x: a full batch, (N, C, H, W).

    Raises:
        RuntimeError: it cannot be done here, and all is as before; the message is one line.
    """
    # it warns of a missing CUDA on every machine that has none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    allow_variants()
    began, student, networks = time.monotonic(), learner.student, teachers.networks
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    make = partial(FullBatches, size=len(x), graphs=x.is_cuda)
    try:
        with learner.on_trial(x.device):
            learner.fast = make(student)
            if learner.objective.features is None and teachers.cache is None:
                teachers.networks = [make(teacher) for teacher in networks]
            for _ in range(TRIALS_OF_GRAPHS if x.is_cuda else 1):
                begin_step(learner, x)
                if teachers.networks is not networks:
                    teachers(x, 0)
                with learner.autocast(x.device):
                    logits = learner.fast(x)
                # as in training: the compiled code depends on how the logits' gradient is stored
                F.cross_entropy(logits.float(), labels).backward()
                learner.zero_grad(set_to_none=True)
    except Exception as error:  # of many kinds, down to a missing compiler or Python header
        learner.fast, teachers.networks = None, networks
        cause = getattr(error, "inner_exception", error)
        reason = next((line for line in str(cause).splitlines() if line), type(cause).__name__)
        raise RuntimeError(f"torch.compile does not work here: {reason}") from error
    return time.monotonic() - began


def begin_step(learner: Learner, x: Tensor) -> None:
    """Lets CUDA graphs use the memory of the step before again; nothing on a CPU."""
    if learner.fast is not None and x.is_cuda:
        torch.compiler.cudagraph_mark_step_begin()


def allow_variants() -> None:
    """Lets torch keep the compiled code of all rungs."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)


def wants(
    train: TrainConfig, found: Probe, *, batch_size: int, steps: int, device: torch.device
) -> bool:
    """Whether a stage's networks are to be compiled, as far as its settings say.

    Args:
        batch_size: images of a step in one process.
    """
    if train.compile == "auto":
        return is_faster(device) and pays(found, batch_size=batch_size, steps=steps, device=device)
    return train.compile == "on"


def why_not(student: nn.Module) -> str | None:
    """Why a network should not be compiled; None where it may."""
    if Stepping(student).anneals:
        return "its gradients are annealed, which is other code at every step"
    return None


def is_faster(device: torch.device) -> bool:
    """Whether compiled steps gain at all: they took longer with AVX2 (docs/performance.md)."""
    return device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def pays(found: Probe, *, batch_size: int, steps: int, device: torch.device) -> bool:
    """Whether the steps of a stage are enough to win back the compilation.

    An estimate from the size of the network, not a measurement, so that it is the same each time.
    """
    layers = found.layers.values()
    if device.type == "cpu":
        flops = 6 * batch_size * sum(facts.macs for facts in layers)  # forward and backward
        step = flops / (FLOPS_PER_THREAD * torch.get_num_threads())
        step += SECONDS_PER_CALL * len(found.layers)
    else:
        step = 10 * SECONDS_PER_CALL * len(found.layers)  # bound by its many small calls
    fixed, each = COMPILE_SECONDS
    return steps * step * GAIN > MARGIN * (fixed + each * len(found.layers))
