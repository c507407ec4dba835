"""Images with rare classes occur more often in an epoch, and the order stays a function of the seed and the epoch."""

from collections import Counter

import numpy as np
import pytest

from pix2seq.argument_parser import parse
from pix2seq.data import StepSampler, find_split, load_annotations, repeat_factors
from pix2seq.data.repeat_factors import draw_epoch, epoch_length
from pix2seq.data.shards import write_shards
from pix2seq.errors import UserError
from pix2seq.plan import PlanArguments, plan
from tests.runs import TINY, edited, read_json, run
from tests.test_data import take, take_keys

FACTORS = np.array([1, 2.5, 1, 1.25, 3, 1, 1.75, 1.1, 1, 1])  # the sum is 14.6


@pytest.fixture
def blood_cells(shapes_root, tmp_path):
    """Every image has the first class, three of twelve images the second one, the last one a crowd of the third."""

    def edit(content):
        ids, classes = [image["id"] for image in content["images"]], [c["id"] for c in content["categories"]]
        box = {"bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}
        objects = [box | {"image_id": image, "category_id": classes[0]} for image in ids for _ in range(2)]
        objects += [box | {"image_id": image, "category_id": classes[1]} for image in ids[:3]]
        objects.append(box | {"image_id": ids[-1], "category_id": classes[2], "iscrowd": 1})
        content["annotations"] = [entry | {"id": number} for number, entry in enumerate(objects, 1)]

    return edited(shapes_root, tmp_path / "data", "train", edit)


def test_factors_follow_the_rarest_class_of_an_image(blood_cells):
    annotations = load_annotations(find_split("train", blood_cells))
    assert repeat_factors(annotations, 0.5).tolist() == pytest.approx([2**0.5] * 3 + [1] * 9)
    assert repeat_factors(annotations, 1.0).tolist() == pytest.approx([2] * 3 + [1] * 9)
    assert repeat_factors(annotations, 0.25).tolist() == [1] * 12


def test_factors_of_shards_are_those_of_the_files(blood_cells, tmp_path):
    files = load_annotations(find_split("train", blood_cells))
    write_shards(files, tmp_path / "shards")
    shards = load_annotations(find_split("train", None, shards=str(tmp_path / "shards")))
    np.testing.assert_array_equal(repeat_factors(shards, 0.5), repeat_factors(files, 0.5))


def test_an_image_occurs_as_often_as_its_factor_on_average():
    epochs = np.stack([draw_epoch(FACTORS, np.random.default_rng((3, epoch))) for epoch in range(4000)])
    assert set(epochs.sum(1)) == {epoch_length(FACTORS)} == {15}
    assert ((epochs == np.floor(FACTORS)) | (epochs == np.ceil(FACTORS))).all()
    # Rounding 14.6 to 15 raises the fractional parts by a quarter.
    expected = np.floor(FACTORS) + FACTORS % 1 * 2 / 1.6
    np.testing.assert_allclose(epochs.mean(0), expected, atol=0.03)


@pytest.mark.parametrize("factors", [np.ones(5), np.array([1.1, 1, 1]), np.array([2.0, 3.0]), np.full(7, 1.999999)])
def test_epochs_have_the_same_length(factors):
    for epoch in range(20):
        counts = draw_epoch(factors, np.random.default_rng(epoch))
        assert counts.sum() == epoch_length(factors)
        assert (counts >= np.floor(factors)).all()


def test_samples_of_an_epoch_are_distinct_and_change_with_epoch_and_seed():
    """Otherwise the occurrences of an image would have the same augmentation."""
    sampler = StepSampler(10, 5, seed=3, factors=FACTORS)
    assert sampler.steps_per_epoch == 3
    epochs = [take_keys(StepSampler(10, 5, seed=3, factors=FACTORS, start_step=3 * e), 3) for e in range(3)]
    assert [{key[0] for key in keys} for keys in epochs] == [{0}, {1}, {2}]
    assert all(len(set(keys)) == 15 for keys in epochs)
    for keys in epochs:
        counts = Counter(index for _, index, _ in keys)
        assert all(set(range(counts[index])) == {c for _, i, c in keys if i == index} for index in range(10))
    orders = {tuple(key[1:] for key in keys) for keys in epochs}
    orders.add(tuple(key[1:] for key in take_keys(StepSampler(10, 5, seed=4, factors=FACTORS), 3)))
    assert len(orders) == 4


@pytest.mark.parametrize("start", [0, 2, 7, 10**6])
@pytest.mark.parametrize("parts", [(2, 1, 2), (1, 4, 1), (1, 2, 2)])
def test_a_step_does_not_depend_on_its_parts_or_the_start(parts, start):
    batch_size, accumulation, world_size = parts

    def samples(batch_size, accumulation, world_size, start, count):
        steps = [Counter() for _ in range(count)]
        for rank in range(world_size):
            sampler = StepSampler(
                10, batch_size, accumulation, rank, world_size, seed=5, start_step=start, repetition=2, factors=FACTORS
            )
            for number, keys in enumerate(take(sampler, count * accumulation)):
                steps[number // accumulation].update(keys)
        return steps

    expected = samples(4, 1, 1, max(0, start - 3), 8)[min(3, start) :]
    assert samples(batch_size, accumulation, world_size, start, len(expected)) == expected


def test_factors_of_one_change_nothing():
    plain, ones = (take_keys(StepSampler(10, 4, factors=factors), 8) for factors in (None, np.ones(10)))
    assert Counter(plain[:10]) == Counter(ones[:10])
    assert StepSampler(10, 4, factors=np.ones(10)).steps_per_epoch == 2.5


def test_a_run_and_its_plan_have_the_longer_epochs(blood_cells, tmp_path, capsys):
    words = ["--repeat_threshold", "1", "--num_epochs", "2", "--max_steps", "0"]
    words += ["--log_every", "1", "--ckpt_every", "4", "--eval_every", "0", "--sample_every", "0"]
    assert run(blood_cells, tmp_path / "out", *words) == 0
    assert read_json(tmp_path, "out/status.json")["step"] == 8  # 2 epochs of 15 images, 4 each step
    log = (tmp_path / "out" / "train.log").read_text()
    assert "--repeat_threshold 1: 3 images are repeated, up to 2.0 times; an epoch has 15 images" in log
    capsys.readouterr()
    assert run(blood_cells, tmp_path / "out", "--resume", "auto", *words, "--repeat_threshold", "0.5") == 2
    assert "--repeat_threshold 0.5 (was 1.0)" in capsys.readouterr().err
    assert plan(parse(PlanArguments, [*TINY, "--root", str(blood_cells), *words]))["steps"] == 8


def test_a_plan_without_a_dataset_does_not_know_the_factors():
    with pytest.raises(UserError, match="--repeat_threshold: needs the annotations"):
        plan(parse(PlanArguments, [*TINY, "--repeat_threshold", "0.001"]))
