"""The entrypoint, `python -m kdpipe [overrides]`: one run, from its config to its result."""

import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from kdpipe.assembly import (
    Parts,
    build_data,
    build_loss,
    build_optimizer,
    build_parts,
    check_sharing,
    check_values,
    fit_loss,
    forget_data,
    use_hardware,
)
from kdpipe.assembly.views import answer_in_advance, build_features, build_mixing, build_views
from kdpipe.data import ImageDataset
from kdpipe.evaluation.costs import BATCH, cost
from kdpipe.evaluation.exam import Exam, caveats, examine, write_exam
from kdpipe.evaluation.inference import evaluate
from kdpipe.evaluation.report import cost_table, epoch_line, result_table
from kdpipe.models import Classifier, Ensemble
from kdpipe.runs.claim import ClaimedError, claim
from kdpipe.runs.journal import CHECKPOINTS, NOT_CREATED, Journal, is_unfinished, rows_since, sync_command
from kdpipe.runs.names import CONFIG, IMAGE_SHAPE, PEER_WEIGHTS, TIMED_ON, UNLABELLED_IMAGES, WEIGHTS, epoch_file
from kdpipe.runs.store import PATIENCE, store_uri, wait_for_store
from kdpipe.settings import config as settings
from kdpipe.settings.components import guard_hydra, refuse_pickled_config
from kdpipe.settings.hydra_errors import one_line
from kdpipe.system import interruption
from kdpipe.system.files import write_atomically
from kdpipe.system.hardware import Hardware
from kdpipe.system.interruption import Interrupted, InterruptedJobError
from kdpipe.system.profiling import profile_files, step_profiler
from kdpipe.training.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint, save_weights
from kdpipe.training.loop import Training, batches, fit, named
from kdpipe.training.observed import Observed
from kdpipe.training.precomputed import logits_of_test_images
from kdpipe.training.teacher import Peer, Teacher
from kdpipe.training.teacher_check import check_teacher, warn_once

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
    wait_for_store(uri, PATIENCE if config.sweep.job else 0)
    build_data(config.dataset)

    from kdpipe import tracking  # imports mlflow, which takes seconds: after what can fail sooner

    tracker = tracking.Tracker(uri, config.tracking.experiment, Path(config.output_dir) / "mlartifacts")
    if hardware.rank > 0:  # computes, while the first process keeps the books
        return follow(config, tracker, hardware)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not config.sweep.job:
        tracker.recover_all(folder.parent)
    with claim(folder):
        tracker.recover(folder)
        parts = build_parts(config, tracker, {})
        if finished := find_finished(config, parts, tracker, hardware):
            log.info("this run is finished already (train.resume=never trains anew)")
            tracker.restore(finished.id, folder)
            if config.train.keep_epochs:
                warn_of_epochs_not_kept(config, config.train.epochs, tracker.artifacts(finished.id))
            show_result(finished.metrics, config, tracker, finished.id)
            return objective(finished.metrics)
        return lead(config, parts, tracker, folder, hardware)


def find_finished(config: DictConfig, parts: Parts, tracker: Any, hardware: Hardware) -> Any:
    """The finished run that this one would repeat, if any; all processes find the same."""
    hardware.check_agreement([parts.tags, parts.teacher_source])
    folder = Path(HydraConfig.get().runtime.output_dir)
    asks = hardware.rank == 0 and config.train.resume == "auto" and not is_unfinished(folder, parts.tags)
    return hardware.broadcast(tracker.find_finished(parts.tags) if asks else None)


