"""Image files and image stores: pixels, EXIF orientation, damaged and malicious files and folders."""

import io
import json
import os
import struct
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from pix2seq.data.image_files import FORMATS, BadImageError, ImageFile
from pix2seq.data.image_stores import FolderStore, open_store
from pix2seq.errors import UserError


def encode(image: Image.Image, image_format: str, **kwargs) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **kwargs)
    return np.frombuffer(bytearray(buffer.getvalue()), dtype=np.uint8)


def gradient(width: int, height: int) -> Image.Image:
    """A smooth image, of which JPEG loses little."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 9))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def oriented(image_format: str, orientation: int) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(gradient(30, 20), image_format, exif=exif)


def bad_image(call, *args) -> BadImageError:
    """Returns the BadImageError that a call raises."""
    with pytest.raises(BadImageError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return error.value


def decode(data: bytes | np.ndarray) -> torch.Tensor:
    return ImageFile(np.frombuffer(data, np.uint8)).pixels()


# -- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_images_of_any_mode_are_decoded_as_rgb(mode):
    white = Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode)
    pixels = decode(encode(white, "JPEG" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (3, 20, 30)
    assert pixels.dtype == torch.uint8
    assert (pixels > 250).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_pixels_equal_those_of_pillow(mode):
    data = encode(gradient(90, 70).convert(mode), "JPEG", quality=90)
    expected = pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (decode(data).int() - expected.int()).abs().max() <= 1


def test_16_bit_images_are_scaled_to_8_bits():
    levels = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    assert (
        decode(encode(Image.fromarray(levels), "PNG"))[0] == torch.from_numpy((levels >> 8).astype(np.uint8))
    ).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_images_are_rejected(dtype):
    assert bad_image(decode, encode(Image.fromarray(np.ones((4, 5), dtype)), "TIFF")).kind == "unreadable-file"


@pytest.mark.parametrize(
    ("min_size", "scale"), [(None, 1), ((201, 100), 1), ((200, 300), 2), ((60, 100), 4), ((1, 1), 8)]
)
def test_jpeg_is_decoded_at_the_smallest_sufficient_scale(min_size, scale):
    file = ImageFile(encode(gradient(600, 400), "JPEG", quality=95))
    pixels = file.pixels(min_size)
    assert file.shape == (3, 400, 600)
    assert pixels.shape == (3, 400 // scale, 600 // scale)
    expected = pil_to_tensor(gradient(600, 400).resize((600 // scale, 400 // scale), Image.Resampling.BOX))
    assert (pixels.int() - expected.int()).abs().float().mean() < 3
    assert file.pixels().shape == (3, 400, 600)  # does not depend on earlier calls
    assert ImageFile(encode(gradient(60, 40), "PNG")).pixels((1, 1)).shape == (3, 40, 60)


@pytest.mark.parametrize("size", [(601, 401), (7, 900), (1, 1)])
def test_reduced_jpeg_is_at_least_min_size(size):
    file = ImageFile(encode(gradient(*size), "JPEG"))
    for length in (1, 2, 3, 50, 100, 199, 200, 201):
        min_size = (min(length, size[1]), min(length * 2, size[0]))
        _, height, width = file.pixels(min_size).shape
        assert height >= min_size[0]
        assert width >= min_size[1]


# -- EXIF orientation ------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 11))
def test_exif_orientation_is_applied_if_the_annotated_size_is_swapped(image_format, orientation):
    data = oriented(image_format, orientation)
    for annotated_size in (None, (20, 30), (77, 77)):
        file = ImageFile(data, annotated_size)
        assert not file.is_transposed
        assert file.shape == file.pixels().shape == (3, 20, 30)
    file = ImageFile(data, (30, 20))
    assert file.orientation == (orientation if orientation <= 8 else 1)
    assert file.is_transposed == (5 <= orientation <= 8)
    if file.is_transposed:
        assert file.shape == file.pixels().shape == (3, 30, 20)
        transposes = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE}
        expected = gradient(30, 20).transpose(transposes.get(orientation, Image.Transpose.ROTATE_90))
        assert (file.pixels().int() - pil_to_tensor(expected).int()).abs().float().mean() < 6


def test_exif_orientation_of_a_square_image_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not ImageFile(encode(gradient(20, 20), "JPEG", exif=exif), (20, 20)).is_transposed


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 11))
def test_exif_transpose_equals_pillow(image_format, orientation):
    data = oriented(image_format, orientation)
    file = ImageFile(data, exif_transpose=True)
    expected = pil_to_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert file.shape == expected.shape
    assert torch.equal(file.pixels(), expected)


# -- damaged and malicious files -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"text", "not an image"),
        # Pillow would start Ghostscript.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_other_files_are_rejected(data, reason):
    error = bad_image(decode, data)
    assert error.kind == "unreadable-file"
    assert reason in str(error)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("min_size", [None, (20, 20)])  # JPEG has another decoder for the latter
def test_truncated_images_are_rejected(image_format, min_size):
    data = encode(gradient(200, 200), image_format)
    error = bad_image(ImageFile(data[: len(data) // 2]).pixels, min_size)
    assert error.kind == "unreadable-file"
    assert ".cpp" not in str(error)


def test_broken_png_chunks_are_rejected():
    """Pillow raises SyntaxError and ValueError for them."""
    data = encode(Image.effect_noise((400, 400), 80), "PNG", compress_level=0).tobytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    wrong_name = data[:second] + b"(\xfcM\xad" + data[second + 4 :]
    short_header = data[:8] + b"\x00\x00\x00\x05" + data[12:]
    for content in (wrong_name, short_header):
        assert bad_image(decode, content).kind == "unreadable-file"


@pytest.mark.parametrize("side", [12_000, 20_000])  # Pillow itself rejects the larger one
def test_decompression_bombs_are_rejected_by_their_header(side, monkeypatch):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert bad_image(decode, bomb + chunk(b"IEND", b"")).kind == "too-many-pixels"


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged TIFF tags
@pytest.mark.parametrize("image_format", [name for name in FORMATS if name in Image.SAVE])
def test_fuzzed_images_raise_only_bad_image_errors(image_format):
    whole, rng = encode(gradient(40, 30), image_format), np.random.default_rng(0)
    num_rejected = 0
    for _ in range(150):
        data = whole.copy()
        data[rng.integers(0, min(len(data), 300), 2)] = rng.integers(0, 256, 2)
        try:
            file = ImageFile(data, (40, 30))
            assert file.pixels().shape == file.shape
        except BadImageError:
            num_rejected += 1
    assert num_rejected > 0 or image_format in ("PPM", "BMP")


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """images/ with files and links, beside a folder outside/."""
    (tmp_path / "images/deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("images/a.jpg", "images/deep/b.jpg", "images/größe 猫.jpg", "outside/secret.jpg"):
        (tmp_path / name).write_bytes(encode(gradient(8, 8), "JPEG").tobytes())
    links = {"inside.jpg": "deep/b.jpg", "leak.jpg": tmp_path / "outside/secret.jpg", "leaks": tmp_path / "outside"}
    for name, target in (links | {"dead.jpg": "nowhere.jpg", "loop.jpg": "loop.jpg"}).items():
        (tmp_path / "images" / name).symlink_to(target)
    return tmp_path / "images"


OUTSIDE = ("../outside/secret.jpg", "deep/../../outside/secret.jpg", "leak.jpg", "leaks/secret.jpg", "a\0b")


def test_folder_store_locates_files_and_links_inside(image_folder):
    store = FolderStore(image_folder)
    names = ["a.jpg", "deep/b.jpg", "größe 猫.jpg", "inside.jpg"]
    locations, errors = store.locate(names)
    assert errors == {}
    assert locations.tolist() == names
    assert all(ImageFile(store.read(location)).shape == (3, 8, 8) for location in locations)


def test_folder_store_does_not_leave_its_folder(image_folder):
    names = [*OUTSIDE, str(image_folder / "a.jpg")]
    locations, errors = FolderStore(image_folder).locate(names)
    assert locations.tolist() == [""] * len(names)
    assert [error.kind for error in errors.values()] == ["path-outside"] * len(names)


def test_follow_links_allows_links_but_not_parent_folders(image_folder):
    locations, errors = FolderStore(image_folder, follow_links=True).locate(list(OUTSIDE))
    assert locations.tolist() == ["", "", "leak.jpg", "leaks/secret.jpg", ""]
    assert sorted(errors) == [0, 1, 4]


def test_folder_store_may_itself_be_a_link(image_folder, tmp_path):
    (tmp_path / "link").symlink_to(image_folder)
    locations, errors = FolderStore(tmp_path / "link").locate(["a.jpg", "leak.jpg"])
    assert locations.tolist() == ["a.jpg", ""]
    assert list(errors) == [1]


def test_missing_files_are_reported(image_folder):
    names = ["none.jpg", "deep", "deep/none.jpg", "nowhere/none.jpg", "dead.jpg", "loop.jpg", "a.jpg/x", "..\\a.jpg"]
    locations, errors = FolderStore(image_folder).locate(names)
    assert locations.tolist() == [""] * len(names)
    assert [error.kind for error in errors.values()] == ["missing-file"] * len(names)


def test_names_in_another_unicode_form_are_found_quickly(tmp_path):
    """macOS decomposes file names."""
    names = [f"größe {number}.jpg" for number in range(4000)]
    on_disk = [unicodedata.normalize("NFD", name) for name in names]
    for name in on_disk:
        (tmp_path / name).touch()
    started = time.perf_counter()
    locations, errors = FolderStore(tmp_path).locate(names)
    assert time.perf_counter() - started < 2
    assert locations.tolist() == on_disk
    assert [error.kind for error in errors.values()] == ["other-unicode-form"] * len(names)


def test_errors_of_the_operating_system_do_not_name_the_folder(image_folder, monkeypatch):
    store = FolderStore(image_folder)
    locations, _ = store.locate(["a.jpg"])
    (image_folder / "a.jpg").unlink()
    assert str(bad_image(store.read, locations[0])) == "No such file or directory"
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    _, errors = FolderStore(image_folder).locate(["a.jpg"])
    assert "Permission denied" in str(errors[0])
    assert str(image_folder) not in str(errors[0])


def test_huge_files_are_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(6 * 10**9)  # sparse
    assert "6000000000 bytes" in str(bad_image(FolderStore(tmp_path).read, "a.jpg"))


def test_open_store_rejects_other_paths(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.zip"):
        with pytest.raises(UserError, match=f"{path}: no such folder"):
            open_store(path)
    (tmp_path / "train.zip").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/train.zip: is a zip archive; unpack it"):
        open_store(tmp_path / "train.zip")
    (tmp_path / "shards.json").write_text(json.dumps({"files": []}))
    with pytest.raises(UserError, match=r"shards\.json: cannot be read as an index"):
        open_store(tmp_path)
