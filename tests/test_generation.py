"""Generation follows the grammar and the sampling rule, and each image's result does not depend on its batch.

Most models here are scripted: anything with `prefill`, `decode_step` and `config.noise_objects` can be decoded.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.logits_process import TopPLogitsWarper

from benchmarks.decode import PrefixedLlama, generate_with_transformers
from pix2seq.generation import (
    DecodingOptions,
    Grammar,
    Interrupted,
    NonFiniteLogits,
    generate,
    generate_tokens,
    sample_top_p,
)
from pix2seq.models import Detections, fused_decoders
from pix2seq.models.detections import to_detections
from pix2seq.tokenizer import CLASS_SLOT, NOISE_LABEL, TOKENS_PER_OBJECT, Tokenizer
from tests.test_architectures import build, images, scale_weights

TOKENIZER = Tokenizer(num_classes=3, num_bins=12)
VOCAB_SIZE = TOKENIZER.vocab_size


class ScriptedModel:
    """Returns given logits (images, L, V). The first pixel of an image is its index."""

    def __init__(self, logits: torch.Tensor, noise_objects: bool = True):
        self.logits = logits
        self.config = SimpleNamespace(noise_objects=noise_objects)
        self.inputs: list[list[int]] = []

    def prefill(self, pixel_values: torch.Tensor, max_length: int) -> "ScriptedState":
        return ScriptedState(pixel_values[:, 0, 0, 0].long())

    def decode_step(
        self, token_ids, position, incremental_decoder: "ScriptedState", vocab_slice: slice
    ) -> torch.Tensor:
        self.inputs.append(token_ids.tolist())
        logits = self.logits[incremental_decoder.indices]
        if isinstance(position, torch.Tensor):  # indexing with a 0-d tensor would read its value in Python
            return logits.index_select(1, position.view(1))[:, 0, vocab_slice]
        return logits[:, position, vocab_slice]


@dataclass
class ScriptedState:
    indices: torch.Tensor

    def select_batch(self, rows: torch.Tensor) -> None:
        self.indices = self.indices[rows]


def pixels(indices) -> torch.Tensor:
    return torch.tensor(list(indices), dtype=torch.float32)[:, None, None, None].expand(-1, 3, 4, 4)


def random_logits(num_images: int, num_objects: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_images, TOKENS_PER_OBJECT * num_objects, VOCAB_SIZE, generator=generator)


def certain(sequences: list[list[int]]) -> torch.Tensor:
    """Logits with nearly all probability on the tokens of these sequences."""
    return 20.0 * torch.nn.functional.one_hot(torch.tensor(sequences), VOCAB_SIZE).float()


def decode(model, indices, interrupted=lambda: False, **options) -> list[Detections]:
    options = DecodingOptions(**options)
    state = generate_tokens(model, pixels(indices), TOKENIZER, options, interrupted)
    return to_detections(state, TOKENIZER, options)


def assert_equal(actual: Detections, expected: Detections) -> None:
    np.testing.assert_array_equal(actual.boxes, expected.boxes)
    np.testing.assert_array_equal(actual.labels, expected.labels)
    np.testing.assert_array_equal(actual.scores, expected.scores)


def bins(*values: int) -> list[int]:
    return [TOKENIZER.first_bin_id + value for value in values]


def cls(label: int) -> int:
    return TOKENIZER.first_class_id + label


OBJECT, OTHER, EOS = [*bins(1, 2, 3, 4), cls(0)], [*bins(6, 6, 7, 7), cls(1)], [TOKENIZER.eos_id]


# -- grammar ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    top_p=st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    noise_objects=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_any_logits_give_well_formed_objects(seed, top_p, temperature, noise_objects, scale):
    model = ScriptedModel(random_logits(3, 4, seed, scale), noise_objects)
    for detections in decode(model, range(3), max_objects=4, top_p=top_p, temperature=temperature, seed=seed):
        if noise_objects:
            assert len(detections.boxes) == 4
        assert detections.boxes.shape == (len(detections.labels), 4)
        assert detections.scores.shape == detections.labels.shape
        assert detections.boxes.dtype == detections.scores.dtype == np.float64
        assert detections.labels.dtype == np.int64
        assert ((detections.boxes >= 0) & (detections.boxes <= 1)).all()
        assert (detections.boxes[:, 2:] >= detections.boxes[:, :2]).all()
        assert ((detections.labels >= 0) & (detections.labels < TOKENIZER.num_classes)).all()
        assert ((detections.scores >= 0) & (detections.scores <= 1)).all()


@pytest.mark.parametrize("noise_objects", [True, False])
def test_generated_tokens_follow_the_grammar(noise_objects):
    for seed in range(10):
        model = ScriptedModel(random_logits(10_000, 2, seed, scale=2.0), noise_objects)
        decode(model, range(10_000), max_objects=2, top_p=1.0, seed=seed)
        assert model.inputs[0] == [TOKENIZER.bos_id] * 10_000
        for position, tokens in enumerate(model.inputs[1:]):  # without EOS: the row has left the batch
            tokens = np.array(tokens)
            is_class = (tokens >= TOKENIZER.noise_id) & (tokens < TOKENIZER.first_bin_id)
            is_bin = tokens >= TOKENIZER.first_bin_id
            assert (is_class if position % TOKENS_PER_OBJECT == CLASS_SLOT else is_bin).all()
            assert len(tokens) == 10_000 or not noise_objects


@pytest.mark.parametrize("noise_objects", [True, False])
@pytest.mark.parametrize("top_p", [0.0, 0.4, 1.0])
def test_batch_invariance(noise_objects, top_p):
    model = ScriptedModel(random_logits(8, 5, 1, scale=1.5), noise_objects)
    options = {"max_objects": 5, "top_p": top_p}
    batch = decode(model, range(8), **options)
    for index in range(8):
        assert_equal(decode(model, [index], **options)[0], batch[index])
    for index, detections in zip((5, 2), decode(model, (5, 2), **options), strict=True):
        assert_equal(detections, batch[index])


def test_corner_constraints_are_those_of_the_row():
    logits = certain([[*bins(8, 8, 2, 2), cls(1)], [*bins(1, 1, 2, 2), cls(1)]])
    logits[0, 2:4, TOKENIZER.first_bin_id + 9] = 10.0  # the second choice of row 0 is allowed
    first, second = decode(ScriptedModel(logits), range(2), max_objects=1, top_p=0)
    assert first.boxes * 11 == pytest.approx(np.array([[8, 8, 9, 9]]))
    assert second.boxes * 11 == pytest.approx(np.array([[1, 1, 2, 2]]))


@pytest.mark.parametrize(("slot", "corner"), [(2, 2), (3, 9), (3, 11)])
def test_second_corner_is_not_before_the_first(slot, corner):
    grammar = Grammar(TOKENIZER, allow_eos=False)
    assert grammar.vocab_slices[slot] == slice(TOKENIZER.first_bin_id, VOCAB_SIZE)
    allowed = grammar(torch.zeros(1, 12), slot, torch.tensor(bins(corner))).isfinite()[0]
    assert torch.nonzero(allowed).flatten().tolist() == list(range(corner, 12))


@pytest.mark.parametrize("top_p", [0.0, 0.4, 1.0])
def test_a_corner_in_the_last_bin_leaves_one_token(top_p):
    model = ScriptedModel(certain([[*bins(11, 11, 0, 0), cls(2)]]))
    detections = decode(model, [0], max_objects=1, top_p=top_p)[0]
    assert detections.boxes.tolist() == [[1, 1, 1, 1]]
    assert detections.labels.tolist() == [2]


@pytest.mark.parametrize("top_p", [0.0, 0.4])
def test_a_scripted_sequence_is_reproduced(top_p):
    objects = np.array([[*bins(1, 2, 3, 4), cls(0)], [*bins(0, 9, 5, 10), cls(2)], [*bins(7, 7, 9, 8), cls(1)]])
    model = ScriptedModel(certain([objects.reshape(-1).tolist()]))
    detections = decode(model, [0], max_objects=3, top_p=top_p)[0]
    boxes, labels = TOKENIZER.decode(objects)
    np.testing.assert_array_equal(detections.boxes, boxes)
    np.testing.assert_array_equal(detections.labels, labels)
    assert (detections.scores > 0.999).all()
    assert model.inputs == [[TOKENIZER.bos_id], *([token] for token in objects.reshape(-1)[:-1].tolist())]


# -- end of a sequence -----------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.0, 0.4, 1.0])
def test_a_model_trained_with_noise_objects_does_not_stop(top_p):
    logits = random_logits(2, 4, 0, scale=1)
    logits[..., TOKENIZER.eos_id] = 100.0
    logits[..., TOKENIZER.pad_id] = 90.0
    for detections in decode(ScriptedModel(logits), range(2), max_objects=4, top_p=top_p):
        assert len(detections.boxes) == 4


def test_a_model_trained_without_noise_objects_stops_at_eos():
    sequences = [(EOS + OTHER * 3)[:15], (OBJECT + EOS + OTHER * 3)[:15], OBJECT * 3]
    model = ScriptedModel(certain(sequences), noise_objects=False)
    batch = decode(model, range(3), max_objects=3, top_p=0)
    assert [len(detections.boxes) for detections in batch] == [0, 1, 3]
    assert batch[1].boxes * 11 == pytest.approx(np.array([[2, 1, 4, 3]]))
    assert_equal(batch[1], decode(model, [1], max_objects=3, top_p=0)[0])


def test_decoding_ends_when_all_rows_have_ended():
    model = ScriptedModel(certain([OBJECT + EOS + [cls(0)] * 14, EOS + [cls(0)] * 19]), noise_objects=False)
    decode(model, range(2), max_objects=4, top_p=0)
    assert len(model.inputs) == 6  # BOS and five tokens


def test_eos_is_not_allowed_within_an_object():
    logits = certain([OBJECT])
    logits[:, 1:, TOKENIZER.eos_id] = 100.0
    model = ScriptedModel(logits, noise_objects=False)
    assert len(decode(model, [0], max_objects=1, top_p=0)[0].boxes) == 1


# -- labels and scores -----------------------------------------------------------------------------


def class_logits(**probabilities: float) -> torch.Tensor:
    """One object whose class token has these probabilities: noise, c0, c1, c2, bin."""
    ids = {"noise": TOKENIZER.noise_id, "c0": cls(0), "c1": cls(1), "c2": cls(2), "bin": TOKENIZER.first_bin_id}
    logits = certain([OBJECT])
    logits[0, CLASS_SLOT] = -100.0
    for name, probability in probabilities.items():
        logits[0, CLASS_SLOT, ids[name]] = np.log(probability)
    return logits


@pytest.mark.parametrize("top_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("probabilities", "label", "score"),
    [
        ({"c1": 0.5, "c2": 0.2, "noise": 0.3}, 1, 0.5),
        ({"c1": 0.1, "c2": 0.04, "noise": 0.86}, 1, 0.1),
        ({"c0": 0.5, "bin": 0.5}, 0, 0.5),
    ],
)
def test_the_score_is_the_probability_of_the_class_among_all_tokens(top_p, probabilities, label, score):
    model = ScriptedModel(class_logits(**probabilities))
    detections = decode(model, [0], max_objects=1, top_p=top_p, temperature=2.0)[0]
    assert detections.labels.tolist() == [label]
    assert detections.scores == pytest.approx([score])


def test_a_noise_object_keeps_its_best_class():
    logits = torch.cat([class_logits(noise=0.9, c2=0.06, c0=0.04), certain([OTHER])], dim=1)
    model = ScriptedModel(logits)
    detections = decode(model, [0], max_objects=2, top_p=0)[0]
    assert model.inputs[5] == [TOKENIZER.noise_id]
    assert detections.labels.tolist() == [2, 1]
    assert detections.scores == pytest.approx([0.06, 1.0], abs=1e-4)
    assert NOISE_LABEL not in detections.labels


def test_label_and_score_do_not_depend_on_the_sampled_class():
    model = ScriptedModel(class_logits(c0=0.4, c1=0.35, noise=0.25))
    samples = [decode(model, [0], max_objects=1, top_p=1.0, seed=seed)[0] for seed in range(12)]
    assert {detections.labels.item() for detections in samples} == {0}
    assert {round(detections.scores.item(), 6) for detections in samples} == {0.4}


def test_expectation_radius_and_box_score_power():
    logits = certain([OBJECT])
    logits[0, 0] = -100.0
    logits[0, 0, bins(1, 2, 9)] = torch.tensor([0.5, 0.3, 0.2]).log()
    detections = decode(ScriptedModel(logits), [0], max_objects=1, top_p=0, expectation_radius=2, box_score_power=0.5)[
        0
    ]
    assert detections.boxes[0, 1] * 11 == pytest.approx((0.5 * 1 + 0.3 * 2) / 0.8)
    assert detections.boxes[0, [0, 2, 3]] * 11 == pytest.approx([2, 4, 3], abs=1e-4)
    assert detections.scores == pytest.approx([0.8**0.5], abs=1e-4)


# -- several sequences of an image -----------------------------------------------------------------


def test_objects_of_several_sequences_are_merged():
    model, options = ScriptedModel(random_logits(2, 4)), {"max_objects": 4, "top_p": 0.9}
    state = generate_tokens(model, pixels([0, 1]), TOKENIZER, DecodingOptions(num_samples=3, **options))
    samples = to_detections(state, TOKENIZER, DecodingOptions(**options))
    assert len(samples) == 6
    for first, single in zip(samples[::3], decode(model, [0, 1], **options), strict=True):
        assert_equal(first, single)  # the first sequence does not depend on the number
    for index, merged in enumerate(decode(model, [0, 1], num_samples=3, **options)):
        found = {(*box, label) for s in samples[3 * index :][:3] for box, label in zip(s.boxes, s.labels, strict=True)}
        assert len(found) > 4
        assert {(*box, label) for box, label in zip(merged.boxes, merged.labels, strict=True)} <= found
        assert len(merged.boxes) == 4
        assert (np.diff(merged.scores) <= 0).all()
        assert merged.num_steps == 3 * 4 * TOKENS_PER_OBJECT
        assert_equal(merged, decode(model, [index], num_samples=3, **options)[0])  # alone


def test_an_object_that_is_found_twice_remains_once():
    same = [*bins(1, 2, 8, 9), cls(0)]
    near, other_class, far = [*bins(1, 3, 8, 9), cls(0)], [*bins(1, 2, 8, 9), cls(1)], [*bins(5, 2, 8, 5), cls(0)]
    logits = certain([same + near + other_class + far])
    merged = decode(ScriptedModel(logits), [0], max_objects=4, top_p=0.5, num_samples=2)[0]
    assert sorted(merged.labels.tolist()) == [0, 0, 1]
    assert np.unique(merged.boxes[merged.labels == 0], axis=0).shape == (2, 4)


def test_sequences_end_at_different_lengths():
    logits = torch.cat([certain([OBJECT]), torch.zeros(1, 5, VOCAB_SIZE), certain([OTHER])], dim=1)
    model = ScriptedModel(logits, noise_objects=False)
    options = DecodingOptions(max_objects=3, top_p=1.0, num_samples=8)
    state = generate_tokens(model, pixels([0]), TOKENIZER, options)
    assert state.indices.tolist() == list(range(8))
    assert (state.tokens[:, :5] == torch.tensor(OBJECT)).all()


@pytest.mark.parametrize("can_fuse", [True, False])
def test_sequences_of_models(make_model, monkeypatch, can_fuse):
    if not can_fuse:
        monkeypatch.setattr("pix2seq.models.incremental_decoder.can_fuse", lambda decoder: False)
    model = make_model()
    side = model.config.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = DecodingOptions(max_objects=3, top_p=0.9, num_samples=3)
    tokens = generate_tokens(model, images, model.tokenizer, options).tokens
    single = generate_tokens(model, images, model.tokenizer, replace(options, num_samples=1)).tokens
    assert torch.equal(tokens[::3], single)
    assert len(tokens.unique(dim=0)) == 6
    assert torch.equal(tokens[3:], generate_tokens(model, images[1:], model.tokenizer, options).tokens)
    assert [len(detections.boxes) for detections in model.detect(images, options)] == [3, 3]


def test_several_greedy_sequences_are_an_error():
    with pytest.raises(ValueError, match="num_samples 2: must be 1 with top_p 0"):
        DecodingOptions(top_p=0, num_samples=2)


# -- sampling --------------------------------------------------------------------------------------


def frequencies(probabilities, top_p: float, temperature: float = 1.0, draws: int = 4000) -> np.ndarray:
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    logits = DecodingOptions(top_p=top_p, temperature=temperature).process_logits(logits)
    sampled = sample_top_p(logits, top_p, uniform)
    return np.bincount(sampled.numpy(), minlength=len(probabilities)) / draws


def test_the_token_that_crosses_top_p_is_dropped():
    """transformers keeps it: 0.3 + 0.25 <= 0.6, but 0.3 + 0.25 + 0.2 is not."""
    probabilities = [0.05, 0.3, 0.2, 0.25, 0.12, 0.08]
    sampled = frequencies(probabilities, 0.6)
    transformers_kept = TopPLogitsWarper(0.6)(None, torch.tensor([probabilities]).log()).isfinite()[0]
    assert np.flatnonzero(sampled).tolist() == [1, 3]
    assert torch.nonzero(transformers_kept).flatten().tolist() == [1, 2, 3]
    assert sampled[[1, 3]] == pytest.approx([0.3 / 0.55, 0.25 / 0.55], abs=0.03)


def test_the_first_token_is_kept_even_if_it_crosses_top_p():
    assert frequencies([0.1, 0.7, 0.2], 0.4).tolist() == [0, 1, 0]
    assert frequencies([0.33, 0.35, 0.32], 0.34).tolist() == [0, 1, 0]


def test_top_p_0_is_argmax_and_1_is_the_whole_distribution():
    logits = random_logits(1, 40)[0]
    assert torch.equal(sample_top_p(logits, 0.0, None), logits.argmax(-1))
    probabilities = [0.02, 0.4, 0.08, 0.3, 0.2]
    assert frequencies(probabilities, 1.0) == pytest.approx(probabilities, abs=0.03)


def test_top_p_of_1_keeps_every_token():
    """The float32 cumulative probability of these tokens is above 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 3, generator=generator)
    sampled = sample_top_p(logits, 1.0, torch.full((2000,), 1 - 2**-24))
    assert torch.equal(sampled, logits.argmin(-1))


