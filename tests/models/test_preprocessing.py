"""Photos as pretrained networks expect them: resized and cropped as torchvision and timm do, stored, exported."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import Outcome
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from kdpipe.assembly.finished_runs import blank_images, open_data, open_run
from kdpipe.assembly.networks import build_network, images_for
from kdpipe.data.decode import fitted, read_image
from kdpipe.data.photos import Photos, PhotoWriter, kept
from kdpipe.export.__main__ import export, export_arguments
from kdpipe.export.predictor import open_predictor
from kdpipe.models import Classifier, Ensemble
from kdpipe.models.torchvision import classifier as torchvision_classifier
from kdpipe.models.weights import is_imagenet, load_imagenet
from kdpipe.predict import load_image
from kdpipe.settings.schema import Settings
from kdpipe.system.padding import each_photo
from kdpipe.tracking import RunStore

Photo = Callable[..., Image.Image]
SIZES = [
    (640, 427),
    (427, 640),
    (300, 900),
    (1200, 200),
    (224, 224),
    (256, 256),
    (231, 229),
    (500, 333),
    (7, 5),
    (1, 1),
]


@pytest.fixture(scope="session")
def photos(photo: Photo) -> list[Image.Image]:
    """Twenty photos of odd shapes and modes, as they are decoded."""
    deep_grey = Image.fromarray(np.asarray(photo(1, 15, (333, 250)).convert("L")).astype(np.uint16) * 257)
    files = [(photo(number % 2, number, size), "PNG") for number, size in enumerate(SIZES)]
    files += [(photo(0, 10, (300, 1)), "PNG"), (photo(1, 11, (1, 300)), "PNG"), (photo(0, 12, (50, 40)), "JPEG")]
    files += [(photo(0, 13, (320, 240)).convert(mode), "PNG") for mode in ("L", "1", "P", "LA")]
    files += [(photo(1, 14, (240, 320)).convert("CMYK"), "JPEG"), (deep_grey, "TIFF")]
    transparent = photo(0, 16, (300, 280)).convert("RGBA")
    transparent.putalpha(photo(1, 16, (300, 280)).convert("L"))
    files.append((transparent, "PNG"))
    decoded = []
    for image, form in files:
        content = io.BytesIO()
        image.save(content, form)
        decoded.append(read_image(content.getvalue()))
    assert len(decoded) == 20
    return decoded


def library_network(composed: Callable[..., Settings], library: str, name: str, *more: str) -> Classifier:
    """With random weights and the preprocessing that its pretrained ones expect."""
    settings = composed(f"model={library}", f"model.name={name}", "model.weights=null", *more)
    torch.manual_seed(0)
    return build_network("model", settings.model, blank_images([*"abcdefghij"], (3, 64, 64)), "none").eval()


def steps_of_timm(network: nn.Module, photo: Image.Image | Tensor) -> Tensor:
    """timm's transform: its steps take photos of PIL and, with the same meaning, uint8 tensors."""
    config = timm.data.resolve_model_data_config(network)
    *geometry, _, scale = timm.data.create_transform(**config, is_training=False).transforms
    for step in geometry:
        photo = step(photo)
    pixels = photo if isinstance(photo, Tensor) else pil_to_tensor(photo)
    return normalize(pixels.float() / 255, scale.mean.tolist(), scale.std.tolist())


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "mobilenetv4_conv_small"])
def test_logits_are_those_of_timm_s_own_transform(
    name: str, photos: list[Image.Image], composed: Callable[..., Settings]
) -> None:
    model = library_network(composed, "timm", name)
    for photo in photos:
        image = pil_to_tensor(photo)
        with torch.no_grad():
            logits = model(image[None])
            theirs = model.network(steps_of_timm(model.network, image)[None])
            torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)
        # Pillow rounds, and cuts what is beyond black and white, between the rows and the columns, too: of its photos
        # some pixels differ by a level, and more where all are black or white.
        if min(photo.size) > 1:
            pixels = (model.preprocess(image[None])[0] - steps_of_timm(model.network, photo)).abs() * model.std[0] * 255
            assert pixels.mean() < (0.3 if len(np.unique(photo)) > 2 else 2)


