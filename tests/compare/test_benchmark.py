"""The benchmark of Tian et al. 2020: the settings of each pair, and published accuracies in a comparison."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.errors import ConfigCompositionException

from kdpipe.assembly.building import build
from kdpipe.compare import comparison_table, frames
from kdpipe.compare.__main__ import cli
from kdpipe.compare.cells import make_cells
from kdpipe.compare.comparison import Comparison, compare_cells, with_published
from kdpipe.compare.published import BEST, LAST, NONE_PUBLISHED, published_for, read_table
from kdpipe.compare.statistics import share_interval
from kdpipe.settings.composition import CONF
from kdpipe.settings.schema import Settings
from kdpipe.tracking import RunRecord

Composed = Callable[..., Settings]

# teacher, student, learning rate, DKD's beta; then the published accuracies: teacher, student, KD, CRD, DKD
PAIRS = {
    "resnet56_resnet20": ("resnet56", "resnet20", 0.05, 2, "72.34 69.06 70.66 71.16 71.97"),
    "resnet110_resnet32": ("resnet110", "resnet32", 0.05, 2, "74.31 71.14 73.08 73.48 74.11"),
    "resnet110_resnet20": ("resnet110", "resnet20", 0.05, 2, "74.31 69.06 70.67 71.46 –"),
    "resnet32x4_resnet8x4": ("resnet32x4", "resnet8x4", 0.05, 8, "79.42 72.50 73.33 75.51 76.32"),
    "wrn_40_2_wrn_16_2": ("wrn_40_2", "wrn_16_2", 0.05, 6, "75.61 73.26 74.92 75.48 76.24"),
    "wrn_40_2_wrn_40_1": ("wrn_40_2", "wrn_40_1", 0.05, 6, "75.61 71.98 73.54 74.14 74.81"),
    "vgg13_vgg8": ("vgg13", "vgg8", 0.05, 6, "74.64 70.36 72.98 73.94 74.68"),
    "vgg13_mobilenetv2_half": ("vgg13", "mobilenetv2_half", 0.01, 6, "74.64 64.60 67.37 69.73 69.71"),
    "resnet50_cifar_mobilenetv2_half": ("resnet50_cifar", "mobilenetv2_half", 0.01, 8, "79.34 64.60 67.35 69.11 70.35"),
    "resnet50_cifar_vgg8": ("resnet50_cifar", "vgg8", 0.05, 8, "79.34 70.36 73.81 74.30 –"),
    "resnet32x4_shufflenetv1": ("resnet32x4", "shufflenetv1", 0.01, 8, "79.42 70.50 74.07 75.11 76.45"),
    "resnet32x4_shufflenetv2": ("resnet32x4", "shufflenetv2", 0.01, 8, "79.42 71.82 74.45 75.65 77.07"),
    "wrn_40_2_shufflenetv1": ("wrn_40_2", "shufflenetv1", 0.01, 8, "75.61 70.50 74.83 76.05 76.70"),
}
TEACHERS = sorted({teacher for teacher, *_ in PAIRS.values()})
FILES = {path.stem for path in (CONF / "experiment" / "benchmark").glob("*.yaml")}
LOSSES = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))


def experiment(pair: str) -> str:
    return f"experiment=benchmark/{pair}"


def test_each_pair_has_a_file() -> None:
    assert set(PAIRS) == FILES - {"base", "teacher"}


@pytest.mark.parametrize("pair", sorted(FILES - {"base", "teacher"}))
def test_pair_has_the_settings_of_the_benchmark(pair: str, composed: Composed) -> None:
    config = composed(experiment(pair))
    teacher, student, learning_rate, *_ = PAIRS[pair]
    assert (config.teacher.name, config.model.name, config.run_stage) == (teacher, student, "distill")
    assert [part.arguments.get("shortcut", "B") for part in (config.teacher, config.model)] == ["B", "B"]
    assert (config.teacher.weights, config.model.weights) == ("auto", None)
    for network in (config.model, config.teacher):
        assert network.mean == [0.5071, 0.4867, 0.4408]
        assert network.std == [0.2675, 0.2565, 0.2761]
    dataset, optimizer, scheduler = config.dataset, config.optimizer, config.scheduler
    assert (dataset.name, dataset.val_fraction, dataset.train_fraction) == ("cifar100", 0, 1)
    assert (config.train.epochs, config.train.batch_size, config.train.select) == (240, 64, "last")
    assert (optimizer.target, optimizer.lr, optimizer.weight_decay) == ("torch.optim.SGD", learning_rate, 5e-4)
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
    assert scheduler.target == "kdpipe.training.schedules.multistep"
    assert (scheduler.milestones, scheduler.gamma) == ([150, 180, 210], 0.1)
    assert (config.augmentation.target, config.augmentation.flip) == ("kdpipe.data.augmentation.CropFlip", True)
    loss = config.loss
    assert (loss.target, loss.alpha, loss.temperature) == ("kdpipe.losses.KD", 0.9, 4)


def test_resnets_have_1x1_convolutions_as_shortcuts(composed: Composed) -> None:
    model = composed(experiment("resnet56_resnet20")).model
    network = build("model", model, num_classes=100)
    assert sum(parameter.numel() for parameter in network.parameters()) == 278_324


@pytest.mark.parametrize("loss", LOSSES)
def test_each_method_gets_its_own_tuned_values(loss: str, composed: Composed) -> None:
    config, alone = composed(experiment("wrn_40_2_wrn_16_2"), f"loss={loss}"), composed(f"loss={loss}")
    assert config.identity
    tuned = {
        "kd": {"alpha": 0.9, "temperature": 4},
        "dkd": {"beta": 6},
        "reviewkd": {"weight": 5},
    }
    assert config.loss.plain == {**alone.loss.plain, **tuned.get(loss, {})}


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "dkd" in LOSSES])
def test_dkd_has_the_beta_of_the_pair(pair: str, composed: Composed) -> None:
    assert composed(experiment(pair), "loss=dkd").loss.beta == PAIRS[pair][3]


@pytest.mark.parametrize("pair", ["resnet56_resnet20", "vgg13_mobilenetv2_half", "wrn_40_2_wrn_40_1"])
def test_student_alone_has_the_same_settings(pair: str, composed: Composed) -> None:
    config, taught = composed(experiment(pair), "loss=cross_entropy"), composed(experiment(pair))
    assert config.run_stage == "student"
    assert config.loss.plain == {"_target_": "kdpipe.losses.CrossEntropy", "class_weights": None, "label_smoothing": 0}
    for key in ("model", "optimizer", "scheduler", "augmentation", "train", "dataset"):
        assert getattr(config, key) == getattr(taught, key)


def test_two_pairs_share_the_run_of_the_student_alone(composed: Composed) -> None:
    pairs = ("resnet56_resnet20", "resnet110_resnet20")
    assert len({composed(experiment(pair), "loss=cross_entropy").identity for pair in pairs}) == 1
    assert len({composed(experiment(pair)).identity for pair in pairs}) == 2


@pytest.mark.parametrize("teacher", TEACHERS)
def test_teacher_has_the_settings_its_pairs_look_for(teacher: str, composed: Composed) -> None:
    config = composed(*read_table()[teacher, "", "CrossEntropy"]["overrides"].split())
    assert (config.run_stage, config.model.name, config.optimizer.lr) == ("teacher", teacher, 0.05)
    for pair in (pair for pair, (its_teacher, *_) in PAIRS.items() if its_teacher == teacher):
        taught = composed(experiment(pair))
        for key in ("scheduler", "augmentation", "train", "dataset"):
            assert getattr(config, key) == getattr(taught, key)
        assert {**config.model.plain, "weights": "auto"} == taught.teacher.plain


def test_teacher_requires_a_model(composed: Composed) -> None:
    with pytest.raises(ConfigCompositionException, match="You must specify 'model'"):
        composed("experiment=benchmark/teacher")


def test_unknown_pair_lists_the_known_ones(kdpipe: Callable) -> None:
    outcome = kdpipe("experiment=benchmark/vgg13_vgg9")
    assert outcome.status == 1
    assert "; did you mean benchmark/vgg13_vgg8 " in outcome.errors
    assert "benchmark/resnet56_resnet20, " in outcome.errors


def test_command_line_overrides_the_benchmark(composed: Composed) -> None:
    overrides = ["train.epochs=2", "optimizer.lr=0.1", "loss.alpha=0.5", "dataset.val_fraction=0.1", "model.shortcut=A"]
    config = composed(experiment("resnet56_resnet20"), *overrides, "augmentation=none", "scheduler=cosine")
    assert (config.train.epochs, config.optimizer.lr, config.loss.alpha, config.loss.temperature) == (2, 0.1, 0.5, 4)
    assert (config.dataset.val_fraction, config.model.shortcut, config.teacher.shortcut) == (0.1, "A", "B")
    assert config.scheduler.target == "kdpipe.training.schedules.cosine"
    assert composed(experiment("vgg13_vgg8"), "model=resnet20").model.name == "resnet20"


def test_tuned_value_changes_the_identity_only_if_the_loss_uses_it(composed: Composed) -> None:
    def identity(*overrides: str) -> str:
        return composed(experiment("vgg13_vgg8"), *overrides).identity

    assert identity("benchmark.dkd_beta=3") == identity() == identity("loss.alpha=0.9", "loss.temperature=4")
    assert identity("benchmark.kd_alpha=0.8") == identity("loss.alpha=0.8") != identity()
    params = composed(experiment("vgg13_vgg8")).params
    assert not [key for key in params if key.startswith("benchmark")]
    assert params["loss.alpha"] == 0.9


def run_with(config: Settings, seed: int, accuracy: float, **params: object) -> RunRecord:
    """A finished run of a composed config; `params` overrides some settings (train__epochs for train.epochs)."""
    changed = {key.replace("__", "."): value for key, value in params.items()}
    stage = config.run_stage
    return RunRecord(
        id=f"{stage}{seed}",
        name="",
        params={key: str(value) for key, value in {**config.params, "seed": seed, **changed}.items()},
        metrics={"test/accuracy": accuracy, "model/size_mb": 1.1, "teacher/size_mb": 3.4},
        tags={"kdpipe.stage": stage, "kdpipe.data": "abc", "kdpipe.teacher_run": "t" if stage == "distill" else ""},
        ended=0,
        seconds=10,
    )


def compared(runs: Iterable[RunRecord], teacher: RunRecord | None = None) -> tuple[Comparison, Comparison]:
    """The comparison of runs without and with published accuracies."""

    def get_run(run_id: str) -> RunRecord | None:
        return teacher if run_id == "t" else None

    comparison = compare_cells(make_cells(runs), get_run)
    return comparison, with_published(comparison, get_run)


@pytest.fixture
def runs(composed: Composed) -> list[RunRecord]:
    """ResNet-56, ResNet-20 alone with two seeds and distilled with three, with the benchmark's settings."""
    pair = experiment("resnet56_resnet20")
    teacher, alone, taught = (
        composed("experiment=benchmark/teacher", "model=resnet56", "model.shortcut=B"),
        composed(pair, "loss=cross_entropy"),
        composed(pair),
    )
    return [
        run_with(teacher, 0, 0.7301),
        *(run_with(alone, seed, accuracy) for seed, accuracy in enumerate((0.6910, 0.6930))),
        *(run_with(taught, seed, accuracy) for seed, accuracy in enumerate((0.7100, 0.7050, 0.7130))),
    ]


