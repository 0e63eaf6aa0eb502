"""The command line. Imports wait for the command that needs them, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import shipping
from .options import (
    DEFAULT_STORE,
    ConfigArgument,
    DatabaseOption,
    RunArgument,
    RunnerOption,
    SetOption,
    StoreOption,
    VerboseOption,
    open_store,
    quiet,
)

app = typer.Typer(
    name="bitladder",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take an image classifier down a ladder of bit widths, FP32 -> 8 -> 4 -> 2 -> 1. Each "
    "rung starts from the rung above and is distilled by it.\n\n"
    "Begin with [bold]bitladder run digits[/bold]: five rungs in 75 seconds on two cores.",
)


@app.command()
def run(
    config: ConfigArgument,
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    runner: RunnerOption = "prefect",
    verbose: VerboseOption = False,
) -> None:
    """Run a ladder; stages that are done are used again.

    bitladder run digits
    bitladder run my.yaml --set ladder.2.epochs=5 --set data.root=/data
    """
    from .commands import run_config

    run_config(config, set_ or [], open_store(store, database, verbose), runner)


@app.command()
def resume(
    run: Annotated[
        str | None,
        typer.Argument(help="A run's id, prefix or name; default: the newest unfinished one."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    runner: RunnerOption = "prefect",
    verbose: VerboseOption = False,
) -> None:
    """Go on with a ladder that was stopped, killed, or failed."""
    from .commands import resume_run

    resume_run(run, open_store(store, database, verbose), runner)


@app.command()
def plan(
    config: ConfigArgument,
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Show a ladder's stages, their keys and teachers, and which are done. Runs nothing."""
    from .commands import show_plan

    show_plan(config, set_ or [], open_store(store, database, verbose))


@app.command("list")
def list_(
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """List the ladders in the store with their state."""
    from .commands import list_runs

    list_runs(open_store(store, database, verbose))


@app.command()
def watch(
    run: RunArgument = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Follow a ladder that runs in another terminal, until it is done; then show its table.

    It reads the store and holds nothing of it: training does not notice. Where
    the ladder is killed or stopped it says so and waits for a resume; where a
    stage fails it ends with code 1.
    """
    from .watch import watch_run

    watch_run(run, open_store(store, database, verbose))


@app.command()
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs to show side by side; default: the newest.")
    ] = None,
    format_: Annotated[
        Literal["table", "csv", "json", "markdown", "html", "parquet", "png", "svg"],
        typer.Option(
            "--format",
            "-f",
            help="table is for the terminal; html is one page with all figures; png and svg are a "
            "file for each figure; the others are files.",
        ),
    ] = "table",
    out: Annotated[
        Path | None,
        typer.Option(help="Write to this file instead of standard output; a folder for png, svg."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Print or write the accuracy table of one ladder or several, finished or not."""
    from .commands import show_report

    show_report(runs or [], format_, out, open_store(store, database, verbose))


@app.command()
def study(
    config: Annotated[str, typer.Argument(help="A shipped study by name, or a YAML file.")],
    set_: SetOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-w",
            min=1,
            help="Trials at a time; default: one for each core, on a GPU one.",
        ),
    ] = None,
    runner: Annotated[
        Literal["processes", "dask", "ray"],
        typer.Option(help="Where they run; dask and ray are extras: bitladder\\[dask]."),
    ] = "processes",
    address: Annotated[
        str | None,
        typer.Option(
            help="A Dask or Ray cluster that runs, and sees the store under the same path; "
            "default: one of --workers on this machine.",
            metavar="URL",
        ),
    ] = None,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only", help="Tell what is there, and write its files again; run nothing."
        ),
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Compare ladders: run arms x seeds in parallel, and tell which differences are real.

    bitladder study my.yaml --workers 4
    bitladder study my.yaml --report-only

    A study is a ladder (base) with changes (arms), each run with several seeds:

    \b
      name: which-teacher
      base: digits
      seeds: 5
      arms:
        none:     {set: {distill: {weight: 0}}}
        previous: {}
        fp32:     {set: {distill: {teacher: fp32}}}
      families:
        teachers: [{arm: previous, against: none}, {arm: fp32, against: none}]

    A trial is one arm with one seed. What trials share is trained once.
    Stopped, killed or with an arm changed, the same command trains only what
    is missing. A trial whose loss becomes not finite counts as diverged, at
    chance, and is not tried again.

    Several workers train with one thread each. That number decides the last
    bits of a result: for the same bits with any --workers, set
    runtime.threads in the base.
    """
    from .study_run import StudyRun, run_study, show_study

    asked = StudyRun(config, tuple(set_ or ()), runner, workers, address)
    (show_study if report_only else run_study)(asked, open_store(store, database, verbose))


@app.command()
def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|FILE]",
            help="A run's id, a prefix or its name, default: newest; or a packed, ONNX or "
            "OpenVINO file.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="For a FILE: a config that names the data.")
    ] = None,
    set_: SetOption = None,
    stage: Annotated[
        str | None, typer.Option(help="One stage; default: all that are done.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure accuracy now; show each layer's scale, clip range, levels used, and what it costs.

    bitladder evaluate digits --stage w4a4
    bitladder evaluate w4a4.onnx --config digits

    Costs are of one image: millions of multiply-accumulates, and thousands of
    millions of bit operations, which are multiply-accumulates times the bits of
    weight and input. Bytes are of the weights in the packed file.
    """
    from .check_commands import evaluate_file, evaluate_run

    if run is not None and Path(run).is_file():
        quiet(verbose)
        evaluate_file(Path(run), config, set_ or [])
    else:
        evaluate_run(run, stage, open_store(store, database, verbose))