def test_logits_are_those_of_torchvision_s_own_transform(
    photos: list[Image.Image], composed: Callable[..., Settings]
) -> None:
    model = library_network(composed, "torchvision", "resnet18")
    transform = torchvision.models.get_model_weights("resnet18")["DEFAULT"].transforms()
    for photo in photos:
        image = pil_to_tensor(photo)
        with torch.no_grad():
            torch.testing.assert_close(model(image[None]), model.network(transform(image)[None]), rtol=1e-4, atol=1e-4)


def padded_batch(photos: list[Image.Image]) -> Tensor:
    """The photos as `dataset.resize=keep` stores and batches them, at their own size."""
    file = io.BytesIO()
    writer = PhotoWriter(file)
    for number, photo in enumerate(photos):
        writer.add(number, kept(photo, None))
    stored = Photos(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), writer.table())
    return stored[torch.arange(len(photos))]


def of_usual_shape(photos: list[Image.Image]) -> list[Image.Image]:
    """Photos that are stored whole: of longer ones the centre is kept."""
    return [photo for photo in photos if max(photo.size) <= 4 * min(photo.size)]


@torch.no_grad()
def test_logits_of_photos_that_keep_their_shape_are_those_of_the_libraries_own_transforms(
    photos: list[Image.Image], composed: Callable[..., Settings]
) -> None:
    transform = torchvision.models.get_model_weights("resnet18")["DEFAULT"].transforms()
    by_torchvision, by_timm = (
        library_network(composed, *names) for names in (("torchvision", "resnet18"), ("timm", "resnet18.a1_in1k"))
    )
    assert by_timm.interpolation == "bicubic" and by_timm.crop_pct < 1
    whole = of_usual_shape(photos)
    assert len(whole) == 17
    batch, images = padded_batch(whole), [pil_to_tensor(photo) for photo in whole]
    theirs = torch.stack([transform(image) for image in images])
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(by_torchvision(batch), by_torchvision.network(theirs), **close)
    theirs = torch.stack([steps_of_timm(by_timm.network, image) for image in images])
    torch.testing.assert_close(by_timm(batch), by_timm.network(theirs), **close)
    mean = Ensemble([by_torchvision, by_timm], [1, 1], temperature=4)
    torch.testing.assert_close(mean(batch[:2]), torch.cat([mean(image[None]) for image in images[:2]]), **close)


@pytest.mark.parametrize("resize", ["squeeze", "crop"])
@pytest.mark.parametrize("size", [32, 300])
def test_each_photo_of_a_batch_is_seen_as_it_is_alone(
    resize: str, size: int, photos: list[Image.Image], composed: Callable[..., Settings]
) -> None:
    more = (f"model.resize={resize}", f"model.image_size={size}", "model.crop_pct=0.9")
    model = library_network(composed, "torchvision", "squeezenet1_1", *more)
    batch = padded_batch(photos)
    for images in (batch, batch.flip(3)):
        seen = model.preprocess(images)
        alone = torch.cat([model.preprocess(photo[None]) for photo in each_photo(images)])
        assert torch.equal(seen, alone) and seen.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(model.preprocess(batch), seen)


