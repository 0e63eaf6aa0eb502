"""What `train.precision: auto` comes to, by machine and width."""

from __future__ import annotations

from .config import RunConfig, StageConfig
from .errors import ConfigError

# the narrowest rungs that the study `precision` found to lose nothing of note (docs/studies.md)
NARROWEST_IN_BF16 = 4


def settle_precision(run: RunConfig) -> RunConfig:
    """The config with bf16 or fp32 in place of every `auto`, so that a plan and its keys say which.

    bf16 where the device multiplies in it by itself and no half of the rung is narrower than
    `NARROWEST_IN_BF16`; fp32 elsewhere.
    """
    auto = run.auto
    stages = [*run.ladder, *(auto.rungs.values() if auto is not None else ())]
    if all(stage.train.precision != "auto" for stage in stages):
        return run
    fast = _bf16_is_fast(run.runtime.device)
    update: dict[str, object] = {"ladder": tuple(_settled(stage, fast) for stage in run.ladder)}
    if auto is not None:
        rungs = {name: _settled(stage, fast) for name, stage in auto.rungs.items()}
        update["auto"] = auto.model_copy(update={"rungs": rungs})
    return run.model_copy(update=update)


def _settled(stage: StageConfig, fast: bool) -> StageConfig:
    if stage.train.precision != "auto":
        return stage
    wide = min(stage.weight_bits, stage.activation_bits) >= NARROWEST_IN_BF16
    train = stage.train.model_copy(update={"precision": "bf16" if fast and wide else "fp32"})
    return stage.model_copy(update={"train": train})


def _bf16_is_fast(wanted: str) -> bool:
    """Whether the device has instructions of its own for bfloat16."""
    import torch

    from .machine import choose_device

    try:
        device = choose_device(wanted)
    except ConfigError:
        return False  # said where the ladder is begun
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