def test_published_accuracies_match_the_papers() -> None:
    table = read_table()
    for teacher, student, _, _, published in PAIRS.values():
        lines = [
            table[teacher, "", "CrossEntropy"],
            table[student, "", "CrossEntropy"],
            *(table.get((student, teacher, loss)) for loss in ("KD", "CRD", "DKD")),
        ]
        assert [line["accuracy"] if line else "–" for line in lines] == published.split()
        assert [line["epoch"] for line in lines if line] == [LAST] * 4 + [BEST] * (lines[-1] is not None)
        assert all(
            "Zhao" in line["source"] if line["loss"] == "DKD" else "Tian" in line["source"] for line in table.values()
        )
    assert len(table) == 6 + 9 + 13 + 13 + 11


EXISTING = [
    line for line in read_table().values() if line["overrides"].rpartition("loss=")[2] in [*LOSSES, line["overrides"]]
]


@pytest.mark.parametrize("line", EXISTING, ids=lambda line: line["overrides"])
def test_overrides_of_a_published_accuracy_train_exactly_that(line: dict[str, str], composed: Composed) -> None:
    config = composed(*line["overrides"].split())
    (cell,) = make_cells([run_with(config, 0, 0.7)])
    published = published_for(cell)
    assert published is not None
    assert published.accuracy == pytest.approx(float(line["accuracy"]) / 100)
    assert published.deviations == ()