def lead(config: DictConfig, parts: Parts, tracker: Any, folder: Path, hardware: Hardware) -> float:
    """Learn, in a run of MLflow."""
    begun, start = what_is_begun(config, parts, folder)
    params = settings.logged_params(config)
    name, tags = settings.run_name(config), run_tags(config, parts, hardware)
    history = rows_since(folder, start["history"] if start else []) if begun else []
    seconds = start["seconds"] if start else 0.0
    with tracker.run(name, folder, params, tags, begun, history, seconds) as current:
        describe_inputs(config, current, tracker, parts.data)
        save_earlier_epochs(config, current, start["training"]["epoch"] if start else 1)

        def keep(state: dict[str, Any]) -> None:
            about = {"tags": parts.tags, "run": current.id, "history": current.rows, "seconds": current.seconds}
            save_checkpoint(folder / CHECKPOINTS, {**about, "training": state})
            current.commit()

        def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
            report_epoch(current, config.train.epochs, epoch, metrics)
            if epoch in (config.train.keep_epochs or ()):
                save_weights(parts.model.network, folder / epoch_file(epoch), parts.data.class_names)
                current.save(folder / epoch_file(epoch))

        with step_profiler(folder, config.train.profile, hardware.device) as on_step:
            metrics, exam = learn(
                config, parts, hardware, start["training"] if start else None, on_epoch, keep, on_step
            )
        metrics |= cost_of(config, parts, hardware)
        save_weights(parts.model.network, folder / WEIGHTS, parts.data.class_names)
        files = [folder / WEIGHTS, *profile_files(folder)]
        files += write_exam(exam, parts.data, folder, config.evaluation.pictures)
        for caveat in caveats(exam, parts.data.class_names):
            log.warning(caveat)
        if isinstance(parts.teacher, Peer):
            files.append(folder / PEER_WEIGHTS)
            save_weights(parts.teacher.classifier.network, files[-1], parts.data.class_names)
        for file in files:
            current.save(file)
        current.log(metrics, step=config.train.epochs)
    show_result(metrics, config, tracker, current.id)
    return objective(metrics)


def what_is_begun(config: DictConfig, parts: Parts, folder: Path) -> tuple[str | None, dict[str, Any] | None]:
    """The MLflow run that a process began in the folder and did not finish, and its newest checkpoint.

    Raises:
        ValueError: another run is in the folder (of other images, or another teacher) whose results would be lost.
    """
    if config.train.resume == "never":
        remove_checkpoints(folder / CHECKPOINTS)
        return None, None
    journal, start = Journal.read(folder), load_checkpoint(folder / CHECKPOINTS)
    if journal and not journal.matches(parts.tags):
        if not journal.delivered:
            raise ValueError(
                f"{folder} has a run of another teacher or other images, of which {journal.store} has not got all; "
                f"{sync_command(folder)} delivers it, train.resume=never drops it"
            )
        journal = None
    if start and start["tags"] != parts.tags:
        log.warning("the run that was begun here is another one, of other images or another teacher: this one is new")
        remove_checkpoints(folder / CHECKPOINTS)
        start = None
    if journal and journal.run_id != NOT_CREATED:
        return journal.run_id, start
    return start["run"] if start else None, start


def follow(config: DictConfig, tracker: Any, hardware: Hardware) -> float:
    """Learn as one of several processes."""
    parts = build_parts(config, tracker, {})
    if finished := find_finished(config, parts, tracker, hardware):
        return objective(finished.metrics)
    metrics, _ = learn(config, parts, hardware, None, lambda *_: None, lambda state: None, lambda: None)
    return objective(metrics)


