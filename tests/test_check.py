"""A dataset with every fault there is: the check names each of them and nothing else, and training gets through it."""

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.cli import main as data_command
from pix2seq.data import Split
from pix2seq.data.check import check
from pix2seq.data.issues import KINDS
from pix2seq.train import run_training

WIDTH, HEIGHT = 40, 30


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **kwargs)
    return buffer.getvalue()


def bomb() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(50 + orientation), "JPEG", exif=exif)


GOOD = {f"good_{n:02d}.png": encoded(picture(n)) for n in range(24)} | {"größe 猫.png": encoded(picture(24))}
# File name -> content and the kinds of faults it has. Content None: there is no such file.
BAD_FILES = {
    "gone.png": (None, ["missing-file"]),
    "empty.png": (b"", ["unreadable-file"]),
    "text.jpg": (b"this is no picture", ["unreadable-file"]),
    "cut.png": (encoded(picture(30))[:200], ["unreadable-file"]),
    "cut.jpg": (encoded(picture(31), "JPEG")[:500], ["unreadable-file"]),
    "bomb.png": (bomb(), ["too-many-pixels"]),
    "../outside/secret.png": (None, ["path-outside"]),
    "/absolute/secret.png": (None, ["path-outside"]),
    "link.png": ("../outside/secret.png", ["path-outside"]),
}
ODD_FILES = {
    "really_png.jpg": (encoded(picture(32)), ["suffix-differs"]),
    "cmyk.jpg": (encoded(picture(33).convert("CMYK"), "JPEG"), ["cmyk"]),
    "grey.png": (encoded(picture(34).convert("L")), ["grey"]),
    "palette.png": (encoded(picture(35).convert("P")), ["palette"]),
    "alpha.png": (encoded(picture(36).convert("RGBA")), ["transparent"]),
    "deep.png": (encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, np.uint16))), ["16-bit"]),
    "turned.jpg": (turned(6), ["exif-turned"]),
    "upside_down.jpg": (turned(3), ["exif-ignored"]),
    "large.png": (encoded(picture(37).resize((80, 60))), ["size-differs"]),
    "no_size.png": (encoded(picture(38)), ["size-unknown"]),
    "twin.png": (encoded(picture(0), compress_level=1), ["duplicate-image"]),
    "gro\u0308ße.png": (encoded(picture(39)), ["other-unicode-form"]),
}
# Of an annotation of good_00.png: the fields that are wrong, and the kind of fault.
BAD_OBJECTS = [
    ({"image_id": 9999}, "unknown-image"),
    ({"category_id": 2}, "unknown-category"),
    ({"bbox": [1, 2, float("nan"), 4]}, "bbox-invalid"),
    ({"bbox": [1, 2, float("inf"), 4]}, "bbox-invalid"),
    ({"bbox": [1, 2, 3]}, "bbox-invalid"),
    ({"bbox": [5, 5, 0, 4]}, "zero-size"),
    ({"bbox": [5, 5, 4, -4]}, "negative-size"),
    ({"bbox": [50, 5, 4, 4]}, "outside-image"),
    ({"bbox": [30, 5, 35, 15]}, "beyond-edge"),  # x1 y1 x2 y2
    ({"id": 1}, "duplicate-annotation-id"),
    ({"image_id": 9998}, "unknown-image"),
]


