"""Train one rung: hand over from the rung above, calibrate, distil, re-estimate, measure."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...models import load_weights
from ...quant.absorb import absorb_relus
from ...quant.calibrate import calibrate, ranges, reestimate_batch_norm
from ...quant.metrics import bit_operations, ideal_bytes, layer_report
from ...quant.policy import QuantizerChoice, plan_as_dict
from ...quant.probing import Probe, probe
from ...quant.swap import apply_plan, float_state_dict, layer_plan, unquantized
from ..cheap_teachers import Cheapened, ready_teachers
from ..compiling import compile_networks, wants, why_not
from ..config import BinRegularizationConfig, OscillationConfig, StageConfig
from ..config_section import Component
from ..data import DataBundle
from ..data.split import Batch
from ..distributed import first_goes_on, own_share
from ..errors import StageError
from ..evaluate import evaluate
from ..features import FeatureTerm, build_features
from ..fit import EVALUATION_BATCH, Surroundings, fit, oscillation_shares
from ..learner import Learner, Objective
from ..network import build_network, describe_network, load_network, load_teacher
from ..parents import teachers_among
from ..policy import choose_quantizer, policy_of
from ..record import METRICS, MODEL, PROJECTIONS
from ..teachers import Teachers
from ..tensors import write_tensors
from .base import STAGES, StageContext, StageOutput

log = logging.getLogger(__name__)
PROBE_BATCHES = 2


@STAGES.register("train")
def train(context: StageContext) -> StageOutput:
    """Trains a student from its parent's weights under its teacher, and measures it."""
    stage, data, device = context.stage, context.data, context.device
    seed, batch_size = context.spec.options["seed"], data_batch(context)
    began = time.monotonic()
    network = describe_network(context.spec.options["model"], data)
    drawn = calibration_of(stage, data, batch_size=batch_size, seed=seed, device=device)
    calibration = list(drawn(stage.train.calibration_batches))
    student = build_network(network, seed=seed)
    parent = _parent(context)
    if parent is not None:
        student.load_state_dict(float_state_dict(parent), strict=True)
    elif context.weights is not None:
        load_weights(student, context.weights, key_map=context.spec.options["key_map"])
    student.to(device)
    facts = probe(student, calibration[:PROBE_BATCHES])
    above, chosen = teachers_among(context.parents)
    networks = [load_teacher(context.store, record, device) for record in above]
    features = _features(student, networks, calibration, context)
    teachers, cheapened = _ready(networks, context)
    student = _quantize(student, parent, facts, network, context, calibration)
    absorb_relus(student)
    distill = stage.distill if above else None
    bins, oscillation = stage.bin_regularization, stage.oscillation
    if stage.full_precision:
        bins, oscillation = BinRegularizationConfig(), OscillationConfig()
    objective = Objective(stage.train, distill, bins, oscillation, features)
    learner = Learner(student, objective, precision=stage.train.precision)
    learner.to(device).train()
    if stage.oscillation.freezes and learner.tracker is None and not stage.full_precision:
        text = f"no weight has {stage.oscillation.max_bits} bits or fewer, so none is frozen"
        context.around.notify(kind="message", text=text)
    if context.resume is not None:
        learner.load_state_dict(context.resume["learner"], strict=True)
    around = _compiled(learner, teachers, facts, context)
    history = fit(
        learner,
        teachers,
        data,
        stage,
        around,
        batch_size=batch_size,
        seed=seed,
        device=device,
        resume=context.resume,
    )
    if not first_goes_on():
        return StageOutput((), network, {})
    if stage.train.epochs and stage.train.batch_norm_batches:
        log.debug("phase re-estimation of batch norm")
        reestimate_batch_norm(student, drawn(stage.train.batch_norm_batches))
    write_tensors(context.around.workdir / MODEL, student.state_dict())
    files: tuple[str, ...] = (MODEL, METRICS)
    if features is not None and (learned := features.projections()):
        write_tensors(context.around.workdir / PROJECTIONS, learned)
        files = (*files, PROJECTIONS)
    metrics = _measure(student, facts, context, history, calibration)
    metrics |= oscillation_shares(learner)
    _note_oscillation(metrics["layers"], learner)
    metrics |= {"precision": stage.train.precision, "compiled": around.started["compiled"]}
    metrics |= {"teacher_chosen": above[0].key} if chosen else {}
    metrics |= {"cheap_teachers": [asdict(each) for each in cheapened]} if cheapened else {}
    metrics["seconds_here"] = round(time.monotonic() - began, 3)
    return StageOutput(files, network, metrics)


