"""One training step of a stage: rates, teachers, losses, gradients, optimizer, what follows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from ..models.tapped import Outputs
from ..quant import world
from .compiling import begin_step
from .config import StageConfig
from .distributed import synchronised
from .learner import Learner
from .optimizer import OptimizerPair, global_norm_clip, set_lr
from .schedule import lr_factor
from .step_limits import StepLimits
from .teachers import Teachers, dropped_teachers


class TrainingStep:
    """What a stage does with each batch.

    All that changes over a stage is a function of the step's number and the seed, so a resumed
    stage needs no state beside that of the learner and the optimizer.

    Where several processes share each batch, gradients are averaged over all of it; say before a
    step which part of it this process has, with `world.set_part`.

    Args:
        teachers: they see the student's own batches.
        optimizer: with the state that it goes on with.
        steps: of the whole stage.
        per_epoch: steps of an epoch.
        seed: decides which teachers a batch does without.
    """

    def __init__(
        self,
        learner: Learner,
        teachers: Teachers,
        optimizer: Optimizer | OptimizerPair,
        stage: StageConfig,
        *,
        steps: int,
        per_epoch: int,
        seed: int,
    ) -> None:
        self.learner = learner
        self.teachers = teachers
        self.optimizer = optimizer
        self.steps = steps
        self._stage, self._per_epoch, self._seed = stage, per_epoch, seed
        self._frozen = False
        self._synchronised: nn.Module | None = None
        self._limits = StepLimits(learner.student, optimizer)

    def losses(self, x: Tensor, targets: Tensor, step: int) -> dict[str, Tensor]:
        """Every term of the loss and their weighted sum under "total"; scalars, float32.

        Args:
            x: images, (N, C, H, W).
            targets: class numbers, (N,).
            step: 0-based, within the stage.
        """
        progress = step / self.steps
        self._freeze_scales(progress)
        factor = lr_factor(self._stage.train.schedule, step, self.steps, self._per_epoch)
        set_lr(self.optimizer, factor)
        begin_step(self.learner, x)
        taught = self._taught(x, step, progress)
        self.learner.before_step(progress)
        if self._synchronised is None:
            alone = world.size() == 1
            self._synchronised = self.learner if alone else synchronised(self.learner, x)
        terms: dict[str, Tensor] = self._synchronised(x, targets, taught, progress)
        return terms

    def update(self, total: Tensor, step: int) -> None:
        """Moves the weights down the gradient of `losses`' total, of the same step."""
        if world.size() > 1:  # the mean over the processes is then that over all images
            total = total * (world.size() / world.ratio())
        total.backward()
        if self._stage.train.clip_grad_norm is not None:
            global_norm_clip(self.learner, self._stage.train.clip_grad_norm)
        self._limits.hold()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.after_step(step / self.steps)
        if self.learner.averaging is not None:
            self.learner.averaging.update(step, self.steps)

    def __call__(self, x: Tensor, targets: Tensor, step: int) -> dict[str, Tensor]:
        """Both; gives back the terms of the loss."""
        terms = self.losses(x, targets, step)
        self.update(terms["total"], step)
        return terms

    def _taught(self, x: Tensor, step: int, progress: float) -> list[Outputs | None]:
        objective = self.learner.objective
        if not objective.follows(progress):
            return []
        drop = self._stage.distill.drop
        left_out = dropped_teachers(len(self.teachers), drop, seed=self._seed, step=step)
        _, layers = objective.taps(progress)
        return self.teachers(x, step, layers=layers, left_out=left_out)

    def _freeze_scales(self, progress: float) -> None:
        bins = self._stage.bin_regularization
        if self._frozen or progress < bins.warmup:
            return
        freeze_scales(self.learner.student, bins.freeze_weight_scale, "weight_quantizer")
        freeze_scales(self.learner.student, bins.freeze_activation_scale, "input_quantizer")
        self._frozen = True
        self._synchronised = None


def freeze_scales(student: nn.Module, freeze: bool, half: str) -> None:
    """Fixes the steps of all `weight_quantizer`s or `input_quantizer`s, if `freeze`."""
    if freeze:
        for name, parameter in student.named_parameters():
            if f".{half}." in f".{name}":
                parameter.requires_grad_(False)
                parameter.grad = None
