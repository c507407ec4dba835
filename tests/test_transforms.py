"""Geometry is checked on pixels: a colored rectangle and its box must undergo the same transform."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from pix2seq.color_augmentation import MAX_COLOR_OPS, ColorAugmentation, ColorOp, apply_color_ops
from pix2seq.transforms import (
    PAD_VALUE,
    EvalTransform,
    PaddedImage,
    TrainTransform,
    join_quadrants,
    resized_size,
    to_original_pixels,
)

GREEN = torch.tensor([0, 255, 0], dtype=torch.uint8)


def image_with(box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """A black image (height, width) with a green box xyxy."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = GREEN[:, None, None]
    return image


def find_green(image: torch.Tensor) -> np.ndarray | None:
    """The box xyxy of the green pixels. Black and the gray padding are not green."""
    green = (image[1].int() - image[0].int()) > 127
    if not green.any():
        return None
    y, x = torch.nonzero(green.any(1)).flatten(), torch.nonzero(green.any(0)).flatten()
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1])


def coordinate_image(side: int) -> torch.Tensor:
    """An image whose red channel is x and whose green channel is y."""
    ramp = torch.arange(side, dtype=torch.uint8)
    return torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side).byte()])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(transform: TrainTransform, image: torch.Tensor, boxes, seed: int = 0) -> PaddedImage:
    return transform(image, np.array(boxes, dtype=np.float64).reshape(-1, 4), rng(seed))


