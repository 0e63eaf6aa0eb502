"""What a directory tree of images holds, by class and by purpose, without opening an image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from .bundle import DataError

EXTENSIONS = frozenset({"png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "gif", "ppm", "pgm"})
Part = Literal["all", "train", "validation", "test"]
PARTS: dict[str, Part] = {
    "train": "train",
    "test": "test",
    "val": "validation",
    "validation": "validation",
}


@dataclass(frozen=True)
class ImageListing:
    """The images below a folder, sorted by path.

    Attributes:
        root: the folder, resolved.
        paths: relative to it, with forward slashes.
        labels: indices into `classes`, one a path.
        parts: whose folder each image is in; "all" where the tree is not divided.
        classes: names of the class folders, sorted.
        content: hash of the sorted paths, sizes and times of change.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    parts: tuple[Part, ...]
    classes: tuple[str, ...]
    content: str

    def files(self) -> tuple[str, ...]:
        """Where the images are, to be opened."""
        return tuple(os.path.join(self.root, path) for path in self.paths)


@dataclass(frozen=True)
class _Image:
    path: str
    class_name: str
    part: Part
    num_bytes: int
    mtime_ns: int


def list_images(root: Path) -> ImageListing:
    """The images of `root/<class>/...`, or of `root/train/<class>/...`, `test`, `val`.

    A tree is divided if it has `train` and `test`, or nothing but such folders. Sub-folders
    inside a class are searched too; hidden files and those that are no images by their ending
    are passed over. Looked at once a process: `list_images_now` looks again.

    Raises:
        DataError: no folder, no images, a class without images, fewer than two classes, or
            parts that differ in their classes.
    """
    return _list_once(_checked_root(root))


def list_images_now(root: Path) -> ImageListing:
    """The same, looked up again."""
    forget_listings()
    return list_images(root)


def forget_listings() -> None:
    """Makes the next look at a folder a new one."""
    _list_once.cache_clear()


@cache
def _list_once(root: Path) -> ImageListing:
    try:
        images = sorted(_scan(root), key=lambda image: image.path)
    except OSError as error:
        raise DataError(f"{root} cannot be read ({error})") from error
    classes = tuple(sorted({image.class_name for image in images}))
    if len(classes) < 2:
        found = f"only one class, {classes[0]!r}" if classes else "no class folders"
        raise DataError(f"{root} has {found}. {_wanted(root)}")
    digest = hashlib.sha256()
    for image in images:
        line = f"{image.path}\0{image.num_bytes}\0{image.mtime_ns}\n"
        digest.update(os.fsencode(line))
    label_of = {name: label for label, name in enumerate(classes)}
    return ImageListing(
        root,
        paths=tuple(image.path for image in images),
        labels=tuple(label_of[image.class_name] for image in images),
        parts=tuple(image.part for image in images),
        classes=classes,
        content=digest.hexdigest(),
    )


def _checked_root(root: Path) -> Path:
    root = Path(root).expanduser().absolute()
    if root.is_file():
        raise DataError(f"{root} is a file, not a folder; if it is an archive, unpack it first")
    if not root.is_dir():
        raise DataError(f"{root} does not exist. {_wanted(root)}")
    return root


def _scan(root: Path) -> Iterator[_Image]:
    folders = _subfolders(root)
    names = set(folders)
    if {"train", "test"} <= names or ("train" in names and names <= PARTS.keys()):
        if {"val", "validation"} <= names:
            raise DataError(f"{root} has both val/ and validation/; keep one")
        yield from _scan_parts({name: folders[name] for name in folders if name in PARTS})
        return
    for name, folder in folders.items():
        yield from _scan_class(folder, name, f"{name}/", "all")


def _scan_parts(folders: dict[str, str]) -> Iterator[_Image]:
    classes = {name: _subfolders(folder) for name, folder in folders.items()}
    for name, found in classes.items():
        if found.keys() != classes["train"].keys():
            lacks = sorted(classes["train"].keys() - found.keys())
            more = sorted(found.keys() - classes["train"].keys())
            raise DataError(
                f"{folders['train']} and {folders[name]} differ in their classes: "
                f"{name}/ lacks {_some(lacks)} and alone has {_some(more)}"
            )
        for class_name, folder in found.items():
            yield from _scan_class(folder, class_name, f"{name}/{class_name}/", PARTS[name])


def _scan_class(folder: str, class_name: str, prefix: str, part: Part) -> Iterator[_Image]:
    empty = True
    for path, stat in _walk(folder, prefix, (os.path.realpath(folder),)):
        empty = False
        yield _Image(path, class_name, part, stat.st_size, stat.st_mtime_ns)
    if empty:
        raise DataError(
            f"{folder} holds no images ({', '.join(sorted(EXTENSIONS))}); remove the folder if it "
            "is no class"
        )


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, os.stat_result]]:
    """Relative path and size of every image below; links are followed, but not in circles."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in above:
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
            elif entry.name.rpartition(".")[2].lower() in EXTENSIONS:
                yield prefix + entry.name, entry.stat()


def _subfolders(folder: str | Path) -> dict[str, str]:
    """Path by name, sorted, of the folders that are not hidden."""
    with os.scandir(folder) as entries:
        found = {e.name: e.path for e in entries if e.is_dir() and not e.name.startswith(".")}
    found.pop("__MACOSX", None)  # what a Mac's zip leaves
    return dict(sorted(found.items()))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 10 else shown


def _wanted(root: Path) -> str:
    return (
        f"Set data.root to a folder with one folder a class ({root.name}/cat/*.png, "
        f"{root.name}/dog/*.png), or with train/ and test/ that hold such folders."
    )
