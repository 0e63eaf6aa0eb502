"""From a study's YAML to its trials: one ladder for each arm, seed and fold.

Nothing runs here. Arms that begin alike have the same keys for what they share, so those stages
are trained once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..config_load import read_config, shipped_or_file
from ..data import DATASETS
from ..errors import ConfigError
from ..plan import make_plan
from ..spec import Plan, digest
from ..yaml_reader import apply_overrides, read_yaml_file
from .changes import Raw, changed, parse_named
from .config import ArmConfig, Sections, StudyConfig, read_sections
from .controls import control
from .questions import Candidates, Comparison, candidates_of, comparisons_of

SHIPPED = Path(__file__).parents[2] / "flows" / "studies"
MAX_TRIALS = 10_000


@dataclass(frozen=True)
class Trial:
    """One ladder of a study."""

    arm: str
    seed: int
    fold: int | None
    config: RunConfig

    @property
    def name(self) -> str:
        """For people: `arm, seed 3, fold 1`."""
        fold = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.arm}, seed {self.seed}{fold}"

    @cached_property
    def plan(self) -> Plan:
        """Its stages with their keys."""
        return make_plan(self.config)


@dataclass(frozen=True)
class Study:
    """Arms x seeds (x folds), and what is asked of them.

    Attributes:
        trials: arm-major: all seeds of the first arm, then of the next.
        folds: how many parts the data are tested in, one a trial; None: the one test set.
        comparisons: family by family.
    """

    name: str
    trials: tuple[Trial, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: int | None
    comparisons: tuple[Comparison, ...]
    choose: Candidates | None

    @cached_property
    def id(self) -> str:
        """Its name and 8 hex digits of what its trials train."""
        trials = [
            [trial.arm, [[stage.name, stage.key] for stage in trial.plan.stages]]
            for trial in self.trials
        ]
        return f"{self.name}-{digest(trials)[:8]}"


def shipped_studies() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    found = sorted(SHIPPED.rglob("*.yaml"))
    return {str(path.relative_to(SHIPPED).with_suffix("")): path for path in found}


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a shipped study by name, or a YAML file.

    Raises:
        ConfigError: one line for each mistake, with its YAML path; or the data are not there.
    """
    path = shipped_or_file("study", source, shipped_studies())
    sections = read_sections(apply_overrides(read_yaml_file(path), list(overrides)))
    study, errors = sections.study, list(sections.errors)
    seeds, found = _seeds(study.seeds)
    errors += found
    if not study.arms:
        errors.append("arms: has no arm; give at least one, such as `ladder: {}`")
    try:
        configs, found = _arms(_base(study, path.parent), sections)
    except ConfigError as error:
        raise ConfigError([*errors, *error.errors]) from None
    errors += found + _check_folds(study, configs)
    comparisons, found = comparisons_of(sections, configs)
    errors += found
    candidates, found = candidates_of(sections, configs)
    errors += found
    folds = list(range(study.folds)) if study.folds else [None]
    if len(configs) * len(seeds) * len(folds) > MAX_TRIALS:
        errors.append(f"seeds: more than {MAX_TRIALS} trials")
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
    trials = tuple(
        Trial(arm, seed, fold, _trial_config(study, arm, config, seed, fold))
        for arm, config in configs.items()
        for seed in seeds
        for fold in folds
    )
    loaded = Study(study.name, trials, tuple(configs), seeds, study.folds, comparisons, candidates)
    if errors := _same_stages(loaded):
        raise ConfigError(errors)
    return loaded


def _base(study: StudyConfig, folder: Path) -> Raw:
    """The config that every arm begins with: the base with the study's own changes."""
    try:
        raw = _read_base(study.base, folder)
        named, _ = parse_named({"name": study.name, **raw})
    except ConfigError as error:
        raise ConfigError([f"base: {line}" for line in error.errors]) from None
    return changed(named, study, "")[0]


def _read_base(base: str | Raw, folder: Path) -> Raw:
    if isinstance(base, dict):
        return base
    is_file = base.endswith((".yaml", ".yml"))
    return read_yaml_file(folder / base) if is_file else read_config(base)


