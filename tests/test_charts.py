"""Charts: drawn of any numbers, the same for the same, and different where the numbers are."""

import numpy as np
import pytest
from PIL import Image

from pix2seq.charts import dataset_overview, learning_curves


def overview(counts, sides=(10.0, 50.0), objects=(0, 3), examples=(), max_objects=100) -> np.ndarray:
    splits = {"train": np.array(counts)}
    arguments = ({"train": np.array(sides, dtype=float)}, {"train": np.array(objects)}, examples, max_objects)
    return np.asarray(dataset_overview([f"class {n}" for n in range(len(counts))], splits, *arguments))


@pytest.mark.parametrize("counts", [[0], [5, 0], [1] * 200])
def test_any_dataset_can_be_drawn(counts):
    assert overview(counts).shape[1] == 1300
    assert overview(counts, sides=[], objects=[0]).shape[1] == 1300


def test_examples_are_below_the_charts():
    plain = overview([3, 4])
    shown = overview([3, 4], examples=[Image.new("RGB", (320, 200), "#FF0000")] * 5)
    red = (shown == (255, 0, 0)).all(axis=-1)
    assert red.sum() == 5 * 320 * 200
    assert not red[: plain.shape[0]].any()


def test_a_limit_on_objects_shows_where_it_cuts():
    assert not np.array_equal(overview([3], objects=[1, 9], max_objects=5), overview([3], objects=[1, 9]))
    assert np.array_equal(overview([3], objects=[1, 9], max_objects=10), overview([3], objects=[1, 9]))


def test_curves_are_drawn_of_what_there_is():
    panels = {"loss": ("train/loss", "train/loss_eos"), "boxes": ("train/iou",)}
    one = learning_curves({"demo": {"train/loss": ([1, 2], [3.0, 2.0])}}, panels)
    assert one.size == (720, 260)
    both = learning_curves(dict.fromkeys(("demo", "overfit"), {"train/loss": ([1, 2], [3.0, 2.0])}), panels)
    assert both.size == (720, 520)
    other = learning_curves({"demo": {"train/loss": ([1, 2], [3.0, 1.0])}}, panels)
    assert not np.array_equal(np.asarray(one), np.asarray(other))