def test_a_network_at_another_size_than_its_library_s_keeps_the_border(composed: Callable[..., Settings]) -> None:
    assert library_network(composed, "torchvision", "resnet18").crop_pct == 0.875
    assert library_network(composed, "torchvision", "resnet18", "model.image_size=64").crop_pct == 1
    cut = library_network(composed, "torchvision", "resnet18", "model.image_size=64", "model.crop_pct=0.5")
    image = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    image[:, :, 32:96, 32:96] = 255
    assert len(cut.preprocess(image).unique(dim=-1)[0, 0].unique()) == 1  # the white centre alone


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.resize=stretch", "model.resize=stretch: expected one of squeeze, crop"),
        ("model.interpolation=lanczos", "model.interpolation=lanczos: expected one of bilinear, bicubic"),
        ("model.crop_pct=0", "model.crop_pct=0: expected a number above 0"),
        ("model.crop_pct=1.1", "model.crop_pct=1.1: expected a number above 0"),
        ("dataset.resize=pad", "dataset.resize=pad: expected one of squeeze, crop, keep"),
        ("augmentation=crop_flip dataset.resize=keep", "augmentation=CropFlip: it needs images of one size, and"),
        ("augmentation=trivial_augment dataset.resize=keep", "augmentation=TrivialAugment: it needs images of one"),
        (
            "augmentation=random_resized_crop dataset.resize=keep",
            "augmentation.size=null: photos of several sizes become images of one; expected pixels",
        ),
        (
            "train.mixup=0.2 dataset.resize=keep",
            "train.mixup=0.2: it needs images of one size, and dataset.resize=keep",
        ),
        (
            "train.cutmix=1 dataset.resize=keep",
            "train.cutmix=1: it needs images of one size, and dataset.resize=keep",
        ),
    ],
)
def test_bad_values_are_one_line(
    override: str, message: str, kdpipe: Callable[..., Outcome], class_folders: Path
) -> None:
    outcome = kdpipe("experiment=student", "dataset=image_folder", f"dataset.root={class_folders}", *override.split())
    assert outcome.status == 1 and outcome.errors.startswith(f"kdpipe: {message}"), outcome.errors


