"""The network: what may see what, what is counted, and that a saved detector is the same detector."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaForCausalLM,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqConfig, Pix2SeqForObjectDetection
from pix2seq.models.backbone import IMAGENET_MEAN, IMAGENET_STD, VisionBackbone, resolve_backbone
from pix2seq.models.llama_decoder import prefix_positions
from pix2seq.models.position_embedding import position_embedding_2d
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.training.optimizer import parameter_groups

TOKENIZER = Tokenizer(4, 50)
TINY_VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}


def pictures(count: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def ids(count: int, length: int = 20, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, TOKENIZER.vocab_size, (count, length), generator=generator)


def batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Real training sentences: two objects each, two of noise."""
    build = SequenceBuilder(TOKENIZER, max_objects=4, noise_weight=0.5)
    rows = []
    for row in range(count):
        rng = np.random.default_rng((seed, row))
        boxes = np.sort(rng.random((2, 2, 2)), axis=1).reshape(2, 4)
        rows.append(build(boxes, rng.integers(0, 4, 2), rng))
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


def loud(model: Pix2SeqForObjectDetection) -> Pix2SeqForObjectDetection:
    """New weights are so small that attention is nearly even, and a wrong position or mask changes logits by less than
    a rounding error. These are large enough to tell."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5, generator=generator)
    return model


# -- what may see what -----------------------------------------------------------------------------


@pytest.mark.parametrize("decoder_layers", [1, 2])
def test_cached_decoding_equals_the_forward_pass(make_model, decoder_layers):
    """A bug others shipped: positions missing or counted twice on the cached path."""
    model, images, tokens = loud(make_model(decoder_layers=decoder_layers)), pictures(3), ids(3)
    with torch.no_grad():
        whole = model(images, tokens).logits
        cache = model.prefill(images, 20)
        steps = torch.stack([model.decode_step(tokens[:, t], t, cache) for t in range(20)], dim=1)
    assert steps.dtype == torch.float32
    assert torch.allclose(steps, whole, atol=1e-4)
    assert whole.std() > 1  # or anything would be close


def test_positions_in_the_sentence_matter(make_model):
    """Were positions missing on both paths, cached and whole would still agree: one decoder layer could then not tell
    in which order it has read what lies before the last token."""
    model, images = loud(make_model(decoder_layers=1)), pictures(1)
    swapped = ids(1)
    swapped[:, [2, 7]] = swapped[:, [7, 2]]
    with torch.no_grad():
        a, b = model(images, ids(1)).logits[:, -1], model(images, swapped).logits[:, -1]
    assert (a - b).abs().max() > 0.01


@pytest.mark.parametrize("changed", [0, 3, 11, 19])
def test_logits_do_not_see_what_comes_later(make_model, changed):
    model, images, tokens = loud(make_model()), pictures(2), ids(2)
    other = tokens.clone()
    other[:, changed] = (tokens[:, changed] + 7) % TOKENIZER.vocab_size
    with torch.no_grad():
        a, b = model(images, tokens).logits, model(images, other).logits
    assert torch.equal(a[:, :changed], b[:, :changed])
    assert (a[:, changed:] != b[:, changed:]).any(dim=2).all()  # and everything from there on does see it


def test_every_token_sees_the_whole_picture(make_model):
    """With batch norm in eval mode, the gradient of each logit with regard to each visual token must not be 0; and the
    visual tokens see each other both ways, but not the sentence."""
    model = loud(make_model(encoder_layers=0, decoder_layers=1))
    visual = model.encode(pictures(1)).detach().requires_grad_()
    model.encode = lambda pixels: visual
    logits = model(pictures(1), ids(1)).logits
    for position in range(0, 20, 3):
        (gradient,) = torch.autograd.grad(logits[0, position].square().sum(), visual, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("causal_prefix", [False, True])
def test_the_decoder_is_a_plain_llama_with_a_mask(make_model, causal_prefix):
    """Attention in two parts, and a last layer that leaves out the picture, are ways to compute the same: losses and
    gradients are those of transformers' own model under the mask that says who sees whom."""
    model = loud(make_model(decoder={"causal_prefix": causal_prefix})).train()
    tokens, num_visual = ids(2), 5
    visual = torch.randn(2, num_visual, 16, requires_grad=True)
    plain = LlamaForCausalLM(copy.deepcopy(model.decoder.config)).train()
    plain.set_attn_implementation("sdpa")
    plain.load_state_dict(model.decoder.state_dict())
    total = num_visual + tokens.shape[1]
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    if not causal_prefix:
        visible[:num_visual, :num_visual] = True
    mask = torch.zeros(total, total).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    expected = plain.model(
        inputs_embeds=torch.cat([visual, plain.get_input_embeddings()(tokens)], dim=1),
        attention_mask=mask,
        position_ids=prefix_positions(num_visual, tokens.shape[1], "cpu"),
    ).last_hidden_state[:, num_visual:]
    found = model.decoder(visual, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(expected)
    names = [name for name, _ in plain.model.named_parameters()]
    theirs = torch.autograd.grad((expected * direction).sum(), [visual, *plain.model.parameters()])
    ours = torch.autograd.grad((found * direction).sum(), [visual, *model.decoder.model.parameters()])
    assert names == [name for name, _ in model.decoder.model.named_parameters()]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_positions_of_the_sentence_do_not_depend_on_the_picture():
    """A model trained at 640 must be usable at 1024: rotary positions of the sentence start at 1 in any case."""
    for num_visual in (0, 4, 100):
        positions = prefix_positions(num_visual, 5, "cpu")[0]
        assert positions[:num_visual].tolist() == [0] * num_visual
        assert positions[num_visual:].tolist() == [1, 2, 3, 4, 5]


def test_the_same_weights_work_at_another_size(make_model):
    model, larger = loud(make_model()), make_model(image_size=96)
    assert larger.load_state_dict(model.state_dict()).missing_keys == []
    images, tokens = pictures(1, 96), ids(1)
    with torch.no_grad():
        whole = larger(images, tokens).logits
        cache = larger.prefill(images, 20)
        steps = torch.stack([larger.decode_step(tokens[:, t], t, cache) for t in range(20)], dim=1)
    assert torch.allclose(whole, steps, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(make_model):
    model, images, tokens = loud(make_model()), pictures(4), ids(4)
    with torch.no_grad():
        together = model(images, tokens).logits
        for row in range(4):
            alone = model(images[row : row + 1], tokens[row : row + 1]).logits[0]
            assert torch.allclose(alone, together[row], atol=1e-4)


def test_the_picture_matters_and_so_does_where_things_are_in_it(make_model):
    model, images = make_model(), pictures(2)
    with torch.no_grad():
        logits = model(images, ids(1).expand(2, -1)).logits
        flat = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
        tokens = model.encode(flat)[0]
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    # Of a picture that is the same everywhere, tokens away from the border differ by their position code alone.
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 1e-3


def test_pixels_may_be_bytes_or_normalised_floats(make_model):
    model, images, tokens = make_model(image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4)), pictures(2), ids(2)
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.no_grad():
        a, b = model(images, tokens).logits, model((images / 255 - mean) / std, tokens).logits
    assert torch.allclose(a, b, atol=1e-5)


# -- the loss --------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_cross_entropy(make_model):
    model, images, sentences = make_model(), pictures(3), batch(3)
    logits = model(images, sentences["input_ids"]).logits
    total = weight_sum = 0.0
    for row in range(3):
        for t in range(20):
            weight = sentences["token_weights"][row, t].item()
            total += weight * -logits[row, t].log_softmax(-1)[sentences["labels"][row, t]].item()
            weight_sum += weight
    assert model(images, **sentences).loss.item() == pytest.approx(total / weight_sum, rel=1e-5)
    assert model(images, **sentences, num_items_in_batch=7.0).loss.item() == pytest.approx(total / 7, rel=1e-5)


def test_only_tokens_with_weight_are_computed(make_model):
    model, images, sentences = make_model(), pictures(3), batch(3)
    output = model(images, **sentences)
    counted = sentences["token_weights"] > 0
    assert output.logits.shape == (counted.sum(), TOKENIZER.vocab_size)
    whole = model(images, sentences["input_ids"]).logits
    assert whole.shape == (3, 20, TOKENIZER.vocab_size)
    assert torch.allclose(output.logits, whole[counted], atol=1e-6)
    expected = F.cross_entropy(whole[counted], sentences["labels"][counted], reduction="none")
    assert torch.allclose(output.token_losses, expected, atol=1e-5)


def test_tokens_without_weight_have_no_gradient(make_model):
    """A bug others shipped: what a noise object's coordinates are must not matter to the loss or its gradient."""
    model, images, sentences = make_model(), pictures(2), batch(2)
    other = sentences["labels"].clone()
    ignored = sentences["token_weights"] == 0
    assert ignored.sum() == 2 * 2 * 4
    other[ignored] = torch.randint(4, TOKENIZER.vocab_size, (int(ignored.sum()),))
    gradients = []
    for labels in (sentences["labels"], other):
        model.zero_grad()
        model(images, **sentences | {"labels": labels}).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_noise_class_counts_with_its_weight(make_model):
    model, images, sentences = make_model(), pictures(1), batch(1)
    output = model(images, **sentences)
    weights = sentences["token_weights"][sentences["token_weights"] > 0]
    assert weights.tolist() == [1] * 10 + [0.5] * 2
    assert output.loss.item() == pytest.approx(((output.token_losses * weights).sum() / 11).item(), rel=1e-5)


def test_parts_of_a_step_add_up_with_a_shared_normalizer(make_model):
    """A mean of means would weight a micro-batch of few objects like one of many."""
    model, images, sentences = make_model(), pictures(4), batch(4)
    sentences["token_weights"][0] = 0
    sentences["token_weights"][0, :5] = 1
    whole = model(images, **sentences).loss
    total = sentences["token_weights"].sum()
    parts = [
        model(images[rows], **{k: v[rows] for k, v in sentences.items()}, num_items_in_batch=total).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_gradient_reaches_everything(make_model):
    """But for norms of the backbone that have no path, every parameter must learn, and the backbone above all."""
    model = make_model().train()
    model(pictures(2), **batch(2)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_the_loss_is_float32_under_bf16(make_model):
    """A bug others shipped: cross entropy over thousands of tokens in half precision."""
    model, images, sentences = make_model(), pictures(2), batch(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, **sentences)
        logits = model.decode_step(sentences["input_ids"][:, 0], 0, model.prefill(images, 20))
    assert output.loss.dtype == output.token_losses.dtype == output.logits.dtype == torch.float32
    assert logits.dtype == torch.float32
    counted = sentences["token_weights"] > 0
    expected = F.cross_entropy(output.logits.double(), sentences["labels"][counted], reduction="none")
    assert torch.allclose(output.token_losses.double(), expected, atol=1e-5)
    assert output.loss.item() == pytest.approx(model(images, **sentences).loss.item(), rel=0.05)


def test_large_logits_do_not_overflow(make_model):
    """A bug others shipped: sums of bf16 losses near 1000 would lose whole units."""
    model, images, sentences = make_model(), pictures(2), batch(2)
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(3000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, **sentences)
    assert output.token_losses.max() > 100
    weights = sentences["token_weights"][sentences["token_weights"] > 0].double()
    expected = (weights * output.token_losses.double()).sum() / weights.sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


# -- saved and restored ----------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_a_saved_model_is_the_same_model(make_model, tmp_path, backbone):
    kwargs = {} if backbone == "resnet" else {"backbone_config": dict(TINY_VIT)}
    model = make_model(**kwargs, noise_objects=False, decoding={"top_p": 0.3}, image_mean=(0.1, 0.2, 0.3)).eval()
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
    state, other = model.state_dict(), restored.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert restored.decoder.lm_head.weight is restored.decoder.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(pictures(1), ids(1)).logits, restored(pictures(1), ids(1)).logits)


def test_the_config_survives_a_round_trip(make_model, tmp_path):
    config = make_model(num_bins=77, noise_objects=False, decoding={"top_p": 0.2, "temperature": 1.5}).config
    config.save_pretrained(tmp_path)
    restored = Pix2SeqConfig.from_pretrained(tmp_path)
    for key in ("hidden_size", "encoder_layers", "image_size", "image_mean", "num_bins", "noise_objects", "decoding"):
        assert getattr(restored, key) == getattr(config, key)
    assert restored.category_ids == [1, 3, 7, 11]
    assert restored.id2label == {0: "ellipse", 1: "rectangle", 2: "triangle", 3: "cross"}
    assert isinstance(restored.backbone_config, ResNetConfig)
    assert restored.backbone_config.hidden_sizes == [8, 16]
    assert restored.decoder_config.vocab_size == config.decoder_config.vocab_size
    assert restored.decoder_config.num_hidden_layers == 2
    assert copy.deepcopy(restored).to_dict() == restored.to_dict()


def test_the_output_layer_is_the_embedding(make_model):
    model = make_model()
    assert model.decoder.lm_head.weight is model.decoder.get_input_embeddings().weight


# -- backbones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_class", [ResNetBackbone, ResNetForImageClassification])
def test_pretrained_weights_of_a_resnet_survive(make_model, tmp_path, source_class):
    """A bug others shipped: the initialisation ran over the pretrained backbone and reset 98 % of it. Also that a
    local folder will do, without the hub; classifiers are what the hub has."""
    source = source_class(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    with torch.no_grad():
        for value in source.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    source.save_pretrained(tmp_path)
    choice = resolve_backbone(str(tmp_path))
    assert choice.pretrained == str(tmp_path)
    assert (choice.image_mean, choice.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
    model = make_model(backbone_config=choice.config)
    model.backbone.load_pretrained(choice.pretrained)
    state = model.backbone.model.state_dict()
    expected = getattr(source, "resnet", source).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    # And they are still there after the way through a saved detector.
    model.save_pretrained(tmp_path / "detector")
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path / "detector").backbone.model.state_dict()
    assert all(torch.equal(restored[key], value) for key, value in expected.items())


def test_pretrained_weights_of_a_vit_survive(make_model, tmp_path):
    """The same for a model that is no pyramid; its folder may hold a pooling layer, which is not used."""
    source = ViTModel(ViTConfig(**{k: v for k, v in TINY_VIT.items() if k != "model_type"}))
    with torch.no_grad():
        for value in source.state_dict().values():
            value.uniform_(0.5, 1.5)
    source.save_pretrained(tmp_path)
    choice = resolve_backbone(str(tmp_path))
    model = make_model(backbone_config=choice.config)
    model.backbone.load_pretrained(choice.pretrained)
    state, expected = model.backbone.model.state_dict(), source.state_dict()
    compared = [key for key in state if torch.equal(state[key], expected[key])]
    assert compared == list(state)
    assert {key for key in expected if not key.startswith("pooler")} == set(state)


def test_a_backbone_folders_own_pixels_are_used(tmp_path):
    """A bug others shipped: weights that expect one normalisation were fed another."""
    ViTModel(ViTConfig(**{k: v for k, v in TINY_VIT.items() if k != "model_type"})).save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]).save_pretrained(tmp_path)
    choice = resolve_backbone(str(tmp_path))
    assert choice.image_mean == (0.5, 0.5, 0.5)
    assert choice.image_std == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("side", [32, 64, 80])
def test_a_vit_works_at_sizes_not_its_own(make_model, side):
    """Its position table is interpolated; the class token is no part of the grid."""
    model = make_model(backbone_config=dict(TINY_VIT), image_size=side)
    assert model.backbone(torch.zeros(2, 3, side, side)).shape == (2, 16, side // 16, side // 16)
    assert model.encode(pictures(2, side)).shape == (2, (side // 16) ** 2, 16)
    with torch.no_grad():
        assert model(pictures(2, side), ids(2)).logits.isfinite().all()


def test_the_vits_grid_is_not_transposed(make_model):
    """Change one patch: the feature that changes most must be that patch's."""
    backbone = make_model(backbone_config=dict(TINY_VIT)).backbone
    pixels = torch.zeros(1, 3, 64, 64)
    changed = pixels.clone()
    changed[..., 16:32, 48:64] = 3.0  # row 1, column 3
    with torch.no_grad():
        difference = (backbone(changed) - backbone(pixels)).abs().sum(1)[0]
    assert difference.argmax().item() == 1 * 4 + 3


def test_the_resnets_stride(make_model):
    assert make_model().backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 8, 8)


def test_an_inline_config():
    choice = resolve_backbone('{"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1]}')
    assert choice.pretrained is None
    assert choice.config.hidden_sizes == [8, 16]
    assert resolve_backbone(" {model_type: vit, hidden_size: 24}").config.hidden_size == 24


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "{model_type: resnettt}", "{model_type", "{hidden_size: 3}", "{}"]
)
def test_what_is_no_backbone_is_named_in_one_line(name):
    with pytest.raises(ValueError, match="no such hub model, local folder or inline config") as error:
        resolve_backbone(name)
    assert str(error.value).startswith(f"--backbone {name}")
    assert "\n" not in str(error.value)


def test_a_folder_without_weights(tmp_path):
    AutoConfig.for_model(**TINY_VIT).save_pretrained(tmp_path)
    choice = resolve_backbone(str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path)):
        VisionBackbone(choice.config).load_pretrained(choice.pretrained)


