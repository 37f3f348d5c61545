"""Chains: assistants and born-again networks, link by link, each taught by the run before it of the same cell."""

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import Outcome, Started, assert_refused
from mlflow import MlflowClient
from mlflow.entities import Run

from kdpipe.compare import __main__ as command
from kdpipe.compare.cells import make_cells
from kdpipe.sweeps.chain import link_overrides
from kdpipe.tracking import RunRecord

SMALL = ["dataset=digits", "dataset.train_fraction=0.2", "train.threads=1", "train.epochs=1"]
# Three networks that train in a second.
LINKS = [
    "{model:resnet56,model.depth:14,model.shortcut:B,loss:cross_entropy,stage:teacher}",
    "{model:resnet32,model.depth:8}",
    "{model:resnet20,model.depth:8}",
]
ASSISTANTS = ["experiment=assistants", *SMALL, f"chain=[{','.join(LINKS)}]"]
BORN_AGAIN = ["experiment=born_again", *SMALL, "model=resnet20", "model.depth=8"]


def runs() -> dict[str, list[Run]]:
    """The runs of the present folder's store by name, the oldest first."""
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("kdpipe")
    if experiment is None:
        return {}
    found: dict[str, list[Run]] = {}
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
        found.setdefault(run.info.run_name.partition(" ")[0], []).append(run)
    return found


def the(name: str) -> Run:
    (run,) = runs()[name]
    return run


def rows(outcome: Outcome) -> list[list[str]]:
    """The first words of the lines of the table that a command ended with."""
    lines = re.findall(r"^  (\w+) +digits +(\w+) +(.*)$", outcome.output, re.MULTILINE)
    return [[network, stage, " ".join(rest.split())] for network, stage, rest in lines]


