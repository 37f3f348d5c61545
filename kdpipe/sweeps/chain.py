"""Chains: links that are trained one after the other, each taught by the network that the one before it trained.

Born-again networks (Furlanello et al. 2018, https://arxiv.org/abs/1805.04770) are a chain of one network, teacher
assistants (Mirzadeh et al. 2020, https://arxiv.org/abs/1902.03393) one of several.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from kdpipe.settings.composition import to_plain
from kdpipe.settings.errors import ConfigError, as_typed
from kdpipe.settings.identity import OF_LABELS, flatten
from kdpipe.settings.overrides import names_as_typed
from kdpipe.sweeps.grid import Axes, GridCell, compose_cell


def links_of(sweeper: BasicSweeper, axes: Axes) -> list[list[str]]:
    """The overrides of each link of the chain; one link without any where there is no chain.

    Raises:
        ConfigError: a chain that is not a list of settings, or a setting that a link cannot have.
    """
    if "chain" in axes:
        raise ConfigError("chain", ",".join(axes["chain"]), "one chain")
    assert sweeper.config is not None and sweeper.hydra_context
    chain = sweeper.config.chain
    if chain is None:
        return [[]]
    chain = to_plain(chain)
    if not isinstance(chain, list) or not chain:
        raise ConfigError(
            "chain", chain, "a list of links, such as [{model:resnet56,loss:cross_entropy},{model:resnet20}]"
        )
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    links = [_overrides_of(number, link) for number, link in enumerate(chain, start=1)]
    for number, link in enumerate(links, start=1):
        for override in parser.parse_overrides(link):
            if problem := _problem(override, number, axes):
                raise ConfigError(f"chain: {override.input_line} in link {number}", problem=problem)
    return [[*link, "chain=null"] for link in links]  # the run of a link is a run like any other


def _overrides_of(number: int, link: object) -> list[str]:
    if not isinstance(link, Mapping):
        expected = "settings in braces, such as {model:resnet20,loss.alpha:0.9}, or {} for none"
        raise ConfigError(f"chain: {as_typed(link)} is link {number}", expected=expected)
    for key, value in link.items():
        if isinstance(value, Mapping):
            inner = next(iter(value), "key")
            raise ConfigError(f"chain: {key} in link {number}", expected=f"whole keys, such as {key}.{inner}")
    overrides = [f"{key}={value if isinstance(value, str) else _written(value)}" for key, value in link.items()]
    return [names_as_typed(override) for override in overrides]


def _problem(override: Override, number: int, axes: Axes) -> str:
    """Why a link cannot have a setting; "" where it can."""
    key = _key(override.get_key_element())
    if override.is_sweep_override():
        return "expected one value; axes belong to all links and are written outside of the chain"
    if key == "chain" or key.startswith(("hydra.", "hydra/")):
        return "it belongs to the whole chain and is written outside of it"
    if number > 1 and key in ("model@teacher", "teacher.weights"):
        return f"its teacher is link {number - 1}; only the first link can have another one"
    if number > 1 and key == "seed" and "seed" in axes:
        return "seed is an axis of the chain, and each link has its cell's; only the first link can have another one"
    return ""


def draft(sweeper: BasicSweeper, grid: Sequence[Sequence[str]], links: Sequence[Sequence[str]]) -> list[list[GridCell]]:
    """The cells of each link before any is trained: the run of a teacher has no id yet, and goes by its identity."""
    drafts = [compose_link(sweeper, grid, links[0])]
    for link in links[1:]:
        drafts.append(compose_link(sweeper, grid, link, [(cell, cell.identity) for cell in drafts[-1]]))
    return drafts


def compose_link(
    sweeper: BasicSweeper,
    grid: Sequence[Sequence[str]],
    link: Sequence[str],
    teachers: Sequence[tuple[GridCell, str]] | None = None,
) -> list[GridCell]:
    """The cells of one link.

    Args:
        grid: the overrides outside of the chain, of each cell.
        teachers: for a link after the first the cell of the run before, and its id, of each cell.
    """
    if teachers is None:
        return [compose_cell(sweeper, link_overrides(cell, link)) for cell in grid]
    return [
        compose_cell(sweeper, link_overrides(cell, link, taught_by(before, run_id)))
        for cell, (before, run_id) in zip(grid, teachers, strict=True)
    ]


def link_overrides(cell: Sequence[str], link: Sequence[str], teacher: Sequence[str] | None = None) -> list[str]:
    """The overrides of a link's run.

    Args:
        cell: those outside of the chain.
        link: its own, which win.
        teacher: those for its teacher, in links after the first.
    """
    return [*_kept(cell, link, teacher is not None), *(teacher or []), *link]


def taught_by(before: GridCell, run_id: str) -> list[str]:
    """The overrides that make the network of one run the teacher of the next."""
    network = {key: value for key, value in before.settings.model.plain.items() if key not in ("weights", "freeze")}
    return [
        f"model@teacher={before.invocation.choices['model']}",
        *(f"++teacher.{key}={_written(value)}" for key, value in flatten(network).items()),
        f"teacher.weights=runs:/{run_id}",
    ]


def check_links(cell: Sequence[str], links: Sequence[Sequence[str]], drafts: Sequence[Sequence[GridCell]]) -> None:
    """Raise ConfigError for an override that no link of a chain takes, and for a link that learns from no teacher."""
    if len(links) == 1:
        return
    used = {override for number, link in enumerate(links) for override in _kept(cell, link, number > 0)}
    for override in cell:
        if override not in used and _key(override) not in ("chain", "experiment"):
            raise ConfigError(override, problem="each link of the chain chooses this itself; write it in the chain")
    taught = [any(one.settings.needs_teacher for one in cells) for cells in drafts]
    for override in cell:
        if _is_of_teacher(override) and not taught[0]:
            problem = "the first link learns from none, each later one from the link before"
            raise ConfigError(override, problem=f"{problem}; model=… is the network of links that choose none")
    for number, (is_taught, cells) in enumerate(zip(taught[1:], drafts[1:], strict=True), start=2):
        if any(one.settings.teacher_learns for one in cells):
            raise ConfigError(
                "chain", problem=f"link {number} has two students and no teacher; only the first link can"
            )
        if not is_taught:
            loss = cells[0].settings.loss
            text = f"{loss.target}, alpha 0" if "alpha" in loss.arguments else loss.target
            raise ConfigError(
                "chain", problem=f"link {number} learns nothing from link {number - 1}, its loss is {text}"
            )


def networks_of(cells: Sequence[GridCell]) -> str:
    """What a link trains."""
    return " or ".join(dict.fromkeys(cell.settings.model.name for cell in cells))


def _kept(cell: Sequence[str], link: Sequence[str], has_link_before: bool) -> list[str]:
    """A cell's overrides without those for what a link chooses itself (with loss=cross_entropy goes no loss.alpha, but
    any loss has class weights and label smoothing), and for the teacher where it is the link before."""
    own = [_key(override) for override in link]
    of_own = [f"{key.rpartition('@')[2]}." for key in own if "." not in key]
    if "loss" in own:  # a second method belongs to the loss of other links
        of_own += ["loss@also", "also."]
    return [
        override
        for override in cell
        if _key(override) not in own
        and (_key(override) in OF_LABELS or not _key(override).startswith(tuple(of_own)))
        and not (has_link_before and _is_of_teacher(override))
    ]


def _is_of_teacher(override: str) -> bool:
    key = _key(override)
    return key == "model@teacher" or key.startswith("teacher.")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _written(value: Any) -> str:
    """In Hydra's grammar, which takes JSON for all but mappings."""
    return json.dumps(value, ensure_ascii=False)
