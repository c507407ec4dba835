"""The shapes dataset: reproducible images, tight boxes, and no overwritten files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pix2seq.data.shapes import CATEGORY_IDS, SHAPES, _draw_shape, draw_dataset, draw_image, main

RECIPE = {"num_train": 2, "num_val": 1, "size": 16}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def image_hashes(folder: Path) -> set[str]:
    return {digest for name, digest in hashes(folder).items() if name.endswith(".png")}


def test_layout_is_cocos(shapes_root):
    for split, count in (("train", 12), ("val", 5)):
        content = json.loads((shapes_root / f"annotations/instances_{split}2017.json").read_text())
        assert [image["id"] for image in content["images"]] == list(range(1, count + 1))
        assert [c["id"] for c in content["categories"]] == list(CATEGORY_IDS)
        assert [c["name"] for c in content["categories"]] == list(SHAPES)
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            assert entry["area"] == width * height
            assert 0 <= x < x + width <= 64
            assert 0 <= y < y + height <= 64
        for entry in content["images"]:
            with Image.open(shapes_root / f"images/{split}2017" / entry["file_name"]) as image:
                assert image.size == (64, 64)


def test_category_ids_have_gaps():
    assert len(set(CATEGORY_IDS)) == len(SHAPES)
    assert max(CATEGORY_IDS) > len(SHAPES)


def test_datasets_are_reproducible(tmp_path):
    first = draw_dataset(tmp_path / "a", **RECIPE, seed=1)
    assert hashes(first) == hashes(draw_dataset(tmp_path / "b", **RECIPE, seed=1))
    assert not image_hashes(first) & image_hashes(draw_dataset(tmp_path / "c", **RECIPE, seed=2))


def test_images_are_those_of_earlier_versions():
    image, objects = draw_image(np.random.default_rng((0, 0, 2)), 64, 4)
    assert objects == [(0, (32.0, 27.5, 47.5, 42.5)), (0, (15.5, 36.0, 34.5, 53.5)), (0, (9.5, 1.0, 40.0, 28.5))]
    assert hashlib.sha256(image.tobytes()).hexdigest().startswith("b5832ca9ee1f978b869ba45f0b53e01f")


def test_no_image_is_in_both_splits(shapes_root):
    train, val = (image_hashes(shapes_root / f"images/{split}2017") for split in ("train", "val"))
    assert (len(train), len(val)) == (12, 5)
    assert not train & val


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("box", [(10, 20, 41, 60), (0, 0, 17, 23), (33, 5, 64, 34)])
def test_boxes_are_tight(name, box):
    image = Image.new("RGB", (64, 64))
    _draw_shape(ImageDraw.Draw(image), name, box, (255, 255, 255))
    assert image.getbbox() == box


def test_images_have_all_classes_overlaps_and_no_objects():
    objects = [draw_image(np.random.default_rng((0, index)), 48, 5)[1] for index in range(120)]
    counts = [len(image_objects) for image_objects in objects]
    assert 0 < counts.count(0) < 20
    assert max(counts) >= 4
    assert {label for image_objects in objects for label, _ in image_objects} == set(range(len(SHAPES)))
    overlaps = 0
    for image_objects in objects:
        boxes = np.array([box for _, box in image_objects]).reshape(-1, 4)
        for i in range(len(boxes)):
            low, high = np.maximum(boxes[i, :2], boxes[:i, :2]), np.minimum(boxes[i, 2:], boxes[:i, 2:])
            overlaps += (high > low).all(axis=1).sum()
    assert overlaps > 5


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(ValueError, match=f"folder {tmp_path}: is not empty"):
        draw_dataset(tmp_path, **RECIPE)
    assert hashes(tmp_path).keys() == {"thesis.txt"}


def test_only_a_different_dataset_is_drawn_again(tmp_path):
    draw_dataset(tmp_path, **RECIPE)
    file = tmp_path / "images/train2017/000000.png"
    file.write_bytes(b"changed")
    draw_dataset(tmp_path, **RECIPE)
    assert file.read_bytes() == b"changed"
    draw_dataset(tmp_path, **RECIPE | {"size": 24})
    with Image.open(file) as image:
        assert image.size == (24, 24)


def test_a_smaller_dataset_leaves_no_image_of_a_larger_one(tmp_path):
    draw_dataset(tmp_path, num_train=3, num_val=2, size=16)
    (tmp_path / "images/train2017/mine.png").write_text("")
    draw_dataset(tmp_path, **RECIPE)
    assert {path.name for path in tmp_path.rglob("*.png")} == {"000000.png", "000001.png", "mine.png"}
    assert len(list(tmp_path.rglob("*.png"))) == 4


@pytest.mark.parametrize(
    ("words", "part"),
    [
        *((["{new}", f"--{name}", "0"], f"--{name} 0: must be at least") for name in ("num_train", "num_val", "size")),
        (["{new}", "--max_shapes", "-1"], "--max_shapes -1: must be at least 1"),
        (["{new}", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["{new}", "--num_train", "many"], "--num_train"),
        (["{new}/file"], "file: cannot be written to"),
        (["/proc/x"], "/proc/x: cannot be written to"),
        (["{new}/broken"], "shapes.json: is not JSON"),
        ([""], "folder: is empty"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys, words, part):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/shapes.json").write_text("{")
    before = hashes(tmp_path)
    try:
        code = main([word.format(new=tmp_path) for word in words])
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("pix2seq shapes: error: ")
    assert part in line
    assert hashes(tmp_path) == before


def test_an_interrupted_dataset_is_completed(tmp_path):
    complete = hashes(draw_dataset(tmp_path, **RECIPE))
    (tmp_path / "shapes.json").write_text("null")
    (tmp_path / "images/val2017/000000.png").unlink()
    assert hashes(draw_dataset(tmp_path, **RECIPE)) == complete
