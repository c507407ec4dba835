"""Drawn boxes, grids and tables."""

import time

import numpy as np
import pytest
from PIL import Image, ImageColor

from benchmarks.curves import learning_curves
from pix2seq.data import overview_figure
from pix2seq.data.overview_figure import SplitSummary, dataset_overview
from pix2seq.visualization import (
    CELL,
    GREY,
    MARGIN,
    PALETTE,
    TableRow,
    color_of,
    draw_boxes,
    draw_examples,
    grid,
    paragraph,
    sequence_table,
    side_by_side,
    stack,
)

RED = "#FF0000"


def black(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size)


def mask(image: Image.Image, color: str) -> np.ndarray:
    return (np.asarray(image) == ImageColor.getrgb(color)).all(axis=-1)


def test_box_edges_are_drawn_inside_the_box():
    image = black()
    red = mask(draw_boxes(image, np.array([[10, 20, 40, 44]]), [""], [RED]), RED)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    # The last pixel of a box that ends at x2 is x2 - 1.
    assert (columns[0], rows[0], columns[-1], rows[-1]) == (10, 20, 39, 43)
    assert all(edge.all() for edge in (red[20, 10:40], red[43, 10:40], red[20:44, 10], red[20:44, 39]))
    assert not red[22:42, 12:38].any()
    assert not np.asarray(image).any()  # the input is unchanged


def test_boxes_far_outside_the_image_are_drawn_quickly():
    start = time.perf_counter()
    drawn = draw_boxes(black(), np.array([[-1e30, 20, 1e30, 1e30], [-9, -9, 99, 99]]), ["", ""], [RED, RED])
    assert time.perf_counter() - start < 1
    red = mask(drawn, RED)
    assert red[20].all()
    assert red.sum() == 64


def test_dashed_boxes_have_gaps():
    red = mask(draw_boxes(black(), np.array([[8, 8, 56, 40]]), [""], [RED], dashed=[True]), RED)
    assert 0.3 < red[8, 8:56].mean() < 0.8
    assert 0.3 < red[8:40, 8].mean() < 0.8
    assert not red[12:36, 12:52].any()


@pytest.mark.parametrize("box", [[0, 0, 10, 10], [60, 44, 64, 48], [-5, -5, 70, 60]])
def test_names_are_drawn_inside_the_image(box):
    plain = draw_boxes(black(), np.array([box]), [""], [RED])
    named = draw_boxes(black(), np.array([box]), ["cat"], [RED])
    assert mask(named, RED).sum() > mask(plain, RED).sum()


@pytest.mark.parametrize("dashed", [None, [True] * 4])
def test_degenerate_boxes_and_no_boxes_are_accepted(dashed):
    boxes = np.array([[10, 10, 10, 10], [5.5, 7.25, 6.0, 30.75], [-20, -20, -10, -10], [60, 40, 900, 900]])
    assert draw_boxes(black(), boxes, ["a", "b", "c", "d"], [RED] * 4, dashed).size == (64, 48)
    image = Image.effect_noise((20, 30), 50)
    drawn = draw_boxes(image, np.zeros((0, 4)), [], [])
    assert np.array_equal(np.asarray(drawn), np.asarray(image.convert("RGB")))


def test_labels_have_distinct_colors_and_noise_is_grey():
    assert len({color_of(label) for label in range(-1, len(PALETTE))}) == len(PALETTE) + 1
    assert color_of(len(PALETTE)) == color_of(0)
    assert color_of(-1) == GREY


def test_grid_fits_its_images():
    images = [[black((40, 20)), black((10, 10))], [black((20, 40))]]
    assert grid(images).size == (2 * (40 + MARGIN) + MARGIN, 2 * (40 + MARGIN) + MARGIN)
    assert grid(images, cell=30).size == (2 * (30 + MARGIN) + MARGIN, 2 * (30 + MARGIN) + MARGIN)
    assert grid(images, ["left", "right"]).height > grid(images).height
    sheet = np.asarray(grid([[Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), "#0000FF")]]))
    assert (sheet[MARGIN : MARGIN + 16, MARGIN : MARGIN + 16] == [255, 0, 0]).all()
    second = 2 * MARGIN + 16
    assert (sheet[MARGIN : MARGIN + 16, second : second + 16] == [0, 0, 255]).all()
    assert (sheet[:MARGIN] == 255).all()


def test_pairs_are_arranged_side_by_side():
    assert side_by_side([(black(), black())] * 3, columns=2, cell=32).width == 4 * (32 + MARGIN) + MARGIN


def test_stack_centers_images():
    sheet = np.asarray(stack([black((4, 2)), black((2, 3))]))
    assert sheet.shape == (5, 4, 3)
    assert (sheet[2:, [0, 3]] == 255).all()
    assert not sheet[2:, 1:3].any()


