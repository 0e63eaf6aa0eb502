"""Image files to uint8 pixels: one, or many at once with all errors in one message."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..cores import usable_cores
from .bundle import DataError

log = logging.getLogger(__name__)

OnError = Literal["fail", "skip"]
CHUNK = 64  # files a task of the pool
SECONDS_BETWEEN_LINES = 5.0
MODES = {1: "L", 3: "RGB"}


def open_image(file: str, channels: int) -> Image.Image:
    """The image, upright (EXIF orientation applied), as 8-bit grey (1) or RGB (3).

    The first frame of an animation; transparency is dropped; 16 bits are brought to 8.
    """
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        upright = Image.fromarray((np.asarray(upright) // 257).clip(0, 255).astype(np.uint8))
    elif upright.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert the file to 8 bits")
    elif upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert(MODES[channels])


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side scaled to `size`, antialiased, and its centre cut out."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    ratio = size / min(width, height)
    width, height = max(size, round(width * ratio)), max(size, round(height * ratio))
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def pixels_of(image: Image.Image) -> Tensor:
    """Its pixels: uint8, (H, W, C)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(-1) if pixels.dim() == 2 else pixels


def read_pixels(file: str, *, size: int, resize: bool, channels: int) -> Tensor:
    """The pixels of a file: uint8, (size, size, C).

    Raises:
        Exception: whatever PIL raises, or ValueError where the size differs and may not.
    """
    image = open_image(file, channels)
    if resize:
        image = fit(image, size)
    elif image.size != (size, size):
        raise ValueError(_differs(image.size, size))
    return pixels_of(image)


def check_header(file: str, *, size: int, resize: bool) -> None:
    """Raises what PIL raises unless the file begins like an image, of that size if it matters."""
    with Image.open(file) as image:
        if not resize and image.size != (size, size):
            raise ValueError(_differs(image.size, size))


def size_of_first(files: Sequence[str]) -> int:
    """Height and width of the first image that can be opened: it must be square."""
    for file in files:
        try:
            with Image.open(file) as image:
                width, height = image.size
        except Exception:  # PIL's plug-ins raise all kinds; the decoder will report the file
            continue
        if width != height:
            raise DataError(
                f"{file} is {width} x {height}, and a model wants square images: set "
                "data.image_size to scale and cut them"
            )
        return width
    raise DataError(f"none of the {len(files)} files can be opened as an image, e.g. {files[0]}")


def read_all(
    files: Sequence[str], *, size: int, resize: bool, channels: int, on_error: OnError
) -> tuple[Tensor, Tensor]:
    """Every file's pixels, uint8 (N, size, size, C), and which could be read, bool (N,)."""
    pixels = torch.zeros((len(files), size, size, channels), dtype=torch.uint8)

    def read(index: int) -> None:
        pixels[index] = read_pixels(files[index], size=size, resize=resize, channels=channels)

    return pixels, _for_each(files, read, "decoding", on_error)


def check_all(files: Sequence[str], *, size: int, resize: bool, on_error: OnError) -> Tensor:
    """Which files begin like images, bool (N,); nothing is decoded."""

    def check(index: int) -> None:
        check_header(files[index], size=size, resize=resize)

    return _for_each(files, check, "looking at", on_error)


def _for_each(
    files: Sequence[str], do: Callable[[int], None], doing: str, on_error: OnError
) -> Tensor:
    """Does it for every index, in threads; bool (N,): where it went well."""
    problems: dict[int, str] = {}

    def do_chunk(first: int) -> int:
        chunk = range(first, min(first + CHUNK, len(files)))
        for index in chunk:
            try:
                do(index)
            except Exception as error:  # PIL's plug-ins raise all kinds
                problems[index] = f"{files[index]}: {error or type(error).__name__}"
        return len(chunk)

    done, next_line = 0, time.monotonic() + SECONDS_BETWEEN_LINES
    pool = ThreadPoolExecutor(usable_cores())  # PIL lets go of the interpreter lock to decode
    try:
        for task in as_completed(pool.submit(do_chunk, i) for i in range(0, len(files), CHUNK)):
            done += task.result()
            if time.monotonic() > next_line:
                next_line += SECONDS_BETWEEN_LINES
                log.info("%s images: %s / %s", doing, f"{done:,}", f"{len(files):,}")
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the queue is dropped, not worked off

    if problems:
        _report([problems[index] for index in sorted(problems)], len(files), on_error)
    good = torch.ones(len(files), dtype=torch.bool)
    good[list(problems)] = False
    return good


def _report(problems: list[str], num_files: int, on_error: OnError) -> None:
    listed = "\n  ".join(problems[:10])
    more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
    text = f"{len(problems)} of {num_files} images cannot be used:\n  {listed}{more}"
    if on_error == "fail":
        raise DataError(f"{text}\nRepair or remove them, or set data.on_error: skip.")
    log.warning("%s\nThey are left out (data.on_error: skip).", text)


def _differs(found: tuple[int, int], size: int) -> str:
    width, height = found
    return (
        f"{width} x {height}, while the first image is {size} x {size}; set data.image_size to "
        "scale and cut all of them"
    )