def planted(root: Path) -> tuple[Split, list[tuple[str, str, str]]]:
    """The dataset, and the (kind, severity, entry) of everything that is wrong with its training set."""
    images = root / "images/train2017"
    for folder in (images, root / "images/val2017", root / "annotations", root / "images/outside"):
        folder.mkdir(parents=True)
    (root / "images/outside/secret.png").write_bytes(encoded(picture(60)))
    entries, objects, expected = [], [], []
    for name, (content, kinds) in ({name: (data, []) for name, data in GOOD.items()} | BAD_FILES | ODD_FILES).items():
        if isinstance(content, str):
            (images / name).symlink_to(content)
        elif content is not None:
            on_disk = "größe.png" if kinds == ["other-unicode-form"] else name
            (images / on_disk).write_bytes(content)
        entry = {"id": 100 + len(entries), "file_name": name, "width": WIDTH, "height": HEIGHT}
        if name == "turned.jpg":
            entry |= {"width": HEIGHT, "height": WIDTH}
        if name == "no_size.png":
            entry = {key: entry[key] for key in ("id", "file_name")}
        entries.append(entry)
        objects.append({"id": len(objects) + 1, "image_id": entry["id"], "category_id": 1, "bbox": [4, 4, 20, 20]})
        expected += [(kind, KINDS[kind][0], name) for kind in kinds]
    for fields, kind in BAD_OBJECTS:
        bad = {"id": len(objects) + 1, "image_id": 100, "category_id": 7, "bbox": [3, 3, 9, 9]} | fields
        objects.append(bad)
        expected.append((kind, KINDS[kind][0], f"annotation {bad['id']}"))
    entries += [{"id": 100, "file_name": "again.png"}, {"id": "x", "file_name": "x.png"}, {"id": 999}]
    expected += [("duplicate-image-id", "error", "image 100"), *[("image-entry", "error", "")] * 2]
    entries.append({"id": 998, "file_name": "good_01.png", "width": WIDTH, "height": HEIGHT})
    expected += [("duplicate-file", "warning", "image 998"), ("class-unused", "warning", "category 5")]
    categories = [{"id": 1, "name": "thing"}, {"id": 5, "name": "nothing"}, {"id": 7, "name": "other"}]
    categories.append({"id": 8, "name": "thing"})
    expected += [(kind, "warning", "category 8") for kind in ("class-unused", "class-name-twice")]
    write_json(root / "annotations/instances_train2017.json", entries, objects, categories)

    (root / "images/val2017/same.png").write_bytes(encoded(picture(3), compress_level=0))
    (root / "images/val2017/own.png").write_bytes(encoded(picture(70)))
    val = [{"id": n, "file_name": f, "width": WIDTH, "height": HEIGHT} for n, f in enumerate(("same.png", "own.png"))]
    things = [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [4, 4, 20, 20]} for n in range(2)]
    write_json(root / "annotations/instances_val2017.json", val, things, categories)
    expected.append(("leak", "warning", "same.png"))
    return Split(images, root / "annotations/instances_train2017.json"), expected


def write_json(path: Path, images: list, annotations: list, categories: list) -> None:
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_planted_fault_is_found_and_nothing_else(tmp_path, num_workers):
    split, expected = planted(tmp_path)
    val = Split(tmp_path / "images/val2017", tmp_path / "annotations/instances_val2017.json")
    report = check(split, val, num_workers=num_workers)
    assert sorted((fault.kind, fault.severity, fault.entry) for fault in report.faults) == sorted(expected)
    assert len({fault.kind for fault in report.faults}) >= 28
    text = str(report)
    for fault in report.faults:
        assert str(fault) in text
        assert fault.value
        assert fault.effect in text
    assert f"{len(report.of('error'))} errors, {len(report.of('warning'))} warnings" in text


def test_the_command_writes_it_all_down_and_says_how_bad_it_is(tmp_path, capsys):
    _, expected = planted(tmp_path / "root")
    assert data_command(["check", "--root", str(tmp_path / "root"), "--output_dir", str(tmp_path / "run")]) == 2
    written = json.loads((tmp_path / "run/data/check.json").read_text())
    assert len(written["faults"]) == len(expected) == written["errors"] + written["warnings"]
    assert all(set(f) == {"kind", "severity", "effect", "file", "entry", "value"} for f in written["faults"])
    assert written["splits"]["train"]["objects_by_class"][0]["name"] == "thing"
    with Image.open(tmp_path / "run/data/check.png") as image:
        assert image.width > 800
    assert "2 x image-entry" in capsys.readouterr().out


def test_warnings_alone_are_no_failure(tmp_path, shapes_root, capsys):
    words = ["--root", str(shapes_root), "--output_dir", str(tmp_path)]
    assert data_command(["check", *words]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert run_training(parse(TrainArguments, [*words, "--check_data"])) == 0  # the same, by a flag of train.py
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_files_that_cannot_be_used_at_all_are_faults_too(tmp_path, shapes_root):
    good = Split(shapes_root / "images/val2017", shapes_root / "annotations/instances_val2017.json")
    (tmp_path / "bad.json").write_text("{")
    report = check(Split(good.images, tmp_path / "bad.json"), good)
    assert [fault.kind for fault in report.faults] == ["unusable"]
    assert "is not JSON" in report.faults[0].value
    assert report.draw is None
    content = json.loads(good.json.read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | {"annotations": []}))
    empty = Split(good.images, tmp_path / "empty.json")
    for splits in ((empty, None), (good, empty)):
        assert "no-objects" in {fault.kind for fault in check(*splits).faults}
    content["categories"][0]["name"] = "circle"  # train and val do not agree on a class
    (tmp_path / "other.json").write_text(json.dumps(content))
    (fault,) = check(good, Split(good.images, tmp_path / "other.json")).faults
    assert fault.kind == "unusable"
    assert "'circle'" in fault.value