@pytest.mark.parametrize("size", [(90, 120), (150, 100), (64, 64), (40, 200)])
def test_boxes_follow_the_pixels_in_training(size):
    box = (size[1] // 4, size[0] // 3, size[1] * 3 // 4, size[0] * 5 // 6)
    num_visible = 0
    for seed in range(60):
        padded = run(TrainTransform(96), image_with(box, size), [box], seed)
        green = find_green(padded.image)
        if len(padded.boxes) == 0:  # at most one pixel of the box is left at the border
            assert green is None or min(green[2:] - green[:2]) <= 1
        elif green is None:
            assert ((padded.boxes[0, 2:] - padded.boxes[0, :2]) * 96).min() <= 1.5
        else:
            assert np.abs(padded.boxes[0] * 96 - green).max() <= 1.5
            num_visible += 1
    assert num_visible > 40


@pytest.mark.parametrize("size", [(90, 120), (33, 47), (200, 40), (96, 96), (300, 500)])
def test_boxes_follow_the_pixels_in_evaluation(size):
    box = (size[1] // 4, size[0] // 3, size[1] * 3 // 4, size[0] * 5 // 6)
    padded = EvalTransform(96)(image_with(box, size), np.array([box], dtype=np.float64))
    assert np.abs(padded.boxes[0] * 96 - find_green(padded.image)).max() <= 1.5


@pytest.mark.parametrize("image_size", [32, 96, 130])
@pytest.mark.parametrize("size", [(20, 30), (100, 60), (96, 96), (1, 1), (3, 400), (400, 3)])
def test_padded_images_have_the_requested_size(image_size, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    whole = np.array([[0, 0, size[1], size[0]]], dtype=np.float64)
    transforms = (TrainTransform(image_size), TrainTransform(image_size, 0.1, iou_crop=True, independent_crop=True))
    for seed in range(8):
        for transform in transforms:
            padded = transform(image, whole, rng(seed))
            assert padded.image.shape == (3, image_size, image_size)
            assert padded.image.dtype == torch.uint8
            assert max(padded.valid_size) <= image_size
    padded = EvalTransform(image_size)(image, whole)
    assert padded.image.shape == (3, image_size, image_size)
    assert max(padded.valid_size) == image_size
    assert padded.boxes[0] == pytest.approx([0, 0, *padded.valid_fraction], abs=1e-6)


def test_scale_jitter_changes_the_size_of_objects():
    """Enlarging shrunken images again, a common bug, would keep the size of objects."""
    box = (40, 40, 60, 60)
    image = image_with(box, (100, 100))
    for scale in (0.3, 0.5, 0.8, 1.0):
        padded = run(TrainTransform(100, scale, scale, flip=0), image, [box])
        green = find_green(padded.image)
        assert green[2:] - green[:2] == pytest.approx(20 * scale, abs=1.1)
        assert padded.boxes[0] * 100 == pytest.approx(np.array(box) * scale, abs=1e-3)
        assert padded.valid_size == (round(100 * scale), round(100 * scale))
    enlarged = [run(TrainTransform(100, 2, 2, flip=0), image, [box], seed) for seed in range(30)]
    assert {padded.valid_size for padded in enlarged} == {(100, 100)}
    widths = [100 * (boxes[0, 2] - boxes[0, 0]) for boxes in (padded.boxes for padded in enlarged) if len(boxes)]
    assert max(widths) == pytest.approx(40, abs=1e-3)


def test_the_scale_is_uniform():
    image = image_with((0, 0, 64, 64), (64, 64))
    scales = [run(TrainTransform(64, 0.3, 1.0), image, [], seed).valid_size[0] / 64 for seed in range(300)]
    assert min(scales) < 0.33
    assert max(scales) > 0.97
    assert np.mean(scales) == pytest.approx(0.65, abs=0.04)


def test_padding_is_gray_at_the_right_and_the_bottom():
    image = image_with((0, 0, 100, 50), (50, 100))
    for padded in (run(TrainTransform(96, 0.5, 0.5), image, []), EvalTransform(96)(image)):
        height, width = padded.valid_size
        assert height < 96
        assert (padded.image[:, height:] == PAD_VALUE).all()
        assert (padded.image[:, :, width:] == PAD_VALUE).all()
        assert (padded.image[:, :height, :width] == GREEN[:, None, None]).all()
    assert padded.valid_size == (48, 96)
    assert padded.valid_fraction == (1.0, 0.5)


@pytest.mark.parametrize("independent", [False, True])
def test_crop_offsets(independent):
    """By default, x and y share one random number, as in the authors' code."""
    transform = TrainTransform(60, 2, 2, flip=0, independent_crop=independent)
    offsets = []
    for seed in range(60):
        padded = run(transform, coordinate_image(120), [], seed)  # not resized: 120 = 2 * 60
        left, top = padded.image[:2, 0, 0].tolist()
        assert padded.image[:2, -1, -1].tolist() == [left + 59, top + 59]
        offsets.append((left, top))
    assert all(left == top for left, top in offsets) != independent
    assert min(min(offsets)) < 8
    assert 52 < max(max(offsets)) <= 60


def test_half_of_the_images_are_flipped_with_their_boxes():
    box = (10, 20, 30, 60)
    image, flipped = image_with(box, (100, 100)), []
    for seed in range(200):
        padded = run(TrainTransform(100, 1, 1), image, [box], seed)
        assert (padded.boxes[0] * 100).tolist() in ([10, 20, 30, 60], [70, 20, 90, 60])
        assert np.abs(find_green(padded.image) - padded.boxes[0] * 100).max() == 0
        flipped.append(padded.boxes[0, 0] > 0.5)
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.14)
    assert run(TrainTransform(100, 1, 1, flip=1), image, [box]).boxes[0, 0] == pytest.approx(0.7)
    assert run(TrainTransform(100, 1, 1, flip=0), image, [box]).boxes[0, 0] == pytest.approx(0.1)


def test_boxes_beyond_the_image_are_clipped():
    image = image_with((0, 0, 50, 50), (80, 100))
    boxes = np.array([[-0.01, -5, 50, 50], [60, 60, 100.01, 300]])
    padded = EvalTransform(100)(image, boxes)
    assert padded.boxes == pytest.approx(np.array([[0, 0, 0.5, 0.5], [0.6, 0.6, 1.0, 0.8]]), abs=1e-6)
    for seed in range(30):
        padded = run(TrainTransform(64), image, boxes, seed)
        assert (padded.boxes >= 0).all()
        assert (padded.boxes[:, [0, 2]] <= padded.valid_fraction[0] + 1e-9).all()
        assert (padded.boxes[:, [1, 3]] <= padded.valid_fraction[1] + 1e-9).all()


def test_kept_indexes_the_boxes_that_remain():
    """Labels are selected with `kept`; if it were wrong, boxes would get the classes of other boxes."""
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = np.array([[0, 0, 20, 20], [80, 80, 99, 99], [45, 40, 55, 60], [30, 30, 30, 50], [120, 120, 130, 130]])
    kept = set()
    for seed in range(60):
        padded = run(TrainTransform(50, 1.9, 2, flip=0), image, boxes, seed)
        assert padded.kept.dtype == np.int64
        assert len(padded.kept) == len(padded.boxes)
        assert not {3, 4} & set(padded.kept.tolist())  # no area; outside the image
        sizes = (padded.boxes[:, 2:] - padded.boxes[:, :2]) * 50
        original = boxes[padded.kept]
        assert (sizes > 0).all()
        assert (sizes <= original[:, 2:] - original[:, :2] + 1e-3).all()
        kept.add(tuple(padded.kept.tolist()))
    assert {(0, 2), (1, 2)} <= kept


def test_no_boxes():
    image = coordinate_image(40)
    for padded in (
        EvalTransform(64)(image),
        EvalTransform(64)(image, np.zeros((0, 4))),
        run(TrainTransform(64), image, []),
    ):
        assert padded.boxes.shape == (0, 4)
        assert padded.kept.shape == (0,)


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (33, 47), (1, 1), (3, 500), (1333, 800)])
@pytest.mark.parametrize("side", [64, 640])
def test_to_original_pixels_inverts_the_eval_transform(size, side):
    corners = np.sort(rng().random((20, 2, 2)), axis=1) * [size[1], size[0]]
    boxes = corners.reshape(20, 4)
    padded = EvalTransform(side)(torch.zeros(3, *size, dtype=torch.uint8), boxes)
    original = to_original_pixels(padded.boxes, side, padded.valid_size, size)
    assert np.abs(original - boxes[padded.kept]).max() <= 1e-3  # float32 precision


