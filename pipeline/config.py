"""A ladder's settings: what the YAML file may say, and what it means when it says nothing.

Every value type here is frozen. Defaults stand above the ladder; a rung says only what differs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)


def _known_width(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"there is no width {bits}; widths are 1 to 8, 16, and 32 for none")
    return bits


Width = Annotated[int, AfterValidator(_known_width)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values are not coerced, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _is_set(section: Section, field: str) -> bool:
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


class DataConfig(Component):
    """A data set by name; `batch_size` is the training batch."""

    name: str = "digits"
    batch_size: PositiveInt = 128


class ModelConfig(Component):
    """A network by registered name, torchvision name, or `package.module:factory`."""

    name: str = "preact_resnet8"
    weights: str | None = None  # an FP32 state dict that the ladder starts from
    key_map: Literal["none", "pytorchcv"] | dict[str, str] = "none"


class RuleConfig(Section):
    """Other widths or methods for the layers of a name or a kind; the last rule that fits wins."""

    match: str | None = None  # glob over layer names; None: any
    kind: str | None = None  # Linear, Conv2d, depthwise, pointwise, transposed, ...; None: any
    weight_bits: Width | None = None
    activation_bits: Width | None = None
    weight: Component | None = None
    activation: Component | None = None

    @model_validator(mode="after")
    def _says_for_which(self) -> RuleConfig:
        if self.match is None and self.kind is None:
            raise ValueError("give match, a glob of layer names ('*' for all), or kind, or both")
        given = (self.weight_bits, self.activation_bits, self.weight, self.activation)
        if all(value is None for value in given):
            raise ValueError(
                "sets nothing; give weight_bits, activation_bits, weight or activation"
            )
        return self


class PolicyConfig(Section):
    """Which layers are quantized, at which width."""

    first_last_bits: Width = 8  # of weights and inputs; 32: full precision
    first_last_weight_bits: Width | None = None  # None: first_last_bits
    first_last_activation_bits: Width | None = None
    first_last_weight: Component = Component(name="range_linear")
    first_last_activation: Component = Component(name="auto")
    shortcut: Literal["same"] | Width = "same"
    rules: tuple[RuleConfig, ...] = Field(default=(), strict=False)


class QuantizerConfig(Section):
    """The method for weights and for activations; `auto` is LSQ, and UniQ at one bit."""

    weight: Component = Component(name="auto")
    activation: Component = Component(name="auto")


OptimizerName = Literal["sgd", "adam", "adamw"]


class OptimizerConfig(Section):
    """The optimizer; a field that the method does not have must stay at its default."""

    name: OptimizerName = "sgd"
    lr: Positive = 0.04  # at the config's own batch size; not rescaled
    momentum: Fraction = 0.9  # SGD only
    nesterov: bool = True  # SGD only
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), strict=False)  # Adam only
    weight_decay: NonNegative = 1e-4  # not applied to biases and batch norm

    @model_validator(mode="after")
    def _only_its_own(self) -> OptimizerConfig:
        foreign = ("betas",) if self.name == "sgd" else ("momentum", "nesterov")
        if wrong := [field for field in foreign if _is_set(self, field)]:
            raise ValueError(f"{self.name} has no {' and no '.join(wrong)}")
        return self


class ParameterRuleConfig(Section):
    """Rates of the quantizer parameters whose name fits a glob: `*.input_quantizer.*`, `*.clip`."""

    match: str
    lr: Positive | None = None
    lr_factor: Positive | None = None
    weight_decay: NonNegative | None = None
    weight_decay_factor: NonNegative | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> ParameterRuleConfig:
        given = (self.lr, self.lr_factor, self.weight_decay, self.weight_decay_factor)
        if all(value is None for value in given):
            raise ValueError("sets nothing; give a learning rate or a weight decay")
        return _absolute_or_factor(self)


class QuantizerParametersConfig(Section):
    """Learning rate and weight decay of steps and clips: absolute, or times the weights' own."""

    optimizer: OptimizerName | None = None  # null: that of the weights; another has its defaults
    lr: Positive | None = None
    lr_factor: Positive = 1.0
    weight_decay: NonNegative | None = None
    weight_decay_factor: NonNegative | None = None  # null: the method's own, 1 for PACT, else 0
    rules: tuple[ParameterRuleConfig, ...] = Field(default=(), strict=False)  # the last one wins

    @model_validator(mode="after")
    def _one_of_each(self) -> QuantizerParametersConfig:
        return _absolute_or_factor(self)


RatesT = TypeVar("RatesT", ParameterRuleConfig, QuantizerParametersConfig)


def _absolute_or_factor(rates: RatesT) -> RatesT:
    for absolute, factor in (("lr", "lr_factor"), ("weight_decay", "weight_decay_factor")):
        if getattr(rates, absolute) is not None and _is_set(rates, factor):
            raise ValueError(f"give {absolute} or {factor}, not both")
    return rates


