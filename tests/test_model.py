"""The network with both decoders: attention masks, positions, loss, saving, initialization, parameter groups."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, ResNetConfig

from pix2seq.generation import DecodingOptions
from pix2seq.models import Pix2SeqConfig, Pix2SeqForObjectDetection
from pix2seq.models.llama_decoder import prefix_positions
from pix2seq.models.position_embedding import position_embedding_2d
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.training.optimizer import parameter_groups
from tests.test_architectures import BACKBONES, DECODERS, build, images, scale_weights, token_ids

TOKENIZER = Tokenizer(4, 50)  # of `make_model`
TINY_VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
both_decoders = pytest.mark.parametrize("decoder", DECODERS)


def training_batch(count: int) -> dict[str, torch.Tensor]:
    """Training sequences with two objects and two noise objects each."""
    build_sequence = SequenceBuilder(TOKENIZER, max_objects=4, noise_weight=0.5)
    rows = []
    for row in range(count):
        rng = np.random.default_rng((0, row))
        boxes = np.sort(rng.random((2, 2, 2)), axis=1).reshape(2, 4)
        rows.append(build_sequence(boxes, rng.integers(0, 4, 2), rng))
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


# -- attention and positions -----------------------------------------------------------------------


@both_decoders
@pytest.mark.parametrize("decoder_layers", [1, 2])
@pytest.mark.parametrize("backbone", ["resnet", "dinov3_vit"])
def test_incremental_decoding_equals_the_forward_pass(decoder, decoder_layers, backbone):
    model = scale_weights(build(decoder, BACKBONES[backbone], decoder_layers=decoder_layers).eval(), 0.5)
    with torch.no_grad():
        expected = model(images(), token_ids()).logits
        single = model(images()[1:], token_ids()[1:]).logits
        state = model.prefill(images(), 15)
        actual = torch.stack([model.decode_step(token_ids()[:, i], i, state) for i in range(15)], dim=1)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(single, expected[1:], atol=1e-4, rtol=0)
    assert expected.std() > 1


@both_decoders
@pytest.mark.parametrize("position", [0, 3, 8, 14])
def test_a_token_changes_the_logits_from_its_position_on_only(decoder, position):
    model, changed = scale_weights(build(decoder).eval(), 0.5), token_ids()
    changed[:, position] = (changed[:, position] + 7) % 27
    with torch.no_grad():
        expected, actual = model(images(), token_ids()).logits, model(images(), changed).logits
    torch.testing.assert_close(actual[:, :position], expected[:, :position])
    assert ((actual - expected)[:, position:].abs().amax(2) > 1e-6).all()


@both_decoders
def test_the_order_of_tokens_matters(decoder):
    """With one layer and no positions, the last token could not tell in which order the others came."""
    model, swapped = scale_weights(build(decoder, decoder_layers=1).eval(), 0.5), token_ids(1)
    swapped[:, [2, 7]] = swapped[:, [7, 2]]
    with torch.no_grad():
        difference = model(images(1), token_ids(1)).logits[:, -1] - model(images(1), swapped).logits[:, -1]
    assert difference.abs().max() > 0.01


@both_decoders
def test_every_token_attends_to_all_visual_tokens(decoder):
    model = scale_weights(build(decoder, encoder_layers=0, decoder_layers=1).eval(), 0.5)
    visual_tokens = model.encode(images(1)).detach().requires_grad_()
    logits = model.decoder.lm_head(model.decoder(visual_tokens, token_ids(1)).last_hidden_state)
    for position in range(0, 15, 3):
        (gradient,) = torch.autograd.grad(logits[0, position].square().sum(), visual_tokens, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_causal_prefix(causal):
    model = build(causal_prefix=causal, encoder_layers=0).eval()
    visual_tokens = torch.randn(1, 6, 16)
    changed = visual_tokens.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        first, second = (model.decoder.encode_prefix(tokens).layers[1].keys for tokens in (visual_tokens, changed))
    assert torch.equal(first[:, :, 0], second[:, :, 0]) == causal


@pytest.mark.parametrize("causal_prefix", [False, True])
def test_the_llama_decoder_equals_llama_with_a_mask(make_model, causal_prefix):
    """Hidden states and gradients, although attention is computed in two parts and the last layer is trimmed."""
    model = scale_weights(
        make_model(decoder={"causal_prefix": causal_prefix, "spatial_modulation": False}), 0.5
    ).train()
    input_ids, num_visual = token_ids(2), 5
    visual_tokens = torch.randn(2, num_visual, 16, requires_grad=True)
    plain = LlamaForCausalLM(copy.deepcopy(model.decoder.config)).train()
    plain.set_attn_implementation("sdpa")
    plain.load_state_dict(model.decoder.state_dict())
    total = num_visual + input_ids.shape[1]
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    if not causal_prefix:
        visible[:num_visual, :num_visual] = True
    mask = torch.zeros(total, total).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    expected = plain.model(
        inputs_embeds=torch.cat([visual_tokens, plain.get_input_embeddings()(input_ids)], dim=1),
        attention_mask=mask,
        position_ids=prefix_positions(num_visual, input_ids.shape[1], "cpu"),
    ).last_hidden_state[:, num_visual:]
    actual = model.decoder(visual_tokens, input_ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), [visual_tokens, *plain.model.parameters()])
    gradients = torch.autograd.grad((actual * direction).sum(), [visual_tokens, *model.decoder.model.parameters()])
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_hooks_of_the_decoder_are_called(make_model):
    model, calls = make_model(), []
    model.decoder.register_forward_hook(lambda *args: calls.append(args))
    model(images(1), token_ids(1))
    assert len(calls) == 1


@pytest.mark.parametrize("num_visual", [0, 4, 100])
def test_positions_of_the_sequence_do_not_depend_on_the_number_of_visual_tokens(num_visual):
    assert prefix_positions(num_visual, 5, "cpu")[0].tolist() == [0] * num_visual + [1, 2, 3, 4, 5]


def test_weights_can_be_used_at_another_image_size(make_model):
    larger = make_model(image_size=96)
    assert larger.load_state_dict(make_model().state_dict()).missing_keys == []
    assert larger(images(1, 96), token_ids(1)).logits.isfinite().all()


def test_logits_depend_on_the_image_and_visual_tokens_on_their_location(make_model):
    model = make_model()
    with torch.no_grad():
        logits = model(images(), token_ids(1).expand(2, -1)).logits
        visual_tokens = model.encode(torch.full((1, 3, 64, 64), 200, dtype=torch.uint8))[0]
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    assert torch.cdist(visual_tokens, visual_tokens).fill_diagonal_(1).min() > 1e-3


def test_uint8_pixels_are_normalized(make_model):
    model = make_model(image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images()), model.encode((images() / 255 - mean) / std))


def test_max_objects_is_limited_by_learned_positions():
    options = DecodingOptions(max_objects=9)
    assert len(build("llama").eval().detect(images(1), options)[0].labels) == 9
    with pytest.raises(ValueError, match="max_objects 9: this model can predict at most 3"):
        build("transformer").eval().detect(images(1), options)


# -- loss ------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_cross_entropy_where_the_weight_is_not_0(make_model):
    model, batch = make_model(), training_batch(3)
    counted, weights = batch["token_weights"] > 0, batch["token_weights"][batch["token_weights"] > 0]
    assert weights.tolist() == 3 * ([1] * 10 + [0.5] * 2)
    logits = model(images(3), batch["input_ids"]).logits
    expected = F.cross_entropy(logits[counted], batch["labels"][counted], reduction="none")
    output = model(images(3), **batch)
    torch.testing.assert_close(output.logits, logits[counted])
    torch.testing.assert_close(output.token_losses, expected)
    total = (weights * expected).sum().item()
    assert output.loss.item() == pytest.approx(total / weights.sum().item(), rel=1e-5)
    assert model(images(3), **batch, num_items_in_batch=7.0).loss.item() == pytest.approx(total / 7, rel=1e-5)


def test_labels_without_weight_do_not_change_gradients(make_model):
    model, batch = make_model(), training_batch(2)
    other, ignored = batch["labels"].clone(), batch["token_weights"] == 0
    assert ignored.sum() == 2 * 2 * 4
    other[ignored] = torch.randint(4, TOKENIZER.vocab_size, (int(ignored.sum()),))
    gradients = []
    for labels in (batch["labels"], other):
        model.zero_grad()
        model(images(), **batch | {"labels": labels}).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_losses_of_micro_batches_add_up_with_num_items_in_batch(make_model):
    model, batch = make_model(), training_batch(4)
    batch["token_weights"][0, 5:] = 0
    expected = model(images(4), **batch).loss
    total = batch["token_weights"].sum()
    parts = [
        model(images(4)[rows], **{key: value[rows] for key, value in batch.items()}, num_items_in_batch=total).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1, 3000])
def test_the_loss_is_float32_under_autocast(make_model, scale):
    model, batch = make_model(), training_batch(2)
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images(), **batch)
        logits = model.decode_step(batch["input_ids"][:, 0], 0, model.prefill(images(), 20))
    for tensor in (output.loss, output.token_losses, output.logits, logits):
        assert tensor.dtype == torch.float32
    counted = batch["token_weights"] > 0
    expected = F.cross_entropy(output.logits.double(), batch["labels"][counted], reduction="none")
    torch.testing.assert_close(output.token_losses.double(), expected, atol=1e-5, rtol=1e-5)
    weights = batch["token_weights"][counted].double()
    assert output.loss.item() == pytest.approx(((weights * expected).sum() / weights.sum()).item(), rel=1e-5)


# -- saving, drop path, initialization -------------------------------------------------------------


def test_the_config_is_saved(make_model, tmp_path):
    config = make_model(num_bins=77, noise_objects=False, decoding={"top_p": 0.2, "temperature": 1.5}).config
    config.save_pretrained(tmp_path)
    restored = Pix2SeqConfig.from_pretrained(tmp_path)
    for key in ("hidden_size", "encoder_layers", "image_size", "image_mean", "num_bins", "noise_objects", "decoding"):
        assert getattr(restored, key) == getattr(config, key)
    assert restored.category_ids == [1, 3, 7, 11]
    assert restored.id2label == {0: "ellipse", 1: "rectangle", 2: "triangle", 3: "cross"}
    assert isinstance(restored.backbone_config, ResNetConfig)
    assert restored.backbone_config.hidden_sizes == [8, 16]
    assert restored.decoder_config.to_dict() == config.decoder_config.to_dict()
    assert copy.deepcopy(restored).to_dict() == restored.to_dict()


@both_decoders
def test_tied_embeddings_and_output_bias_are_saved(decoder, tmp_path):
    model = build(decoder)
    assert (model.decoder.lm_head.bias is not None) == (decoder == "transformer") == model.config.output_bias
    if model.config.output_bias:
        assert not model.decoder.lm_head.bias.any()
        with torch.no_grad():
            model.decoder.lm_head.bias += 1.5
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path)
    for each in (model, restored):
        assert each.decoder.lm_head.weight is each.decoder.get_input_embeddings().weight
    if model.config.output_bias:
        assert (restored.decoder.lm_head.bias == 1.5).all()


@both_decoders
def test_drop_path_drops_whole_branches_in_training_only(decoder):
    model = build(decoder, dropout=0.0, drop_path=0.5)
    with torch.no_grad():
        torch.manual_seed(1)
        first = model(images(), token_ids()).logits
        assert not torch.allclose(first, model(images(), token_ids()).logits)
        model.eval()
        assert torch.equal(model(images(), token_ids()).logits, model(images(), token_ids()).logits)
    ends = [m for n, m in model.decoder.named_modules() if n.endswith(("o_proj", "out_proj", "down_proj", "fc2"))]
    assert len(ends) == {"llama": 4, "transformer": 6}[decoder]  # two layers of two or three branches
    for module in ends:
        module.train()
        outputs = module(torch.randn(200, 3, module.in_features))
        assert 60 < (outputs == 0).flatten(1).all(1).sum() < 140


@both_decoders
def test_a_model_can_be_pickled(decoder):
    model = build(decoder, drop_path=0.5).eval()
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(images(), token_ids()).logits, model(images(), token_ids()).logits)
    restored.config.drop_path = 0.0
    assert model.config.drop_path == 0.5


@pytest.mark.parametrize("embedding_type", ["original", "fine"])
@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 8), (4, 4, 16), (3, 7, 32), (20, 20, 256)])
def test_position_embeddings_are_distinct(height, width, channels, embedding_type):
    embedding = position_embedding_2d(height, width, channels, embedding_type)
    assert embedding.shape == (height * width, channels)
    assert embedding.abs().max() <= 1
    if height * width > 1:
        assert torch.cdist(embedding.double(), embedding.double()).fill_diagonal_(1).min() > 1e-2


def test_the_original_position_embedding_is_that_of_the_authors():
    """y before x, sines before cosines, coordinates scaled to 2 pi, frequencies 10000^(-2i/d)."""
    embedding = position_embedding_2d(3, 5, 8, "original").reshape(3, 5, 8)
    for row in range(3):
        for column in range(5):
            expected = []
            for angle in (2 * math.pi * row / 2, 2 * math.pi * column / 4):
                scaled = [angle * 10000 ** (-2 * i / 4) for i in range(2)]
                expected += [math.sin(a) for a in scaled] + [math.cos(a) for a in scaled]
            assert embedding[row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_sine_bin_embeddings_match_the_position_embedding_at_their_coordinate(make_model):
    model = make_model(position_embedding="fine", bin_init="sine", num_bins=64, decoder={"hidden_size": 32})
    bins = model.decoder.get_input_embeddings().weight[-64:].detach()
    assert bins.std() == pytest.approx(model.config.decoder_config.initializer_range, rel=0.15)
    cells = position_embedding_2d(8, 8, 32, "fine").reshape(8, 8, 32)
    for number in range(64):
        cell = min(int((number / 63) * 8), 7)
        assert (cells[:, 0, :16] @ bins[number, :16]).argmax() == cell
        assert (cells[0, :, 16:] @ bins[number, 16:]).argmax() == cell


def test_loading_does_not_initialize_bin_embeddings(make_model, tmp_path):
    model = make_model(bin_init="sine")
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight.normal_()
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path)
    assert torch.equal(restored.decoder.get_input_embeddings().weight, model.decoder.get_input_embeddings().weight)


# -- parameter groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"backbone_config": TINY_VIT}, {"decoder": {"tie_word_embeddings": False}}])
def test_parameter_groups(make_model, kwargs):
    """Each parameter is in one group; weights of linear layers, convolutions and attention decay, others do not."""
    model = make_model(**copy.deepcopy(kwargs))
    groups = parameter_groups(model, lr=1e-3, lr_backbone=1e-4, weight_decay=0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    settings = {id(p): group for group in groups for p in group["params"]}
    decaying = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and "lm_head" not in name
    }
    for name, parameter in model.named_parameters():
        group = settings[id(parameter)]
        assert group["lr"] == (1e-4 if name.startswith("backbone.") else 1e-3), name
        decays = id(parameter) in decaying or name.endswith("in_proj_weight")
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