def test_to_original_pixels_clips_boxes_in_the_padding():
    boxes = to_original_pixels(np.array([[0.2, 0.1, 1.0, 0.9]]), 100, (50, 100), (500, 1000))
    assert boxes.tolist() == [[200, 100, 1000, 500]]


def test_resized_size_keeps_the_aspect_ratio_and_fills_the_longer_side():
    assert resized_size((480, 640), 640) == (480, 640)
    assert resized_size((427, 640), 320) == (213, 320)
    assert resized_size((1, 1000), 64) == (1, 64)
    for length in range(1, 400):
        for side in (64, 640):
            assert resized_size((length, 400), side)[1] == side
            assert resized_size((length, length), side) == (side, side)


def test_the_generator_determines_the_transform():
    image, boxes, transform = coordinate_image(100), np.array([[10.0, 20, 60, 70]]), TrainTransform(64, iou_crop=True)
    for seed in range(5):
        first, again = run(transform, image, boxes, seed), run(transform, image, boxes, seed)
        assert torch.equal(first.image, again.image)
        np.testing.assert_array_equal(first.boxes, again.boxes)
    assert not torch.equal(run(transform, image, boxes, 1).image, run(transform, image, boxes, 2).image)


def test_arguments_are_not_modified():
    image, boxes = coordinate_image(100), np.array([[-5.0, 20, 160, 70]])
    EvalTransform(100)(image, boxes)
    for seed in range(5):
        TrainTransform(100, 1, 1, iou_crop=True)(image, boxes, rng(seed))
    assert torch.equal(image, coordinate_image(100))
    assert boxes.tolist() == [[-5.0, 20, 160, 70]]


