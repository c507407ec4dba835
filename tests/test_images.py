"""Picture files: found only where they may lie, refused from the header where they must be, and read as RGB."""

import contextlib
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from pix2seq.data.image_files import BadImageError, ImageFile
from pix2seq.data.image_stores import FolderStore, ZipStore, open_store
from pix2seq.errors import UserError


def encoded(image: Image.Image, form: str, **kwargs) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, form, **kwargs)
    return np.frombuffer(bytearray(buffer.getvalue()), dtype=np.uint8)


def photo(width: int, height: int) -> Image.Image:
    """Smooth, so that JPEG loses little of it."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 9))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def refusal(call, *args) -> BadImageError:
    with pytest.raises(BadImageError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return error.value


# -- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_any_kind_of_picture_is_read_as_rgb(mode):
    white = Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode)
    image = ImageFile(encoded(white, "JPEG" if mode == "CMYK" else "PNG")).pixels()
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.uint8
    assert (image > 250).all()


def test_a_jpeg_has_pillows_pixels():
    image = photo(90, 70)
    for kind in (image, image.convert("L"), image.convert("CMYK")):
        data = encoded(kind, "JPEG", quality=90)
        expected = pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (ImageFile(data).pixels().int() - expected.int()).abs().max() <= 1


def test_16_bits_are_scaled_and_not_cut_off():
    """Pillow's own conversion makes everything above 255 of 65,535 white."""
    levels = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    image = ImageFile(encoded(Image.fromarray(levels), "PNG")).pixels()
    assert (image[0] == torch.from_numpy((levels >> 8).astype(np.uint8))).all()


def test_32_bits_are_refused():
    for pixels in (np.ones((4, 5), np.float32), np.ones((4, 5), np.int32)):
        bad = refusal(ImageFile(encoded(Image.fromarray(pixels), "TIFF")).pixels)
        assert bad.kind == "unreadable-file"


@pytest.mark.parametrize(
    ("at_least", "scale"), [(None, 1), ((201, 100), 1), ((200, 300), 2), ((60, 100), 4), ((1, 1), 8)]
)
def test_a_jpeg_is_decoded_no_larger_than_it_has_to_be(at_least, scale):
    data = encoded(photo(600, 400), "JPEG", quality=95)
    picture = ImageFile(data)
    image = picture.pixels(at_least)
    assert picture.shape == (3, 400, 600)
    assert image.shape == (3, 400 // scale, 600 // scale)
    small = pil_to_tensor(photo(600, 400).resize((600 // scale, 400 // scale), Image.Resampling.BOX))
    assert (image.int() - small.int()).abs().float().mean() < 3
    assert picture.pixels().shape == (3, 400, 600)  # whatever it was asked for before


@pytest.mark.parametrize("size", [(601, 401), (7, 900), (1, 1)])
def test_a_reduced_jpeg_is_never_smaller_than_asked(size):
    picture = ImageFile(encoded(photo(*size), "JPEG"))
    for length in (1, 2, 3, 50, 100, 199, 200, 201):
        at_least = (min(length, size[1]), min(length * 2, size[0]))
        image = picture.pixels(at_least)
        assert image.shape[1] >= at_least[0]
        assert image.shape[2] >= at_least[1]


def test_other_formats_are_not_reduced():
    assert ImageFile(encoded(photo(64, 64), "PNG")).pixels((8, 8)).shape == (3, 64, 64)


# -- turned pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 11))
def test_a_picture_is_turned_if_that_gives_it_its_annotated_size(form, orientation):
    """Annotation tools differ in what they do with EXIF's tag, and the annotated size tells what this one did."""
    image, exif = photo(30, 20), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, form, exif=exif)
    for annotated in (None, (20, 30), (77, 77)):
        picture = ImageFile(data, annotated)
        assert not picture.is_transposed
        assert picture.shape == picture.pixels().shape == (3, 20, 30)
    picture = ImageFile(data, (30, 20))
    assert picture.orientation == (orientation if orientation <= 8 else 1)
    assert picture.is_transposed == (5 <= orientation <= 8)
    if picture.is_transposed:
        assert picture.shape == picture.pixels().shape == (3, 30, 20)
        shown = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE}
        expected = pil_to_tensor(image.transpose(shown.get(orientation, Image.Transpose.ROTATE_90)))
        assert (picture.pixels().int() - expected.int()).abs().float().mean() < 6


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 11))
def test_a_picture_nobody_annotated_is_shown_as_viewers_do(form, orientation):
    image, exif = photo(30, 20), Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, form, exif=exif)
    picture = ImageFile(data, exif_transpose=True)
    expected = pil_to_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert picture.shape == expected.shape
    assert torch.equal(picture.pixels(), expected)


