"""Losses and gradients that are not finite do not change the model."""

import math
import signal

import torch
from safetensors.torch import load_file

from pix2seq import train
from pix2seq.models import Pix2SeqForObjectDetection
from tests.runs import NO_EVALUATION, assert_same_run, final_weights, interrupt_at, read_json, rows, run


def make_loss_infinite(monkeypatch, steps: set[int]) -> None:
    """Gives the first image of these steps (counted from 1) infinite weight."""
    original = train.train_step

    def infinite(context, micro_batches):
        if context.step + 1 in steps:
            for batch in micro_batches:
                batch["token_weights"][0] = math.inf
        return original(context, micro_batches)

    monkeypatch.setattr(train, "train_step", infinite)


def make_gradient_nan(monkeypatch, calls: set[int] | None = None) -> None:
    """Makes the gradients of these forward passes (counted from 1) NaN, of all by default; the loss is finite."""
    original, count = Pix2SeqForObjectDetection.forward, []

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if output.loss is not None and output.loss.requires_grad:
            count.append(0)
            if calls is None or len(count) in calls:
                output.loss.register_hook(lambda gradient: gradient * math.nan)
        return output

    monkeypatch.setattr(Pix2SeqForObjectDetection, "forward", forward)


def use_loss_scaler(monkeypatch, scale: float) -> None:
    """Trains with the loss scaler of fp16, which Accelerate uses on GPUs only."""
    make_accelerator = train.make_accelerator

    def make_scaling_accelerator(**kwargs):
        accelerator = make_accelerator(**kwargs)
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        accelerator.native_amp = True
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", make_scaling_accelerator)
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})


def all_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_step_with_an_infinite_loss_is_skipped(shapes_root, tmp_path, monkeypatch):
    """It changes neither weights nor batch norm statistics, and the log names its images."""
    make_loss_infinite(monkeypatch, {2, 4})
    train_step, unchanged = train.train_step, {}

    def comparing(context, micro_batches):
        before = {name: value.clone() for name, value in context.unwrapped_model.state_dict().items()}
        result = train_step(context, micro_batches)
        after = context.unwrapped_model.state_dict()
        unchanged[context.step] = all(torch.equal(after[name], before[name]) for name in before)
        return result

    monkeypatch.setattr(train, "train_step", comparing)
    assert run(shapes_root, tmp_path) == 0
    assert unchanged == {1: False, 2: True, 3: False, 4: True, 5: False, 6: False}
    logged = [row for row in rows(tmp_path) if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in logged] == [1, 2, 2]
    assert all(math.isfinite(row["train/loss"]) for row in logged)
    log = (tmp_path / "train.log").read_text()
    assert "step 2 is not finite; image ids: [" in log
    assert "step 4 is not finite" in log


def test_too_many_skipped_steps_in_a_row_end_the_run(shapes_root, tmp_path, monkeypatch, capsys):
    words = ("--max_skipped_steps", "1")
    with monkeypatch.context() as patch:
        make_loss_infinite(patch, {4, 5, 6})
        assert run(shapes_root, tmp_path / "out", *words) == 1
    error = capsys.readouterr().err
    assert "step 5 is not finite; image ids: [" in error
    assert "2 such steps in a row" in error
    assert read_json(tmp_path, "out/status.json")["state"] == "failed"
    assert all_finite(load_file(tmp_path / "out" / "checkpoints" / "step_00000003" / "model.safetensors"))
    # A resumed run continues to count.
    with monkeypatch.context() as patch:
        make_loss_infinite(patch, {1, 2})
        interrupt_at(patch, 1, signal.SIGTERM)
        assert run(shapes_root, tmp_path / "resumed", *words) == 75
    with monkeypatch.context() as patch:
        make_loss_infinite(patch, {1, 2})
        assert run(shapes_root, tmp_path / "resumed", *words, "--resume", "auto") == 1


def test_resume_after_skipped_steps_is_bit_exact(shapes_root, tmp_path, monkeypatch):
    words = ("--log_every", "1", *NO_EVALUATION)
    with monkeypatch.context() as patch:
        make_loss_infinite(patch, {1, 2})
        assert run(shapes_root, tmp_path / "whole", *words) == 0
        interrupt_at(patch, 2, signal.SIGTERM)
        assert run(shapes_root, tmp_path / "resumed", *words) == 75
    assert run(shapes_root, tmp_path / "resumed", *words, "--resume", "auto") == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert rows(tmp_path / "resumed")[0]["train/loss"] is None


def test_a_step_with_a_nan_gradient_is_skipped(shapes_root, tmp_path, monkeypatch):
    make_gradient_nan(monkeypatch, {3})
    assert run(shapes_root, tmp_path) == 0
    assert "step 3 is not finite" in (tmp_path / "train.log").read_text()
    assert all_finite(final_weights(tmp_path))


def test_the_loss_scaler_skips_overflowing_steps_and_resumes_bit_exactly(shapes_root, tmp_path, monkeypatch):
    words = ("--log_every", "1", *NO_EVALUATION, "--max_grad_norm", "1", "--max_steps", "20")
    train_step, steps = train.train_step, []

    def recording(context, micro_batches):
        weight = context.unwrapped_model.projector.projection.weight
        before, scale = weight.detach().clone(), context.accelerator.scaler.get_scale()
        result = train_step(context, micro_batches)
        steps.append((scale, not torch.equal(before, weight), context.accelerator.scaler.get_scale()))
        return result

    with monkeypatch.context() as patch:
        use_loss_scaler(patch, 2.0**30)
        patch.setattr(train, "train_step", recording)
        assert run(shapes_root, tmp_path / "whole", *words) == 0
    assert steps[0] == (2.0**30, False, 2.0**29)  # an overflow changes no weight and halves the scale
    assert all(after == scale / 2 for scale, changed, after in steps if not changed)
    assert all_finite(final_weights(tmp_path / "whole"))
    first_taken = [changed for _, changed, _ in steps].index(True) + 1
    with monkeypatch.context() as patch:
        use_loss_scaler(patch, 2.0**30)
        interrupt_at(patch, first_taken + 1, signal.SIGTERM)
        assert run(shapes_root, tmp_path / "resumed", *words) == 75
    with monkeypatch.context() as patch:
        use_loss_scaler(patch, 2.0**30)
        assert run(shapes_root, tmp_path / "resumed", *words, "--resume", "auto") == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_gradient_that_is_not_finite_at_any_scale_ends_the_run(shapes_root, tmp_path, monkeypatch, capsys):
    make_gradient_nan(monkeypatch)
    use_loss_scaler(monkeypatch, 4.0)
    assert run(shapes_root, tmp_path, *NO_EVALUATION, "--ema_decay", "0.9") == 1
    assert "the gradient of step 3 is not finite" in capsys.readouterr().err
    assert read_json(tmp_path, "status.json")["state"] == "failed"
