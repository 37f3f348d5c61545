"""Predictions of exported files and runs; damaged and hostile files."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import Outcome, Taught, assert_refused
from mlflow import MlflowClient

from kdpipe.export.predictor import Predictor, open_onnx, open_predictor
from kdpipe.predict import load_image, prediction_table
from kdpipe.tracking import RunStore


@pytest.fixture(scope="module")
def exported(taught: Taught, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by kdpipe.export."""
    from kdpipe.export.__main__ import export, export_arguments

    out = tmp_path_factory.mktemp("exported") / "digits"
    words = [
        taught.student,
        "--out",
        str(out),
        "--uri",
        taught.uri,
        "--seconds",
        "0",
        "--images",
        "50",
        "--max-loss",
        "10",
    ]
    export(export_arguments([*words, "--format", "onnx", "torch_export", "safetensors"]))
    return out


@pytest.fixture
def photos(tmp_path: Path, photo: Callable) -> list[Path]:
    """A colour photo larger than the network's images, and a grey one of their size."""
    photo(0, size=(60, 40)).save(tmp_path / "temple.jpg")
    photo(1, size=(8, 8)).convert("L").save(tmp_path / "flower.png")
    return [Path("temple.jpg"), Path("flower.png")]


def lines(outcome: Outcome) -> list[list[str]]:
    """The table's, without its heading."""
    return [line.replace(" %", "").split() for line in outcome.output.splitlines()[2:]]


def test_all_formats_and_the_run_itself_predict_the_same(
    taught: Taught, exported: Path, command: Callable, photos: list[Path]
) -> None:
    by_run = command("predict", taught.student, *photos)
    assert by_run.status == 0, by_run.errors
    answers = lines(by_run)
    assert [line[0] for line in answers] == ["temple.jpg", "flower.png"]
    assert all(0.1 <= float(line[2]) / 100 <= 1 for line in answers)  # of ten classes the likeliest
    for network in (f"runs:/{taught.student}", exported, exported / "model.onnx", exported / "model.safetensors"):
        assert lines(command("predict", network, *photos)) == answers
    assert lines(command("predict", exported / "model.pt2", "--trust", *photos)) == answers


def test_the_teacher_s_predictions_are_shown_as_well(
    taught: Taught, exported: Path, command: Callable, photos: list[Path]
) -> None:
    both = command("predict", exported, *photos, "--teacher", taught.teacher)
    alone = command("predict", taught.teacher, *photos)
    assert [line[3:] for line in lines(both)] == [line[1:] for line in lines(alone)]
    assert "teacher's" in both.output and "teacher's" not in alone.output


def test_the_likeliest_classes(exported: Path, command: Callable, photos: list[Path]) -> None:
    three = lines(command("predict", exported, photos[0], "--top", 3))
    probabilities = [float(line[-1]) for line in three]
    assert len(three) == 3 and probabilities == sorted(probabilities, reverse=True)
    every = lines(command("predict", exported, photos[0], "--top", 99))
    assert len(every) == 10 and sum(float(line[-1]) for line in every) == pytest.approx(100, abs=1)
    assert "--top 0: expected a whole number from 1" in command("predict", exported, photos[0], "--top", 0).errors


def test_files_that_are_not_images_are_listed_and_the_others_are_classified(
    exported: Path, command: Callable, photos: list[Path]
) -> None:
    Path("text.jpg").write_text("no photo")
    Path("empty.png").touch()
    Path("torn.jpg").write_bytes(photos[0].read_bytes()[:200])
    given = command("predict", exported, photos[0], "text.jpg", "empty.png", "torn.jpg", "none.jpg", ".", photos[1])
    assert given.status == 1
    assert [line[0] for line in lines(given)] == ["temple.jpg", "flower.png"]
    errors = given.errors.splitlines()
    for name, reason in (
        ("text.jpg", "unknown image format"),
        ("empty.png", "empty"),
        ("torn.jpg", ""),
        ("none.jpg", "No such file or directory"),
        (".", "Is a directory"),
    ):
        assert any(line.startswith(f"kdpipe.predict: {name}: {reason}") for line in errors), name
    assert errors[-1] == "kdpipe.predict: 5 of 7 images could not be read"

    none = command("predict", exported, "text.jpg")
    assert none.status == 1 and none.output == ""


