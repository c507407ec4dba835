"""Training examples, their order, and the batches of training and evaluation."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.color_augmentation import ColorAugmentation
from pix2seq.data import (
    EvalDataset,
    Split,
    StepSampler,
    TrainDataset,
    eval_loader,
    find_split,
    load_annotations,
    train_loader,
)
from pix2seq.errors import UserError
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import NOISE_LABEL, Tokenizer
from pix2seq.training.datasets import load_data
from pix2seq.transforms import EvalTransform, TrainTransform


@pytest.fixture
def annotations(shapes_root):
    return load_annotations(find_split("train", shapes_root))


@pytest.fixture
def dataset(annotations):
    return TrainDataset(
        annotations,
        TrainTransform(48),
        SequenceBuilder(Tokenizer(4, 200), max_objects=8),
        seed=7,
        colors=ColorAugmentation(0.3),
    )


def is_same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[key]), np.asarray(b[key])) for key in a)


def take(iterable, count: int) -> list:
    iterator = iter(iterable)
    return [next(iterator) for _ in range(count)]


def take_keys(sampler: StepSampler, count: int) -> list[tuple[int, int, int]]:
    return [key for batch in take(sampler, count) for key in batch]


# -- training examples -----------------------------------------------------------------------------


def test_mosaic_joins_four_images(dataset):
    """No box crosses the middle, and each quadrant has objects."""
    mosaic = replace(dataset, mosaic=1.0, transform=TrainTransform(48, 1.0, 1.0))
    num_boxes = np.zeros(4, int)
    for index in range(len(dataset.annotations)):
        example = mosaic[0, index, 0]
        assert is_same(example, mosaic[0, index, 0])
        assert example["pixel_values"].shape == (3, 48, 48)
        assert example["image_id"] == dataset.annotations.image_ids[index]
        boxes, labels = dataset.sequence_builder.tokenizer.decode(example["labels"])
        boxes = boxes[labels != NOISE_LABEL]
        is_second = boxes[:, :2] > 0.5 - 0.01
        assert (boxes[:, 2:][~is_second] < 0.5 + 0.01).all()
        num_boxes += np.bincount(is_second @ [1, 2], minlength=4)
    assert (num_boxes > 0).all()


def test_mosaic_needs_an_even_image_size(shapes_root):
    words = ["--root", str(shapes_root), "--mosaic", "0.5", "--image_size", "65"]
    with pytest.raises(UserError, match="needs an even --image_size, not 65"):
        load_data(parse(TrainArguments, words))


def test_training_example(dataset):
    example = dataset[0, 3, 0]
    assert example["pixel_values"].shape == (3, 48, 48)
    assert example["pixel_values"].dtype == torch.uint8
    assert example["image_id"] == dataset.annotations.image_ids[3]
    assert [example[key].shape for key in ("input_ids", "labels", "token_weights")] == [(40,)] * 3


def test_an_example_depends_on_seed_epoch_index_and_copy_only(dataset):
    first = dataset[2, 5, 0]
    for key in ((0, 0, 0), (2, 4, 0), (9, 5, 1)):
        dataset[key]
    torch.manual_seed(123)
    assert is_same(first, dataset[2, 5, 0])
    assert is_same(first, replace(dataset)[2, 5, 0])
    assert not is_same(first, replace(dataset, seed=8)[2, 5, 0])
    keys = [(2, 5, 0), (3, 5, 0), (4, 5, 0), (2, 5, 1), (2, 5, 2)]
    assert len({dataset[key]["pixel_values"].numpy().tobytes() for key in keys}) == len(keys)


def test_examples_do_not_depend_on_the_number_of_workers(dataset):
    loaders = [
        train_loader(dataset, StepSampler(len(dataset.annotations), 3, seed=1), num_workers, pin_memory=False)
        for num_workers in (0, 1, 2)
    ]
    for expected, *others in zip(*(take(loader, 6) for loader in loaders), strict=True):
        assert expected["pixel_values"].shape == (3, 3, 48, 48)
        assert all(is_same(expected, other) for other in others)


def write_image(folder, pixels: np.ndarray, boxes: list[list[int]]) -> Split:
    """Writes a dataset of one image, whose boxes (xywh) have the categories 10, 20, ..."""
    Image.fromarray(pixels).save(folder / "image.png")
    content = {
        "images": [{"id": 9, "file_name": "image.png"}],
        "annotations": [
            {"id": n, "image_id": 9, "category_id": 10 * n, "bbox": box} for n, box in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 10 * n, "name": str(n)} for n in range(1, len(boxes) + 1)],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return Split(folder, folder / "annotations.json")


@pytest.mark.parametrize("noise_objects", [True, False])
def test_boxes_in_the_labels_enclose_the_object(tmp_path, noise_objects):
    """Compares decoded labels with green pixels, which reveals errors of size, order and position in any step."""
    side = 96
    pixels = np.zeros((100, 130, 3), np.uint8)
    pixels[20:80, 30:70] = [0, 255, 0]
    split = write_image(tmp_path, pixels, [[30, 20, 40, 60]])
    builder = SequenceBuilder(Tokenizer(1, 1000), max_objects=5, noise_objects=noise_objects)
    dataset = TrainDataset(load_annotations(split), TrainTransform(side), builder, seed=0)
    num_checked = 0
    for epoch in range(40):
        example = dataset[epoch, 0, 0]
        boxes, labels = builder.tokenizer.decode(example["labels"])
        boxes = boxes[labels != NOISE_LABEL] * side
        image = example["pixel_values"].int()
        green = (image[1] - image[0]) > 127
        if len(boxes) == 0 or not green.any():  # cropped, or too thin for either
            assert len(boxes) == 0 or (boxes[0, 2:] - boxes[0, :2]).min() < 2
            assert not green.any() or min(green.any(0).sum(), green.any(1).sum()) < 2
            continue
        y, x = torch.nonzero(green.any(1)).flatten(), torch.nonzero(green.any(0)).flatten()
        assert len(boxes) == 1
        assert np.abs(boxes[0] - np.array([x[0], y[0], x[-1] + 1, y[-1] + 1])).max() <= 1.6
        num_checked += 1
    assert num_checked > 25


def test_labels_belong_to_their_boxes_after_a_crop(tmp_path):
    num_classes, side = 6, 80
    pixels = np.zeros((60, 90, 3), np.uint8)
    corners = [(30 * (label % 3) + 5, 30 * (label // 3) + 5) for label in range(num_classes)]
    for label, (x, y) in enumerate(corners):
        pixels[y : y + 20, x : x + 20, 0] = 40 * (label + 1)  # the color of a box is its class
    split = write_image(tmp_path, pixels, [[x, y, 20, 20] for x, y in corners])
    builder = SequenceBuilder(Tokenizer(num_classes, 1000), max_objects=10)
    dataset = TrainDataset(load_annotations(split), TrainTransform(side, scale_min=1.2), builder, seed=0)
    num_cropped, num_checked = 0, 0
    for epoch in range(30):
        example = dataset[epoch, 0, 0]
        boxes, labels = builder.tokenizer.decode(example["labels"])
        boxes, labels = boxes[labels != NOISE_LABEL] * side, labels[labels != NOISE_LABEL]
        num_cropped += len(boxes) < num_classes
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            if min(x2 - x1, y2 - y1) > 6:
                color = example["pixel_values"][0, int((y1 + y2) / 2), int((x1 + x2) / 2)]
                assert round(int(color) / 40) - 1 == label
                num_checked += 1
    assert num_cropped > 5
    assert num_checked > 60


# -- the order of training -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "batch_size"), [(12, 4), (13, 4), (7, 2), (3, 8), (1, 4), (5, 5)])
def test_an_epoch_has_every_image_once(num_images, batch_size):
    """Also if a batch spans two epochs or is larger than the dataset."""
    keys = take_keys(StepSampler(num_images, batch_size, seed=3), -(-3 * num_images // batch_size))
    for epoch in range(3):
        epochs, indices, _ = zip(*keys[epoch * num_images : (epoch + 1) * num_images], strict=True)
        assert set(epochs) == {epoch}
        assert sorted(indices) == list(range(num_images))


def test_the_order_depends_on_epoch_and_seed():
    keys = take_keys(StepSampler(50, 10, seed=3), 15)
    orders = {tuple(index for epoch, index, _ in keys if epoch == e) for e in range(3)}
    orders |= {tuple(range(50)), tuple(index for _, index, _ in take_keys(StepSampler(50, 10, seed=4), 5))}
    assert len(orders) == 5


def samples_by_step(batch_size: int, accumulation: int, world_size: int, start: int, count: int) -> list[Counter]:
    """The samples of each optimizer step, over all processes and micro-batches."""
    steps = [Counter() for _ in range(count)]
    for rank in range(world_size):
        sampler = StepSampler(13, batch_size, accumulation, rank, world_size, seed=5, start_step=start)
        assert sampler.samples_per_step == 4
        for number, keys in enumerate(take(sampler, count * accumulation)):
            assert len(keys) == batch_size
            steps[number // accumulation].update(keys)
    return steps


@pytest.mark.parametrize("parts", [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (1, 1, 4)])
@pytest.mark.parametrize("start", [0, 1, 7, 100])
def test_a_step_does_not_depend_on_its_parts_or_the_start(parts, start):
    expected = samples_by_step(4, 1, 1, 0, start + 5)[start:]
    assert samples_by_step(*parts, start, 5) == expected
    assert all(count == 1 for step in expected for count in step.values())


def test_a_late_start_is_immediate():
    assert take_keys(StepSampler(12, 4, start_step=10**9), 1)[0][0] == 4 * 10**9 // 12


def test_batch_repetition_gives_consecutive_copies():
    sampler = StepSampler(5, 4, seed=3, repetition=2)
    assert sampler.steps_per_epoch == 2.5
    keys = take_keys(sampler, 5)
    without = take_keys(StepSampler(5, 2, seed=3), 5)
    assert keys == [(epoch, index, copy) for epoch, index, _ in without for copy in range(2)]
    for rank in range(2):
        part = StepSampler(5, 1, accumulation=2, rank=rank, world_size=2, seed=3, repetition=2)
        assert take_keys(part, 10) == keys[rank::2]


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 4, 5, 12])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_image_is_evaluated_once(annotations, num_images, batch_size):
    """The batches do not depend on the number of processes."""
    dataset = EvalDataset(annotations.subset(range(num_images)), EvalTransform(32))
    batches = []
    for world_size in (1, 2, 3):
        loaders = [eval_loader(dataset, batch_size, rank, world_size) for rank in range(world_size)]
        batches.append(sorted(tuple(batch["image_id"].tolist()) for loader in loaders for batch in loader))
        image_ids = [image_id for batch in batches[-1] for image_id in batch]
        assert sorted(image_ids) == sorted(dataset.annotations.image_ids.tolist())
    assert batches[0] == batches[1] == batches[2]


def test_evaluation_example(annotations):
    dataset = EvalDataset(annotations, EvalTransform(32))
    assert len(dataset) == 12
    example = dataset[3]
    assert example["pixel_values"].shape == (3, 32, 32)
    assert example["size"].tolist() == [32, 32]
    assert example["original_size"].tolist() == [64, 64]
    assert is_same(example, dataset[3])
