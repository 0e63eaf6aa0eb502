"""One stage on several devices: a process for each, which train on parts of the same batches.

Weights are the same in all processes after every step, as each applies the same gradients. Batch
norm counts the process' own part of a batch; its running statistics are those of the first one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..quant import world
from .data.order import Share
from .learner import Learner

# Processes wait while the first one evaluates; one that dies is seen by who started it.
PATIENCE = timedelta(days=1)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the processes that the elastic launcher started, until `first_goes_on` or the end."""
    if sys.platform == "linux":  # all are on this machine, whatever its name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def first_goes_on() -> bool:
    """Ends the work in common: whether this process is to finish the stage, alone."""
    if world.size() == 1:
        return True
    first = world.rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    return first


def own_share() -> Share:
    """Which part of each training batch this process has."""
    return Share(world.rank(), world.size())


def synchronised(learner: Learner, x: Tensor) -> nn.Module:
    """The learner in the wrapper that averages its gradients over all processes.

    To be made anew when parameters have been frozen: it waits for the gradient of each.

    Args:
        x: this process' part of a batch, (N, C, H, W), on which a pass shows whether there are
            parameters without a gradient, which cost a search in every step.
    """
    followers = (("tracker", learner.tracker), ("averaging", learner.averaging))
    own = {
        f"{name}.{buffer}"
        for name, module in followers
        if module is not None
        for buffer, _ in module.named_buffers()
    }
    # functions of the weights, so the same everywhere already
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, own)
    search = torch.tensor(float(_leaves_some_out(learner, x)))
    return DistributedDataParallel(learner, find_unused_parameters=bool(world.summed(search) > 0))


def _leaves_some_out(learner: Learner, x: Tensor) -> bool:
    """Whether some parameter may go without a gradient in some step."""
    if any(parameter.requires_grad for parameter in learner.objective.parameters()):
        return True  # projections for a teacher that is dropped, or a weight that is 0 at times
    student = learner.student
    with learner.on_trial(x.device):
        with learner.autocast(x.device):
            logits = student(x)
        logits.float().sum().backward()
        return any(p.requires_grad and p.grad is None for p in student.parameters())


def draw_differently() -> None:
    """Lets each process draw its own numbers, as for dropout, from here on."""
    if world.rank():
        torch.manual_seed(torch.initial_seed() + world.rank())


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators, of every process where there are several."""
    if world.size() == 1:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"rng": torch.get_rng_state(), "cuda_rng": cuda}
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "rng": world.gathered(torch.get_rng_state()),
        "cuda_rng": [] if own is None else world.gathered(own),
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Takes up what `random_states` gave."""
    rng, cuda = states["rng"], states["cuda_rng"]
    if isinstance(rng, list):
        torch.set_rng_state(rng[world.rank()].cpu())
        if cuda and device.type == "cuda":
            torch.cuda.set_rng_state(cuda[world.rank()].cpu(), device)
        return
    torch.set_rng_state(rng.cpu())
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in cuda])
