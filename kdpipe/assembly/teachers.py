"""The teacher: one network, several as one, or a second student."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from kdpipe.assembly.networks import build_network, load_trained, load_weights
from kdpipe.data import ImageDataset
from kdpipe.models import Classifier, Ensemble
from kdpipe.runs.commands import teacher_command
from kdpipe.runs.names import CONFIG
from kdpipe.settings.addresses import run_and_file
from kdpipe.settings.composition import Invocation
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.identity import canonical
from kdpipe.settings.saved import read_network_settings
from kdpipe.settings.schema import EnsembleSettings, NetworkSettings, Settings
from kdpipe.system.randomness import derive_seed
from kdpipe.training.teacher import FrozenTeacher, Peer, Teacher

if TYPE_CHECKING:
    from kdpipe.tracking import RunRecord, RunStore, Tracker

log = logging.getLogger("kdpipe")

# Teachers that were built already, and where their weights come from, by their settings.
KnownTeachers = dict[str, tuple[Teacher | None, str]]


def build_teacher(
    settings: Settings, invocation: Invocation, data: ImageDataset, tracker: "Tracker"
) -> tuple[Teacher | None, str]:
    """The teacher, and the run or file that its weights come from; None where the loss needs none.

    Raises:
        ConfigError: no teacher found, or weights that do not fit.
    """
    teacher = settings.teacher
    if not settings.needs_teacher:
        return None, ""
    if isinstance(teacher, EnsembleSettings):
        return build_ensemble(teacher, data, tracker)
    if settings.teacher_learns:
        torch.manual_seed(derive_seed(settings.seed, "peer"))
        classifier = build_network("teacher", teacher, data, freeze="none")
        if teacher.weights != "auto":
            load_weights("teacher", teacher, classifier, data, tracker)
        return Peer(classifier), ""
    classifier = build_network("teacher", teacher, data, freeze="none")
    if teacher.weights == "auto":
        found = _find_trained(settings, invocation, teacher, data, tracker)
        load_trained("teacher.weights", f"runs:/{found.id}", teacher.name, classifier, data, tracker)
        accuracy = 100 * found.metrics["test/accuracy"]
        log.info("teacher: run %s (%s), test accuracy %.1f %%", found.id, found.name, accuracy)
        return FrozenTeacher(classifier), found.id
    weights = str(teacher.weights)
    load_weights("teacher", teacher, classifier, data, tracker)
    log.info("teacher: %s with the weights of %s", teacher.name, weights)
    return FrozenTeacher(classifier), run_and_file(weights)[0] if weights.startswith("runs:/") else weights


def _find_trained(
    settings: Settings, invocation: Invocation, teacher: NetworkSettings, data: ImageDataset, tracker: "Tracker"
) -> "RunRecord":
    """The newest finished run of the teacher's network on these images and this test split; in a sweep the one that its
    first run found."""
    near = ""
    if settings.sweep.job and settings.sweep.job.teacher:
        found = tracker.get_run(settings.sweep.job.teacher)
    else:
        network = {
            f"model.{key}": value for key, value in teacher.plain.items() if key not in ("weights", "freeze", "stages")
        }
        # A teacher with another test split would have been trained on images that the student is tested on.
        dataset = settings.dataset
        images = {
            "dataset.name": dataset.name,
            "dataset.test_fraction": dataset.test_fraction,
            "dataset.split_seed": dataset.split_seed,
        }
        wanted = canonical(network | images)
        found = tracker.find_teacher(wanted, data.fingerprint)
        if found is None:
            size = {"dataset.image_size": dataset.arguments.get("image_size")}  # part of what the images are
            near = _nearest(wanted | size, data, tracker)
    if found is None:
        problem = f"no finished teacher run of {teacher.name} on these images and this split in {tracker.name}"
        command = teacher_command(settings, invocation)
        raise ConfigError("teacher.weights", "auto", problem=f"{problem}{near}; this trains one: {command}")
    return found


def _nearest(wanted: Mapping[str, object], data: ImageDataset, tracker: "Tracker") -> str:
    """The finished teacher run that comes nearest, and the overrides that would take it."""
    found = tracker.nearest_teacher(wanted, data.fingerprint)
    if found is None:
        return ""
    record, differing = found
    run = (
        f"; the nearest is {record.name} (run {record.id}, test accuracy {100 * record.metrics['test/accuracy']:.1f} %)"
    )
    if "dataset.name" in differing:
        return ""
    if "kdpipe.data" in differing and "dataset.image_size" not in differing:
        return f"{run}, of other images under the same name"
    if "model.name" in differing:
        return f"{run}, of {record.params['model.name']}: model@teacher=… chooses the network"
    differing.pop("kdpipe.data", None)
    overrides = []
    for key, value in sorted(differing.items()):
        section, _, name = key.partition(".")
        written = value.replace(", ", ",").replace("None", "null")
        overrides.append(f"{'teacher' if section == 'model' else section}.{name}={written}")
    return f"{run}: {' '.join(overrides)} takes it"


def build_ensemble(settings: EnsembleSettings, data: ImageDataset, store: "RunStore") -> tuple[FrozenTeacher, str]:
    """Several teachers as one, and the runs that they come from.

    Raises:
        ConfigError: a run that does not exist or is not finished, or whose network or classes do not fit.
    """
    members = [_build_member(address, data, store) for address in settings.members]
    ensemble = Ensemble(members, settings.shares or [1] * len(members), settings.temperature)
    shares = ", ".join(f"{share:.3g}" for share in ensemble.shares.tolist())
    log.info("teacher: the mean of their soft targets at T %g, shares %s", settings.temperature, shares)
    return FrozenTeacher(ensemble), ",".join(dict.fromkeys(run_and_file(address)[0] for address in settings.members))


def _build_member(address: str, data: ImageDataset, store: "RunStore") -> Classifier:
    """The network of a run, as the run's own config describes it, with the run's weights."""
    key = "teacher.members"
    with store.downloaded(run_and_file(address)[0], CONFIG, key) as file:
        try:
            settings = read_network_settings(file)
            classifier = build_network("model", settings, data, freeze="none")
        except ValueError as error:  # which is about the model of that config
            raise ConfigError(key, address, problem=str(error)) from error
    load_trained(key, address, settings.name, classifier, data, store)
    log.info("teacher: %s with the weights of %s", settings.name, address)
    return classifier
