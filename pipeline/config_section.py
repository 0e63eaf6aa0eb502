"""What every part of a config is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values are not coerced, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def is_set(section: BaseModel, field: str) -> bool:
    """Whether a value differs from its default; a stored config spells every default out."""
    return bool(getattr(section, field) != type(section).model_fields[field].default)


class Component(BaseModel):
    """A named part and its options; the part's own signature says which options it takes."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """What the YAML says beyond the fields that every part of this kind has."""
        return dict(self.model_extra or {})
