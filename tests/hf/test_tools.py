"""Adapters and quantized layers act while detecting as in the forward pass."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, TorchAoConfig

from pix2seq import Pix2SeqForObjectDetection, Pix2SeqImageProcessor
from pix2seq.data.shapes import CATEGORY_IDS, draw_dataset
from pix2seq.models.incremental_decoder import IncrementalDecoder
from tests.test_architectures import DECODERS, images, token_ids
from tests.test_huggingface import (
    assert_decoding_equals_the_forward_pass,
    assert_same_detections,
    new_model,
    teacher_forced_and_incremental_logits,
)

pytestmark = pytest.mark.slow
both_decoders = pytest.mark.parametrize("decoder", DECODERS)


@both_decoders
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("part", ["decoder", "encoder", "backbone"])
def test_adapters_act_as_after_merging_them(decoder, use_dora, part):
    model = new_model(decoder)
    types = nn.Conv2d if part == "backbone" else nn.Linear
    targets = [
        n for n, m in model.named_modules() if n.startswith(part) and isinstance(m, types) and "lm_head" not in n
    ]
    plain = model(images())
    config = LoraConfig(r=4, lora_alpha=32, target_modules=targets, use_dora=use_dora, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    detected = adapted(images())
    assert not torch.equal(detected.pred_scores, plain.pred_scores)
    assert_same_detections(adapted.merge_and_unload().eval()(images()), detected, tolerance=1e-4)


@both_decoders
def test_trained_token_embeddings_stay_tied(decoder):
    model = new_model(decoder)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[4, 5], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    plain = adapted(images())
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
    detected = adapted(images())
    assert not torch.equal(detected.pred_scores, plain.pred_scores)
    assert_same_detections(adapted.merge_and_unload().eval()(images()), detected, tolerance=1e-4)


def test_a_folder_of_an_adapter(tmp_path):
    model = new_model("llama")
    model.save_pretrained(tmp_path / "model")
    model = Pix2SeqForObjectDetection.from_pretrained(tmp_path / "model").eval()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(images())
    loaded = Pix2SeqForObjectDetection.from_pretrained(tmp_path / "adapter").eval()
    assert_same_detections(loaded(images()), expected)


def test_adapters_of_a_backbone_with_frozen_norms_act_in_training():
    model = new_model("llama")
    model.backbone.prepare_for_training(
        freeze=False, batch_norm="frozen", world_size=1, device=torch.device("cpu"), image_size=64
    )
    targets = [name for name, m in model.named_modules() if name.startswith("backbone") and isinstance(m, nn.Conv2d)]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted.base_model.model.encode(images())
    torch.testing.assert_close(adapted.base_model.model.encode(images()), expected, atol=1e-5, rtol=1e-4)


@both_decoders
@pytest.mark.parametrize("load", ["8bit", "4bit"])
def test_bitsandbytes(decoder, load, tmp_path):
    model = new_model(decoder, hidden_size=64, mlp_size=128)
    model.save_pretrained(tmp_path)
    # The kernels need more inputs than the projection has. With a threshold, logits depend on the batch.
    config = BitsAndBytesConfig(
        load_in_8bit=load == "8bit",
        load_in_4bit=load == "4bit",
        llm_int8_threshold=0.0,
        llm_int8_skip_modules=["projection", "lm_head"],
    )
    quantized = Pix2SeqForObjectDetection.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()
    assert any(f"Linear{load}" in type(module).__name__ for module in quantized.decoder.modules())
    assert_decoding_equals_the_forward_pass(quantized, tolerance=0.1)  # 4-bit layers have another kernel for one row
    with torch.no_grad():
        assert isinstance(quantized.prefill(images(), 5), IncrementalDecoder)
        logits, plain = (each(images(), token_ids()).logits for each in (quantized, model))
    assert 0 < (logits - plain).abs().mean() < plain.std()


@both_decoders
def test_torchao_weights(decoder):
    model = new_model(decoder)
    plain = model(images(), token_ids()).logits
    quantize_(model, Int8WeightOnlyConfig())
    assert isinstance(model.prefill(images(), 5), IncrementalDecoder)
    assert (model(images(), token_ids()).logits - plain).abs().max() > 1e-3
    assert_decoding_equals_the_forward_pass(model)


@both_decoders
def test_torchao_weights_and_inputs(decoder):
    """The rounding of the inputs depends on small differences, which can change single logits."""
    model = new_model(decoder)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    assert isinstance(model.prefill(images(), 5), IncrementalDecoder)
    expected, actual = teacher_forced_and_incremental_logits(model)
    assert expected.std() > 1
    assert (actual - expected).abs().mean() < 0.05


@both_decoders
def test_torchao_while_loading(decoder, tmp_path):
    new_model(decoder).save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    loaded = Pix2SeqForObjectDetection.from_pretrained(tmp_path, quantization_config=config).eval()
    assert isinstance(loaded.prefill(images(), 5), IncrementalDecoder)
    assert_decoding_equals_the_forward_pass(loaded)


@both_decoders
def test_dynamic_quantization_of_torch(decoder):
    """Each call quantizes its inputs by their range, so the logits of one token differ from those of a sequence."""
    with warnings.catch_warnings(action="ignore"):  # about its deprecation
        quantized = torch.ao.quantization.quantize_dynamic(new_model(decoder), {nn.Linear})
    layers = {n: m for n, m in quantized.decoder.named_modules() if "quantized" in type(m).__module__ and "proj" in n}
    called = set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *args, name=name: called.add(name))
    quantized(images())
    assert called == {name for name in layers if "_packed_params" not in name}
    assert called


def test_the_programs_of_the_documentation(tmp_path, monkeypatch, capsys):
    """All of them, with a small model and fewer steps."""
    model = new_model("transformer")
    model.save_pretrained(tmp_path / "runs" / "demo" / "best")
    model.config.category_ids = list(CATEGORY_IDS[:3])
    Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "runs" / "demo" / "best")
    draw_dataset(tmp_path / "data" / "shapes", num_train=6, num_val=3, size=64, seed=0)
    keep_categories(tmp_path / "data" / "shapes" / "annotations", model.config.category_ids)
    Image.new("RGB", (32, 48)).save(tmp_path / "image.jpg")
    programs = re.findall(r"```python\n(.*?)```", Path("docs/huggingface.md").read_text(), re.DOTALL)
    assert len(programs) == 4
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for program in programs:
        options = 'max_steps=2, use_cpu=True, report_to=[], save_strategy="no"'
        exec(program.replace("max_steps=100", options), namespace)
    assert "eval_loss" in capsys.readouterr().out
    assert (tmp_path / "runs" / "lora" / "merged" / "model.safetensors").is_file()
    assert namespace["model"].config.class_names == ("cat", "dog")


def keep_categories(folder: Path, category_ids: list[int]) -> None:
    for path in folder.iterdir():
        data = json.loads(path.read_text())
        data["annotations"] = [o for o in data["annotations"] if o["category_id"] in category_ids]
        path.write_text(json.dumps(data))
