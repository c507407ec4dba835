"""Every backbone with either decoder: builds, learns, decodes, saves, loads."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)
from transformers.modeling_outputs import BackboneOutput

from pix2seq.errors import UserError
from pix2seq.generation import DecodingOptions
from pix2seq.models import Pix2SeqForObjectDetection, build_model
from pix2seq.models.backbone import VisionBackbone, resolve_backbone
from pix2seq.training.optimizer import parameter_groups

VIT = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 16, image_size: 32"


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width: int = 8, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class OwnBackbone(PreTrainedModel):
    """One that only this file knows, as docs/extending.md says to make it known."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.channels = (config.width,)
        self.patches = nn.Conv2d(3, config.width, 16, stride=16)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> BackboneOutput:
        return BackboneOutput(feature_maps=(self.patches(pixel_values),))


AutoConfig.register("own", OwnConfig)
AutoBackbone.register(OwnConfig, OwnBackbone)

BACKBONES = {
    "own": "{model_type: own, width: 8}",
    "resnet": "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
    "resnet_bottleneck": "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 8, 16, 16], depths: [1, 1, 1, 2]}",
    "vit": f"{{model_type: vit, intermediate_size: 32, {VIT}}}",
    "dinov2": f"{{model_type: dinov2, mlp_ratio: 2, {VIT}}}",
    "dinov2_with_registers": f"{{model_type: dinov2_with_registers, mlp_ratio: 2, {VIT}}}",
    "dinov3_vit": f"{{model_type: dinov3_vit, intermediate_size: 32, num_register_tokens: 2, {VIT}}}",  # rotary
    "dinov3_convnext": "{model_type: dinov3_convnext, hidden_sizes: [8, 16], depths: [1, 1]}",
    "convnext": "{model_type: convnext, hidden_sizes: [8, 16], depths: [1, 1], num_stages: 2, drop_path_rate: 0.1}",
    "convnextv2": "{model_type: convnextv2, hidden_sizes: [8, 16], depths: [1, 1], num_stages: 2}",
    "swin": "{model_type: swin, embed_dim: 8, depths: [1, 1], num_heads: [2, 2], window_size: 4, image_size: 32}",
    "timm": "{model_type: timm_backbone, backbone: test_resnet, use_pretrained_backbone: false, out_indices: [-1]}",
}
DECODERS = ("llama", "transformer")
everything = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
both = pytest.mark.parametrize("decoder", DECODERS)


def build(decoder: str = "llama", backbone: str = BACKBONES["resnet"], **kwargs):
    defaults = {
        **{"category_ids": (3, 7, 9), "class_names": ("cat", "dog", "eel"), "hidden_size": 16, "encoder_layers": 1},
        **{"decoder_layers": 2, "num_heads": 2, "mlp_size": 32, "image_size": 64, "num_bins": 20, "max_objects": 3},
        "decoding": {"top_p": 0.4, "temperature": 1.0, "seed": 0},
    }
    torch.manual_seed(0)
    return build_model(backbone=backbone, decoder=decoder, **defaults | kwargs)


def ready(model, freeze: bool = False, batch_norm: str = "sync"):
    model.backbone.prepare_for_training(freeze, batch_norm, 1, torch.device("cpu"), model.config.image_size)
    return model


def pictures(count: int = 2, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def sentences(count: int = 2, length: int = 15) -> torch.Tensor:
    return torch.randint(1, 27, (count, length), generator=torch.Generator().manual_seed(1))


@everything
@both
def test_every_combination_learns_decodes_and_survives_its_folder(backbone, decoder, tmp_path):
    model = ready(build(decoder, backbone))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-3, 0.05))
    for _ in range(2):
        loss = model(pictures(), sentences(), sentences()).loss
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        # DDP refuses parameters that get no gradient.
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()

    model.eval()
    for found in model.detect(pictures()):
        assert found.boxes.shape == (3, 4)
        assert (found.boxes[:, :2] <= found.boxes[:, 2:]).all()
        assert set(found.labels.tolist()) <= {0, 1, 2}
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(restored(pictures(), sentences()).logits, model(pictures(), sentences()).logits)