def test_a_warning_for_a_teacher_with_other_classes(
    exported: Path, command: Callable, taught: Taught, photos: list[Path]
) -> None:
    shutil.copytree(exported, "other")
    model = onnx.load("other/model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, metadata | {"class_names": json.dumps([f"class {n}" for n in range(10)])})
    onnx.save(model, "other/model.onnx")
    given = command("predict", exported, photos[0], "--teacher", "other")
    assert given.status == 0 and "--teacher other has other classes: class 0, class 1" in given.errors
    assert "other classes" not in command("predict", exported, photos[0], "--teacher", taught.teacher).errors


def test_the_error_for_a_mistyped_folder_without_a_store(command: Callable) -> None:
    for name in ("studnt", "studnt/"):
        given = command("predict", name, "photo.png", "--uri", "sqlite:///none.db")
        assert given.errors.startswith(
            f"kdpipe.predict: {name}: no file or folder has this name, and it cannot be opened as a run: "
        )


@pytest.mark.parametrize(
    ("network", "error"),
    [
        ("none.onnx", "none.onnx: file not found"),
        ("nosuchrun", "nosuchrun: no file or folder has this name, and it cannot be opened as a run: runs:/nosuchrun"),
        ("temple.jpg", "temple.jpg: expected a file that ends with .onnx, .pt2, .safetensors, a folder or a run"),
        (".", ".: expected a folder with model.onnx, model_int8.onnx, model.safetensors or model.pt2"),
        ("broken.onnx", "broken.onnx: not a readable ONNX file"),
        ("broken.pt2", "broken.pt2: loading a .pt2 file can run code"),
        ("broken.safetensors", "broken.safetensors: config.yaml next to it is missing, which describes its network"),
        ("foreign.onnx", "foreign.onnx: its metadata lacks valid class names or image shape"),
    ],
)
def test_files_that_are_not_networks_are_refused(
    command: Callable, photos: list[Path], network: str, error: str
) -> None:
    for name in ("broken.onnx", "broken.pt2", "broken.safetensors"):
        Path(name).write_bytes(b"no network")
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "foreign", values[:1], values[1:])
    onnx.save(
        onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), "foreign.onnx"
    )
    refused = command("predict", network, photos[0])
    assert_refused(refused, error)


