import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pix2seq.sequence import SequenceBuilder, noise_boxes
from pix2seq.tokenizer import CLASS_SLOT, NOISE_LABEL, TOKENS_PER_OBJECT, Tokenizer

TOKENIZER = Tokenizer(num_classes=8, num_bins=1000)
BUILDER = SequenceBuilder(TOKENIZER, max_objects=10, noise_weight=0.7, eos_weight=0.1)
BOXES = np.array([[0.1, 0.2, 0.3, 0.6], [0.5, 0.5, 0.9, 0.7], [0.2, 0.1, 0.4, 0.2]])
LABELS = np.array([2, 0, 7])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_objects(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = rng(seed)
    corners = np.sort(generator.random((count, 2, 2)), axis=1).reshape(count, 4)
    return corners, generator.integers(0, TOKENIZER.num_classes, count)


def as_objects(tokens: np.ndarray) -> np.ndarray:
    return tokens[: len(tokens) // TOKENS_PER_OBJECT * TOKENS_PER_OBJECT].reshape(-1, TOKENS_PER_OBJECT)


def as_set(objects: np.ndarray) -> set[tuple]:
    return {tuple(tokens) for tokens in objects.tolist()}


# -- inputs, labels and weights ----------------------------------------------------------------------


@given(count=st.integers(0, 14), noise_objects=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_inputs_are_the_labels_shifted_by_one(count, noise_objects, seed):
    build = dataclasses.replace(BUILDER, noise_objects=noise_objects, class_corruption="none")
    example = build(*random_objects(count, seed), rng(seed))
    inputs, labels, weights = example["input_ids"], example["labels"], example["token_weights"]
    assert inputs.shape == labels.shape == weights.shape == (build.length,)
    assert inputs.dtype == labels.dtype == np.int64
    assert weights.dtype == np.float32
    assert inputs[0] == TOKENIZER.bos_id
    end = (labels != TOKENIZER.pad_id).sum()
    assert (labels[:end] != TOKENIZER.pad_id).all()  # padding only at the end
    np.testing.assert_array_equal(inputs[1:end], labels[: end - 1])
    assert (inputs[end:] == TOKENIZER.pad_id).all()
    assert (weights[end:] == 0).all()


@given(count=st.integers(0, 14), seed=st.integers(0, 2**32 - 1))
def test_corruption_changes_only_the_classes_of_the_input(count, seed):
    example = BUILDER(*random_objects(count, seed), rng(seed))
    differs = np.flatnonzero(example["input_ids"][1:] != example["labels"][:-1])
    assert (differs % TOKENS_PER_OBJECT == CLASS_SLOT).all()


@pytest.mark.parametrize("num_real", [0, 1, 3, 9, 10])
@pytest.mark.parametrize("order", ["random", "none"])
@pytest.mark.parametrize("noise_objects", [True, False])
def test_weights(num_real, order, noise_objects):
    build = dataclasses.replace(BUILDER, noise_objects=noise_objects, order=order)
    expected = num_real * [1, 1, 1, 1, 1] + (10 - num_real) * [0, 0, 0, 0, 0.7]
    if not noise_objects:
        expected = num_real * [1, 1, 1, 1, 1] + [0.1] + (10 - num_real) * [0, 0, 0, 0, 0]
    weights = build(*random_objects(num_real, 5), rng(1))["token_weights"]
    np.testing.assert_array_equal(weights, np.array(expected, dtype=np.float32))


@given(count=st.integers(0, 14), seed=st.integers(0, 2**32 - 1))
def test_real_objects_come_first_and_noise_fills_the_slots(count, seed):
    boxes, labels = random_objects(count, seed)
    objects = as_objects(BUILDER(boxes, labels, rng(seed))["labels"])
    num_real = min(count, BUILDER.max_objects)
    assert len(objects) == BUILDER.max_objects
    assert (objects[:num_real, CLASS_SLOT] != TOKENIZER.noise_id).all()
    assert (objects[num_real:, CLASS_SLOT] == TOKENIZER.noise_id).all()
    assert as_set(objects[:num_real]) <= as_set(TOKENIZER.encode(boxes, labels))


def test_labels_decode_to_the_objects_without_jitter():
    boxes, labels = TOKENIZER.decode(dataclasses.replace(BUILDER, order="none")(BOXES, LABELS, rng())["labels"])
    assert np.abs(boxes[:3] - BOXES).max() <= 0.5 / 999 + 1e-12
    assert labels.tolist() == [*LABELS, *[NOISE_LABEL] * 7]


@pytest.mark.parametrize("num_real", [0, 3, 10, 15])
def test_without_noise_objects_the_sequence_ends_with_eos(num_real):
    build = dataclasses.replace(BUILDER, noise_objects=False)
    example = build(*random_objects(num_real, 3), rng())
    end = TOKENS_PER_OBJECT * min(num_real, 10)
    assert build.length == 51
    assert np.flatnonzero(example["labels"] == TOKENIZER.eos_id).tolist() == [end]
    assert (example["labels"][end + 1 :] == TOKENIZER.pad_id).all()
    assert TOKENIZER.eos_id not in example["input_ids"]


def test_with_noise_objects_there_is_no_eos():
    """A model that is trained on EOS after noise objects stops early, a common bug."""
    for count in (0, 3, 10, 15):
        labels = BUILDER(*random_objects(count, 3), rng())["labels"]
        assert len(labels) == BUILDER.length == 50
        assert not {TOKENIZER.eos_id, TOKENIZER.pad_id} & set(labels.tolist())


@pytest.mark.parametrize("noise_objects", [True, False])
def test_the_generator_determines_the_sequence(noise_objects):
    build = dataclasses.replace(BUILDER, noise_objects=noise_objects)
    first, again, other = (build(BOXES, LABELS, rng(seed)) for seed in (1, 1, 2))
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    assert (first["labels"] != other["labels"]).any()


def test_arguments_are_not_modified():
    boxes, labels = BOXES.copy(), LABELS.copy()
    dataclasses.replace(BUILDER, box_jitter=0.1, mix_rate=1.0)(boxes, labels, rng(), valid_fraction=(0.9, 0.7))
    np.testing.assert_array_equal(boxes, BOXES)
    np.testing.assert_array_equal(labels, LABELS)


# -- noise boxes -----------------------------------------------------------------------------------


def test_fractions_of_the_types_of_noise_boxes():
    """Half of the boxes are near-duplicates, a quarter are shifted: the same width and height elsewhere."""
    box = np.array([[0.45, 0.4, 0.55, 0.7]])  # in the middle, so that few shifted boxes are clipped
    size = np.array([0.1, 0.3])
    duplicates_per_image, num_shifted = [], 0
    for seed in range(300):
        boxes, is_duplicate = noise_boxes(box, 40, rng(seed))
        box_size = boxes[:, 2:] - boxes[:, :2]
        same_size = np.isclose(box_size, size, rtol=1e-9, atol=0).all(axis=1)
        swapped = np.isclose(box_size, size[::-1], rtol=1e-9, atol=0).all(axis=1)
        inside = ((boxes > 0) & (boxes < 1)).all(axis=1)
        near = (np.abs(boxes - box) <= 0.1 * np.tile(size, 2) + 1e-12).all(axis=1)
        assert near[is_duplicate].all()  # each edge moves by at most a tenth of the box
        assert not same_size[is_duplicate].any()
        assert not (swapped & inside).any()
        duplicates_per_image.append(is_duplicate.sum())
        num_shifted += (same_size & inside).sum()
    total = 300 * 40
    assert 0.42 < sum(duplicates_per_image) / total < 0.58
    # The center is uniform over the image, so (1 - 0.1) * (1 - 0.3) of the shifted boxes lie inside.
    assert 0.25 * 0.63 - 0.04 < num_shifted / total < 0.25 * 0.63 + 0.04
    # The number of near-duplicates is uniform in 0 ... 40.
    assert min(duplicates_per_image) <= 3
    assert max(duplicates_per_image) >= 37


def test_near_duplicates_are_spread_evenly_over_the_objects():
    """Limiting near-duplicates to one per object is a common bug."""
    boxes = np.concatenate([noise_boxes(BOXES, 90, rng(seed))[0] for seed in range(60)])
    size = np.tile(BOXES[:, 2:] - BOXES[:, :2], 2)
    offset = (boxes[:, None] - BOXES) / size
    near = (np.abs(offset) <= 0.1 + 1e-9).all(axis=2)
    counts = near.sum(axis=0)
    assert counts.min() > 0.8 * counts.max()
    assert counts.sum() > 60 * 90 / 3
    offset = offset[near]
    assert (np.abs(offset.mean(axis=0)) < 0.01).all()
    assert (np.abs(offset.std(axis=0) - 0.044) < 0.003).all()  # sigma 0.05, truncated at two sigma
    assert np.abs(np.corrcoef(offset.T)[np.triu_indices(4, 1)]).max() < 0.1


def test_shifted_boxes_have_a_uniform_center():
    box = np.array([[0.49, 0.495, 0.51, 0.505]])
    boxes = np.concatenate([noise_boxes(box, 50, rng(seed))[0] for seed in range(100)])
    shifted = boxes[np.isclose(boxes[:, 2:] - boxes[:, :2], [0.02, 0.01]).all(axis=1)]
    center = (shifted[:, :2] + shifted[:, 2:]) / 2
    assert len(center) > 500
    assert (np.abs(center.mean(axis=0) - 0.5) < 0.05).all()
    assert (np.abs(center.std(axis=0) - 1 / 12**0.5) < 0.03).all()


def test_an_image_without_objects_gets_random_noise_boxes():
    objects = as_objects(BUILDER(np.zeros((0, 4)), np.zeros(0, int), rng())["labels"])
    assert len(objects) == 10
    assert (objects[:, CLASS_SLOT] == TOKENIZER.noise_id).all()
    boxes = noise_boxes(np.zeros((0, 4)), 2000, rng())[0]
    assert len(np.unique(boxes, axis=0)) == 2000
    inside = ((boxes > 0) & (boxes < 1)).all(axis=1)
    assert (boxes[inside, 2:] - boxes[inside, :2]).std() > 0.1


@given(count=st.integers(0, 30), num_boxes=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
def test_noise_boxes_are_valid(count, num_boxes, seed):
    boxes = noise_boxes(random_objects(num_boxes, seed)[0], count, rng(seed))[0]
    assert boxes.shape == (count, 4)
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()


@given(width=st.floats(0.05, 1), height=st.floats(0.05, 1), count=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_noise_boxes_do_not_reach_into_the_padding(width, height, count, seed):
    boxes, labels = random_objects(count, seed)
    boxes = boxes * [width, height, width, height]
    decoded, _ = TOKENIZER.decode(BUILDER(boxes, labels, rng(seed), valid_fraction=(width, height))["labels"])
    half_a_bin = 0.5 / 999 + 1e-9
    assert decoded[:, [0, 2]].max() <= width + half_a_bin
    assert decoded[:, [1, 3]].max() <= height + half_a_bin


def test_noise_boxes_cover_the_valid_part_evenly():
    """Clipping to the valid part instead of scaling would accumulate boxes at its edge."""
    boxes = []
    for seed in range(50):
        example = BUILDER(np.zeros((0, 4)), np.zeros(0, int), rng(seed), valid_fraction=(0.5, 0.25))
        boxes.append(TOKENIZER.decode(example["labels"])[0])
    center = np.concatenate(boxes).reshape(-1, 2, 2).mean(axis=1)
    assert np.abs(center.mean(axis=0) - [0.25, 0.125]).max() < 0.02


# -- class corruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "area"])  # corruption must not depend on the order, a common bug
@pytest.mark.parametrize(
    ("mode", "true", "random", "noise"),
    [
        ("none", 1, 0, 0),
        ("rand_cls", 0, 1, 0),
        ("rand_n_fake_cls", 0, 0.5, 0.5),
        ("real_n_fake_cls", 0.5, 0, 0.5),
        ("real_n_rand_n_fake_cls", 0.5, 0.25, 0.25),
    ],
)
def test_class_corruption_frequencies(mode, true, random, noise, order):
    build = SequenceBuilder(TOKENIZER, max_objects=100, class_corruption=mode, order=order)
    inputs, targets = [], []
    for seed in range(100):
        example = build(*random_objects(70, seed), rng(seed))
        # The class of object k is label 5 k + 4 and input 5 k + 5.
        inputs.append(example["input_ids"][5::5])
        targets.append(example["labels"][4:-1:5])
    inputs, targets = np.concatenate(inputs), np.concatenate(targets)
    is_real, classes = targets != TOKENIZER.noise_id, TOKENIZER.num_classes
    is_class = (inputs >= TOKENIZER.first_class_id) & (inputs < TOKENIZER.first_bin_id)
    assert (is_class | (inputs == TOKENIZER.noise_id)).all()
    # Tolerances are four standard errors of about 7000 draws.
    assert (inputs[is_real] == targets[is_real]).mean() == pytest.approx(true + random / classes, abs=0.025)
    assert (inputs[is_real] == TOKENIZER.noise_id).mean() == pytest.approx(noise, abs=0.025)
    assert (inputs[~is_real] == TOKENIZER.noise_id).mean() == pytest.approx(true + noise, abs=0.04)
    if random:
        drawn = inputs[~is_real & is_class]
        frequencies = np.bincount(drawn - TOKENIZER.first_class_id, minlength=classes) / len(drawn)
        assert frequencies == pytest.approx(np.full(classes, 1 / classes), abs=0.06)


def test_the_default_hides_the_true_class():
    """Keeping the true class in the input, a common bug, lets the model rely on it."""
    assert SequenceBuilder(TOKENIZER).class_corruption == "rand_n_fake_cls"


# -- object order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "area", "distance", "none"])
@pytest.mark.parametrize("noise_objects", [True, False])
def test_more_objects_than_slots(order, noise_objects):
    build = dataclasses.replace(BUILDER, order=order, noise_objects=noise_objects)
    boxes, labels = random_objects(25, 2)
    example = build(boxes, labels, rng())
    assert len(as_set(as_objects(example["labels"])) & as_set(TOKENIZER.encode(boxes, labels))) == 10
    assert (example["token_weights"][:50] == 1).all()


def test_a_random_order_selects_every_object():
    boxes, labels = random_objects(25, 2)
    selected = set()
    for seed in range(40):
        selected |= as_set(as_objects(BUILDER(boxes, labels, rng(seed))["labels"]))
    assert selected == as_set(TOKENIZER.encode(boxes, labels))


def object_order(boxes: np.ndarray, order: str, seed: int = 0) -> list[int]:
    objects = as_objects(dataclasses.replace(BUILDER, order=order)(boxes, LABELS, rng(seed))["labels"])
    return [LABELS.tolist().index(token - TOKENIZER.first_class_id) for token in objects[:3, CLASS_SLOT]]


def test_fixed_orders():
    boxes = BOXES.copy()
    boxes[0] = [0.3, 0.3, 0.4, 0.4]  # areas 0.01, 0.08, 0.02; distances 0.42, 0.71, 0.22
    assert object_order(boxes, "area") == [1, 2, 0]
    assert object_order(boxes, "distance") == [2, 0, 1]
    assert object_order(boxes, "none") == [0, 1, 2]
    boxes[:, :2] = [[0.3, 0.2], [0.1, 0.4], [0.1, 0.2]]  # x1, y1
    assert object_order(boxes, "top_to_bottom") == [2, 0, 1]


def test_random_order_draws_every_permutation():
    assert len({tuple(object_order(BOXES, "random", seed)) for seed in range(120)}) == 6


# -- options ---------------------------------------------------------------------------------------


def test_box_jitter_shifts_the_edges_of_real_boxes():
    boxes, labels = np.array([[0.2, 0.3, 0.6, 0.7], [0.0, 0.0, 1.0, 0.5]]), np.array([0, 1])
    build = SequenceBuilder(Tokenizer(2, 2000), 4, order="none", box_jitter=0.1)
    shifts = []
    for seed in range(200):
        decoded, decoded_labels = build.tokenizer.decode(build(boxes, labels, rng(seed))["labels"])
        assert decoded_labels.tolist() == [0, 1, NOISE_LABEL, NOISE_LABEL]
        shifts.append((decoded[0] - boxes[0]) / 0.4)
    shifts = np.array(shifts)
    assert 0.085 < np.abs(shifts).max() <= 0.1 + 1e-3
    assert 0.035 < shifts.std() < 0.05  # sigma is half of it, truncated at two sigma
    assert abs(shifts.mean()) < 0.01


def test_box_jitter_stays_inside_the_valid_part():
    build = SequenceBuilder(Tokenizer(1, 1000), 1, box_jitter=0.2)
    for seed in range(50):
        example = build(np.array([[0.0, 0.0, 0.5, 0.25]]), np.zeros(1, int), rng(seed), (0.5, 0.25))
        (box,), _ = build.tokenizer.decode(example["labels"])
        assert (box[2:] <= [0.5 + 1e-3, 0.25 + 1e-3]).all()


@pytest.mark.parametrize(("mix_rate", "low", "high"), [(0.0, 0, 0), (0.5, 20, 55), (1.0, 50, 95)])
def test_mixed_noise_objects_keep_their_weights_and_the_order_of_real_objects(mix_rate, low, high):
    boxes = np.array([[0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.9, 0.9]])
    build = SequenceBuilder(Tokenizer(3, 100), 8, order="area", mix_rate=mix_rate, noise_weight=0.5)
    num_mixed = 0
    for seed in range(100):
        example = build(boxes, np.arange(3), rng(seed))
        _, labels = build.tokenizer.decode(example["labels"])
        assert labels[labels >= 0].tolist() == [2, 1, 0]
        weights = example["token_weights"].reshape(8, 5)
        assert (weights[labels >= 0] == 1).all()
        assert (weights[labels < 0] == [0, 0, 0, 0, 0.5]).all()
        num_mixed += (labels[:3] < 0).any()
    assert low <= num_mixed <= high  # if all noise objects are near-duplicates, none is mixed in


def test_noise_objects_take_part_in_a_fixed_order():
    build = SequenceBuilder(Tokenizer(1, 1000), 12, order="top_to_bottom", mix_rate=1.0)
    boxes = np.array([[0.1, 0.1, 0.2, 0.2], [0.1, 0.4, 0.5, 0.5], [0.5, 0.8, 0.9, 0.9]])
    first_is_noise = 0
    for seed in range(50):
        decoded, labels = build.tokenizer.decode(build(boxes, np.zeros(3, int), rng(seed))["labels"])
        last_real = np.flatnonzero(labels == 0)[-1]
        y1 = decoded[: last_real + 1, 1]  # near-duplicates follow
        assert (np.diff(y1) >= 0).all()
        first_is_noise += labels[0] < 0
    assert 10 <= first_is_noise <= 40


def test_near_duplicates_follow_the_real_objects_when_mixed():
    box = np.array([[0.3, 0.3, 0.5, 0.5]])
    build = SequenceBuilder(Tokenizer(1, 1000), 12, mix_rate=1.0)
    before, after = 0, 0
    for seed in range(100):
        boxes, labels = build.tokenizer.decode(build(box, np.zeros(1, int), rng(seed))["labels"])
        near = np.abs(boxes - box).max(axis=1) < 0.021  # a tenth of its size, and a bin
        position = labels.tolist().index(0)
        before += near[:position].sum()
        after += near[position + 1 :].sum()
    assert before == 0
    assert after > 200