def test_noise_objects_are_grey_dashed_and_below_real_objects():
    image, box = black((100, 100)), np.array([[0.25, 0.25, 0.75, 0.75]])
    noise = mask(draw_examples([image], [(box, np.array([-1]))], ["cat"]), GREY)
    real = mask(draw_examples([image], [(box, np.array([0]))], ["cat"]), PALETTE[0])
    inside = slice(MARGIN + CELL // 4, MARGIN + 3 * CELL // 4)
    assert 0.3 < noise[MARGIN + CELL // 4, inside].mean() < 0.8
    bottom = MARGIN + 3 * CELL // 4 - 1
    assert real[bottom, inside].all()
    both = draw_examples([image], [(np.concatenate([box, box]), np.array([0, -1]))], ["cat"])
    assert mask(both, PALETTE[0])[bottom, inside].all()
    assert not mask(both, GREY)[bottom].any()


def test_examples_are_arranged_in_rows_of_four():
    sheet = draw_examples([black((16, 16))] * 5, [(np.zeros((0, 4)), np.zeros(0, int))] * 5, [])
    assert sheet.size == (4 * (CELL + MARGIN) + MARGIN, 2 * (CELL + MARGIN) + MARGIN)


def test_tokens_without_weight_are_pale():
    tokens = ["1", "2", "3", "4", "a name that is much too long for its cell"]
    weighted = mask(sequence_table([TableRow(tokens, [True] * 5, RED, "object 1")], "", 400), RED)
    noise = mask(sequence_table([TableRow(tokens, [False] * 4 + [True], RED, "")], "5 more", 400), RED)
    assert weighted.any(0)[:180].sum() > 150
    assert not noise[:, :180].any()
    assert noise[:, 185:280].sum() == weighted[:, 185:280].sum()


def test_paragraphs_are_wrapped():
    short, long = paragraph("short", 300), paragraph("word " * 100, 300)
    assert short.width == long.width == 300
    assert long.height > 5 * short.height / 2


def overview(counts, sizes=(10.0, 50.0), objects=(0, 3), examples=(), max_objects=100) -> np.ndarray:
    train = SplitSummary(np.array(counts), np.array(sizes, dtype=float), np.array(objects))
    return np.asarray(
        dataset_overview([f"class {n}" for n in range(len(counts))], {"train": train}, examples, max_objects)
    )


@pytest.mark.parametrize("counts", [[0], [5, 0], [1] * 200])
@pytest.mark.parametrize("values", [{}, {"sizes": [], "objects": [0]}])
def test_any_dataset_can_be_drawn(counts, values):
    assert overview(counts, **values).shape[1] == 1300


@pytest.mark.parametrize("sizes", [(13, 45), (3, 9), (20, 100), (100, 3000), (1, 1e6)])
@pytest.mark.parametrize("max_objects", [1, 99])
def test_labels_stay_within_their_charts(monkeypatch, sizes, max_objects):
    figures = []
    draw = overview_figure.figure_to_image
    monkeypatch.setattr(overview_figure, "figure_to_image", lambda figure: figures.append(figure) or draw(figure))
    overview([3, 4], sizes=sizes, objects=(0, 100), max_objects=max_objects)
    for axes in figures[0].axes[1:]:
        assert axes.texts
        for text in axes.texts:
            box = text.get_window_extent()
            assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1, text


def test_examples_are_below_the_charts():
    charts = overview([3, 4])
    red = (overview([3, 4], examples=[Image.new("RGB", (320, 200), RED)] * 5) == (255, 0, 0)).all(axis=-1)
    assert red.sum() == 5 * 320 * 200
    assert not red[: charts.shape[0]].any()


def test_max_objects_is_marked_only_if_it_is_exceeded():
    assert not np.array_equal(overview([3], objects=[1, 9], max_objects=5), overview([3], objects=[1, 9]))
    assert np.array_equal(overview([3], objects=[1, 9], max_objects=10), overview([3], objects=[1, 9]))


def test_learning_curves_have_a_row_for_each_run_and_a_column_for_each_panel():
    panels = {"loss": ("train/loss", "train/loss_eos"), "boxes": ("train/iou",)}
    metrics = {"train/loss": ([1, 2], [3.0, 2.0])}
    first = learning_curves({"demo": metrics}, panels)
    assert first.size == (720, 260)
    both = learning_curves({"demo": metrics, "overfit": metrics}, panels)
    assert both.size == (720, 520)
    other = learning_curves({"demo": {"train/loss": ([1, 2], [3.0, 1.0])}}, panels)
    assert not np.array_equal(np.asarray(first), np.asarray(other))
