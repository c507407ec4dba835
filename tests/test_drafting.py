"""Several tokens in one pass: what comes out is what would have without, however good the guesses are; and what the
named exceptions to that allow.

`Drafting` says what it is told, guesses what it is told, and depends on positions alone.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import train
import train_drafter
from pix2seq.command_line import parse
from pix2seq.config import Arguments, EvaluateArguments
from pix2seq.decoding import DecodingOptions, NonFiniteLogits
from pix2seq.model import Pix2SeqForObjectDetection, load_detector
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT
from tests.runs import TINY
from tests.test_decoding import TOKENIZER, Rows, Scripted, V, assert_equal, bins, certain, cls, decode, random_logits

NOISE = TOKENIZER.noise_id


class Drafting(Scripted):
    """`guesses` are logits as the others are: (rows, L, V). A thought is the position of the token it led to."""

    def __init__(self, logits: torch.Tensor, guesses: torch.Tensor, noise_objects: bool = True):
        beyond = torch.zeros(len(logits), TOKENS_PER_OBJECT, V)
        super().__init__(torch.cat([logits, beyond], dim=1), noise_objects)
        self.guesses = torch.cat([guesses, beyond], dim=1)
        self.drafter, self.blocks = True, []

    def start_drafting(self, pixel_values: torch.Tensor, length: int) -> tuple[Rows, Rows]:
        return tuple(Rows(pixel_values[:, 0, 0, 0].long()) for _ in range(2))

    def read(self, ids: torch.Tensor, position: torch.Tensor, steps: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        self.blocks.append(ids.tolist())
        positions = position[:, None] + torch.arange(ids.shape[1])
        return positions[..., None].float(), self.logits[steps.rows[:, None], positions]

    def draft(
        self, thoughts: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, memory: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = thoughts[:, 0].long() + 1
        assert slots.tolist() == (positions % TOKENS_PER_OBJECT).tolist()
        return positions[:, None].float(), self.guesses[memory.rows, positions]


def some_right(logits: torch.Tensor, share: float, seed: int = 1) -> torch.Tensor:
    """Guesses that are what will be said, at this share of the positions."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(logits.shape[:2], generator=generator) < share
    return torch.where(right[..., None], logits, random_logits(*logits.shape[:1], logits.shape[1] // 5, seed))


@pytest.mark.parametrize("noise_objects", [True, False])
@pytest.mark.parametrize("top_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stop", [{}, {"stop_after_noise": 2, "noise_score": 0.3}])
def test_what_is_written_does_not_depend_on_the_guesses(noise_objects, top_p, share, stop):
    logits = random_logits(7, 6)
    model = Drafting(logits, some_right(logits, share), noise_objects)
    options = {"max_objects": 6, "top_p": top_p} | stop
    plain = decode(model, range(7), **options)
    drafted = decode(model, range(7), draft="exact", **options)
    alone = [decode(model, [row], draft="exact", **options)[0] for row in range(7)]
    for a, b, c in zip(plain, drafted, alone, strict=True):
        assert_equal(a, b)
        assert_equal(a, c)
        assert b.passes == c.passes <= a.passes


@pytest.mark.parametrize("draft", ["exact", "tolerant", "unverified"])
def test_right_guesses_take_a_pass_an_object(draft):
    logits = random_logits(3, 6)
    found = decode(Drafting(logits, logits), range(3), max_objects=6, top_p=0.4, draft=draft)
    for a, b in zip(found, decode(Drafting(logits, logits), range(3), max_objects=6, top_p=0.4), strict=True):
        assert_equal(a, b)
        assert a.passes == 6 + 1  # before the first object, BOS is read
        assert b.passes == 6 * 5


@pytest.mark.parametrize(("wrong", "passes"), [(1, 3), (2, 3), (3, 3), (4, 2 + 1)])
def test_a_wrong_guess_costs_a_pass(wrong, passes):
    sentence = [*bins(1, 2, 3, 4), cls(0)]
    guess = list(sentence)
    guess[wrong] = cls(1) if wrong == CLASS_SLOT else bins(9)[0]
    model = Drafting(certain([sentence]), certain([guess]))
    found = decode(model, [0], max_objects=1, top_p=0, draft="exact")[0]
    assert_equal(found, decode(model, [0], max_objects=1, top_p=0)[0])
    assert found.passes == passes - (wrong == CLASS_SLOT)  # nothing is left to be said after a class


def test_rows_go_at_their_own_pace_and_leave():
    logits = random_logits(2, 4)
    guesses = torch.stack([logits[0], random_logits(2, 4, seed=5)[1]])
    model = Drafting(logits, guesses)
    fast, slow = decode(model, range(2), max_objects=4, top_p=0, draft="exact")
    assert fast.passes == 5 < slow.passes == len(model.blocks)
    assert [len(block) for block in model.blocks] == [2] * 5 + [1] * (slow.passes - 5)


def test_how_far_off_a_guess_may_be_is_an_option():
    sentence, guess = [*bins(1, 2, 5, 6), cls(0)], [*bins(1, 3, 7, 6), cls(0)]
    model = Drafting(certain([sentence]), certain([guess]))
    found = {k: decode(model, [0], max_objects=1, top_p=0, draft="tolerant", draft_bins=k)[0] for k in (0, 1, 2)}
    assert [found[k].passes for k in (0, 1, 2)] == [4, 3, 2]
    for one in found.values():  # what is written is what the decoder says
        np.testing.assert_array_equal(one.boxes, TOKENIZER.dequantize(np.array([bins(2, 1, 6, 5)])))


@pytest.mark.parametrize("said", ["noise", "class"])
def test_a_second_object_that_both_take_for_noise_is_not_looked_at_closely(said):
    kind = NOISE if said == "noise" else cls(0)
    before = [*bins(0, 0, 0, 0), NOISE]
    model = Drafting(certain([[*before, *bins(1, 2, 5, 6), kind]]), certain([[*before, *bins(1, 9, 9, 9), NOISE]]))
    passes = decode(model, [0], max_objects=2, top_p=0, draft="tolerant")[0].passes
    assert passes == 2 + (1 if said == "noise" else 4)


def test_the_first_object_after_a_real_one_is_looked_at_closely():
    """A guess of the wrong box, and of noise there, must not hide an object."""
    sentence = [*bins(1, 2, 5, 6), cls(0)] * 3
    guess = [*bins(1, 9, 9, 9), NOISE] * 3
    found = decode(Drafting(certain([sentence]), certain([guess])), [0], max_objects=3, top_p=0, draft="tolerant")[0]
    assert found.passes == 3 * 5
    assert (found.scores > 0.9).all()


@pytest.mark.parametrize("draft", ["tolerant", "unverified"])
def test_a_second_corner_keeps_to_the_first_as_it_is_said(draft):
    logits = certain([[*bins(0, 9, 0, 2), cls(0)]])
    logits[0, 3, bins(11)[0]] = 10.0  # of what the grammar leaves, the likeliest
    found = decode(
        Drafting(logits, certain([[*bins(0, 1, 0, 3), cls(0)]])),
        [0],
        **{"max_objects": 1, "top_p": 0, "draft": draft, "draft_bins": 8},
    )[0]
    np.testing.assert_array_equal(found.boxes, TOKENIZER.dequantize(np.array([bins(9, 0, 11, 0)])))


def test_a_class_guessed_wrong_is_not_tolerated():
    """The sentence goes on from what is read."""
    model = Drafting(certain([[*bins(1, 2, 5, 6), cls(0)] * 2]), certain([[*bins(1, 2, 5, 6), cls(1)] * 2]))
    for draft, passes in (("tolerant", 4), ("unverified", 3)):
        found = decode(model, [0], max_objects=2, top_p=0, draft=draft)[0]
        assert found.passes == passes
        assert found.labels.tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_p=st.sampled_from([0.0, 0.4, 1.0]),
    noise_objects=st.booleans(),
    draft=st.sampled_from(["exact", "tolerant", "unverified"]),
    expected_bins=st.sampled_from([0, 2]),
)
def test_any_guesses_give_well_formed_objects(seed, top_p, noise_objects, draft, expected_bins):
    logits = random_logits(20, 5, seed)
    model = Drafting(logits, some_right(logits, 0.5, seed + 1), noise_objects)
    options = {"max_objects": 5, "top_p": top_p, "draft": draft, "draft_bins": 3, "expected_bins": expected_bins}
    for found in decode(model, range(20), sharpness=0.5, **options):
        boxes = found.boxes
        assert len(boxes) == len(found.labels) == len(found.scores) <= 5
        assert noise_objects is False or len(boxes) == 5
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert ((found.labels >= 0) & (found.labels < 3)).all()
        assert ((found.scores >= 0) & (found.scores <= 1)).all()


@pytest.mark.parametrize("draft", ["off", "exact", "tolerant"])
@pytest.mark.parametrize(("position", "options"), [(4, {}), (2, {"expected_bins": 2}), (6, {"sharpness": 1.0})])
def test_logits_that_are_not_finite_name_the_picture(draft, position, options):
    logits = random_logits(3, 2)
    logits[1, position] = float("nan")
    with pytest.raises(NonFiniteLogits, match=r"pictures \[1\]"):
        decode(Drafting(logits, logits), range(3), max_objects=2, top_p=0, draft=draft, **options)


def test_what_is_next_to_impossible_has_a_place():
    logits = random_logits(20, 2, scale=80.0)
    for found in decode(
        Drafting(logits, logits), range(20), max_objects=2, top_p=1.0, temperature=30.0, expected_bins=1
    ):
        assert np.isfinite(found.boxes).all()


# -- better boxes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["off", "exact"])
def test_a_coordinate_is_the_average_of_the_bins_around(draft):
    logits = certain([[*bins(3, 4, 8, 9), cls(0)]])
    # y1: 0.5 at 3, 0.3 at 4, 0.1 at 1 and 7
    for bin, probability in ((3, 0.5), (4, 0.3), (1, 0.1), (7, 0.1)):
        logits[0, 0, bins(bin)[0]] = 20 + np.log(probability)
    found = {
        reach: decode(Drafting(logits, logits), [0], max_objects=1, top_p=0, draft=draft, expected_bins=reach)[0]
        for reach in (0, 1, 2)
    }
    y1 = {reach: one.boxes[0, 1] * (TOKENIZER.num_bins - 1) for reach, one in found.items()}
    assert y1[0] == pytest.approx(3)
    assert y1[1] == pytest.approx((3 * 0.5 + 4 * 0.3) / 0.8, abs=1e-5)
    assert y1[2] == pytest.approx((3 * 0.5 + 4 * 0.3 + 1 * 0.1) / 0.9, abs=1e-5)
    np.testing.assert_allclose(found[2].boxes[0, [0, 2, 3]], found[0].boxes[0, [0, 2, 3]], atol=1e-6)
    sharp = decode(Drafting(logits, logits), [0], max_objects=1, top_p=0, draft=draft, expected_bins=1, sharpness=0.5)[
        0
    ]
    assert sharp.scores[0] == pytest.approx(found[0].scores[0] * 0.8**0.5, rel=1e-5)


def test_as_many_bins_as_one_likes():
    logits = random_logits(2, 2)
    few, many = (
        decode(Scripted(logits), range(2), max_objects=2, top_p=0, expected_bins=count) for count in (V - 1, 10**9)
    )
    for a, b in zip(few, many, strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes)


def test_averages_do_not_turn_a_box_inside_out():
    logits = certain([[*bins(5, 5, 5, 5), cls(0)]])
    logits[0, 0, bins(6)[0]] = 19.9  # y1 tends to be larger, y2 is sure
    box = decode(Drafting(logits, logits), [0], max_objects=1, top_p=0, expected_bins=1)[0].boxes[0]
    assert box[1] > 5 / 11
    assert box[3] == box[1]


@pytest.mark.parametrize("options", [{"draft": "yes"}, {"draft_bins": -1}, {"expected_bins": -1}, {"sharpness": -0.1}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DecodingOptions(**options)


# -- real models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "grouped", "transformer"])
@pytest.mark.parametrize("noise_objects", [True, False])
def test_a_real_decoder_writes_the_same_with_a_drafter(make_model, kind, noise_objects):
    decoder = {
        "llama": {},
        "grouped": {"num_key_value_heads": 1},
        "transformer": {
            "model_type": "blenderbot",
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
        },
    }[kind]
    if kind == "transformer":
        model = make_classic(make_model, decoder, noise_objects)
    else:
        model = make_model(decoder=decoder, noise_objects=noise_objects, max_objects=6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # or everything would be nearly equally likely
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    torch.manual_seed(0)
    model.add_drafter()
    pictures = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8, generator=generator)
    for top_p in (0.0, 0.4):
        options = DecodingOptions(6, top_p=top_p)
        plain = model.detect(pictures, options)
        drafted = model.detect(pictures, replace(options, draft="exact"))
        alone = model.detect(pictures[3:4], replace(options, draft="exact"))[0]
        for a, b in [*zip(plain, drafted, strict=True), (plain[3], alone)]:
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(a.labels, b.labels)
            np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


def make_classic(make_model, decoder: dict, noise_objects: bool):
    """Of the same size as make_model's, with the authors' decoder."""
    from transformers import BlenderbotConfig

    like = make_model(noise_objects=noise_objects, max_objects=6).config
    settings = {k: v for k, v in decoder.items() if k != "model_type"}
    like.decoder_config = BlenderbotConfig(
        vocab_size=like.decoder_config.vocab_size,
        max_position_embeddings=TOKENS_PER_OBJECT * 6 + 2,
        tie_word_embeddings=True,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        **settings,
    )
    return Pix2SeqForObjectDetection(like).eval()


def test_without_a_drafter_there_is_none_to_ask(make_model):
    with pytest.raises(ValueError, match="no drafter"):
        make_model().detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), DecodingOptions(2, draft="exact"))


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory):
    """A tiny detector, and what train_drafter.py makes of it."""
    folder = tmp_path_factory.mktemp("run")
    words = [*TINY, "--root", str(shapes_root), "--output_dir", str(folder / "run"), "--max_steps", "4"]
    assert train.main(parse(Arguments, words)) == 0
    words = ["--checkpoint", str(folder / "run/final"), "--output_dir", str(folder / "drafted"), "--num_workers", "0"]
    assert (
        train_drafter.run(parse(train_drafter.DrafterArguments, [*words, "--max_steps", "3", "--batch_size", "2"]))
        == 0
    )
    return folder / "run/final", folder / "drafted"


