"""Geometry, with the pixels as the judge: paint a box, transform, and see whether the box follows the paint."""

import numpy as np
import pytest
import torch

from pix2seq.transforms import PAD_VALUE, EvalTransform, TrainTransform, resized_size, to_original_pixels

PURE = torch.tensor([0, 255, 0], dtype=torch.uint8)


def painted(size: tuple[int, int], box: tuple[int, int, int, int]) -> torch.Tensor:
    """A black picture (height, width) with one pure green box xyxy."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = PURE[:, None, None]
    return image


def extent(image: torch.Tensor) -> np.ndarray | None:
    """xyxy of the green pixels; grey padding and black are not green."""
    green = (image[1].int() - image[0].int()) > 127
    if not green.any():
        return None
    rows, columns = torch.nonzero(green.any(1)).flatten(), torch.nonzero(green.any(0)).flatten()
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(transform: TrainTransform, image: torch.Tensor, boxes, seed: int = 0):
    return transform(image, np.array(boxes, dtype=np.float64).reshape(-1, 4), rng(seed))


@pytest.mark.parametrize("size", [(90, 120), (150, 100), (64, 64), (40, 200)])
def test_boxes_follow_the_pixels_in_training(size):
    """A bug others shipped: a bug in the scale jitter that left boxes behind wrecked a run."""
    box = (size[1] // 4, size[0] // 3, size[1] * 3 // 4, size[0] * 5 // 6)
    image, transform = painted(size, box), TrainTransform(96)
    seen = 0
    for seed in range(60):
        canvas = run(transform, image, [box], seed)
        found = extent(canvas.image)
        if len(canvas.boxes) == 0:
            # At most a sliver of the box is left at the very edge.
            assert found is None or min(found[2:] - found[:2]) <= 1
            continue
        if found is None:
            assert ((canvas.boxes[0, 2:] - canvas.boxes[0, :2]) * 96).min() <= 1.5
            continue
        assert np.abs(canvas.boxes[0] * 96 - found).max() <= 1.5
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("size", [(90, 120), (33, 47), (200, 40), (96, 96), (300, 500)])
def test_boxes_follow_the_pixels_in_evaluation(size):
    box = (size[1] // 4, size[0] // 3, size[1] * 3 // 4, size[0] * 5 // 6)
    canvas = EvalTransform(96)(painted(size, box), np.array([box], dtype=np.float64))
    assert np.abs(canvas.boxes[0] * 96 - extent(canvas.image)).max() <= 1.5


@pytest.mark.parametrize("image_size", [32, 96, 130])
@pytest.mark.parametrize("size", [(20, 30), (100, 60), (96, 96), (1, 1), (3, 400), (400, 3)])
def test_the_canvas_has_the_size_asked_for(image_size, size):
    """A bug others shipped: a loader that resized to 512 instead of 1333 went unnoticed for weeks. Also pictures
    of a single pixel or row pass through."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    whole = np.array([[0, 0, size[1], size[0]]], dtype=np.float64)
    for seed in range(8):
        canvas = TrainTransform(image_size)(image, whole, rng(seed))
        assert canvas.image.shape == (3, image_size, image_size)
        assert canvas.image.dtype == torch.uint8
        assert max(canvas.valid_size) <= image_size
    canvas = EvalTransform(image_size)(image, whole)
    assert canvas.image.shape == (3, image_size, image_size)
    assert max(canvas.valid_size) == image_size
    assert canvas.boxes[0] == pytest.approx([0, 0, *canvas.valid_fraction], abs=1e-6)


def test_the_scale_really_shrinks_and_grows_objects():
    """A bug others shipped: pictures scaled down were cut and blown up again, so no object ever got smaller."""
    image, box = painted((100, 100), (40, 40, 60, 60)), (40, 40, 60, 60)
    for scale in (0.3, 0.5, 0.8, 1.0):
        canvas = run(TrainTransform(100, scale, scale, flip=0), image, [box])
        width, height = extent(canvas.image)[2:] - extent(canvas.image)[:2]
        assert width == pytest.approx(20 * scale, abs=1.1)
        assert height == pytest.approx(20 * scale, abs=1.1)
        assert canvas.boxes[0] * 100 == pytest.approx(np.array(box) * scale, abs=1e-3)
        assert canvas.valid_size == (round(100 * scale), round(100 * scale))
    widths = []
    for seed in range(30):
        canvas = run(TrainTransform(100, 2, 2, flip=0), image, [box], seed)
        assert canvas.valid_size == (100, 100)
        if len(canvas.boxes):
            widths.append((canvas.boxes[0, 2] - canvas.boxes[0, 0]) * 100)
    assert max(widths) == pytest.approx(40, abs=1e-3)


def test_the_scale_covers_its_whole_range_evenly():
    image = painted((64, 64), (0, 0, 64, 64))
    sides = [run(TrainTransform(64, 0.3, 1.0), image, [], seed).valid_size[0] / 64 for seed in range(300)]
    assert min(sides) < 0.33
    assert max(sides) > 0.97
    assert np.mean(sides) == pytest.approx(0.65, abs=0.04)