def test_temperature():
    high = frequencies([0.1, 0.9], 1.0, temperature=2.0)
    assert high[0] == pytest.approx(0.1**0.5 / (0.1**0.5 + 0.9**0.5), abs=0.03)
    assert frequencies([0.1, 0.9], 1.0, temperature=0.25)[0] < 0.01


@given(seed=st.integers(0, 2**31), top_p=st.floats(0, 1), extreme=st.sampled_from([0.0, 1 - 2**-24]))
def test_forbidden_tokens_are_never_sampled(seed, top_p, extreme):
    logits = random_logits(1, 4, seed, scale=4)[0]
    forbidden = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    forbidden[:, 0] = False
    uniform = torch.full((len(logits),), extreme)
    sampled = sample_top_p(logits.masked_fill(forbidden, -torch.inf), top_p, uniform)
    assert not forbidden.gather(1, sampled[:, None]).any()


def test_sampling_depends_on_the_seed_and_the_image_only():
    model = ScriptedModel(random_logits(1, 6, 3, scale=0.5).expand(4, -1, -1))
    options = {"max_objects": 6, "top_p": 1.0}
    expected = decode(model, range(4), **options)
    torch.manual_seed(1)
    np.random.default_rng(1).random(5)
    for actual, detections in zip(decode(model, range(4), **options), expected, strict=True):
        assert_equal(actual, detections)
    other_seed = decode(model, range(4), **options, seed=1)
    assert all((a.boxes != b.boxes).any() for a, b in zip(expected, other_seed, strict=True))
    assert (expected[0].boxes != expected[1].boxes).any()  # the same logits for another image


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_images_of_any_dtype_can_seed_the_sampling(dtype):
    state = generate_tokens(
        ScriptedModel(random_logits(2, 1)), pixels([0, 1]).to(dtype), TOKENIZER, DecodingOptions(max_objects=1)
    )
    assert state.uniforms.shape == (2, TOKENS_PER_OBJECT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_objects", 0),
        ("top_p", -0.1),
        ("num_samples", 0),
        ("top_p", 1.5),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("noise_patience", -1),
        ("noise_threshold", 1.5),
        ("expectation_radius", -1),
        ("box_score_power", -0.5),
    ],
)
def test_options_out_of_range_are_an_error(name, value):
    with pytest.raises(ValueError, match=f"{name} {value}: must be"):
        DecodingOptions(**{name: value})


