"""The entrypoint, `python -m kdpipe [overrides]`: one run, from its config to its result."""

import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from kdpipe import config as settings
from kdpipe.checkpoint import save_weights
from kdpipe.data import ImageDataset, split
from kdpipe.data.dataset import check_fractions
from kdpipe.errors import one_line
from kdpipe.evaluate import evaluate
from kdpipe.identity import canonical
from kdpipe.models import Classifier, size_mb
from kdpipe.models.weights import check_class_names, load_imagenet, load_state, read_weights, weights_digest
from kdpipe.randomness import derive_seed
from kdpipe.report import epoch_line, result_table
from kdpipe.store import check_uri, store_uri
from kdpipe.teacher import Teacher
from kdpipe.train import batches, fit, named

log = logging.getLogger("kdpipe")


def run(config: DictConfig) -> float:
    """One run: compose → loss → data → teacher → model → optimizer → fit → test → cost → return.

    Returns:
        The objective of a search: accuracy on the validation images, or on the test images where there are none.
    """
    settings.check(config)
    device, autocast = use_device(config.train)
    loss = build_loss(config).to(device)
    augment = instantiate(config.augmentation)
    build_optimizer(config, nn.Linear(1, 1), loss, steps_per_epoch=1)  # bad values fail before data is read
    check_split(config)
    uri = store_uri(config.tracking.uri, Path(config.output_dir))
    check_uri(uri)
    data = build_data(config.dataset)
    check_selection(config.train, data)

    from kdpipe import tracking  # imports mlflow, which takes seconds: after what can fail sooner

    tracker = tracking.Tracker(uri, config.tracking.experiment, Path(config.output_dir) / "mlartifacts")
    teacher, teacher_source = build_teacher(config, data, tracker)
    model = build_model(config, data, tracker)
    tags = {
        "kdpipe.identity": settings.run_identity(config),
        "kdpipe.inputs": inputs_digest(data, teacher, model),
        "kdpipe.stage": settings.stage(config),
    }
    if config.train.resume == "auto" and (finished := tracker.find_finished(tags)):
        log.info("this run is finished already (train.resume=never trains anew)")
        show_result(finished.metrics, tracker, finished.id)
        return objective(finished.metrics)

    teacher = teacher.to(device) if teacher else None
    model = model.to(device)
    steps_per_epoch = len(batches(data.splits["train"], config.train.batch_size))
    optimizer, scheduler = build_optimizer(config, model, loss, steps_per_epoch)
    folder = Path(HydraConfig.get().runtime.output_dir)
    params = {
        key: value for key, value in settings.effective_settings(config).items() if not key.startswith("tracking.")
    }
    if teacher_source:
        tags["kdpipe.teacher_run"] = teacher_source
    with tracker.run(settings.run_name(config), folder, params, {**tags, "kdpipe.data": data.fingerprint}) as current:
        describe_inputs(config, current, tracker, data)

        metrics = fit(
            model,
            loss,
            optimizer,
            scheduler,
            data,
            teacher=teacher,
            augment=augment,
            epochs=config.train.epochs,
            batch_size=config.train.batch_size,
            seed=config.seed,
            device=device,
            autocast=autocast,
            select_best=config.train.select == "best",
            test_each_epoch=config.train.test_each_epoch,
            on_epoch=partial(report_epoch, current, config.train.epochs),
        )
        save_weights(model.network, folder / tracking.WEIGHTS, data.class_names)
        current.save(folder / tracking.WEIGHTS)

        metrics |= named("test", evaluate(model, data, "test", device, autocast))
        metrics |= cost(model, teacher)
        current.log(metrics, step=config.train.epochs)
    show_result(metrics, tracker, current.id)
    return objective(metrics)


def use_device(train: DictConfig) -> tuple[torch.device, torch.autocast]:
    """The device, and the autocast context of the precision asked for."""
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    name = str(train.device)
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    there[:0] = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if name == "auto":
        name = there[0]
    if name == "cuda" and "cuda:0" in there:
        name = "cuda:0"
    if name not in there:
        raise ValueError(f"train.device={train.device}: one of auto, {', '.join(there)} is accepted on this machine")
    device = torch.device(name)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bfloat16")
    return device, autocast


def build_loss(config: DictConfig) -> nn.Module:
    """The loss; its projections, if it has any, start from their own random numbers."""
    torch.manual_seed(derive_seed(config.seed, "loss"))
    loss: nn.Module = instantiate(config.loss)
    return loss


