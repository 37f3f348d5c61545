"""Images of all modes as the RGB that a viewer shows: upright, on white, deep grey in 8 bits; everywhere alike."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin, features
from torchvision.io import ImageReadMode, decode_jpeg

from kdpipe.data import Source, split
from kdpipe.data.decode import read_image
from kdpipe.data.image_folder import image_folder
from kdpipe.data.unlabelled import with_unlabelled
from kdpipe.predict import load_image

ORIENTATION = 274


def content(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(content: bytes) -> np.ndarray:
    """The values of a grey image as it is read, uint8 [H, W]."""
    pixels = np.asarray(read_image(content))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def ramp(white: float, dtype: type) -> np.ndarray:
    return np.tile(np.linspace(0, white, 64).astype(dtype), (4, 1))


WHOLE = np.tile(np.linspace(0, 255, 64), (4, 1))  # what each ramp from black to white is


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_photos_are_turned_as_their_exif_orientation_says(photo: Callable, form: str, orientation: int) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    original = photo(0, 0, (24, 16))
    exif = original.getexif()
    exif[ORIENTATION] = orientation
    file = content(original, form, exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert read_image(file).size == expected.size == ((16, 24) if orientation in (5, 6, 7, 8) else (24, 16))
    np.testing.assert_array_equal(read_image(file), expected)
    if form == "JPEG":
        turned = decode_jpeg(
            torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True
        )
        assert np.abs(np.asarray(expected).astype(int) - turned.permute(1, 2, 0).numpy().astype(int)).mean() < 2


@pytest.mark.parametrize("exif", [b"Exif\0\0no such thing", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_a_photo_with_damaged_exif_data_is_read_as_it_lies(photo: Callable, exif: bytes) -> None:
    original = photo(0, 0, (24, 16))
    np.testing.assert_array_equal(
        read_image(content(original, "JPEG", exif=exif)), read_image(content(original, "JPEG"))
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_laid_on_white(mode: str) -> None:
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, 4:] = 0
    alpha[:, 2:4] = 128 if mode != "P" else 255
    image = Image.merge("LA", [Image.new("L", (8, 8)), Image.fromarray(alpha)])
    if mode == "P":  # one colour of a palette is transparent
        image = Image.fromarray((alpha == 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 90, 0, 0])
        pixels = grey(content(image, "PNG", transparency=1))
        assert np.array_equal(grey(content(image, "GIF", transparency=1)), pixels)
    else:
        pixels = grey(content(image.convert(mode), "PNG"))
    assert pixels[0].tolist() == [0, 0, *([127, 127] if mode != "P" else [0, 0]), 255, 255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB"])
def test_a_colour_that_stands_for_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.fromarray(np.eye(8, dtype=np.uint16 if mode == "I;16" else bool) * (1 if mode == "I;16" else True))
    image = image if mode == "I;16" else image.convert(mode)
    key = {"1": 0, "L": 0, "I;16": 0, "RGB": (0, 0, 0)}[mode]
    pixels = grey(content(image, "PNG", transparency=key))
    assert (pixels[~np.eye(8, dtype=bool)] == 255).all()
    assert (pixels[np.eye(8, dtype=bool)] == (0 if mode == "I;16" else 255)).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_ordinary_images_are_what_pillow_converts_them_to(photo: Callable, mode: str) -> None:
    file = content(photo(0).convert(mode), "PNG")
    np.testing.assert_array_equal(read_image(file), Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize("white", [15, 255, 511, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("plain", [False, True], ids=["binary", "plain"])
def test_pgm_is_scaled_by_its_largest_value(white: int, plain: bool) -> None:
    values = ramp(white, np.uint16)
    header = f"P{2 if plain else 5}\n64 4\n{white}\n".encode()
    body = (
        " ".join(map(str, values.ravel())).encode()
        if plain
        else values.astype(">u2" if white > 255 else "u1").tobytes()
    )
    assert np.abs(grey(header + body).astype(float) - values * (255 / white)).max() <= 1


def test_the_same_grey_of_12_bits_is_as_bright_in_each_image() -> None:
    values = np.full((4, 4), 400, ">u2")  # dark; not stretched to white
    assert (grey(b"P5 4 4 4095\n" + values.tobytes()) == 400 * 255 // 4095).all()


def tiff(values: np.ndarray, **tags: int) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{"photometric": 262, "least": 340, "largest": 341}[name]] = value
    return content(Image.fromarray(values), "TIFF", tiffinfo=info)


@pytest.mark.parametrize(
    ("white", "dtype"),
    [
        (65535, np.uint16),
        *((white, np.int32) for white in (1, 255, 1023, 4095, 65535, 100_000, 2**31 - 1)),
        *((white, np.float32) for white in (1.0, 255.0, 4095.0, 65535.0, 1e6)),
    ],
)
def test_tiff_of_more_than_8_bits_stays_a_ramp(white: float, dtype: type) -> None:
    expected = ramp(white, dtype).astype(float) * (255 / white)
    assert np.abs(grey(tiff(ramp(white, dtype))).astype(float) - expected).max() <= 1


def test_tiff_of_12_bits_is_scaled_by_its_bits_per_sample() -> None:
    packed = bytes.fromhex("000800fff000")  # 0x000, 0x800, 0xfff, 0x000
    info = b"".join(
        tag.to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in (
            *((256, 4), (257, 1), (258, 12), (259, 1), (262, 1)),
            *((273, 8), (277, 1), (278, 1), (279, len(packed))),
        )
    )
    file = b"II*\0" + (8 + len(packed)).to_bytes(4, "little") + packed + (9).to_bytes(2, "little") + info + bytes(4)
    assert grey(file).tolist() == [[0, 127, 255, 0]]


def test_tiff_s_own_sample_range_and_white_is_zero_are_followed() -> None:
    values = ramp(1000, np.float32) - 500
    assert np.abs(grey(tiff(values, least=-500.0, largest=500.0)) - WHOLE).max() <= 1
    dark = grey(tiff(ramp(100, np.float32), largest=1000.0))
    assert dark.max() == 25
    assert np.abs(grey(tiff(ramp(65535, np.uint16), photometric=0)) - WHOLE[:, ::-1]).max() <= 1


def test_negative_missing_and_infinite_values_do_not_spoil_an_image() -> None:
    values = ramp(200, np.float32) - 100
    assert np.abs(grey(tiff(values)) - WHOLE).max() <= 1
    values = ramp(1, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    read = grey(tiff(values))
    assert read[0, :3].tolist() == [0, 255, 0] and np.abs(read[1:] - WHOLE[1:]).max() <= 1
    assert (grey(tiff(np.full((4, 4), np.nan, np.float32))) == 0).all()
    assert (grey(tiff(np.full((4, 4), -7, np.int32))) == 0).all()


def test_data_sets_unlabelled_images_and_predict_read_alike(tmp_path: Path, photo: Callable) -> None:
    lying = photo(0, 0, (16, 16))
    exif = lying.getexif()
    exif[ORIENTATION] = 6
    for folder in ("photos/a", "photos/b", "more"):
        (tmp_path / folder).mkdir(parents=True)
        lying.save(tmp_path / folder / "phone.jpg", exif=exif)
        Image.new("RGBA", (16, 16)).save(tmp_path / folder / "clear.png")
        np.arange(256, dtype=">u2").tofile(tmp_path / folder / "deep.pgm")
        body = (tmp_path / folder / "deep.pgm").read_bytes()
        (tmp_path / folder / "deep.pgm").write_bytes(b"P5 16 16 256\n" + body)
    source = image_folder(str(tmp_path / "photos"), None, "stop", str(tmp_path / "cache"))
    held_out = Source(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4) % 2, ("a", "b"))
    data = split(held_out, "photos", train_fraction=1, val_fraction=0, test_fraction=0.5, split_seed=0)
    unlabelled = with_unlabelled(data, str(tmp_path / "more"), "stop", str(tmp_path / "cache")).images
    for position, name in enumerate(("clear.png", "deep.pgm", "phone.jpg")):
        (predicted,) = load_image(tmp_path / "more" / name, [((3, 16, 16), "squeeze")])
        np.testing.assert_array_equal(source.images[position], predicted)
        np.testing.assert_array_equal(unlabelled[torch.tensor([4 + position])][0], predicted)
