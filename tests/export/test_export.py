"""Exported files: what is written, what is checked, what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import ALL, QUICK, Taught, assert_refused, no_store
from mlflow import MlflowClient
from omegaconf import DictConfig
from onnx import numpy_helper

from kdpipe.assembly.datasets import forget_data
from kdpipe.assembly.finished_runs import blank_images, open_run, open_teacher
from kdpipe.assembly.networks import build_network
from kdpipe.export import exporting, quantize
from kdpipe.export.predictor import numpy_forward, open_onnx, open_predictor, open_program
from kdpipe.export.verification import check_int8_accuracy, check_same_logits
from kdpipe.export.writers import trace_classifier, write_onnx, write_program
from kdpipe.tracking import RunStore


def test_every_format_gives_the_logits_of_pytorch_for_any_batch_size(taught: Taught, command: Callable) -> None:
    made = command("export", taught.student, "--out", "files", "--format", *ALL, *QUICK)
    assert made.status == 0, made.errors
    names = {"model.onnx", "model_int8.onnx", "model.pt2", "model.safetensors", "config.yaml", "README.md"}
    assert {file.name for file in Path("files").iterdir()} == names
    assert all(file.stat().st_mode & 0o044 for file in (Path("files"), *Path("files").iterdir()))

    run = open_run(taught.student, RunStore(taught.uri))
    images = np.random.default_rng(0).integers(0, 256, (7, 1, 8, 8)).astype(np.uint8)
    expected = numpy_forward(run.classifier)(images)
    for name in ("model.onnx", "model.pt2", "model.safetensors"):
        opened = open_predictor(f"files/{name}", no_store, trust=True)
        assert opened.class_names == run.class_names and opened.image_shape == (1, 8, 8)
        for count in (1, 2, 7):
            np.testing.assert_allclose(opened.forward(images[:count]), expected[:count], atol=1e-4)
    quantized = open_predictor("files/model_int8.onnx", no_store)
    for count in (1, 2, 7):
        assert quantized.forward(images[:count]).shape == (count, 10)


def test_the_table_has_teacher_student_and_files(taught: Taught, command: Callable) -> None:
    made = command("export", taught.student, "--out", "files", "--format", "onnx", "torch_export", *QUICK)
    rows = [line.split("  ")[1] for line in made.output.splitlines() if line.startswith("  ")][1:]
    assert rows == ["teacher", "student", "student ONNX", "student int8", "student torch.export"]
    assert "× teacher" in made.output and "checked on 100 test images" in made.output
    assert max(map(len, made.output.splitlines())) <= 200
    assert made.errors == ""  # no chatter of exporters

    alone = command("export", taught.teacher, "--out", "alone", "--format", "safetensors", *QUICK)
    assert "× student" in alone.output and "× teacher" not in alone.output


def test_files_describe_themselves_and_not_the_machine(taught: Taught, command: Callable) -> None:
    assert command("export", taught.student, "--out", "files", "--format", *ALL, *QUICK).status == 0
    for name in ("model.onnx", "model_int8.onnx"):
        model = onnx.load(f"files/{name}")
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(metadata["class_names"]) == [str(digit) for digit in range(10)]
        assert metadata["kdpipe.run"] == taught.student and "uint8" in metadata["preprocessing"]
        assert metadata["kdpipe.weights"] == f"runs:/{taught.student}"
        (images,), (logits,) = model.graph.input, model.graph.output
        assert (images.name, logits.name) == ("images", "logits")
        assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        assert [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim] == ["batch", 1, 8, 8]
    for file in Path("files").iterdir():
        content = file.read_bytes()
        for place in (str(taught.folder), str(Path(exporting.__file__).parents[2]), sys.prefix):
            assert place.encode() not in content, f"{place} is in {file.name}"


NETWORKS = [
    ("student_cnn", (3, 32, 32)),  # enlarged to 128
    ("student_cnn", (1, 8, 8)),  # and grey
    ("resnet20", (3, 48, 40)),  # made smaller; its shortcuts pad channels
    ("resnet32", (3, 48, 40)),  # cropped as libraries do
    ("mobilenetv2_half", (3, 24, 32)),
    pytest.param("resnet56", (3, 32, 32), marks=pytest.mark.faults),
    pytest.param("shufflenetv1", (3, 32, 32), marks=pytest.mark.faults),
    pytest.param("shufflenetv2", (3, 32, 32), marks=pytest.mark.faults),
    pytest.param("vgg8", (3, 300, 200), marks=pytest.mark.faults),
    pytest.param("densenet121", (3, 32, 32), marks=pytest.mark.faults),
    pytest.param("timm", (3, 64, 80), marks=pytest.mark.faults),
    pytest.param("torchvision", (1, 64, 80), marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("name", "shape"), NETWORKS)
def test_exported_networks_of_all_families_compute_the_same(
    composed: Callable[..., DictConfig], tmp_path: Path, name: str, shape: tuple[int, int, int]
) -> None:
    cropped = ["model.resize=crop", "model.interpolation=bicubic", "model.crop_pct=0.875"]
    smaller = ["model.image_size=64", "model.mean=[0.5,0.5,0.5]", "model.std=[0.5,0.5,0.5]", *cropped]
    preprocessing = {"timm": smaller, "torchvision": smaller, "resnet32": cropped}
    config = composed("experiment=student", f"model={name}", *preprocessing.get(name, []))
    torch.manual_seed(0)
    classifier = build_network("model", config.model, blank_images(("a", "b", "c"), shape), freeze="none").eval()
    metadata = {"class_names": '["a", "b", "c"]', "image_shape": "x".join(map(str, shape)), "kdpipe.version": "0"}
    program = trace_classifier(classifier, shape)
    write_onnx(program, tmp_path / "model.onnx", metadata)
    write_program(program, tmp_path / "model.pt2", metadata)
    images = np.random.default_rng(0).integers(0, 256, (7, *shape)).astype(np.uint8)
    expected = numpy_forward(classifier)(images)
    for opened in (open_onnx(tmp_path / "model.onnx"), open_program(tmp_path / "model.pt2", trust=True)):
        for count in (1, 2, 7):
            check_same_logits(opened.forward(images[:count]), expected[:count])
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert not any(node.metadata_props for node in nodes)  # a tenth of a small file
    if name == "student_cnn":
        assert "Gather" not in {node.op_type for node in nodes}  # as resizing by strides would be exported
    quantize.write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", images, metadata)
    assert open_onnx(tmp_path / "int8.onnx").forward(images[:1]).shape == (1, 3)


def tamper(file: Path, factor: float) -> None:
    """Multiply the last layer of an ONNX file."""
    model = onnx.load(file)
    last = [node for node in model.graph.node if node.op_type == "Gemm"][-1]
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == last.input[1])
    weight.CopyFrom(numpy_helper.from_array(factor * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, file)


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """After `tampered(1.01)` exported ONNX files have a last layer that is 1 % too large."""

    def wrong(factor: float) -> None:
        def write(program: torch.export.ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
            write_onnx(program, file, metadata)
            tamper(file, factor)

        monkeypatch.setattr(exporting, "write_onnx", write)

    return wrong


def test_a_file_with_other_logits_is_refused_and_the_others_stay(
    taught: Taught, command: Callable, tampered: Callable
) -> None:
    tampered(1.01)
    made = command("export", taught.student, "--out", "files", "--format", "onnx", "torch_export", *QUICK)
    assert made.status == 1
    assert "model.onnx is refused: its logits differ from PyTorch's by up to" in made.errors
    assert {file.name for file in Path("files").iterdir()} >= {"model.pt2", "README.md"}
    assert not Path("files/model.onnx").exists()
    assert "model.onnx" not in Path("files/README.md").read_text()


def test_an_int8_file_that_loses_too_much_accuracy_is_refused(
    taught: Taught, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opposite(float_file: Path, file: Path, images: np.ndarray, metadata: dict[str, str]) -> None:
        shutil.copy(float_file, "opposite.onnx")
        tamper(Path("opposite.onnx"), -1)
        quantize.write_int8(Path("opposite.onnx"), file, images, metadata)

    monkeypatch.setattr(exporting, "write_int8", opposite)
    made = command("export", taught.student, "--out", "files", *QUICK)
    assert made.status == 1
    assert re.search("model_int8.onnx is refused: its accuracy on .*, more than --max-loss 10$", made.errors)
    assert {file.name for file in Path("files").iterdir()} == {"model.onnx", "README.md"}
    assert "model_int8.onnx" not in Path("files/README.md").read_text()

    lenient = command("export", taught.student, "--out", "lenient", *QUICK, "--max-loss", 100)
    assert lenient.status == 0 and Path("lenient/model_int8.onnx").exists()


PLAIN = {"model.safetensors", "config.yaml", "README.md"}


@pytest.mark.parametrize(
    ("breaks", "formats", "refused", "left"),
    [
        ("trace_classifier", ALL, {"model.onnx", "model_int8.onnx", "model.pt2"}, PLAIN),
        ("write_onnx", ("onnx", "safetensors"), {"model.onnx", "model_int8.onnx"}, PLAIN),
        ("open_onnx", ("onnx", "safetensors"), {"model.onnx", "model_int8.onnx"}, PLAIN),
        ("write_int8", ("onnx",), {"model_int8.onnx"}, {"model.onnx", "README.md"}),
        ("write_program", ("torch_export", "safetensors"), {"model.pt2"}, PLAIN),
        ("open_program", ("torch_export", "safetensors"), {"model.pt2"}, PLAIN),
        ("write_weights", ("safetensors", "torch_export"), {"model.safetensors"}, {"model.pt2", "README.md"}),
        ("open_weights", ("safetensors", "torch_export"), {"model.safetensors"}, {"model.pt2", "README.md"}),
    ],
)
def test_a_format_that_raises_is_refused_and_the_others_stay(
    taught: Taught,
    command: Callable,
    monkeypatch: pytest.MonkeyPatch,
    breaks: str,
    formats: tuple[str, ...],
    refused: set[str],
    left: set[str],
) -> None:
    def broken(*given: object, **_: object) -> None:
        file = next((part for part in reversed(given) if isinstance(part, Path)), Path("elsewhere"))
        if breaks.startswith("write"):
            file.write_bytes(b"half a file")
        raise RuntimeError(f"{file} is\n broken")

    monkeypatch.setattr(exporting, breaks, broken)
    made = command("export", taught.student, "--out", "files", "--format", *formats, *QUICK)
    assert_refused(made)
    for name in refused:
        assert re.search(rf"{name} is refused: RuntimeError: [\w.]+ is broken(;|$)", made.errors, re.MULTILINE)
    assert made.errors.count("is refused") == len(refused)
    assert {file.name for file in Path("files").iterdir()} == left
    assert not any(name in Path("files/README.md").read_text() for name in refused)


def test_an_export_whose_files_are_all_refused_leaves_nothing(
    taught: Taught, command: Callable, tampered: Callable, tmp_path: Path
) -> None:
    tampered(float("nan"))
    made = command("export", taught.student, "--out", "files", *QUICK)
    assert made.status == 1 and "model.onnx is refused: some of its logits are not finite" in made.errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("where", "stop", "status"),
    [
        ("time_measurements", KeyboardInterrupt, 130),
        ("time_measurements", OSError("No space left on device"), 1),
        ("write_weights", KeyboardInterrupt, 130),
        ("write_weights", SystemExit(143), 143),
    ],
)
def test_an_export_that_is_interrupted_leaves_nothing(
    taught: Taught,
    command: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    stop: BaseException,
    status: int,
) -> None:
    def stopped(*_: object) -> None:
        raise stop

    monkeypatch.setattr(exporting, where, stopped)
    made = command("export", taught.student, "--out", "files", "--format", "safetensors", *QUICK)
    assert made.status == status
    assert list(tmp_path.iterdir()) == []


EXPECTED = np.array([[4.0, 0, 0], [0, 1, 0.999], [0, 0, 9]], np.float32)


@pytest.mark.parametrize(
    ("logits", "problem"),
    [
        (EXPECTED, None),
        (EXPECTED + np.float32([[0, 0, 0.005]]), None),  # the second image is a tie, but for rounding
        (EXPECTED + np.float32([[0, 0, 0.02]]), "differ from PyTorch's by up to 0.02, more than 0.009"),
        (EXPECTED * np.nan, "not finite"),
        (EXPECTED[:, :2], r"logits have shape \[3, 2\], expected \[3, 3\]"),
    ],
)
def test_which_logits_count_as_the_same(logits: np.ndarray, problem: str | None) -> None:
    with nullcontext() if problem is None else pytest.raises(ValueError, match=problem):
        check_same_logits(logits, EXPECTED)


def test_the_accuracy_that_int8_may_lose() -> None:
    labels = np.array([0, 1, 2])
    worse = EXPECTED[[0, 1, 0]]
    check_int8_accuracy(worse, EXPECTED, labels, max_loss=40)
    check_int8_accuracy(EXPECTED, EXPECTED, labels, max_loss=0)
    with pytest.raises(ValueError, match=r"a loss of 33\.33 points, more than --max-loss 33"):
        check_int8_accuracy(worse, EXPECTED, labels, max_loss=33)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--out", "."], r"--out \.: this exists; expected the name of a new folder"),
        (["--out", "x", "--images", 0], "--images 0: expected a whole number from 1$"),
        (["--out", "x", "--seconds", "nan"], "--seconds nan: expected a number from 0$"),
        (["--out", "x", "--max-loss", -1], "--max-loss -1: expected a number from 0 to 100$"),
        (["--out", "x", "--alias", "champion"], "--alias champion: requires --register NAME"),
        (
            ["--out", "x", "--format", "safetensors", "--register", "digits"],
            "--register digits: registers the ONNX model, so add --format onnx",
        ),
        (["--out", "x", "--uri", "sqlite:///none.db"], "none.db: MLflow store not found"),
        (["--out", "x", "--register", "a/b"], "--register a/b: expected a name without / and :"),
        (
            ["--out", "x", "--register", "a", "--alias", "v1"],
            "--alias v1: expected letters, digits, - and _, but not latest",
        ),
    ],
)
def test_invalid_flags_are_refused_before_anything_is_done(
    taught: Taught, command: Callable, monkeypatch: pytest.MonkeyPatch, words: list, error: str
) -> None:
    monkeypatch.setattr(exporting, "export_run", lambda *_, **__: pytest.fail("too late"))
    refused = command("export", taught.student, *words)
    assert_refused(refused)
    assert re.search(error, refused.errors), refused.errors


def test_a_missing_run_and_other_images_are_refused(
    taught: Taught, command: Callable, kdpipe: Callable, class_folders: Path
) -> None:
    unknown = command("export", "nosuchrun", "--out", "x")
    assert unknown.status == 1 and "runs:/nosuchrun: no such run in " in unknown.errors

    photos = kdpipe("dataset=image_folder", f"dataset.root={class_folders}", "experiment=student", "train.epochs=0")
    assert photos.status == 0, photos.errors
    run_id = re.search(r"kdpipe\.export (\w+)", photos.output)[1]
    store = ("--uri", f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    forget_data()  # as a new process would
    gone = class_folders.rename(class_folders.with_name("elsewhere"))
    missing = command("export", run_id, "--out", "x", *store)
    assert_refused(missing, "photos")
    (gone / "temple" / "00.jpg").write_bytes((gone / "flower" / "00.jpg").read_bytes())
    forget_data()
    others = command("export", run_id, "--out", "x", "--root", gone, *store)
    assert others.status == 1 and "these are not the images of run" in others.errors
    assert not Path("x").exists()


def test_class_names_in_any_script_are_kept(command: Callable, kdpipe: Callable, class_folders: Path) -> None:
    names = ["a\u00a0b\u200dc", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645\u3000d"]  # spaces, joiners
    for folder, name in zip(("flower", "temple"), names, strict=True):
        (class_folders / folder).rename(class_folders / name)
    run = kdpipe("dataset=image_folder", f"dataset.root={class_folders}", "experiment=student", "train.epochs=0")
    assert run.status == 0, run.errors
    run_id = re.search(r"kdpipe\.export (\w+)", run.output)[1]
    store = ("--uri", f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    made = command("export", run_id, "--out", "files", "--format", *ALL, *QUICK, *store)
    assert made.status == 0, made.errors
    for name in ("model.onnx", "model_int8.onnx", "model.pt2", "model.safetensors"):
        assert list(open_predictor(f"files/{name}", no_store, trust=True).class_names) == names
    answer = command("predict", "files", class_folders / names[0] / "00.jpg", "--top", 2)
    assert all(name in answer.output for name in names)


def test_unfinished_runs_and_runs_without_weights_are_refused(taught: Taught, command: Callable) -> None:
    client = MlflowClient(taught.uri)
    config = client.download_artifacts(taught.student, "config.yaml")
    experiment = client.get_run(taught.student).info.experiment_id
    for status, error in (("FAILED", "this run is FAILED"), ("FINISHED", "this run has no model.safetensors")):
        run_id = client.create_run(experiment).info.run_id
        client.log_artifact(run_id, config)
        client.set_terminated(run_id, status)
        refused = command("export", run_id, "--out", "x")
        assert_refused(refused, error)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_the_error_for_a_missing_package_says_how_to_install_it(
    taught: Taught, command: Callable, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    refused = command("export", taught.student, "--out", "files", *QUICK)
    assert refused.status == 1 and not Path("files").exists()
    assert f"--format onnx: requires {module}; install with pip install -e '.[onnx]'" in refused.errors
    assert command("export", taught.student, "--out", "files", "--format", "safetensors", *QUICK).status == 0


def test_a_teacher_whose_weights_have_changed_is_refused(taught: Taught) -> None:
    store = RunStore(taught.uri)
    run = open_run(taught.student, store)
    assert open_teacher(run, store) is not None
    run.record.tags["kdpipe.inputs"] = "images-0123456789abcdef"
    with pytest.raises(ValueError, match="auto: these are no longer the weights that taught the run"):
        open_teacher(run, store)


def test_root_is_refused_for_a_data_set_without_a_folder(taught: Taught, command: Callable) -> None:
    refused = command("export", taught.student, "--out", "files", "--root", "photos")
    assert refused.status == 1 and "--root photos: digits has no folder of its own" in refused.errors
