"""Losses and gradients that are not finite change no weight."""

import json
import math
import signal

import torch
from safetensors.torch import load_file

from pix2seq import train
from pix2seq.models import Pix2SeqForObjectDetection
from tests.runs import arguments, interrupt_at, rows


def poison(monkeypatch, steps) -> None:
    """Gives the first image of these steps (counted from 1) an infinite weight."""
    original = train.train_step

    def poisoned(training, micro_batches):
        if training.step + 1 in steps:
            for batch in micro_batches:
                batch["token_weights"][0] = math.inf
        return original(training, micro_batches)

    monkeypatch.setattr(train, "train_step", poisoned)


def test_steps_that_are_not_finite_are_skipped_and_named(shapes_root, tmp_path, monkeypatch):
    output = tmp_path / "out"
    before = {}
    poison(monkeypatch, {2, 4})
    poisoned = train.train_step

    def watched(training, *rest):
        state = {name: value.clone() for name, value in training.unwrapped.state_dict().items()}
        norm = poisoned(training, *rest)
        same = all(torch.equal(value, state[name]) for name, value in training.unwrapped.state_dict().items())
        before[training.step] = same
        return norm

    monkeypatch.setattr(train, "train_step", watched)
    assert train.run_training(arguments(shapes_root, output)) == 0
    assert before == {1: False, 2: True, 3: False, 4: True, 5: False, 6: False}  # batch norms' statistics included
    assert [row["train/skipped_steps"] for row in rows(output) if "train/loss" in row] == [1, 2, 2]
    assert all(math.isfinite(row["train/loss"]) for row in rows(output) if "train/loss" in row)
    log = (output / "train.log").read_text()
    assert "step 2 is not finite; image ids: [" in log
    assert "step 4 is not finite" in log


def test_too_many_steps_that_are_not_finite_end_the_run(shapes_root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        poison(patch, {4, 5, 6})
        assert train.run_training(arguments(shapes_root, output, "--max_skipped_steps", "1")) == 1
    message = capsys.readouterr().err
    assert "step 5 is not finite; image ids: [" in message
    assert "stopped after 2 such steps in a row" in message
    assert json.loads((output / "status.json").read_text())["state"] == "failed"
    weights = load_file(output / "checkpoints" / "step_00000003" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    # The number in a row survives an interruption.
    with monkeypatch.context() as patch:
        poison(patch, {1, 2})
        interrupt_at(patch, 1, signal.SIGTERM)
        words = ("--max_skipped_steps", "1")
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    with monkeypatch.context() as patch:
        poison(patch, {1, 2})
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 1


def test_steps_skipped_from_the_start_do_not_hold_up_the_schedule(shapes_root, tmp_path, monkeypatch):
    words = ("--log_every", "1", "--eval_every", "0", "--sample_every", "0")
    with monkeypatch.context() as patch:
        poison(patch, {1, 2})
        assert train.run_training(arguments(shapes_root, tmp_path / "whole", *words)) == 0
    with monkeypatch.context() as patch:
        poison(patch, {1, 2})
        interrupt_at(patch, 2, signal.SIGTERM)
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert rows(tmp_path / "cut")[0]["train/loss"] is None, "the loss of no step is no 0"


def test_a_gradient_that_is_not_finite_is_not_applied(shapes_root, tmp_path, monkeypatch):
    """Though the loss is."""
    original = Pix2SeqForObjectDetection.forward
    calls = []

    def spoiled(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if output.loss is not None and output.loss.requires_grad:
            calls.append(0)
            if len(calls) == 3:
                output.loss.register_hook(lambda gradient: gradient * math.nan)
        return output

    monkeypatch.setattr(Pix2SeqForObjectDetection, "forward", spoiled)
    assert train.run_training(arguments(shapes_root, tmp_path / "out")) == 0
    assert "step 3 is not finite" in (tmp_path / "out" / "train.log").read_text()
    weights = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def lend_a_scaler(monkeypatch, scale: float) -> None:
    """fp16 as on a GPU, which a CPU does not get from Accelerate."""
    join = train.make_accelerator

    def join_in_half(args):
        accelerator = join(args)
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        accelerator.native_amp = True
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", join_in_half)
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})


def test_the_loss_scaler_skips_what_overflows_and_resumes_exactly(shapes_root, tmp_path, monkeypatch):
    words = ("--log_every", "1", "--eval_every", "0", "--sample_every", "0", "--max_grad_norm", "1")
    seen = []
    original = train.train_step

    def watched(training, *rest):
        before = training.unwrapped.projector.projection.weight.detach().clone()
        scale = training.accelerator.scaler.get_scale()
        found = original(training, *rest)
        moved = not torch.equal(before, training.unwrapped.projector.projection.weight)
        seen.append((scale, moved, training.accelerator.scaler.get_scale()))
        return found

    with monkeypatch.context() as patch:
        lend_a_scaler(patch, 2.0**30)
        patch.setattr(train, "train_step", watched)
        assert train.run_training(arguments(shapes_root, tmp_path / "whole", *words, "--max_steps", "20")) == 0
    assert seen[0] == (2.0**30, False, 2.0**29), "a gradient that overflows is not applied, and the scale halved"
    applied = [moved for _, moved, _ in seen]
    assert any(applied)
    assert all(after == scale / 2 for scale, moved, after in seen if not moved)
    weights = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    first = applied.index(True) + 2
    with monkeypatch.context() as patch:
        lend_a_scaler(patch, 2.0**30)
        interrupt_at(patch, first, signal.SIGTERM)
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words, "--max_steps", "20")) == 75
    with monkeypatch.context() as patch:
        lend_a_scaler(patch, 2.0**30)
        more = (*words, "--max_steps", "20", "--resume", "auto")
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *more)) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(shapes_root, tmp_path, monkeypatch, capsys):
    original = Pix2SeqForObjectDetection.forward

    def spoiled(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if output.loss is not None and output.loss.requires_grad:
            output.loss.register_hook(lambda gradient: gradient * math.nan)
        return output

    monkeypatch.setattr(Pix2SeqForObjectDetection, "forward", spoiled)
    lend_a_scaler(monkeypatch, 4.0)
    words = ("--eval_every", "0", "--sample_every", "0", "--ema_decay", "0.9")
    assert train.run_training(arguments(shapes_root, tmp_path / "out", *words)) == 1
    assert "the gradient of step 3 is not finite however small the loss is scaled" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"
