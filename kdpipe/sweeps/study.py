"""The trials of a search, kept in Optuna's storage: which is next, which was left by a process that is gone."""

import json
import os
import re
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
from filelock import BaseFileLock, FileLock, Timeout
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from scipy import stats
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from kdpipe.runs.claim import is_alive, this_process
from kdpipe.settings.credentials import without_password
from kdpipe.settings.errors import ConfigError, first_line
from kdpipe.settings.schema import SearchSettings
from kdpipe.system.randomness import derive_seed

REDUCTION = 3  # one of so many trials goes on from each rung
BEAT = 30  # seconds between signs of life of a trial
SILENCE = 600  # seconds without one, after which a trial on another machine is taken over
LIKELY_WORSE = 0.05  # one-sided p-value
SAME_FAILURES = 3  # in a row, which stop a search
CONNECT_SECONDS = 10
CREATION_TRIES = 5


def storage_address(settings: SearchSettings, output_dir: str) -> str:
    """Where a search keeps its trials."""
    return settings.storage or f"sqlite:///{Path(output_dir).resolve() / 'search.db'}"


def open_storage(address: str) -> RDBStorage:
    """Optuna's storage at an address.

    Raises:
        ConfigError: it is no address of a database, has a password in it, or does not answer.
    """
    key, shown = "search.storage", without_password(address)
    if shown != address:
        raise ConfigError(key, shown, problem="a password would be kept with each run; PGPASSWORD or ~/.pgpass has it")
    for is_last in (*[False] * CREATION_TRIES, True):
        try:
            is_sqlite = make_url(address).get_backend_name() == "sqlite"
            options = {"timeout": 120} if is_sqlite else {"connect_timeout": CONNECT_SECONDS}
            if is_sqlite and (file := make_url(address).database):
                Path(file).parent.mkdir(parents=True, exist_ok=True)
            return RDBStorage(address, engine_kwargs={"connect_args": options, "pool_pre_ping": not is_sqlite})
        except (SQLAlchemyError, ImportError, ValueError, OSError, RuntimeError) as error:
            # Another process may be making the same tables.
            if not is_last and isinstance(error, IntegrityError | ProgrammingError | RuntimeError):
                time.sleep(1)
                continue
            problem = first_line(error.__cause__ or error)
            if "table schema" in problem:
                problem = "this database has other tables, such as MLflow's, or is of another version of Optuna"
            expected = "a database of its own, sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE"
            raise ConfigError(key, shown, expected, problem) from error
    raise AssertionError  # the last try returns or raises


def open_study(
    settings: SearchSettings, storage: RDBStorage, name: str, epochs: int, words: Sequence[str], inputs: str
) -> Study:
    """The study of a search, an existing or a new one.

    Args:
        epochs: of a run.
        words: what is searched.
        inputs: a hash of what its trials share, such as the epochs, the images and the teacher.

    Raises:
        ConfigError: a study of another search has this name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [StudyDirection.MAXIMIZE, *([StudyDirection.MINIMIZE] if "latency" in settings.goals else [])]
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=directions,
        pruner=pruner(settings, epochs),
        load_if_exists=True,
    )
    known, mine = study.user_attrs.get("search"), [*words, *map(str, settings.goals)]
    if known is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("inputs", inputs)  # first: another process takes the study for whole once it has the other
        study.set_user_attr("search", mine)
    elif known != mine:
        theirs = " ".join(known[: len(words)]) if known else "nothing of kdpipe"
        raise ConfigError("search.study", name, "a name of its own", f"the study of this name searches {theirs}")
    elif study.user_attrs.get("inputs") != inputs:
        problem = "the study of this name has other settings, images or teachers"
        raise ConfigError("search.study", name, "a name of its own", problem)
    return study


def sampler(settings: SearchSettings, number: int) -> BaseSampler:
    """What chooses a trial's settings. Its random numbers depend on the seed and the trial alone, so that a search that
    was killed goes on as one that was not."""
    seed = derive_seed(settings.seed, f"search/{number}") % 2**32
    if settings.sampler == "cmaes":
        return CmaEsSampler(seed=seed, n_startup_trials=10)
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    if settings.sampler == "grid":
        return BruteForceSampler(seed=settings.seed)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    # Groups: the settings that each method has are chosen together.
    return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def pruner(settings: SearchSettings, epochs: int) -> BasePruner:
    """What stops a trial's first run early, by the metric after its epochs."""
    if settings.pruner == "none" or epochs < REDUCTION or len(settings.goals) > 1:
        return NopPruner()
    if settings.pruner == "halving":
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    return HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=REDUCTION)