def test_building_a_model_needs_no_files(make_model, monkeypatch):
    """A bug others shipped: constructors that read or download."""
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **k: pytest.fail("reads weights"))
    make_model()
    make_model(backbone_config=dict(TINY_VIT))


# -- position codes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["original", "fine"])
@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 8), (4, 4, 16), (3, 7, 32), (20, 20, 256)])
def test_every_cell_has_a_code_of_its_own(height, width, channels, kind):
    code = position_embedding_2d(height, width, channels, kind)
    assert code.shape == (height * width, channels)
    assert code.abs().max() <= 1
    if height * width > 1:
        # The fastest sine and cosine meet again at 2 pi, but the slower ones do not.
        assert torch.cdist(code.double(), code.double()).fill_diagonal_(1).min() > 1e-2


def test_the_code_is_the_authors():
    """The authors' code: y before x, sines before cosines, coordinates scaled to 2 pi, frequencies 10000^(-2i/d)."""
    code = position_embedding_2d(3, 5, 8, "original").reshape(3, 5, 8)
    for row in range(3):
        for column in range(5):
            expected = []
            for angle in (2 * math.pi * row / 2, 2 * math.pi * column / 4):
                scaled = [angle * 10000 ** (-2 * i / 4) for i in range(2)]
                expected += [math.sin(a) for a in scaled] + [math.cos(a) for a in scaled]
            assert code[row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_on_the_ruler_a_bin_is_most_like_the_cells_at_its_coordinate(make_model):
    """The bins' embeddings start as the code of the visual tokens: as y for the rows, as x for the columns."""
    model = make_model(position_embedding="fine", bin_init="sine", num_bins=64, decoder={"hidden_size": 32})
    bins = model.decoder.get_input_embeddings().weight[-64:].detach()
    assert bins.std() == pytest.approx(model.config.decoder_config.initializer_range, rel=0.15)
    cells = position_embedding_2d(8, 8, 32, "fine").reshape(8, 8, 32)
    for number in range(64):
        cell = min(int((number / 63) * 8), 7)
        assert (cells[:, 0, :16] @ bins[number, :16]).argmax() == cell
        assert (cells[0, :, 16:] @ bins[number, 16:]).argmax() == cell


def test_the_ruler_is_laid_once_and_not_over_trained_weights(make_model, tmp_path):
    model = make_model(bin_init="sine")
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = Pix2SeqForObjectDetection.from_pretrained(tmp_path)
    assert torch.equal(loaded.decoder.get_input_embeddings().weight, model.decoder.get_input_embeddings().weight)


# -- parameter groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_every_parameter_is_in_one_group(make_model, backbone):
    kwargs = {} if backbone == "resnet" else {"backbone_config": dict(TINY_VIT)}
    model = make_model(**kwargs)
    groups = parameter_groups(model, lr=1e-3, lr_backbone=1e-4, weight_decay=0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    settings = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert settings[id(parameter)]["lr"] == (1e-4 if name.startswith("backbone.") else 1e-3), name
    torch.optim.AdamW(groups)


def test_only_kernels_decay(make_model):
    """A bug others shipped: norms, biases and embeddings decayed too."""
    for kwargs in ({}, {"backbone_config": dict(TINY_VIT)}):
        model = make_model(**kwargs)
        groups = parameter_groups(model, lr=1e-3, lr_backbone=1e-4, weight_decay=0.05)
        decaying = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
        assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
        names = {id(p): name for name, p in model.named_parameters()}
        kernels = {
            id(module.weight)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and "lm_head" not in name
        }
        attention = {id(p) for name, p in model.named_parameters() if name.endswith("in_proj_weight")}
        assert {names[i] for i in decaying} == {names[i] for i in kernels | attention}
        assert id(model.decoder.get_input_embeddings().weight) not in decaying
        for parameter in model.parameters():
            assert id(parameter) not in decaying or parameter.ndim >= 2


def test_an_untied_output_layer_does_not_decay_either(make_model):
    model = make_model(decoder={"tie_word_embeddings": False})
    groups = parameter_groups(model, 1e-3, 1e-4, 0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


# -- it learns -------------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss(make_model):
    model, images, sentences = make_model().train(), pictures(2), batch(2)
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-3, 3e-3, 0.0))
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(images, **sentences).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert losses[0] == pytest.approx(math.log(TOKENIZER.vocab_size), rel=0.1)  # nothing is known at the start