def _arms(base: Raw, sections: Sections) -> tuple[dict[str, RunConfig], list[str]]:
    """Every arm's ladder in the order of the YAML, without those with mistakes; the mistakes."""
    configs: dict[str, RunConfig] = {}
    errors: list[str] = []
    for name, arm in sections.arms.items():
        where = f"arms.{name}"
        if arm.control is None:
            errors += [
                f"{where}.{key}: is for controls; give control: equal_compute or restarts"
                for key in ("of", "stage")
                if getattr(arm, key) is not None
            ]
            try:
                configs[name] = changed(base, arm, where)[1]
            except ConfigError as error:
                errors += error.errors
    ladders = dict(configs)
    for name, arm in sections.arms.items():
        if arm.control is None:
            continue
        where = f"arms.{name}"
        try:
            _check_of(name, arm, sections)
            if arm.of in ladders:  # else its own mistakes are told
                configs[name] = control(ladders[arm.of], arm, where)
        except ConfigError as error:
            errors += error.errors
    return {name: configs[name] for name in sections.arms if name in configs}, errors


def _check_of(name: str, arm: ArmConfig, sections: Sections) -> None:
    ladders = [other for other, config in sections.arms.items() if config.control is None]
    if arm.of is None:
        raise ConfigError([f"arms.{name}.of: is missing; say which arm it controls"])
    if arm.of not in ladders:
        what = "is a control itself" if arm.of in sections.arms else "is no arm"
        raise ConfigError([f"arms.{name}.of: {arm.of!r} {what}; known: {', '.join(ladders)}"])


def _seeds(seeds: int | list[int]) -> tuple[tuple[int, ...], list[str]]:
    if isinstance(seeds, int):
        if seeds < 1:
            return (), [f"seeds: must be at least 1, not {seeds}"]
        return tuple(range(seeds)), []
    errors = [
        f"seeds.{i}: must be 0 or more, not {seed}" for i, seed in enumerate(seeds) if seed < 0
    ]
    if len(set(seeds)) < len(seeds):
        errors.append("seeds: one stands there twice")
    if not seeds:
        errors.append("seeds: has none; give a number of seeds, or a list of them")
    return tuple(seeds), errors


def _check_folds(study: StudyConfig, configs: Mapping[str, RunConfig]) -> list[str]:
    errors = []
    for arm, config in configs.items() if study.folds else ():
        name = config.data.name
        if not {"fold", "folds"} <= set(DATASETS[name].options()):
            folded = [known for known in DATASETS if "fold" in DATASETS[known].options()]
            errors.append(
                f"folds: data set {name!r} has no option fold (arm {arm!r}); those that "
                f"have it: {', '.join(folded)}"
            )
        if set(config.data.options) & {"fold", "folds"}:
            errors.append(f"folds: arm {arm!r} has data.fold or data.folds as well; leave it out")
    return errors


def _trial_config(
    study: StudyConfig, arm: str, config: RunConfig, seed: int, fold: int | None
) -> RunConfig:
    part = "" if fold is None else f"f{fold}"
    changes: dict[str, Any] = {"name": f"{study.name}.{arm}"[:50] + f"-s{seed % 10**8}{part}"}
    if fold is not None:
        changes["data"] = config.data.model_copy(update={"fold": fold, "folds": study.folds})
    return config.model_copy(update={**changes, "seed": seed})


def _same_stages(study: Study) -> list[str]:
    """Arms, or two sides of a comparison, that are one and the same.

    Raises:
        ConfigError: the data are not there.
    """
    first: dict[tuple[str, ...], str] = {}
    keys: dict[tuple[str, str], str] = {}
    errors: dict[str, None] = {}
    for trial in study.trials:
        if (trial.seed, trial.fold) != (study.trials[0].seed, study.trials[0].fold):
            continue
        try:
            stages = trial.plan.stages
        except ConfigError as error:
            raise ConfigError([f"arms.{trial.arm}: {line}" for line in error.errors]) from None
        keys |= {(trial.arm, stage.name): stage.key for stage in stages}
        other = first.setdefault(tuple(stage.key for stage in stages), trial.arm)
        if other != trial.arm:
            names = ", ".join(stage.name for stage in stages)
            errors[
                f"arms.{trial.arm}: trains the same stages as arms.{other} ({names}); leave one out"
            ] = None
    for c in study.comparisons:
        if keys[c.arm, c.stage] == keys[c.against, c.against_stage]:
            errors[
                f"families.{c.family}: {c.stage} of {c.arm!r} and {c.against_stage} of "
                f"{c.against!r} are the same stage"
            ] = None
    return list(errors)
