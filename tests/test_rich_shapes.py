"""The rich style of the drawings: reproducible images and tight boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from pix2seq.data import rich_shapes
from pix2seq.data.rich_shapes import FILLS, KINDS, Appearance, draw_rich_image
from pix2seq.data.shapes import draw_dataset, main

COUNT = 30


@pytest.fixture(scope="module")
def drawings():
    return [draw_rich_image(np.random.default_rng((3, index)), 128, 12) for index in range(COUNT)]


def test_images_are_reproducible(drawings):
    image, objects = draw_rich_image(np.random.default_rng((3, 7)), 128, 12)
    assert image.tobytes() == drawings[7][0].tobytes()
    assert objects == drawings[7][1]


def test_objects_lie_in_the_image(drawings):
    counts = [len(objects) for _, objects in drawings]
    assert min(counts) >= 1
    assert 6 <= max(counts) <= 12
    for image, objects in drawings:
        assert image.size == (128, 128)
        for label, (x1, y1, x2, y2) in objects:
            assert 0 <= label < len(KINDS)
            assert 0 <= x1 < x2 <= 128
            assert 0 <= y1 < y2 <= 128


def test_sizes_vary_between_images_more_than_in_an_image(drawings):
    logs = [np.log([(x2 - x1) * (y2 - y1) for _, (x1, y1, x2, y2) in objects]) for _, objects in drawings]
    assert np.std([values.mean() for values in logs]) > 1.5 * np.mean([values.std() for values in logs])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", FILLS)
def test_boxes_are_tight(kind, fill, monkeypatch):
    """The pixels that an object changes reach to its box, and not beyond."""
    monkeypatch.setattr(rich_shapes, "_draw_background", lambda rng, size: np.full((size, size, 3), 128.0))
    monkeypatch.setattr(rich_shapes, "_finish", lambda canvas, rng: canvas)
    group = Appearance(KINDS.index(kind), fill, np.array([[255.0] * 3, [220.0] * 3]), has_spot=False, seed=4)
    monkeypatch.setattr(Appearance, "draw", lambda rng, background: group)
    num_cut = 0
    for seed in range(40):
        canvas, ((label, box),) = draw_rich_image(np.random.default_rng(seed), 96, 1)
        assert label == group.kind
        rows, columns = np.nonzero(np.abs(canvas - 128).max(axis=2) > 0)
        extent = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(extent, box, rtol=0, atol=1.001)
        num_cut += min(extent) == 0 or max(extent) == 96
    assert num_cut >= 5


def test_boxes_are_those_of_the_part_inside_the_image():
    """The tip of the triangle is cut off: the box starts where the triangle enters the image."""
    outline = np.array([(-10.0, 4.0), (10.0, 24.0), (-10.0, 24.0)])
    corner, opposite = np.array([0, 4]), np.array([10, 24])
    box = rich_shapes._box(outline, corner, rich_shapes._mask(outline, corner, opposite))
    np.testing.assert_allclose(box, (0, 14, 10, 24), rtol=0, atol=1)


def test_small_images_have_objects():
    for seed in range(100):
        assert draw_rich_image(np.random.default_rng(seed), 32, 4)[1]


def test_default_numbers_and_sizes():
    drawings = [draw_rich_image(np.random.default_rng(seed), 256, 18)[1] for seed in range(80)]
    assert {len(objects) for objects in drawings} >= {1, 2, 18}
    assert max(len(objects) for objects in drawings) == 18
    sides = [max(x2 - x1, y2 - y1) for objects in drawings for _, (x1, y1, x2, y2) in objects]
    assert 5 < min(sides) < 15
    assert 120 < max(sides) < 256
    assert {label for objects in drawings for label, _ in objects} == set(range(len(KINDS)))


def test_colors_differ_from_the_background_and_no_ellipse_is_a_ring():
    background = np.array([120.0, 130.0, 140.0])
    for seed in range(200):
        group = Appearance.draw(np.random.default_rng(seed), background)
        assert np.abs(group.colors - background).max(axis=1).min() >= rich_shapes.MIN_CONTRAST
        assert (KINDS[group.kind], group.fill) != ("ellipse", "outline")


def test_hidden_objects_are_not_drawn(monkeypatch):
    """With objects of one color each, most of every object is visible."""
    masks = []

    def record(region, mask, group, rng):
        masks.append((region, mask > 0.5))
        region[mask > 0.5] = len(masks)

    monkeypatch.setattr(rich_shapes, "_paint", record)
    monkeypatch.setattr(rich_shapes, "_finish", lambda canvas, rng: canvas)
    for seed in range(10):
        masks.clear()
        draw_rich_image(np.random.default_rng(seed), 96, 18)
        for number, (region, mask) in enumerate(masks, start=1):
            visible = (region[..., 0] == number) & mask
            assert visible.sum() >= 0.55 * mask.sum()


def test_the_command_draws_both_splits(tmp_path, capsys):
    assert main([str(tmp_path / "rich"), "--style", "rich", "--num_train", "3", "--num_val", "2"]) == 0
    content = json.loads((tmp_path / "rich/annotations/instances_train2017.json").read_text())
    assert [category["name"] for category in content["categories"]] == list(KINDS)
    with Image.open(tmp_path / "rich/images/train2017" / content["images"][0]["file_name"]) as image:
        assert (image.size, image.format) == ((256, 256), "JPEG")
    # The other style replaces it.
    draw_dataset(tmp_path / "rich", num_train=1, num_val=1)
    assert [path.name for path in (tmp_path / "rich/images/train2017").iterdir()] == ["000000.png"]
