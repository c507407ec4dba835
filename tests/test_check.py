"""A dataset with issues of all kinds: the report has exactly these issues, and training runs on it."""

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
from pix2seq.cli import main
from pix2seq.data import Split
from pix2seq.data.check import check_dataset
from pix2seq.data.issues import KINDS
from pix2seq.train import run_training
from tests.runs import arguments, rows

WIDTH, HEIGHT = 40, 30


def random_image(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)


def encode(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def huge_png() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def rotated_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(random_image(50 + orientation), "JPEG", exif=exif)


GOOD = {f"good_{n:02d}.png": encode(random_image(n)) for n in range(24)} | {"größe 猫.png": encode(random_image(24))}
# File name -> content (None for a missing file, a string for a link) and kinds of issues.
BAD_FILES = {
    "gone.png": (None, ["missing-file"]),
    "empty.png": (b"", ["unreadable-file"]),
    "text.jpg": (b"text", ["unreadable-file"]),
    "cut.png": (encode(random_image(30))[:200], ["unreadable-file"]),
    "cut.jpg": (encode(random_image(31), "JPEG")[:500], ["unreadable-file"]),
    "huge.png": (huge_png(), ["too-many-pixels"]),
    "../outside/secret.png": (None, ["path-outside"]),
    "/absolute/secret.png": (None, ["path-outside"]),
    "link.png": ("../outside/secret.png", ["path-outside"]),
}
ODD_FILES = {
    "really_png.jpg": (encode(random_image(32)), ["suffix-differs"]),
    "cmyk.jpg": (encode(random_image(33).convert("CMYK"), "JPEG"), ["cmyk"]),
    "grey.png": (encode(random_image(34).convert("L")), ["grayscale"]),
    "palette.png": (encode(random_image(35).convert("P")), ["palette"]),
    "alpha.png": (encode(random_image(36).convert("RGBA")), ["transparent"]),
    "deep.png": (encode(Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, np.uint16))), ["16-bit"]),
    "rotated.jpg": (rotated_jpeg(6), ["exif-applied"]),
    "upside_down.jpg": (rotated_jpeg(3), ["exif-ignored"]),
    "large.png": (encode(random_image(37).resize((80, 60))), ["size-differs"]),
    "no_size.png": (encode(random_image(38)), ["size-unknown"]),
    "twin.png": (encode(random_image(0), compress_level=1), ["duplicate-image"]),
    "gro\u0308ße.png": (encode(random_image(39)), ["other-unicode-form"]),
}
# Fields of an annotation of good_00.png, and the kind of issue.
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


def write_dataset(root: Path) -> tuple[Split, list[tuple[str, str, str]]]:
    """Writes the dataset; returns its training split and the (kind, severity, entry) of all issues."""
    images = root / "images/train2017"
    for folder in (images, root / "images/val2017", root / "annotations", root / "images/outside"):
        folder.mkdir(parents=True)
    (root / "images/outside/secret.png").write_bytes(encode(random_image(60)))
    entries, objects, expected = [], [], []
    for name, (content, kinds) in ({name: (data, []) for name, data in GOOD.items()} | BAD_FILES | ODD_FILES).items():
        if isinstance(content, str):
            (images / name).symlink_to(content)
        elif content is not None:
            on_disk = "größe.png" if kinds == ["other-unicode-form"] else name
            (images / on_disk).write_bytes(content)
        entry = {"id": 100 + len(entries), "file_name": name, "width": WIDTH, "height": HEIGHT}
        if name == "rotated.jpg":
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

    (root / "images/val2017/same.png").write_bytes(encode(random_image(3), compress_level=0))
    (root / "images/val2017/own.png").write_bytes(encode(random_image(70)))
    val = [{"id": n, "file_name": f, "width": WIDTH, "height": HEIGHT} for n, f in enumerate(("same.png", "own.png"))]
    things = [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [4, 4, 20, 20]} for n in range(2)]
    write_json(root / "annotations/instances_val2017.json", val, things, categories)
    expected.append(("leak", "warning", "same.png"))
    return Split(images, root / "annotations/instances_train2017.json"), expected