def calibration_of(
    stage: StageConfig, data: DataBundle, *, batch_size: int, seed: int, device: torch.device
) -> Callable[[int], Iterator[Batch]]:
    """So many calibration batches, which look as the images do that the stage trains on."""
    return partial(
        data.train.calibration, batch_size, seed=seed, augment=stage.train.augment, device=device
    )


def data_batch(context: StageContext) -> int:
    """The training batch size of a stage."""
    return int(context.spec.options["data"]["batch_size"])


def _parent(context: StageContext) -> nn.Module | None:
    if "init" not in context.parents:
        return None
    return load_network(context.store, context.parents["init"], context.device)


def _features(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    calibration: Sequence[Batch],
    context: StageContext,
) -> FeatureTerm | None:
    """The losses between inner layers, from the student before it is quantized: the same layers.

    Raises:
        StageError: there is no such layer, or two cannot be compared.
    """
    distill = context.stage.distill
    if distill.features is None or not distill.follows_features or not teachers:
        return None
    try:
        return build_features(
            distill.features,
            student=student,
            teachers=teachers,
            images=calibration[0][0][:2],
            seed=context.spec.options["seed"],
        )
    except ValueError as error:
        raise StageError(
            context.around.name,
            f"distill.features: {error}",
            "name layers under distill.features.layers, and those of a teacher with other names "
            "under distill.features.teacher_layers",
        ) from None


def _ready(
    networks: Sequence[nn.Module], context: StageContext
) -> tuple[Teachers, tuple[Cheapened, ...]]:
    """The teachers as the stage asks them; says what became of those that were made cheaper.

    Raises:
        StageError: they cannot be made so.
    """
    stage = context.stage
    try:
        teachers, cheapened = ready_teachers(
            networks,
            stage.distill,
            context.data,
            augment=stage.train.augment,
            batch_size=data_batch(context),
            seed=context.spec.options["seed"],
            device=context.device,
        )
    except ValueError as error:
        raise StageError(context.around.name, f"distill: {error}") from None
    for number, each in enumerate(cheapened):
        which = f"teacher {number}" if len(cheapened) > 1 else "the teacher"
        context.around.notify(kind="message", text=f"{which}: {each}")
    return teachers, cheapened


def _quantize(
    student: nn.Module,
    parent: nn.Module | None,
    facts: Probe,
    network: dict[str, Any],
    context: StageContext,
    calibration: list[Batch],
) -> nn.Module:
    """Gives the student its quantizers and their ranges; notes them in `network`."""
    stage = context.stage
    network["quantization"] = {}
    if stage.full_precision:
        return student
    plan = policy_of(stage).resolve(facts)
    network["quantization"] = plan_as_dict(plan)
    student = apply_plan(student, plan)
    network["not_quantized"] = unquantized(student, facts)
    student.to(context.device)
    if context.resume is not None:
        return student  # the checkpoint holds the ranges
    log.debug("phase calibration")
    calibrate(student, calibration, keep=ranges(parent) if parent is not None else None)
    if stage.train.batch_norm_batches:
        reestimate_batch_norm(student, calibration)
    return student


