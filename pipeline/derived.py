"""Stages made from a trained one: what they are follows from its key alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .spec import StageSpec

PACKED_FORMAT = 1  # of packed files; a higher one was written by a newer Bitladder
# raised when other bytes or numbers come of the same network
PACK_RECIPE = 3
EXPORT_RECIPE = 4
BENCH_RECIPE = 2
LOOK_RECIPE = 1
MOST_FLIPS = 0.002  # of the test split
# of the files of each format to ship, the main one first
SUFFIXES = {"packed": (".safetensors",), "onnx": (".onnx",), "openvino": (".xml", ".bin")}


def format_of(file: Path) -> str:
    """The format that a file's name says; packed for names that say nothing."""
    return {main: form for form, (main, *_) in SUFFIXES.items()}.get(file.suffix, "packed")


def pack_spec(trained: str) -> StageSpec:
    """The stage that packs a trained one, whose key is given."""
    return StageSpec(
        kind="pack",
        options={"format": PACKED_FORMAT, "recipe": PACK_RECIPE},
        parents={"network": trained},
    )


def look_spec(trained: str, teachers: Sequence[str]) -> StageSpec:
    """The stage that looks inside a trained one, whose key is given, and compares it with others.

    Args:
        teachers: their keys; see `teacher_keys`.
    """
    roles = ["teacher"] if len(teachers) == 1 else [f"teacher-{n}" for n in range(len(teachers))]
    return StageSpec(
        kind="look",
        options={"recipe": LOOK_RECIPE},
        parents={"network": trained, **dict(zip(roles, teachers, strict=True))},
    )


def teacher_keys(parents: Mapping[str, str]) -> list[str]:
    """The keys of those among a trained stage's parents that taught it, or could have."""
    roles = [role for role in parents if role.startswith(("teacher", "candidate"))]
    return [parents[role] for role in sorted(roles, key=lambda role: (len(role), role))]


def export_spec(
    packed: str,
    form: str,
    *,
    batch: int | None = None,
    narrow: bool = False,
    vnni: bool = False,
) -> StageSpec:
    """The stage that exports a packed network, whose key is given, to another format.

    Args:
        batch: of OpenVINO, for which binary layers run on bits.
        narrow: whether ONNX has codes of 4 and 2 bits in types of their own.
        vnni: whether OpenVINO's is for processors with VNNI instructions only.
    """
    return StageSpec(
        kind="export",
        options={
            "format": form,
            "batch": batch,
            "narrow": narrow,
            "vnni": vnni,
            "recipe": EXPORT_RECIPE,
        },
        parents={"packed": packed},
    )


def bench_spec(
    packed: str,
    machine: str,
    threads: int,
    batches: Sequence[int],
    *,
    versions: Mapping[str, str],
    repeat: int = 0,
) -> StageSpec:
    """The stage that times a packed network, whose key is given, on a machine of some name.

    Args:
        versions: of the runtimes, by name: another one is measured anew.
        repeat: how often it was measured before: what was noisy can be measured again.
    """
    return StageSpec(
        kind="bench",
        options={
            "machine": machine,
            "threads": threads,
            "batches": list(batches),
            "versions": dict(versions),
            "repeat": repeat,
            "recipe": BENCH_RECIPE,
        },
        parents={"packed": packed},
    )


def said_of_packed(metrics: Mapping[str, Any]) -> str:
    """A packed network for people: size, share of float32, accuracy."""
    return (
        f"{metrics['packed_bytes'] / 1e3:.1f} kB, {metrics['compression']:.1f} times smaller than "
        f"in float32, test {100 * metrics['deployed_top1']:.2f} %"
    )


def differs_too_much(metrics: Mapping[str, Any]) -> str | None:
    """What is wrong where a packed network classifies more images otherwise than it may."""
    return too_many_flips(
        "the packed network", metrics["flips"], metrics["test_images"], "the training network"
    )


def too_many_flips(what: str, flips: int, images: int, reference: str) -> str | None:
    """What to say where `flips` images of the test split are more than are allowed."""
    if flips <= MOST_FLIPS * images:
        return None
    return (
        f"{what} classifies {flips} of {images} test images otherwise than {reference}, "
        f"more than {100 * MOST_FLIPS:g} %"
    )