def test_iou_crop_keeps_boxes_on_their_objects():
    box = (20, 30, 70, 80)
    image, transform = image_with(box, (100, 100)), TrainTransform(100, 1, 1, flip=0, iou_crop=True)
    state = torch.random.get_rng_state()
    num_cropped = 0
    for seed in range(40):
        padded = run(transform, image, [box], seed)
        assert padded.kept.tolist() == [0]  # the crop overlaps with at least one object
        x1, y1, x2, y2 = padded.boxes[0] * 100
        inside = padded.image[:, round(y1) + 2 : round(y2) - 2, round(x1) + 2 : round(x2) - 2].float()
        assert inside.numel()
        assert (inside.flatten(1).std(1) < 2).all()  # all pixels are green
        num_cropped += abs((x2 - x1) - 50) > 2
    assert num_cropped > 15
    assert torch.equal(torch.random.get_rng_state(), state)


def test_iou_crop_removes_objects_whose_center_is_outside():
    boxes = [(20, 30, 70, 80), (0, 0, 4, 4)]
    transform = TrainTransform(100, 1, 1, flip=0, iou_crop=True)
    kept = [run(transform, image_with(boxes[0], (100, 100)), boxes, seed).kept for seed in range(40)]
    assert 5 < sum(len(indices) == 1 for indices in kept) < 40
    plain = run(TrainTransform(64), coordinate_image(64), [], 5)  # without objects there is no crop
    assert torch.equal(run(TrainTransform(64, iou_crop=True), coordinate_image(64), [], 5).image, plain.image)


# -- color -----------------------------------------------------------------------------------------


