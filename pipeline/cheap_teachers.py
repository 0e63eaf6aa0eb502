"""Teachers made cheaper at a stage's start, and what that changes of what they say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quant.absorb import absorb_relus
from ..quant.fold import fold_batch_norm
from .config_distill import DistillConfig
from .data import DataBundle
from .fit import EVALUATION_BATCH
from .teacher_cache import CachedLogits, logits_of
from .teachers import Teachers


@dataclass(frozen=True)
class Cheapened:
    """What was done to one teacher.

    Attributes:
        folded: batch norms that its weights took in, of so many `norms`.
        bf16: whether it computes in bfloat16.
        flips: the share of the validation images that it puts into another class than before.
        images: how many these are.
    """

    folded: int
    norms: int
    bf16: bool
    flips: float
    images: int

    def __str__(self) -> str:
        done = f"{self.folded} of {self.norms} batch norms folded"
        done += ", in bfloat16" if self.bf16 else ""
        told = f"{100 * self.flips:.2f} % of {self.images} validation images change class"
        return f"{done}; {told}"


def ready_teachers(
    networks: Sequence[nn.Module],
    distill: DistillConfig,
    data: DataBundle,
    *,
    augment: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> tuple[Teachers, tuple[Cheapened, ...]]:
    """A stage's teachers as its config wants them, and what was done to each; none as they are.

    All is a function of the networks, the data and the settings: a resumed stage does it anew.

    Args:
        networks: in eval mode, baked, on the device; they are changed in place.
        augment: whether training images are augmented where the data set does that.
        batch_size: of training; seed: of the order of its images.

    Raises:
        ValueError: logits are to be kept of images that vary, or a network does not run in
            bfloat16.
    """
    if networks and distill.cache_teacher and augment and data.train.varies:
        raise ValueError(
            "cache_teacher needs the same images in each epoch, and the data set augments them; "
            "give train.augment: false, or take cache_teacher out"
        )
    changed = []
    dtype = torch.bfloat16 if distill.teacher_precision == "bf16" else torch.float32
    if networks and (distill.fold_batch_norm or dtype != torch.float32):
        kept = _tapped_layers(distill)
        changed = [
            _cheapen(network, data, fold=distill.fold_batch_norm, dtype=dtype, keep=kept, on=device)
            for network in networks
        ]
    for network in networks:
        absorb_relus(network)
    if not (networks and distill.cache_teacher):
        return Teachers(networks, dtype=dtype), tuple(changed)
    tables = [
        logits_of(network, data.train.evaluation_batches(EVALUATION_BATCH, device), dtype)
        for network in networks
    ]
    cache = CachedLogits(tables, data.train, batch_size=batch_size, seed=seed)
    return Teachers((), cache=cache), tuple(changed)


def _tapped_layers(distill: DistillConfig) -> tuple[str, ...]:
    """The layers whose outputs feature losses look at."""
    if distill.features is None or not distill.follows_features:
        return ()
    return distill.features.teacher_layers or distill.features.layers


def _cheapen(
    network: nn.Module,
    data: DataBundle,
    *,
    fold: bool,
    dtype: torch.dtype,
    keep: Collection[str],
    on: torch.device,
) -> Cheapened:
    before, norms = _classes(network, data, torch.float32, on), _norms(network)
    folded: tuple[str, ...] = ()
    if fold:
        example, _ = next(iter(data.validation.evaluation_batches(2, on)))
        folded = fold_batch_norm(network, example, keep=keep)
    if dtype == torch.bfloat16:
        to_bfloat16(network)
    try:
        after = _classes(network, data, dtype, on)
    except RuntimeError as error:
        if dtype == torch.float32 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"the teacher does not run in bfloat16 ({error}); give teacher_precision: fp32"
        ) from None
    flips = float((before != after).double().mean())
    return Cheapened(len(folded), len(norms), dtype == torch.bfloat16, flips, len(before))


def _classes(
    network: nn.Module, data: DataBundle, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The class that a network puts each validation image in, (M,)."""
    batches = data.validation.evaluation_batches(EVALUATION_BATCH, device)
    return logits_of(network, batches, dtype).argmax(1)


def _norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def to_bfloat16(network: nn.Module) -> nn.Module:
    """Weights in bfloat16, in place; scales of quantizers and batch norm stay in float32.

    Both take inputs of either type, and a variance of 8 bits would move every channel.
    """
    held = [(norm, deepcopy(norm.state_dict())) for norm in _norms(network)]
    network.to(torch.bfloat16)
    for norm, state in held:
        norm.float().load_state_dict(state)
    return network