def test_the_report_survives_odd_names_and_boxes(tmp_path, shapes_root, capsys):
    """Mathematics in a class name, letters no font has, a box as large as numbers go: drawing comes last."""
    train = shapes_root / "annotations/instances_train2017.json"
    content = json.loads(train.read_text())
    for category, name in zip(content["categories"], ("$\\foo$", "猫", "a\nb", "x" * 300), strict=True):
        category["name"] = name
    content["annotations"][0]["bbox"] = [0, 0, 1e30, 5]
    content["annotations"][1]["bbox"] = [0, 0, 1e30, 1e30]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    words = ["--train_images", str(shapes_root / "images/train2017"), "--train_json", str(tmp_path / "odd.json")]
    words += ["--overfit", "99", "--output_dir", str(tmp_path / "out")]
    assert data_command(["check", *words]) == 0
    assert "2 x beyond-edge" in capsys.readouterr().out
    assert (tmp_path / "out/data/check.png").exists()


def test_every_copy_of_an_image_is_told(tmp_path, shapes_root):
    data = (shapes_root / "images/train2017/000000.png").read_bytes()
    entries = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in range(5)]
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes(data)
    write_json(
        tmp_path / "a.json",
        entries,
        [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        [{"id": 1, "name": "thing"}],
    )
    split = Split(tmp_path, tmp_path / "a.json")
    kinds = [(fault.kind, fault.entry) for fault in check(split, split).faults]
    assert [entry for kind, entry in kinds if kind == "leak"] == [f"{n}.png" for n in range(5)]
    copies = sorted(entry for kind, entry in kinds if kind == "duplicate-image")
    assert copies == sorted([f"{n}.png" for n in range(1, 5)] * 2)


# -- training on it --------------------------------------------------------------------------------

TINY = {
    "backbone": '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], '
    '"layer_type": "basic"}',
    **{"hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2, "mlp_size": 32, "dropout": 0},
    **{"image_size": 32, "num_bins": 40, "max_objects": 3, "num_workers": 0, "report_to": "none", "warmup_steps": 0},
    **{"batch_size": 8, "eval_batch_size": 4, "log_every": 1, "sample_every": 0, "ckpt_every": 0},
}


def arguments(root: Path, output: Path, **flags) -> TrainArguments:
    flags = TINY | {"root": root, "output_dir": output, "max_steps": 8} | flags
    return parse(TrainArguments, [f"--{name}={value}" for name, value in flags.items()])


def test_training_gets_through_it_and_says_what_it_replaced(tmp_path, monkeypatch):
    planted(tmp_path / "root")
    opened, fromfile = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda path, **kwargs: opened.append(path) or fromfile(path, **kwargs))
    assert run_training(arguments(tmp_path / "root", tmp_path / "run", max_unreadable=0.5)) == 0
    log = (tmp_path / "run/train.log").read_text()
    for name in BAD_FILES:
        assert f"{name}: " in log
    assert log.count("replaced by another image: ") == len(BAD_FILES)
    assert "3 bbox-invalid" in log
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train/unreadable_images"] == len(BAD_FILES)
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    # Nothing outside the folder of images was opened, by whatever way.
    images = (tmp_path / "root/images").resolve()
    assert {path.resolve().parent for path in opened} == {images / "train2017", images / "val2017"}


def test_too_many_unreadable_images_end_the_run_with_their_list(tmp_path, capsys):
    """Those that are missing before it begins, the broken ones when it comes upon them, after a save."""
    planted(tmp_path / "root")
    assert run_training(arguments(tmp_path / "root", tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "more than --max_unreadable allows" in error
    assert "gone.png: no such file" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()

    missing = sum(kinds[0] in ("missing-file", "path-outside") for _, kinds in BAD_FILES.values())
    share = (missing + 0.5) / (len(GOOD) + len(BAD_FILES) + len(ODD_FILES) + 1)
    assert run_training(arguments(tmp_path / "root", tmp_path / "run", max_unreadable=share)) == 2
    error = capsys.readouterr().err
    found = int(re.search(r"(\d+) training images are missing or broken", error)[1])
    assert missing < found <= len(BAD_FILES)
    assert "saved at step" in error
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert "--max_unreadable" in status["reason"]
    step = status["step"]
    assert 1 <= step < 8
    # Mended, or allowed, it goes on from there.
    assert run_training(arguments(tmp_path / "root", tmp_path / "run", max_unreadable=1, resume="auto")) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9), 8]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_cannot_be_evaluated_count_as_not_found(tmp_path, num_workers):
    planted(tmp_path / "root")
    (tmp_path / "root/images/val2017/own.png").write_bytes(b"")
    flags = {"max_unreadable": 1, "max_steps": 1, "num_workers": num_workers}
    assert run_training(arguments(tmp_path / "root", tmp_path / "run", **flags)) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert "1 images cannot be read; their objects count as not found" in log
    assert "own.png: it is empty (0 bytes)" in log
    found = json.loads((tmp_path / "run/eval/step_1/predictions.json").read_text())
    assert {row["image_id"] for row in found} == {0}
