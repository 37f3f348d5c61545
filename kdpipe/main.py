"""The entrypoint, `python -m kdpipe [overrides]`: one run, from its settings to its result."""

import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from kdpipe.assembly.datasets import build_data, forget_data
from kdpipe.assembly.devices import use_hardware
from kdpipe.assembly.epoch_views import first_views
from kdpipe.assembly.networks import images_for
from kdpipe.assembly.parts import Parts, build_parts, check_components
from kdpipe.assembly.preparation import Prepared, cache_folder, prepare
from kdpipe.assembly.run_networks import with_networks_of_runs
from kdpipe.assembly.run_tags import run_tags
from kdpipe.assembly.stores import reach_store
from kdpipe.evaluation.costs import BATCH, cost
from kdpipe.evaluation.exam import Exam, caveats, examine, write_exam
from kdpipe.evaluation.inference import evaluate
from kdpipe.evaluation.report import cost_table, epoch_line, result_table
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.weights import save_weights
from kdpipe.runs.claim import ClaimedError, claim
from kdpipe.runs.commands import compare_command, export_command
from kdpipe.runs.journal import CHECKPOINTS, NOT_CREATED, Journal, is_unfinished, rows_since, sync_command
from kdpipe.runs.moved_store import ARTIFACTS
from kdpipe.runs.names import CONFIG, PEER_WEIGHTS, VIEWS
from kdpipe.settings.addresses import WEIGHTS, epoch_file
from kdpipe.settings.composition import (
    CONF,
    Invocation,
    added_configs,
    hide_passwords,
    left_out_keys,
    read_settings,
    register_resolvers,
)
from kdpipe.settings.credentials import how_to_fill_in, without_passwords
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.hydra_errors import explain
from kdpipe.settings.metric_names import METRICS, Metric
from kdpipe.settings.overrides import names_as_typed
from kdpipe.settings.schema import Settings
from kdpipe.settings.yaml_files import check_foreign, to_yaml
from kdpipe.system import interruption
from kdpipe.system.files import write_atomically
from kdpipe.system.hardware import Hardware
from kdpipe.system.interruption import Interrupted, InterruptedJobError, StopAfter, StoppedEarlyError
from kdpipe.system.once import log_once
from kdpipe.system.optional import optional
from kdpipe.system.progress import IS_OVER, duration, report, report_file
from kdpipe.system.tables import terminal_width
from kdpipe.training.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from kdpipe.training.loop import Hooks, fit, with_prefix
from kdpipe.training.precomputed import logits_of_test_images
from kdpipe.training.teacher import FileTeacher, NetworkTeacher, Peer

if TYPE_CHECKING:
    from kdpipe.tracking import ActiveRun, RunRecord, Tracker

log, sweep_log = logging.getLogger("kdpipe"), logging.getLogger("kdpipe.sweep")
# conf/hydra/launcher/ has the plugins' own names on purpose: hydra/launcher=joblib is what people write.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


class Objective(NamedTuple):
    """What a search looks at: a metric on the validation images, or on the test images where there are none.

    Attributes:
        images: "validation" or "test".
        run_id: in MLflow; "" in a process that only helps to train.
    """

    value: float
    metric: Metric
    images: str
    run_id: str = ""

    def __str__(self) -> str:
        return f"{self.images} {METRICS[self.metric]} {100 * self.value:.2f} %"


def _never(epoch: int, metrics: dict[str, float]) -> bool:
    return False


def run(settings: Settings, folder: Path, invocation: Invocation, stop_after: StopAfter = _never) -> Objective:
    """One run: settings → loss → data → teacher → model → optimizer → fit → exam → cost → return.

    Args:
        folder: of the run.
        stop_after: whether to stop after an epoch with these metrics.

    Raises:
        StoppedEarlyError: it was stopped so, and can be continued.
    """
    check_components(settings)
    hardware = use_hardware(settings)
    uri = reach_store(settings)
    build_data(settings.dataset)

    from kdpipe.tracking import Tracker  # imports mlflow, which takes seconds: after what can fail sooner

    tracker = Tracker(uri, settings.tracking.experiment, Path(settings.output_dir) / ARTIFACTS)
    if hardware.rank > 0:  # computes, while the first process keeps the books
        return _follow(settings, invocation, folder, tracker, hardware)
    if not settings.sweep.job:
        tracker.recover_all(folder.parent)
    with claim(folder):
        tracker.recover(folder)
        parts = build_parts(settings, invocation, tracker, {})
        if finished := _find_finished(settings, folder, parts, tracker, hardware):
            log.info("this run is already finished (train.resume=never trains anew)")
            tracker.restore(finished.id, folder)
            if settings.train.keep_epochs:
                last = settings.train.last_epoch(finished.metrics)
                settings.train.warn_of_missing_epochs(last, tracker.artifacts(finished.id))
            _show_result(finished.metrics, settings, folder, tracker, finished.id)
            return _objective(finished.metrics, settings.train.metric, finished.id)
        return _lead(settings, parts, tracker, folder, hardware, stop_after)