class ScheduleConfig(Section):
    """The learning rate over a stage, as a factor of `optimizer.lr`."""

    name: Literal["cosine", "step", "linear", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0  # linear from 0
    final: Fraction = 0.0  # the factor at the end; cosine and linear
    milestones: tuple[Fraction, ...] = Field(default=(0.5, 0.75), strict=False)  # step only
    gamma: Positive = 0.1  # step only


class TrainConfig(Section):
    """How a stage is trained."""

    epochs: Annotated[int, Field(ge=0)] = 30
    optimizer: OptimizerConfig = OptimizerConfig()
    quantizer_parameters: QuantizerParametersConfig = QuantizerParametersConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: Positive | None = None
    label_smoothing: Fraction = 0.0
    augment: bool = True
    calibration_batches: PositiveInt = 8
    batch_norm_batches: Annotated[int, Field(ge=0)] = 50  # re-estimation; 0 switches it off


class DistillConfig(BaseModel):
    """The teacher and the loss that follows it; further keys are options of the loss."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    teacher: Literal["previous", "fp32", "none"] = "previous"
    loss: str = "kl"
    weight: Fraction = 0.5  # of the soft loss; the labels' cross-entropy gets the rest

    @property
    def options(self) -> dict[str, Any]:
        """Options of the loss."""
        return dict(self.model_extra or {})


class BinRegularizationConfig(Section):
    """Bin regularization of weights and of activations (A-BR), after a warm-up without it."""

    weight: NonNegative = 0.0  # lambda
    activation: NonNegative = 0.0  # lambda
    warmup: Fraction = 0.3  # of the stage
    freeze_weight_scale: bool = False  # when the warm-up ends
    freeze_activation_scale: bool = False
    attach_weight_scale: bool = True  # let the regularizer move the weights' step
    attach_activation_scale: bool = False
    # factor on the regularizer's gradient of a step; null: that of the quantizer's own gradient
    scale_gradient: Positive | None = None


class DampeningConfig(Section):
    """Oscillation dampening of weights, from `start` by cosine to `final` after a warm-up."""

    start: NonNegative = 0.0  # lambda
    final: NonNegative = 0.0  # lambda; published runs end at 0.1
    warmup: Fraction = 0.25  # of the stage
    aggregation: Literal["sum", "mean", "kernel_mean"] = "kernel_mean"


class FreezingConfig(Section):
    """Freezing of weights that oscillate too often; nothing is frozen before the warm-up ends.

    The bound on a weight's frequency goes from `start` by cosine to `final`, as in published runs
    from 0.1 to 0.01. It should end at two or three times `oscillation.momentum` or above.
    """

    start: Fraction = 0.0  # oscillations a step; 0 for both: no freezing
    final: Fraction = 0.0
    warmup: Fraction = 0.25  # of the stage
    freeze_to: Literal["mean", "last"] = "mean"  # the rounded average of its integers, or the last

    @model_validator(mode="after")
    def _both_or_none(self) -> FreezingConfig:
        if (self.start > 0) != (self.final > 0):
            raise ValueError("give start and final, both above 0, or neither")
        return self


class OscillationConfig(Section):
    """What is done about weights that jump between two levels: nothing, unless asked for."""

    track: bool = False  # tell how many do so; always on with freezing
    max_bits: Annotated[int, Field(ge=1, le=8)] = 4  # wider weights are not tracked and not frozen
    momentum: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.001  # of the moving averages
    dampening: DampeningConfig = DampeningConfig()
    freezing: FreezingConfig = FreezingConfig()

    @property
    def dampens(self) -> bool:
        """Whether there is a dampening loss."""
        return self.dampening.start > 0 or self.dampening.final > 0

    @property
    def freezes(self) -> bool:
        """Whether weights are frozen."""
        return self.freezing.final > 0

    @property
    def tracks(self) -> bool:
        """Whether the weights' codes are followed."""
        return self.track or self.freezes


class StageConfig(Section):
    """One rung with every setting filled in."""

    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")] = ""
    weight_bits: Width
    activation_bits: Width
    init: Literal["previous", "fp32", "scratch"] = "previous"
    quantizer: QuantizerConfig = QuantizerConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    bin_regularization: BinRegularizationConfig = BinRegularizationConfig()
    oscillation: OscillationConfig = OscillationConfig()

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight_bits == 32 and self.activation_bits == 32


class RuntimeConfig(Section):
    """Where and how it runs; nothing here changes what a stage is."""

    device: str = "auto"
    threads: PositiveInt | None = None  # None: PyTorch's own choice, recorded
    checkpoint_seconds: Positive = 30.0  # besides one after each epoch
    keep_freed_memory: bool = True  # glibc only: no page faults for the same activations each step


class RunConfig(Section):
    """A whole ladder, checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    ladder: tuple[StageConfig, ...] = Field(strict=False)
