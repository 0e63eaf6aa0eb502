from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteTree = Callable[..., Path]


@pytest.fixture
def write_tree(tmp_path: Path) -> WriteTree:
    """Writes noise images: `write_tree({"train/cat": 6, "test/cat": 3}, size=8) -> root`."""

    def write(
        folders: dict[str, int], *, size: int = 8, ending: str = "png", name: str = "images"
    ) -> Path:
        root = tmp_path / name
        random = np.random.default_rng(0)
        for folder, count in folders.items():
            (root / folder).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{i:03}.{ending}")
        return root

    return write
