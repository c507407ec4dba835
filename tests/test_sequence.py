"""The training sentence: what is read, what must be said and what it counts, token by token."""

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


def objects_of(tokens: np.ndarray) -> np.ndarray:
    return tokens[: len(tokens) // TOKENS_PER_OBJECT * TOKENS_PER_OBJECT].reshape(-1, TOKENS_PER_OBJECT)


@given(count=st.integers(0, 14), noise_objects=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_inputs_are_the_labels_one_later(count, noise_objects, seed):
    """A bug others shipped: labels[t] is what follows input_ids[t], and weights belong to labels."""
    build = dataclasses.replace(BUILDER, noise_objects=noise_objects, class_corruption="none")
    example = build(*random_objects(count, seed), rng(seed))
    inputs, labels, weights = example["input_ids"], example["labels"], example["token_weights"]
    assert inputs.shape == labels.shape == weights.shape == (build.length,)
    assert inputs.dtype == labels.dtype == np.int64
    assert weights.dtype == np.float32
    assert inputs[0] == TOKENIZER.bos_id
    said = labels != TOKENIZER.pad_id
    end = said.sum()
    assert said[:end].all()  # padding only at the end
    np.testing.assert_array_equal(inputs[1:end], labels[: end - 1])
    assert (inputs[end:] == TOKENIZER.pad_id).all()
    assert (weights[end:] == 0).all()


@given(count=st.integers(0, 14), seed=st.integers(0, 2**32 - 1))
def test_corruption_changes_the_classes_that_are_read_and_nothing_else(count, seed):
    example = BUILDER(*random_objects(count, seed), rng(seed))
    after = np.arange(1, BUILDER.length)
    differs = example["input_ids"][1:] != example["labels"][:-1]
    assert (after[differs] % TOKENS_PER_OBJECT == 0).all()  # input t + 1 reads the class said at t = 4, 9, ...


def expected_weights(build: SequenceBuilder, num_real: int) -> np.ndarray:
    """The table of weights, written out."""
    real, noise = [1, 1, 1, 1, 1], [0, 0, 0, 0, build.noise_weight]
    if build.noise_objects:
        return np.array(num_real * real + (build.max_objects - num_real) * noise, dtype=np.float32)
    weights = num_real * real + [build.eos_weight]
    return np.array(weights + [0] * (build.length - len(weights)), dtype=np.float32)


@pytest.mark.parametrize("num_real", [0, 1, 3, 9, 10])
@pytest.mark.parametrize("noise_objects", [True, False])
@pytest.mark.parametrize("order", ["random", "none"])
def test_weights_are_the_tables(num_real, noise_objects, order):
    """A bug others shipped: weights one token late, and noise coordinates that count."""
    build = dataclasses.replace(BUILDER, noise_objects=noise_objects, order=order)
    example = build(*random_objects(num_real, 5), rng(1))
    np.testing.assert_array_equal(example["token_weights"], expected_weights(build, num_real))


@given(count=st.integers(0, 14), seed=st.integers(0, 2**32 - 1))
def test_real_objects_come_first_and_noise_fills_the_slots(count, seed):
    """A bug others shipped: noise mixed in among the real objects."""
    boxes, labels = random_objects(count, seed)
    objects = objects_of(BUILDER(boxes, labels, rng(seed))["labels"])
    num_real = min(count, BUILDER.max_objects)
    assert len(objects) == BUILDER.max_objects
    assert (objects[:num_real, CLASS_SLOT] != TOKENIZER.noise_id).all()
    assert (objects[num_real:, CLASS_SLOT] == TOKENIZER.noise_id).all()
    said = {tuple(row) for row in objects[:num_real].tolist()}
    assert said <= {tuple(row) for row in TOKENIZER.encode(boxes, labels).tolist()}
    assert len(TOKENIZER.decode(objects)[0]) == BUILDER.max_objects


def test_real_objects_are_not_jittered():
    """A bug others shipped: real boxes were moved by 5 % too."""
    build = dataclasses.replace(BUILDER, order="none")
    np.testing.assert_array_equal(
        objects_of(build(BOXES, LABELS, rng())["labels"])[:3], TOKENIZER.encode(BOXES, LABELS)
    )


def test_noise_has_its_shares_of_each_kind():
    """A bug others shipped: near-duplicates must be jittered by at most a tenth of the box, and on
    average be half of the noise; a quarter is real boxes moved elsewhere with width and height kept, not swapped."""
    box = np.array([[0.45, 0.4, 0.55, 0.7]])  # in the middle, so that few moved boxes are clipped
    size = np.array([0.1, 0.3])
    per_image, moved = [], 0
    for seed in range(300):
        made = noise_boxes(box, 40, rng(seed))[0]
        made_size = made[:, 2:] - made[:, :2]
        same_size = np.isclose(made_size, size, rtol=1e-9, atol=0).all(axis=1)
        swapped = np.isclose(made_size, size[::-1], rtol=1e-9, atol=0).all(axis=1)
        inside = ((made > 0) & (made < 1)).all(axis=1)
        # A duplicate is jittered edge by edge: a mere shift would keep its size exactly.
        near = (np.abs(made - box) <= 0.1 * np.tile(size, 2) + 1e-12).all(axis=1) & ~same_size
        assert not (swapped & inside).any()
        per_image.append(near.sum())
        moved += (same_size & inside).sum()
    total, duplicates = 300 * 40, sum(per_image)
    assert 0.42 < duplicates / total < 0.58
    # Centre uniform over the picture: (1 - 0.1) * (1 - 0.3) of the moved boxes lie inside and keep their size.
    assert 0.25 * 0.63 - 0.04 < moved / total < 0.25 * 0.63 + 0.04
    # The split varies over its whole range from image to image.
    assert min(per_image) <= 3
    assert max(per_image) >= 37


def test_near_duplicates_are_spread_over_all_objects_and_edges_move_both_ways():
    """A bug others shipped: duplicates were limited to one for each object."""
    made = np.concatenate([noise_boxes(BOXES, 90, rng(seed))[0] for seed in range(60)])
    size = np.tile(BOXES[:, 2:] - BOXES[:, :2], 2)
    offset = (made[:, None] - BOXES) / size
    near = (np.abs(offset) <= 0.1 + 1e-9).all(axis=2)
    counts = near.sum(axis=0)
    assert counts.min() > 0.8 * counts.max()
    assert counts.sum() > 60 * 90 / 3
    offset = offset[near]
    assert (np.abs(offset.mean(axis=0)) < 0.01).all()
    assert (np.abs(offset.std(axis=0) - 0.044) < 0.003).all()  # sigma 0.05 cut off at two sigma
    assert np.abs(np.corrcoef(offset.T)[np.triu_indices(4, 1)]).max() < 0.1


def test_moved_boxes_have_their_centre_anywhere():
    box = np.array([[0.49, 0.495, 0.51, 0.505]])
    made = np.concatenate([noise_boxes(box, 50, rng(seed))[0] for seed in range(100)])
    moved = made[np.isclose(made[:, 2:] - made[:, :2], [0.02, 0.01]).all(axis=1)]
    centre = (moved[:, :2] + moved[:, 2:]) / 2
    assert len(centre) > 500
    assert (np.abs(centre.mean(axis=0) - 0.5) < 0.05).all()
    assert (np.abs(centre.std(axis=0) - 1 / 12**0.5) < 0.03).all()


def test_an_image_without_objects_gives_random_noise():
    """A bug others shipped: without real boxes no noise came out at all."""
    objects = objects_of(BUILDER(np.zeros((0, 4)), np.zeros(0, int), rng())["labels"])
    assert len(objects) == 10
    assert (objects[:, CLASS_SLOT] == TOKENIZER.noise_id).all()
    made = noise_boxes(np.zeros((0, 4)), 2000, rng())[0]
    assert len(np.unique(made, axis=0)) == 2000
    # Sizes are |normal| of sigma 0.5 cut off at 1, seen through the edges of the picture.
    inside = ((made > 0) & (made < 1)).all(axis=1)
    assert (made[inside, 2:] - made[inside, :2]).std() > 0.1
    assert ((made >= 0) & (made <= 1)).all()


@given(
    count=st.integers(0, 30),
    num_boxes=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_boxes_are_as_many_as_asked_and_well_formed(count, num_boxes, seed):
    made = noise_boxes(random_objects(num_boxes, seed)[0], count, rng(seed))[0]
    assert made.shape == (count, 4)
    assert ((made >= 0) & (made <= 1)).all()
    assert (made[:, :2] <= made[:, 2:]).all()


@given(width=st.floats(0.05, 1), height=st.floats(0.05, 1), count=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_noise_never_lies_in_the_padding(width, height, count, seed):
    boxes, labels = random_objects(count, seed)
    boxes = boxes * [width, height, width, height]
    decoded, _ = TOKENIZER.decode(BUILDER(boxes, labels, rng(seed), valid_fraction=(width, height))["labels"])
    half_a_bin = 0.5 / 999 + 1e-9
    assert decoded[:, [0, 2]].max() <= width + half_a_bin
    assert decoded[:, [1, 3]].max() <= height + half_a_bin


def test_noise_fills_the_content():
    """The noise is made in the picture and then scaled: were it clipped to it, it would pile up at the edge."""
    made = []
    for seed in range(50):
        example = BUILDER(np.zeros((0, 4)), np.zeros(0, int), rng(seed), valid_fraction=(0.5, 0.25))
        made.append(TOKENIZER.decode(example["labels"])[0])
    centre = np.concatenate(made).reshape(-1, 2, 2).mean(axis=1)
    assert np.abs(centre.mean(axis=0) - [0.25, 0.125]).max() < 0.02


# Of the classes that are read: the true one, any class at random (the true one by chance too), NOISE.
CORRUPTION = {
    "none": (1, 0, 0),
    "rand_cls": (0, 1, 0),
    "rand_n_fake_cls": (0, 0.5, 0.5),
    "real_n_fake_cls": (0.5, 0, 0.5),
    "real_n_rand_n_fake_cls": (0.5, 0.25, 0.25),
}


@pytest.mark.parametrize("mode", CORRUPTION)
def test_corruption_has_its_frequencies(mode):
    true, anything, fake = CORRUPTION[mode]
    build = SequenceBuilder(TOKENIZER, max_objects=100, class_corruption=mode)
    read, said = [], []
    for seed in range(100):
        example = build(*random_objects(70, seed), rng(seed))
        read.append(objects_of(np.append(example["input_ids"][1:], 0))[:-1, CLASS_SLOT])
        said.append(objects_of(example["labels"])[:-1, CLASS_SLOT])
        reference = dataclasses.replace(build, class_corruption="none")(*random_objects(70, seed), rng(seed))
        np.testing.assert_array_equal(example["labels"], reference["labels"])  # what is said is never corrupted
        np.testing.assert_array_equal(example["token_weights"], reference["token_weights"])
    read, said = np.concatenate(read), np.concatenate(said)
    real = said != TOKENIZER.noise_id
    classes = TOKENIZER.num_classes
    in_range = (read >= TOKENIZER.first_class_id) & (read < TOKENIZER.first_bin_id)
    assert (in_range | (read == TOKENIZER.noise_id)).all()
    # Bounds are four standard errors of about 7000 draws.
    assert (read[real] == said[real]).mean() == pytest.approx(true + anything / classes, abs=0.025)
    assert (read[real] == TOKENIZER.noise_id).mean() == pytest.approx(fake, abs=0.025)
    assert (read[~real] == TOKENIZER.noise_id).mean() == pytest.approx(true + fake, abs=0.04)
    if anything:
        drawn = read[~real & in_range]
        shares = np.bincount(drawn - TOKENIZER.first_class_id, minlength=classes) / len(drawn)
        assert shares == pytest.approx(np.full(classes, 1 / classes), abs=0.06)


def test_by_default_the_true_class_is_read_by_chance_only():
    """A bug others shipped: ports that keep the true class in the input teach the model to lean on it."""
    build = SequenceBuilder(TOKENIZER, max_objects=100)
    assert build.class_corruption == "rand_n_fake_cls"
    same = []
    for seed in range(60):
        example = build(*random_objects(99, seed), rng(seed))
        # The class of object k is label 5 k + 4, read as input 5 k + 5.
        same.append(example["input_ids"][5:500:5] == example["labels"][4:495:5])
    assert np.mean(same) == pytest.approx(0.5 / TOKENIZER.num_classes, abs=0.015)


def test_corruption_does_not_need_a_random_order():
    """A bug others shipped: corruption was silently off when the order was fixed."""
    build = dataclasses.replace(BUILDER, order="area", class_corruption="rand_n_fake_cls")
    read = [build(BOXES, LABELS, rng(seed))["input_ids"][5] for seed in range(40)]
    assert len(set(read)) > 2


@pytest.mark.parametrize("order", ["random", "area", "distance", "none"])
@pytest.mark.parametrize("noise_objects", [True, False])
def test_more_objects_than_slots(order, noise_objects):
    build = dataclasses.replace(BUILDER, order=order, noise_objects=noise_objects)
    boxes, labels = random_objects(25, 2)
    example = build(boxes, labels, rng())
    said = objects_of(example["labels"])
    written = {tuple(row) for row in TOKENIZER.encode(boxes, labels).tolist()}
    assert len(said) == 10
    assert len({tuple(row) for row in said.tolist()} & written) == 10
    assert (example["token_weights"][:50] == 1).all()


def test_a_random_order_gives_every_object_its_turn_when_there_are_too_many():
    boxes, labels = random_objects(25, 2)
    first = TOKENIZER.encode(boxes, labels).tolist()
    seen = {
        tuple(row) for seed in range(40) for row in objects_of(BUILDER(boxes, labels, rng(seed))["labels"]).tolist()
    }
    assert seen == {tuple(row) for row in first}


@pytest.mark.parametrize("num_real", [0, 3, 10, 15])
def test_without_noise_the_sentence_ends_in_eos(num_real):
    """A full sentence too: the slot for EOS lies after max_objects objects."""
    build = dataclasses.replace(BUILDER, noise_objects=False)
    example = build(*random_objects(num_real, 3), rng())
    end = TOKENS_PER_OBJECT * min(num_real, 10)
    assert build.length == 51
    assert example["labels"][end] == TOKENIZER.eos_id
    assert example["token_weights"][end] == np.float32(0.1)
    assert (example["labels"] == TOKENIZER.eos_id).sum() == 1
    assert (example["labels"][end + 1 :] == TOKENIZER.pad_id).all()
    assert (example["token_weights"][end + 1 :] == 0).all()
    assert TOKENIZER.eos_id not in example["input_ids"]
    assert len(TOKENIZER.decode(example["labels"])[0]) == min(num_real, 10)


def test_with_noise_eos_is_never_said():
    """A bug others shipped: EOS learnt in a sentence that noise fills makes the model stop early."""
    for count in (0, 3, 10, 15):
        example = BUILDER(*random_objects(count, 3), rng())
        assert TOKENIZER.eos_id not in example["labels"]
        assert TOKENIZER.pad_id not in example["labels"]
        assert BUILDER.length == 50


def real_order(order: str, seed: int = 0) -> list[int]:
    """Which of BOXES the sentence writes first, second and third."""
    build = dataclasses.replace(BUILDER, order=order)
    written = TOKENIZER.encode(BOXES, LABELS).tolist()
    return [written.index(row) for row in objects_of(build(BOXES, LABELS, rng(seed))["labels"])[:3].tolist()]


def test_fixed_orders():
    # Areas 0.08, 0.08 and 0.02: equal areas keep their order. Corners are 0.224, 0.707 and 0.2236 from the origin.
    boxes = BOXES.copy()
    assert real_order("area") in ([0, 1, 2], [1, 0, 2])
    assert real_order("distance")[-1] == 1
    assert real_order("none") == [0, 1, 2]
    boxes[0] = [0.3, 0.3, 0.4, 0.4]
    build = dataclasses.replace(BUILDER, order="area")
    assert objects_of(build(boxes, LABELS, rng())["labels"])[:3, 4].tolist() == [4, 11, 6]
    build = dataclasses.replace(BUILDER, order="distance")
    assert objects_of(build(boxes, LABELS, rng())["labels"])[:3, 4].tolist() == [11, 6, 4]


def test_a_random_order_takes_every_order():
    orders = [tuple(real_order("random", seed)) for seed in range(120)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("noise_objects", [True, False])
def test_the_generator_decides_everything(noise_objects):
    build = dataclasses.replace(BUILDER, noise_objects=noise_objects)
    first, again, other = (build(BOXES, LABELS, rng(seed)) for seed in (1, 1, 2))
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    assert (first["labels"] != other["labels"]).any()


def test_the_arrays_given_are_not_changed():
    boxes, labels = BOXES.copy(), LABELS.copy()
    BUILDER(boxes, labels, rng(), valid_fraction=(0.9, 0.7))
    np.testing.assert_array_equal(boxes, BOXES)
    np.testing.assert_array_equal(labels, LABELS)


def test_labels_decode_to_the_objects():
    boxes, labels = TOKENIZER.decode(dataclasses.replace(BUILDER, order="none")(BOXES, LABELS, rng())["labels"])
    assert np.abs(boxes[:3] - BOXES).max() <= 0.5 / 999 + 1e-12
    assert labels[:3].tolist() == LABELS.tolist()
    assert (labels[3:] == NOISE_LABEL).all()


# -- options ---------------------------------------------------------------------------------------


def test_box_jitter_moves_edges_by_up_to_its_share_and_not_the_noise():
    boxes, labels = np.array([[0.2, 0.3, 0.6, 0.7], [0.0, 0.0, 1.0, 0.5]]), np.array([0, 1])
    tokenizer = Tokenizer(2, 2000)
    moved = []
    for seed in range(200):
        build = SequenceBuilder(tokenizer, 4, order="none", box_jitter=0.1)
        found, kinds = tokenizer.decode(build(boxes, labels, np.random.default_rng(seed))["labels"])
        assert kinds.tolist() == [0, 1, NOISE_LABEL, NOISE_LABEL]
        assert (found >= 0).all()
        assert (found <= 1).all()
        moved.append((found[0] - boxes[0]) / 0.4)
    moved = np.array(moved)
    assert 0.085 < np.abs(moved).max() <= 0.1 + 1e-3
    assert 0.035 < moved.std() < 0.05  # sigma is half of it, cut at two sigma
    assert abs(moved.mean()) < 0.01


def test_box_jitter_stays_inside_the_picture():
    build = SequenceBuilder(Tokenizer(1, 1000), 1, box_jitter=0.2)
    for seed in range(50):
        arrays = build(np.array([[0.0, 0.0, 0.5, 0.25]]), np.zeros(1, int), np.random.default_rng(seed), (0.5, 0.25))
        (box,), _ = build.tokenizer.decode(arrays["labels"])
        assert box[2] <= 0.5 + 1e-3
        assert box[3] <= 0.25 + 1e-3


@pytest.mark.parametrize(("mix_rate", "low", "high"), [(0.0, 0, 0), (0.5, 20, 55), (1.0, 50, 95)])
def test_mixed_noise_stands_among_the_objects_with_its_own_weights(mix_rate, low, high):
    boxes, labels = np.array([[0.2, 0.3, 0.6, 0.7]] * 3), np.array([0, 1, 2])
    tokenizer, mixed = Tokenizer(3, 100), 0
    build = SequenceBuilder(tokenizer, 8, mix_rate=mix_rate, noise_weight=0.5)
    for seed in range(100):
        arrays = build(boxes, labels, np.random.default_rng(seed))
        _, kinds = tokenizer.decode(arrays["labels"])
        assert sorted(kinds.tolist()) == [NOISE_LABEL] * 5 + [0, 1, 2]
        weights = arrays["token_weights"].reshape(8, 5)
        assert (weights[kinds >= 0] == 1).all()
        assert (weights[kinds < 0] == [0, 0, 0, 0, 0.5]).all()
        mixed += (kinds[:3] < 0).any()
    assert low <= mixed <= high  # sometimes all noise is near-duplicates


def test_near_duplicates_follow_what_they_repeat_also_when_mixed():
    tokenizer, boxes = Tokenizer(1, 1000), np.array([[0.3, 0.3, 0.5, 0.5]])
    build = SequenceBuilder(tokenizer, 12, mix_rate=1.0)
    after, before = 0, 0
    for seed in range(100):
        found, kinds = tokenizer.decode(build(boxes, np.zeros(1, int), np.random.default_rng(seed))["labels"])
        near = np.abs(found - boxes[0]).max(axis=1) < 0.021  # a tenth of its size, and a bin
        place = kinds.tolist().index(0)
        before += near[:place].sum()
        after += near[place + 1 :].sum()
    assert before == 0
    assert after > 200


def test_options_that_are_off_draw_nothing():
    boxes, labels = np.array([[0.2, 0.3, 0.6, 0.7]] * 3), np.array([0, 1, 2])
    plain = SequenceBuilder(Tokenizer(3, 100), 8)(boxes, labels, np.random.default_rng(4))
    off = SequenceBuilder(Tokenizer(3, 100), 8, box_jitter=0, mix_rate=0)(boxes, labels, np.random.default_rng(4))
    assert all(np.array_equal(plain[name], off[name]) for name in plain)


def test_mixing_keeps_the_order_of_the_real_objects():
    boxes = np.array([[0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.9, 0.9]])
    build = SequenceBuilder(Tokenizer(3, 100), 10, order="area", mix_rate=1.0)
    for seed in range(30):
        _, kinds = build.tokenizer.decode(build(boxes, np.arange(3), np.random.default_rng(seed))["labels"])
        assert kinds[kinds >= 0].tolist() == [2, 1, 0]
