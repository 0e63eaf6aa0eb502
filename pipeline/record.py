"""What a finished stage leaves behind, as `stage.json` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import StoreError
from .files import TornFileError, read_json
from .spec import StageSpec

FORMAT = 1  # of stage.json; a higher one was written by a newer Bitladder
MANIFEST = "stage.json"
MODEL = "model.safetensors"
METRICS = "metrics.jsonl"
PROJECTIONS = "projections.safetensors"  # what feature losses learned
PACKED = "packed.safetensors"  # the file to ship
SPEEDS = "bench.json"
LOOK = "look.json"
CHECKPOINT = "last.pt"


@dataclass(frozen=True)
class StageRecord:
    """A committed stage.

    Attributes:
        key: of the spec, and the folder's name.
        spec: what was to be done.
        parents: role -> {"key", "sha256" of the parent's model}.
        files: name -> {"sha256", "bytes"}.
        network: what rebuilds the network before its weights are loaded.
        metrics: the results table's columns, and per-layer facts under "layers".
        environment: hardware and versions.
    """

    key: str
    spec: StageSpec
    parents: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Mapping[str, Any]]
    network: Mapping[str, Any]
    metrics: Mapping[str, Any]
    environment: Mapping[str, Any]
    created: str

    @property
    def sha256(self) -> str:
        """Of the weights; stages without any have the hash of their first file."""
        name = MODEL if MODEL in self.files else min(self.files)
        return str(self.files[name]["sha256"])

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"format": FORMAT, **asdict(self), "spec": self.spec.as_dict()}


def read_record(folder: Path) -> StageRecord:
    """The record in a stage's folder; checks its form, not the files that it names.

    Raises:
        TornFileError: `stage.json` is missing or damaged.
        StoreError: it was written by a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise TornFileError(f"{path} is missing")
    raw = read_json(path)
    if isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
        raise StoreError(
            f"{path} was written by a newer Bitladder (format {raw['format']}, this one reads "
            f"{FORMAT}): upgrade Bitladder, or give another --store"
        )
    try:
        fields = {k: raw[k] for k in StageRecord.__dataclass_fields__}
        return StageRecord(**{**fields, "spec": StageSpec.from_dict(raw["spec"])})
    except (KeyError, TypeError) as error:
        raise TornFileError(f"{path} lacks {error}") from None
