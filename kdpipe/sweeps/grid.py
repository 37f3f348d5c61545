"""The cells of a sweep: from the values on the command line to the runs that are to be trained."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from kdpipe.assembly.parts import build_parts
from kdpipe.assembly.run_networks import with_networks_of_runs
from kdpipe.assembly.teachers import KnownTeachers
from kdpipe.settings.composition import Invocation, read_settings
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.hydra_errors import HYDRA_ERRORS, explain
from kdpipe.settings.identity import OF_LABELS, canonical, flatten
from kdpipe.settings.overrides import names_as_typed
from kdpipe.settings.schema import Section, Settings

if TYPE_CHECKING:
    from kdpipe.tracking import Tracker

# In the names of runs; the order is theirs there too.
SHORT = {"loss.alpha": "a", "loss.temperature": "T", "seed": "s"}
# What all cells of a sweep share.
SHARED = (
    "tracking.uri",
    "tracking.experiment",
    "output_dir",
    "sweep.confirm_seeds",
    "sweep.rerun",
    "train.resume",
    "train.metric",
)
Axes = dict[str, list[str]]


@dataclass(frozen=True)
class GridCell:
    """A cell of a grid: overrides of Hydra, and the settings that they compose."""

    overrides: tuple[str, ...]
    settings: Settings
    invocation: Invocation

    @property
    def identity(self) -> str:
        return self.settings.identity


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: what it differs in from the others, such as a0.5_T4_s0.
        tags: what it is found by when it is finished.
        teacher: the run or file that its teacher's weights come from; "" where it has none.
    """

    name: str
    cell: GridCell
    tags: dict[str, str]
    teacher: str

    @property
    def overrides(self) -> tuple[str, ...]:
        return self.cell.overrides

    @property
    def settings(self) -> Settings:
        return self.cell.settings

    @property
    def identity(self) -> str:
        return self.cell.identity

    @property
    def folder(self) -> Path:
        return self.settings.folder


def expand(sweeper: BasicSweeper, arguments: Sequence[str]) -> tuple[Axes, list[list[str]]]:
    """The axes of the grid, key by key, and the overrides of each of its cells.

    Raises:
        ConfigError: an empty grid, or an axis with a value twice.
    """
    assert sweeper.hydra_context
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    overrides = parser.parse_overrides([names_as_typed(word) for word in arguments])
    axes: Axes = {}
    for override in overrides:
        key = override.get_key_element()
        axes.pop(key, None)  # the last one counts
        if override.is_discrete_sweep():
            axes[key] = list(override.sweep_string_iterator())
            values = canonical(list(override.sweep_iterator()))
            if not values:
                raise ConfigError(str(override.input_line), expected="at least one value", problem="the grid is empty")
            if twice := [text for n, text in enumerate(axes[key]) if values[n] in values[:n]]:
                raise ConfigError(key, twice[0], "each value once", "it is in the grid twice")
        elif override.is_sweep_override():
            raise ConfigError(
                str(override.input_line),
                expected=f"a list, {key}=1,2 or {key}=range(1,3), or search.trials=40 to search in it",
            )
    return axes, sweeper.split_arguments(overrides, None)[0]


def compose_cell(sweeper: BasicSweeper, overrides: Sequence[str]) -> GridCell:
    """One cell.

    Raises:
        ValueError: a key or a value that it cannot have.
    """
    assert sweeper.hydra_context and sweeper.config
    try:
        config = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(overrides))
        invocation = Invocation.of(config.hydra)
        return GridCell(
            tuple(overrides), with_networks_of_runs(read_settings(config, invocation), invocation), invocation
        )
    except HYDRA_ERRORS as error:
        raise ValueError(explain(error, overrides)) from error


def check_shared(cells: Sequence[Settings]) -> None:
    """Raise ConfigError where cells differ in what all of a sweep share."""
    flat = [flatten(settings.plain) for settings in cells]
    for key in SHARED:
        values = {str(settings.get(key)) for settings in flat}
        if len(values) > 1:
            raise ConfigError(key, ",".join(sorted(values)), "one value for the whole sweep")


def plan(
    axes: Axes, cells: Sequence[GridCell], tracker: "Tracker", teachers: KnownTeachers, link: int | None = None
) -> list[PlannedRun]:
    """The runs of cells; cells that are the same run (at alpha 0, whatever the temperature) are planned once. Data,
    teachers and networks are built here, so that what is wrong with them is known before anything trains.

    Args:
        link: the number of the link of a chain that the cells belong to.
    """
    planned: dict[str, PlannedRun] = {}
    for cell in cells:
        if cell.identity in planned:
            continue
        parts = build_parts(cell.settings, cell.invocation, tracker, teachers)
        name = name_of(axes, cell)
        if link is not None:
            name = f"{link}_{cell.settings.model.name}_{name}"
            if name in [run.name for run in planned.values()]:  # they differ in their teachers only
                name = f"{name}_{parts.teacher_source[:8]}"
        planned[cell.identity] = PlannedRun(name, cell, parts.tags, parts.teacher_source)
    return list(planned.values())


def is_of_method(override: str) -> bool:
    """Whether an override sets what is the loss's own, rather than what any loss makes of the labels."""
    key = override.partition("=")[0].lstrip("+~")
    return key.startswith("loss.") and key not in OF_LABELS


def name_of(axes: Axes, cell: GridCell) -> str:
    """What a cell differs in from the others, then alpha, temperature and seed, without what has no effect on it:
    a0.5_T4_s0, a0_s0, lr0.01_a0.5_T4_s0."""
    effective, values = cell.settings.effective, flatten(cell.settings.plain)
    parts = []
    for override in cell.overrides:
        key, _, chosen = override.partition("=")
        target = key.lstrip("+").rpartition("@")[2]  # model@teacher is a group whose keys stand under teacher
        if key not in axes or key in SHORT:
            continue
        if target in effective:
            parts.append(target.rpartition(".")[2] + _in_short(values[target]))
        elif any(known.startswith(f"{target}.") for known in effective):
            parts.append(chosen)
    return "_".join([*parts, *(short + _in_short(values[key]) for key, short in SHORT.items() if key in effective)])


def _in_short(value: object) -> str:
    if isinstance(value, list):
        return "+".join(map(_in_short, value))
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"runs:/(\w{8})\w+", r"\1", str(value))  # MLflow's ids differ in their first digits


def sweep_identity(planned: Sequence[PlannedRun], later: Sequence[Sequence[GridCell]] = ()) -> str:
    """The sweep's 12 hex digits: a hash of its cells' identities, and of the images and teachers that they found.

    Args:
        later: the links of a chain after the first, as they are known before they are trained.
    """
    found = sorted((run.identity, run.tags["kdpipe.inputs"]) for run in planned)
    text = json.dumps([*found, *(sorted({cell.identity for cell in cells}) for cells in later)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def as_override(key: str, section: Section) -> str:
    """The override that passes a section of the settings to a job."""
    values = (f"{name}:{json.dumps(value, ensure_ascii=False)}" for name, value in section.plain.items())
    return f"{key}={{{','.join(values)}}}"


def describe(axes: Axes) -> str:
    """The grid in one line, "" where there is one cell."""
    return " × ".join(f"{key}={','.join(values)}" for key, values in axes.items())
