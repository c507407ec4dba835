"""What a step costs, counted without values, against the same step taken for real; and the plan made of it."""

import json
from types import SimpleNamespace

import pytest
import torch

from pix2seq import plan
from pix2seq.argument_parser import parse
from pix2seq.data import find_split, load_annotations
from pix2seq.training.cost import GPUS, flop_counter, model_step_cost, peak_flops
from pix2seq.training.setup import mfu_factor
from tests.test_architectures import build

BATCH, LENGTH, TARGETS = 2, 10, 4


def real_step(model) -> tuple[float, float, float]:
    """Forward FLOPs, FLOPs and bytes kept, of a step with values."""
    side = model.config.image_size
    pixels = torch.randint(0, 255, (BATCH, 3, side, side), dtype=torch.uint8)
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    own, kept = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with flop_counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(pixels, ids, ids, ids.float(), 1.0, torch.arange(BATCH * TARGETS))
        forward = counter.get_total_flops()
        output.loss.backward()
    return forward, counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("decoder", ["llama", "transformer"])
@pytest.mark.parametrize("freeze", [False, True])
def test_the_count_is_that_of_a_real_step(decoder, freeze):
    model = build(decoder)
    model.backbone.prepare_for_training(freeze, "local", 1, torch.device("cpu"), model.config.image_size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = model_step_cost(model, BATCH, LENGTH, "no", TARGETS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    forward, step, kept = real_step(model)
    assert cost.forward_flops == forward > 0
    assert cost.step_flops == step > 1.4 * forward
    assert cost.activation_bytes == pytest.approx(kept, rel=0.01)


def test_checkpointing_keeps_less_and_counts_the_same():
    plain, saving = build("llama"), build("llama")
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    a, b = (model_step_cost(model, BATCH, LENGTH, "no", TARGETS) for model in (plain, saving))
    assert a.step_flops == b.step_flops
    assert b.activation_bytes < 0.9 * a.activation_bytes
    assert a.recomputed_flops == 0
    assert 0 < b.recomputed_flops < b.forward_flops  # the backbone, a ResNet, is not checkpointed
    assert saving.is_gradient_checkpointing


def test_half_precision_keeps_less():
    full, half = (model_step_cost(build("llama"), BATCH, LENGTH, name, TARGETS) for name in ("no", "bf16"))
    assert half.activation_bytes < full.activation_bytes
    assert half.step_flops == full.step_flops


def test_gpus_are_known_by_their_names():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == GPUS["h100"]["bf16"]
    assert peak_flops("NVIDIA A100-SXM4-40GB", "no") == GPUS["a100-40"]["no"]
    assert peak_flops("NVIDIA L40S", "bf16") == GPUS["l40s"]["bf16"]
    assert peak_flops("NVIDIA L4", "bf16") == GPUS["l4"]["bf16"]
    assert peak_flops("Voodoo2", "bf16") is None


def planned(*words: str) -> dict:
    return plan.plan(parse(plan.PlanArguments, list(words)))


def test_a_plan_of_coco():
    found = planned("--size", "r50", "--num_gpus", "8", "--batch_size", "16", "--num_epochs", "100")
    assert found["images_a_step"] == 128
    assert found["steps"] == -(-100 * 118_287 // 128)
    assert (found["visual_tokens_an_image"], found["sentence_tokens_an_image"]) == (400, 500)
    assert found["parameters"] == pytest.approx(35.4e6, rel=0.01)
    assert found["hours"] == pytest.approx(found["run_flops"] / (8 * 989e12 * 0.3) / 3600)
    # A step on fewer GPUs takes as long in all.
    less = planned("--size", "r50", "--num_gpus", "4", "--batch_size", "16", "--num_epochs", "100")
    assert less["hours"] == pytest.approx(2 * found["hours"], rel=1e-3)


def test_a_plan_counts_what_is_named(shapes_root, tmp_path, capsys):
    words = ["--config", "configs/demo.yaml", "--root", str(shapes_root), "--gpu", "t4", "--mixed_precision", "fp16"]
    assert plan.run_plan(parse(plan.PlanArguments, [*words, "--output", str(tmp_path / "plan.json")])) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["images"], found["evaluation_images"], found["steps"]) == (12, 5, 3200)
    said = capsys.readouterr().out
    assert "1 x t4, fp16" in said
    assert "3,200 steps" in said


def test_sharding_and_averaging_and_freezing_show_in_the_memory():
    plain = planned("--size", "r50", "--num_gpus", "8")["state_gib"]
    assert planned("--size", "r50", "--num_gpus", "8", "--shard")["state_gib"] < plain / 3  # one copy is whole
    assert planned("--size", "r50", "--num_gpus", "8", "--ema_decay", "0.9")["state_gib"] > plain
    assert planned("--size", "r50", "--num_gpus", "8", "--freeze_backbone")["state_gib"] < plain


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--gpu", "voodoo"], "invalid choice: 'voodoo'"),
        (["--gpu", "t4", "--mixed_precision", "bf16"], "--gpu t4: has no bf16"),
        (["--mfu", "0"], "--mfu 0.0: must be above 0"),
        (["--num_gpus", "0"], "--num_gpus 0: must be at least 1"),
        (["--shard", "--ema_decay", "0.9"], "--ema_decay: is not kept"),
        (["--output", "nowhere/plan.json"], "--output nowhere/plan.json: its folder does not exist"),
        (["--val_json", "val.json"], "--train_images --train_json --val_images: missing"),
        (["--size", "r50", "--frozen_stages", "9"], "--frozen_stages 9: at most 3 here"),
        (["--root", "nowhere"], "--root nowhere: no such folder"),
    ],
)
def test_mistakes_in_a_plan_are_one_line(words, part, capsys):
    with pytest.raises(SystemExit) as end:
        raise SystemExit(plan.run_plan(parse(plan.PlanArguments, words)))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_run_knows_its_share_of_the_gpus_peak(make_model, shapes_root, monkeypatch):
    """On a pretended GPU. Nothing is known of one that is not in the table, and a count that fails ends no run."""
    images = load_annotations(find_split("train", str(shapes_root)))
    args = SimpleNamespace(mixed_precision="bf16", max_objects=4, noise_objects=True, freeze_backbone=False)
    args.batch_norm, args.frozen_stages, args.gradient_checkpointing = "sync", 0, False
    model, said = make_model().train(), []
    ask = (args, model, images, torch.device("cuda"), SimpleNamespace(log=said.append))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    real = images.trainable.sum() / len(images)
    cost = model_step_cost(model, 1, 20, "bf16", round(5 * real + 4 - real))
    assert mfu_factor(*ask) == cost.step_flops / 989e12
    assert mfu_factor(*ask[:3], torch.device("cpu"), None) == 0
    monkeypatch.setattr("pix2seq.training.setup.model_step_cost", lambda *words: 1 / 0)
    assert mfu_factor(*ask) == 0
    assert said == ["perf/mfu is left out: the step's FLOPs cannot be counted (division by zero)"]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Somebody's")
    assert mfu_factor(*ask) == 0
