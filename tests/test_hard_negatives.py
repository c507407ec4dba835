"""False detections in training images become noise objects of the next steps."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from pix2seq.data import Annotations, TrainDataset, find_split, load_annotations
from pix2seq.sequence import SequenceBuilder, noise_boxes
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer
from pix2seq.training import evaluator, hard_negatives
from pix2seq.training.hard_negatives import images_to_search, select_hard_negatives
from pix2seq.transforms import TrainTransform
from tests.runs import TINY, VIT, assert_same_run, interrupt_at, run
from tests.test_multiprocess import assert_close_steps, launch

WORDS = ("--hard_negative_every", "2", "--scale_min", "1", "--scale_max", "1")


@pytest.fixture
def annotations(shapes_root) -> Annotations:
    return load_annotations(find_split("train", shapes_root))


def detection(annotations: Annotations, index: int, box: list[float], score: float = 0.9) -> dict:
    x1, y1, x2, y2 = box
    return {
        "image_id": int(annotations.image_ids[index]),
        "category_id": annotations.categories.ids[0],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": score,
    }


def test_hard_negatives_overlap_no_object(annotations):
    """With an overlap below IoU 0.5 and a score that is not small."""
    images = annotations.subset([0, 1])
    x1, y1, x2, y2 = images.boxes[images.offsets[0]].tolist()
    third = (x2 - x1) / 3
    outside = [1000.0, 1000.0, 1010.0, 1010.0]
    predictions = [
        detection(images, 0, [x1, y1, x2, y2]),
        detection(images, 0, [x1 + third, y1, x2 + third, y2]),  # IoU 1/2
        detection(images, 0, [x1 + 1.1 * third, y1, x2 + 1.1 * third, y2], 0.3),
        detection(images, 0, outside),
        detection(images, 0, outside, score=0.01),
    ]
    found = select_hard_negatives(predictions, images)
    assert list(found) == images.image_ids.tolist()
    expected = torch.tensor([[x1 + 1.1 * third, y1, x2 + 1.1 * third, y2], outside])
    torch.testing.assert_close(found[int(images.image_ids[0])], expected)
    assert found[int(images.image_ids[1])].shape == (0, 4)


def test_what_touches_a_crowd_is_no_hard_negative(annotations):
    images = annotations.subset([0])
    images.boxes[0], images.crowd[0], images.trainable[0] = [100, 100, 200, 200], True, False
    predictions = [detection(images, 0, [190, 190, 230, 230]), detection(images, 0, [201, 201, 230, 230])]
    (found,) = select_hard_negatives(predictions, images).values()
    assert found.tolist() == [[201, 201, 230, 230]]


def test_searches_reach_all_images_in_turn(monkeypatch):
    monkeypatch.setattr(hard_negatives, "MAX_IMAGES", 4)
    searches = [images_to_search(10, number) for number in range(3)]
    assert searches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert images_to_search(3, 7) == [1, 2, 0]


@pytest.mark.parametrize("mix_rate", [0.0, 1.0])
@pytest.mark.parametrize("count", [2, 30])
def test_hard_negatives_become_noise_objects(mix_rate, count):
    tokenizer = Tokenizer(num_classes=3, num_bins=1000)
    build = SequenceBuilder(tokenizer, max_objects=10, order="top_to_bottom", mix_rate=mix_rate)
    boxes, labels = np.array([[0.1, 0.1, 0.2, 0.2], [0.3, 0.6, 0.5, 0.9]]), np.array([0, 2])
    corners = np.random.default_rng(0).random((count, 2)) / 2
    negatives = np.concatenate([corners, corners + 0.123], axis=1)
    example = build(boxes, labels, np.random.default_rng(1), (1, 1), negatives)
    objects = example["labels"].reshape(-1, TOKENS_PER_OBJECT)
    weights = example["token_weights"].reshape(-1, TOKENS_PER_OBJECT)
    tokens = {tuple(row) for row in tokenizer.encode(negatives, np.zeros(count, int))[:, :CLASS_SLOT].tolist()}
    is_negative = np.array([tuple(row) in tokens for row in objects[:, :CLASS_SLOT].tolist()])
    assert is_negative.sum() == min(count, 4)  # half of the 8 noise objects
    assert (objects[is_negative, CLASS_SLOT] == tokenizer.noise_id).all()
    assert (weights[is_negative] == [0, 0, 0, 0, 1]).all()
    real = objects[objects[:, CLASS_SLOT] != tokenizer.noise_id]
    np.testing.assert_array_equal(real, tokenizer.encode(boxes, labels))


def test_other_noise_boxes_do_not_depend_on_hard_negatives():
    boxes = np.array([[0.1, 0.1, 0.2, 0.2]])
    negatives = np.array([[0.5, 0.5, 0.75, 0.75]])
    expected, is_duplicate = noise_boxes(boxes, 9, np.random.default_rng(0))
    mixed, mixed_is_duplicate = noise_boxes(boxes, 10, np.random.default_rng(0), negatives)
    is_negative = (mixed == negatives).all(axis=1)
    assert is_negative.sum() == 1
    assert not mixed_is_duplicate[is_negative].any()
    assert sorted(mixed[~is_negative].tolist()) == sorted(expected.tolist())
    assert mixed_is_duplicate.sum() == is_duplicate.sum()


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_hard_negatives_are_augmented_like_objects(annotations, mosaic):
    """A negative in the place of an object has its tokens, except for the class."""
    tokenizer = Tokenizer(len(annotations.categories.ids), 100)
    transform = TrainTransform(64, scale_min=0.5, scale_max=2.0, independent_crop=True)
    dataset = TrainDataset(annotations, transform, SequenceBuilder(tokenizer, 40, order="none"), seed=0, mosaic=mosaic)
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        dataset.hard_negatives[image_id] = torch.from_numpy(annotations.objects(index)[0]).float()
    num_found = 0
    for epoch in range(20):
        objects = dataset[epoch, 0, 0]["labels"].reshape(-1, TOKENS_PER_OBJECT)
        is_noise = objects[:, CLASS_SLOT] == tokenizer.noise_id
        noise = objects[is_noise, :CLASS_SLOT]
        for real in objects[~is_noise, :CLASS_SLOT]:
            num_found += 1
            assert (np.abs(noise - real).max(axis=1) <= 1).any()  # boxes are float32 here
    assert num_found > 20


@pytest.fixture(scope="module")
def searched(shapes_root, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("searched")
    assert run(shapes_root, output, *WORDS) == 0
    return output


def test_a_run_searches_and_uses_what_it_finds(searched, finished, shapes_root, tmp_path):
    log = (searched / "train.log").read_text()
    steps = [line.partition(":")[0] for line in log.splitlines() if "hard negatives in 12 images" in line]
    assert steps == ["step 2", "step 4"]  # nothing follows step 6
    state = torch.load(searched / "checkpoints" / "step_00000006" / "trainer.pt", weights_only=True)
    assert state["last_searched_step"] == 4
    assert sum(map(len, state["hard_negatives"].values())) > 0
    assert run(shapes_root, tmp_path, *WORDS[2:]) == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, searched)


@pytest.mark.parametrize("step", [2, 3])
def test_resume_is_bit_exact(searched, shapes_root, tmp_path, monkeypatch, step):
    """Interrupted at a search and after it; resumed with another number of workers."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signal.SIGTERM)
        assert run(shapes_root, tmp_path, *WORDS) == 75
    assert run(shapes_root, tmp_path, *WORDS, "--resume", "auto", "--num_workers", "1") == 0
    assert_same_run(tmp_path, searched)


