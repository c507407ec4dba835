"""The counted cost of a training step equals that of a real step; estimates of plan.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from pix2seq import plan
from pix2seq.argument_parser import parse
from pix2seq.data import find_split, load_annotations
from pix2seq.training.cost import GPUS, flop_counter, model_step_cost, peak_flops
from pix2seq.training.setup import enable_gradient_checkpointing, mfu_factor
from tests.test_architectures import build

BATCH, LENGTH, LOSS_POSITIONS = 2, 10, 4


def real_step(model) -> tuple[float, float, float]:
    """Forward FLOPs, step FLOPs and bytes of saved tensors of a step on real tensors."""
    side = model.config.image_size
    pixels = torch.randint(0, 255, (BATCH, 3, side, side), dtype=torch.uint8)
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    own, saved = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}, {}

    def save(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with flop_counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = model(
                pixels,
                input_ids=ids,
                labels=ids,
                token_weights=ids.float(),
                num_items_in_batch=1.0,
                loss_positions=torch.arange(BATCH * LOSS_POSITIONS),
            )
        forward = counter.get_total_flops()
        output.loss.backward()
    return forward, counter.get_total_flops(), sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("decoder", ["llama", "transformer"])
@pytest.mark.parametrize("freeze", [False, True])
def test_counts_equal_a_real_step(decoder, freeze):
    model = build(decoder)
    model.backbone.prepare_for_training(freeze, "local", 1, torch.device("cpu"), model.config.image_size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = model_step_cost(model, BATCH, LENGTH, "no", LOSS_POSITIONS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    forward, step, saved_bytes = real_step(model)
    assert cost.forward_flops == forward > 0
    assert cost.step_flops == step > 1.4 * forward
    assert cost.activation_bytes == pytest.approx(saved_bytes, rel=0.01)


def test_gradient_checkpointing_saves_memory_and_adds_flops():
    plain, saving = build("llama"), build("llama")
    enable_gradient_checkpointing(saving)
    a, b = (model_step_cost(model, BATCH, LENGTH, "no", LOSS_POSITIONS) for model in (plain, saving))
    assert a.step_flops == b.step_flops
    assert b.activation_bytes < 0.9 * a.activation_bytes
    assert a.recomputed_flops == 0
    assert 0 < b.recomputed_flops < b.forward_flops  # the backbone, a ResNet, is not checkpointed
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())


def test_half_precision_saves_memory():
    full, half = (model_step_cost(build("llama"), BATCH, LENGTH, name, LOSS_POSITIONS) for name in ("no", "bf16"))
    assert half.activation_bytes < full.activation_bytes
    assert half.step_flops == full.step_flops


def test_peak_flops_by_device_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == GPUS["h100"]["bf16"]
    assert peak_flops("NVIDIA A100-SXM4-40GB", "no") == GPUS["a100-40"]["no"]
    assert peak_flops("NVIDIA L40S", "bf16") == GPUS["l40s"]["bf16"]
    assert peak_flops("NVIDIA L4", "bf16") == GPUS["l4"]["bf16"]
    assert peak_flops("unknown GPU", "bf16") is None


def estimate(*argv: str) -> dict:
    return plan.plan(parse(plan.PlanArguments, list(argv)))


def test_plan_of_coco():
    numbers = estimate("--preset", "r50", "--num_gpus", "8", "--batch_size", "16", "--num_epochs", "100")
    assert numbers["images_per_step"] == 128
    assert numbers["steps"] == -(-100 * 118_287 // 128)
    assert (numbers["visual_tokens_per_image"], numbers["sequence_tokens_per_image"]) == (400, 500)
    assert numbers["parameters"] == pytest.approx(35.4e6, rel=0.01)
    assert numbers["hours"] == pytest.approx(numbers["run_flops"] / (8 * 989e12 * 0.3) / 3600)
    half = estimate("--preset", "r50", "--num_gpus", "4", "--batch_size", "16", "--num_epochs", "100")
    assert half["hours"] == pytest.approx(2 * numbers["hours"], rel=1e-3)


def test_plan_of_a_dataset(shapes_root, tmp_path, capsys):
    argv = ["--config", "configs/demo.yaml", "--root", str(shapes_root), "--gpu", "t4", "--mixed_precision", "fp16"]
    assert plan.main([*argv, "--output", str(tmp_path / "plan.json")]) == 0
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert (numbers["images"], numbers["evaluation_images"], numbers["steps"]) == (12, 5, 3200)
    output = capsys.readouterr().out
    assert "1 x t4, fp16" in output
    assert "3,200 steps" in output


def test_plan_does_not_overwrite_its_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: r50\n")
    assert plan.main(["--config", str(recipe), "--output", str(recipe)]) == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert recipe.read_text() == "preset: r50\n"


def test_plan_includes_sharding_ema_and_freezing_in_the_memory():
    plain = estimate("--preset", "r50", "--num_gpus", "8")["state_gib"]
    assert estimate("--preset", "r50", "--num_gpus", "8", "--shard")["state_gib"] < plain / 3
    assert estimate("--preset", "r50", "--num_gpus", "8", "--ema_decay", "0.9")["state_gib"] > plain
    assert estimate("--preset", "r50", "--num_gpus", "8", "--freeze_backbone")["state_gib"] < plain


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--gpu", "voodoo"], "invalid choice: 'voodoo'"),
        (["--gpu", "t4", "--mixed_precision", "bf16"], "--gpu t4: does not support bf16"),
        (["--mfu", "0"], "--mfu 0.0: must be above 0"),
        (["--num_gpus", "0"], "--num_gpus 0: must be at least 1"),
        (["--shard", "--ema_decay", "0.9"], "--ema_decay"),
        (["--output", "nowhere/plan.json"], "--output nowhere/plan.json: cannot be written"),
        (["--val_json", "val.json"], "--train_images --train_json --val_images: missing"),
        (["--preset", "r50", "--frozen_stages", "9"], "--frozen_stages 9"),
        (["--root", "nowhere"], "--root nowhere: no such folder"),
    ],
)
def test_plan_reports_invalid_arguments_in_one_line(argv, part, capsys):
    with pytest.raises(SystemExit) as end:
        raise SystemExit(plan.main(argv))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_mfu_factor_of_a_run(make_model, shapes_root, monkeypatch):
    """On a simulated GPU. It is 0 for an unknown GPU or if the count fails, which does not end a run."""
    images = load_annotations(find_split("train", str(shapes_root)))
    args = SimpleNamespace(mixed_precision="bf16", max_objects=4, noise_objects=True, freeze_backbone=False)
    args.batch_norm, args.frozen_stages, args.gradient_checkpointing = "sync", 0, False
    model, messages = make_model().train(), []
    arguments = (args, model, images, torch.device("cuda"), SimpleNamespace(log=messages.append))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    real = images.trainable.sum() / len(images)
    cost = model_step_cost(model, 1, 20, "bf16", round(5 * real + 4 - real))
    assert mfu_factor(*arguments) == cost.step_flops / 989e12
    assert mfu_factor(*arguments[:3], torch.device("cpu"), None) == 0
    monkeypatch.setattr("pix2seq.training.setup.model_step_cost", lambda *args, **kwargs: 1 / 0)
    assert mfu_factor(*arguments) == 0
    assert len(messages) == 1
    assert "perf/mfu" in messages[0]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "unknown GPU")
    assert mfu_factor(*arguments) == 0