@both
@pytest.mark.parametrize("backbone", [BACKBONES["resnet"], BACKBONES["dinov3_vit"]], ids=["resnet", "dinov3_vit"])
def test_cached_decoding_is_uncached_decoding_and_a_batch_is_its_rows(decoder, backbone):
    model = build(decoder, backbone).eval()
    with torch.no_grad():
        whole = model(pictures(), sentences()).logits
        cache = model.prefill(pictures(), 15)
        steps = torch.stack([model.decode_step(sentences()[:, t], t, cache) for t in range(15)], dim=1)
        alone = model(pictures()[1:], sentences()[1:]).logits
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, whole[1:], atol=1e-5, rtol=0)
    together = model.detect(pictures())[1]
    single = model.detect(pictures()[1:])[0]
    assert (together.boxes == single.boxes).all()
    assert together.scores == pytest.approx(single.scores, abs=1e-5)


@both
def test_no_token_sees_what_comes_after_it(decoder):
    """A bug others shipped: a mask forgotten, and the loss falls to nothing."""
    model = build(decoder).eval()
    changed = sentences()
    changed[:, 8:] = 1
    with torch.no_grad():
        a, b = model(pictures(), sentences()).logits, model(pictures(), changed).logits
    torch.testing.assert_close(a[:, :8], b[:, :8])
    assert not torch.allclose(a[:, 8:], b[:, 8:])


@both
def test_every_token_sees_the_whole_picture(decoder):
    model = build(decoder, BACKBONES["vit"], encoder_layers=0).eval()
    with torch.no_grad():
        before = model(pictures(), sentences()).logits
        for corner in (slice(0, 16), slice(48, 64)):
            changed = pictures()
            changed[..., corner, corner] = 0
            after = model(changed, sentences()).logits
            assert ((after - before).abs().amax(-1) > 1e-7).all()


@both
def test_what_is_said_depends_on_where_in_the_sentence(decoder):
    model = build(decoder).eval()
    same = torch.full((1, 15), 10)
    with torch.no_grad():
        logits = model(pictures(1), same).logits[0]
    assert not torch.allclose(logits[2], logits[7], atol=1e-6)


@both
def test_the_output_layer_is_the_embeddings(decoder, tmp_path):
    model = build(decoder)
    assert model.decoder.lm_head.weight is model.decoder.get_input_embeddings().weight
    assert (model.decoder.lm_head.bias is not None) == (decoder == "transformer") == model.config.output_bias
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path)
    assert restored.decoder.lm_head.weight is restored.decoder.get_input_embeddings().weight


def test_an_output_bias_starts_at_zero_and_is_saved(tmp_path):
    model = build("transformer")
    assert not model.decoder.lm_head.bias.any()
    with torch.no_grad():
        model.decoder.lm_head.bias += 1.5
    model.save_pretrained(tmp_path)
    assert (Pix2SeqForObjectDetection.from_pretrained(tmp_path).decoder.lm_head.bias == 1.5).all()


@both
def test_drop_path_leaves_out_whole_branches_while_training_only(decoder):
    model = build(decoder, dropout=0.0, drop_path=0.5)
    with torch.no_grad():
        torch.manual_seed(1)
        first = model(pictures(), sentences()).logits
        assert not torch.allclose(first, model(pictures(), sentences()).logits)
        model.eval()
        assert torch.equal(model(pictures(), sentences()).logits, model(pictures(), sentences()).logits)
    ends = [m for n, m in model.decoder.named_modules() if n.endswith(("o_proj", "out_proj", "down_proj", "fc2"))]
    assert len(ends) == {"llama": 4, "transformer": 6}[decoder]  # two layers of two or three branches
    for module in ends:
        module.train()
        out = module(torch.randn(200, 3, module.in_features))
        gone = (out == 0).flatten(1).all(1)
        assert 60 < gone.sum() < 140  # a row drops out whole, or is scaled up