def test_the_detector_stays_as_it_is(trained):
    before, after = (load_detector(folder, "--checkpoint") for folder in trained)
    weights = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, weights.pop(name)), name
    assert weights
    assert all(name.startswith("drafter.") for name in weights)


def test_evaluations_agree(trained, tmp_path):
    found = {}
    for draft in ("off", "exact"):
        words = ["--checkpoint", str(trained[1]), "--output_dir", str(tmp_path / draft), "--draft", draft]
        assert evaluate.run(parse(EvaluateArguments, words)) == 0
        found[draft] = json.loads((tmp_path / draft / "predictions.json").read_text())
    assert len(found["off"]) == len(found["exact"]) > 0
    for a, b in zip(found["off"], found["exact"], strict=True):
        assert a["bbox"] == b["bbox"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_a_drafted_detector_can_be_fine_tuned(trained, shapes_root, tmp_path):
    words = [*TINY, "--root", str(shapes_root), "--output_dir", str(tmp_path), "--max_steps", "1"]
    assert train.main(parse(Arguments, [*words, "--init_from", str(trained[1])])) == 0
    tuned = load_detector(tmp_path / "final", "--checkpoint")
    assert tuned.drafter is None


def test_a_drafter_learns_to_guess(make_model):
    """What the detector says of two pictures, by heart."""
    model = make_model(max_objects=2).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(8.0)
    torch.manual_seed(0)
    model.add_drafter()
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    options = DecodingOptions(2, top_p=0)
    before = sum(one.passes for one in model.detect(pictures, replace(options, draft="exact")))
    optimizer = torch.optim.AdamW(model.drafter.parameters(), lr=1e-2)
    for _ in range(60):
        loss, right = train_drafter.draft_loss(model, pictures, options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = sum(one.passes for one in model.detect(pictures, replace(options, draft="exact")))
    assert after <= before / 2
    assert right.shape == (4,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "x"], "--checkpoint: missing"),
        (["--checkpoint", "x"], "--output_dir: missing"),
        (["--checkpoint", "x", "--output_dir", "y", "--max_steps", "0"], "--max_steps 0: must be at least 1"),
        (["--checkpoint", "x", "--output_dir", "y", "--lr", "0"], "--lr 0.0: must be above 0"),
        (["--checkpoint", "x", "--output_dir", "y", "--train_images", "z"], "go together"),
    ],
)
def test_bad_flags_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(train_drafter.DrafterArguments, words, "train_drafter.py")
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [{"decoder": {"hidden_size": 24, "num_attention_heads": 3}}, {"encoder_heads": 4}])
def test_encoder_and_decoder_may_differ_in_width(make_model, sizes):
    model = make_model(max_objects=2, **sizes)
    model.add_drafter()
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    plain, drafted = (model.detect(pictures, DecodingOptions(2, top_p=0, draft=draft)) for draft in ("off", "exact"))
    for a, b in zip(plain, drafted, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)