def _find_finished(
    settings: Settings, folder: Path, parts: Parts, tracker: "Tracker", hardware: Hardware
) -> "RunRecord | None":
    """The finished run that this one would repeat, if any; all processes find the same."""
    hardware.check_agreement([parts.tags, parts.teacher_source])
    looks = hardware.rank == 0 and settings.train.resume == "auto" and not is_unfinished(folder, parts.tags)
    found: RunRecord | None = hardware.broadcast(tracker.find_finished(parts.tags) if looks else None)
    return found


def _lead(
    settings: Settings, parts: Parts, tracker: "Tracker", folder: Path, hardware: Hardware, stop_after: StopAfter
) -> Objective:
    """Learn, in a run of MLflow."""
    unfinished, start = _find_unfinished(settings, parts, folder)
    tags = run_tags(settings, parts, hardware)
    history = rows_since(folder, start["history"] if start else []) if unfinished else []
    seconds = start["seconds"] if start else 0.0
    stops: list[int] = []  # the epoch after which the run is to stop
    with tracker.run(settings.run_name, folder, settings.params, tags, unfinished, history, seconds) as current:
        _describe_inputs(settings, current, tracker, parts)
        _show_views(settings, current, parts)
        _save_earlier_epochs(settings, current, start["training"]["epoch"] if start else 1)

        def keep(state: dict[str, Any]) -> None:
            about = {"tags": parts.tags, "run": current.id, "history": current.rows, "seconds": current.seconds}
            save_checkpoint(folder / CHECKPOINTS, {**about, "training": state})
            current.commit()
            if stops:
                raise StoppedEarlyError(stops.pop(), current.id)

        def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
            current.log(metrics, step=epoch)
            share = min(epoch / settings.train.epochs, 0.99)  # the exam follows
            log.info(epoch_line(epoch, settings.train.epochs, metrics, settings.train.metric), extra={"share": share})
            if epoch in (settings.train.keep_epochs or ()):
                save_weights(parts.model.network, folder / epoch_file(epoch), parts.data.class_names)
                current.save(folder / epoch_file(epoch))
            if stop_after(epoch, metrics):
                stops.append(epoch)

        metrics, exam = _learn(settings, parts, hardware, start["training"] if start else None, on_epoch, keep)
        metrics |= _cost_of(settings, parts, hardware)
        for file in _write_results(settings, parts, exam, folder):
            current.save(file)
        current.log(metrics, step=settings.train.last_epoch(metrics))
    _show_result(metrics, settings, folder, tracker, current.id)
    return _objective(metrics, settings.train.metric, current.id)


def _follow(
    settings: Settings, invocation: Invocation, folder: Path, tracker: "Tracker", hardware: Hardware
) -> Objective:
    """Learn as one of several processes."""
    parts = build_parts(settings, invocation, tracker, {})
    if finished := _find_finished(settings, folder, parts, tracker, hardware):
        return _objective(finished.metrics, settings.train.metric)
    metrics, _ = _learn(settings, parts, hardware, None, lambda epoch, metrics: None, lambda state: None)
    return _objective(metrics, settings.train.metric)


def _learn(
    settings: Settings,
    parts: Parts,
    hardware: Hardware,
    start: dict[str, Any] | None,
    on_epoch: Callable[[int, dict[str, float]], None],
    keep: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, float], Exam]:
    """Prepare, fit, examine; the trained weights are in `parts.model`.

    Args:
        start: the state of the training to continue from; None for a new one.
        keep: saves the state from which the training can continue, now and then.
    """
    prepared = prepare(settings, parts, hardware, start)
    training = prepared.training
    is_due = _every(settings.train.checkpoint_minutes, hardware)

    def on_step() -> None:
        if is_due():
            keep(training.state())

    hooks = Hooks(on_epoch, on_step, on_checkpoint=lambda: keep(training.state()))
    try:
        metrics = fit(training, prepared.data, prepared.recipe, hooks)
        return _examine(settings, parts, prepared, hardware, metrics)
    except Interrupted:
        if hardware.processes == 1:  # several may have been interrupted at different steps
            keep(training.state())
        raise