# -- CUDA graphs, simulated on a CPU ---------------------------------------------------------------


class Recording(TorchDispatchMode):
    """Simulates a CUDA graph: replays the same operations on the same memory, without running Python code."""

    def __init__(self, function):
        super().__init__()
        self.operations, self.function = [], function
        # Capturing a graph does not run it. This one runs, so that its first replay does nothing.
        with self:
            function()
        self.skip_replay = True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        if self.skip_replay:
            self.skip_replay = False
            return
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(result), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch) -> list[Recording]:
    """Decodes object by object, as on a GPU, from here on. Holds the simulated CUDA graphs."""
    recordings = []

    def capture_cuda_graph(function, device):
        recordings.append(Recording(function))
        return recordings[-1].replay

    monkeypatch.setattr(generate, "decode_by_token", generate.decode_by_object)
    monkeypatch.setattr(generate, "capture_cuda_graph", capture_cuda_graph)
    return recordings


@pytest.mark.parametrize("decoder", ["llama", "transformer"])
@pytest.mark.parametrize("options", [{"top_p": 0}, {"top_p": 0.9}, {"expectation_radius": 2}])
def test_replayed_steps_equal_single_steps(request, decoder, options):
    model = scale_weights(build(decoder, max_objects=4).eval(), 0.5)
    options = DecodingOptions(max_objects=4, **options)
    expected = model.detect(images(12), options)
    recordings = request.getfixturevalue("recordings")
    actual = model.detect(images(12), options)
    assert len(recordings) == 1
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-6)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-6)