def test_in_half_precision_most_boxes_are_the_same(make_model):
    model = make_model(max_objects=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    model.add_drafter()
    model = model.to(torch.bfloat16)
    pictures = torch.randint(0, 256, (20, 3, 64, 64), dtype=torch.uint8, generator=generator)
    plain, drafted = (model.detect(pictures, DecodingOptions(4, top_p=0, draft=draft)) for draft in ("off", "exact"))
    assert sum(np.array_equal(a.boxes, b.boxes) for a, b in zip(plain, drafted, strict=True)) >= 10


def test_another_versions_flags_lose_no_work(trained, tmp_path, capsys):
    folder = tmp_path / "old"
    shutil.copytree(trained[0], folder)
    (folder / "MANIFEST.json").unlink()
    with (folder / "training.yaml").open("a") as file:
        file.write("a_flag_of_long_ago: 3\n")
    words = ["--checkpoint", str(folder), "--max_steps", "1", "--batch_size", "2", "--num_workers", "0"]
    for output, code in ((tmp_path / "new", 0), (folder / "training.yaml" / "new", 2)):
        assert train_drafter.run(parse(train_drafter.DrafterArguments, [*words, "--output_dir", str(output)])) == code
    assert load_detector(tmp_path / "new", "--checkpoint").drafter is not None
    assert "cannot be made" in capsys.readouterr().err


def test_nothing_is_overwritten(trained, capsys):
    words = ["--checkpoint", str(trained[0]), "--output_dir", str(trained[0])]
    assert train_drafter.run(parse(train_drafter.DrafterArguments, words)) == 2
    assert "is there already" in capsys.readouterr().err


def test_evaluate_says_that_there_is_no_drafter(trained, capsys):
    words = ["--checkpoint", str(trained[0]), "--draft", "tolerant"]
    assert evaluate.run(parse(EvaluateArguments, words)) == 2
    assert "--draft tolerant: this detector has no drafter" in capsys.readouterr().err
