"""The embedded dataset: repeatable, with honest boxes and the hard cases, and nobody's data is overwritten."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pix2seq.data.shapes import CATEGORY_IDS, SHAPES, _draw_shape, draw_dataset, draw_image


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pictures(seed: int, count: int = 120):
    return [draw_image(np.random.default_rng((seed, index)), 48, 5) for index in range(count)]


def test_the_layout_is_cocos(shapes_root):
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
        for image in content["images"]:
            with Image.open(shapes_root / f"images/{split}2017" / image["file_name"]) as picture:
                assert picture.size == (64, 64)


def test_the_same_arguments_draw_the_same_files(tmp_path):
    first = draw_dataset(tmp_path / "a", num_train=4, num_val=2, size=32, seed=1)
    again = draw_dataset(tmp_path / "b", num_train=4, num_val=2, size=32, seed=1)
    other = draw_dataset(tmp_path / "c", num_train=4, num_val=2, size=32, seed=2)
    assert contents(first) == contents(again)
    images = [{h for name, h in contents(folder).items() if name.endswith("png")} for folder in (first, other)]
    assert not images[0] & images[1]


def test_no_picture_is_in_both_splits(shapes_root):
    hashes = contents(shapes_root)
    train = {h for name, h in hashes.items() if name.startswith("images/train")}
    val = {h for name, h in hashes.items() if name.startswith("images/val")}
    assert len(train) == 12
    assert len(val) == 5
    assert not train & val


@pytest.mark.parametrize("name", SHAPES)
def test_boxes_are_tight(name):
    """Drawn alone on black, every shape fills its box to the pixel and leaves it nowhere."""
    for box in ((10, 20, 41, 60), (0, 0, 17, 23), (33, 5, 64, 34)):
        picture = Image.new("RGB", (64, 64))
        _draw_shape(ImageDraw.Draw(picture), name, box, (255, 255, 255))
        assert picture.getbbox() == box


def test_empty_pictures_and_overlaps_exist():
    drawn = pictures(0)
    counts = [len(objects) for _, objects in drawn]
    assert 0 < counts.count(0) < 20
    assert max(counts) >= 4
    overlaps = 0
    for _, objects in drawn:
        boxes = np.array([box for _, box in objects]).reshape(-1, 4)
        for i in range(len(boxes)):
            for j in range(i):
                low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
                overlaps += bool((high > low).all())
    assert overlaps > 5


def test_every_class_is_drawn():
    labels = [label for _, objects in pictures(1) for label, _ in objects]
    assert set(labels) == set(range(len(SHAPES)))


def test_category_ids_have_gaps():
    """Code that assumes ids 1 ... C should break on the demo first."""
    assert len(set(CATEGORY_IDS)) == len(SHAPES)
    assert max(CATEGORY_IDS) > len(SHAPES)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty and holds no shapes dataset"):
        draw_dataset(tmp_path, num_train=1, num_val=1, size=16)
    assert contents(tmp_path).keys() == {"thesis.txt"}


def test_a_finished_folder_is_left_alone(tmp_path):
    recipe = {"num_train": 2, "num_val": 1, "size": 16}
    draw_dataset(tmp_path, **recipe)
    picture = tmp_path / "images/train2017/000000.png"
    picture.write_bytes(b"touched")
    draw_dataset(tmp_path, **recipe)
    assert picture.read_bytes() == b"touched"
    draw_dataset(tmp_path, **recipe | {"size": 24})  # ours, but another dataset: drawn again
    with Image.open(picture) as image:
        assert image.size == (24, 24)


def test_an_interrupted_folder_is_finished(tmp_path):
    recipe = {"num_train": 2, "num_val": 1, "size": 16}
    whole = contents(draw_dataset(tmp_path, **recipe))
    (tmp_path / "shapes.json").write_text("null")
    (tmp_path / "images/val2017/000000.png").unlink()
    assert contents(draw_dataset(tmp_path, **recipe)) == whole
