"""train.py from end to end: what a run writes, and the effect of its arguments."""

import math
import signal

import pytest
import torch

from pix2seq import evaluate, train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.evaluate import EvaluateArguments
from pix2seq.manifest import verify
from pix2seq.models import load_model
from tests.runs import (
    assert_same_run,
    edited,
    evaluate_checkpoint,
    final_weights,
    interrupt_at,
    read_json,
    rows,
    run,
)


def test_run_folder(finished):
    assert read_json(finished, "status.json")["state"] == "finished"
    assert {"torch", "commit", "device", "command"} <= read_json(finished, "env.json").keys()
    assert parse(TrainArguments, ["--config", str(finished / "config.yaml")]).max_steps == 6
    for name in ("first_batch_00000000", "predictions_00000004"):
        assert (finished / "samples" / f"{name}.png").is_file()
    assert {path.name for path in (finished / "eval" / "step_6").iterdir()} == {
        "metrics.json",
        "predictions.json",
        "predictions.png",
    }
    for folder in ("best", "final", "checkpoints/step_00000006"):
        assert verify(finished / folder) is None
        assert {"model.safetensors", "config.json", "training.yaml"} <= {p.name for p in (finished / folder).iterdir()}
    assert "finished" in (finished / "train.log").read_text()


def test_metric_names(finished):
    logged = rows(finished)
    assert [row["step"] for row in logged] == [2, 3, 4, 6, 6]
    names = {"train/loss", "train/loss_coord", "train/loss_class", "train/lr", "train/grad_norm"}
    names |= {f"train/acc_{slot}" for slot in ("y1", "x1", "y2", "x2", "class")}
    assert names <= logged[0].keys()
    names = {"eval/AP", "eval/AP50", "eval/AP75", "eval/AP_small", "eval/AR_100", "eval/per_class/cross"}
    assert names <= logged[1].keys()
    assert all(math.isfinite(value) for row in logged for value in row.values())


@pytest.mark.parametrize("folder", ["final", "checkpoints/step_00000006"])
def test_evaluate_reproduces_the_metrics_and_predictions_of_training(finished, shapes_root, tmp_path, folder):
    metrics = evaluate_checkpoint(finished / folder, shapes_root, "--output_dir", str(tmp_path))
    assert metrics == read_json(tmp_path, "metrics.json") == read_json(finished, "eval/step_6/metrics.json")
    predictions = (tmp_path / "predictions.json").read_text()
    assert predictions == (finished / "eval/step_6/predictions.json").read_text()
    gt = shapes_root / "annotations" / "instances_val2017.json"
    words = ["--predictions", str(tmp_path / "predictions.json"), "--gt", str(gt)]
    assert evaluate.run_evaluation(parse(EvaluateArguments, words)) == metrics


@pytest.mark.parametrize(
    "words",
    [
        ["--decoder", "transformer"],
        ["--gradient_accumulation_steps", "2", "--gradient_checkpointing"],
        ["--freeze_backbone"],
        ["--batch_norm", "frozen"],
        ["--position_embedding", "fine", "--bin_init", "sine"],
        ["--causal_prefix"],
        ["--no_noise_objects"],
    ],
    ids=lambda words: words[0].strip("-"),
)
def test_evaluate_reproduces_training_with(shapes_root, tmp_path, words):
    assert run(shapes_root, tmp_path, *words, "--max_steps", "2", "--eval_every", "2") == 0
    assert evaluate_checkpoint(tmp_path / "final", shapes_root) == read_json(tmp_path, "eval/step_2/metrics.json")


@pytest.mark.parametrize(
    ("variable", "value"), [("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER"), ("ACCELERATE_MIXED_PRECISION", "bf16")]
)
def test_evaluate_reproduces_training_with_settings_of_the_launcher(
    shapes_root, tmp_path, monkeypatch, variable, value
):
    with monkeypatch.context() as patch:
        patch.setenv(variable, value)
        patch.setattr("accelerate.state.AcceleratorState._shared_state", {})
        assert run(shapes_root, tmp_path, "--max_steps", "2", "--eval_every", "2") == 0
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    precision = value if variable == "ACCELERATE_MIXED_PRECISION" else "no"
    assert f"mixed_precision: {precision}" in (tmp_path / "final" / "training.yaml").read_text().replace("'", "")
    assert not any("_orig_mod" in name for name in final_weights(tmp_path))
    assert evaluate_checkpoint(tmp_path / "final", shapes_root) == read_json(tmp_path, "eval/step_2/metrics.json")


def test_ema_is_evaluated_resumed_and_exported(shapes_root, tmp_path, monkeypatch):
    words = ["--ema_decay", "0.5", "--max_steps", "4", "--eval_every", "2", "--ckpt_every", "1"]
    history = []
    original = train.train_step

    def recording(context, micro_batches):
        result = original(context, micro_batches)
        history.append(context.unwrapped_model.projector.projection.weight.detach().clone())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", recording)
        assert run(shapes_root, tmp_path / "out", *words) == 0
    expected = history[0]
    for weights in history[1:]:
        expected = 0.5 * expected + 0.5 * weights
    final = load_model(tmp_path / "out" / "final", "")
    torch.testing.assert_close(final.projector.projection.weight.detach(), expected)
    assert [row["step"] for row in rows(tmp_path / "out") if "eval/ema/AP" in row] == [2, 4]
    metrics = evaluate_checkpoint(tmp_path / "out" / "final", shapes_root)
    assert metrics == read_json(tmp_path, "out/eval/step_4/ema/metrics.json")

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert run(shapes_root, tmp_path / "resumed", *words) == 75
    assert run(shapes_root, tmp_path / "resumed", *words, "--resume", "auto") == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "out")


def test_overfit_evaluates_the_training_images(shapes_root, tmp_path):
    assert run(shapes_root, tmp_path, "--overfit", "3") == 0
    assert {entry["image_id"] for entry in read_json(tmp_path, "eval/step_6/predictions.json")} == {1, 2, 3}
    assert evaluate_checkpoint(tmp_path / "final") == read_json(tmp_path, "eval/step_6/metrics.json")


def test_validation_set_may_lack_a_class(shapes_root, tmp_path):
    def remove_first_class(content):
        removed = content["categories"].pop(0)["id"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != removed]

    root = edited(shapes_root, tmp_path / "data", "val", remove_first_class)
    assert run(root, tmp_path / "out") == 0
    metrics = read_json(tmp_path, "out/eval/step_6/metrics.json")
    assert metrics["per_class/ellipse"] == -1
    assert evaluate_checkpoint(tmp_path / "out" / "final", root) == metrics


def test_a_step_without_loss_weight_is_finite(shapes_root, tmp_path):
    """Most batches contain an image without objects, whose noise objects have weight 0."""
    root = edited(
        shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].__delitem__(slice(3, None))
    )
    assert run(root, tmp_path / "out", "--noise_weight", "0", "--batch_size", "1") == 0
    assert all(row["train/skipped_steps"] == 0 for row in rows(tmp_path / "out") if "train/loss" in row)