@both
def test_a_pickled_detector_is_the_same(decoder):
    """As processes that are not forked get it."""
    model = build(decoder, drop_path=0.5).eval()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(pictures(), sentences()).logits, model(pictures(), sentences()).logits)
    again.config.drop_path = 0.0
    assert model.config.drop_path == 0.5


@both
def test_gradient_checkpointing_changes_no_gradient(decoder):
    plain, saving = (build(decoder, dropout=0.0, drop_path=0.3) for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = [m for m in saving.modules() if getattr(m, "gradient_checkpointing", False)]
    assert {type(m).__name__ for m in wrapped} >= {"EncoderLayer"}
    for model in (plain, saving):
        torch.manual_seed(3)
        model(pictures(), sentences(), sentences()).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@both
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(decoder, implementation, tmp_path):
    model = build(decoder, BACKBONES["vit"]).eval()
    model.save_pretrained(tmp_path)
    other = Pix2SeqForObjectDetection.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert other.backbone.model.config._attn_implementation == implementation
    # Llama's prefix needs an attention of ours, whatever is asked for.
    expected = "prefix" if decoder == "llama" else implementation
    assert other.decoder.config._attn_implementation == expected
    with torch.no_grad():
        expected, logits = (m(pictures(), sentences()).logits for m in (model, other))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@both
def test_half_precision_loading(decoder, tmp_path):
    build(decoder).save_pretrained(tmp_path)
    model = Pix2SeqForObjectDetection.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu").eval()
    assert model.dtype == torch.bfloat16
    assert len(model.detect(pictures())) == 2


@pytest.mark.slow
@both
def test_compiled_models_say_the_same_and_their_weights_load_without(decoder, tmp_path):
    model = build(decoder).eval()
    compiled = torch.compile(model, backend="aot_eager")
    encode = torch.compile(model.encode, backend="aot_eager")
    with torch.no_grad():
        expected = model(pictures(), sentences()).logits
        torch.testing.assert_close(compiled(pictures(), sentences()).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(encode(pictures()), model.encode(pictures()), atol=1e-5, rtol=0)
    compiled.save_pretrained(tmp_path)
    with torch.no_grad():
        restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
        assert torch.equal(restored(pictures(), sentences()).logits, expected)
    compiled.train()
    compiled(pictures(), sentences(), sentences()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_prefix(causal):
    """A visual token sees those after it, or does not."""
    model = build(causal_prefix=causal, encoder_layers=0).eval()
    visual = torch.randn(1, 6, 16)
    changed = visual.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        keys = [model.decoder.prefill(v, 1).kv_cache.layers[1] for v in (visual, changed)]  # of the second layer
    assert torch.equal(keys[0][:, :, :, 0], keys[1][:, :, :, 0]) == causal


# -- backbones -------------------------------------------------------------------------------------

FOUR_STAGES = {
    "resnet": "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 12, 16, 20], depths: [1, 1, 1, 2]}",
    "convnext": "{model_type: convnext, hidden_sizes: [8, 12, 16, 20], depths: [1, 1, 1, 1]}",
}


@pytest.mark.parametrize(
    ("backbone", "stage", "stride", "channels"),
    [
        *(("resnet", "c3", 8, 12), ("resnet", "c4", 16, 16), ("resnet", "c5", 32, 20), ("resnet", "dc5", 16, 20)),
        *(("convnext", "c4", 16, 16), ("convnext", "c5", 32, 20)),
    ],
)
@pytest.mark.parametrize("side", [64, 96])
def test_pyramids_can_be_cut(backbone, stage, stride, channels, side, tmp_path):
    model = ready(build(backbone=FOUR_STAGES[backbone], backbone_stage=stage, image_size=side)).eval()
    features = model.backbone(torch.zeros(1, 3, side, side))
    assert features.shape == (1, channels, side // stride, side // stride)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(
            restored(pictures(1, side), sentences(1)).logits, model(pictures(1, side), sentences(1)).logits
        )


def test_a_dilated_resnet_has_the_weights_and_the_view_of_the_strided_one():
    """Every second feature of the dilated stage is one of the strided: same taps, denser grid."""
    config = AutoConfig.for_model(model_type="resnet", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2])
    torch.manual_seed(0)
    strided, dilated = VisionBackbone(config).eval(), VisionBackbone(config, dilated=True).eval()
    dilated.load_state_dict(strided.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dilated(pixels)[..., ::2, ::2], strided(pixels))


def test_a_cut_backbone_takes_the_weights_of_the_whole(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
    whole = ResNetForImageClassification(config)
    whole.save_pretrained(tmp_path)
    model = build(backbone=str(tmp_path), backbone_stage="c4")
    expected = whole.resnet.state_dict()
    state = model.backbone.model.state_dict()
    assert state
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("backbone", "stage", "says"),
    [
        (BACKBONES["vit"], "c4", "has fewer than 3 stages"),
        (BACKBONES["resnet"], "c4", "has fewer than 3 stages"),
        (BACKBONES["convnext"], "dc5", "only a ResNet can be dilated"),
    ],
)
def test_backbones_that_cannot_be_cut_say_so(backbone, stage, says):
    with pytest.raises(UserError, match=says):
        resolve_backbone(backbone, stage)


@everything
def test_a_frozen_backbone_neither_learns_nor_drifts(backbone):
    model = ready(build(backbone=backbone), freeze=True).train()
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-1, 1e-1, 0.5))
    model(pictures(), sentences(), sentences()).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert model.projection[1].weight.grad.any()


