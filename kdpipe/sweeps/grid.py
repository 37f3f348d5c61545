"""The cells of a sweep: from the values on the command line to the runs that are to be trained."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from kdpipe.assembly import KnownTeachers, build_parts
from kdpipe.settings import config as settings
from kdpipe.settings.identity import canonical

# In the names of runs; the order is theirs there too.
SHORT = {"loss.alpha": "a", "loss.temperature": "T", "seed": "s"}
Axes = dict[str, list[str]]


@dataclass(frozen=True)
class Composed:
    """A cell of a grid: overrides of Hydra, and the config that they compose."""

    overrides: tuple[str, ...]
    config: DictConfig

    @property
    def identity(self) -> str:
        return settings.run_identity(self.config)


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        name: what it differs in from the others, such as a0.5_T4_s0.
        overrides: of Hydra, that compose its config.
        tags: what it is found by when it is finished.
        teacher: the run or file that its teacher's weights are from; "" where it has none.
    """

    name: str
    overrides: tuple[str, ...]
    config: DictConfig
    tags: dict[str, str]
    teacher: str

    @property
    def identity(self) -> str:
        return self.tags["kdpipe.identity"]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / "runs" / self.identity


def expand(sweeper: BasicSweeper, arguments: Sequence[str]) -> tuple[Axes, list[list[str]]]:
    """The grid's axes, key by key, and the overrides of each of its cells.

    Raises:
        ValueError: an empty grid, or a value that an axis has twice.
    """
    assert sweeper.hydra_context
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    overrides = parser.parse_overrides(list(arguments))
    axes: Axes = {}
    for override in overrides:
        key = override.get_key_element()
        axes.pop(key, None)  # the last one counts
        if override.is_discrete_sweep():
            axes[key] = list(override.sweep_string_iterator())
            values = canonical(list(override.sweep_iterator()))
            if not values:
                raise ValueError(f"{override.input_line}: the grid is empty; at least one value is accepted")
            if twice := [text for n, text in enumerate(axes[key]) if values[n] in values[:n]]:
                raise ValueError(f"{key}={twice[0]}: in the grid twice; each value once is accepted")
        elif override.is_sweep_override():
            raise ValueError(f"{override.input_line}: a list is accepted, {key}=1,2 or {key}=range(1,3)")
    return axes, sweeper.split_arguments(overrides, None)[0]


def compose(sweeper: BasicSweeper, overrides: Sequence[str]) -> Composed:
    """One cell, with Hydra's own part in its config."""
    assert sweeper.hydra_context and sweeper.config
    loader = sweeper.hydra_context.config_loader
    return Composed(tuple(overrides), loader.load_sweep_config(sweeper.config, list(overrides)))


def check_shared(configs: Sequence[DictConfig]) -> None:
    """Raise ValueError where cells differ in what is the whole sweep's."""
    for key in (
        "tracking.uri",
        "tracking.experiment",
        "output_dir",
        "sweep.confirm_seeds",
        "sweep.rerun",
        "train.resume",
    ):
        values = {str(OmegaConf.select(config, key)) for config in configs}
        if len(values) > 1:
            raise ValueError(f"{key}={','.join(sorted(values))}: one value for the whole sweep is accepted")


def plan(
    axes: Axes, cells: Sequence[Composed], tracker: Any, teachers: KnownTeachers, link: int | None = None
) -> list[Planned]:
    """The runs of cells; cells that are the same run (at alpha 0, whatever the temperature) are planned once. Data,
    teachers and networks are built here, so that what is wrong with them is known before anything trains.

    Args:
        link: the number of the link of a chain that the cells are of.
    """
    planned: dict[str, Planned] = {}
    for cell in cells:
        if cell.identity in planned:
            continue
        HydraConfig.instance().set_config(cell.config)  # messages name the command
        parts = build_parts(cell.config, tracker, teachers)
        name = name_of(axes, cell.overrides, cell.config)
        if link is not None:
            name = f"{link}_{cell.config.model.name}_{name}"
            if name in [run.name for run in planned.values()]:  # they are alike but for their teachers
                name = f"{name}_{parts.teacher_source[:8]}"
        planned[cell.identity] = Planned(name, cell.overrides, cell.config, parts.tags, parts.teacher_source)
    return list(planned.values())


def name_of(axes: Axes, overrides: Sequence[str], config: DictConfig) -> str:
    """What a cell differs in from the others, then alpha, temperature and seed, without what has no effect on it:
    a0.5_T4_s0, a0_s0, lr0.01_a0.5_T4_s0."""
    effective = settings.effective_settings(config)
    parts = []
    for override in overrides:
        key, _, chosen = override.partition("=")
        target = key.lstrip("+").rpartition("@")[2]  # model@teacher is a group whose keys stand under teacher
        if key not in axes or key in SHORT:
            continue
        if target in effective:
            parts.append(target.rpartition(".")[2] + _written(config, target))
        elif any(known.startswith(f"{target}.") for known in effective):
            parts.append(chosen)
    return "_".join([*parts, *(short + _written(config, key) for key, short in SHORT.items() if key in effective)])


def _written(config: DictConfig, key: str) -> str:
    return _in_short(OmegaConf.select(config, key))


def _in_short(value: object) -> str:
    if isinstance(value, ListConfig):
        return "+".join(map(_in_short, value))
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"runs:/(\w{8})\w+", r"\1", str(value))  # MLflow's ids differ in their first digits


def identity_of(planned: Sequence[Planned], later: Sequence[Sequence[Composed]] = ()) -> str:
    """The sweep's 12 hex digits: a hash of its cells' identities, and of the images and teachers that they found.

    Args:
        later: the links of a chain after the first, as they are known before they are trained.
    """
    found = sorted((run.identity, run.tags["kdpipe.inputs"]) for run in planned)
    text = json.dumps([*found, *(sorted({cell.identity for cell in cells}) for cells in later)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe(axes: Axes) -> str:
    """The grid in one line, "" where there is one cell."""
    return " × ".join(f"{key}={','.join(values)}" for key, values in axes.items())