@pytest.mark.parametrize(
    ("noise_objects", "options"),
    [(False, {}), (True, {"noise_patience": 2, "noise_threshold": 0.4}), (False, {"top_p": 0})],
)
def test_replayed_steps_do_not_change_ended_rows(request, noise_objects, options):
    logits = random_logits(40, 8)
    if not noise_objects:
        logits[:, ::TOKENS_PER_OBJECT, TOKENIZER.eos_id] += 4.0
    expected = decode(ScriptedModel(logits, noise_objects), range(40), max_objects=8, **options)
    recordings = request.getfixturevalue("recordings")
    actual = decode(ScriptedModel(logits, noise_objects), range(40), max_objects=8, **options)
    for a, b in zip(actual, expected, strict=True):
        assert_equal(a, b)
        assert a.num_steps == b.num_steps
    assert len({len(detections.scores) for detections in expected}) > 3
    assert len(recordings) > 1  # the batch has shrunk


@pytest.mark.parametrize("is_recorded", [False, True])
def test_interruption(request, is_recorded):
    if is_recorded:
        request.getfixturevalue("recordings")
    answers = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        decode(ScriptedModel(random_logits(2, 8)), range(2), lambda: next(answers), max_objects=8)


# -- logits that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_p", [0.0, 0.4])
def test_non_finite_logits_are_an_error_that_names_the_image(value, top_p):
    logits = random_logits(3, 2)
    logits[1, 4] = value
    with pytest.raises(NonFiniteLogits, match=r"images \[1\]") as error:
        decode(ScriptedModel(logits), range(3), max_objects=2, top_p=top_p)
    assert error.value.rows == [1]


