"""train.py from end to end on a few small pictures: what it leaves behind, and what its flags do."""

import json
import math
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from pix2seq import evaluate, train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.evaluate import EvaluateArguments
from pix2seq.models import load_model
from pix2seq.training import checkpoint
from tests.runs import TINY, arguments, edited, interrupt_at, rows


def test_a_run_explains_itself(finished):
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"
    assert {"torch", "commit", "device", "command"} <= json.loads((finished / "env.json").read_text()).keys()
    assert parse(TrainArguments, ["--config", str(finished / "config.yaml")]).max_steps == 6
    assert (finished / "samples" / "first_batch_00000000.png").is_file()
    assert (finished / "samples" / "predictions_00000004.png").is_file()
    assert (finished / "samples" / "strip.png").is_file()
    assert {path.name for path in (finished / "eval" / "step_6").iterdir()} == {
        *("metrics.json", "predictions.json", "predictions.png", "worst.png")
    }
    for folder in ("best", "final", "checkpoints/step_00000006"):
        assert checkpoint.verify(finished / folder) is None
        assert {"model.safetensors", "config.json", "training.yaml"} <= {p.name for p in (finished / folder).iterdir()}
    assert "finished" in (finished / "train.log").read_text()


def test_metrics_have_the_names_of_the_contract(finished):
    logged = rows(finished)
    assert [row["step"] for row in logged] == [2, 3, 4, 6, 6]
    names = {"train/loss", "train/loss_coord", "train/loss_class", "train/lr", "train/grad_norm"}
    names |= {f"train/acc_{slot}" for slot in ("y1", "x1", "y2", "x2", "class")}
    assert names <= logged[0].keys()
    names = {"eval/AP", "eval/AP50", "eval/AP75", "eval/AP_small", "eval/AR_100", "eval/per_class/cross"}
    assert names <= logged[1].keys()
    assert all(math.isfinite(value) for row in logged for value in row.values())


@pytest.mark.parametrize("folder", ["final", "checkpoints/step_00000006"])
def test_evaluate_reproduces_the_number_training_printed_to_the_last_digit(finished, shapes_root, tmp_path, folder):
    args = ["--checkpoint", str(finished / folder), "--root", str(shapes_root), "--output_dir", str(tmp_path)]
    metrics = evaluate.run_evaluation(parse(EvaluateArguments, [*args, "--num_workers", "0"]))
    trained = json.loads((finished / "eval" / "step_6" / "metrics.json").read_text())
    assert metrics == trained
    assert json.loads((tmp_path / "metrics.json").read_text()) == trained
    predictions = (tmp_path / "predictions.json").read_text()
    assert predictions == (finished / "eval" / "step_6" / "predictions.json").read_text()
    # And the predictions file alone gives the same numbers again.
    truth = shapes_root / "annotations" / "instances_val2017.json"
    args = ["--predictions", str(tmp_path / "predictions.json"), "--gt", str(truth)]
    assert evaluate.run_evaluation(parse(EvaluateArguments, args)) == trained


def test_accumulation_changes_nothing_but_rounding(finished, shapes_root, tmp_path):
    """Two micro-batches of 2 are one of 4: a mean of means would weight images by their number of objects.

    BatchNorm sees the micro-batch, so this model has none in its way: dropout and the norm of the backbone are off.
    """
    vit = "{model_type: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, "
    vit += "patch_size: 16, image_size: 64}"
    common = [
        "--backbone",
        vit,
        "--dropout",
        "0",
        "--drop_path",
        "0",
        "--eval_every",
        "0",
        "--sample_every",
        "0",
        "--log_every",
        "1",
    ]
    for name, words in (("whole", []), ("split", ["--batch_size", "1", "--gradient_accumulation_steps", "4"])):
        assert train.run_training(arguments(shapes_root, tmp_path / name, *common, *words)) == 0
    for whole, split in zip(rows(tmp_path / "whole"), rows(tmp_path / "split"), strict=True):
        for key in {"train/loss", "train/grad_norm", "train/lr"} & whole.keys():
            assert split[key] == pytest.approx(whole[key], rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        ["--decoder", "transformer", "--decoder_size", "24", "--decoder_heads", "3", "--decoder_mlp_size", "40"],
        ["--gradient_accumulation_steps", "2", "--gradient_checkpointing"],
        ["--freeze_backbone"],
        ["--batch_norm", "frozen"],
        ["--position_embedding", "fine", "--bin_init", "sine"],
        ["--causal_prefix"],
    ],
    ids=lambda words: words[0].strip("-"),
)
def test_options_train_and_their_detectors_are_what_was_trained(shapes_root, tmp_path, words):
    args = arguments(shapes_root, tmp_path / "out", *words, "--max_steps", "2", "--eval_every", "2")
    assert train.run_training(args) == 0
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)]
    metrics = evaluate.run_evaluation(parse(EvaluateArguments, words))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_2" / "metrics.json").read_text())


