"""The entrypoint, `python -m kdpipe [overrides]`: one run, from its config to its result."""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kdpipe import config as settings
from kdpipe.build import (
    build_data,
    build_loss,
    build_model,
    build_optimizer,
    build_teacher,
    check_selection,
    check_split,
    inputs_digest,
    use_device,
)
from kdpipe.checkpoint import save_weights
from kdpipe.data import ImageDataset
from kdpipe.errors import one_line
from kdpipe.evaluate import evaluate
from kdpipe.models import Classifier, size_mb
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
        tracker.restore(finished.id, Path(HydraConfig.get().runtime.output_dir))
        show_result(finished.metrics, config, tracker.link(finished.id))
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
    show_result(metrics, config, tracker.link(current.id))
    return objective(metrics)


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


def show_result(metrics: Mapping[str, float], config: DictConfig, link: str) -> None:
    """The end of a run: what it came to, and where to look next."""
    for line in result_table(metrics).splitlines():
        log.info(line)
    log.info("weights, config, metrics: %s", os.path.relpath(HydraConfig.get().runtime.output_dir))
    log.info("in MLflow (make ui): %s", link)
    flags = ["--experiment", config.tracking.experiment]
    flags += ["--uri", config.tracking.uri] if config.tracking.uri else []
    flags += ["--output-dir", config.output_dir] if config.output_dir != "outputs" else []
    log.info("all runs side by side: python -m kdpipe.compare %s", shlex.join(flags))


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
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
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