def learn(
    config: DictConfig,
    parts: Parts,
    hardware: Hardware,
    start: dict[str, Any] | None,
    on_epoch: Callable[[int, dict[str, float]], None],
    keep: Callable[[dict[str, Any]], None],
    on_step: Callable[[], None],
) -> tuple[dict[str, float], Exam]:
    """optimizer → fit → test; the trained weights are in `parts.model`.

    Args:
        start: the state of the training to go on from; None for a new one.
        keep: takes the state in which the training can go on, now and then.
    """
    train, device = config.train, hardware.device
    loss = build_loss(config).to(device)
    model = parts.model.to(device)
    teacher = parts.teacher.to(device) if parts.teacher else None
    roles = loss.roles if teacher else ()
    student = Observed(model, model.network, roles)
    if isinstance(teacher, Teacher):
        teacher.ask_for(roles)
    if teacher:
        fit_loss(config, loss, student, teacher, parts.data, device)
    check_sharing(loss, parts.data.unlabelled != "", hardware)
    views = build_views(config, parts.data, teacher is not None)
    cache = Path(config.output_dir) / "cache" / "teacher"
    if isinstance(teacher, Teacher) and train.epochs > 0:
        check_teacher(config.teacher.name, teacher, settings.softening(config), parts.data, cache, hardware)
        answer_in_advance(config, teacher, parts.data, views, hardware)
    # A head on a frozen backbone trains on the backbone's features, as if they were the images.
    features = None if views else build_features(config, model, loss, teacher, parts.data, hardware)
    learner, data = (model.head, features) if features else (model, parts.data)
    data = data.moved_to(device)
    if isinstance(teacher, Teacher):
        teacher.stay_near(device)
    steps_per_epoch = len(batches(data.splits["train"], train.batch_size, hardware.processes))
    optimizer, scheduler = build_optimizer(config, learner, loss, steps_per_epoch)
    if train.compile is True:
        learner.compile()

    changing = model.head if model.frozen_backbone else model  # with features or without
    student.model = hardware.distribute(learner)
    training = Training(student, loss, optimizer, scheduler, hardware, changing)
    if start := hardware.broadcast(start):
        training.restore(start)
        if training.epoch <= train.epochs:
            log.info("goes on at epoch %d of %d, step %d", training.epoch, train.epochs, training.steps + 1)
        else:
            log.info("goes on after its last epoch")
    is_due = every(train.checkpoint_minutes, hardware)

    def after_step() -> None:
        on_step()
        if is_due():
            keep(training.state())

    try:
        metrics = fit(
            training,
            data,
            teacher=teacher,
            views=views,
            mixing=build_mixing(config, parts.data),
            epochs=train.epochs,
            batch_size=train.batch_size,
            seed=config.seed,
            select_best=train.select == "best",
            test_each_epoch=train.test_each_epoch,
            clip_norm=train.clip_norm,
            on_epoch=on_epoch,
            on_step=after_step,
            on_checkpoint=lambda: keep(training.state()),
        )
        teacher_logits = None
        if isinstance(teacher, Teacher) and hardware.rank == 0:
            teacher_logits = logits_of_test_images(teacher.classifier, config.teacher.name, parts.data, cache, hardware)
        exam = examine(learner, data, hardware, teacher_logits)
        metrics = metrics | exam.metrics()
        if isinstance(teacher, Peer):
            metrics |= named("peer", evaluate(teacher.classifier, data, "test", hardware))
    except Interrupted:
        if hardware.processes == 1:  # several may have been interrupted at different steps
            keep(training.state())
        raise
    return metrics, exam


def every(minutes: float | None, hardware: Hardware) -> Callable[[], bool]:
    """A function that says whether so much time has passed since it last said so; never where several processes would
    have to agree on it."""
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        if minutes is None or hardware.processes > 1 or time.monotonic() - last < 60 * minutes:
            return False
        last = time.monotonic()
        return True

    return is_due


def run_tags(config: DictConfig, parts: Parts, hardware: Hardware) -> dict[str, str]:
    """What a run is found by, in MLflow's UI too."""
    tags = {**parts.tags, "kdpipe.data": parts.data.fingerprint, "kdpipe.hardware": hardware.described}
    tags[IMAGE_SHAPE] = "x".join(map(str, parts.data.images.shape[1:]))
    tags[TIMED_ON] = hardware.machine if config.evaluation.timing_seconds > 0 else ""
    if parts.data.unlabelled:
        tags["kdpipe.unlabelled"] = parts.data.unlabelled
        tags[UNLABELLED_IMAGES] = str(int((parts.data.labels < 0).sum()))
    if parts.teacher_source:
        tags["kdpipe.teacher_run"] = parts.teacher_source
    if config.sweep.job:
        tags |= {"kdpipe.sweep": config.sweep.job.id, "mlflow.parentRunId": config.sweep.job.parent}
    return tags


def describe_inputs(config: DictConfig, current: Any, tracker: Any, data: ImageDataset) -> None:
    """Keep the composed config and say what the run is fed."""
    composed = {key: value for key, value in settings.settings_of(config).items() if key not in ("tracking", "sweep")}
    file = current.folder / CONFIG
    write_atomically(file, OmegaConf.to_yaml(OmegaConf.create(composed)).encode())
    current.save(file)
    sizes = {name: len(positions) for name, positions in data.splits.items()}
    if data.unlabelled:
        sizes["unlabelled"] = int((data.labels < 0).sum())
    tracker.log_dataset(current.id, data.name, data.fingerprint, str(config.dataset.get("root", data.name)), sizes)


