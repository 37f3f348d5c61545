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
from omegaconf import DictConfig, OmegaConf

from kdpipe.settings import config as settings
from kdpipe.settings.checks import as_typed
from kdpipe.settings.identity import flatten
from kdpipe.sweeps.grid import Axes, Composed, compose


def links_of(sweeper: BasicSweeper, axes: Axes) -> list[list[str]]:
    """The overrides of each link of the chain; one link without any where there is no chain.

    Raises:
        ValueError: a chain that is no list of settings, or a setting that a link cannot have.
    """
    if "chain" in axes:
        raise ValueError(f"chain={','.join(axes['chain'])}: one chain is accepted")
    assert sweeper.config is not None and sweeper.hydra_context
    chain = sweeper.config.chain
    if chain is None:
        return [[]]
    chain = OmegaConf.to_container(chain, resolve=True) if OmegaConf.is_config(chain) else chain
    if not isinstance(chain, list) or not chain:
        accepted = "a list of links is accepted, such as [{model:resnet56,loss:cross_entropy},{model:resnet20}]"
        raise ValueError(f"chain={as_typed(chain)}: {accepted}")
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    links = [_overrides_of(number, link) for number, link in enumerate(chain, start=1)]
    for number, link in enumerate(links, start=1):
        for override in parser.parse_overrides(link):
            if problem := _problem(override, number, axes):
                raise ValueError(f"chain: {override.input_line} in link {number}: {problem}")
    return [[*link, "chain=null"] for link in links]  # a link's run is a run like any other


def _overrides_of(number: int, link: object) -> list[str]:
    if not isinstance(link, Mapping):
        accepted = "settings in braces are accepted, such as {model:resnet20,loss.alpha:0.9}, or {} for none"
        raise ValueError(f"chain: {as_typed(link)} is link {number}: {accepted}")
    for key, value in link.items():
        if isinstance(value, Mapping):
            inner = next(iter(value), "key")
            raise ValueError(f"chain: {key} in link {number}: whole keys are accepted, such as {key}.{inner}")
    return [f"{key}={value if isinstance(value, str) else _written(value)}" for key, value in link.items()]


def _problem(override: Override, number: int, axes: Axes) -> str:
    """Why a link cannot have a setting; "" where it can."""
    key = _key(override.get_key_element())
    if override.is_sweep_override():
        return "one value is accepted; axes stand beside the chain, and are those of all links"
    if key == "chain" or key.startswith(("hydra.", "hydra/")):
        return "it is the whole chain's; beside the chain it is accepted"
    if number > 1 and key in ("model@teacher", "teacher.weights"):
        return f"its teacher is link {number - 1}; in the first link it is accepted"
    if number > 1 and key == "seed" and "seed" in axes:
        return "seed is an axis of the chain, and each link has its cell's; in the first link it is accepted"
    return ""


def draft(sweeper: BasicSweeper, grid: Sequence[Sequence[str]], links: Sequence[Sequence[str]]) -> list[list[Composed]]:
    """The cells of each link before any is trained: a teacher's run, which has no id yet, goes by its identity."""
    drafts = [compose_link(sweeper, grid, links[0])]
    for link in links[1:]:
        drafts.append(compose_link(sweeper, grid, link, [(cell.config, cell.identity) for cell in drafts[-1]]))
    return drafts


def compose_link(
    sweeper: BasicSweeper,
    grid: Sequence[Sequence[str]],
    link: Sequence[str],
    teachers: Sequence[tuple[DictConfig, str]] | None = None,
) -> list[Composed]:
    """The cells of one link.

    Args:
        grid: the overrides beside the chain, of each cell.
        teachers: for a link after the first the config and the id of the run before, of each cell.
    """
    if teachers is None:
        return [compose(sweeper, link_overrides(cell, link)) for cell in grid]
    return [
        compose(sweeper, link_overrides(cell, link, taught_by(config, run_id)))
        for cell, (config, run_id) in zip(grid, teachers, strict=True)
    ]


def link_overrides(cell: Sequence[str], link: Sequence[str], teacher: Sequence[str] | None = None) -> list[str]:
    """The overrides of a link's run.

    Args:
        cell: those beside the chain.
        link: its own, which win.
        teacher: those for its teacher, in links after the first.
    """
    return [*_kept(cell, link, teacher is not None), *(teacher or []), *link]


def taught_by(config: DictConfig, run_id: str) -> list[str]:
    """The overrides that make the network of one run the teacher of the next."""
    model = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(model, dict)
    network = {key: value for key, value in model.items() if key not in ("weights", "freeze")}
    return [
        f"model@teacher={config.hydra.runtime.choices.model}",
        *(f"++teacher.{key}={_written(value)}" for key, value in flatten(network).items()),  # type: ignore[arg-type]
        f"teacher.weights=runs:/{run_id}",
    ]


def check_links(cell: Sequence[str], links: Sequence[Sequence[str]], drafts: Sequence[Sequence[Composed]]) -> None:
    """Raise ValueError for an override that no link of a chain takes, and for a link that learns from no teacher."""
    if len(links) == 1:
        return
    used = {override for number, link in enumerate(links) for override in _kept(cell, link, number > 0)}
    for override in cell:
        if override not in used and _key(override) not in ("chain", "experiment"):
            raise ValueError(f"{override}: each link of the chain chooses this itself; in the chain it is accepted")
    taught = [any(settings.needs_teacher(one.config) for one in composed) for composed in drafts]
    for override in cell:
        if _is_of_teacher(override) and not taught[0]:
            accepted = "model=… is the network of links that choose none"
            raise ValueError(
                f"{override}: the first link learns from none, each later one from the link before; {accepted}"
            )
    for number, composed in enumerate(drafts[1:], start=2):
        if any(settings.teacher_learns(one.config) for one in composed):
            raise ValueError(f"chain: link {number} has two students and no teacher; in the first link it is accepted")
    for number, (is_taught, composed) in enumerate(zip(taught[1:], drafts[1:], strict=True), start=2):
        if not is_taught:
            loss = composed[0].config.loss
            text = f"{loss._target_}, alpha 0" if "alpha" in loss else loss._target_
            raise ValueError(f"chain: link {number} learns nothing from link {number - 1}, its loss is {text}")


def networks_of(cells: Sequence[Composed]) -> str:
    """What a link trains."""
    return " or ".join(dict.fromkeys(str(cell.config.model.name) for cell in cells))


def _kept(cell: Sequence[str], link: Sequence[str], has_link_before: bool) -> list[str]:
    """A cell's overrides without those for what a link chooses itself (with loss=cross_entropy goes no loss.alpha),
    and for the teacher where it is the link before."""
    own = [_key(override) for override in link]
    of_own = [f"{key.rpartition('@')[2]}." for key in own if "." not in key]
    if "loss" in own:  # what is added to the loss is added to that of other links
        of_own += ["loss@also", "also."]
    return [
        override
        for override in cell
        if _key(override) not in own
        and not _key(override).startswith(tuple(of_own))
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