def _compiled(
    learner: Learner, teachers: Teachers, facts: Probe, context: StageContext
) -> Surroundings:
    """Compiles the networks where that is wanted, pays and works; notes it for a resume."""
    stage, around, batch_size = context.stage, context.around, data_batch(context)
    data, share = context.data.train, own_share()
    steps = stage.train.epochs * data.num_batches(batch_size, shares=share.of)
    if context.resume is not None:
        compiled = bool(json.loads(context.resume["started"]).get("compiled"))
    else:
        own = share.size(batch_size)
        compiled = wants(stage.train, facts, batch_size=own, steps=steps, device=context.device)
    compiled = compiled and steps > 0 and len(data) >= batch_size
    if compiled and (reason := why_not(learner.student)):
        compiled = False
        if stage.train.compile == "on":
            around.notify(kind="message", text=f"not compiled: {reason}")
    if compiled:
        batches = data.batches(
            batch_size,
            seed=context.spec.options["seed"],
            epoch=0,
            augment=stage.train.augment,
            device=context.device,
            share=share,
        )
        images, _ = next(batches)  # its strides count too
        try:
            seconds = compile_networks(learner, teachers, images)
            around.notify(kind="message", text=f"compiled in {seconds:.0f} s")
        except RuntimeError as error:
            compiled = False
            around.notify(kind="message", text=f"not compiled, {error}")
    return replace(around, started={**around.started, "compiled": compiled})


def _measure(
    student: nn.Module,
    facts: Probe,
    context: StageContext,
    history: list[dict[str, Any]],
    calibration: list[Batch],
) -> dict[str, Any]:
    """The row of the results table. Test is read here, once, after the last epoch."""
    log.debug("phase evaluation")
    stage, data, device = context.stage, context.data, context.device
    validation = evaluate(
        student, data.validation.evaluation_batches(EVALUATION_BATCH, device=device)
    )
    test = evaluate(student, data.test.evaluation_batches(EVALUATION_BATCH, device=device))
    layers = _finite(layer_report(student, calibration))
    seconds = sum(epoch["seconds"] for epoch in history)
    images = sum(epoch["seconds"] * epoch["images_per_second"] for epoch in history)
    return {
        "weight_bits": stage.weight_bits,
        "activation_bits": stage.activation_bits,
        "weight_quantizer": _name(stage.quantizer.weight, stage.weight_bits),
        "activation_quantizer": _name(stage.quantizer.activation, stage.activation_bits),
        "epochs": stage.train.epochs,
        "seed": context.spec.options["seed"],
        "train_loss": history[-1]["train_loss"] if history else None,
        "val_top1": validation.top1,
        "val_loss": validation.loss,
        "test_top1": test.top1,
        "test_top5": test.top5,
        "test_loss": test.loss if math.isfinite(test.loss) else None,
        "test_images": test.images,
        **_levels(layers, stage, context.around.name),
        "ideal_bytes": ideal_bytes(student),
        "bitops": bit_operations(facts, layer_plan(student)),
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "device": device.type,
        "layers": layers,
    }


def _note_oscillation(layers: list[dict[str, Any]], learner: Learner) -> None:
    """Adds to the row of each layer that was followed its shares at the end of training."""
    found = learner.tracker.layer_shares() if learner.tracker is not None else {}
    for layer in layers:
        if shares := found.get(layer["layer"]):
            layer["weight_oscillating"] = shares.oscillating
            layer["weight_frozen"] = shares.frozen


def _finite(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without infinities (an SQNR without noise), which JSON does not have."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in layer.items()}
        for layer in layers
    ]


def _name(component: Component, bits: int) -> str | None:
    """The method of a half, and behind a colon that which it wraps."""
    if bits == 32:
        return None
    chosen = choose_quantizer(component, bits)
    return ":".join(QuantizerChoice(chosen.name, chosen.options).methods)


def _levels(layers: list[dict[str, Any]], stage: StageConfig, name: str) -> dict[str, int | None]:
    """The largest number of distinct codes in any scale group, over the layers at the rung's width.

    Raises:
        StageError: some layer, at whatever width, has more than 2**bits.
    """
    found: dict[str, int | None] = {"weight_levels": None, "activation_levels": None}
    for layer in layers:
        for half, bits in (("weight", stage.weight_bits), ("activation", stage.activation_bits)):
            width, levels = layer[f"{half}_bits"], layer[f"{half}_levels"]
            if levels is None:
                continue
            if levels > 2**width:
                raise StageError(
                    name, f"{layer['layer']} has {levels} {half} levels at {width} bits"
                )
            if width == bits:
                found[f"{half}_levels"] = max(found[f"{half}_levels"] or 0, levels)
    known = [levels for levels in found.values() if levels is not None]
    return {**found, "max_levels": max(known) if known else None}