def is_likely_worse(values: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a trial is worse than the best one, by the paired differences on the seeds so far: a one-sided t-test, as
    the comparison's intervals are. (Wilcoxon's test cannot reach 0.05 with fewer than five seeds.)"""
    differences = [mine - its for mine, its in zip(values, best, strict=False)]
    if len(differences) < 2:
        return False
    if len(set(differences)) == 1:
        return differences[0] < 0
    return bool(stats.ttest_1samp(differences, 0, alternative="less").pvalue < LIKELY_WORSE)


@contextmanager
def next_trial(
    study: Study, settings: SearchSettings, folder: Path, wanted: int, since: float
) -> Iterator[Trial | None]:
    """The trial to work on within the block: one that another process left, or a new one; None where there are enough,
    or where the last ones since a time failed for one reason.

    Args:
        folder: for locks, of the processes on this machine.
    """
    with ExitStack() as stack:
        with FileLock(folder / ".ask"):  # one after the other
            trial = _left(study, settings, stack) or _asked(study, settings, folder, wanted, since, stack)
            if trial:
                trial.set_user_attr("beat", time.time())
        if trial:
            stack.enter_context(_beating(trial))
        yield trial


def _left(study: Study, settings: SearchSettings, stack: ExitStack) -> Trial | None:
    """A trial that a process which is gone left running."""
    for known in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        owner = _owner(known)
        if owner.get("host") == socket.gethostname():
            lock = FileLock(owner["lock"])
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                continue
        elif _was_seen(known):
            continue
        else:
            lock = None
        study.sampler = sampler(settings, known.number)
        trial = Trial(study, known._trial_id)
        if lock:
            _own(trial, lock)
        return trial
    return None


def _asked(
    study: Study, settings: SearchSettings, folder: Path, wanted: int, since: float, stack: ExitStack
) -> Trial | None:
    """A new trial."""
    trials = study.get_trials(deepcopy=False)
    if len(trials) >= wanted or common_failure(trials, since):
        return None
    study.sampler = sampler(settings, len(trials))
    lock = FileLock(folder / f".{study.study_name}-{len(trials)}")
    stack.enter_context(lock.acquire())
    trial = study.ask()
    _own(trial, lock)
    return trial


def common_failure(trials: Sequence[FrozenTrial], since: float) -> str:
    """The one reason for which the last trials since a time failed; "" where there is none."""
    ended = [(trial.datetime_complete.timestamp(), trial) for trial in trials if trial.datetime_complete]
    last = [trial for end, trial in sorted(ended, key=lambda pair: pair[0]) if end >= since][-SAME_FAILURES:]
    reasons = [str(trial.user_attrs.get("reason", "")) for trial in last if trial.state == TrialState.FAIL]
    kinds = {re.sub(r"\d+", "0", reason) for reason in reasons}  # the same one may name another epoch or value
    return reasons[-1] if len(reasons) == SAME_FAILURES and len(kinds) == 1 else ""


def counted(study: Study) -> Counter[str]:
    """How many trials are complete, pruned, failed, and still running."""
    names = {TrialState.FAIL: "failed", TrialState.WAITING: "running"}
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return Counter(names.get(state, state.name.lower()) for state in states)


def best_of(study: Study) -> FrozenTrial | None:
    """The complete trial with the best metric, the first of equals."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return max(complete, key=lambda trial: trial.values[0], default=None)


def workers(study: Study) -> list[int]:
    """The process ids of the children of this process that work on trials."""
    running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    owners = [_owner(trial) for trial in running]
    mine = [one for one in owners if (one.get("host"), one.get("parent")) == (socket.gethostname(), os.getpid())]
    return [owner["pid"] for owner in mine if is_alive(owner)]


def _own(trial: Trial, lock: BaseFileLock) -> None:
    trial.set_user_attr("process", json.dumps({**this_process(), "lock": str(Path(lock.lock_file).resolve())}))


def _owner(trial: FrozenTrial) -> dict[str, Any]:
    owner: dict[str, Any] = json.loads(trial.user_attrs.get("process", "{}"))
    return owner


def _was_seen(trial: FrozenTrial) -> bool:
    """Whether there was a sign of life of a trial lately."""
    began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - float(trial.user_attrs.get("beat", began)) < SILENCE


@contextmanager
def _beating(trial: Trial) -> Iterator[None]:
    """Signs of life for other machines within the block."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(BEAT):
            trial.set_user_attr("beat", time.time())

    thread = threading.Thread(target=beat, name="kdpipe-trial", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