@pytest.mark.parametrize("top_p", [0, 0.4])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_nan_where_a_sequence_may_end_is_an_error(request, is_recorded, top_p):
    if is_recorded:
        request.getfixturevalue("recordings")
    logits = random_logits(3, 4)
    logits[1, 5:] = float("nan")
    logits[:, ::5, TOKENIZER.eos_id] -= 50.0
    with pytest.raises(NonFiniteLogits, match=r"images \[1\]"):
        decode(ScriptedModel(logits, noise_objects=False), range(3), max_objects=4, top_p=top_p)


def test_logits_after_the_end_of_a_sequence_may_be_nan(recordings):
    logits = random_logits(5, 4)
    logits[:, 0, TOKENIZER.eos_id] -= 50.0
    logits[0, 5, TOKENIZER.eos_id] += 50.0
    logits[0, 10:] = float("nan")
    batch = decode(ScriptedModel(logits, noise_objects=False), range(5), max_objects=4, top_p=0)
    assert len(batch[0].scores) == 1


# -- noise_patience --------------------------------------------------------------------------------


def logits_with_scores(scores: list[float]) -> torch.Tensor:
    """Logits of objects with these scores. The rest of the probability is that of NOISE."""
    return torch.cat([class_logits(c1=score, noise=1 - score) for score in scores], dim=1)


