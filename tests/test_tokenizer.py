import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pix2seq.tokenizer import CLASS_SLOT, NOISE_LABEL, TOKENS_PER_OBJECT, Tokenizer

TOKENIZER = Tokenizer(num_classes=3, num_bins=11)


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    corners = np.random.default_rng(seed).random((count, 2, 2))
    return np.sort(corners, axis=1).reshape(count, 4)


@given(num_bins=st.integers(2, 2000), seed=st.integers(0, 2**32 - 1))
def test_round_trip_error_is_at_most_half_a_bin(num_bins, seed):
    tokenizer = Tokenizer(5, num_bins)
    boxes = random_boxes(20, seed)
    labels = np.random.default_rng(seed).integers(NOISE_LABEL, 5, 20)
    decoded, decoded_labels = tokenizer.decode(tokenizer.encode(boxes, labels))
    assert np.abs(decoded - boxes).max() <= 0.5 / (num_bins - 1) + 1e-12
    np.testing.assert_array_equal(decoded_labels, labels)


@pytest.mark.parametrize("num_bins", [10, 100, 1000])
def test_round_trip_has_no_bias(num_bins):
    """Truncating instead of rounding, a common bug, gives a bias of -0.5 bins. The standard error is 0.002."""
    tokenizer = Tokenizer(1, num_bins)
    boxes = random_boxes(20_000)
    decoded, _ = tokenizer.decode(tokenizer.encode(boxes, np.zeros(len(boxes), int)))
    assert np.abs((decoded - boxes).mean(axis=0) * (num_bins - 1)).max() < 0.02


@given(num_bins=st.integers(2, 2000))
def test_bins_survive_the_round_trip_and_cover_the_image(num_bins):
    tokenizer = Tokenizer(2, num_bins)
    ids = np.arange(tokenizer.first_bin_id, tokenizer.vocab_size)
    coordinates = tokenizer.dequantize(ids)
    np.testing.assert_array_equal(tokenizer.quantize(coordinates), ids)
    assert (coordinates[0], coordinates[-1]) == (0.0, 1.0)


def test_coordinates_outside_the_image_are_clipped():
    assert TOKENIZER.dequantize(TOKENIZER.quantize(np.array([-0.3, 1.7]))).tolist() == [0.0, 1.0]


@given(num_classes=st.integers(1, 100), num_bins=st.integers(2, 2000))
def test_id_ranges_are_disjoint_and_cover_the_vocabulary(num_classes, num_bins):
    tokenizer = Tokenizer(num_classes, num_bins)
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.noise_id]
    classes = range(tokenizer.first_class_id, tokenizer.first_class_id + num_classes)
    bins = range(tokenizer.first_bin_id, tokenizer.first_bin_id + num_bins)
    assert sorted([*special, *classes, *bins]) == list(range(tokenizer.vocab_size))


def test_an_object_is_encoded_as_y1_x1_y2_x2_class():
    x1, y1, x2, y2 = 0.1, 0.2, 0.7, 0.9
    ids = TOKENIZER.encode(np.array([[x1, y1, x2, y2]]), np.array([2]))
    first_bin = TOKENIZER.first_bin_id
    assert ids.dtype == np.int64
    assert ids.tolist() == [[first_bin + 2, first_bin + 1, first_bin + 9, first_bin + 7, TOKENIZER.first_class_id + 2]]
    noise = TOKENIZER.encode(np.array([[0, 0, 1, 1]]), np.array([NOISE_LABEL]))
    assert noise[0, CLASS_SLOT] == TOKENIZER.noise_id


def test_no_objects():
    ids = TOKENIZER.encode(np.zeros((0, 4)), np.zeros(0, int))
    assert ids.shape == (0, 5)
    boxes, labels = TOKENIZER.decode(ids)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


@given(st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, TOKENIZER.vocab_size + 2), max_size=60))
def test_any_ids_decode_to_valid_boxes(ids):
    boxes, labels = TOKENIZER.decode(np.array(ids, dtype=np.int64))
    assert boxes.shape == (len(labels), 4)
    assert len(labels) <= len(ids) // TOKENS_PER_OBJECT
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert ((labels >= NOISE_LABEL) & (labels < TOKENIZER.num_classes)).all()


@pytest.mark.parametrize("end", [Tokenizer.eos_id, Tokenizer.pad_id])
def test_decoding_stops_at_eos_and_pad(end):
    tokens = TOKENIZER.encode(np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([1])).reshape(-1)
    assert TOKENIZER.decode(np.concatenate([tokens, [end], tokens, tokens]))[1].tolist() == [1]
    assert len(TOKENIZER.decode(np.concatenate([[end], tokens]))[0]) == 0
    assert len(TOKENIZER.decode(np.concatenate([tokens, tokens[:3], [end], tokens]))[0]) == 1


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_an_incomplete_object_is_dropped(length):
    tokens = TOKENIZER.encode(random_boxes(2), np.array([0, 1])).reshape(-1)
    assert TOKENIZER.decode(tokens[: 5 + length])[1].tolist() == [0]


@pytest.mark.parametrize(
    ("slot", "token"),
    [
        (0, TOKENIZER.first_class_id),
        (3, TOKENIZER.noise_id),
        (1, TOKENIZER.bos_id),
        (2, TOKENIZER.vocab_size),
        (4, TOKENIZER.first_bin_id),
        (4, TOKENIZER.bos_id),
        (4, -7),
    ],
)
def test_a_malformed_object_is_dropped(slot, token):
    """Decoding a class id in a coordinate slot as coordinate 0, a common bug, gives a degenerate box."""
    ids = TOKENIZER.encode(random_boxes(3), np.array([0, 1, 2]))
    ids[1, slot] = token
    assert TOKENIZER.decode(ids)[1].tolist() == [0, 2]


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="num_bins is 1"):
        Tokenizer(3, 1)
    with pytest.raises(ValueError, match="num_classes is 0"):
        Tokenizer(0, 10)
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            TOKENIZER.encode(np.array([[0, 0, value, 1]]), np.array([0]))
    for label in (-2, 3):
        with pytest.raises(ValueError, match=r"-1 \.\.\. 2"):
            TOKENIZER.encode(np.array([[0, 0, 1, 1]]), np.array([label]))


def test_token_to_str():
    ids = [0, 1, 2, TOKENIZER.noise_id, TOKENIZER.first_class_id, TOKENIZER.first_bin_id + 7]
    assert [TOKENIZER.token_to_str(token, "abc") for token in ids] == ["PAD", "BOS", "EOS", "NOISE", "a", "7"]