def write_json(path: Path, images: list, annotations: list, categories: list) -> None:
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_issues_are_found_and_no_others(tmp_path, num_workers):
    train, expected = write_dataset(tmp_path)
    val = Split(tmp_path / "images/val2017", tmp_path / "annotations/instances_val2017.json")
    report = check_dataset(train, val, num_workers=num_workers)
    assert sorted((issue.kind, issue.severity, issue.entry) for issue in report.issues) == sorted(expected)
    assert len({issue.kind for issue in report.issues}) >= 28
    text = str(report)
    for issue in report.issues:
        assert str(issue) in text
        assert issue.value
        assert issue.effect in text


def test_the_command_saves_the_report_and_fails_on_errors(tmp_path, capsys):
    _, expected = write_dataset(tmp_path / "root")
    assert main(["check", "--root", str(tmp_path / "root"), "--output_dir", str(tmp_path / "run")]) == 2
    report = json.loads((tmp_path / "run/data/check.json").read_text())
    assert len(report["issues"]) == len(expected) == report["errors"] + report["warnings"]
    assert all(set(i) == {"kind", "severity", "effect", "file", "entry", "value"} for i in report["issues"])
    assert report["splits"]["train"]["objects_by_class"][0]["name"] == "thing"
    with Image.open(tmp_path / "run/data/check.png") as image:
        assert image.width > 800
    assert "2 x image-entry" in capsys.readouterr().out


def test_a_dataset_without_issues_passes(tmp_path, shapes_root, capsys):
    flags = ["--root", str(shapes_root), "--output_dir", str(tmp_path)]
    assert main(["check", *flags]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert run_training(parse(TrainArguments, [*flags, "--check_data"])) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_unusable_annotation_files_are_issues(tmp_path, shapes_root):
    good = Split(shapes_root / "images/val2017", shapes_root / "annotations/instances_val2017.json")
    (tmp_path / "bad.json").write_text("{")
    report = check_dataset(Split(good.images, tmp_path / "bad.json"), good)
    assert [(issue.kind, "is not JSON" in issue.value) for issue in report.issues] == [("unusable", True)]
    assert report.draw_figure is None
    content = json.loads(good.json.read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | {"annotations": []}))
    empty = Split(good.images, tmp_path / "empty.json")
    for train, val in ((empty, None), (good, empty)):
        assert "no-objects" in {issue.kind for issue in check_dataset(train, val).issues}
    content["categories"][0]["name"] = "circle"  # another class than that of the training set
    (tmp_path / "other.json").write_text(json.dumps(content))
    (issue,) = check_dataset(good, Split(good.images, tmp_path / "other.json")).issues
    assert (issue.kind, "'circle'" in issue.value) == ("unusable", True)


def test_the_figure_is_drawn_for_unusual_names_and_boxes(tmp_path, shapes_root):
    """Mathematical markup, characters missing in the font, and boxes as large as float32 allows."""
    content = json.loads((shapes_root / "annotations/instances_train2017.json").read_text())
    for category, name in zip(content["categories"], ("$\\foo$", "猫", "a\nb", "x" * 300), strict=True):
        category["name"] = name
    content["annotations"][0]["bbox"] = [0, 0, 1e30, 5]
    content["annotations"][1]["bbox"] = [0, 0, 1e30, 1e30]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    flags = ["--train_images", str(shapes_root / "images/train2017"), "--train_json", str(tmp_path / "odd.json")]
    flags += ["--max_objects", "0"]
    assert main(["check", *flags, "--overfit", "99", "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/data/check.json").read_text())
    assert [issue["kind"] for issue in report["issues"]] == ["beyond-edge"] * 2
    assert (tmp_path / "out/data/check.png").exists()


