"""What is known of the weights and answers that a command names: the network that weights were trained in, which comes
with them, and what a file of answers is.

A run's weights belong to its architecture and its preprocessing. Where a command leaves these to the defaults of an
option, they are the run's; where it sets them itself, they have to be the run's.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.assembly.building import build
from kdpipe.assembly.stores import reach_store
from kdpipe.data.answers import digest_of_file
from kdpipe.models.weights import metadata_in
from kdpipe.runs.names import CONFIG, PEER_WEIGHTS
from kdpipe.settings.addresses import file_and_part, names_weights, run_and_file
from kdpipe.settings.composition import Invocation, stated_of_network
from kdpipe.settings.errors import ConfigError, as_typed
from kdpipe.settings.identity import FIRST_RESIZING, canonical, flatten, what_matters
from kdpipe.settings.saved import read_network_settings
from kdpipe.settings.schema import AnswersSettings, NetworkSettings, Settings, validated

if TYPE_CHECKING:
    from kdpipe.tracking import RunStore

log = logging.getLogger("kdpipe")

# How a command uses a network, which may change from run to run. All other keys say what the network is.
USE = ("weights", "freeze", "stages")


def with_networks_of_runs(settings: Settings, invocation: Invocation, say: bool = False) -> Settings:
    """The settings of a command, with the networks of the runs whose weights it names, and the digest of its file of
    answers.

    Args:
        say: log what they have instead of the command's defaults.

    Raises:
        ConfigError: a setting of the command's own that the run did not have; the store cannot be reached; no such file
            of answers, or another one.
    """
    settings = _with_digest_of_answers(settings)

    def store() -> "RunStore":
        uri = reach_store(settings)
        from kdpipe.tracking import RunStore  # imports mlflow, which takes seconds

        return RunStore(uri)

    found: dict[str, NetworkSettings] = {}
    for section, network in _named(settings).items():
        theirs = trained_network(f"{section}.weights", str(network.weights), store)
        if theirs is None or not (differing := network_differences(network, theirs)):
            continue
        option, stated = stated_of_network(invocation, section, network.plain)
        _check_option(section, option, network, theirs)
        refuse(section, network, differing, stated)
        found[section] = replaced(network, theirs, stated)
        if say:
            new = ", ".join(f"{key}={as_typed(its)}" for key, (_, its) in differing.items())
            log.info("%s.weights=%s: the run's own network, %s, with %s", section, network.weights, theirs.name, new)
    if not found:
        return settings
    return validated(Settings, settings.plain | {section: network.plain for section, network in found.items()})


def _with_digest_of_answers(settings: Settings) -> Settings:
    teacher = settings.teacher
    if not settings.needs_teacher or not isinstance(teacher, AnswersSettings):
        return settings
    try:
        digest = digest_of_file(teacher.file)
    except ConfigError as error:
        raise error.under("teacher") from error
    if teacher.digest not in (None, digest):
        raise ConfigError("teacher.digest", teacher.digest, f"{digest}, that of {teacher.file}")
    return validated(Settings, settings.plain | {"teacher": teacher.plain | {"digest": digest}})


def _named(settings: Settings) -> dict[str, NetworkSettings]:
    """The networks of a command that may have the weights of a run or a file, by their section."""
    networks = {"model": settings.model}
    if settings.needs_teacher and isinstance(settings.teacher, NetworkSettings):
        networks["teacher"] = settings.teacher
    others = (None, "auto", "imagenet")
    return {section: network for section, network in networks.items() if network.weights not in others}


def trained_network(key: str, weights: str, store: "Callable[[], RunStore]") -> NetworkSettings | None:
    """The network that weights were trained in: of a run, or of a file of kdpipe with its config beside it; None where
    nothing says so.

    Args:
        key: of the config, whose value the weights are; for errors.
        store: opens the store, which a file does not need.

    Raises:
        ConfigError: a config that cannot be used.
    """
    if not names_weights(weights):
        return _network_of_file(file_and_part(weights)[0])
    run_id, _ = run_and_file(weights)
    opened = store()
    if opened.get_run(run_id) is None or CONFIG not in opened.artifacts(run_id):
        return None  # the link of a chain that is yet to be trained; a run of another program; or an error, soon
    with opened.downloaded(run_id, CONFIG, key) as file:
        try:
            return read_network_settings(file)
        except ValueError as error:
            raise ConfigError(key, weights, problem=str(error)) from error


def _network_of_file(file: Path) -> NetworkSettings | None:
    config = file.with_name(CONFIG)
    if "class_names" not in metadata_in(file):  # not one of ours: what lies beside it is about something else
        return None
    if not config.is_file():
        log.warning("%s: %s is not beside it, so that its preprocessing is taken from the command", file, CONFIG)
        return None
    return read_network_settings(config, "teacher" if file.name == PEER_WEIGHTS else "model")


def network_differences(ours: NetworkSettings, theirs: NetworkSettings) -> dict[str, tuple[Any, Any]]:
    """What two networks differ in: the values of each, None where one lacks the key. Their names are only names."""
    one, other = _described(ours), _described(theirs)
    found = _differing(one, other)
    if any(key in what and what[key] is None for key in found for what in (one, other)):
        found = _differing(one | _of_library(ours, one), other | _of_library(theirs, other))
    return found


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [key for key in dict.fromkeys([*one, *other]) if key != "name"]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _described(network: NetworkSettings) -> dict[str, Any]:
    """What a network is, as flat settings that can be compared: those that mean the same are written alike."""
    flat = {f"model.{key}": canonical(value) for key, value in flatten(network.plain).items() if key not in USE}
    return {**FIRST_RESIZING, **{key.removeprefix("model."): value for key, value in what_matters(flat).items()}}


def _of_library(network: NetworkSettings, described: Mapping[str, Any]) -> dict[str, Any]:
    """What the library of a network has for the keys that are null."""
    null = [key for key, value in described.items() if value is None]
    own = getattr(build("model", network, num_classes=2), "preprocessing", {}) if null else {}
    return {key: canonical(own[key]) for key in null if key in own}


def _check_option(section: str, option: str | None, ours: NetworkSettings, theirs: NetworkSettings) -> None:
    """Raise ConfigError where a command chose another network by name than the run's."""
    if option is None:
        return
    is_one_network = option.rpartition("/")[2] == ours.name  # torchvision and timm have many
    targets = [_described(network)["_target_"] for network in (ours, theirs)]
    if targets[0] != targets[1] or (is_one_network and ours.name != theirs.name):
        group = "model" if section == "model" else "model@teacher"
        problem = f"the network of {section}.weights={ours.weights} is {theirs.name}"
        raise ConfigError(group, option, f"{theirs.name}, or leave it out", problem)


def refuse(
    section: str, ours: NetworkSettings, differing: Mapping[str, tuple[Any, Any]], stated: set[str] | None = None
) -> None:
    """Raise ConfigError for a difference between a command's network and its run's.

    Args:
        stated: the keys that the command set itself; None for all.
    """
    for key, (own, its) in differing.items():
        if stated is None or key in stated:
            trained = "without it" if its is None else f"with {as_typed(its)}"
            expected = "leave it out" if its is None else f"{as_typed(its)}, or leave it out"
            problem = f"{section}.weights={ours.weights} was trained {trained}"
            raise ConfigError(f"{section}.{key}", own, expected, problem)


def replaced(ours: NetworkSettings, theirs: NetworkSettings, stated: set[str]) -> NetworkSettings:
    """The network of a run, used as a command uses its own."""
    used = {key: value for key, value in ours.plain.items() if key in ("weights", "freeze")}
    known = {key: value for key, value in theirs.plain.items() if key not in ("weights", "freeze")}
    if "stages" in ours.plain and ("stages" in known or "stages" in stated):
        used["stages"] = ours.plain["stages"]
    return validated(NetworkSettings, known | used)