@pytest.mark.parametrize(
    ("noise_patience", "counts"), [(0, [8, 8, 8]), (1, [1, 3, 2]), (2, [2, 8, 5]), (3, [3, 8, 6]), (9, [8, 8, 8])]
)
def test_noise_patience(noise_patience, counts):
    low, high = 0.1, 0.9
    scores = [[low] * 8, [high, high, low, high, low, high, low, high], [high, low, high, low, low, low, high, high]]
    logits = torch.cat([logits_with_scores(row) for row in scores])
    complete = decode(ScriptedModel(logits), range(3), max_objects=8, top_p=0)
    model = ScriptedModel(logits)
    batch = decode(model, range(3), max_objects=8, top_p=0, noise_patience=noise_patience)
    for detections, expected, count in zip(batch, complete, counts, strict=True):
        assert len(detections.scores) == count
        assert detections.num_steps == 5 * count
        np.testing.assert_array_equal(detections.boxes, expected.boxes[:count])
        np.testing.assert_array_equal(detections.scores, expected.scores[:count])
    assert len(model.inputs) == 5 * max(counts)
    assert sum(len(tokens) for tokens in model.inputs) == 5 * sum(counts)  # ended rows leave the batch


def test_noise_threshold():
    model, options = ScriptedModel(logits_with_scores([0.4] * 3)), {"max_objects": 3, "top_p": 0, "noise_patience": 2}
    assert len(decode(model, [0], **options)[0].scores) == 2
    assert len(decode(model, [0], **options, noise_threshold=0.3)[0].scores) == 3


