"""Pictures of boxes: edges where they belong, in their colours, and grids of the right size."""

import time

import numpy as np
from PIL import Image, ImageColor

from pix2seq.visualization import (
    CELL,
    GREY,
    MARGIN,
    PALETTE,
    color_of,
    draw_boxes,
    draw_examples,
    grid,
    paragraph,
    sequence_table,
    side_by_side,
)

RED = "#FF0000"


def black(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size)


def mask(image: Image.Image, color: str) -> np.ndarray:
    return (np.asarray(image) == ImageColor.getrgb(color)).all(axis=-1)


def test_edges_have_the_boxs_colour():
    image = black()
    drawn = draw_boxes(image, np.array([[10, 20, 40, 44]]), [""], [RED])
    red = mask(drawn, RED)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    # The last pixel of a box that ends at x2 is x2 - 1.
    assert (columns[0], rows[0], columns[-1], rows[-1]) == (10, 20, 39, 43)
    assert red[20, 10:40].all()
    assert red[43, 10:40].all()
    assert red[20:44, 10].all()
    assert red[20:44, 39].all()
    assert not red[22:42, 12:38].any()
    assert not np.asarray(image).any()  # drawn on a copy


def test_edges_beyond_the_picture_are_not_drawn_and_take_no_time():
    started = time.perf_counter()
    drawn = draw_boxes(black(), np.array([[-1e30, 20, 1e30, 1e30], [-9, -9, 99, 99]]), ["", ""], [RED, RED])
    assert time.perf_counter() - started < 1
    red = mask(drawn, RED)
    assert red[20].all()
    assert red.sum() == 64


def test_dashed_boxes_have_gaps():
    drawn = mask(draw_boxes(black(), np.array([[8, 8, 56, 40]]), [""], [RED], dashed=[True]), RED)
    assert 0.3 < drawn[8, 8:56].mean() < 0.8
    assert 0.3 < drawn[8:40, 8].mean() < 0.8
    assert not drawn[12:36, 12:52].any()


def test_names_are_written_inside_the_picture():
    for box in ([0, 0, 10, 10], [60, 44, 64, 48], [-5, -5, 70, 60]):
        plain = draw_boxes(black(), np.array([box]), [""], [RED])
        named = draw_boxes(black(), np.array([box]), ["cat"], [RED])
        assert mask(named, RED).sum() > mask(plain, RED).sum()
        assert named.size == (64, 48)


def test_odd_boxes_are_drawn_without_complaint():
    boxes = np.array([[10, 10, 10, 10], [5.5, 7.25, 6.0, 30.75], [-20, -20, -10, -10], [60, 40, 900, 900]])
    for dashed in (None, [True] * 4):
        drawn = draw_boxes(black(), boxes, ["a", "b", "c", "d"], [RED] * 4, dashed)
        assert drawn.size == (64, 48)


def test_no_boxes():
    image = Image.effect_noise((20, 30), 50)
    drawn = draw_boxes(image, np.zeros((0, 4)), [], [])
    assert drawn.mode == "RGB"
    assert np.array_equal(np.asarray(drawn), np.asarray(image.convert("RGB")))


def test_colours():
    assert len({color_of(label) for label in range(len(PALETTE))}) == len(PALETTE)
    assert color_of(len(PALETTE)) == color_of(0)
    assert color_of(-1) == GREY
    assert GREY not in PALETTE


def test_grid_sizes():
    images = [[black((40, 20)), black((10, 10))], [black((20, 40))]]
    assert grid(images).size == (2 * (40 + MARGIN) + MARGIN, 2 * (40 + MARGIN) + MARGIN)
    assert grid(images, cell=30).size == (2 * (30 + MARGIN) + MARGIN, 2 * (30 + MARGIN) + MARGIN)
    assert grid(images, ["left", "right"]).height > grid(images).height


def test_a_grid_holds_its_images():
    sheet = np.asarray(grid([[Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), "#0000FF")]]))
    assert (sheet[MARGIN : MARGIN + 16, MARGIN : MARGIN + 16] == [255, 0, 0]).all()
    second = 2 * MARGIN + 16
    assert (sheet[MARGIN : MARGIN + 16, second : second + 16] == [0, 0, 255]).all()
    assert (sheet[:MARGIN] == 255).all()


def test_pairs_stand_side_by_side():
    pairs = [(black(), black())] * 3
    assert side_by_side(pairs, columns=2, cell=32).width == 4 * (32 + MARGIN) + MARGIN
    assert side_by_side(pairs[:1], columns=2, cell=32).width == 2 * (32 + MARGIN) + MARGIN


def test_examples_show_noise_grey_and_dashed_under_the_objects():
    box = np.array([[0.25, 0.25, 0.75, 0.75]])
    image = black((64, 64))  # shown at CELL pixels
    noise = np.asarray(draw_examples([image], [(box, np.array([-1]))], ["cat"]))
    real = np.asarray(draw_examples([image], [(box, np.array([0]))], ["cat"]))
    grey, orange = mask(Image.fromarray(noise), GREY), mask(Image.fromarray(real), PALETTE[0])
    inside = slice(MARGIN + CELL // 4, MARGIN + 3 * CELL // 4)
    assert 0.3 < grey[MARGIN + CELL // 4, inside].mean() < 0.8
    bottom = MARGIN + 3 * CELL // 4 - 1
    assert orange[bottom, inside].all()
    both = draw_examples([image], [(np.concatenate([box, box]), np.array([0, -1]))], ["cat"])
    assert mask(both, PALETTE[0])[bottom, inside].all()
    assert not mask(both, GREY)[bottom].any()


def test_examples_stand_four_in_a_row():
    images = [black((16, 16))] * 5
    sheet = draw_examples(images, [(np.zeros((0, 4)), np.zeros(0, int))] * 5, [])
    assert sheet.size == (4 * (CELL + MARGIN) + MARGIN, 2 * (CELL + MARGIN) + MARGIN)


def test_a_table_is_pale_where_tokens_have_no_weight():
    line = (["1", "2", "3", "4", "a name that is much too long for its cell"], [True] * 5, RED, "object 1")
    full = mask(sequence_table([line], "", 400), RED)
    noise = mask(sequence_table([(line[0], [False] * 4 + [True], RED, "")], "5 more", 400), RED)
    assert full.any(0)[:180].sum() > 150
    assert not noise[:, :180].any()
    assert noise[:, 185:280].sum() == full[:, 185:280].sum()


def test_a_paragraph_is_as_high_as_its_lines():
    one, many = paragraph("short", 300), paragraph("word " * 100, 300)
    assert one.width == many.width == 300
    assert many.height > 5 * one.height / 2