def test_all_copies_of_an_image_are_reported(tmp_path, shapes_root):
    entries = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in range(5)]
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes((shapes_root / "images/train2017/000000.png").read_bytes())
    objects = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    write_json(tmp_path / "a.json", entries, objects, [{"id": 1, "name": "thing"}])
    split = Split(tmp_path, tmp_path / "a.json")
    issues = [(issue.kind, issue.entry) for issue in check_dataset(split, split).issues]
    assert [entry for kind, entry in issues if kind == "leak"] == [f"{n}.png" for n in range(5)]
    copies = sorted(entry for kind, entry in issues if kind == "duplicate-image")
    assert copies == sorted([f"{n}.png" for n in range(1, 5)] * 2)


# -- training --------------------------------------------------------------------------------------


def small_run(root: Path, output: Path, **flags) -> TrainArguments:
    values = {"image_size": 32, "num_bins": 40, "max_objects": 3, "batch_size": 8, "max_steps": 8, "warmup_steps": 0}
    values |= {"log_every": 1, "sample_every": 0, "ckpt_every": 0, "eval_every": 0} | flags
    return arguments(root, output, *(f"--{name}={value}" for name, value in values.items()))


def test_training_replaces_unreadable_images_and_logs_them(tmp_path, monkeypatch):
    write_dataset(tmp_path / "root")
    opened, fromfile = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda path, **kwargs: opened.append(path) or fromfile(path, **kwargs))
    assert run_training(small_run(tmp_path / "root", tmp_path / "run", max_unreadable=0.5)) == 0
    log = (tmp_path / "run/train.log").read_text()
    for name in BAD_FILES:
        assert f"{name}: " in log
    assert log.count("replaced by another image: ") == len(BAD_FILES)
    assert "3 bbox-invalid" in log
    losses = [row for row in rows(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 9))
    assert losses[-1]["train/unreadable_images"] == len(BAD_FILES)
    assert all(np.isfinite(row["train/loss"]) for row in losses)
    # No file outside the folders of images was opened.
    images = (tmp_path / "root/images").resolve()
    assert {path.resolve().parent for path in opened} == {images / "train2017", images / "val2017"}


def test_training_stops_when_too_many_images_are_unreadable(tmp_path, capsys):
    """Before the first step for missing files; after a checkpoint for broken files. It can be resumed."""
    root, output = tmp_path / "root", tmp_path / "run"
    write_dataset(root)
    assert run_training(small_run(root, output)) == 2
    error = capsys.readouterr().err
    total = len(GOOD) + len(BAD_FILES) + len(ODD_FILES) + 1
    assert re.search(
        rf"--max_unreadable 0.01: \d+ of {total} training images are missing or broken, at most 0 ", error
    )
    assert "gone.png: " in error
    assert len(error.strip().splitlines()) == 1
    assert not output.exists()

    missing = sum(kinds[0] in ("missing-file", "path-outside") for _, kinds in BAD_FILES.values())
    fraction = (missing + 0.5) / total
    assert run_training(small_run(root, output, max_unreadable=fraction)) == 2
    error = capsys.readouterr().err
    count, allowed = map(int, re.search(r"(\d+) of \d+ training images .* at most (\d+) ", error).groups())
    assert missing == allowed < count <= len(BAD_FILES)
    assert "saved at step" in error
    status = json.loads((output / "status.json").read_text())
    assert status["state"] == "failed"
    assert "--max_unreadable" in status["reason"]
    assert 1 <= status["step"] < 8
    assert run_training(small_run(root, output, max_unreadable=1, resume="auto")) == 0
    assert [row["step"] for row in rows(output)] == [*range(1, 9), 8]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_evaluated_as_images_without_predictions(tmp_path, num_workers):
    write_dataset(tmp_path / "root")
    (tmp_path / "root/images/val2017/own.png").write_bytes(b"")
    flags = {"max_unreadable": 1, "max_steps": 1, "num_workers": num_workers}
    assert run_training(small_run(tmp_path / "root", tmp_path / "run", **flags)) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert "1 images cannot be read" in log
    assert "own.png: the file is empty" in log
    predictions = json.loads((tmp_path / "run/eval/step_1/predictions.json").read_text())
    assert {entry["image_id"] for entry in predictions} == {0}