def test_padding_is_grey_on_all_channels():
    """A bug others shipped: a fill of one number came out as dark red."""
    assert PAD_VALUE == 76
    image = painted((50, 100), (0, 0, 100, 50))
    shrunk = run(TrainTransform(96, 0.5, 0.5), image, [])
    for canvas in (shrunk, EvalTransform(96)(image)):
        height, width = canvas.valid_size
        assert height < 96
        assert (canvas.image[:, height:] == 76).all()
        assert (canvas.image[:, :, width:] == 76).all()
        assert (canvas.image[:, :height, :width] == PURE[:, None, None]).all()  # the picture is in the top left corner


def test_content_is_the_covered_part():
    canvas = EvalTransform(100)(torch.zeros(3, 50, 200, dtype=torch.uint8))
    assert canvas.valid_size == (25, 100)
    assert canvas.valid_fraction == (1.0, 0.25)


def coordinates(side: int) -> torch.Tensor:
    """A picture whose red tells the column and whose green tells the row."""
    ramp = torch.arange(side, dtype=torch.uint8)
    return torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side).byte()])


def test_the_crop_has_one_offset_for_both_axes():
    """The authors draw one number for y and x."""
    offsets = []
    for seed in range(60):
        canvas = run(TrainTransform(60, 2, 2, flip=0), coordinates(120), [], seed)  # 120 pixels at their own size
        left, top = canvas.image[:2, 0, 0].tolist()
        assert left == top
        assert canvas.image[:2, -1, -1].tolist() == [left + 59, top + 59]
        offsets.append(left)
    assert min(offsets) < 8
    assert max(offsets) > 52
    assert max(offsets) <= 60


def test_half_of_the_pictures_are_flipped_with_their_boxes():
    image, box = painted((100, 100), (10, 20, 30, 60)), (10, 20, 30, 60)
    flips = []
    for seed in range(200):
        canvas = run(TrainTransform(100, 1, 1), image, [box], seed)
        assert (canvas.boxes[0] * 100).tolist() in ([10, 20, 30, 60], [70, 20, 90, 60])
        assert np.abs(extent(canvas.image) - canvas.boxes[0] * 100).max() == 0
        flips.append(canvas.boxes[0, 0] > 0.5)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.14)
    assert run(TrainTransform(100, 1, 1, flip=1), image, [box]).boxes[0, 0] == pytest.approx(0.7)
    assert run(TrainTransform(100, 1, 1, flip=0), image, [box]).boxes[0, 0] == pytest.approx(0.1)


def test_boxes_beyond_the_picture_are_clipped():
    """A bug others shipped: a box that reached 0.01 pixels beyond the picture killed the worker."""
    image = painted((80, 100), (0, 0, 50, 50))
    boxes = np.array([[-0.01, -5, 50, 50], [60, 60, 100.01, 300]])
    canvas = EvalTransform(100)(image, boxes)
    assert canvas.boxes == pytest.approx(np.array([[0, 0, 0.5, 0.5], [0.6, 0.6, 1.0, 0.8]]), abs=1e-6)
    for seed in range(30):
        canvas = run(TrainTransform(64), image, boxes, seed)
        assert (canvas.boxes >= 0).all()
        assert (canvas.boxes[:, [0, 2]] <= canvas.valid_fraction[0] + 1e-9).all()
        assert (canvas.boxes[:, [1, 3]] <= canvas.valid_fraction[1] + 1e-9).all()


def test_boxes_that_are_cropped_away_are_reported():
    """Labels are matched to boxes through `kept`: were it wrong, boxes would get their neighbours' classes."""
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = np.array([[0, 0, 20, 20], [80, 80, 99, 99], [45, 40, 55, 60], [30, 30, 30, 50], [120, 120, 130, 130]])
    seen = set()
    for seed in range(60):
        canvas = run(TrainTransform(50, 1.9, 2, flip=0), image, boxes, seed)
        assert canvas.kept.dtype == np.int64
        assert len(canvas.kept) == len(canvas.boxes)
        assert not {3, 4} & set(canvas.kept.tolist())  # no area; outside the picture
        sizes = (canvas.boxes[:, 2:] - canvas.boxes[:, :2]) * 50
        assert (sizes > 0).all()
        given = boxes[canvas.kept]
        assert (sizes <= given[:, 2:] - given[:, :2] + 1e-3).all()
        seen.add(tuple(canvas.kept.tolist()))
    assert {(0, 2), (1, 2)} <= seen