def build_optimizer(
    config: DictConfig, model: nn.Module, loss: nn.Module, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Optimizer and schedule for what can be trained in the model and the loss."""
    parameters = [parameter for part in (model, loss) for parameter in part.parameters() if parameter.requires_grad]
    try:
        optimizer = instantiate(config.optimizer)(parameters)
    except ValueError as error:
        raise ValueError(f"optimizer={config.optimizer._target_}: {error}") from error
    build = instantiate(config.scheduler)
    return optimizer, build(optimizer, epochs=config.train.epochs, steps_per_epoch=steps_per_epoch)


def check_split(config: DictConfig) -> None:
    """Raise ValueError for fractions that are none, before any image is read."""
    dataset = config.dataset
    check_fractions(dataset.train_fraction, dataset.val_fraction, dataset.test_fraction, dataset.split_seed)


def build_data(dataset: DictConfig) -> ImageDataset:
    """The data set that the config names, split."""
    log.info("data set %s", dataset.name)
    arguments = {key: value for key, value in dataset.items() if key not in settings.SPLITTING}
    if "root" in arguments:
        arguments["root"] = str(Path(str(arguments["root"])).expanduser())
    data = split(instantiate(arguments), **{key: dataset[key] for key in settings.SPLITTING})
    sizes = ", ".join(f"{len(positions):,} {name}" for name, positions in data.splits.items())
    _, channels, height, width = data.images.shape
    log.info("%d classes; images of %d×%d×%d: %s", data.num_classes, width, height, channels, sizes)
    return data


def check_selection(train: DictConfig, data: ImageDataset) -> None:
    """Raise ValueError where weights are to be chosen and there is nothing to choose them on."""
    if train.select == "best" and "validation" not in data.splits:
        raise ValueError("train.select=best: chosen on validation images, so dataset.val_fraction above 0 is accepted")


def build_network(key: str, model: DictConfig, data: ImageDataset, freeze: str) -> Classifier:
    """The network that stands under `key`, without weights."""
    architecture = {name: value for name, value in model.items() if name not in settings.NOT_ARCHITECTURE}
    try:
        network = instantiate(architecture, num_classes=data.num_classes)
    except InstantiationException as error:  # networks speak of themselves as the model
        raise ValueError(re.sub(r"^model\.", f"{key}.", one_line(error))) from error
    # A network of a library knows what its pretrained weights expect.
    own = getattr(network, "preprocessing", {})
    preprocessing: dict[str, Any] = {
        name: own.get(name) if model[name] is None else model[name] for name in settings.PREPROCESSING
    }
    classifier = Classifier(network, **preprocessing, freeze=freeze, key=key)
    check_output(key, model, classifier, data)
    return classifier


@torch.no_grad()
def check_output(key: str, model: DictConfig, classifier: Classifier, data: ImageDataset) -> None:
    """Raise ValueError where a network gets from images to no logits: two images tell before training."""
    images = data.images[:2]
    try:
        logits = classifier.eval()(images)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{key}.image_size={model.image_size}: {model.name} cannot take images of this size ({reason})"
        ) from error
    if logits.shape != (len(images), data.num_classes):
        raise ValueError(f"{key}.name={model.name}: logits [N, {data.num_classes}] are expected, not {[*logits.shape]}")


def build_model(config: DictConfig, data: ImageDataset, tracker: Any) -> Classifier:
    """What is trained: seeded first weights, or those that the config names."""
    torch.manual_seed(derive_seed(config.seed, "student"))
    model = build_network("model", config.model, data, config.model.freeze)
    load_weights("model", config.model, model, data, tracker)
    return model


def build_teacher(config: DictConfig, data: ImageDataset, tracker: Any) -> tuple[Teacher | None, str]:
    """The frozen teacher, and where its weights are from; None where the loss needs none.

    Raises:
        ValueError: no teacher found, or weights that do not fit.
    """
    if not settings.needs_teacher(config.loss):
        return None, ""
    classifier = build_network("teacher", config.teacher, data, freeze="none")
    if config.teacher.weights == "auto":
        network = {
            f"model.{key}": value for key, value in plain(config.teacher).items() if key not in ("weights", "freeze")
        }
        # A teacher with another test split would have been trained on images that the student is tested on.
        images = {f"dataset.{key}": config.dataset[key] for key in ("name", "test_fraction", "split_seed")}
        found = tracker.find_teacher(canonical(network | images), data.fingerprint)
        if found is None:
            raise ValueError(
                f"teacher.weights=auto: no finished teacher run of {config.teacher.name} on these images and split "
                f"in {tracker.uri}; this trains one: {teacher_command()}"
            )
        source = found.id
        load_trained("teacher", f"runs:/{source}", config.teacher.name, classifier, data, tracker)
        log.info(
            "teacher: run %s (%s), test accuracy %.1f %%",
            found.id,
            found.name,
            100 * found.metrics["test/accuracy"],
        )
    else:
        source = str(config.teacher.weights).removeprefix("runs:/")
        load_weights("teacher", config.teacher, classifier, data, tracker)
        log.info("teacher: %s with the weights of %s", config.teacher.name, config.teacher.weights)
    return Teacher(classifier), source


def teacher_command() -> str:
    """The command that trains the teacher that the present command asks for."""
    overrides = []
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
    return shlex.join(["python", "-m", "kdpipe", *folders, "experiment=teacher", *overrides])


def load_weights(key: str, model: DictConfig, classifier: Classifier, data: ImageDataset, tracker: Any) -> None:
    """Put the weights that the config names into a network: none, ImageNet's, a run's or a file's."""
    if model.weights == "imagenet":
        load_imagenet(f"{key}.weights", classifier.network, model.name)
    elif model.weights is not None:
        load_trained(key, str(model.weights), model.name, classifier, data, tracker)


def load_trained(key: str, weights: str, name: str, classifier: Classifier, data: ImageDataset, tracker: Any) -> None:
    """Put the weights of a run or a file into a network."""
    key = f"{key}.weights"
    if weights.startswith("runs:/"):
        path = tracker.download_weights(weights.removeprefix("runs:/"), key)
    else:
        path = Path(weights).expanduser()
    state, class_names = read_weights(key, path)
    check_class_names(key, weights, class_names, data.class_names)
    load_state(key, weights, classifier.network, state, name, data.num_classes)


def inputs_digest(data: ImageDataset, teacher: Teacher | None, model: Classifier) -> str:
    """What the config only points to: the images, the teacher's weights, the first weights."""
    networks = [model.network] + ([teacher.classifier.network] if teacher else [])
    return "-".join([data.fingerprint, *(weights_digest(network) for network in networks)])


def plain(part: DictConfig) -> dict[str, Any]:
    """A part of the config as plain values."""
    return {str(key): value for key, value in OmegaConf.to_container(part, resolve=True).items()}  # type: ignore[union-attr]


def describe_inputs(config: DictConfig, current: Any, tracker: Any, data: ImageDataset) -> None:
    """Keep the composed config and say what the run is fed."""
    composed = {key: value for key, value in settings.settings_of(config).items() if key != "tracking"}
    file = current.folder / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(composed)))
    current.save(file)
    sizes = {name: len(positions) for name, positions in data.splits.items()}
    tracker.log_dataset(current.id, data.name, data.fingerprint, str(config.dataset.get("root", data.name)), sizes)