def test_a_square_picture_is_not_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not ImageFile(encoded(photo(20, 20), "JPEG", exif=exif), (20, 20)).is_transposed


# -- refused ---------------------------------------------------------------------------------------


def test_what_is_no_picture_is_told():
    assert "0 bytes" in str(refusal(ImageFile, np.zeros(0, np.uint8)))
    assert "not an image" in str(refusal(ImageFile, np.frombuffer(b"no picture", np.uint8)))
    postscript = np.frombuffer(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", np.uint8)
    assert "not an image" in str(refusal(ImageFile, postscript))  # Pillow would start Ghostscript
    assert refusal(ImageFile, postscript).kind == "unreadable-file"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_that_was_cut_off_is_told(form):
    whole = encoded(photo(200, 200), form)
    picture = ImageFile(whole[: len(whole) // 2])
    assert refusal(picture.pixels).kind == "unreadable-file"
    if form == "JPEG":
        assert refusal(picture.pixels, (20, 20)).kind == "unreadable-file"  # reduced, by the other decoder


def test_broken_chunks_of_a_png_are_told():
    """Pillow reports these as SyntaxError and ValueError, which must not escape from a worker as a traceback."""
    whole = encoded(Image.effect_noise((400, 400), 80), "PNG", compress_level=0).tobytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    wrong_name = whole[:second] + b"(\xfcM\xad" + whole[second + 4 :]
    short_header = whole[:8] + b"\x00\x00\x00\x05" + whole[12:]
    for content in (wrong_name, short_header):
        bad = refusal(lambda data=content: ImageFile(np.frombuffer(data, np.uint8)).pixels())
        assert bad.kind == "unreadable-file"


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_decompression_bomb_is_refused_by_its_header(side, monkeypatch):
    """A few kilobytes that would unfold to gigabytes; the larger one is what Pillow itself refuses."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert refusal(ImageFile, np.frombuffer(bomb, np.uint8)).kind == "too-many-pixels"


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """pictures/ with files of its own and links, beside an outside/ it must not be left for."""
    (tmp_path / "pictures/deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("pictures/a.jpg", "pictures/deep/b.jpg", "pictures/größe 猫.jpg", "outside/secret.jpg"):
        (tmp_path / name).write_bytes(encoded(photo(8, 8), "JPEG").tobytes())
    (tmp_path / "pictures/inside.jpg").symlink_to("deep/b.jpg")
    (tmp_path / "pictures/leak.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (tmp_path / "pictures/leaks").symlink_to(tmp_path / "outside")
    (tmp_path / "pictures/dead.jpg").symlink_to("nowhere.jpg")
    return tmp_path / "pictures"


OUTSIDE = (
    "../outside/secret.jpg",
    "deep/../../outside/secret.jpg",
    "leak.jpg",
    "leaks/secret.jpg",
    "C:/x.jpg",
    "a\0b",
)


def test_names_are_found_in_folders_and_by_links_that_stay_inside(folder):
    names = ["a.jpg", "deep/b.jpg", "größe 猫.jpg", "inside.jpg"]
    places, faults = FolderStore(folder).locate(names)
    assert faults == {}
    assert places.tolist() == names
    assert all(ImageFile(FolderStore(folder).read(place)).shape == (3, 8, 8) for place in places)


def test_nothing_outside_is_found(folder):
    names = [*OUTSIDE, str(folder / "a.jpg"), "..\\outside\\secret.jpg"]
    places, faults = FolderStore(folder).locate(names)
    assert places.tolist() == [""] * len(names)
    assert {bad.kind for bad in faults.values()} == {"path-outside"}
    assert len(faults) == len(names)


def test_links_may_be_followed_but_paths_may_not_climb(folder):
    places, faults = FolderStore(folder, follow_links=True).locate(list(OUTSIDE))
    assert places.tolist() == ["", "", "leak.jpg", "leaks/secret.jpg", "", ""]
    assert sorted(faults) == [0, 1, 4, 5]


def test_a_folder_that_is_a_link_itself_is_fine(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    places, faults = FolderStore(tmp_path / "link").locate(["a.jpg", "leak.jpg"])
    assert places.tolist() == ["a.jpg", ""]
    assert list(faults) == [1]


def test_missing_files_are_told(folder):
    names = ["none.jpg", "deep", "deep/none.jpg", "nowhere/none.jpg", "dead.jpg", "a.jpg/x"]
    places, faults = FolderStore(folder).locate(names)
    assert places.tolist() == [""] * 6
    assert {bad.kind for bad in faults.values()} == {"missing-file"}


def test_another_form_of_unicode_is_found(folder):
    """macOS decomposes file names: the letter and its two dots apart."""
    apart = unicodedata.normalize("NFD", "größe 猫.jpg")
    assert apart != "größe 猫.jpg"
    places, faults = FolderStore(folder).locate([apart, "a.jpg"])
    assert places.tolist() == ["größe 猫.jpg", "a.jpg"]
    assert faults[0].kind == "other-unicode-form"


def test_a_file_that_vanishes_or_is_forbidden_is_told(folder):
    store = FolderStore(folder)
    places, _ = store.locate(["a.jpg"])
    (folder / "a.jpg").unlink()
    assert refusal(store.read, places[0]).kind == "unreadable-file"


# -- archives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "train2017/"])
def test_pictures_are_read_from_a_zip_archive(tmp_path, method, prefix):
    files = {f"{n}.jpg": encoded(photo(20 + n, 10), "JPEG").tobytes() for n in range(5)}
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w", method) as archive:
        if prefix:
            archive.mkdir(prefix)
        for name, data in files.items():
            archive.writestr(prefix + name, data)
    store = open_store(tmp_path / "train2017.zip")
    places, faults = store.locate(["3.jpg", "../0.jpg", "1.jpg", "none.jpg"])
    assert {index: bad.kind for index, bad in faults.items()} == {1: "missing-file", 3: "missing-file"}
    assert str(faults[3]) == "not in train2017.zip"
    for copy in (store, pickle.loads(pickle.dumps(store))):  # as a worker that is not forked gets it
        assert copy.read(places[0]).tobytes() == files["3.jpg"]
        assert copy.read(places[2]).tobytes() == files["1.jpg"]


def test_damage_in_a_zip_archive_is_told(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", bytes(range(256)) * 40)
    whole = path.read_bytes()
    places, _ = ZipStore(path).locate(["1.jpg"])
    for offset in range(36, 100, 9):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 255]) + whole[offset + 1 :])
        bad = refusal(ZipStore(path).read, places[0])
        assert bad.kind == "unreadable-file"
        assert str(tmp_path) not in str(bad)
    path.write_bytes(whole[:60])
    with pytest.raises(UserError, match="cannot be read as a zip archive"):
        open_store(path)


def test_workers_may_read_one_archive_at_once(tmp_path):
    """They share the open file if they are forked: nobody's reading may move another's place in it."""
    files = {f"{n}.bin": os.urandom(50_000) for n in range(8)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    store = ZipStore(tmp_path / "a.zip")
    places, _ = store.locate(list(files))
    store.read(places[0])
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            same = all(
                store.read(p).tobytes() == d for p, d in zip(places, files.values(), strict=True) for _ in "123"
            )
            os._exit(0 if same else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_place_without_pictures_is_named(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.zip"):
        with pytest.raises(UserError, match=f"{path}: no such folder of images"):
            open_store(path)
    (tmp_path / "shards.json").write_text(json.dumps({"files": []}))
    with pytest.raises(UserError, match="shards.json: cannot be read as an index"):
        open_store(tmp_path)


# -- damage that decoders tell in ways of their own ------------------------------------------------


@pytest.mark.parametrize("form", ["AVIF", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "PNG", "JPEG"])
def test_whatever_a_damaged_file_does_to_its_decoder_it_is_told(form):
    """Fuzzed: a byte or two of the first 300 changed. Nothing but BadImageError may come out."""
    if form not in Image.SAVE:
        assert form == "AVIF"  # the one that Pillow may be built without
        return
    whole, rng = encoded(photo(40, 30), form), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = whole.copy()
        data[rng.integers(0, min(len(data), 300), 2)] = rng.integers(0, 256, 2)
        try:
            picture = ImageFile(data, (40, 30))
            assert picture.pixels().shape == picture.shape
        except BadImageError:
            refused += 1
    assert refused > 0 or form in ("PPM", "BMP")


def test_a_link_that_leads_to_itself_hides_no_other_file(folder):
    (folder / "loop.jpg").symlink_to("loop.jpg")
    places, faults = FolderStore(folder).locate(["a.jpg", "loop.jpg"])
    assert places.tolist() == ["a.jpg", ""]
    assert faults[1].kind == "missing-file"


def test_a_folder_that_cannot_be_listed_says_why(folder, monkeypatch):
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    _, faults = FolderStore(folder).locate(["a.jpg"])
    assert "Permission denied" in str(faults[0])
    assert str(folder) not in str(faults[0])


def test_many_names_in_another_form_of_unicode_are_found_quickly(tmp_path):
    """Once each name was compared to all files: an hour for COCO."""
    count = 4000
    for number in range(count):
        (tmp_path / unicodedata.normalize("NFD", f"größe {number}.jpg")).touch()
    started = time.perf_counter()
    places, faults = FolderStore(tmp_path).locate([f"größe {number}.jpg" for number in range(count)])
    assert time.perf_counter() - started < 2
    assert all(places.tolist())
    assert len(faults) == count


@pytest.mark.parametrize(("members", "found"), [(["train/1.jpg", "val/1.jpg"], False), (["x/1.jpg", "x/2.jpg"], True)])
def test_only_a_folder_that_all_members_share_is_left_out_of_their_names(tmp_path, members, found):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in members:
            archive.writestr(name, name)
    store = ZipStore(tmp_path / "a.zip")
    _, faults = store.locate(["1.jpg", members[0]])
    assert (0 not in faults) == found
    assert 1 not in faults


def test_damaged_archives_are_one_line(tmp_path):
    path, rng = tmp_path / "a.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("größe.jpg", b"x" * 50)
    whole = np.frombuffer(bytearray(path.read_bytes()), np.uint8)
    for _ in range(300):
        data = whole.copy()
        data[rng.integers(0, len(data), 2)] = rng.integers(0, 256, 2)
        path.write_bytes(data.tobytes())
        with contextlib.suppress(UserError, BadImageError):
            store = ZipStore(path)
            store.read(store.locate(["größe.jpg"])[0][0])


def test_an_archive_that_vanishes_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", b"x")
    store = ZipStore(tmp_path / "a.zip")
    places, _ = store.locate(["1.jpg"])
    (tmp_path / "a.zip").unlink()
    assert str(refusal(store.read, places[0])) == "a.zip: No such file or directory"


def test_of_names_in_an_archive_the_exact_one_is_meant(tmp_path):
    """COCO's have all files in a folder of their own, which names may leave out."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a/x", "a/a/x"):
            archive.writestr(name, name)
    store = ZipStore(tmp_path / "a.zip")
    places, faults = store.locate(["a/x", "a/a/x", "x"])
    assert [store.read(place).tobytes() for place in places] == [b"a/x", b"a/a/x", b"a/x"]
    assert not faults


@pytest.mark.parametrize("claimed", [0, 10**6, 2**31])
def test_an_archive_is_unpacked_no_further_than_it_says(tmp_path, claimed):
    """50 MB, which say that they are less, or so much that nobody should try."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(50_000_000))
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<I", content, content.index(mark) + place, claimed)
    path.write_bytes(content)
    store = ZipStore(path)
    tracemalloc.start()
    refusal(store.read, store.locate(["x"])[0][0])
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def read_x(path: Path) -> None:
    store = ZipStore(path)
    store.read(store.locate(["x"])[0][0])


@pytest.mark.parametrize("field", [(24, "size"), (20, "packed"), (42, "offset")], ids=lambda field: field[1])
def test_numbers_that_no_file_has_are_told(tmp_path, field):
    """In the 64-bit form of a header, which a 32-bit number of all ones announces."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("x"), b"picture")
    content = bytearray(path.read_bytes())
    head, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    struct.pack_into("<I", content, head + field[0], 0xFFFFFFFF)
    for number in (2**64 - 1, 2**63 - 5):
        extra = struct.pack("<HHQ", 1, 8, number)
        odd = content[: head + 47] + extra + content[head + 47 : end] + content[end:]
        struct.pack_into("<H", odd, head + 30, len(extra))
        struct.pack_into("<I", odd, end + len(extra) + 12, end + len(extra) - head)
        path.write_bytes(odd)
        with pytest.raises((UserError, BadImageError)):
            read_x(path)


def test_a_file_larger_than_any_picture_is_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(6 * 10**9)  # takes no room on the disk
    assert str(refusal(FolderStore(tmp_path).read, "a.jpg")) == "6000000000 bytes, more than the 800 million allowed"


def test_what_is_wrong_names_no_place_in_a_library(tmp_path):
    data = encoded(photo(64, 48), "JPEG")
    assert str(refusal(ImageFile(data[:-100]).pixels)) == "decode_jpeg, Image is incomplete or truncated"