def save_earlier_epochs(config: DictConfig, current: Any, epoch: int) -> None:
    """Have the weights that were kept before `epoch`, where the training goes on, among the run's artifacts."""
    over = [current.folder / epoch_file(number) for number in range(1, epoch)]
    for file in current.folder.glob(epoch_file("*")):
        if file in over:
            current.save(file)
        else:  # of another run, or this one comes to that epoch again
            file.unlink()
    warn_of_epochs_not_kept(config, epoch - 1, [file.name for file in over if file.exists()])


def warn_of_epochs_not_kept(config: DictConfig, over: int, files: Sequence[str]) -> None:
    """For who asked for them too late."""
    if problem := settings.epochs_not_kept(config, over, files):
        log.warning(problem)


def report_epoch(current: Any, epochs: int, epoch: int, metrics: dict[str, float]) -> None:
    current.log(metrics, step=epoch)
    log.info(epoch_line(epoch, epochs, metrics))


def cost_of(config: DictConfig, parts: Parts, hardware: Hardware) -> dict[str, float]:
    """What the trained network costs, and its teacher."""
    networks: dict[str, Classifier | Ensemble] = {"model": parts.model}
    if parts.teacher:
        networks["peer" if isinstance(parts.teacher, Peer) else "teacher"] = parts.teacher.classifier
    images = parts.data.images[parts.data.splits["test"][:BATCH]]
    return cost(networks, images, hardware, config.evaluation.timing_seconds)


def objective(metrics: Mapping[str, float]) -> float:
    return metrics.get("selected/accuracy", metrics["test/accuracy"])


def show_result(metrics: Mapping[str, float], config: DictConfig, tracker: Any, run_id: str) -> None:
    """The end of a run: what it came to, and where to look next."""
    names = {"model": config.model.name, "teacher": config.teacher.name}
    for line in [*result_table(metrics).splitlines(), *cost_table(metrics, names).splitlines()]:
        log.info(line)
    log.info("weights, config, metrics: %s", os.path.relpath(HydraConfig.get().runtime.output_dir))
    log.info("in MLflow (make ui): %s", tracker.link(run_id))
    log.info("to take it away: %s", settings.export_command(config, run_id))
    log.info("all runs side by side: %s", settings.compare_command(config))


def job(config: DictConfig) -> float:
    """`run`, with its error as one line; in a sweep each run is one line, and the others go on after an error."""
    interruption.handle_signals(worker=True)  # where `cli` has not
    logging.raiseExceptions = False  # a log file on a full disk is no reason for tracebacks
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
        interruption.raise_if_interrupted()
        accuracy = run(config)
    except Interrupted as stopped:
        if queue_again := interruption.previous_handler(stopped.number):
            queue_again(stopped.number, None)  # submitit's, in a job of Slurm
        if interruption.in_worker() and "SLURM_JOB_ID" not in os.environ:
            raise InterruptedJobError(f"interrupted by {stopped}") from None
        raise
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
    warn_once.cache_clear()
    # One of the processes that torchrun started tells of their work.
    if distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        logging.getLogger("kdpipe").setLevel(logging.ERROR)
    interruption.handle_signals()
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on to us instead of printing them
    start = hydra.main(version_base="1.3", config_path=str(settings.CONF), config_name="config")
    try:
        refuse_pickled_config(sys.argv[1:])
        start(run if full_error else job)()
    except Interrupted as stopped:
        print(f"kdpipe: interrupted by {stopped}; {how_it_goes_on('from there')}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"kdpipe: stopped; {how_it_goes_on('from the last checkpoint')}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if full_error:
            raise
        _fail(error)
    finally:
        interruption.restore_signals()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def how_it_goes_on(where: str) -> str:
    """The command that goes on with what this one began."""
    arguments = [word for word in sys.argv[1:] if word != "train.resume=never"]
    if "sweep.rerun=true" in arguments:
        return "with sweep.rerun=true the same command begins all runs anew"
    launcher = ["torchrun", "…", "-m"] if distributed.is_torchelastic_launched() else ["python", "-m"]
    return f"this goes on {where}: {' '.join(launcher)} {shlex.join(['kdpipe', *arguments])}"


def _fail(error: Exception) -> NoReturn:
    print(f"kdpipe: {one_line(error)}", file=sys.stderr)
    sys.exit(1)
