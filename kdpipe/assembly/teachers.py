"""The teacher: one network, several as one, or a second student."""

import logging
import shlex
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kdpipe.assembly.datasets import plain
from kdpipe.assembly.networks import build_network, load_trained, load_weights, read_model
from kdpipe.data import ImageDataset
from kdpipe.models import Classifier, Ensemble
from kdpipe.runs.names import CONFIG, run_and_file
from kdpipe.settings import config as settings
from kdpipe.settings.identity import canonical
from kdpipe.system.randomness import derive_seed
from kdpipe.training.teacher import Peer, Teacher

log = logging.getLogger("kdpipe")

# Teachers that were built already and where their weights are from, by what the config says of them.
KnownTeachers = dict[str, tuple[Teacher | Peer | None, str]]


def build_teacher(config: DictConfig, data: ImageDataset, tracker: Any) -> tuple[Teacher | Peer | None, str]:
    """The frozen teacher, and where its weights are from; None where the loss needs none.

    Raises:
        ValueError: no teacher found, or weights that do not fit.
    """
    if not settings.needs_teacher(config):
        return None, ""
    if settings.teacher_learns(config):
        torch.manual_seed(derive_seed(config.seed, "peer"))
        classifier = build_network("teacher", config.teacher, data, freeze="none")
        if config.teacher.weights != "auto":
            load_weights("teacher", config.teacher, classifier, data, tracker)
        return Peer(classifier), ""
    if settings.is_ensemble(config.teacher):
        return build_ensemble(config.teacher, data, tracker)
    classifier = build_network("teacher", config.teacher, data, freeze="none")
    if config.teacher.weights == "auto":
        network = {
            f"model.{key}": value
            for key, value in plain(config.teacher).items()
            if key not in ("weights", "freeze", "stages")
        }
        # A teacher with another test split would have been trained on images that the student is tested on.
        images = {f"dataset.{key}": config.dataset[key] for key in ("name", "test_fraction", "split_seed")}
        if config.sweep.job and config.sweep.job.teacher:  # all runs of a sweep have the one that was there at first
            found = tracker.get_run(config.sweep.job.teacher)
        else:
            found = tracker.find_teacher(canonical(network | images), data.fingerprint)
        if found is None:
            raise ValueError(
                f"teacher.weights=auto: no finished teacher run of {config.teacher.name} on these images and split "
                f"in {tracker.name}; this trains one: {teacher_command(config)}"
            )
        source = found.id
        load_trained("teacher.weights", f"runs:/{source}", config.teacher.name, classifier, data, tracker)
        log.info(
            "teacher: run %s (%s), test accuracy %.1f %%",
            found.id,
            found.name,
            100 * found.metrics["test/accuracy"],
        )
    else:
        weights = str(config.teacher.weights)
        source = run_and_file(weights)[0] if weights.startswith("runs:/") else weights
        load_weights("teacher", config.teacher, classifier, data, tracker)
        log.info("teacher: %s with the weights of %s", config.teacher.name, weights)
    return Teacher(classifier), source


def build_ensemble(teacher: DictConfig, data: ImageDataset, tracker: Any) -> tuple[Teacher, str]:
    """Several teachers as one, and the runs that they are from.

    Raises:
        ValueError: a run that is not there or not finished, or whose network or classes do not fit.
    """
    members = [build_member(address, data, tracker) for address in teacher.members]
    ensemble = Ensemble(members, teacher.shares or [1] * len(members), teacher.temperature)
    shares = ", ".join(f"{share:.3g}" for share in ensemble.shares.tolist())
    log.info("teacher: the mean of their soft targets at T %g, shares %s", teacher.temperature, shares)
    return Teacher(ensemble), ",".join(dict.fromkeys(run_and_file(address)[0] for address in teacher.members))


def build_member(address: str, data: ImageDataset, tracker: Any) -> Classifier:
    """The network of a run, as the run's own config describes it, with the run's weights."""
    key = "teacher.members"
    with tracker.downloaded(run_and_file(address)[0], CONFIG, key) as file:
        try:
            model = read_model(file)
            classifier = build_network("model", model, data, freeze="none")
        except ValueError as error:  # which speaks of the model of that config
            raise ValueError(f"{key}={address}: {error}") from error
    load_trained(key, address, model.name, classifier, data, tracker)
    log.info("teacher: %s with the weights of %s", model.name, address)
    return classifier


def teacher_command(config: DictConfig) -> str:
    """The command that trains the teacher that the present command asks for."""
    overrides = []
    experiment, choices = "teacher", HydraConfig.get().runtime.choices
    if str(choices.get("experiment")).startswith("benchmark/"):  # whose pairs name the teacher themselves
        experiment = "benchmark/teacher"
        overrides.append(f"model={choices['model@teacher']}")
        if "shortcut" in config.teacher:
            overrides.append(f"model.shortcut={config.teacher.shortcut}")
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.partition("=")
        if key == "model@teacher":
            overrides.append(f"model={value}")
        elif key.startswith("teacher.") and key != "teacher.weights":
            overrides.append(f"model.{key.removeprefix('teacher.')}={value}")
        elif key == "dataset" or key.startswith(("dataset.", "tracking.", "output_dir")):
            overrides.append(override)
    sources = HydraConfig.get().runtime.config_sources
    folders = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    return shlex.join(["python", "-m", "kdpipe", *folders, f"experiment={experiment}", *overrides])
