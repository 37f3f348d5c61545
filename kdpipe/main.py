"""The entrypoint, `python -m kdpipe [overrides]`: one run, from its config to its result."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from kdpipe import config as settings
from kdpipe.build import (
    Parts,
    build_data,
    build_loss,
    build_optimizer,
    build_parts,
    check_values,
    forget_data,
    use_hardware,
)
from kdpipe.checkpoint import save_weights
from kdpipe.claim import Claim, ClaimedError, claim
from kdpipe.data import ImageDataset
from kdpipe.errors import one_line
from kdpipe.evaluate import evaluate
from kdpipe.hardware import Hardware
from kdpipe.models import Classifier, size_mb
from kdpipe.profiling import traced, traces
from kdpipe.report import epoch_line, result_table
from kdpipe.shortcuts import answer_in_advance, build_features, build_views
from kdpipe.store import WEIGHTS, check_uri, store_uri
from kdpipe.targets import guard_hydra, refuse_pickled_config
from kdpipe.teacher import Teacher
from kdpipe.train import batches, fit, named

log = logging.getLogger("kdpipe")
# Not in `cli`: the workers of a sweep import this module and call `job`.
settings.register_resolvers()
guard_hydra()
# conf/hydra/launcher/ has the plugins' own names on purpose: hydra/launcher=joblib is what people write.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def run(config: DictConfig) -> float:
    """One run: compose → loss → data → teacher → model → optimizer → fit → test → cost → return.

    Returns:
        The objective of a search: accuracy on the validation images, or on the test images where there are none.
    """
    check_values(config)
    hardware = use_hardware(config)
    uri = store_uri(config.tracking.uri, Path(config.output_dir))
    check_uri(uri)
    build_data(config.dataset)

    from kdpipe import tracking  # imports mlflow, which takes seconds: after what can fail sooner

    tracker = tracking.Tracker(uri, config.tracking.experiment, Path(config.output_dir) / "mlartifacts")
    if hardware.rank > 0:  # computes, while the first process keeps the books
        return follow(config, tracker, hardware)
    with claim(Path(HydraConfig.get().runtime.output_dir)) as claimed:
        tracker.close_abandoned(claimed.last_run)
        parts = build_parts(config, tracker, {})
        if finished := find_finished(config, parts, tracker, hardware):
            log.info("this run is finished already (train.resume=never trains anew)")
            tracker.restore(finished.id, claimed.folder)
            show_result(finished.metrics, config, tracker.link(finished.id))
            return objective(finished.metrics)
        return lead(config, parts, tracker, claimed, hardware)


def find_finished(config: DictConfig, parts: Parts, tracker: Any, hardware: Hardware) -> Any:
    """The finished run that this one would repeat, if any; all processes find the same."""
    finished = tracker.find_finished(parts.tags) if config.train.resume == "auto" else None
    hardware.check_agreement([parts.tags, parts.teacher_source, finished and finished.id])
    return finished


def lead(config: DictConfig, parts: Parts, tracker: Any, claimed: Claim, hardware: Hardware) -> float:
    """Learn, in a run of MLflow."""
    params = settings.logged_params(config)
    name, tags = settings.run_name(config), run_tags(config, parts, hardware)
    with tracker.run(name, claimed.folder, params, tags, on_start=claimed.starts) as current:
        describe_inputs(config, current, tracker, parts.data)
        with traced(claimed.folder, config.train.profile, hardware.device) as on_step:
            metrics = learn(config, parts, hardware, partial(report_epoch, current, config.train.epochs), on_step)
        save_weights(parts.model.network, claimed.folder / WEIGHTS, parts.data.class_names)
        for file in (claimed.folder / WEIGHTS, *traces(claimed.folder)):
            current.save(file)
        current.log(metrics, step=config.train.epochs)
    show_result(metrics, config, tracker.link(current.id))
    return objective(metrics)


def follow(config: DictConfig, tracker: Any, hardware: Hardware) -> float:
    """Learn as one of several processes."""
    parts = build_parts(config, tracker, {})
    if finished := find_finished(config, parts, tracker, hardware):
        return objective(finished.metrics)
    return objective(learn(config, parts, hardware, lambda epoch, metrics: None, lambda: None))


def learn(
    config: DictConfig,
    parts: Parts,
    hardware: Hardware,
    on_epoch: Callable[[int, dict[str, float]], None],
    on_step: Callable[[], None],
) -> dict[str, float]:
    """optimizer → fit → test → cost; the trained weights are in `parts.model`."""
    train, device = config.train, hardware.device
    loss = build_loss(config).to(device)
    model = parts.model.to(device)
    teacher = parts.teacher.to(device) if parts.teacher else None
    views = build_views(config, parts.data, teacher is not None)
    if teacher and train.epochs > 0:
        answer_in_advance(config, teacher, parts.data, views, hardware)
    # A head on a frozen backbone trains on the backbone's features, as if they were the images.
    features = None if views else build_features(config, model, teacher, parts.data, hardware)
    learner, data = (model.head, features) if features else (model, parts.data)
    data = data.near(device)
    if teacher:
        teacher.stay_near(device)
    steps_per_epoch = len(batches(data.splits["train"], train.batch_size, hardware.processes))
    optimizer, scheduler = build_optimizer(config, learner, loss, steps_per_epoch)
    if train.compile is True:
        learner.compile()

    metrics = fit(
        hardware.distribute(learner, loss),
        loss,
        optimizer,
        scheduler,
        data,
        teacher=teacher,
        views=views,
        epochs=train.epochs,
        batch_size=train.batch_size,
        seed=config.seed,
        hardware=hardware,
        select_best=train.select == "best",
        test_each_epoch=train.test_each_epoch,
        on_epoch=on_epoch,
        on_step=on_step,
    )
    metrics |= named("test", evaluate(learner, data, "test", hardware))
    return metrics | cost(model, teacher)


def run_tags(config: DictConfig, parts: Parts, hardware: Hardware) -> dict[str, str]:
    """What a run is found by, in MLflow's UI too."""
    tags = {**parts.tags, "kdpipe.data": parts.data.fingerprint, "kdpipe.hardware": hardware.described}
    if parts.teacher_source:
        tags["kdpipe.teacher_run"] = parts.teacher_source
    if config.sweep.job:
        tags |= {"kdpipe.sweep": config.sweep.job.id, "mlflow.parentRunId": config.sweep.job.parent}
    return tags


