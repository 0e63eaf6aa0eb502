"""What one training step costs, as ratios of steps taken in turns; and two doors for others.

    python benchmarks/step.py --out step.md
    python benchmarks/step.py --network cifar_resnet18 --rounds 7
    python benchmarks/step.py --rows fp32* ours ours-kd*
    python benchmarks/step.py --quantizers --bits 2 4 --rounds 15
    python benchmarks/step.py --quantizers lsq pact --bits 1 2 3 4 8
    python benchmarks/step.py --memory

CIFAR-sized synthetic images, batch 128. All rows run in one process and in turns: a round is one
step of each, every other round in reverse. A step whose threads waited over 5 % of it for a
processor that somebody else had is done again, up to twice (Linux). A row's time is its median
over the rounds, its ratio the median of the ratios within a round.

The rows called textbook are LSQ as it is copied from the paper (`textbook.py`), on all
convolutions but the first, first and last layer in FP32. Ours do more: the default policy, which
has these two at 8 bits as well. `--memory` runs each row in a fresh process, with the C library's
own allocator settings, and says how much its peak lies above that of the FP32 step.

For other programs: `qat_step(ctx)` and `kd_step(ctx)` give a whole training step of ours on their
own network and images; they need nothing of this folder but this file.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from bitladder.models import build_model
from bitladder.pipeline.cheap_teachers import to_bfloat16
from bitladder.pipeline.compiling import allow_variants, compile_networks
from bitladder.pipeline.config import (
    BinRegularizationConfig,
    Component,
    OptimizerConfig,
    QuantizerConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from bitladder.pipeline.learner import Learner, Objective
from bitladder.pipeline.machine import keep_freed_memory
from bitladder.pipeline.network import in_fastest_format
from bitladder.pipeline.optimizer import build_optimizer
from bitladder.pipeline.policy import policy_of
from bitladder.pipeline.teachers import Teachers
from bitladder.pipeline.training_step import TrainingStep
from bitladder.quant import QUANTIZERS, bake, calibrate, quant_layers, quantize_model
from bitladder.quant.absorb import absorb_relus
from bitladder.quant.fold import fold_batch_norm
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from timing import Case

Mode = Literal["eager", "compiled", "bf16", "bf16-eager"]
MODES: tuple[Mode, ...] = ("eager", "compiled", "bf16-eager", "bf16")
Run = Callable[[], object]

SPEED_ONLY = 1e-3  # learning rate at which no row diverges
HALF_WAY = 1  # of two steps: what begins after a warm-up is on


# -- the doors ---------------------------------------------------------------------------------


def qat_step(ctx: Any, *, mode: Mode = "eager") -> Callable[..., Tensor]:
    """A whole training step of ours: W4A4 LSQ by the default policy, cross-entropy, fused SGD.

    Args:
        ctx: `ctx.make_model()` gives an FP32 network, of any kind, which is quantized in place;
            `ctx.batch()` gives images and labels, read once, for calibration and for the steps.
        mode: "eager"; "compiled", the same numbers from whole-model torch.compile; "bf16",
            compiled under autocast, with ranges, scales and losses in float32.

    Returns:
        A callable that does one step and gives its loss, detached, without waiting for a GPU. It
        may be given other images and labels than the context's: `step(images, labels)`.

    Raises:
        RuntimeError: it is to be compiled, and there is no compiler here that can.
    """
    return our_step(ctx, mode=mode)


def kd_step(ctx: Any, *, mode: Mode = "eager", **which: Any) -> Callable[..., Tensor]:
    """The same under a teacher, half the weight on its KL divergence.

    The teacher is a copy made fast: one of ours is baked; batch norm is folded in one of FP32, and
    not in a quantized one, where a value at the edge of a bin might round the other way.

    Args:
        ctx: as for `qat_step`; `ctx.teacher(**which)` gives a network, which is left as it is.
        mode: as for `qat_step`; with "bf16" the teacher computes in bfloat16 too.
    """
    return our_step(ctx, ctx.teacher(**which), mode=mode)


def our_step(
    ctx: Any,
    teacher: nn.Module | None = None,
    *,
    mode: Mode = "eager",
    bits: int = 4,
    teacher_bf16: bool = False,
    **settings: Any,
) -> Callable[..., Tensor]:
    """The same with other widths, and other settings of a stage (`quantizer`, ...)."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    train = TrainConfig(
        optimizer=OptimizerConfig(lr=SPEED_ONLY), schedule=ScheduleConfig(name="constant")
    )
    stage = StageConfig(weight_bits=bits, activation_bits=bits, train=train, **settings)
    images, labels = ctx.batch()
    images = _in_format(images)
    student = in_fastest_format(ctx.make_model()).to(images.device)
    student = quantize_model(student, policy_of(stage), batches=[images])
    calibrate(student, [images])
    absorb_relus(student)
    bf16 = mode.startswith("bf16")
    teachers = Teachers([])
    if teacher is not None:
        teachers = _fast(teacher, images, bf16=bf16 or teacher_bf16)
    distill = stage.distill if teacher is not None else None
    objective = Objective(stage.train, distill, stage.bin_regularization, stage.oscillation)
    learner = Learner(student, objective, precision="bf16" if bf16 else "fp32")
    learner.to(images.device).train()
    if mode in ("compiled", "bf16"):
        compile_networks(learner, teachers, images)
    optimizer = build_optimizer(learner, student, stage.train)
    run = TrainingStep(learner, teachers, optimizer, stage, steps=2, per_epoch=2, seed=0)

    def step(x: Tensor = images, y: Tensor = labels) -> Tensor:
        return run(_in_format(x), y, HALF_WAY)["total"].detach()

    return step


