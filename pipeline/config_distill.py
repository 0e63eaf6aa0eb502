"""How a rung learns from its teachers: which ones, by which losses, and how much they weigh."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from .config_section import Component, Fraction, NonNegative, Section


class ScheduledWeight(Section):
    """A weight that moves over a stage: `start` until `warmup`, then by cosine to `final`."""

    start: NonNegative
    final: NonNegative
    warmup: Fraction = 0.0  # of the stage


def _share(weight: ScheduledWeight) -> ScheduledWeight:
    if max(weight.start, weight.final) > 1:
        raise ValueError(f"must stay between 0 and 1, not go from {weight.start} to {weight.final}")
    return weight


# So that a mistake is told of one form only; such tags are left out of a mistake's path.
NUMBER, SCHEDULE = Tag("constr-number"), Tag("constr-schedule")


def _form_of_weight(value: Any) -> str:
    return (SCHEDULE if isinstance(value, dict | ScheduledWeight) else NUMBER).tag


AnyWeight = Annotated[
    Annotated[NonNegative, NUMBER] | Annotated[ScheduledWeight, SCHEDULE],
    Discriminator(_form_of_weight),
]
ShareWeight = Annotated[
    Annotated[Fraction, NUMBER] | Annotated[ScheduledWeight, AfterValidator(_share), SCHEDULE],
    Discriminator(_form_of_weight),
]


def constant(weight: float | ScheduledWeight) -> float | None:
    """The weight if it does not move, or None."""
    if isinstance(weight, float | int):
        return float(weight)
    return weight.start if weight.start == weight.final or weight.warmup >= 1 else None


def _list_of_layers(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"give a list, such as [{value}]")
    return tuple(value) if isinstance(value, list) else value


Layers = Annotated[tuple[str, ...], BeforeValidator(_list_of_layers)]


class FeatureConfig(Component):
    """A loss between inner layers of student and teacher, added to the others; with its options."""

    weight: AnyWeight = 1.0
    layers: Annotated[Layers, Field(min_length=1)]
    teacher_layers: Layers | None = None  # one for each; null: the same names

    @model_validator(mode="after")
    def _pairs(self) -> FeatureConfig:
        if self.teacher_layers is not None and len(self.teacher_layers) != len(self.layers):
            raise ValueError(
                f"give a teacher layer for each of the {len(self.layers)} layers, "
                f"not {len(self.teacher_layers)}"
            )
        pairs = list(zip(self.layers, self.teacher_layers or self.layers, strict=True))
        if len(set(pairs)) < len(pairs):
            raise ValueError("the same pair of layers is named twice")
        return self


def _one_or_several(value: Any) -> Any:
    """Names of teachers; one mistake where plain types would make one for each form."""
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError("give one name, or a list of names; the word none for no teacher")
    return names if isinstance(value, list | tuple) else value


class DistillConfig(BaseModel):
    """The teachers and the losses that follow them; further keys are options of the loss."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    # previous, fp32, dense (all rungs above), best (of them, by validation), none, or names of
    # rungs above; with several teachers each loss is the mean over them
    teacher: Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)] = "previous"
    # teachers left out of each batch, drawn anew (DGKD); a dense rung always keeps one
    drop: Annotated[int, Field(ge=0)] = 0
    loss: str = "kl"
    weight: ShareWeight = 0.5  # of the soft loss; the labels' cross-entropy gets the rest
    features: FeatureConfig | None = None
    teacher_precision: Literal["fp32", "bf16"] = "fp32"  # bf16: its weights and activations
    fold_batch_norm: bool = False  # of teachers, into their weights; the classes that flip are told
    # keep each teacher's logits of all training images, where these never vary (no augmentation)
    cache_teacher: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options of the loss."""
        return dict(self.model_extra or {})

    @property
    def follows(self) -> bool:
        """Whether a teacher has any weight at any time."""
        return self.follows_logits or self.follows_features

    @property
    def follows_logits(self) -> bool:
        """Whether its logits have."""
        return constant(self.weight) != 0

    @property
    def follows_features(self) -> bool:
        """Whether its inner layers have."""
        return self.features is not None and constant(self.features.weight) != 0
