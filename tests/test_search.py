"""What benchmarks.writing tries beside the product's ways of writing."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.search import TEMPERATURES, are_right, beam_search, fitted_temperature, scored_anew
from pix2seq.decoding import DecodingOptions, Detections
from pix2seq.decoding.grammar import Grammar
from pix2seq.tokenizer import Tokenizer
from tests.test_architectures import build

TOKENIZER = Tokenizer(num_classes=2, num_bins=4)


class Chain:
    """What it says next depends on the token before, and on the picture, a number."""

    tokenizer, config = TOKENIZER, SimpleNamespace(noise_objects=True)

    def __init__(self):
        size = (3, 5, TOKENIZER.vocab_size, TOKENIZER.vocab_size)
        self.logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(0))

    def start(self, pixel_values, length):
        steps = SimpleNamespace(rows=pixel_values[:, 0, 0, 0].long())
        steps.keep = lambda indices: setattr(steps, "rows", steps.rows[indices])
        return steps

    def step(self, ids, position, steps, rows=slice(None)):
        return self.logits[steps.rows, position, ids][:, rows]

    def likeliest(self, picture: int) -> list[int]:
        """By looking at every sentence of one object."""
        grammar, bins = Grammar(TOKENIZER, allow_eos=False), range(TOKENIZER.first_bin_id, TOKENIZER.vocab_size)
        best, found = -np.inf, None
        for words in itertools.product(bins, bins, bins, bins, range(TOKENIZER.noise_id, TOKENIZER.first_bin_id)):
            total, before = 0.0, TOKENIZER.bos_id
            for slot, word in enumerate(words):
                corner = torch.tensor([words[slot - 2]]) if slot in (2, 3) else None
                rows = grammar.rows[slot]
                logits = grammar(self.logits[picture, slot, before][None, rows], slot, corner).log_softmax(-1)
                total, before = total + float(logits[0, word - rows.start]), word
            if total > best:
                best, found = total, list(words)
        return found


def test_many_beams_find_the_likeliest_sentence():
    model, pixels = Chain(), torch.arange(3.0)[:, None, None, None].expand(3, 3, 4, 4)
    found = beam_search(model, pixels, 1000, DecodingOptions(1, top_p=0.0))
    for picture, one in enumerate(found):
        *corners, word = model.likeliest(picture)
        boxes = TOKENIZER.dequantize(np.array([corners])[:, [1, 0, 3, 2]])
        np.testing.assert_array_equal(one.boxes, boxes)
        classes = model.logits[picture, 4, corners[3]].softmax(-1)[TOKENIZER.first_class_id : TOKENIZER.first_bin_id]
        assert (one.labels[0], one.scores[0]) == (classes.argmax(), pytest.approx(float(classes.max())))
        assert word in (TOKENIZER.noise_id, TOKENIZER.first_class_id + one.labels[0])
    assert {one.passes for one in found} == {5000}


def test_one_beam_is_greedy(make_model):
    model = make_model(seed=3)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options, heard = DecodingOptions(4, top_p=0.0), torch.zeros(3, 4, model.tokenizer.vocab_size)
    found = beam_search(model, pixels, 1, options, heard)
    for ours, theirs, logits in zip(found, model.detect(pixels, options), heard, strict=True):
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        same = scored_anew(ours, logits, model.tokenizer.first_class_id, 1.0)
        np.testing.assert_allclose(same.scores, theirs.scores, rtol=1e-5)


@pytest.mark.parametrize("decoder", ["llama", "transformer"])
def test_a_beam_goes_on_with_its_own_past(decoder):
    """What is said of the winning sentence is what the model says when it reads it as a whole."""
    model = build(decoder, drop_path=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    generator, tokenizer = torch.Generator().manual_seed(1), model.tokenizer
    side, options = model.config.image_size, DecodingOptions(2, top_p=0.0)
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=generator)
    wide, narrow = (beam_search(model, pixels, width, options) for width in (3, 1))
    differ, first_bin = 0, tokenizer.first_bin_id
    for picture, one, greedy in zip(pixels, wide, narrow, strict=True):
        totals = []
        for found in (one, greedy):
            # Which word was said of the first object's class, a score does not tell; only one leads to the second's.
            readings = [whole_reading(model, picture, found, word) for word in range(tokenizer.noise_id, first_bin)]
            total, scores = min(readings, key=lambda reading: abs(reading[1][1] - found.scores[1]))
            np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
            totals.append(total)
        assert totals[0] > totals[1] - 1e-3
        differ += not np.array_equal(one.boxes, greedy.boxes)
    assert differ


def whole_reading(model, picture: torch.Tensor, found: Detections, first_class: int) -> tuple[float, np.ndarray]:
    """The log-likelihood of a sentence of two objects under the grammar, and their scores."""
    tokenizer = model.tokenizer
    grammar = Grammar(tokenizer, allow_eos=False)
    bins = np.rint(found.boxes * (tokenizer.num_bins - 1)).astype(int)[:, [1, 0, 3, 2]] + tokenizer.first_bin_id
    sentence, total, scores = [], 0.0, []
    for corners, label in zip(bins.tolist(), found.labels.tolist(), strict=True):
        for slot in range(5):
            with torch.no_grad():
                logits = model(picture[None], torch.tensor([[tokenizer.bos_id, *sentence]])).logits[0, -1].float()
            rows = grammar.rows[slot]
            corner = torch.tensor([sentence[-2]]) if slot in (2, 3) else None
            allowed = grammar(logits[None, rows], slot, corner).log_softmax(-1)[0]
            word = rows.start + int(allowed.argmax()) if len(sentence) > 5 else first_class
            word = corners[slot] if slot < 4 else word
            total += float(allowed[word - rows.start])
            sentence.append(word)
        scores.append(float(logits.softmax(-1)[tokenizer.first_class_id + label]))
    return total, np.array(scores)


def test_the_temperature_at_which_the_logits_were_true_is_found():
    rng, first = np.random.default_rng(0), TOKENIZER.first_class_id
    logits = torch.from_numpy(rng.normal(0, 3, (5000, TOKENIZER.vocab_size)))
    labels = logits[:, first : first + 2].argmax(-1).numpy()
    found = [Detections(np.zeros((5000, 4)), labels, np.zeros(5000), 1)]
    for truth in TEMPERATURES[3:8]:
        right = rng.random(5000) < scored_anew(found[0], logits, first, truth).scores
        assert fitted_temperature(found, [logits], [right], first) == pytest.approx(truth, rel=0.21)


def test_a_box_is_right_on_one_of_its_class():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 4.0]])
    found = Detections(boxes, np.array([0, 0, 0]), np.ones(3), 1)
    truth = np.array([[0, 0, 10, 9], [20, 20, 30, 30.0]]), np.array([0, 1])
    assert are_right(found, *truth).tolist() == [True, False, False]
    assert are_right(found, np.zeros((0, 4)), np.zeros(0, int)).tolist() == [False] * 3