@pytest.mark.parametrize(
    "changed",
    [
        {"class_names": "[1, 2]"},
        {"class_names": "["},
        {"class_names": "[" * 100_000},
        {"image_shape": "3x32"},
        {"image_shape": "3x99999999x99999999"},
        {"image_shape": "2x32x32"},
        {"temperature": "0"},
        {"temperature": "nan"},
        {"temperature": "hot"},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_invalid_metadata_is_refused(exported: Path, tmp_path: Path, changed: dict[str, str]) -> None:
    model = onnx.load(exported / "model.onnx")
    before = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, before | changed)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="its metadata lacks valid class names or image shape"):
        open_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"class_names": '["a", "b"]'}, "its metadata names 2 classes, but its logits are [2, 10]"),
        ({"class_names": "[]"}, "its metadata names 0 classes, but its logits are [2, 10]"),
        ({"image_shape": "3x8x8"}, "it rejects images of the shape in its metadata, uint8 [2, 3, 8, 8]"),
    ],
)
def test_metadata_that_does_not_match_the_network_is_refused(
    exported: Path, tmp_path: Path, changed: dict[str, str], problem: str
) -> None:
    model = onnx.load(exported / "model.onnx")
    before = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, before | changed)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError) as error:
        open_onnx(tmp_path / "model.onnx")
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_control_characters_are_replaced_before_printing(
    exported: Path, command: Callable, photos: list[Path], tmp_path: Path
) -> None:
    model = onnx.load(exported / "model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    odd = ["\x1b[31mred", "two\nlines", "\u202egpj.exe", "\ud800", "na\u00efve\u2028\u00a0\u200c\u3000\u200d", *"abcde"]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata | {"class_names": json.dumps(odd)})
    onnx.save(model, tmp_path / "model.onnx")
    assert list(open_onnx(tmp_path / "model.onnx").class_names) == odd
    Path("blue\x1b[34m.jpg").write_bytes(photos[0].read_bytes())
    given = command("predict", "model.onnx", "blue\x1b[34m.jpg", "none\x1b[34m.jpg", "--top", 10)
    for shown in ("blue�[34m.jpg", "�[31mred", "two�lines", "�gpj.exe", " � ", odd[4]):
        assert shown in given.output, shown
    assert "none�[34m.jpg: No such file" in given.errors
    assert not any(letter in given.output + given.errors for letter in "\x1b\u202e\ud800")


def test_a_file_with_damaged_weights_predicts_nothing(
    exported: Path, tmp_path: Path, photo: Callable, command: Callable
) -> None:
    model = onnx.load(exported / "model.onnx")
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.raw_data = b"\xff" * len(weights.raw_data)
    onnx.save(model, tmp_path / "model.onnx")
    photo(0).save(tmp_path / "photo.png")
    refused = command("predict", tmp_path / "model.onnx", tmp_path / "photo.png")
    assert refused.status == 1 and "its logits are not finite" in refused.errors


def test_weights_in_another_file_are_not_read(exported: Path, tmp_path: Path) -> None:
    onnx.save(
        onnx.load(exported / "model.onnx"),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    assert (tmp_path / "weights").exists()
    with pytest.raises(ValueError, match="its weights are in another file, which is not read"):
        open_onnx(tmp_path / "model.onnx")


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_pt2_file_is_not_run_without_trust(exported: Path, command: Callable, photos: list[Path]) -> None:
    with zipfile.ZipFile(exported / "model.pt2") as old, zipfile.ZipFile("bomb.pt2", "w") as new:
        for member in old.namelist():
            content = old.read(member)
            if member.endswith("model_weights_config.json"):
                described = json.loads(content)
                for weight in described["config"].values():
                    weight["use_pickle"] = True
                content = json.dumps(described).encode()
            elif "/weights/weight" in member:
                content = pickle.dumps(Bomb())
            new.writestr(member, content)
    refused = command("predict", "bomb.pt2", photos[0])
    assert refused.status == 1 and "--trust" in refused.errors
    assert not Path("exploded").exists()


def test_a_config_with_another_target_is_refused(exported: Path, command: Callable, photos: list[Path]) -> None:
    shutil.copytree(exported, "copied")
    config = Path("copied/config.yaml")
    config.write_text(config.read_text().replace("kdpipe.models.student_cnn.StudentCNN", "os.system"))
    refused = command("predict", "copied/model.safetensors", photos[0])
    assert refused.status == 1 and "os.system" in refused.errors
    shutil.copy(exported / "config.yaml", config)
    config.write_text(config.read_text().replace("kdpipe.models.student_cnn.StudentCNN", "kdpipe.models.vgg.VGG"))
    assert command("predict", "copied/model.safetensors", photos[0]).status == 1


def test_probabilities_are_softened_by_the_temperature() -> None:
    logits = np.array([[2.0, 0.0]], np.float32)
    images = np.zeros((1, 1, 8, 8), np.uint8)
    for temperature in (1.0, 2.0):
        network = Predictor("", lambda images: logits, ("a", "b"), (1, 8, 8), temperature)
        expected = 1 / (1 + np.exp(-2 / temperature))
        np.testing.assert_allclose(network.probabilities(images), [[expected, 1 - expected]])


def test_an_exported_temperature_is_applied(taught: Taught, exported: Path) -> None:
    fitted = MlflowClient(taught.uri).get_run(taught.student).data.metrics["model/temperature"]
    assert fitted != 1
    for address in (taught.student, *(exported / name for name in ("model.onnx", "model.safetensors", "model.pt2"))):
        opened = open_predictor(str(address), lambda: RunStore(taught.uri), trust=True)
        assert opened.temperature == pytest.approx(fitted)


def test_photos_are_prepared_as_images_of_a_data_set_are(tmp_path: Path, photo: Callable) -> None:
    photo(0, size=(60, 40)).save(tmp_path / "photo.png")
    colour, grey = load_image(tmp_path / "photo.png", [((3, 40, 60), "squeeze"), ((1, 8, 10), "squeeze")])
    np.testing.assert_array_equal(colour, np.asarray(photo(0, size=(60, 40))).transpose(2, 0, 1))
    assert grey.shape == (1, 8, 10) and grey.dtype == np.uint8


def test_names_in_the_table_are_not_markup() -> None:
    row = [":cat:.jpg", "[bold]:dog:[/bold]", "99"]
    assert prediction_table([row]).splitlines()[-1].split() == row