# -- against transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_tokens_equal_those_of_transformers_generate(make_model, seed):
    # `generate` knows no spatial modulation.
    model = make_model(seed=seed, max_objects=6, decoder={"spatial_modulation": False})
    scale_weights(model, 0.3, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.projector.projection.weight.mul_(5.0)  # so that predictions differ between images
    tokenizer, options = model.tokenizer, DecodingOptions(6, top_p=0)
    coarse = torch.rand(200, 3, 4, 4, generator=generator) * torch.rand(200, 3, 1, 1, generator=generator)
    pixel_values = torch.nn.functional.interpolate(255 * coarse, size=(64, 64)).to(torch.uint8)
    batched = [detections for batch in pixel_values.split(32) for detections in model.detect(batch, options)]
    single = [model.detect(image[None], options)[0] for image in pixel_values[::10]]
    with torch.no_grad():
        visual_tokens, plain = model.encode(pixel_values), PrefixedLlama.from_decoder(model.decoder)
        tokens = generate_with_transformers(model, plain, visual_tokens, 30)
        input_ids = torch.cat([torch.full((200, 1), tokenizer.bos_id), tokens[:, :-1]], dim=1)
        logits = model(pixel_values, input_ids).logits
    classes = slice(tokenizer.first_class_id, tokenizer.first_bin_id)
    best = logits[:, CLASS_SLOT::TOKENS_PER_OBJECT].softmax(-1)[:, :, classes].max(-1)
    boxes = tokenizer.dequantize(tokens.reshape(200, 6, 5)[..., [1, 0, 3, 2]].numpy())
    for detections, box, label, score in zip(batched, boxes, best.indices, best.values, strict=True):
        np.testing.assert_array_equal(detections.boxes, box)
        np.testing.assert_array_equal(detections.labels, label)
        np.testing.assert_allclose(detections.scores, score, atol=1e-6, rtol=0)
    for detections, expected in zip(single, batched[::10], strict=True):
        np.testing.assert_array_equal(detections.boxes, expected.boxes)
        np.testing.assert_allclose(detections.scores, expected.scores, atol=1e-6, rtol=0)
    assert len({detections.boxes.tobytes() for detections in batched}) > 20


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("features", "threads"), [(12, 2), (12, 8), (7, 2)])
@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_fused_linear_equals_its_layers(monkeypatch, bias, features, threads, batch_size):
    monkeypatch.setattr(fused_decoders, "MIN_SPLIT_WEIGHTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layers, scale = [torch.nn.Linear(5, features, bias=bias) for _ in range(2)], torch.rand(5)
    x = torch.randn(batch_size, 5)
    with torch.inference_mode():
        fused = fused_decoders.FusedLinear.from_linears(*layers, like=x, input_scale=scale)
        assert (fused.split_weight is not None) == (batch_size < fused_decoders.MIN_PACKED_BATCH)
        torch.testing.assert_close(fused(x), torch.cat([layer(x * scale) for layer in layers], dim=1))
        part = fused_decoders.FusedLinear.from_linears(layers[0], like=x, output_slice=slice(2, 7))
        torch.testing.assert_close(part(x), layers[0](x)[:, 2:7])