app.command()(shipping.export)
app.command()(shipping.predict)
app.command()(shipping.bench)


@app.command()
def profile(
    config: ConfigArgument,
    set_: SetOption = None,
    stage: Annotated[str | None, typer.Option(help="One rung; default: the last.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after three others.")] = 20,
    verbose: VerboseOption = False,
) -> None:
    """Show where the time of a training step goes, part by part. Trains and writes nothing.

    bitladder profile digits --stage w4a4
    bitladder profile my.yaml --set data.batch_size=256 --set runtime.threads=4

    The rungs above need not be there: all networks have fresh weights, which
    cost as much time as trained ones. The parts add up to the whole:

    \b
      data               until the next batch is there, augmented
      teacher            the forward passes of all teachers
      student forward    without its quantizers
      weight quantizers  forward and backward, as those of the inputs
      losses             labels, teachers, bins, dampening
      backward           of all else, into the weights
      optimizer          moving weights and steps
      after the step     gradients dropped, oscillation tracked, weights averaged

    Below stands the FP32 step of the same network: what is left to gain.
    """
    from .profile_command import profile_config

    quiet(verbose)
    profile_config(config, set_ or [], stage, steps)


@app.command()
def verify(
    run: Annotated[
        str | None, typer.Argument(help="A run's id, prefix or name; default: the whole store.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Check every recorded file against its checksum. Exit code 1 if one differs.

    With a RUN also its networks: each packed file against its checkpoint, the
    exported ones against it, and their accuracies, measured again.
    """
    from .check_commands import verify_store

    verify_store(run, open_store(store, database, verbose))


@app.command()
def components(
    kind: Annotated[
        str | None, typer.Argument(help="quantizers, models, data, losses, stages or configs.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One part, with all its options.")] = None,
    format_: Annotated[
        Literal["table", "markdown"],
        typer.Option("--format", "-f", help="table is for the terminal."),
    ] = "table",
) -> None:
    """List every quantizer, model, data set, loss and config with its options and source."""
    from .components import show_components

    quiet(False)
    show_components(kind, name, format_)


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    store: StoreOption = DEFAULT_STORE,
    database: DatabaseOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Remove stages that no ladder refers to, damaged ones, and old checkpoints."""
    from .commands import clean_store

    clean_store(open_store(store, database, verbose), yes=yes)


def main() -> None:
    """The console script: runs a command and turns an error into one message and an exit code."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        print("interrupted; go on with: bitladder resume", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from ..pipeline.errors import BitladderError

        if not isinstance(error, BitladderError):
            raise
        several = len(getattr(error, "errors", ())) > 1
        print(f"errors:\n{error}" if several else f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
