"""What a packed file says of itself, and what of that cannot be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, JsonValue, ValidationError

from ..quant.core import Target
from .config_section import Positive, Section
from .derived import PACKED_FORMAT as FORMAT

Width = Annotated[int, Field(ge=1, le=16)]  # quantizers compute 2**bits before they look at it
Count = Annotated[int, Field(ge=1)]
# images are scaled to it before the network sees them: one of that size is 50 MB, of 10**9 no
# machine holds one
LARGEST_SIDE = 4096
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]


class PackedNetwork(Section):
    """What `build_model` needs, and what its code was."""

    name: str
    options: dict[str, JsonValue]
    num_classes: Count
    in_channels: Count
    image_size: Side
    source: str


class PackedQuantizer(Section):
    """A quantizer where it stands; layers refer to it by its place in the list."""

    target: Target
    quantizer: str
    version: int
    options: dict[str, JsonValue]
    bits: Width
    signed: bool
    channels: Count
    axis: Literal[1, -1]


class PackedCoding(Section):
    """How the codes of a weight become values."""

    bits: Width
    num_levels: int
    zero_point: FiniteFloat
    channel_axis: int | None = None


class PackedLayer(Section):
    """A quantized layer: places in the lists of quantizers and codings."""

    weight: int | None = None
    input: int | None = None
    codes: int | None = None


class PackedImages(Section):
    """What images the network takes, and what its classes are.

    Attributes:
        mean, std: per channel, of pixels in 0..1: (pixel - mean) / std.
    """

    mean: list[FiniteFloat]
    std: list[Positive]
    classes: list[str]


class Description(Section):
    """All of a packed file but its tensors.

    Attributes:
        made: by what and from what: stage key, teacher, checksums, versions, accuracies.
    """

    format: Count = FORMAT
    network: PackedNetwork
    images: PackedImages
    quantizers: list[PackedQuantizer]
    codings: list[PackedCoding]
    layers: dict[str, PackedLayer]
    made: dict[str, JsonValue]


def described(raw: Any) -> Description:
    """A description from the JSON in a file.

    Raises:
        ValueError: it is not one, or its parts contradict each other.
    """
    known = isinstance(raw, dict) and isinstance(raw.get("format"), int)
    if known and raw["format"] > FORMAT:
        raise ValueError(
            f"written by a newer Bitladder (format {raw['format']}, this one reads {FORMAT}): "
            "upgrade Bitladder"
        )
    try:
        found = Description.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"its description is damaged: {where}: {first['msg']}") from None
    network, images = found.network, found.images
    for name, values, count, of in (
        ("mean", images.mean, network.in_channels, "channels"),
        ("std", images.std, network.in_channels, "channels"),
        ("classes", images.classes, network.num_classes, "classes"),
    ):
        if len(values) != count:
            raise ValueError(
                f"its description is damaged: images.{name} has {len(values)} entries, and the "
                f"network {count} {of}"
            )
    return found