def test_averaged_weights(shapes_root, tmp_path, monkeypatch):
    """Evaluated beside the others, resumed exactly, and in the end the detector; a plain one."""
    words = ["--ema_decay", "0.5", "--max_steps", "4", "--eval_every", "2", "--ckpt_every", "1"]
    seen = []
    original = train.train_step

    def remembers(training, *rest):
        norm = original(training, *rest)
        seen.append(training.unwrapped.projector.projection.weight.detach().clone())
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", remembers)
        assert train.run_training(arguments(shapes_root, tmp_path / "out", *words)) == 0
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.5 * expected + 0.5 * weights
    final = load_model(tmp_path / "out" / "final", "")
    torch.testing.assert_close(final.projector.projection.weight.detach(), expected)
    evaluations = [row for row in rows(tmp_path / "out") if "eval/ema/AP" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    metrics = evaluate.run_evaluation(
        parse(EvaluateArguments, ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)])
    )
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_4" / "ema" / "metrics.json").read_text())

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("cut", "out"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_compiled_run_leaves_a_plain_detector(shapes_root, tmp_path, monkeypatch):
    """Compiled by the launcher's setting, as `accelerate launch --dynamo_backend` does."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert train.run_training(arguments(shapes_root, tmp_path / "out", "--max_steps", "2", "--eval_every", "2")) == 0
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "out" / "final" / "model.safetensors"))
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)]
    metrics = evaluate.run_evaluation(parse(EvaluateArguments, words))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_2" / "metrics.json").read_text())


def test_sentences_without_noise_objects_train_too(shapes_root, tmp_path):
    assert train.run_training(arguments(shapes_root, tmp_path / "out", "--no_noise_objects")) == 0


def test_overfit_evaluates_the_images_it_trains_on(shapes_root, tmp_path):
    assert train.run_training(arguments(shapes_root, tmp_path / "out", "--overfit", "3")) == 0
    predictions = json.loads((tmp_path / "out" / "eval" / "step_6" / "predictions.json").read_text())
    assert {row["image_id"] for row in predictions} == {1, 2, 3}
    # evaluate.py finds the same images by itself.
    metrics = evaluate.run_evaluation(parse(EvaluateArguments, ["--checkpoint", str(tmp_path / "out" / "final")]))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_6" / "metrics.json").read_text())


def test_explicit_paths_instead_of_a_root(shapes_root, tmp_path):
    words = []
    for split in ("train", "val"):
        words += [f"--{split}_images", str(shapes_root / "images" / f"{split}2017")]
        words += [f"--{split}_json", str(shapes_root / "annotations" / f"instances_{split}2017.json")]
    output = tmp_path / "out"
    assert (
        train.run_training(parse(TrainArguments, [*TINY, *words, "--output_dir", str(output), "--max_steps", "2"]))
        == 0
    )


def test_the_flat_coco_layout(shapes_root, tmp_path):
    shutil.copytree(shapes_root, tmp_path / "coco")
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / "images" / split).rename(tmp_path / "coco" / split)
    assert train.run_training(arguments(tmp_path / "coco", tmp_path / "out", "--max_steps", "1")) == 0


def test_validation_may_lack_a_class(shapes_root, tmp_path):
    """What the model finds of it has nothing to match, but is no mistake in a file."""

    def drop_the_first_class(content):
        dropped = content["categories"].pop(0)["id"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != dropped]

    root = edited(shapes_root, tmp_path / "data", "val", drop_the_first_class)
    assert train.run_training(arguments(root, tmp_path / "out")) == 0
    trained = json.loads((tmp_path / "out" / "eval" / "step_6" / "metrics.json").read_text())
    assert trained["per_class/ellipse"] == -1
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(root)]
    assert evaluate.run_evaluation(parse(EvaluateArguments, words)) == trained


def test_a_step_whose_tokens_all_have_weight_0_is_no_accident(shapes_root, tmp_path):
    """A picture without objects, without noise objects that count."""
    root = edited(
        shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].__delitem__(slice(3, None))
    )
    assert train.run_training(arguments(root, tmp_path / "out", "--noise_weight", "0", "--batch_size", "1")) == 0


def test_the_precision_the_launcher_chose_is_kept(shapes_root, tmp_path, monkeypatch):
    """evaluate.py repeats it, or it would not reproduce the number training printed."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert train.run_training(arguments(shapes_root, tmp_path / "out")) == 0
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert "mixed_precision: bf16" in (tmp_path / "out" / "final" / "training.yaml").read_text()
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)]
    metrics = evaluate.run_evaluation(parse(EvaluateArguments, words))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_6" / "metrics.json").read_text())
