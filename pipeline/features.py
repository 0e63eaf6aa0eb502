"""The feature losses of a stage: which layers they look at, and what they learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.tapped import tapped
from ..quant.probing import evaluating
from .config_distill import FeatureConfig
from .data.order import generator_of
from .losses import FEATURE_LOSSES, Step

Sizes = Sequence[Sequence[int]]  # of one network's layers, each with the batch in front


class FeatureTerm(nn.Module):
    """One feature loss for each teacher and each pair of layers, summed over the pairs.

    Args:
        name: in the registry of feature losses.
        options: of the loss.
        layers: of the student.
        teacher_layers: of every teacher, as many.
        student_sizes: what the student's layers give.
        teacher_sizes: for each teacher the same.
        seed: decides where learned projections start.

    Raises:
        ValueError: the loss cannot compare two of the layers.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        layers: Sequence[str],
        teacher_layers: Sequence[str],
        student_sizes: Sizes,
        teacher_sizes: Sequence[Sizes],
        seed: int,
    ) -> None:
        super().__init__()
        self.layers, self.teacher_layers = tuple(layers), tuple(teacher_layers)
        losses: list[nn.ModuleList] = []  # one for each teacher
        for teacher, sizes in enumerate(teacher_sizes):
            pairs = nn.ModuleList()
            for layer, own, other in zip(self.layers, student_sizes, sizes, strict=True):
                generator = generator_of(seed, "projection", teacher, len(pairs))
                try:
                    loss = FEATURE_LOSSES[name].factory(own, other, generator, **options)
                except ValueError as error:
                    raise ValueError(f"layer {layer!r}: {error}") from None
                pairs.append(loss)
            losses.append(pairs)
        self.losses = nn.ModuleList(losses)

    def forward(self, step: Step) -> Tensor:
        """Scalar, float32: the sum over the layers, under the step's own teacher."""
        pairs = zip(self._pairs(step.teacher), self.layers, self.teacher_layers, strict=True)
        return torch.stack(
            [loss(step.features[own], step.teacher_features[other]) for loss, own, other in pairs]
        ).sum()

    def _pairs(self, teacher: int) -> nn.ModuleList:
        return cast(nn.ModuleList, self.losses[teacher])

    def projections(self) -> dict[str, Tensor]:
        """What was learned, as `layer->teacher_layer.weight`; of several, behind `teacher-1.`."""
        found = {}
        for teacher in range(len(self.losses)):
            before = f"teacher-{teacher}." if len(self.losses) > 1 else ""
            pairs = zip(self.layers, self.teacher_layers, self._pairs(teacher), strict=True)
            for own, other, loss in pairs:
                for name, tensor in loss.state_dict().items():
                    found[f"{before}{own}->{other}.{name}"] = tensor
        return found


def build_features(
    config: FeatureConfig,
    *,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    images: Tensor,
    seed: int,
) -> FeatureTerm:
    """The feature losses between a student and its teachers, from what their layers give.

    Args:
        student: the network, quantized or not; layers have the same names and sizes in both.
        images: any few, (N, C, H, W).

    Raises:
        ValueError: a network has no such layer, or two of them cannot be compared.
    """
    layers, teacher_layers = config.layers, config.teacher_layers or config.layers
    with torch.no_grad(), evaluating(student):
        own = tapped(student, images, layers).features
    others = []
    for number, teacher in enumerate(teachers):
        try:
            with torch.no_grad():
                others.append(tapped(teacher, images, teacher_layers).features)
        except ValueError as error:
            which = f"teacher {number}" if len(teachers) > 1 else "the teacher"
            raise ValueError(f"{which}: {error}") from None
    return FeatureTerm(
        config.name,
        config.options,
        layers=layers,
        teacher_layers=teacher_layers,
        student_sizes=[own[layer].shape for layer in layers],
        teacher_sizes=[[other[layer].shape for layer in teacher_layers] for other in others],
        seed=seed,
    )