def report_epoch(current: Any, epochs: int, epoch: int, metrics: dict[str, float]) -> None:
    current.log(metrics, step=epoch)
    log.info(epoch_line(epoch, epochs, metrics))


def cost(model: Classifier, teacher: Teacher | None) -> dict[str, float]:
    """Parameters, and sizes in MB of 2²⁰ bytes."""
    sizes = {
        "model/params": float(sum(parameter.numel() for parameter in model.network.parameters())),
        "model/size_mb": size_mb(model.network),
    }
    return sizes | ({"teacher/size_mb": size_mb(teacher.classifier.network)} if teacher else {})


def objective(metrics: Mapping[str, float]) -> float:
    return metrics.get("selected/accuracy", metrics["test/accuracy"])


def show_result(metrics: Mapping[str, float], tracker: Any, run_id: str) -> None:
    """The end of a run: what it came to, and where to look next."""
    for line in result_table(metrics).splitlines():
        log.info(line)
    log.info("weights, config, metrics: %s", os.path.relpath(HydraConfig.get().runtime.output_dir))
    log.info("in MLflow (make ui): %s", tracker.link(run_id))
    log.info("all runs side by side: python -m kdpipe.compare --experiment %s", tracker.experiment)


def job(config: DictConfig) -> float:
    """`run`, with its error as one line; in a sweep the other jobs go on."""
    try:
        return run(config)
    except Exception as error:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            _fail(error)
        log.error("failed: %s", one_line(error))
        raise


def cli() -> None:
    """`kdpipe` and `python -m kdpipe`: errors as one line, exit status 1; 130 and 143 when interrupted."""
    settings.register_resolvers()
    signal.signal(signal.SIGTERM, _terminated)
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on to us instead of printing them
    start = hydra.main(version_base="1.3", config_path=str(settings.CONF), config_name="config")
    try:
        start(run if full_error else job)()
    except KeyboardInterrupt:
        print("kdpipe: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if full_error:
            raise
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    print(f"kdpipe: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