def _examine(
    settings: Settings, parts: Parts, prepared: Prepared, hardware: Hardware, metrics: dict[str, float]
) -> tuple[dict[str, float], Exam]:
    """The metrics with those on the test images, and the answers that they come from."""
    teacher, logits = prepared.recipe.teacher, None
    if teacher and not teacher.learns and hardware.rank == 0:
        cache = cache_folder(settings, "teacher")
        logits = logits_of_test_images(teacher, settings.teacher.name, parts.data, cache, hardware)
    exam = examine(prepared.learner, prepared.data, hardware, logits)
    metrics = metrics | exam.metrics()
    if isinstance(teacher, FileTeacher) and (validation := teacher.accuracy(parts.data, "validation")) is not None:
        metrics["teacher/val_accuracy"] = validation
    if isinstance(teacher, Peer):
        metrics |= with_prefix(teacher.role, evaluate(teacher.classifier, prepared.data, "test", hardware))
    return metrics, exam


def _find_unfinished(settings: Settings, parts: Parts, folder: Path) -> tuple[str | None, dict[str, Any] | None]:
    """The MLflow run that was begun in the folder and not finished, and its newest checkpoint.

    Raises:
        ValueError: the folder has another run (of other images, or another teacher) whose results would be lost.
    """
    if settings.train.resume == "never":
        remove_checkpoints(folder / CHECKPOINTS)
        return None, None
    journal, start = Journal.read(folder), load_checkpoint(folder / CHECKPOINTS)
    if journal and not journal.matches(parts.tags):
        if not journal.delivered:
            raise ValueError(
                f"{folder} has a run of another teacher or other images that {journal.uri} does not have completely; "
                f"{sync_command(folder)} delivers it, train.resume=never drops it"
            )
        journal = None
    if start and start["tags"] != parts.tags:
        log.warning("the unfinished run in this folder is of other images or another teacher: starting a new one")
        remove_checkpoints(folder / CHECKPOINTS)
        start = None
    if journal and journal.run_id != NOT_CREATED:
        return journal.run_id, start
    return start["run"] if start else None, start


def _every(minutes: float | None, hardware: Hardware) -> Callable[[], bool]:
    """A function that is true whenever so much time has passed since it last was; never where several processes would
    have to agree on it."""
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        if minutes is None or hardware.processes > 1 or time.monotonic() - last < 60 * minutes:
            return False
        last = time.monotonic()
        return True

    return is_due


def _describe_inputs(settings: Settings, current: "ActiveRun", tracker: "Tracker", parts: Parts) -> None:
    """Save the settings and log the data set."""
    file, data = current.folder / CONFIG, parts.data
    composed = {key: value for key, value in settings.plain.items() if key not in ("tracking", "sweep")}
    write_atomically(file, to_yaml(composed).encode())
    current.save(file)
    sizes = {name: len(positions) for name, positions in data.splits.items()}
    if data.unlabelled:
        sizes["unlabelled"] = int((data.labels < 0).sum())
    tracker.log_dataset(current.id, data.name, data.fingerprint, settings.dataset.root, sizes)


def _show_views(settings: Settings, current: "ActiveRun", parts: Parts) -> None:
    """Save a picture of what the first epoch sees, where the settings ask for one."""
    if not settings.train.show_views:
        return
    with optional("the picture of views"):
        from kdpipe.evaluation.figures import as_png, draw_views  # takes a second

        file = current.folder / VIEWS
        write_atomically(file, as_png(draw_views(*first_views(settings, parts.data))))
        current.save(file)


def _save_earlier_epochs(settings: Settings, current: "ActiveRun", epoch: int) -> None:
    """Save the weights that were kept before `epoch`, where the training continues, among the run's artifacts."""
    over = [current.folder / epoch_file(number) for number in range(1, epoch)]
    for file in current.folder.glob(epoch_file("*")):
        if file in over:
            current.save(file)
        else:  # of another run, or this one comes to that epoch again
            file.unlink()
    settings.train.warn_of_missing_epochs(epoch - 1, [file.name for file in over if file.exists()])


def _cost_of(settings: Settings, parts: Parts, hardware: Hardware) -> dict[str, float]:
    """The cost of the trained network, and of its teacher."""
    networks: dict[str, Classifier | Ensemble] = {"model": parts.model}
    if isinstance(parts.teacher, NetworkTeacher):
        networks[parts.teacher.role] = parts.teacher.classifier
    images = images_for(parts.model, parts.data, parts.data.splits["test"][:BATCH])
    return cost(networks, images, hardware, settings.evaluation.timing_seconds, attempt=optional)