def test_difference_has_the_interval_over_seeds(runs: list[RunRecord]) -> None:
    _, comparison = compared(runs)
    teacher, alone, taught = (row.published for row in comparison.rows)
    assert teacher and alone and taught
    assert teacher.difference and taught.difference
    assert (teacher.difference.mean, teacher.difference.low) == (pytest.approx(0.7301 - 0.7234), None)
    of_the_accuracy = share_interval([0.7100, 0.7050, 0.7130])
    assert of_the_accuracy is not None
    assert taught.difference.ends == pytest.approx([end - 0.7066 for end in of_the_accuracy.ends])
    texts = comparison_table.row_texts(comparison)
    assert [line["published"] for line in texts] == ["72.34 last epoch", "69.06 last epoch", "70.66 last epoch"]
    assert [line["difference"].split(" ")[0] for line in texts] == ["+0.67", "+0.14", "+0.27"]


def test_the_difference_is_there_on_a_narrow_terminal_too(runs: list[RunRecord]) -> None:
    _, comparison = compared(runs)
    table = comparison_table.to_text(comparison, 80).partition("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert "difference" in table[0]


def test_published_accuracies_leave_verdict_and_other_columns_alone(runs: list[RunRecord]) -> None:
    without, comparison = compared(runs)
    assert comparison.verdict == without.verdict
    assert comparison.notes[: len(without.notes)] == without.notes
    plain, published = comparison_table.row_texts(without), comparison_table.row_texts(comparison)
    assert [{**line, "published": "", "difference": ""} for line in published] == plain
    assert "published" not in comparison_table.to_text(without)
    assert not [column for column in without.frame if "published" in column]


def test_notes_give_the_sources_and_the_accuracies_of_the_teachers(runs: list[RunRecord]) -> None:
    notes = compared(runs, teacher=runs[0])[1].notes
    assert "published in Tian et al. 2020 (arXiv:1910.10699) table 1: accuracy of the last epoch" in notes
    assert "all rows with a published accuracy were trained with the benchmark's settings" in notes
    assert notes[-1] == "teacher resnet56: 73.01 % here, 72.34 % in Tian et al. 2020 (arXiv:1910.10699) table 1"
    assert "teacher resnet56: unknown here, 72.34 %" in compared(runs)[1].notes[-1]


def test_notes_list_settings_that_differ_from_the_benchmark(composed: Composed) -> None:
    short = ["train.epochs=2", "train.batch_size=128", "dataset.val_fraction=0.1", "dataset.train_fraction=0.2"]
    other = ["augmentation=none", "optimizer=adam", "model.shortcut=A", "train.precision=bfloat16", "seed=7"]
    without_effect = ["dataset.split_seed=3", "train.test_each_epoch=true", "train.device=cpu", "dataset.root=there"]
    configs = [
        composed(experiment("resnet56_resnet20"), *short, *other, *without_effect, f"loss.alpha={alpha}")
        for alpha in (0.1, 0.5, 0.9)
    ]
    _, comparison = compared([run_with(config, 7, 0.3) for config in configs])
    assert [line["published"] for line in comparison_table.row_texts(comparison)] == ["70.66 last epoch"] * 3
    (note,) = (note for note in comparison.notes if "other settings" in note)
    assert note == (
        "3 of 3 rows with a published accuracy were trained with other settings than the benchmark's: "
        "augmentation=no_augmentation instead of CropFlip, dataset.train_fraction=0.2 instead of 1, "
        "dataset.val_fraction=0.1 instead of 0, loss.alpha=0.1 or 0.5 instead of 0.9, "
        "model.shortcut=A instead of B, optimizer=Adam instead of SGD, train.batch_size=128 instead of 64, "
        "train.epochs=2 instead of 240, train.precision=bfloat16 instead of auto"
    )


def test_settings_unknown_to_the_benchmark_are_deviations(composed: Composed) -> None:
    config = composed(experiment("resnet56_resnet20"))
    (cell,) = make_cells([run_with(config, 0, 0.7, loss__standardised=True, more___target_="kdpipe.losses.Hint")])
    published = published_for(cell)
    assert published is not None
    assert published.deviations == (("loss.standardised", "True", "none"), ("more", "Hint", "none"))


def test_best_test_epoch_is_not_presented_as_the_last(runs: list[RunRecord]) -> None:
    dkd = {"loss._target_": "kdpipe.losses.DKD", "loss.beta": "2"}
    for run in runs[-3:]:
        run.params.update(dkd)
    _, comparison = compared(runs)
    assert comparison_table.row_texts(comparison)[-1]["published"] == "71.97 best test epoch"
    (note,) = (note for note in comparison.notes if "Zhao" in note)
    assert note.endswith("best on the test images, which flatters: not comparable with the last epoch's here")


@pytest.mark.parametrize(
    "params",
    [
        {"dataset__name": "cifar10", "dataset___target_": "kdpipe.data.downloaded.cifar10"},
        {"dataset___target_": "kdpipe.data.image_folder.image_folder"},  # same name, unknown images
        {"teacher__name": "vgg13"},
        {"model__name": "resnet44"},
        {"loss___target_": "kdpipe.losses.KDTutorial"},
        {"loss___target_": "mine.KD"},
    ],
)
def test_unpublished_results_show_nothing(composed: Composed, params: dict[str, str]) -> None:
    config = composed(experiment("resnet56_resnet20"))
    _, comparison = compared([run_with(config, seed, 0.7, **params) for seed in (0, 1)])
    assert comparison.notes[-1] == NONE_PUBLISHED
    assert "difference" not in comparison_table.to_text(comparison).replace(NONE_PUBLISHED, "")
    assert comparison.frame[["published_accuracy", "difference"]].isna().all(axis=None)


def test_student_at_alpha_0_is_compared_with_the_published_student_alone(composed: Composed) -> None:
    (cell,) = make_cells([run_with(composed(experiment("resnet56_resnet20"), "loss.alpha=0"), 0, 0.69)])
    published = published_for(cell)
    assert published is not None
    assert (published.accuracy, published.deviations) == (pytest.approx(0.6906), ())


def test_each_format_has_the_published_accuracies(runs: list[RunRecord]) -> None:
    _, comparison = compared([*runs, run_with_other_network(runs[-1])])
    rows = list(csv.DictReader(io.StringIO(frames.to_csv([comparison]))))
    assert [row["published_accuracy"] for row in rows] == ["0.7234", "0.6906", "", "0.7066"]
    assert [row["published_epoch"] for row in rows] == ["last epoch", "last epoch", "", "last epoch"]
    assert float(rows[3]["difference_low"]) < float(rows[3]["difference"]) < float(rows[3]["difference_high"])
    (described,) = json.loads(frames.to_json([comparison]))
    assert [row["published_accuracy"] for row in described["rows"]] == [0.7234, 0.6906, None, 0.7066]
    assert described["rows"][3]["trained_otherwise"] == ""
    page = comparison_table.to_html("benchmark", [comparison], [{}])
    assert ">published</th>" in page and ">70.66 last epoch</td>" in page
    assert "| 70.66 last epoch | +0.27 [" in comparison_table.to_markdown([comparison])
    table = comparison_table.to_text(comparison)
    assert table.index("gain") < table.index("published") < table.index("difference") < table.index("MB")
    assert table.count("last epoch") == 4  # once in a note


def run_with_other_network(run: RunRecord) -> RunRecord:
    tags = {**run.tags, "kdpipe.stage": "student"}
    return RunRecord("other", "", {**run.params, "model.name": "wrn_22_8"}, run.metrics, tags, 0, 10)


@pytest.mark.parametrize("format_", ["table", "csv"])
def test_command_reports_when_nothing_is_published(
    format_: str,
    runs: list[RunRecord],
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(empty_store.parent.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("kdpipe.tracking.Tracker.finished_runs", lambda self: runs)
    monkeypatch.setattr("kdpipe.tracking.Tracker.get_run", lambda self, run_id: SimpleNamespace(metrics={}, tags={}))
    arguments = ["kdpipe-compare", "--experiment", "Default", "--format", format_]
    monkeypatch.setattr(sys, "argv", [*arguments, "--published"])
    cli()
    shown = capsys.readouterr()
    assert ("70.66 last epoch" if format_ == "table" else "0.7066,last epoch") in shown.out
    assert NONE_PUBLISHED not in shown.out + shown.err

    for run in runs:
        run.params["dataset.name"] = "photos"
    cli()
    shown = capsys.readouterr()
    assert NONE_PUBLISHED in (shown.err if format_ == "csv" else shown.out)

    monkeypatch.setattr(sys, "argv", arguments)
    cli()
    assert "published" not in capsys.readouterr().out