def test_an_interrupted_search_is_repeated(searched, shapes_root, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    original = evaluator.predict
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "predict", interrupted)
        assert run(shapes_root, tmp_path, *WORDS) == 75
    assert run(shapes_root, tmp_path, *WORDS, "--resume", "auto") == 0
    assert_same_run(tmp_path, searched)


@pytest.mark.slow
def test_two_processes_find_the_same(shapes_root, tmp_path):
    words = [*VIT, *WORDS, "--eval_every", "0", "--sample_every", "0", "--lr_scheduler", "constant"]
    assert run(shapes_root, tmp_path / "one", *words) == 0
    words = [*words, "--root", str(shapes_root), "--output_dir", str(tmp_path / "two"), "--batch_size", "2"]
    done = launch("train.py", *TINY, *words)
    assert done.returncode == 0, done.stderr
    assert_close_steps(tmp_path / "two", tmp_path / "one")
    found = [
        torch.load(output / "checkpoints" / "step_00000006" / "trainer.pt", weights_only=True)["hard_negatives"]
        for output in (tmp_path / "one", tmp_path / "two")
    ]
    assert found[0].keys() == found[1].keys()
    for image_id, boxes in found[0].items():
        torch.testing.assert_close(boxes, found[1][image_id], rtol=1e-3, atol=1e-3)
