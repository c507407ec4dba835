"""The model under the tools of the Hugging Face ecosystem: what changes modules must act while detecting."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from pix2seq import Pix2SeqConfig, Pix2SeqForObjectDetection, Pix2SeqImageProcessor
from pix2seq.models.fused_decoders import FusedDecoder, can_fuse
from pix2seq.models.incremental_decoder import IncrementalDecoder
from tests.test_architectures import BACKBONES, DECODERS, build, images, scale_weights, token_ids

both_decoders = pytest.mark.parametrize("decoder", DECODERS)


def new_model(decoder: str, backbone: str = "resnet", **kwargs) -> Pix2SeqForObjectDetection:
    """A model whose detections change with its weights."""
    torch.manual_seed(0)
    return scale_weights(build(decoder, BACKBONES[backbone], dropout=0.0, drop_path=0.1, **kwargs).eval(), 0.5)


def assert_same_detections(actual, expected, tolerance: float = 1e-5) -> None:
    assert torch.equal(actual.pred_labels, expected.pred_labels)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, atol=tolerance, rtol=0)
    torch.testing.assert_close(actual.pred_scores, expected.pred_scores, atol=tolerance, rtol=0)


def teacher_forced_and_incremental_logits(model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        expected = model(images(), token_ids()).logits.float()
        state = model.prefill(images(), 15)
        actual = torch.stack([model.decode_step(token_ids()[:, i], i, state) for i in range(15)], dim=1)
    return expected, actual


def assert_decoding_equals_the_forward_pass(model, tolerance: float = 1e-3) -> None:
    """The logits of the incremental decoder are those that the modules of the same model compute."""
    expected, actual = teacher_forced_and_incremental_logits(model)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# -- the choice of the incremental decoder ---------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def add_hook(decoder):
    decoder.get_input_embeddings().register_forward_hook(lambda module, inputs, output: 2 * output)


def add_hook_to_a_layer(decoder):
    decoder.get_submodule(layer_name(decoder)).register_forward_pre_hook(lambda module, inputs: None)


def replace_forward(decoder):
    linear = first_linear(decoder)
    linear.forward = lambda x: 2 * type(linear).forward(linear, x)


def parametrize_weight(decoder):
    parametrize.register_parametrization(first_linear(decoder), "weight", Doubled())


def replace_linear(decoder):
    class OwnLinear(nn.Linear):
        pass

    first_linear(decoder).__class__ = OwnLinear


def scale_attention(decoder):
    decoder.get_submodule(layer_name(decoder)).self_attn.scaling *= 3


def reverse_layers(decoder):
    parent = decoder.get_submodule(layer_name(decoder).removesuffix(".layers.0"))
    parent.layers = nn.ModuleList(reversed(parent.layers))


def add_hook_to_the_decoder(decoder):
    decoder.register_forward_hook(negate_hidden_states)


def negate_hidden_states(module, inputs, output):
    output.last_hidden_state = -output.last_hidden_state
    return output


def use_eager_attention(decoder):
    decoder.set_attn_implementation("eager")


def mix_dtypes(decoder):
    first_linear(decoder).bfloat16()


def train_mode(decoder):
    decoder.train()


def layer_name(decoder) -> str:
    return next(name for name, _ in decoder.named_modules() if name.endswith("layers.0"))


def first_linear(decoder) -> nn.Linear:
    return decoder.get_submodule(layer_name(decoder)).self_attn.q_proj


@both_decoders
@pytest.mark.parametrize(
    "change",
    [
        add_hook,
        add_hook_to_a_layer,
        replace_forward,
        parametrize_weight,
        replace_linear,
        scale_attention,
        reverse_layers,
        add_hook_to_the_decoder,
        use_eager_attention,
        mix_dtypes,
        train_mode,
    ],
)
def test_weights_are_fused_only_if_all_modules_are_plain(decoder, change):
    model = new_model(decoder)
    assert isinstance(model.prefill(images(), 5), FusedDecoder)
    change(model.decoder)
    assert not can_fuse(model.decoder)
    assert isinstance(new_model(decoder).prefill(images(), 5), FusedDecoder)


@both_decoders
@pytest.mark.parametrize(
    "change",
    [add_hook, replace_forward, parametrize_weight, scale_attention, reverse_layers, add_hook_to_the_decoder],
)
def test_changed_modules_act_while_decoding(decoder, change):
    model = new_model(decoder)
    plain = model(images(), token_ids()).logits
    change(model.decoder)
    assert (model(images(), token_ids()).logits - plain).abs().max() > 1e-3
    assert_decoding_equals_the_forward_pass(model)


@both_decoders
def test_the_modules_and_the_fused_decoder_detect_the_same_objects(decoder):
    model = new_model(decoder, noise_objects=False)  # sequences have different lengths
    with torch.inference_mode():
        expected = model(images(8))
        model.decoder.get_input_embeddings().register_forward_hook(lambda *args: None)
        assert isinstance(model.prefill(images(8), 5), IncrementalDecoder)
        assert_same_detections(model(images(8)), expected)


def test_a_replaced_method_of_a_class_acts_while_decoding(monkeypatch):
    model = new_model("llama")
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * forward(self, x))
    assert_decoding_equals_the_forward_pass(model)


@both_decoders
def test_gradients_reach_the_encoder_if_all_weights_are_frozen(decoder):
    """As in QLoRA: adapters are trained with reentrant checkpointing."""
    model = new_model(decoder).train()
    model.requires_grad_(False)
    model.encoder.requires_grad_(True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    batch = examples(Pix2SeqImageProcessor.from_model_config(model.config))
    model(**batch).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.encoder.parameters())
    model.disable_input_require_grads()
    assert not model.projection._forward_hooks


@both_decoders
def test_hooks_of_all_modules_are_called_while_detecting(decoder):
    model, called = new_model(decoder), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: called.add(name))
    model(images())
    containers = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    assert {name for name, _ in model.named_modules()} - called - containers == set()


# -- offloading --------------------------------------------------------------------------------------


@both_decoders
@pytest.mark.parametrize("encoder_layers", [0, 1])
def test_offloaded_weights(decoder, encoder_layers, tmp_path):
    model = new_model(decoder, encoder_layers=encoder_layers)
    expected = model(images())
    on_cpu = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert_same_detections(on_cpu(images()), expected)
    on_disk = disk_offload(copy.deepcopy(model), tmp_path / "weights", execution_device=torch.device("cpu"))
    assert_same_detections(on_disk(images()), expected)
    model.save_pretrained(tmp_path / "model")
    parts = {name: "cpu" for name, _ in model.named_children()} | {"decoder": "disk"}
    loaded = Pix2SeqForObjectDetection.from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload"
    )
    assert_same_detections(loaded.eval()(images()), expected)


# -- attention implementations, outputs, export ----------------------------------------------------


@both_decoders
@pytest.mark.parametrize("backbone", ["resnet", "vit"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_can_be_changed(decoder, backbone, implementation, tmp_path):
    model = new_model(decoder, backbone)
    expected, logits = model(images()), model(images(), token_ids()).logits
    model.save_pretrained(tmp_path)
    loaded = Pix2SeqForObjectDetection.from_pretrained(tmp_path, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    for changed in (model, loaded.eval()):
        assert changed.encoder.layers[0].self_attn.config._attn_implementation == implementation
        torch.testing.assert_close(changed(images(), token_ids()).logits, logits, atol=1e-4, rtol=0)
        assert_same_detections(changed(images()), expected)
    model.set_attn_implementation("sdpa")
    assert can_fuse(model.decoder)


@both_decoders
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_mask_is_refused(decoder, implementation):
    model = new_model(decoder)
    expected = model(images())
    with pytest.raises((ValueError, ImportError)):
        model.set_attn_implementation(implementation)
    assert_same_detections(model(images()), expected)


@both_decoders
@pytest.mark.parametrize("inputs", [(), (token_ids(),)], ids=["pixels", "teacher_forced"])
def test_hidden_states_and_attentions(decoder, inputs):
    model = new_model(decoder)
    assert not model(images(), *inputs, output_attentions=True).encoder_attentions  # only eager attention has weights
    model.set_attn_implementation("eager")
    output = model(images(), *inputs, output_attentions=True, output_hidden_states=True)
    num_visual = output.encoder_last_hidden_state.shape[1]
    assert [tuple(states.shape) for states in output.encoder_hidden_states] == [(2, num_visual, 16)] * 2
    assert [tuple(weights.shape) for weights in output.encoder_attentions] == [(2, 2, num_visual, num_visual)]
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    if inputs:
        length = 15 + num_visual * (decoder == "llama")
        assert [tuple(states.shape) for states in output.decoder_hidden_states] == [(2, length, 16)] * 3
        assert [tuple(weights.shape) for weights in output.decoder_attentions] == [(2, 2, length, length)] * 2
        assert (output.cross_attentions is None) == (decoder == "llama")
    first = model(images(), *inputs, return_dict=False)[0]
    assert torch.equal(first, model(images(), *inputs).to_tuple()[0])


@both_decoders
def test_tracing_and_export_of_the_teacher_forced_pass(decoder):
    model = new_model(decoder)
    inputs = images() / 255, token_ids()
    expected = model(*inputs).logits
    program = torch.export.export(model, inputs)
    torch.testing.assert_close(program.module()(*inputs).logits, expected)
    with pytest.raises(NotImplementedError, match=r"export\.py"):
        torch.export.export(model, inputs[:1])
    model.config.return_dict = False
    traced = torch.jit.trace(model, inputs, check_trace=False)
    torch.testing.assert_close(traced(*inputs)[0], expected)
    with pytest.raises(NotImplementedError, match=r"export\.py"):
        torch.jit.trace(model, inputs[:1], check_trace=False)


@both_decoders
def test_compiled_models_detect(decoder):
    model = new_model(decoder)
    expected, logits = model(images()), model(images(), token_ids()).logits
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_detections(compiled(images()), expected)
    torch.testing.assert_close(compiled(images(), token_ids()).logits, logits)
    model.compile(backend="aot_eager")
    assert_same_detections(model(images()), expected)


# -- classes and configs ---------------------------------------------------------------------------


def test_the_default_config_is_a_valid_detector(tmp_path):
    model = Pix2SeqForObjectDetection(Pix2SeqConfig(image_size=64, max_objects=2))
    assert sum(parameter.numel() for parameter in model.parameters()) < 40e6
    assert model(torch.zeros(1, 3, 64, 64)).pred_boxes.shape == (1, 2, 4)
    assert model.config.class_names == ("LABEL_0",)
    assert model.backbone.model.config is model.config.backbone_config
    assert model.decoder.config is model.config.decoder_config
    config = Pix2SeqConfig(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}, num_bins=30)
    assert (config.category_ids, config.decoder_config.vocab_size) == ([0, 1], 36)
    config.num_bins = 31
    with pytest.raises(ValueError, match="vocab_size is 36, but 2 classes and 31 bins have 37 tokens"):
        Pix2SeqForObjectDetection(config)


@both_decoders
def test_other_classes(decoder, tmp_path):
    model = new_model(decoder)  # cat, dog, eel
    model.save_pretrained(tmp_path)
    names = {0: "eel", 1: "fox"}
    classes = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    with pytest.raises(ValueError, match="2 classes, but the model was trained with 3"):
        AutoModelForObjectDetection.from_pretrained(tmp_path, **classes)
    adapted = AutoModelForObjectDetection.from_pretrained(tmp_path, **classes, ignore_mismatched_sizes=True)
    assert (adapted.config.class_names, adapted.config.category_ids) == (("eel", "fox"), [0, 1])
    old, new = (each.get_input_embeddings().weight for each in (model, adapted))
    assert torch.equal(new[4], old[6])  # eel
    assert torch.equal(new[6:], old[7:])  # bins
    assert not torch.equal(new[5], old[5])
    assert Pix2SeqImageProcessor.from_model_config(adapted.config).category_ids == [0, 1]
    renamed = AutoModelForObjectDetection.from_pretrained(
        tmp_path, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    )
    assert renamed.config.class_names == ("a", "b", "c")
    assert_same_detections(renamed.eval()(images()), model(images()))
    for id2label, label2id, message in (
        ({0: "a", 1: "b", 2: "c"}, {"b": 0}, "label2id"),
        ({0: "dog", 1: "eel", 2: "cat"}, {"dog": 0, "eel": 1, "cat": 2}, "another label than in training"),
        ({0: "a", 1: "a", 2: "c"}, {"a": 1, "c": 2}, "a name twice"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoModelForObjectDetection.from_pretrained(tmp_path, id2label=id2label, label2id=label2id)


def test_other_values_of_the_config_are_kept_with_other_classes(tmp_path):
    new_model("llama").save_pretrained(tmp_path)
    config = AutoModelForObjectDetection.from_pretrained(
        tmp_path,
        id2label={0: "eel", 1: "fox"},
        label2id={"eel": 0, "fox": 1},
        ignore_mismatched_sizes=True,
        category_ids=[17, 18],
        image_mean=[0.5, 0.5, 0.5],
        max_objects=7,
    ).config
    assert (config.category_ids, config.image_mean, config.max_objects) == ([17, 18], [0.5, 0.5, 0.5], 7)


def test_arguments_of_from_pretrained_select_the_files(tmp_path):
    model = new_model("llama")
    model.save_pretrained(tmp_path / "part")
    loaded = Pix2SeqForObjectDetection.from_pretrained(tmp_path, subfolder="part", dtype=torch.bfloat16, max_objects=2)
    assert (loaded.dtype, loaded.config.max_objects) == (torch.bfloat16, 2)
    assert torch.equal(loaded.decoder.lm_head.weight, model.decoder.lm_head.weight.bfloat16())


@pytest.mark.parametrize("trained", [True, False])
def test_other_classes_of_another_architecture_are_refused(tmp_path, trained):
    build(spatial_modulation=trained).save_pretrained(tmp_path)
    config = Pix2SeqConfig.from_pretrained(tmp_path, id2label={0: "cat"}, label2id={"cat": 0})
    config.category_ids = [0]
    config.decoder_config.spatial_modulation = not trained
    with pytest.raises(ValueError, match=r"another architecture than .* .decoder\.spatial_modulation"):
        Pix2SeqForObjectDetection.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)


def test_weights_of_another_architecture_are_refused(tmp_path):
    """transformers would initialize them."""
    new_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("encoder.layers", "encoder"): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another architecture"):
        AutoModelForObjectDetection.from_pretrained(tmp_path)


@both_decoders
def test_resizing_the_embeddings_is_refused(decoder):
    model = new_model(decoder)
    expected = model(images())
    with pytest.raises(NotImplementedError, match="id2label"):
        model.resize_token_embeddings(100)
    assert model.config.decoder_config.vocab_size == 27
    assert_same_detections(model(images()), expected)


# -- labels and Trainer ----------------------------------------------------------------------------

ANNOTATIONS = [
    {"image_id": 7, "annotations": [{"bbox": [8, 4, 16, 32], "category_id": 7, "iscrowd": 0}]},
    {"image_id": 8, "annotations": []},
]


def examples(processor: Pix2SeqImageProcessor, **kwargs):
    pictures = [Image.fromarray(np.full((48, 64, 3), value, np.uint8)) for value in (40, 200)]
    return processor(pictures, annotations=ANNOTATIONS, **kwargs)


@both_decoders
def test_labels_as_boxes_equal_labels_as_tokens(decoder):
    model = new_model(decoder)
    processor = Pix2SeqImageProcessor.from_model_config(model.config)
    tokens, boxes = examples(processor), examples(processor, labels_format="boxes")
    assert boxes["labels"][0]["boxes"].tolist() == [[0.25, 0.3125, 0.25, 0.5]]
    assert boxes["labels"][0]["class_labels"].tolist() == [1]
    assert boxes["labels"][1]["boxes"].shape == (0, 4)
    assert boxes["labels"][0]["size"].tolist() == boxes["labels"][0]["orig_size"].tolist() == [48, 64]
    expected = model(**tokens)
    assert expected.pred_boxes.shape == (2, 3, 4)
    assert model(**boxes).loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    without_inputs = model(tokens["pixel_values"], labels=tokens["labels"])
    assert without_inputs.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert model(**boxes, return_boxes=False).pred_boxes is None
    model.train()
    losses = [model(**boxes).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3  # other noise objects and class tokens
    assert model(**boxes).pred_boxes is None


def test_ignored_labels_have_no_loss():
    model = new_model("llama").train()
    batch = examples(Pix2SeqImageProcessor.from_model_config(model.config))
    labels = batch["labels"].clone()
    labels[batch["token_weights"] == 0] = -100
    expected = model(**batch).loss
    assert torch.equal(model(batch["pixel_values"], batch["input_ids"], labels).loss, expected)
    weighted = model(batch["pixel_values"], batch["input_ids"], labels, torch.ones(labels.shape)).loss
    assert torch.equal(weighted, expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"boxes": torch.zeros(0, 4)}], "lacks class_labels"),
        ([{"boxes": torch.tensor([[8.0, 4, 16, 32]]), "class_labels": torch.tensor([0])}], "center x"),
        ([{"boxes": torch.tensor([[0.5, 0.5, 0.1, 0.0]]), "class_labels": torch.tensor([0])}], "center x"),
        ([{"boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]]), "class_labels": torch.tensor([3])}], "0 ... 2"),
        (
            [{"boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]]), "class_labels": torch.tensor([0, 1])}],
            r"\(M,\) and",
        ),
        (torch.full((1, 15), 27), "27 tokens"),
        (torch.full((1, 15), -1), "27 tokens"),
        (torch.full((1, 15), 1), "BOS"),
        (torch.full((15,), 5), "1 images, but labels of 15"),
        (torch.full((1,), 5), "token ids"),
        ([{"boxes": torch.rand(4, 2), "class_labels": torch.tensor([0, 1])}], "must be"),
        ([{"boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]]), "class_labels": torch.tensor([1.9])}], "integers"),
        (
            [
                {
                    "boxes": torch.zeros(0, 4),
                    "class_labels": torch.tensor([], dtype=int),
                    "size": torch.tensor([480, 640]),
                }
            ],
            "not that of an image in a square of 64",
        ),
        ({"boxes": torch.zeros(0, 4), "class_labels": torch.tensor([])}, "are a dict"),
        ([], "1 images, but labels of 0"),
    ],
)
def test_invalid_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        new_model("llama")(images(1), labels=labels)


def test_sequences_of_another_vocabulary_or_length_are_refused():
    model = new_model("llama")  # 3 classes
    batch = examples(Pix2SeqImageProcessor.from_model_config(model.config))
    other = examples(
        Pix2SeqImageProcessor.from_model_config(
            model.config.__class__(
                **model.config.to_dict() | {"category_ids": [7], "id2label": {0: "dog"}, "label2id": {"dog": 0}}
            )
        )
    )
    with pytest.raises(ValueError, match="four bins and a class"):
        model(**other)
    with pytest.raises(ValueError, match="input_ids"):
        model(**batch | {"input_ids": batch["input_ids"][:, :-1]})
    with pytest.raises(ValueError, match="loss_positions need input_ids"):
        model(images(), labels=batch["labels"], loss_positions=torch.arange(3))
    with pytest.raises(ValueError, match="omit"):
        model(images(), labels=[{}, {}], token_weights=batch["token_weights"])


def test_invalid_pixels_are_refused():
    model = new_model("llama")
    for pixels in (images()[:, :1], images()[:, :, :32], images().long(), images().float()):
        with pytest.raises(ValueError, match="pixel_values"):
            model(pixels)


class ListDataset(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.rows = [{name: batch[name][index] for name in batch} for index in range(len(batch["pixel_values"]))] * 4

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    """As in the object detection examples of transformers."""
    return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": [r["labels"] for r in rows]}


@pytest.mark.parametrize(
    ("labels_format", "collator", "smoothing"),
    [("tokens", None, 0.0), ("tokens", collate, 0.0), ("boxes", collate, 0.0), ("tokens", None, 0.1)],
)
def test_trainer(labels_format, collator, smoothing, tmp_path):
    model, seen = new_model("llama"), []
    processor = Pix2SeqImageProcessor.from_model_config(model.config)
    dataset = ListDataset(examples(processor, labels_format=labels_format))

    def compute_metrics(evaluated):
        seen.append(evaluated.predictions if labels_format == "tokens" else evaluated.predictions[0])
        return {}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=30,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            label_smoothing_factor=smoothing,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            eval_do_concat_batches=labels_format == "tokens",
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collator,
        compute_metrics=None if smoothing else compute_metrics,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    if not smoothing:
        assert [array.shape for array in seen[-1]] == [(8, 3, 4), (8, 3), (8, 3)]  # boxes, labels, scores


@pytest.mark.slow
def test_trainer_evaluates_boxes_on_two_ranks(tmp_path):
    script = Path(__file__).parent / "launched_trainer.py"
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2"]):
        command = [sys.executable, *launcher, str(script), str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
    alone, together = (torch.load(tmp_path / f"{world_size}.pt") for world_size in (1, 2))
    assert [a.shape for a in together] == [(8, 3, 4), (8, 3), (8, 3)]
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
