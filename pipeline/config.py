"""A ladder's settings: what the YAML file may say, and what it means when it says nothing.

Every value type here is frozen. Defaults stand above the ladder; a rung says only what differs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from .config_distill import DistillConfig
from .config_section import Component, Fraction, NonNegative, Positive, Section, is_set

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)


def _known_width(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"there is no width {bits}; widths are 1 to 8, 16, and 32 for none")
    return bits


Width = Annotated[int, AfterValidator(_known_width)]


class DataConfig(Component):
    """A data set by name; `batch_size` is the training batch."""

    name: str = "digits"
    batch_size: PositiveInt = 128


class ModelConfig(Component):
    """A network by registered name, torchvision name, or `package.module:factory`."""

    name: str = "preact_resnet8"
    weights: str | None = None  # an FP32 state dict that the ladder starts from
    key_map: Literal["none", "pytorchcv"] | dict[str, str] = "none"

    def same_network(self, other: ModelConfig) -> bool:
        """Whether the weights of one fit the other: the same name with the same options."""
        return self.name == other.name and self._every_option() == other._every_option()

    def _every_option(self) -> dict[str, Any]:
        """Its options with those that it leaves at their defaults, where these are known."""
        from ..models import MODELS

        known = MODELS[self.name].options() if self.name in MODELS else {}
        return {name: option.default for name, option in known.items()} | self.options


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
    """The method for weights and for activations; `auto` is LSQ; at 1 bit UniQ, at 16 min-max."""

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
        if wrong := [field for field in foreign if is_set(self, field)]:
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
        if getattr(rates, absolute) is not None and is_set(rates, factor):
            raise ValueError(f"give {absolute} or {factor}, not both")
    return rates


class ScheduleConfig(Section):
    """The learning rate over a stage, as a factor of `optimizer.lr`."""

    name: Literal["cosine", "step", "linear", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0  # linear from 0
    final: Fraction = 0.0  # the factor at the end; cosine and linear
    milestones: tuple[Fraction, ...] = Field(default=(0.5, 0.75), strict=False)  # step only
    gamma: Positive = 0.1  # step only

    @model_validator(mode="after")
    def _only_its_own(self) -> ScheduleConfig:
        wrong = [f for f in ("milestones", "gamma") if self.name != "step" and is_set(self, f)]
        if wrong:
            raise ValueError(f"{self.name} has no {' and no '.join(wrong)}; name: step has")
        return self


class AveragingConfig(Section):
    """Which weights a stage ends with: the last ones, or a running average of them.

    Validation after each epoch is of the running weights, the stage's own result of the average.
    """

    name: Literal["none", "ema", "tail"] = "none"  # tail: the mean of every step since `start`
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999  # EMA only: a step
    start: Fraction = 0.75  # tail only: fraction of the stage

    @model_validator(mode="after")
    def _only_its_own(self) -> AveragingConfig:
        own = {"ema": ("decay",), "tail": ("start",), "none": ()}[self.name]
        wrong = [f for f in ("decay", "start") if f not in own and is_set(self, f)]
        if wrong:
            raise ValueError(f"{self.name} has no {' and no '.join(wrong)}")
        return self


Precision = Literal["fp32", "bf16", "auto"]  # auto is settled as a config is read


class TrainConfig(Section):
    """How a stage is trained."""

    epochs: Annotated[int, Field(ge=0)] = 30
    optimizer: OptimizerConfig = OptimizerConfig()
    quantizer_parameters: QuantizerParametersConfig = QuantizerParametersConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    clip_grad_norm: Positive | None = None
    label_smoothing: Fraction = 0.0
    augment: bool = True
    precision: Precision = "fp32"  # bf16: of layers, not scales or losses; auto: where it pays
    compile: Literal["auto", "on", "off"] = "off"  # torch.compile; auto: where it should pay
    devices: PositiveInt = 1  # processes that share each batch: on CUDA a GPU each
    calibration_batches: PositiveInt = 8
    batch_norm_batches: Annotated[int, Field(ge=0)] = 50  # re-estimation; 0 switches it off

    @model_validator(mode="after")
    def _averages_with_statistics(self) -> TrainConfig:
        if self.averaging.name != "none" and self.batch_norm_batches == 0:
            raise ValueError(
                f"averaging: {self.averaging.name} gives weights that batch norm has no statistics "
                "of; give batch_norm_batches, such as 50 (without batch norm it costs nothing)"
            )
        return self


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
    init: str = "previous"  # previous, fp32, scratch, or the name of a rung above
    model: ModelConfig | None = None  # None: the ladder's own
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


class AutoConfig(Section):
    """Where `ladder: auto` goes and what it may lose: validation top-1, as fractions."""

    weight_bits: Width  # the target; one of both may be 16 or 32 and then stays so
    activation_bits: Width
    budget: Fraction  # in all, against FP32
    step_budget: Fraction | None = None  # of a rung against the one above; null: half the budget
    insertions: Annotated[int, Field(ge=0, le=16)] = 4  # of rungs in between, in all
    # settings of the rungs by name: w1a1, or a glob such as w1*; the last that fits wins
    rungs: dict[str, StageConfig] = Field(default={})

    @field_serializer("rungs")
    def _settings(self, rungs: dict[str, StageConfig]) -> dict[str, Any]:
        given = {"name", "weight_bits", "activation_bits", "init", "model"}  # by the ladder
        return {name: rung.model_dump(mode="json", exclude=given) for name, rung in rungs.items()}

    @field_validator("budget", "step_budget", mode="before")
    @classmethod
    def _no_points(cls, value: Any) -> Any:
        if isinstance(value, int | float) and value > 1:
            raise ValueError(f"a fraction is wanted: {value / 100:g} is {value:g} points")
        return value

    @field_validator("activation_bits")
    @classmethod
    def _goes_down(cls, bits: int, info: ValidationInfo) -> int:
        if bits > 8 and info.data.get("weight_bits", 1) > 8:
            raise ValueError("the target is wider than 8 bits in both, so no rung goes down")
        return bits

    @field_validator("step_budget")
    @classmethod
    def _within_budget(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and value > info.data.get("budget", 1.0):
            raise ValueError(f"a step may not lose more than the budget, {info.data['budget']}")
        return value

    @property
    def step(self) -> float:
        """What a rung may lose against the one that it starts from."""
        return self.budget / 2 if self.step_budget is None else self.step_budget


class RuntimeConfig(Section):
    """Where and how it runs; nothing here changes what a stage is."""

    device: str = "auto"
    # of each process; None: PyTorch's own choice, or each device's share of the cores; recorded
    threads: PositiveInt | None = None
    checkpoint_seconds: Positive = 30.0  # besides one after each epoch
    keep_freed_memory: bool = True  # glibc only: no page faults for the same activations each step
    tensorboard: bool = False  # charts of the run, in the store's reports/<run>/tensorboard
    histogram_epochs: Annotated[int, Field(ge=0)] = 10  # between two histograms there; 0: none


class RunConfig(Section):
    """A whole ladder, checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    ladder: tuple[StageConfig, ...] = Field(strict=False)  # with `auto`: those known so far
    auto: AutoConfig | None = None

    @field_serializer("ladder", mode="wrap")
    def _as_written(self, ladder: Any, plain: SerializerFunctionWrapHandler) -> Any:
        return "auto" if self.auto is not None else plain(ladder)

    def model_of(self, stage: StageConfig) -> ModelConfig:
        """A rung's network: its own, or the ladder's."""
        return stage.model or self.model
