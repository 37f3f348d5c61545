"""Searches: what they choose from, what they stop early, and that being killed changes nothing."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from helpers import assert_refused
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import create_engine, text

from kdpipe.settings.composition import CONF, Invocation
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import SearchJob, SearchSettings, Settings
from kdpipe.sweeps.space import Axis, Space, read_space, suggest
from kdpipe.sweeps.study import common_failure, is_likely_worse, next_trial, open_storage, open_study
from kdpipe.sweeps.trials import SeedResult, StopAfter, _Trial

SMALL = ["dataset=digits", "dataset.train_fraction=0.2", "train.threads=1", "train.batch_size=20", "optimizer.lr=3e-3"]
TEACHER = [*SMALL, "experiment=teacher", "model=resnet20", "model.depth=8", "train.epochs=2"]
SEARCH = ["experiment=search", *SMALL, "model=resnet20", "model.depth=8", "model@teacher=resnet20", "teacher.depth=8"]
SEARCH += ["train.epochs=3", "search.trials=5", "search.pruner=halving", "seed=0,1", "sweep.confirm_seeds=0"]


@pytest.fixture
def teacher(kdpipe: Callable) -> None:
    assert kdpipe(*TEACHER).status == 0


def space_of(*words: str) -> Space:
    return read_space(words, OverridesParser.create())


def trials(folder: Path = Path()) -> list[FrozenTrial]:
    storage = f"sqlite:///{(folder / 'outputs/search.db').resolve()}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def outcome_of(found: list[FrozenTrial]) -> list[tuple]:
    """All of the trials that does not depend on the clock."""
    return [
        (one.number, one.state, one.params, one.values, one.intermediate_values, one.user_attrs.get("reason"))
        for one in found
    ]


def runs() -> list[Run]:
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    return client.search_runs([client.get_experiment_by_name("kdpipe").experiment_id])


@pytest.mark.parametrize(
    ("word", "distribution"),
    [
        ("loss.alpha=interval(0,1)", FloatDistribution(0, 1)),
        ("loss.temperature=tag(log,interval(1,20))", FloatDistribution(1, 20, log=True)),
        ("model.depth=int(interval(1,4))", IntDistribution(1, 4)),
        ("train.batch_size=tag(log,int(interval(16,256)))", IntDistribution(16, 256, log=True)),
        ("train.batch_size=range(20,100,20)", IntDistribution(20, 80, step=20)),
        ("loss.alpha=range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25)),
    ],
)
def test_hydras_grammar_says_what_is_chosen(word: str, distribution: object) -> None:
    (axis,) = space_of(word).axes
    assert axis.distribution == distribution


def test_choices_seeds_and_fixed_settings_are_told_apart() -> None:
    space = space_of("loss=choice(kd,dkd)", "loss.alpha=0.1,0.5", "seed=range(3)", "train.epochs=2", "loss.alpha=0.5,1")
    assert [axis.word for axis in space.groups] == ["loss=choice(kd,dkd)"]
    assert [axis.ends for axis in space.values] == [["loss.alpha=0.5", "loss.alpha=1"]]  # the last one counts
    assert (space.seeds, space.fixed) == ((0, 1, 2), ("train.epochs=2",))
    assert space_of(*space.overrides) == space


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("loss.alpha=interval(1,0)", "interval(LOW,HIGH) with LOW below HIGH"),
        ("loss.alpha=interval(1,1)", "interval(LOW,HIGH) with LOW below HIGH"),
        ("loss.temperature=tag(log,interval(0,20))", "a logarithmic range that begins above 0"),
        ("loss.alpha=tag(lgo,interval(1,2))", "unknown tag lgo"),
        ("loss.alpha=tag(log,choice(1,2))", "the tag log on an interval"),
        ("loss.alpha=0.5,0.50", "each value once"),
        ("seed=interval(0,3)", "the seeds of each trial"),
        ("seed=0.5,1", "integers"),
        ("train.epochs=3", "something to choose"),
    ],
)
def test_what_is_no_space_is_named(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        space_of(word)


@given(st.floats(0, 1), st.booleans())
def test_a_number_is_short_and_inside_of_its_range(value: float, is_log: bool) -> None:
    low, high = (0.001, 3.0) if is_log else (-1.0, 2.0)
    axis = Axis("loss.alpha", "", FloatDistribution(low, high, log=is_log))
    key, _, text = axis.written(low + value * (high - low)).partition("=")
    assert key == "loss.alpha"
    assert low < float(text) < high
    assert len(text.lstrip("-0.")) <= 9
    assert abs(float(text) - (low + value * (high - low))) <= 1e-3 * max(abs(low), high)


def test_what_only_some_methods_have_is_asked_only_there() -> None:
    space = space_of("loss=kd,dist", "loss.temperature=interval(1,4)", "loss.beta=interval(1,2)")
    known = {"kd": {"loss.temperature": 4}, "dist": {"loss.beta": 1}}

    def settings(words: list[str]) -> dict[str, float]:
        return known[words[-1].partition("=")[2]]

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    asked = {}
    for _ in range(9):
        method, *others = suggest(study.ask(), space, settings)
        asked[method] = [word.partition("=")[0] for word in others]
    assert asked == {"loss=kd": ["loss.temperature"], "loss=dist": ["loss.beta"]}


def test_a_trial_that_is_worse_on_each_seed_is_stopped() -> None:
    assert is_likely_worse([0.70, 0.71], [0.80, 0.811])
    assert not is_likely_worse([0.70], [0.80])  # one seed shows nothing
    assert not is_likely_worse([0.70, 0.84, 0.78], [0.80, 0.80, 0.80])
    assert not is_likely_worse([0.80, 0.80], [0.80, 0.80])
    assert not is_likely_worse([0.9, 0.91], [0.8, 0.8])


def test_three_failures_for_one_reason_stop_a_search() -> None:
    def failed(*reasons: str) -> list[FrozenTrial]:
        return [create_trial(state=TrialState.FAIL, user_attrs={"reason": reason}) for reason in reasons]

    done = create_trial(value=0.5)
    assert common_failure(failed("a", "a", "a"), since=0) == "a"
    assert common_failure(failed("in epoch 1", "in epoch 12", "in epoch 3"), since=0) == "in epoch 3"
    assert common_failure([done, *failed("b", "a", "a", "a")], since=0) == "a"
    assert common_failure(failed("a", "b", "a"), since=0) == ""
    assert common_failure([*failed("a", "a"), done], since=0) == ""
    assert common_failure(failed("a", "a", "a"), since=time.time() + 60) == ""  # those of an earlier command


def test_a_trial_is_left_to_who_works_on_it_and_taken_over_from_who_is_gone(tmp_path: Path) -> None:
    settings, storage = SearchSettings(trials=2), open_storage(f"sqlite:///{tmp_path / 'search.db'}")
    study = open_study(settings, storage, "s", 3, ["loss.alpha=interval(0,1)"], "")
    with next_trial(study, settings, tmp_path, 2, 0) as first:
        alpha = first.suggest_float("loss.alpha", 0, 1)
        with (
            next_trial(study, settings, tmp_path, 2, 0) as second,
            next_trial(study, settings, tmp_path, 2, 0) as third,
        ):
            assert (first.number, second.number, third) == (0, 1, None)
            study.tell(second, 0.5)
    with next_trial(study, settings, tmp_path, 2, 0) as again:  # nobody has told how the first ended
        assert again.number == 0
        assert again.suggest_float("loss.alpha", 0, 1) == alpha
    first_time = [trial.params for trial in study.trials]

    other = open_study(settings, storage, "t", 3, ["loss.alpha=interval(0,1)"], "")
    with next_trial(other, settings, tmp_path, 2, 0) as same:
        assert same.suggest_float("loss.alpha", 0, 1) == first_time[0]["loss.alpha"]  # of the seed and the number alone


def test_a_search_ends_in_a_comparison_with_its_trials_below_one_parent(kdpipe: Callable, teacher: None) -> None:
    outcome = kdpipe(*SEARCH, "loss=choice(kd,dkd)", "sweep.confirm_seeds=2")
    assert outcome.status == 0, outcome.errors
    found = trials()
    states = {one.state for one in found}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all("loss.temperature" in one.params for one in found)
    by_id = {run.info.run_id: run for run in runs()}
    (parent,) = [run for run in by_id.values() if run.data.tags["kdpipe.stage"] == "sweep"]
    for trial in found:
        for run_id in trial.user_attrs["runs"]:
            tags = by_id[run_id].data.tags
            assert tags["kdpipe.trial"] == str(trial.number)
            assert tags["kdpipe.state"] == {"COMPLETE": "complete", "PRUNED": "pruned"}[trial.state.name]
            assert tags["mlflow.parentRunId"] == parent.info.run_id
    alone = [run for run in by_id.values() if run.info.run_name.startswith("a0_s") or "alone" in run.info.run_name]
    assert len(alone) == 2 + 2  # once on each seed, and on those of the confirmation

    best = max((one for one in found if one.state == TrialState.COMPLETE), key=lambda one: one.value)
    confirmed = [run for run in by_id.values() if run.data.params.get("seed") in ("2", "3")]
    taught = [run for run in confirmed if run.data.tags["kdpipe.stage"] == "distill"]
    assert {run.data.params["loss.alpha"] for run in taught} == {best.user_attrs["words"][1].partition("=")[2]}
    assert "the verdict rests on seeds that the choice did not see: 2, 3" in outcome.output
    epochs = sum(one.user_attrs["epochs"] for one in found)
    assert f"epochs trained: {epochs} of the 30 that a grid of as many cells takes" in outcome.output
    assert epochs < 30
    assert f"trial {best.number}: {100 * best.value:.2f} %" in outcome.output
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    pictures = {file.path for file in client.list_artifacts(parent.info.run_id) if file.path.startswith("search_")}
    assert pictures == {"search_history.png", "search_importance.png", "search_contour.png"}
    assert parent.data.tags["kdpipe.verdict"] in outcome.output

    more = kdpipe(*SEARCH, "loss=choice(kd,dkd)", "search.trials=6")  # goes on where it was
    assert more.status == 0, more.errors
    assert outcome_of(trials())[:5] == outcome_of(found)
    assert len(trials()) == 6


def test_a_trial_goes_by_the_averaged_weights_and_counts_the_epochs_that_it_has_trained(
    composed: Callable, tmp_path: Path
) -> None:
    words = ["loss.alpha=interval(0,1)", "seed=0,1", "dataset=digits", "train.ema=0.9", "train.select=ema"]
    search = SearchSettings(storage=f"sqlite:///{tmp_path / 'search.db'}")
    study = open_study(search, open_storage(search.storage), "t", 10, words, "")
    study.set_user_attr("words", words)

    def run(settings: Settings, invocation: Invocation, stop_after: StopAfter) -> SeedResult:
        for epoch, averaged in enumerate((0.3, 0.4), start=1):  # of 10: train.early_stop
            assert not stop_after(epoch, {"val/accuracy": 0.9, "val/accuracy_ema": averaged})
        return SeedResult(0.4, settings.run_name)

    job = SearchJob(study="t", sweep="s", parent="p", teacher="", since=0, number=1, reports="r")
    trial = _Trial(composed(*words[2:]), job, study, study.ask(), run)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert trial._train(["loss.alpha=0.5"]) == ""
    (known,) = study.get_trials()
    assert known.intermediate_values == {1: 0.3, 2: 0.4}
    assert known.user_attrs["epochs"] == 4


@pytest.mark.faults
def test_a_search_that_is_killed_five_times_ends_as_one_that_is_not(
    start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        assert start(*TEACHER, folder=folder).end() == 0
    search = [*SEARCH, "search.trials=3"]
    began = time.monotonic()
    assert start(*search, folder=whole).end() == 0
    seconds = time.monotonic() - began
    for _ in range(5):
        begun = start(*search, folder=killed)
        time.sleep(random.uniform(0.2, 0.9) * seconds)
        begun.kill()
    assert start(*search, folder=killed).end() == 0
    assert outcome_of(trials(killed)) == outcome_of(trials(whole))


@pytest.mark.faults
@pytest.mark.xdist_group("database")
def test_two_processes_share_a_study_in_one_database(start: Callable, tmp_path: Path, database: str) -> None:
    if not database.startswith("postgresql"):
        pytest.skip("needs PostgreSQL")
    with create_engine(database, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("CREATE DATABASE searches"))  # MLflow's tables and Optuna's go by the same names
    store, storage = f"tracking.uri={database}", database.replace("/postgres", "/searches")
    assert start(*TEACHER, store).end() == 0
    refused = start(*SEARCH, store, f"search.storage={database}")
    assert refused.end() == 1
    assert "this database has other tables, such as MLflow's" in refused.output
    shared = [*SEARCH, store, f"search.storage={storage}", "search.study=shared", "search.trials=6"]
    both = [start(*shared, f"output_dir={name}") for name in ("one", "other")]  # as on two machines
    assert [one.end() for one in both] == [0, 0], "".join(one.output for one in both)
    study = optuna.load_study(study_name="shared", storage=storage)
    assert [trial.number for trial in study.trials] == list(range(6))
    assert all(trial.state.is_finished() for trial in study.trials)
    workers = {trial.user_attrs["process"] for trial in study.trials}
    assert len(workers) > 1


@pytest.mark.faults
def test_trials_run_side_by_side(kdpipe: Callable, teacher: None) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    outcome = kdpipe(*SEARCH, "hydra/launcher=joblib")
    assert outcome.status == 0, outcome.errors
    assert all(trial.state.is_finished() for trial in trials())
    assert len({trial.user_attrs["process"] for trial in trials()}) > 1


def test_networks_that_are_too_slow_are_not_trained(kdpipe: Callable, teacher: None) -> None:
    outcome = kdpipe(*SEARCH, "search.max_latency_ms=0.0001", "search.trials=2")
    assert outcome.status == 0, outcome.errors
    assert {trial.state for trial in trials()} == {TrialState.PRUNED}
    assert {trial.user_attrs.get("epochs") for trial in trials()} == {None}
    assert "not trained, resnet20 takes" in outcome.output


def test_two_goals_end_in_their_pareto_front(kdpipe: Callable, teacher: None) -> None:
    outcome = kdpipe(*SEARCH, "search.goals=[accuracy,latency]", "search.trials=3", "train.epochs=1", "seed=0")
    assert outcome.status == 0, outcome.errors
    assert [len(trial.values) for trial in trials()] == [2, 2, 2]
    assert "the Pareto front" in outcome.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.alpha=interval(0,2)"], ["loss.alpha=", "expected a number from 0 to 1"]),
        (["loss.alhpa=interval(0,1)"], ["loss.alhpa", "did you mean loss.alpha?"]),
        (["loss=cross_entropy"], ["loss.alpha"]),
        (["search.sampler=grid"], ["search.sampler=grid", "has no end of values"]),
        (["search.sampler=cmaes", "loss=kd,dkd"], ["search.sampler=cmaes", "is no range of numbers"]),
        (["search.trials=0"], ["search.trials=0"]),
        (
            ["search.storage=postgresql://nobody@127.0.0.1:9/none"],
            ["search.storage=postgresql://nobody@127.0.0.1:9/none"],
        ),
        (["search.storage=postgresql://a:secret@127.0.0.1:9/none"], ["search.storage=", "PGPASSWORD"]),
        (["search.storage=nonsense"], ["search.storage=nonsense", "sqlite:///FILE"]),
        (["search.goals=[latency]"], ["search.goals=[latency]", "[accuracy,latency]"]),
        (["dataset.val_fraction=0"], ["dataset.val_fraction=0"]),
        (["sweep.rerun=true"], ["sweep.rerun=true", "search.study=NAME"]),
        (["train.resume=never"], ["train.resume=never", "search.study=NAME"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_searched_is_one_line(kdpipe: Callable, words: list[str], said: list[str]) -> None:
    outcome = kdpipe(*SEARCH, *words)
    assert_refused(outcome, *said)
    assert "secret" not in outcome.output + outcome.errors


def test_a_study_of_another_space_is_left_alone(kdpipe: Callable, teacher: None) -> None:
    assert kdpipe(*SEARCH, "search.study=mine", "search.trials=1", "seed=0", "train.epochs=1").status == 0
    other = kdpipe(*SEARCH, "search.study=mine", "seed=0", "train.epochs=1", "loss.alpha=interval(0,0.5)")
    assert_refused(other, "search.study=mine", "the study of this name searches loss.alpha=interval(0,1)")
    longer = kdpipe(*SEARCH, "search.study=mine", "search.trials=2", "seed=0", "train.epochs=2")
    assert_refused(longer, "search.study=mine", "other settings, images or teachers")
    assert len(trials()) == 1


def test_a_grid_counts_the_runs_of_a_trial_that_was_stopped(kdpipe: Callable, teacher: None) -> None:
    grid = ["-m", "experiment=distill", *SEARCH[1:-4], "train.epochs=1", "loss.alpha=0.5", "seed=0"]
    assert kdpipe(*grid).status == 0
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    for run in runs():
        client.set_tag(run.info.run_id, "kdpipe.state", "pruned")
        client.set_tag(run.info.run_id, "kdpipe.left_out", "0" * 12)  # another search's id
    again = kdpipe(*grid)
    assert again.status == 0, again.errors
    assert "no finished run yet" not in again.errors


def test_a_range_without_a_search_names_it(kdpipe: Callable) -> None:
    assert_refused(kdpipe("-m", *SMALL, "loss.alpha=interval(0,1)"), "loss.alpha=interval(0,1)", "search.trials=40")


def test_trials_that_fail_are_named_and_stop_the_search(
    kdpipe: Callable, teacher: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = kdpipe(*SEARCH, "optimizer.lr=interval(1e30,1e31)", "sweep.confirm_seeds=0")
    assert outcome.status == 1
    assert [trial.state for trial in trials()] == [TrialState.FAIL] * 3  # of five
    assert "the search stopped, its last trials failed for one reason" in outcome.errors