def _write_results(settings: Settings, parts: Parts, exam: Exam, folder: Path) -> list[Path]:
    """Write the weights and the answers into the folder of the run; the files."""
    class_names = parts.data.class_names
    save_weights(parts.model.network, folder / WEIGHTS, class_names)
    files = [folder / WEIGHTS, *write_exam(exam, parts.data, folder, settings.evaluation.pictures)]
    for caveat in caveats(exam, class_names, parts.data.duplicates):
        log.warning(caveat)
    if isinstance(parts.teacher, Peer):
        files.append(folder / PEER_WEIGHTS)
        save_weights(parts.teacher.classifier.network, files[-1], class_names)
    return files


def _objective(metrics: Mapping[str, float], metric: Metric, run_id: str = "") -> Objective:
    validation = metrics.get(f"selected/{metric}")
    if validation is None:
        return Objective(metrics[f"test/{metric}"], metric, "test", run_id)
    return Objective(validation, metric, "validation", run_id)


def _show_result(
    metrics: Mapping[str, float], settings: Settings, folder: Path, tracker: "Tracker", run_id: str
) -> None:
    """The end of a run: its result, and where to look next."""
    names = {"model": settings.model.name, "teacher": settings.teacher.name}
    width = terminal_width() - len("[00:00:00] ")  # which stands before each line of the log
    with optional("the table of results"):
        for line in [
            *result_table(metrics, width, settings.train.metric).splitlines(),
            *cost_table(metrics, names, width).splitlines(),
        ]:
            log.info(line)
    log.info("weights, config, metrics: %s", os.path.relpath(folder))
    log.info("in MLflow (make ui): %s", tracker.link(run_id))
    log.info("all runs there: %s", tracker.table_link())
    log.info("to export it: %s", export_command(settings, run_id))
    log.info("to compare all runs: %s", compare_command(settings))
    if note := how_to_fill_in(settings.tracking.uri or ""):
        log.info("in these commands, %s", note)


def job(config: DictConfig) -> float:
    """`run`, with its error as one line; in a sweep, where the others continue after an error, a line for its start and
    one for its end."""
    interruption.handle_signals(worker=True)  # where `cli` has not
    logging.raiseExceptions = False  # a log file on a full disk is no reason for tracebacks
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        try:
            return _run_composed(config)
        except Exception as error:  # before Hydra logs it in its own way
            _fail(error)
    if search_job := config.search.job:
        folder = Path(str(config.output_dir)) / "runs" / search_job.reports
        with report(report_file(folder, search_job.number), sweep_log.name):
            return _trial_of_search(config)
    if not (details := config.sweep.job):  # of another sweeper than ours
        return _run_of_sweep(config)
    folder = Path(str(config.output_dir)) / "runs" / details.reports
    with report(report_file(folder, details.number), sweep_log.name):
        return _run_of_sweep(config)


def _run_of_sweep(config: DictConfig) -> float:
    started = time.monotonic()
    sweep_log.info("starts")
    try:
        interruption.raise_if_interrupted()
        objective = _run_objective(config)
    except Interrupted as stopped:
        _pass_on(stopped)
        raise
    except ClaimedError as error:
        sweep_log.info("left alone, %s", error, extra=IS_OVER)
        raise
    except Exception as error:
        sweep_log.error("failed, %s", explain(error), extra=IS_OVER)
        raise
    sweep_log.info("%s in %s", objective, duration(time.monotonic() - started), extra=IS_OVER)
    return objective.value


def _trial_of_search(config: DictConfig) -> float:
    """One trial of a search, which trains several runs."""
    from kdpipe.sweeps.trials import SeedResult, work_on_trial  # imports Optuna

    def train(settings: Settings, invocation: Invocation, stop_after: StopAfter) -> SeedResult:
        interruption.raise_if_interrupted()
        objective = run(settings, settings.folder, invocation, stop_after)
        return SeedResult(objective.value, objective.run_id)

    try:
        return work_on_trial(read_settings(config, Invocation.of(HydraConfig.get())), train)
    except Interrupted as stopped:
        _pass_on(stopped)
        raise