def _fast(teacher: nn.Module, images: Tensor, *, bf16: bool) -> Teachers:
    teacher = in_fastest_format(bake(copy.deepcopy(teacher)))
    if not quant_layers(teacher):
        fold_batch_norm(teacher, images[:2])
    absorb_relus(teacher)
    if not bf16:
        return Teachers([teacher])
    return Teachers([to_bfloat16(teacher)], dtype=torch.bfloat16)


def _in_format(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


# -- rows --------------------------------------------------------------------------------------


class Bench:
    """The context of the rows here: a network of ours, and synthetic images of its size.

    Args:
        name: a registered network; options: of the network.
        batch_size: images a step, of shape (3, image_size, image_size).
    """

    def __init__(
        self,
        name: str,
        *,
        batch_size: int = 128,
        image_size: int = 32,
        num_classes: int = 10,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.options = options or {}
        self.batch_size = batch_size
        self.image_size = image_size
        self.num_classes = num_classes

    def make_model(self) -> nn.Module:
        """Fresh FP32 weights, contiguous."""
        return build_model(
            self.name,
            num_classes=self.num_classes,
            in_channels=3,
            image_size=self.image_size,
            options=self.options,
            seed=0,
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        """The same images and labels every time, contiguous."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator)
        return images, torch.randint(self.num_classes, (self.batch_size,), generator=generator)

    def teacher(self, bits: int = 32) -> nn.Module:
        """The same network in evaluation mode, in FP32 or as a quantized rung of ours."""
        model = self.make_model()
        if bits < 32:
            images, _ = self.batch()
            stage = StageConfig(weight_bits=bits, activation_bits=bits)
            model = quantize_model(model, policy_of(stage), batches=[images])
            calibrate(model, [images])
        return model.eval()

    def with_options(self, **options: Any) -> Bench:
        """The same with other options of the network."""
        return Bench(
            self.name,
            batch_size=self.batch_size,
            image_size=self.image_size,
            num_classes=self.num_classes,
            options={**self.options, **options},
        )


class Row(NamedTuple):
    """A line of the table: what is measured, and against which other row."""

    name: str
    what: str
    make: Callable[[Bench], Run]
    base: str = "fp32"


def plain_step(
    ctx: Bench,
    *,
    channels_last: bool = False,
    compiled: bool = False,
    quantize: Callable[[nn.Module, Tensor], nn.Module] | None = None,
    teacher: nn.Module | None = None,
    follow: bool = True,
) -> Run:
    """A training step as everybody writes it, in plain PyTorch.

    Args:
        quantize: makes the network another one.
        teacher: run in evaluation mode; follow: whether the student follows it.
    """
    images, labels = ctx.batch()
    model = ctx.make_model().train()
    if quantize is not None:
        model = quantize(model, images)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), _in_format(images)
    if compiled:
        model.compile(dynamic=False)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=SPEED_ONLY, momentum=0.9, nesterov=True, fused=True
    )

    def step() -> Tensor:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        if teacher is not None:
            with torch.no_grad():
                target = teacher(images)
            if follow:
                pair = logits.log_softmax(1), target.log_softmax(1)
                loss = (loss + F.kl_div(*pair, reduction="batchmean", log_target=True)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def rows() -> list[Row]:
    """Every row of the default table, in order."""
    found = [
        Row("fp32", "FP32, contiguous", plain_step),
        Row("fp32-cl", "FP32, channels_last", partial(plain_step, channels_last=True)),
        Row("fp32-compiled", "FP32, channels_last, compiled", _compiled_fp32),
        Row("fp32+t", "FP32, contiguous, and a teacher's forward pass", _beside_a_teacher),
        Row("textbook", "LSQ W4A4, detach tricks, contiguous", _textbook),
        Row("textbook-kd", "... FP32 teacher", partial(_textbook, taught=32)),
        Row("textbook-kd-rung", "... 8-bit teacher, quantized anew", partial(_textbook, taught=8)),
        Row("brevitas", "Brevitas W4A4, learned scales", partial(_peer, name="brevitas")),
        Row("torchao", "torchao PT2E W8A8", partial(_peer, name="torchao")),
    ]
    for mode in MODES:
        own, rung = partial(kd_step, mode=mode), partial(kd_step, mode=mode, bits=8)
        mixed = partial(_bf16_teacher, mode=mode)
        found.append(Row(f"ours-{mode}", "W4A4 LSQ", partial(qat_step, mode=mode)))
        found.append(Row(f"ours-kd-{mode}", "... FP32 teacher", own))
        found.append(Row(f"ours-kd-rung-{mode}", "... baked 8-bit rung as teacher", rung))
        if not mode.startswith("bf16"):
            found.append(Row(f"ours-kd-bf16-teacher-{mode}", "... FP32 teacher in bf16", mixed))
    for bits in (2, 4, 8):
        alone = f"ours-w{bits}a{bits}" if bits != 4 else "ours-eager"
        if bits != 4:
            found.append(Row(alone, f"W{bits}A{bits} LSQ", partial(our_step, bits=bits)))
        bins = BinRegularizationConfig(weight=1.0)
        pulled = partial(our_step, bits=bits, bin_regularization=bins)
        found.append(Row(f"{alone}-wbr", "... W-BR", pulled, base=alone))
    bins = BinRegularizationConfig(activation=1.0)
    pulled = partial(our_step, bin_regularization=bins)
    found.append(Row("ours-eager-abr", "W4A4 LSQ, A-BR", pulled, base="ours-eager"))
    return found


def quantizer_rows(names: Sequence[str], widths: Sequence[int]) -> list[Row]:
    """A row for each method at each width that it takes, and the FP32 steps that it is held to.

    A method that takes signed activations alone stands in the network with RPReLU.
    """
    from admitted import admitted

    admitted_rows, _ = admitted(names, widths, controls=False)
    found = [Row("fp32-cl", "FP32, channels_last", partial(plain_step, channels_last=True))]
    if any(row.signed for row in admitted_rows):
        what = "FP32, channels_last, RPReLU"
        found.append(Row("fp32-cl-rprelu", what, partial(_signed, of=found[0].make)))
    for row in admitted_rows:
        choice = QuantizerConfig(
            weight=Component(name=row.weight), activation=Component(name=row.activation)
        )
        make = partial(our_step, bits=row.bits, quantizer=choice)
        tail = " on signed inputs" if row.signed else ""
        found.append(
            Row(
                f"{row.quantizer} W{row.bits}A{row.bits}",
                f"{row.methods()}{tail}",
                partial(_signed, of=make) if row.signed else make,
                base="fp32-cl-rprelu" if row.signed else "fp32-cl",
            )
        )
    return found


def _compiled_fp32(ctx: Bench) -> Run:
    return plain_step(ctx, channels_last=True, compiled=True)


def _beside_a_teacher(ctx: Bench) -> Run:
    return plain_step(ctx, teacher=ctx.teacher(), follow=False)


def _textbook(ctx: Bench, *, taught: int | None = None) -> Run:
    """Args: taught: the bits of its teacher, an FP32 network or fake-quantized in each step."""
    from textbook import textbook

    teacher = ctx.teacher() if taught else None
    if taught == 8:
        assert teacher is not None
        teacher = textbook(teacher, ctx.batch()[0], bits=8)
    return plain_step(ctx, quantize=partial(textbook, bits=4), teacher=teacher)


def _bf16_teacher(ctx: Bench, *, mode: Mode) -> Run:
    return our_step(ctx, ctx.teacher(), mode=mode, teacher_bf16=True)


def _signed(ctx: Bench, *, of: Callable[[Bench], Run]) -> Run:
    return of(ctx.with_options(activation="rprelu"))


def _peer(ctx: Bench, *, name: str) -> Run:
    import peers

    return plain_step(ctx, quantize=getattr(peers, name))


# -- goals -------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """What a row may cost, as a multiple of another one; of several rows the best one counts."""

    what: str
    of: tuple[str, ...]
    base: str
    limit: float

    def line(self, cases: Mapping[str, Case]) -> list[str] | None:
        """Cells of the table of goals; None where a row was not measured."""
        measured = [cases[name] for name in self.of if name in cases]
        if not measured or self.base not in cases:
            return None
        best = min(measured, key=lambda case: case.ratio(cases[self.base]))
        ratio = best.ratio(cases[self.base])
        verdict = "met" if ratio <= self.limit else f"missed by {ratio - self.limit:.3f}"
        return [self.what, best.name, self.base, f"{self.limit:.2f}", f"{ratio:.3f}", verdict]


def goals(network: str) -> list[Goal]:
    """Those of a network; the regularizer of weights may cost a little more in a wide one."""
    bins = 1.03 if network == "cifar_resnet18" else 1.02
    return [
        Goal("LSQ, eager / FP32 contiguous", ("ours-eager",), "fp32", 1.00),
        Goal("LSQ, eager / FP32 channels_last", ("ours-eager",), "fp32-cl", 1.32),
        Goal("LSQ, compiled / FP32 compiled", ("ours-compiled",), "fp32-compiled", 1.06),
        Goal("KD, FP32 teacher, eager", ("ours-kd-eager",), "fp32+t", 0.96),
        Goal("KD, bf16 teacher, eager", ("ours-kd-bf16-teacher-eager",), "fp32+t", 0.90),
        Goal("KD, FP32 teacher, compiled", ("ours-kd-compiled",), "fp32+t", 0.80),
        Goal(
            "KD, 8-bit rung as teacher, best of FP32",
            ("ours-kd-rung-eager", "ours-kd-rung-compiled"),
            "fp32+t",
            0.85,
        ),
        Goal("KD, bf16, best", ("ours-kd-bf16-eager", "ours-kd-bf16"), "fp32+t", 0.56),
        Goal("W-BR at 2 bits", ("ours-w2a2-wbr",), "ours-w2a2", bins),
        Goal("W-BR at 4 bits", ("ours-eager-wbr",), "ours-eager", bins),
        Goal("W-BR at 8 bits", ("ours-w8a8-wbr",), "ours-w8a8", bins),
        Goal("A-BR", ("ours-eager-abr",), "ours-eager", 1.35),
    ]


# -- measuring ---------------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    chosen = choose(args)
    if args.alone is not None:
        print(peak_of(next(row for row in chosen if row.name == args.alone), args))
        return
    text = memory_report(chosen, args) if args.memory else time_report(chosen, args)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="preact_resnet20")
    parser.add_argument("--rows", nargs="+", metavar="GLOB", help="only these, and their bases")
    parser.add_argument(
        "--quantizers", nargs="*", metavar="NAME", help="rows of these methods; alone: of all"
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4], help="of --quantizers")
    parser.add_argument("--memory", action="store_true", help="peak memory, in place of time")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the table goes as well")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # a row of --memory, in its process
    return parser.parse_args()


def choose(args: argparse.Namespace) -> list[Row]:
    """The rows that were asked for, in order, each with those that it is held to."""
    if args.quantizers is not None:
        every = quantizer_rows(args.quantizers or list(QUANTIZERS), args.bits)
    else:
        every = rows()
    wanted = {
        row.name
        for row in every
        if not args.rows or any(fnmatch.fnmatchcase(row.name, glob) for glob in args.rows)
    }
    if not wanted:
        sys.exit(f"no such row; there are: {', '.join(row.name for row in every)}")
    wanted |= {row.base for row in every if row.name in wanted}
    return [row for row in every if row.name in wanted]


def bench_of(args: argparse.Namespace) -> Bench:
    torch.manual_seed(0)
    # each compiled row counts as one more variant of the same code
    allow_variants()
    return Bench(args.network, batch_size=args.batch_size)


def time_report(chosen: Sequence[Row], args: argparse.Namespace) -> str:
    """All rows in turns; the table, and the goals whose rows are in it."""
    from peers import NotInstalledError, installed
    from tabulate import tabulate
    from timing import Case, in_turns, where_and_how

    keep_freed_memory()
    bench, cases, failed = bench_of(args), {}, []
    for row in chosen:
        try:
            cases[row.name] = Case(row.name, row.make(bench))
        except (NotInstalledError, ValueError, RuntimeError) as error:
            failed.append(f"- {row.name}: {str(error).partition(chr(10))[0]}")
    in_turns(list(cases.values()), rounds=args.rounds, warm_up=args.warm_up)
    lines = []
    for row in (row for row in chosen if row.name in cases):
        case = cases[row.name]
        based = [cases.get(base) for base in (row.base, "fp32+t")]
        lines.append(
            {
                "row": row.name,
                "what": row.what,
                "ms": f"{1e3 * case.median:.1f}",
                "from": f"{1e3 * min(case.seconds):.1f}",
                "to": f"{1e3 * max(case.seconds):.1f}",
                "disturbed": case.disturbed or "",
                "x base": f"{case.ratio(based[0]):.3f}" if based[0] else "",
                "base": row.base,
                "x (fp32+t)": f"{case.ratio(based[1]):.3f}" if based[1] else "",
            }
        )
    head = (
        f"One training step, {args.network}, batch {args.batch_size}, 3x32x32; n = {args.rounds} "
        f"rounds after {args.warm_up}, freed memory kept. {where_and_how()}. Brevitas "
        f"{installed('brevitas')}, torchao {installed('torchao')}."
    )
    parts = [head, tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)]
    if reached := [line for goal in goals(args.network) if (line := goal.line(cases))]:
        headers = ("goal", "row", "base", "at most", "found", "")
        table = tabulate(reached, headers, tablefmt="github", disable_numparse=True)
        parts += ["Goals, as multiples of the base:", table]
    if failed:
        parts += ["Not measured:", "\n".join(failed)]
    return "\n\n".join(parts)


# -- memory ------------------------------------------------------------------------------------

MEMORY_STEPS = 3
MEMORY_GOAL = 130.0  # MiB above the FP32 step, ResNet-20 at batch 128


def memory_report(chosen: Sequence[Row], args: argparse.Namespace) -> str:
    """The peak of each row in a process of its own, and how far above the FP32 step's."""
    from tabulate import tabulate
    from timing import where_and_how

    if not any(row.name == "fp32" for row in chosen):
        chosen = [Row("fp32", "FP32, contiguous", plain_step), *chosen]
    peaks: dict[str, float] = {}
    lines = []
    for row in chosen:
        words = [sys.executable, __file__, *sys.argv[1:], "--alone", row.name]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            lines.append([row.name, row.what, "", "", said])
            continue
        peaks[row.name] = float(done.stdout.split()[-1])
        above = peaks[row.name] - peaks["fp32"]
        verdict = ""
        if row.name == "ours-eager":
            over = above - MEMORY_GOAL
            verdict = "met" if over <= 0 else f"missed by {over:.0f}"
            verdict = f"at most {MEMORY_GOAL:.0f}: {verdict}"
        lines.append([row.name, row.what, f"{peaks[row.name]:.0f}", f"{above:+.0f}", verdict])
        print(row.name, file=sys.stderr)
    head = (
        f"Peak resident memory, MiB, {args.network}, batch {args.batch_size}, {MEMORY_STEPS} "
        f"steps in a fresh process each (n = 1), all imports included. {where_and_how()}."
    )
    headers = ("row", "what", "peak", "above fp32", "goal")
    return f"{head}\n\n{tabulate(lines, headers, tablefmt='github', disable_numparse=True)}"


def peak_of(row: Row, args: argparse.Namespace) -> float:
    """MiB that this process has come to at most, once the row has made its steps."""
    step = row.make(bench_of(args))
    for _ in range(MEMORY_STEPS):
        step()
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


if __name__ == "__main__":
    main()