def describe_inputs(config: DictConfig, current: Any, tracker: Any, data: ImageDataset) -> None:
    """Keep the composed config and say what the run is fed."""
    composed = {key: value for key, value in settings.settings_of(config).items() if key not in ("tracking", "sweep")}
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
    log.info("all runs side by side: %s", settings.compare_command(config))


def job(config: DictConfig) -> float:
    """`run`, with its error as one line; in a sweep each run is one line, and the others go on after an error."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        try:
            return run(config)
        except Exception as error:
            _fail(error)
    told = logging.getLogger("kdpipe.sweep")
    place = "run"
    if config.sweep.job:  # else of another sweeper than ours
        details_to_file_only()
        place = f"[{config.sweep.job.number}/{config.sweep.job.of}] {config.sweep.job.name}"
    started = time.monotonic()
    try:
        accuracy = run(config)
    except ClaimedError as error:
        told.info("%s: left alone, %s", place, error)
        raise
    except Exception as error:
        told.error("%s failed: %s", place, one_line(error))
        raise
    told.info("%s: %.2f %% in %.0f s", place, 100 * accuracy, time.monotonic() - started)
    return accuracy


def details_to_file_only() -> None:
    """Leave what a run tells of itself to the log in its folder."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(lambda record: record.name != "kdpipe" or record.levelno > logging.INFO)


def cli() -> None:
    """`kdpipe` and `python -m kdpipe`: errors as one line, exit status 1; 130 and 143 when interrupted."""
    forget_data()
    # One of the processes that torchrun started tells of their work.
    if distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        logging.getLogger("kdpipe").setLevel(logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on to us instead of printing them
    start = hydra.main(version_base="1.3", config_path=str(settings.CONF), config_name="config")
    try:
        refuse_pickled_config(sys.argv[1:])
        start(run if full_error else job)()
    except KeyboardInterrupt:
        print("kdpipe: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if full_error:
            raise
        _fail(error)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _fail(error: Exception) -> NoReturn:
    print(f"kdpipe: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