def test_frozen_batch_norms_keep_their_statistics_while_the_rest_learns():
    model = ready(build(), batch_norm="frozen").train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-1, 1e-1, 0.5))
    model(pictures(), sentences(), sentences()).loss.backward()
    optimizer.step()
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    convolution = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    assert convolution.weight.grad.any()


@pytest.mark.parametrize("name", ["resnet", "timm", "timm_with_activations"])
def test_batch_norms_are_converted_for_many_gpus_only_and_compute_the_same(name):
    backbone = BACKBONES["timm"].replace("test_resnet", "test_efficientnet") if "act" in name else BACKBONES[name]
    model, plain, local = (build(backbone=backbone).eval() for _ in range(3))
    pixels = torch.rand(1, 3, 64, 64)
    before = model.backbone(pixels)
    model.backbone.prepare_for_training(False, "sync", 8, torch.device("cpu"), 64)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    model.backbone.prepare_for_training(False, "sync", 8, torch.device("cuda"), 64)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert torch.equal(model.backbone(pixels), before)
    assert model.state_dict().keys() == plain.state_dict().keys()
    local.backbone.prepare_for_training(False, "local", 8, torch.device("cuda"), 64)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in local.modules())


def test_what_no_gradient_reaches_is_found():
    model = ready(build(backbone=BACKBONES["dinov2"]))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["backbone.model.embeddings.mask_token"]


@pytest.mark.parametrize("side", [32, 96, 160])
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit", "swin", "convnext", "resnet_bottleneck"])
def test_any_size_that_is_a_multiple_of_the_stride(name, side):
    model = build(backbone=BACKBONES[name], image_size=side).eval()
    found = model.detect(pictures(1, side), DecodingOptions(max_objects=1))
    assert len(found[0].labels) == 1


def test_a_text_model_is_no_backbone():
    with pytest.raises(UserError, match="--backbone"):
        build(backbone="{model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}")


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit"])
def test_a_canvas_that_a_vit_would_not_see_whole_is_refused(name):
    with pytest.raises(UserError, match="--image_size 70: must be a multiple of 16"):
        build(backbone=BACKBONES[name], image_size=70)


