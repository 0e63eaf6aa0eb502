"""The machine a stage trains on: device, threads, memory, and what is recorded about them."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .cores import usable_cores
from .errors import ConfigError
from .source_commit import source_commit

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError([f"runtime.device: {wanted!r} is not usable here: {reason}"]) from None
    return device


def device_mistakes(wanted: str, devices: Sequence[int]) -> list[str]:
    """What this machine lacks, as `path: message` lines.

    Args:
        wanted: the device as configured.
        devices: for each rung on how many it is to be trained.
    """
    try:
        device = choose_device(wanted)
    except ConfigError as error:
        return error.errors
    several = [(rung, count) for rung, count in enumerate(devices) if count > 1]
    if several and device.type not in ("cpu", "cuda"):
        return [f"runtime.device: several devices are for cpu and cuda, not {wanted!r}"]
    if several and device.index is not None:
        return [
            f"runtime.device: {wanted!r} is one device, and ladder.{several[0][0]} is to be "
            f"trained on {several[0][1]}; give {device.type!r}"
        ]
    here = torch.cuda.device_count() if device.type == "cuda" else None
    return [
        f"ladder.{rung}.train.devices: {count} are wanted, and CUDA has {here} here"
        for rung, count in several
        if here is not None and count > here
    ]


def own_threads(processes: int) -> int:
    """How many threads each of some processes may have on this machine: its share of the cores."""
    return max(usable_cores() // processes, 1)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks rather than fault them in anew at every step.

    Activations of a step are freed and allocated again by the next one; by default glibc hands
    blocks that large back to the kernel each time. Elsewhere this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        return  # another C library


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know to repeat a number: hardware and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("bitladder", "torch", "torchvision", "numpy", "safetensors")
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "commit": source_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # the folders can be used without being installed
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()} x {os.cpu_count()}"