def test_cropped_photos_are_stored_predicted_and_exported_as_such(
    photo: Photo, tmp_path: Path, kdpipe: Callable[..., Outcome]
) -> None:
    """A teacher with its library's centre crop and a student without one learn from photos that are stored once."""
    for kind, name in enumerate(("temple", "flower")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            wide = photo(kind, number, (96, 48) if number % 2 else (48, 96))
            wide.save(tmp_path / "photos" / name / f"{number:02}.png")
    wide = Image.open(tmp_path / "photos" / "temple" / "01.png")
    centre = np.asarray(wide.crop((24, 0, 72, 48)).resize((32, 32), Image.Resampling.BILINEAR))
    inner = (slice(1, -1), slice(1, -1))  # at the border it also sees what is beside the centre
    np.testing.assert_allclose(np.asarray(fitted(wide, (32, 32), "crop"))[inner], centre[inner], atol=1)

    common = ["dataset=image_folder", "dataset.root=photos", "dataset.image_size=32", "dataset.resize=crop"]
    common += ["dataset.test_fraction=0.3", "dataset.val_fraction=0", "train.epochs=1", "train.batch_size=10"]
    teacher = ["model=timm", "model.name=resnet10t", "model.weights=null", "model.image_size=64", "model.crop_pct=0.9"]
    assert kdpipe(*common, "experiment=teacher", *teacher).status == 0
    outcome = kdpipe(
        *common,
        "model=resnet20",
        "model.depth=8",
        "model@teacher=timm",
        "teacher.weights=auto",
        "teacher.name=resnet10t",
        "teacher.image_size=64",
        "teacher.crop_pct=0.9",
    )
    assert outcome.status == 0, outcome.errors
    assert len([*Path("outputs/cache/images").glob("*/images.npy")]) == 1

    # A run and its exported file see the centre, too.
    store = RunStore(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    student = re.findall(r"kdpipe.export (\S+)", outcome.output)[-1]
    predictor = open_predictor(student, lambda: store)
    assert (predictor.image_shape, predictor.resize) == ((3, 32, 32), "crop")
    files = [tmp_path / "photos" / "temple" / f"{number:02}.png" for number in (1, 2)]
    images = [load_image(file, [(predictor.image_shape, predictor.resize)])[0] for file in files]
    np.testing.assert_array_equal(images[0].transpose(1, 2, 0), np.asarray(fitted(wide, (32, 32), "crop")))
    export(export_arguments([student, "--out", "exported", "--format", "safetensors", "--seconds", "0.01"]))
    assert open_predictor("exported", lambda: store).resize == "crop"


def test_a_teacher_that_crops_and_a_student_that_squeezes_learn_from_photos_stored_once(
    photo: Photo, tmp_path: Path, kdpipe: Callable[..., Outcome]
) -> None:
    for kind, name in enumerate(("temple", "flower")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            odd = photo(kind, number, (96 - number % 3 * 16, 48 + number % 4 * 8))
            odd.save(tmp_path / "photos" / name / f"{number:02}.png")
    common = ["dataset=image_folder", "dataset.root=photos", "dataset.image_size=40", "dataset.resize=keep"]
    common += ["dataset.test_fraction=0.3", "dataset.val_fraction=0", "train.epochs=1", "train.batch_size=10"]
    teacher = ["name=resnet10t", "image_size=64", "crop_pct=0.9"]
    of_model = ["model=timm", "model.weights=null", "model.freeze=backbone", *(f"model.{one}" for one in teacher)]
    done = kdpipe(*common, "experiment=teacher", *of_model)
    assert done.status == 0 and "features of resnet10t for 40 images" in done.output + done.errors, done.errors
    of_teacher = ["model@teacher=timm", "teacher.weights=auto", *(f"teacher.{one}" for one in teacher)]
    student = ["model=resnet20", "model.depth=8", "model.image_size=32"]
    done = kdpipe(*common, *student, *of_teacher, "evaluation.pictures=true")
    assert done.status == 0 and "logits of resnet10t for 28 images of photos" in done.output + done.errors, done.errors
    assert len([*Path("outputs/cache/images").glob("*/pixels.bin")]) == 1
    assert len([*Path("outputs/runs").glob("*/differing.png")]) == 1

    # What is exported takes squares, as the student squeezes photos, and says the same of the test images.
    store = RunStore(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    run = re.findall(r"kdpipe.export (\S+)", done.output)[-1]
    export(export_arguments([run, "--out", "exported", "--format", "safetensors", "--seconds", "0.01"]))
    for predictor in (open_predictor(run, lambda: store), open_predictor("exported", lambda: store)):
        assert (predictor.image_shape, predictor.resize) == ((3, 40, 40), "squeeze")
    assert "12 test, 28 train images in their own shape (" in Path("exported/README.md").read_text()
    finished = open_run(run, store)
    data = open_data(finished)
    squares = images_for(finished.classifier, data, data.splits["test"])
    assert squares.shape == (12, 3, 40, 40)
    with torch.no_grad():
        kept_logits, logits = (finished.classifier(images) for images in (data.images[data.splits["test"]], squares))
    torch.testing.assert_close(logits, kept_logits, atol=0.1, rtol=0)  # resized twice, but to other sizes


# ImageNet's own classes


def test_the_pretrained_head_stays_where_the_classes_are_imagenet_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    published = torchvision.models.get_model_weights("squeezenet1_1")["DEFAULT"]
    weights = torchvision.models.get_model("squeezenet1_1", weights=None).state_dict()
    torch.save(weights, tmp_path / "hub" / "checkpoints" / published.url.rpartition("/")[2])

    folders = timm.data.ImageNetInfo("imagenet-1k").label_names()  # n01440764, …
    others = [f"n{number:08}" for number in range(1000)]  # as many of another ImageNet
    known = [(folders, True), (published.meta["categories"], True), (folders[::-1], False), (others, False)]
    for class_names, is_kept in known:
        network = torchvision_classifier("squeezenet1_1", len(class_names))
        load_imagenet("model.weights", network, "squeezenet1_1", class_names)
        kept = torch.equal(network.state_dict()["classifier.1.weight"], weights["classifier.1.weight"])
        assert kept == is_kept
    assert not is_imagenet(folders[:999], ()) and not is_imagenet([], ())