def test_no_boxes():
    for boxes in (np.zeros((0, 4)), None):
        canvas = EvalTransform(64)(painted((30, 40), (0, 0, 5, 5)), boxes)
        assert canvas.boxes.shape == (0, 4)
        assert canvas.kept.shape == (0,)
    canvas = run(TrainTransform(64), painted((30, 40), (0, 0, 5, 5)), [])
    assert canvas.boxes.shape == (0, 4)


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (33, 47), (1, 1), (3, 500), (1333, 800)])
@pytest.mark.parametrize("side", [64, 640])
def test_to_original_pixels_inverts_the_eval_transform(size, side):
    """Nothing is rounded on the way: 1e-3 pixels is float32."""
    corners = np.sort(rng().random((20, 2, 2)), axis=1) * [size[1], size[0]]
    boxes = corners.reshape(20, 4)
    canvas = EvalTransform(side)(torch.zeros(3, *size, dtype=torch.uint8), boxes)
    back = to_original_pixels(canvas.boxes, side, canvas.valid_size, size)
    assert np.abs(back - boxes[canvas.kept]).max() <= 1e-3


def test_boxes_in_the_padding_are_clipped_to_the_picture():
    found = to_original_pixels(np.array([[0.2, 0.1, 1.0, 0.9]]), 100, (50, 100), (500, 1000))
    assert found.tolist() == [[200, 100, 1000, 500]]


def test_fitted_size_keeps_the_aspect_and_fills_the_longer_side():
    assert resized_size((480, 640), 640) == (480, 640)
    assert resized_size((427, 640), 320) == (213, 320)
    assert resized_size((1, 1000), 64) == (1, 64)
    for length in range(1, 400):
        for side in (64, 640):
            assert resized_size((length, 400), side)[1] == side
            assert resized_size((length, length), side) == (side, side)


def test_identical_generators_give_identical_results():
    image, boxes = coordinates(100), np.array([[10.0, 20, 60, 70]])
    transform = TrainTransform(64, iou_crop=True)
    for seed in range(5):
        first, again = run(transform, image, boxes, seed), run(transform, image, boxes, seed)
        assert torch.equal(first.image, again.image)
        np.testing.assert_array_equal(first.boxes, again.boxes)
    assert not torch.equal(run(transform, image, boxes, 1).image, run(transform, image, boxes, 2).image)


def test_the_given_image_and_boxes_are_not_changed():
    image, boxes = coordinates(100), np.array([[-5.0, 20, 160, 70]])
    EvalTransform(100)(image, boxes)
    for seed in range(5):
        TrainTransform(100, 1, 1, iou_crop=True)(image, boxes, rng(seed))
    assert torch.equal(image, coordinates(100))
    assert boxes.tolist() == [[-5.0, 20, 160, 70]]


# -- options ---------------------------------------------------------------------------------------


def test_an_independent_crop_draws_each_offset_for_itself():
    """The authors' shares one: crops of a square picture lie on its diagonal. Large-scale jitter's do not."""
    for independent in (False, True):
        transform = TrainTransform(32, 2, 2, flip=0, independent_crop=independent)
        boxes = [(x, y, x + 1, y + 1) for x in range(32) for y in range(32)]
        seen = [run(transform, coordinates(32), boxes, seed).kept for seed in range(8)]
        corners = [(int(kept[0]) // 32, int(kept[0]) % 32) for kept in seen]  # of the part that is left
        on_the_diagonal = [x == y for x, y in corners]
        assert all(on_the_diagonal) != independent


def test_an_iou_crop_keeps_boxes_on_what_they_enclose_and_drops_those_whose_centre_is_outside():
    image, box = painted((100, 100), (20, 30, 70, 80)), (20, 30, 70, 80)
    transform = TrainTransform(100, 1, 1, flip=0, iou_crop=True)
    before = torch.random.get_rng_state()
    cropped = 0
    for seed in range(40):
        canvas = run(transform, image, [box], seed)
        assert canvas.kept.tolist() == [0]  # some overlap with an object is what the crop is chosen for
        x1, y1, x2, y2 = canvas.boxes[0] * 100
        inside = canvas.image[:, round(y1) + 2 : round(y2) - 2, round(x1) + 2 : round(x2) - 2].float()
        assert inside.numel()
        assert (inside.flatten(1).std(1) < 2).all()  # nothing but paint
        cropped += abs((x2 - x1) - 50) > 2
    assert cropped > 15
    assert torch.equal(torch.random.get_rng_state(), before)
    far = run(transform, image, [box, (0, 0, 4, 4)], 3)
    assert far.kept.tolist() in ([0], [0, 1], [1])
    lost = [run(transform, image, [box, (0, 0, 4, 4)], seed) for seed in range(40)]
    assert 5 < sum(len(canvas.kept) == 1 for canvas in lost) < 40


def test_an_iou_crop_of_a_picture_without_objects_leaves_it():
    plain = run(TrainTransform(64), coordinates(64), [], 5)
    assert torch.equal(run(TrainTransform(64, iou_crop=True), coordinates(64), [], 5).image, plain.image)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2, 50), (3, 3), (4, 5)])
def test_pictures_of_a_few_pixels_go_through_every_option(size):
    transform = TrainTransform(32, 0.1, iou_crop=True, independent_crop=True)
    for seed in range(20):
        canvas = transform(torch.zeros(3, *size, dtype=torch.uint8), np.array([[0.0, 0, size[1], size[0]]]), rng(seed))
        assert canvas.image.shape == (3, 32, 32)