def _pass_on(stopped: Interrupted) -> None:
    """Let the cluster queue an interrupted job again, and tell the process that started this one."""
    if queue_again := interruption.previous_handler(stopped.number):
        queue_again(stopped.number, None)  # submitit's, in a job of Slurm
    if interruption.in_worker() and "SLURM_JOB_ID" not in os.environ:
        raise InterruptedJobError(f"interrupted by {stopped}") from None


def _run_composed(config: DictConfig) -> float:
    return _run_objective(config).value


def _run_objective(config: DictConfig) -> Objective:
    """Where Hydra ends and the settings begin."""
    own = HydraConfig.get()
    _hide_kept_passwords(own)
    if own.job.chdir:  # Hydra has gone to the run's folder: a relative path would be another one in each run of a sweep
        os.chdir(own.runtime.cwd)
        log.info("hydra.job.chdir has no effect: paths start in the folder of the command")
    invocation = Invocation.of(own)
    settings = with_networks_of_runs(read_settings(config, invocation), invocation, say=True)
    if not settings.sweep.job:  # else the sweep has said it
        for line in left_out_keys([(invocation.overrides, settings)]):
            log.info(line)
    return run(settings, Path(own.runtime.output_dir), invocation)


def _identity(*, _root_: DictConfig) -> str:
    """`${identity:}`, a run's identity, which names its folder."""
    invocation = Invocation.of(_root_.hydra)
    return with_networks_of_runs(read_settings(_root_, invocation), invocation).identity


def _hide_kept_passwords(own: HydraConf) -> None:
    """Hide passwords in the configs that Hydra has just written to the run's folder. `hide_passwords` has done so for
    the command; here it is about `tracking.uri` in a config file."""
    if own.output_subdir:
        for file in (Path(own.runtime.output_dir) / own.output_subdir).glob("*.yaml"):
            kept = file.read_text()
            if (hidden := without_passwords(kept)) != kept:
                write_atomically(file, hidden.encode())


# At import, and not in `cli`: the workers of a sweep import this module to call `job`, and compose before that.
register_resolvers()
OmegaConf.register_new_resolver("identity", _identity, replace=True)


def cli() -> None:
    """`kdpipe` and `python -m kdpipe`: errors as one line, exit status 1; 130 and 143 when interrupted."""
    forget_data()
    log_once.cache_clear()
    # One of the processes that torchrun started reports on their work.
    if distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        logging.getLogger("kdpipe").setLevel(logging.ERROR)
    interruption.handle_signals()
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes its errors on to us instead of printing them
    try:
        sys.argv[1:] = hide_passwords(sys.argv[1:])
        _refuse_pickled_config(sys.argv[1:])
        sys.argv[1:] = _as_meant(sys.argv[1:])
        for file in added_configs(sys.argv[1:]):
            check_foreign(file)
        start = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        start(_run_composed if full_error else job)()
    except Interrupted as stopped:
        print(f"kdpipe: interrupted by {stopped}; {_how_to_continue('from there')}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"kdpipe: stopped; {_how_to_continue('from the last checkpoint')}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if full_error:
            raise
        _fail(error)
    finally:
        interruption.restore_signals()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _as_meant(arguments: Sequence[str]) -> list[str]:
    """A command's arguments with -m first, which Hydra does not take among the overrides, and names as they were
    typed."""
    flags = [word for word in arguments if word in ("-m", "--multirun")]
    return [*flags, *(names_as_typed(word) for word in arguments if word not in flags)]


def _refuse_pickled_config(arguments: Sequence[str]) -> None:
    """Raise ConfigError for Hydra's --experimental-rerun, however abbreviated: it unpickles a file."""
    for argument in arguments:
        if (
            argument.startswith("--")
            and len(argument) > 2
            and "--experimental-rerun".startswith(argument.partition("=")[0])
        ):
            raise ConfigError(argument, expected="the command that made it: a pickled config can run code")


def _how_to_continue(where: str) -> str:
    """The command that continues what this one began."""
    arguments = [word for word in sys.argv[1:] if word != "train.resume=never"]
    if "sweep.rerun=true" in arguments:
        return "with sweep.rerun=true the same command begins all runs anew"
    launcher = ["torchrun", "…", "-m"] if distributed.is_torchelastic_launched() else ["python", "-m"]
    command = f"{' '.join(launcher)} {shlex.join(['kdpipe', *arguments])}"
    note = how_to_fill_in(command)
    return f"this continues {where}: {command}{f' ({note})' if note else ''}"


def _fail(error: Exception) -> NoReturn:
    print(f"kdpipe: {explain(error)}", file=sys.stderr)
    sys.exit(1)