def draw_ops(augmentation: ColorAugmentation, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Ops and amounts (count, MAX_COLOR_OPS)."""
    draws = np.stack([augmentation.draw(rng(seed)) for seed in range(count)])
    assert draws.shape == (count, MAX_COLOR_OPS, 2)
    return draws[..., 0], draws[..., 1]


def random_batch(size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


def test_color_augmentation_is_false_without_options():
    assert not ColorAugmentation()
    assert all((ColorAugmentation(jitter=0.1), ColorAugmentation(grayscale=0.1), ColorAugmentation(photometric=True)))


def test_color_jitter_has_the_parameters_of_simclr():
    ops, amounts = draw_ops(ColorAugmentation(jitter=0.5))
    applied = ops[:, 0] != ColorOp.NONE
    assert 0.73 < applied.mean() < 0.87
    limits = {op: (0.6, 1.4) for op in (ColorOp.BRIGHTNESS, ColorOp.CONTRAST, ColorOp.SATURATION)}
    for op, (low, high) in (limits | {ColorOp.HUE: (-0.1, 0.1)}).items():
        values = amounts[ops == op]
        assert len(values) == applied.sum()
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
    assert len({tuple(order) for order in ops[applied, :4]}) > 20  # of 24 permutations


def test_grayscale_has_its_probability():
    assert 0.13 < (draw_ops(ColorAugmentation(grayscale=0.2))[0] == ColorOp.GRAYSCALE).any(axis=1).mean() < 0.27
    assert (draw_ops(ColorAugmentation(grayscale=1.0))[0][:, 0] == ColorOp.GRAYSCALE).all()


def test_photometric_distortion_has_the_parameters_of_torchvision():
    ops, amounts = draw_ops(ColorAugmentation(photometric=True))
    limits = {
        ColorOp.BRIGHTNESS: (0.875, 1.125),
        ColorOp.CONTRAST: (0.5, 1.5),
        ColorOp.SATURATION: (0.5, 1.5),
        ColorOp.HUE: (-0.05, 0.05),
    }
    for op, (low, high) in limits.items():
        values = amounts[ops == op]
        assert 0.42 < len(values) / 400 < 0.58
        assert low <= values.min() < values.max() <= high
    assert set(amounts[ops == ColorOp.PERMUTE_CHANNELS]) == set(range(6))
    positions = [
        (list(row).index(ColorOp.CONTRAST), list(row).index(ColorOp.SATURATION)) for row in ops if {2, 3} <= {*row}
    ]
    assert 0.3 < np.mean([contrast < saturation for contrast, saturation in positions]) < 0.7


def test_all_color_options_together_fit_into_one_array():
    draw_ops(ColorAugmentation(jitter=0.5, grayscale=0.5), 300)
    draw_ops(ColorAugmentation(photometric=True, grayscale=0.5), 300)


@pytest.mark.parametrize(
    ("op", "amount", "reference"),
    [
        (ColorOp.BRIGHTNESS, 0.5, lambda image: F.adjust_brightness(image, 0.5)),
        (ColorOp.CONTRAST, 1.5, lambda image: F.adjust_contrast(image, 1.5)),
        (ColorOp.SATURATION, 0.25, lambda image: F.adjust_saturation(image, 0.25)),
        (ColorOp.HUE, 0.125, lambda image: F.adjust_hue(image, 0.125)),
        (ColorOp.GRAYSCALE, 0, lambda image: F.rgb_to_grayscale(image, 3)),
        (ColorOp.PERMUTE_CHANNELS, 3, lambda image: image[[1, 2, 0]]),
    ],
)
def test_color_ops_are_those_of_torchvision_and_keep_the_padding(op, amount, reference):
    pixels = random_batch()
    pixels[:, :, 16:], pixels[:, :, :, 20:] = PAD_VALUE, PAD_VALUE
    color_ops = torch.zeros(2, MAX_COLOR_OPS, 2)
    color_ops[1, 0] = torch.tensor([op, amount])
    original = pixels.clone()
    result = apply_color_ops(pixels, torch.tensor([[24, 24], [16, 20]]), color_ops)
    assert torch.equal(pixels, original)
    assert torch.equal(result[0], pixels[0])
    assert torch.equal(result[1, :, :16, :20], reference(pixels[1, :, :16, :20]))
    assert (result[1, :, 16:] == PAD_VALUE).all()
    assert (result[1, :, :, 20:] == PAD_VALUE).all()


def test_color_ops_are_applied_in_order():
    pixels, sizes = random_batch(), torch.tensor([[24, 24]] * 2)
    color_ops = torch.zeros(2, MAX_COLOR_OPS, 2)
    color_ops[:, 0] = torch.tensor([ColorOp.BRIGHTNESS, 1.8])
    color_ops[:, 1] = torch.tensor([ColorOp.GRAYSCALE, 0.0])
    expected = torch.stack([F.rgb_to_grayscale(F.adjust_brightness(image, 1.8), 3) for image in pixels])
    assert torch.equal(apply_color_ops(pixels, sizes, color_ops), expected)
    assert not torch.equal(apply_color_ops(pixels, sizes, color_ops.flip(1)), expected)


# -- mosaic ----------------------------------------------------------------------------------------


def test_quadrants_are_joined_with_their_boxes():
    rectangles = [(3, 5, 9, 11), (0, 0, 4, 20), (12, 2, 20, 8), (7, 7, 13, 19)]
    parts = [EvalTransform(20)(image_with(box, (20, 20)), np.array([box], dtype=float)) for box in rectangles]
    joined = join_quadrants(parts)
    assert joined.image.shape == (3, 40, 40)
    assert joined.valid_size == (40, 40)
    for number, (box, (left, top)) in enumerate(zip(joined.boxes, [(0, 0), (20, 0), (0, 20), (20, 20)], strict=True)):
        quadrant = joined.image[:, top : top + 20, left : left + 20]
        assert find_green(quadrant).tolist() == list(rectangles[number])
        np.testing.assert_allclose(box * 40, np.add(rectangles[number], (left, top, left, top)))


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_objects_of_a_quadrant_keep_their_size(scale):
    """The transform to a quarter crops more, and does not scale down further."""
    transform = TrainTransform(64, scale_min=scale, scale_max=scale, flip=0)
    image, boxes = image_with((44, 46, 54, 54), (100, 100)), np.array([[44.0, 46, 54, 54]])
    for seed in range(20):
        whole = transform(image, boxes, np.random.default_rng(seed))
        part = transform.of_quadrant()(image, boxes, np.random.default_rng(seed))
        assert part.image.shape == (3, 32, 32)
        if all(len(result.boxes) and result.boxes.min() > 0 and result.boxes.max() < 1 for result in (whole, part)):
            sizes = [np.diff(result.boxes.reshape(2, 2), axis=0) * result.image.shape[-1] for result in (whole, part)]
            np.testing.assert_allclose(*sizes)
            return
    pytest.fail("no quadrant with the whole object")
