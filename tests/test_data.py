"""Examples, the order they come in and how they are shared out. The same key always gives the same example."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pix2seq.data import (
    EvalDataset,
    StepSampler,
    TrainDataset,
    eval_loader,
    find_split,
    load_annotations,
    train_loader,
)
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import NOISE_LABEL, Tokenizer
from pix2seq.transforms import ColorAugmentation, EvalTransform, TrainTransform

TOKENIZER = Tokenizer(4, 200)


@pytest.fixture
def annotations(shapes_root):
    return load_annotations(find_split("train", shapes_root))


@pytest.fixture
def dataset(annotations):
    return TrainDataset(annotations, TrainTransform(48), SequenceBuilder(TOKENIZER, 8), 7, ColorAugmentation(0.3))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[key]), np.asarray(b[key])) for key in a)


def take(iterable, count: int) -> list:
    iterator = iter(iterable)
    return [next(iterator) for _ in range(count)]


# -- training examples -----------------------------------------------------------------------------


def test_an_example_has_its_shapes(dataset):
    example = dataset[0, 3, 0]
    assert example["pixel_values"].shape == (3, 48, 48)
    assert example["pixel_values"].dtype == torch.uint8
    assert example["image_id"] == dataset.annotations.image_ids[3]
    for key in ("input_ids", "labels", "token_weights"):
        assert example[key].shape == (40,)


def test_an_example_depends_on_seed_epoch_and_index_alone(dataset, annotations):
    """A bug others shipped: what came out depended on the worker and on what it had made before."""
    first = dataset[2, 5, 0]
    for key in ((0, 0, 0), (2, 4, 0), (9, 5, 1)):
        dataset[key]
    np.random.default_rng(3)
    torch.manual_seed(123)
    assert same(first, dataset[2, 5, 0])
    twin = replace(dataset)
    assert same(first, twin[2, 5, 0])
    assert not same(first, dataset[3, 5, 0])
    assert not same(first, replace(dataset, seed=8)[2, 5, 0])


def test_epochs_differ(dataset):
    """A bug others shipped: every epoch replayed the same augmentation."""
    pictures = {dataset[epoch, 0, 0]["pixel_values"].numpy().tobytes() for epoch in range(6)}
    assert len(pictures) == 6


def test_workers_change_nothing(dataset):
    """A bug others shipped: workers forked one generator and all made the same "random" crops."""
    loaders = [
        train_loader(dataset, StepSampler(len(dataset.annotations), 3, seed=1), num_workers, pin_memory=False)
        for num_workers in (0, 2, 4)
    ]
    for alone, two, four in zip(*(take(loader, 6) for loader in loaders), strict=True):
        assert same(alone, two)
        assert same(alone, four)
        assert alone["pixel_values"].shape == (3, 3, 48, 48)


@pytest.mark.parametrize("noise_objects", [True, False])
def test_boxes_in_the_labels_enclose_the_painted_object(tmp_path, noise_objects):
    """The whole pipeline, judged by its pixels. An error of size, order, shift or placement
    anywhere between the file and the labels, as others shipped, moves the box off the paint."""
    side, box = 96, (30, 20, 70, 80)
    picture = np.zeros((100, 130, 3), np.uint8)
    picture[box[1] : box[3], box[0] : box[2]] = [0, 255, 0]
    root = tmp_path / "root"
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    Image.fromarray(picture).save(root / "train2017/one.png")
    (root / "annotations/instances_train2017.json").write_text(
        '{"images": [{"id": 9, "file_name": "one.png"}], "categories": [{"id": 4, "name": "green"}], "annotations":'
        f'[{{"id": 1, "image_id": 9, "category_id": 4, "bbox": [30, 20, {70 - 30}, {80 - 20}]}}]}}'
    )
    build = SequenceBuilder(Tokenizer(1, 1000), 5, noise_objects=noise_objects)
    data = TrainDataset(load_annotations(find_split("train", root)), TrainTransform(side), build, seed=0)
    seen = 0
    for epoch in range(40):
        example = data[epoch, 0, 0]
        assert example["pixel_values"].shape == (3, side, side)
        boxes, labels = build.tokenizer.decode(example["labels"])
        boxes = boxes[labels != NOISE_LABEL] * side
        image = example["pixel_values"].int()
        green = (image[1] - image[0]) > 127
        if len(boxes) == 0 or not green.any():
            assert len(boxes) == 0 or (boxes[0, 2:] - boxes[0, :2]).min() < 2
            assert not green.any() or min(green.any(0).sum(), green.any(1).sum()) < 2
            continue
        rows, columns = torch.nonzero(green.any(1)).flatten(), torch.nonzero(green.any(0)).flatten()
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert len(boxes) == 1
        assert np.abs(boxes[0] - found).max() <= 1.6
        seen += 1
    assert seen > 25


def test_labels_stay_with_their_boxes_through_the_crop(tmp_path):
    """Six boxes whose class is told by their colour: whatever the crop leaves over must keep its own class."""
    classes, root = 6, tmp_path / "root"
    picture = np.zeros((60, 90, 3), np.uint8)
    entries = []
    for label in range(classes):
        x, y = 30 * (label % 3) + 5, 30 * (label // 3) + 5
        picture[y : y + 20, x : x + 20, 0] = 40 * (label + 1)
        entries.append({"id": label + 1, "image_id": 1, "category_id": 10 * label, "bbox": [x, y, 20, 20]})
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    Image.fromarray(picture).save(root / "train2017/one.png")
    content = {"images": [{"id": 1, "file_name": "one.png"}], "annotations": entries}
    content["categories"] = [{"id": 10 * label, "name": str(label)} for label in range(classes)]
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
    build = SequenceBuilder(Tokenizer(classes, 1000), 10)
    data = TrainDataset(load_annotations(find_split("train", root)), TrainTransform(80, 1.2), build, seed=0)
    cropped, checked = 0, 0
    for epoch in range(30):
        example = data[epoch, 0, 0]
        boxes, labels = build.tokenizer.decode(example["labels"])
        boxes, labels = boxes[labels != NOISE_LABEL] * 80, labels[labels != NOISE_LABEL]
        cropped += len(boxes) < classes
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            if min(x2 - x1, y2 - y1) > 6:
                colour = example["pixel_values"][0, int((y1 + y2) / 2), int((x1 + x2) / 2)]
                assert round(int(colour) / 40) - 1 == label
                checked += 1
    assert cropped > 5
    assert checked > 60


# -- the order -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "batch_size"), [(12, 4), (13, 4), (7, 2), (3, 8), (1, 4), (5, 5)])
def test_every_sample_comes_once_in_an_epoch(num_images, batch_size):
    """Also where a batch crosses from one epoch to the next, and where it is larger than the dataset."""
    sampler = StepSampler(num_images, batch_size, seed=3)
    steps = -(-3 * num_images // batch_size)
    keys = [key for batch in take(sampler, steps) for key in batch][: 3 * num_images]
    for epoch in range(3):
        part = keys[epoch * num_images : (epoch + 1) * num_images]
        assert {e for e, *_ in part} == {epoch}
        assert sorted(index for _, index, _ in part) == list(range(num_images))


def test_epochs_have_orders_of_their_own():
    keys = [key for batch in take(StepSampler(50, 10, seed=3), 15) for key in batch]
    orders = [tuple(index for epoch, index, _ in keys if epoch == e) for e in range(3)]
    assert len(set(orders)) == 3
    assert orders[0] != tuple(range(50))
    other = [key for batch in take(StepSampler(50, 10, seed=4), 5) for key in batch]
    assert tuple(index for _, index, _ in other) != orders[0]


def step_contents(batch_size: int, accumulation: int, world_size: int, start: int, count: int) -> list[Counter]:
    """What optimizer steps start ... start + count - 1 are made of, over all ranks and micro-batches."""
    steps = [Counter() for _ in range(count)]
    for rank in range(world_size):
        sampler = StepSampler(13, batch_size, accumulation, rank, world_size, seed=5, start_step=start)
        assert sampler.samples_per_step == 4
        micro_batches = take(sampler, count * accumulation)
        for number, keys in enumerate(micro_batches):
            assert len(keys) == batch_size
            steps[number // accumulation].update(keys)
    return steps


@pytest.mark.parametrize("split", [(2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (1, 1, 4)])
def test_a_step_is_the_same_however_it_is_split(split):
    reference = step_contents(4, 1, 1, 0, 10)
    assert step_contents(*split, 0, 10) == reference
    assert all(count == 1 for step in reference for count in step.values())


@pytest.mark.parametrize("split", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("start", [1, 3, 7, 100])
def test_starting_at_a_step_is_skipping_to_it(split, start):
    assert step_contents(*split, start, 5) == step_contents(*split, 0, start + 5)[start:]


def test_a_far_step_is_reached_without_walking_there():
    keys = take(StepSampler(12, 4, start_step=10**9), 1)[0]
    assert keys[0][0] == 4 * 10**9 // 12


def test_batch_repetition_gives_every_image_that_many_samples_in_a_row():
    """Each augmented in its own way, the first as without repetition."""
    sampler = StepSampler(5, 4, seed=3, repetition=2)
    assert sampler.steps_per_epoch == 2.5
    keys = [key for batch in take(sampler, 5) for key in batch]
    once = [key for batch in take(StepSampler(5, 2, seed=3), 5) for key in batch]
    assert keys == [(epoch, index, copy) for epoch, index, _ in once for copy in range(2)]
    for rank in range(2):  # however a step is split
        shares = take(StepSampler(5, 1, accumulation=2, rank=rank, world_size=2, seed=3, repetition=2), 10)
        assert [key for batch in shares for key in batch] == keys[rank::2]


def test_copies_of_an_image_look_different(annotations):
    data = TrainDataset(annotations, TrainTransform(32), SequenceBuilder(TOKENIZER, 8), seed=0)
    pictures = {data[0, 3, copy]["pixel_values"].numpy().tobytes() for copy in range(3)}
    assert len(pictures) == 3


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 4, 5, 7, 12])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_image_is_evaluated_once_whatever_the_number_of_ranks(annotations, num_images, batch_size):
    """A bug others shipped: images that pad the last batch were counted twice."""
    data = EvalDataset(annotations.subset(range(num_images)), EvalTransform(32))
    batches = {}
    for world_size in (1, 2, 3):
        loaders = [eval_loader(data, batch_size, rank, world_size) for rank in range(world_size)]
        batches[world_size] = sorted(tuple(b["image_id"].tolist()) for loader in loaders for b in loader)
        read = [image_id for batch in batches[world_size] for image_id in batch]
        assert sorted(read) == sorted(data.annotations.image_ids.tolist())
    assert batches[1] == batches[2] == batches[3]  # a picture's batch mates are the same too


def test_evaluation_images_tell_their_sizes(annotations):
    data = EvalDataset(annotations, EvalTransform(32))
    assert len(data) == 12
    item = data[3]
    assert item["pixel_values"].shape == (3, 32, 32)
    assert item["size"].tolist() == [32, 32]
    assert item["original_size"].tolist() == [64, 64]
    assert same(item, data[3])
