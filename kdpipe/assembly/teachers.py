"""The teacher: one network, several as one, a file of answers, or a second student."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdpipe.assembly.networks import build_network, load_trained, load_weights
from kdpipe.assembly.run_networks import network_differences, replaced, trained_network
from kdpipe.data import ImageDataset
from kdpipe.data.answers import read_answers
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import metadata_in
from kdpipe.runs.commands import teacher_command
from kdpipe.runs.names import CONFIG
from kdpipe.settings.addresses import WEIGHTS, epoch_file, names_weights, run_and_file
from kdpipe.settings.composition import Invocation
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.identity import SPLIT, TEST_SPLIT, canonical, other_split
from kdpipe.settings.saved import read_network_settings
from kdpipe.settings.schema import AnswersSettings, EnsembleSettings, NetworkSettings, Settings
from kdpipe.system.once import warn_once
from kdpipe.system.randomness import derive_seed
from kdpipe.training.teacher import FileTeacher, FrozenTeacher, Peer, RecordedAccuracy, Teacher

if TYPE_CHECKING:
    from kdpipe.tracking import RunRecord, RunStore, Tracker

log = logging.getLogger("kdpipe")

# Teachers that were built already, and where their weights come from, by their settings.
KnownTeachers = dict[str, tuple[Teacher | None, str]]


def build_teacher(
    settings: Settings, invocation: Invocation, data: ImageDataset, tracker: "Tracker"
) -> tuple[Teacher | None, str]:
    """The teacher, and the run or file that its weights come from, of a file of answers its digest; None where the loss
    needs none.

    Raises:
        ConfigError: no teacher found, or weights or answers that do not fit.
    """
    teacher = settings.teacher
    if not settings.needs_teacher:
        return None, ""
    if settings.teacher_learns:
        return _build_peer(settings, data, tracker), ""
    if isinstance(teacher, AnswersSettings):
        of_file = _build_from_file(teacher, data)
        return of_file, of_file.digest
    if isinstance(teacher, EnsembleSettings):
        key, members = "teacher.members", build_members(teacher, data, tracker)
        frozen = FrozenTeacher(build_ensemble(teacher, members))
        networks = dict(zip(teacher.members, members, strict=True))
    else:
        key, networks = "teacher.weights", _build_one(settings, invocation, teacher, data, tracker)
        frozen = FrozenTeacher(*networks.values())
    known = [_recorded(key, address, network, settings, data, tracker) for address, network in networks.items()]
    frozen.recorded = list(filter(None, known))
    sources = [run_and_file(address)[0] if address.startswith("runs:/") else address for address in networks]
    return frozen, ",".join(dict.fromkeys(sources))


def _build_peer(settings: Settings, data: ImageDataset, tracker: "Tracker") -> Peer:
    """A second student: with random weights, unless others are named."""
    teacher = settings.teacher
    assert isinstance(teacher, NetworkSettings)
    torch.manual_seed(derive_seed(settings.seed, "peer"))
    classifier = build_network("teacher", teacher, data, freeze="none")
    if teacher.weights != "auto":
        load_weights("teacher", teacher, classifier, data, tracker)
    return Peer(classifier)


def _build_from_file(settings: AnswersSettings, data: ImageDataset) -> FileTeacher:
    assert settings.digest is not None  # the file's, since the command was read
    try:
        teacher = FileTeacher(read_answers(data, settings.file, settings.values, settings.floor), settings.digest)
    except ConfigError as error:
        raise error.under("teacher") from error
    for split in ("validation", "test"):
        positions = data.splits.get(split, torch.empty(0))
        if not teacher.covers(positions):
            number = int(torch.isin(positions, teacher.answers.positions).sum())
            answered = f"{number:,} of {len(positions):,}" if number else "none"
            log.info("teacher: answers for %s of the %s images, so what needs all of them is left out", answered, split)
    return teacher


def _build_one(
    settings: Settings, invocation: Invocation, teacher: NetworkSettings, data: ImageDataset, tracker: "Tracker"
) -> dict[str, Classifier]:
    """The network that teaches, by the run or the file that its weights come from."""
    classifier = build_network("teacher", teacher, data, freeze="none")
    if teacher.weights != "auto":
        address = str(teacher.weights)
        load_weights("teacher", teacher, classifier, data, tracker)
        log.info("teacher: %s with the weights of %s", teacher.name, address)
        return {address: classifier}
    found = _find_trained(settings, invocation, teacher, data, tracker)
    address = f"runs:/{found.id}"
    theirs = network_of_run(teacher, found.id, tracker)
    if theirs != teacher:
        classifier = build_network("teacher", theirs, data, freeze="none")
    load_trained("teacher.weights", address, teacher.name, classifier, data, tracker)
    accuracy = 100 * found.metrics["test/accuracy"]
    log.info("teacher: run %s (%s), test accuracy %.1f %%", found.id, found.name, accuracy)
    return {address: classifier}


def network_of_run(teacher: NetworkSettings, run_id: str, store: "RunStore") -> NetworkSettings:
    """The network of the run that teacher.weights=auto has found: what the command asks for, and what it does not know
    of, such as an argument that only the run has."""
    theirs = trained_network("teacher.weights", f"runs:/{run_id}", lambda: store)
    return replaced(teacher, theirs, set()) if theirs and network_differences(teacher, theirs) else teacher


def _recorded(
    key: str, address: str, classifier: Classifier, settings: Settings, data: ImageDataset, tracker: "Tracker"
) -> RecordedAccuracy | None:
    """How accurate the weights of a run were in that run, on images that are the same here; None where this is not
    known. Warns of a run that was trained on images that the student is evaluated on.

    Args:
        address: runs:/<run id>, runs:/<run id>/epoch_<number>, or a file, which may say what run it is from.
    """
    known_as = address if names_weights(address) else metadata_in(Path(address).expanduser()).get("kdpipe.weights", "")
    run_id, weights = run_and_file(known_as)
    record = tracker.get_run(run_id) if names_weights(known_as) else None
    if record is None or record.tags.get("kdpipe.data") != data.fingerprint:
        return None
    if other := other_split(record.params, settings.params):
        warn_once("teacher %s was trained with %s", address, other)
    if weights == WEIGHTS:
        split, decides, accuracy = "test", TEST_SPLIT, record.metrics.get("test/accuracy")
    else:
        by_epoch = {epoch_file(epoch): value for epoch, value in tracker.history(run_id, "val/accuracy")}
        split, decides, accuracy = "validation", SPLIT, by_epoch.get(weights)
    if accuracy is None or other_split(record.params, settings.params, decides):
        return None
    return RecordedAccuracy(key, address, classifier, split, accuracy)


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


def build_members(settings: EnsembleSettings, data: ImageDataset, store: "RunStore") -> list[Classifier]:
    """The networks of several runs.

    Raises:
        ConfigError: a run that does not exist or is not finished, or whose network or classes do not fit.
    """
    return [_build_member(address, data, store) for address in settings.members]


def build_ensemble(settings: EnsembleSettings, members: Sequence[Classifier]) -> Ensemble:
    """Several teachers as one."""
    ensemble = Ensemble(members, settings.shares or [1] * len(members), settings.temperature)
    shares = ", ".join(f"{share:.3g}" for share in ensemble.shares.tolist())
    log.info("teacher: the mean of their soft targets at T %g, shares %s", settings.temperature, shares)
    return ensemble


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
