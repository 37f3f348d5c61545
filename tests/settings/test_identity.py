"""A run's identity: the settings that its result depends on, and nothing else."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st

from kdpipe.settings.identity import identity, what_matters
from kdpipe.settings.schema import Settings

SAME = [
    ["loss.alpha=0.50"],
    ["loss.temperature=5.0"],
    ["loss.standardize=false"],
    ["output_dir=elsewhere"],
    ["tracking.uri=http://host"],
    ["tracking.experiment=another"],
    ["dataset.root=elsewhere"],
    ["train.device=cpu", "train.threads=1", "train.resume=never"],
    ["distillation.outputs=online", "distillation.cache_max_gb=1", "distillation.views=5", "sweep.confirm_seeds=5"],
    ["train.show_views=true"],
    ["train.compile=true", "train.keep_epochs=[1,5]", "optimizer.fused=false"],
    ["train.compile=reduce-overhead"],
    ["train.ema=null", "train.early_stop=null", "train.accumulate=1", "scheduler.warmup_epochs=0"],
    ["loss.label_smoothing=0.0", "optimizer.decay_norm_and_bias=true", "optimizer.layer_decay=null"],
    ["experiment=distill"],
    ["evaluation.pictures=false", "evaluation.timing_seconds=0"],
]
OTHER = [
    ["seed=1"],
    ["loss.alpha=0.6"],
    ["loss.temperature=4"],
    ["train.epochs=11"],
    ["train.precision=bfloat16"],
    ["dataset.split_seed=1"],
    ["dataset.train_fraction=0.5"],
    ["teacher.weights=a.pth"],
    ["teacher.weights=runs:/a/epoch_5"],
    ["model@teacher=resnet56"],
    ["model@teacher=ensemble", "teacher.members=[runs:/a]"],
    ["augmentation=crop_flip"],
    ["augmentation=pipeline"],
    ["loss=kd_tutorial"],
    ["loss=dkd"],
    ["loss=label_smoothing"],
    ["loss.standardize=true"],
    ["loss.class_weights=balanced"],
    ["dataset.sampler=balanced"],
    ["train.metric=macro_f1"],
    ["loss@also=dist"],
    ["loss.alpha=0"],
    ["distillation.outputs=views"],
    ["train.mixup=0.2"],
    ["train.ema=0.999"],
    ["train.early_stop=5"],
    ["train.accumulate=2"],
    ["scheduler.warmup_epochs=1"],
    ["loss.label_smoothing=0.1"],
    ["optimizer.decay_norm_and_bias=false"],
    ["optimizer.layer_decay=0.75"],
    ["train.cutmix=1"],
    ["dataset.unlabelled_root=more"],
    ["loss@also=kd_tutorial"],
]


@pytest.mark.parametrize("overrides", SAME, ids=" ".join)
def test_settings_without_effect_are_not_part_of_the_identity(
    composed: Callable[..., Settings], overrides: list[str]
) -> None:
    assert composed(*overrides).identity == composed().identity


@pytest.mark.parametrize("overrides", OTHER, ids=" ".join)
def test_settings_with_effect_are_part_of_the_identity(composed: Callable[..., Settings], overrides: list[str]) -> None:
    assert composed(*overrides).identity != composed().identity


def test_at_alpha_0_teacher_and_temperature_do_not_matter(composed: Callable[..., Settings]) -> None:
    control = composed("loss.alpha=0").identity
    assert control == composed("loss.alpha=0.0", "loss.temperature=2", "model@teacher=resnet20").identity
    assert control == composed("loss=kd_tutorial", "loss.alpha=0").identity
    assert control == composed("experiment=student").identity
    assert control == composed("loss.alpha=0", "distillation.outputs=views").identity
    assert control == composed("loss.alpha=0", "dataset.unlabelled_root=more").identity
    assert control == composed("loss.alpha=0", "loss.standardize=true").identity
    assert control == composed("loss=logit_mse", "loss.alpha=0").identity


@pytest.mark.parametrize("of_labels", ["loss.class_weights=balanced", "loss.label_smoothing=0.1"])
def test_at_alpha_0_what_is_made_of_the_labels_does_matter(composed: Callable[..., Settings], of_labels: str) -> None:
    control = composed("loss.alpha=0", of_labels).identity
    assert control == composed("experiment=student", of_labels).identity
    assert control != composed("loss.alpha=0").identity


def test_identities_are_those_of_before_all_schedules_could_warm_up(composed: Callable[..., Settings]) -> None:
    before = {"scheduler._target_": "kdpipe.schedulers.multistep", "scheduler.gamma": 0.1}
    assert identity(before | {"scheduler.warmup_epochs": 0}) == identity(before)
    assert identity(before | {"scheduler.warmup_epochs": 1}) != identity(before)
    # The cosine had one from the start.
    without, one = (composed("scheduler=cosine", f"scheduler.warmup_epochs={number}") for number in (0, 1))
    assert "scheduler.warmup_epochs" in what_matters(without.effective)
    assert without.identity != one.identity


def test_identities_are_those_of_before_logits_could_be_standardised() -> None:
    before = {"loss._target_": "kdpipe.losses.KD", "loss.alpha": 0.5, "loss.temperature": 5}
    assert identity(before | {"loss.standardize": False}) == identity(before)
    assert identity(before | {"loss.standardize": "False"}) == identity(before)  # as MLflow has it
    assert identity(before | {"loss.standardize": True}) != identity(before)


def test_identities_are_those_of_before_classes_could_be_weighed() -> None:
    before = {"loss._target_": "kdpipe.losses.KD", "loss.alpha": 0.5, "train.select": "best"}
    for nothing in (None, "None"):  # as MLflow has it
        today = {"loss.class_weights": nothing, "dataset.sampler": nothing, "train.metric": "accuracy"}
        assert identity(before | today) == identity(before)


def test_a_second_method_is_part_of_the_identity_where_it_has_an_effect(composed: Callable[..., Settings]) -> None:
    def known_as(*overrides: str) -> str:
        return composed(*overrides).identity

    both = known_as("loss=cross_entropy", "loss@also=dist")
    assert (
        both
        == known_as("loss.alpha=0", "loss@also=dist")
        == known_as("loss=logit_mse", "loss.alpha=0", "loss@also=dist")
    )
    assert both == known_as("loss=cross_entropy", "loss@also=dist", "also.ce_weight=5")  # that of the loss counts
    others = [["loss@also=dist"], ["loss=cross_entropy"], ["loss=cross_entropy", "loss@also=dist", "also.weight=2"]]
    assert len({both, *(known_as(*overrides) for overrides in others)}) == 4
    assert known_as("loss=dist", "loss@also=kd", "also.alpha=0") == known_as("loss=dist")
    assert known_as("loss.alpha=0", "loss@also=logit_mse", "also.alpha=0") == known_as("experiment=student")
    assert not composed("loss.alpha=0", "loss@also=logit_mse", "also.alpha=0").needs_teacher


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "student_cnn_distill_a0.5_T5_s0"),
        (["loss.alpha=0"], "student_cnn_alone_s0"),
        (["experiment=student", "seed=3"], "student_cnn_alone_s3"),
        (["experiment=teacher"], "densenet121_teacher_s0"),
        (["experiment=teacher", "loss=label_smoothing"], "densenet121_teacher_label_smoothing_s0"),
        (["loss=label_smoothing"], "student_cnn_label_smoothing_s0"),
        (["loss.standardize=true"], "student_cnn_distill_a0.5_T5_standardized_s0"),
        (["loss=kd_tutorial"], "student_cnn_kd_tutorial_a0.5_T5_s0"),
        (["loss=logit_mse", "loss.alpha=0.9"], "student_cnn_logit_mse_a0.9_s0"),
        (["loss=dkd"], "student_cnn_dkd_T4_s0"),
        (["loss=dist"], "student_cnn_dist_T4_s0"),
        (["loss@also=dist"], "student_cnn_kd_a0.5_T5_dist_T4_s0"),
        (["loss=label_smoothing", "loss@also=logit_mse"], "student_cnn_label_smoothing_logit_mse_a1_s0"),
        (["loss=cross_entropy", "loss@also=dkd"], "student_cnn_dkd_T4_s0"),
        (["loss.alpha=0", "loss@also=dkd"], "student_cnn_dkd_T4_s0"),
        (["loss@also=logit_mse", "also.alpha=0"], "student_cnn_distill_a0.5_T5_s0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_is_named_by_its_methods(composed: Callable[..., Settings], overrides: list[str], name: str) -> None:
    assert composed(*overrides).run_name == name


@pytest.mark.parametrize(
    ("overrides", "temperature"),
    [
        ([], 5),
        (["loss=dkd"], 4),
        (["loss=logit_mse"], None),
        (["loss.standardize=true"], None),
        (["loss.standardize=true", "loss@also=dist"], 4),
        (["loss=cross_entropy", "loss@also=kd"], 5),
        (["loss.alpha=0", "loss@also=logit_mse"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_temperature_that_softens_the_teacher(
    composed: Callable[..., Settings], overrides: list[str], temperature: float | None
) -> None:
    assert composed(*overrides).softening == temperature


def test_beta_of_dkd_is_the_pair_s(composed: Callable[..., Settings]) -> None:
    assert composed("loss=dkd").loss.beta == 8
    assert composed("loss=dkd", "+benchmark.dkd_beta=6").loss.beta == 6
    assert composed("loss=dkd", "+benchmark.dkd_beta=6", "loss.beta=1").loss.beta == 1


def test_the_number_of_views_matters_with_views(composed: Callable[..., Settings]) -> None:
    five, ten = (composed("distillation.outputs=views", f"distillation.views={number}") for number in (5, 10))
    assert five.identity != ten.identity


@settings_of_test(deadline=None)
@given(st.dictionaries(st.text("abc.", min_size=1), st.integers() | st.floats(allow_nan=False) | st.text(), max_size=5))
def test_the_order_of_settings_does_not_matter(flat: dict[str, object]) -> None:
    assert identity(flat) == identity(dict(reversed(flat.items())))


def test_places_are_left_out_completely() -> None:
    flat = {"tracking.uri": "x", "tracking.experiment": "y", "output_dir": "z", "dataset.root_of_all": 1}
    assert what_matters(flat) == {"dataset.root_of_all": 1}


def test_an_identity_outlives_a_moved_module_and_a_longer_name() -> None:
    now = {"scheduler._target_": "kdpipe.training.schedules.cosine", "loss._target_": "kdpipe.losses.kd.KD"}
    assert identity(now) == identity(
        {"scheduler._target_": "kdpipe.schedulers.cosine", "loss._target_": "kdpipe.losses.KD"}
    )


def test_the_student_alone_is_cross_entropy_under_both_of_its_names(composed: Callable[..., Settings]) -> None:
    long = composed("loss=cross_entropy", "loss._target_=kdpipe.losses.cross_entropy.CrossEntropy")
    assert long.identity == composed("loss=cross_entropy").identity
    assert long.run_name == composed("loss=cross_entropy").run_name


def test_alpha_0_of_a_loss_that_is_not_ours_is_not_cross_entropy() -> None:
    theirs = {"loss._target_": "their_package.Focal", "loss.alpha": 0, "seed": 0}
    assert what_matters(theirs) == theirs


def test_an_identity_does_not_depend_on_kdpipe_s_version(
    composed: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = composed().identity
    monkeypatch.setattr("kdpipe.__version__", "99.0.0")
    assert composed().identity == before


def test_a_run_of_version_0_4_0_is_found_again(composed: Callable[..., Settings]) -> None:
    digits = ("dataset=digits", "tracking.experiment=demo", "train.epochs=15")
    assert composed("experiment=student", *digits).identity == "ffd2450dae00"
    assert composed("experiment=distill", "model@teacher=resnet20", *digits).identity == "74c12a199c73"