def test_each_link_is_taught_by_the_one_before_of_the_same_seed(
    kdpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = kdpipe(*ASSISTANTS, "seed=0,1")  # no -m: the experiment is a chain
    assert outcome.status == 0, outcome.errors
    assert "chain resnet56 → resnet32 → resnet20 × seed=0,1; 2 cells, 6 runs" in outcome.output
    parent = the("chain")
    assert len(runs()) == 7
    for seed in (0, 1):
        links = [
            the(name) for name in (f"1_resnet56_s{seed}", f"2_resnet32_a0.5_T5_s{seed}", f"3_resnet20_a0.5_T5_s{seed}")
        ]
        assert [run.data.tags["kdpipe.stage"] for run in links] == ["teacher", "distill", "distill"]
        for before, run in pairwise(links):
            assert run.data.tags["kdpipe.teacher_run"] == before.info.run_id
            assert run.data.params["teacher.weights"] == f"runs:/{before.info.run_id}"
            for key in ("name", "depth", "shortcut", "mean", "image_size"):
                assert run.data.params[f"teacher.{key}"] == before.data.params[f"model.{key}"]
        for run in links:
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert run.data.params["seed"] == str(seed)
            assert not any(key == "chain" or key.startswith("sweep.") for key in run.data.params)

    table = rows(outcome)
    assert [row[:2] for row in table] == [["resnet56", "teacher"], ["resnet32", "distill"], ["resnet20", "distill"]]
    assert table[0][2].startswith("CrossEntropy 2 1 ")  # two seeds, one epoch
    assert ["teacher.weights=link 1" in row[2] for row in table] == [False, True, False]
    assert "teacher.weights=link 2" in table[2][2]
    assert "resnet20 KD alpha 0.5 temperature 5, 2 seeds" in outcome.output  # the verdict is on the last link
    assert outcome.output.count("← verdict") == 1 and "← best" not in outcome.output
    assert "the interval covers the seeds of the whole chain" in outcome.output

    monkeypatch.setattr(sys, "argv", ["kdpipe-compare", "--sweep", parent.data.tags["kdpipe.sweep"]])
    command.cli()
    assert capsys.readouterr().out.strip() in outcome.output

    before = {name: len(found) for name, found in runs().items()}
    again = kdpipe(*ASSISTANTS, "seed=0,1")
    assert again.output.count("2 of 2 runs are finished already") == 3
    assert {name: len(found) for name, found in runs().items()} == before
    assert rows(again) == table


def test_what_a_teacher_s_own_command_trained_is_the_first_link(kdpipe: Callable[..., Outcome]) -> None:
    kdpipe("experiment=teacher", *SMALL, "model=resnet56", "model.depth=14", "model.shortcut=B")
    outcome = kdpipe(*ASSISTANTS)
    assert outcome.status == 0, outcome.errors
    assert "1 of 1 runs are finished already" in outcome.output
    assert the("2_resnet32_a0.5_T5_s0").data.tags["kdpipe.teacher_run"] == the("resnet56_teacher_s0").info.run_id


@pytest.mark.faults
def test_a_chain_that_was_killed_goes_on_where_it_was(
    kdpipe: Callable[..., Outcome], start: Callable[..., Started]
) -> None:
    """SIGKILL in the second link, whose runs were shared between two processes."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    longer = [*ASSISTANTS, "seed=0,1", "train.epochs=3"]
    killed = start(*longer, "hydra/launcher=joblib")
    killed.wait_for("link 2 of 3")
    killed.wait_for("with the weights of")
    killed.kill()
    assert the("chain").info.status == "RUNNING"
    assert not any(name.startswith("3_") for name in runs())

    outcome = kdpipe(*longer)
    assert outcome.status == 0, outcome.errors
    assert "link 1 of 3: resnet56\n" in (told := re.sub(r"\[[\d:]+\] ", "", outcome.output))
    assert told.index("2 of 2 runs are finished already") < told.index("link 2 of 3")
    assert len(runs()) == 7
    assert all([run.info.status for run in found] == ["FINISHED"] for found in runs().values())


def test_born_again_networks_are_held_against_the_first_generation(kdpipe: Callable[..., Outcome]) -> None:
    generations = "chain=[{loss:cross_entropy},{},{},{}]"
    outcome = kdpipe(*BORN_AGAIN, generations, "loss.alpha=0.9", "loss.temperature=2", "seed=0,1")
    assert outcome.status == 0, outcome.errors
    first = the("1_resnet20_s0")
    assert first.data.tags["kdpipe.stage"] == "student"
    assert first.data.params["loss._target_"] == "kdpipe.losses.CrossEntropy"
    for number in (2, 3, 4):
        taught = the(f"{number}_resnet20_a0.9_T2_s0")
        before = the(f"{number - 1}_resnet20_a0.9_T2_s0" if number > 2 else "1_resnet20_s0")
        assert taught.data.tags["kdpipe.teacher_run"] == before.info.run_id
        assert taught.data.params["teacher.depth"] == "8"
    table = rows(outcome)
    assert [stage for _, stage, _ in table] == ["student", "distill", "distill", "distill"]
    assert [line.rpartition("=")[2] for _, _, line in table[1:]] == ["link 1", "link 2", "link 3"]
    gains = [
        the(f"4_resnet20_a0.9_T2_s{seed}").data.metrics["test/accuracy"]
        - the(f"1_resnet20_s{seed}").data.metrics["test/accuracy"]
        for seed in (0, 1)
    ]
    assert the("chain").data.metrics["best/gain"] == pytest.approx(sum(gains) / 2)


@pytest.mark.faults
def test_axes_are_those_of_all_links_and_a_published_teacher_may_come_first(kdpipe: Callable[..., Outcome]) -> None:
    kdpipe("experiment=teacher", *SMALL, "model=resnet56", "model.depth=14")
    weights = next(Path("outputs/runs").glob("*/model.safetensors")).rename("published.safetensors")
    chain = "chain=[{model:resnet32,model.depth:8,loss.temperature:2},{model:resnet20,model.depth:8}]"
    teacher = ["model@teacher=resnet56", "teacher.depth=14", f"teacher.weights={weights}"]
    outcome = kdpipe("-m", *SMALL, chain, *teacher, "loss.alpha=0,0.5,0.9")
    assert outcome.status == 0, outcome.errors
    assert "3 cells, 6 runs" in outcome.output
    for alpha in ("0.5", "0.9"):
        first, second = the(f"1_resnet32_a{alpha}_T2_s0"), the(f"2_resnet20_a{alpha}_T5_s0")
        assert first.data.tags["kdpipe.teacher_run"] == "published.safetensors"
        assert second.data.tags["kdpipe.teacher_run"] == first.info.run_id
    assert "kdpipe.teacher_run" not in the("2_resnet20_a0_s0").data.tags  # the student alone
    assert len(rows(outcome)) == 6
    assert "the best of 2 cells was chosen on validation images" in outcome.output
    assert the("chain").data.metrics["best/gain"] == pytest.approx(
        the(f"2_resnet20_a{the('chain').data.metrics['best/alpha']:g}_T5_s0").data.metrics["test/accuracy"]
        - the("2_resnet20_a0_s0").data.metrics["test/accuracy"]
    )


@pytest.mark.faults
def test_an_axis_of_one_link_goes_on_in_the_links_after_it(kdpipe: Callable[..., Outcome]) -> None:
    chain = "chain=[{loss:cross_entropy},{},{loss:kd_tutorial}]"
    outcome = kdpipe(*BORN_AGAIN, chain, "loss.alpha=0.5,0.9", "seed=0")
    assert outcome.status == 0, outcome.errors
    assert "2 cells, 5 runs" in outcome.output  # the first link is the same run for both
    middle = {the(f"2_resnet20_a{alpha}_T5_s0").info.run_id for alpha in ("0.5", "0.9")}
    last = [found[0] for name, found in runs().items() if name.startswith("3_")]
    assert {run.data.tags["kdpipe.teacher_run"] for run in last} == middle
    assert len(rows(outcome)) == 5


def test_what_a_failed_run_would_have_taught_is_left_out(kdpipe: Callable[..., Outcome]) -> None:
    rates = ["optimizer=sgd", "optimizer.lr=0.01,1e30"]
    outcome = kdpipe(*ASSISTANTS, *rates)
    assert_refused(
        outcome,
        "1 of 6 runs failed: 1_resnet56_lr1e+30_s0 (epoch 1: the loss is ",
        "; 2 that they would have taught left out; the same command trains what is missing",
    )
    assert the("chain").info.status == "FAILED"
    assert the("3_resnet20_lr0.01_a0.5_T5_s0").info.status == "FINISHED"
    assert len(rows(outcome)) == 3


def test_without_its_last_link_a_chain_cannot_tell(kdpipe: Callable[..., Outcome]) -> None:
    outcome = kdpipe(*BORN_AGAIN, "chain=[{loss:cross_entropy},{optimizer:sgd,optimizer.lr:1e30}]")
    assert "1 of 2 runs failed: 2_resnet20_a0.5_T5_s0 (epoch 1: the loss is " in outcome.errors
    assert "left out" not in outcome.errors
    assert [stage for _, stage, _ in rows(outcome)] == ["student"]
    assert "verdict: cannot tell: the chain's last link, which these lead to, has no finished run" in outcome.output


@pytest.mark.faults
def test_all_of_it_can_be_trained_anew(kdpipe: Callable[..., Outcome]) -> None:
    two = "chain=[{loss:cross_entropy},{}]"
    kdpipe(*BORN_AGAIN, two)
    kdpipe(*BORN_AGAIN, two, "sweep.rerun=true")
    teachers, students = runs()["1_resnet20_s0"], runs()["2_resnet20_a0.5_T5_s0"]
    assert [run.data.tags["kdpipe.teacher_run"] for run in students] == [run.info.run_id for run in teachers]
    assert len(teachers) == 2
    assert len(runs()["chain"]) == 1


CE = "{loss:cross_entropy}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["chain=[]"], "chain=[]: expected a list of links, such as [{model:resnet56,loss:cross_entropy},"),
        (["chain=5"], "chain=5: expected a list of links"),
        (["chain=[resnet56,resnet20]"], "chain: resnet56 is link 1: expected settings in braces"),
        (["chain=[{model:{depth:8}},{}]"], "chain: model in link 1: expected whole keys, such as model.depth"),
        ([f"chain=[{CE},{{loss.alpha:'0.1,0.5'}}]"], "chain: loss.alpha=0.1,0.5 in link 2: expected one value"),
        ([f"chain=[{CE},{{}}],[{CE},{{}},{{}}]"], "expected one chain"),
        ([f"chain=[{CE},{{hydra/launcher:joblib}}]"], "chain: hydra/launcher=joblib in link 2: it belongs to the"),
        (
            [f"chain=[{CE},{{output_dir:elsewhere}}]"],
            "output_dir=elsewhere,outputs: expected one value for the whole sweep",
        ),
        ([f"chain=[{CE},{{model@teacher:resnet20}}]"], "model@teacher=resnet20 in link 2: its teacher is link 1"),
        ([f"chain=[{CE},{{teacher.weights:auto}}]"], "teacher.weights=auto in link 2: its teacher is link 1"),
        ([f"chain=[{CE},{{seed:2}}]", "seed=0,1"], "chain: seed=2 in link 2: seed is an axis of the chain"),
        ([f"chain=[{CE},{CE}]"], "link 2 learns nothing from link 1, its loss is kdpipe.losses.CrossEntropy"),
        (["loss.alpha=0"], "link 2 learns nothing from link 1, its loss is kdpipe.losses.KD, alpha 0"),
        ([f"chain=[{CE},{{}},{{loss.alpha:2}}]"], "loss.alpha=2: expected a number from 0 to 1"),
        ([f"chain=[{CE},{{}},{{loss.alfa:1}}]"], "loss.alfa: no such key; did you mean loss.alpha?"),
        (
            [f"chain=[{CE},{{}},{{model:student_cnn,model.image_size:4}}]"],
            "model.image_size=4: student_cnn cannot take",
        ),
        (
            [f"chain=[{CE},{{train.select:best}}]", "dataset.val_fraction=0"],
            "train.select=best: expected dataset.val_fraction above 0 with it",
        ),
        (["chain=[{model:resnet56,loss:cross_entropy},{model:resnet20}]"], "model=resnet20: each link of the chain"),
        (
            ["chain=[{model@teacher:resnet32},{}]", "teacher.mean=[0]"],
            "teacher.mean=[0]: each link of the chain chooses",
        ),
        (["teacher.weights=nowhere.pt"], "teacher.weights=nowhere.pt: the first link learns from none"),
        (["sweep.confirm_seeds=2"], "sweep.confirm_seeds=2: a chain is confirmed by the same chain on other seeds"),
        (["experiment=born_again,student"], "a chain is one command: python -m kdpipe -m 'chain=…'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_chain_is_refused_before_anything_trains(
    kdpipe: Callable[..., Outcome], overrides: list[str], said: str
) -> None:
    experiment = [] if "experiment" in overrides[0] else ["experiment=born_again"]
    outcome = kdpipe("-m", *BORN_AGAIN[1:], *experiment, *overrides)
    assert_refused(outcome, said)
    assert not runs()


def test_a_single_run_has_no_chain(kdpipe: Callable[..., Outcome]) -> None:
    outcome = kdpipe(*SMALL, f"chain=[{CE},{{}}]")
    assert outcome.status == 1
    assert "a chain is one command: python -m kdpipe -m 'chain=…'" in outcome.errors
    assert not runs()


@pytest.mark.parametrize(
    ("link", "teacher", "expected"),
    [
        ([], None, ["loss=kd", "loss.alpha=0.9", "loss@also=dist", "teacher.depth=8", "seed=0"]),
        (["loss.alpha=0.5"], None, ["loss=kd", "loss@also=dist", "teacher.depth=8", "seed=0", "loss.alpha=0.5"]),
        (["loss=dist"], None, ["teacher.depth=8", "seed=0", "loss=dist"]),
        (["loss@also=kd"], None, ["loss=kd", "loss.alpha=0.9", "teacher.depth=8", "seed=0", "loss@also=kd"]),
        (["model@teacher=a"], None, ["loss=kd", "loss.alpha=0.9", "loss@also=dist", "seed=0", "model@teacher=a"]),
        (["seed=5"], ["teacher.depth=3"], ["loss=kd", "loss.alpha=0.9", "loss@also=dist", "teacher.depth=3", "seed=5"]),
    ],
)
def test_what_a_link_chooses_wins_and_what_was_meant_for_another_choice_goes(
    link: list[str], teacher: list[str] | None, expected: list[str]
) -> None:
    cell = ["loss=kd", "loss.alpha=0.9", "loss@also=dist", "teacher.depth=8", "seed=0"]
    assert link_overrides(cell, link, teacher) == expected


def test_class_weights_are_those_of_all_links_unless_one_has_its_own() -> None:
    cell = ["loss.alpha=0.9", "loss.class_weights=balanced"]
    assert link_overrides(cell, ["loss=cross_entropy"]) == ["loss.class_weights=balanced", "loss=cross_entropy"]
    own = ["loss=cross_entropy", "loss.class_weights=null"]
    assert link_overrides(cell, own) == own


def test_runs_of_a_chain_are_one_cell_where_their_teachers_are() -> None:
    def record(run_id: str, seed: int, stage: str, teacher: str = "", **params: str) -> RunRecord:
        settings = {"seed": str(seed), "model.name": "net", "loss._target_": stage, **params}
        if teacher:
            settings["teacher.weights"] = f"runs:/{teacher}"
        tags = {
            "kdpipe.stage": stage,
            "kdpipe.data": "d",
            "kdpipe.teacher_run": teacher,
            "kdpipe.inputs": f"d-{run_id}",
        }
        return RunRecord(run_id, run_id, settings, {}, tags, ended=0, seconds=1)

    chain = [record(f"a{seed}", seed, "student") for seed in (0, 1)]
    chain += [record(f"b{seed}", seed, "distill", teacher=f"a{seed}") for seed in (0, 1)]
    chain += [record(f"c{seed}", seed, "distill", teacher=f"b{seed}") for seed in (0, 1)]
    cells = make_cells(chain, chain)
    assert [(cell.link, [run.id for run in cell.runs.values()]) for cell in cells] == [
        (1, ["a0", "a1"]),
        (2, ["b0", "b1"]),
        (3, ["c0", "c1"]),
    ]
    assert cells[2].teacher_runs == ["b0", "b1"]
    assert len(make_cells(chain)) == 5  # by themselves they have other teachers

    other = record("x", 0, "distill", alpha="0.1", teacher="a0")
    last = record("y", 0, "distill", teacher="x")
    assert [cell.link for cell in make_cells([*chain, other, last], [*chain, other, last])] == [1, 2, 3, 2, 3]