def test_a_decoder_with_a_table_of_positions_writes_no_more_than_it_has():
    assert len(build("llama").eval().detect(pictures(1), DecodingOptions(max_objects=9))[0].labels) == 9
    with pytest.raises(ValueError, match="max_objects 9: this detector can write 3"):
        build("transformer").eval().detect(pictures(1), DecodingOptions(max_objects=9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_pretrained_backbone_saved_in_half_precision_is_trained_in_full(name, dtype, tmp_path):
    source = build(backbone=BACKBONES[name]).backbone.model.to(dtype)
    source.save_pretrained(tmp_path)
    model = build(backbone=str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = source.state_dict()
    for key, value in model.backbone.model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_weights_missing_from_a_pretrained_folder_are_named(name, tmp_path):
    build(backbone=BACKBONES[name]).backbone.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"xx.{key}": value for key, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"--backbone {tmp_path}: lacks the weights"):
        build(backbone=str(tmp_path))


def test_a_timm_model_as_the_hub_has_it(tmp_path):
    """A folder with timm's own config.json and weights, as under the hub's timm/ names."""
    import timm

    source = timm.create_model("test_resnet", num_classes=10)
    known = source.pretrained_cfg | {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    timm.models.save_for_hf(source, tmp_path, model_config={"pretrained_cfg": known}, safe_serialization=True)
    model = build(backbone=str(tmp_path))
    assert model.config.image_mean == [0.4, 0.5, 0.6]
    assert model.config.image_std == [0.1, 0.2, 0.3]
    state, expected = model.backbone.model._backbone.state_dict(), source.state_dict()
    assert state
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    model.save_pretrained(tmp_path / "detector")
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path / "detector").eval()
    with torch.no_grad():
        assert torch.equal(restored.encode(pictures()), model.eval().encode(pictures()))


@pytest.mark.parametrize("mean", [None, 0.5, [0.5]])
def test_a_processor_with_odd_pixels_is_refused(mean, tmp_path):
    build(backbone=BACKBONES["vit"]).backbone.model.save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": mean}))
    with pytest.raises(UserError, match="three values each are needed"):
        resolve_backbone(str(tmp_path))


def test_a_timm_model_of_one_size_only():
    backbone = "{model_type: timm_backbone, backbone: test_vit, use_pretrained_backbone: false, out_indices: [-1]}"
    model = ready(build(backbone=backbone, image_size=160))
    model(pictures(side=160), sentences(), sentences()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kind", ["resnet", "resnet_bottleneck"])
def test_frozen_norms_folded_into_convolutions_change_nothing(kind):
    """What comes out and the gradients are those of convolution, then norm."""
    backbone = build("llama", BACKBONES[kind]).backbone
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for values in (module.weight, module.bias, module.running_mean):
                    values.normal_()
                module.running_var.uniform_(0.5, 2)
    backbone.prepare_for_training(False, "frozen", 1, torch.device("cpu"), 64)
    plain = copy.deepcopy(backbone)
    folding = [module for module in plain.modules() if "forward" in vars(module)]
    assert len(folding) == sum(isinstance(module, torch.nn.Conv2d) for module in plain.modules())
    for module in folding:
        del module.forward
    pixels = torch.rand(2, 3, 64, 64)
    expected, found = plain.train()(pixels), backbone.train()(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(expected)
    learning = [(a, b) for a, b in zip(backbone.parameters(), plain.parameters(), strict=True) if a.requires_grad]
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for a, b in learning:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item())


def test_only_a_resnets_norms_are_folded():
    """Other models' convolutions look alike and are not: grouped, or with more after the norm."""
    backbone = VisionBackbone(resolve_backbone("{model_type: hgnet_v2}").config)
    backbone.prepare_for_training(False, "frozen", 1, torch.device("cpu"), 64)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.eval()(pixels)
    torch.testing.assert_close(backbone.train()(pixels), expected, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("batch_norm", ["local", "frozen"])
def test_a_training_step_is_one_graph(decoder, batch_norm):
    """Each break would be a return to Python, and a place where nothing is fused."""
    model = build(decoder, dropout=0.0, drop_path=0.0)
    model.backbone.prepare_for_training(False, batch_norm, 1, torch.device("cpu"), 64)
    ids = sentences()
    arguments = (pictures(), ids, ids, torch.ones_like(ids, dtype=torch.float32), 1.0, torch.arange(ids.numel()))
    whole = torch.compile(model.train(), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*arguments).loss, model(*arguments).loss)
