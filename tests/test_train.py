"""train.py from end to end on a few small pictures: what it leaves behind, exact resume, and its mistakes."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
from pix2seq import checkpoint, reporting
from pix2seq.command_line import parse
from pix2seq.config import Arguments, EvaluateArguments
from pix2seq.errors import UserError
from pix2seq.model import Pix2SeqForObjectDetection, load_detector
from pix2seq.run_folder import RunFolder

TINY = [
    *(
        "--backbone",
        "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
    ),
    *("--hidden_size", "16", "--encoder_layers", "1", "--decoder_layers", "1", "--num_heads", "2", "--mlp_size", "32"),
    *("--drop_path", "0.05"),
    *("--image_size", "64", "--num_bins", "32", "--max_objects", "6", "--batch_size", "4", "--eval_batch_size", "4"),
    *("--num_workers", "0", "--lr", "1e-3", "--warmup_steps", "2", "--max_steps", "6"),
    *("--log_every", "2", "--eval_every", "3", "--sample_every", "4", "--ckpt_every", "3"),
]


def arguments(root: Path, output: Path, *words: str) -> Arguments:
    return parse(Arguments, [*TINY, "--root", str(root), "--output_dir", str(output), *words])


def rows(output: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


@pytest.fixture(scope="module")
def finished(shapes_root, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert train.main(arguments(shapes_root, output)) == 0
    return output


def test_a_run_explains_itself(finished):
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"
    assert {"torch", "commit", "device", "command"} <= json.loads((finished / "env.json").read_text()).keys()
    assert parse(Arguments, ["--config", str(finished / "config.yaml")]).max_steps == 6
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
    metrics = evaluate.main(parse(EvaluateArguments, [*args, "--num_workers", "0"]))
    trained = json.loads((finished / "eval" / "step_6" / "metrics.json").read_text())
    assert metrics == trained
    assert json.loads((tmp_path / "metrics.json").read_text()) == trained
    predictions = (tmp_path / "predictions.json").read_text()
    assert predictions == (finished / "eval" / "step_6" / "predictions.json").read_text()
    # And the predictions file alone gives the same numbers again.
    truth = shapes_root / "annotations" / "instances_val2017.json"
    args = ["--predictions", str(tmp_path / "predictions.json"), "--gt", str(truth)]
    assert evaluate.main(parse(EvaluateArguments, args)) == trained


def interrupt_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal while the given step is being taken."""
    original = train.train_step

    def interrupted(training, micro_batches):
        if training.step == step - 1:
            os.kill(os.getpid(), number)
        return original(training, micro_batches)

    monkeypatch.setattr(train, "train_step", interrupted)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_run_resumed_equals_one_that_was_not(
    finished, shapes_root, tmp_path, monkeypatch, record_property, step
):
    """Interrupted between rows, checkpoints and evaluations; resumed with another number of workers."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signal.SIGTERM)
        assert train.main(arguments(shapes_root, output)) == 75
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("preempted", step, "SIGTERM")
    assert train.main(arguments(shapes_root, output, "--resume", "auto", "--num_workers", "1")) == 0
    assert rows(output) == rows(finished)
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (output, finished))
    difference = max((weights[name].double() - expected[name].double()).abs().max().item() for name in expected)
    record_property("largest_weight_difference", difference)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps_exactly(finished, shapes_root, tmp_path, monkeypatch):
    """Rows written after the last checkpoint are written again, not twice."""
    output = tmp_path / "out"
    original = train.train_step

    def dies(training, micro_batches):
        if training.step == 4:
            raise RuntimeError("power cut")
        return original(training, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            train.main(arguments(shapes_root, output))
    assert json.loads((output / "status.json").read_text())["state"] == "failed"
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')  # the line it was writing
    assert train.main(arguments(shapes_root, output, "--resume", "auto")) == 0
    assert rows(output) == rows(finished)


def test_a_signal_to_the_whole_process_group_is_survived_by_the_workers(shapes_root, tmp_path):
    """As schedulers and shells send it. A data worker that dies of it would end the run before it has saved."""
    output = tmp_path / "out"
    words = [*TINY, "--root", str(shapes_root), "--output_dir", str(output), "--num_workers", "2"]
    words += ["--max_steps", "100000", "--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"]
    run = subprocess.Popen([sys.executable, "train.py", *words], start_new_session=True, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGTERM)
        errors = run.communicate(timeout=120)[1].decode()
    finally:
        run.kill()
    assert run.returncode == 75, errors
    step = json.loads((output / "status.json").read_text())["step"]
    assert checkpoint.latest(output / "checkpoints").name == f"step_{step:08d}"


@pytest.mark.parametrize("when", ["evaluation", "last evaluation", "picture"])
def test_a_run_told_to_stop_while_it_evaluates_saves_and_makes_up_for_it(
    finished, shapes_root, tmp_path, monkeypatch, when
):
    output = tmp_path / "out"
    step, batches = {"evaluation": (3, 2), "last evaluation": (6, 2), "picture": (4, 1)}[when]
    original = reporting.predict
    words = ("--eval_batch_size", "1") if when == "picture" else ()

    def interrupted(detector, dataset, *rest, stop, warn):
        asked = []

        def asks():
            asked.append(0)
            done = (len(list((output / "eval").glob("*"))), len(list((output / "samples").glob("predictions*"))))
            if done == {3: (0, 0), 4: (1, 0), 6: (1, 1)}[step] and len(asked) == batches:
                os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        return original(detector, dataset, *rest, stop=asks, warn=warn)

    with monkeypatch.context() as patch:
        patch.setattr(reporting, "predict", interrupted)
        assert train.main(arguments(shapes_root, output, *words)) == 75
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", step)
    assert train.main(arguments(shapes_root, output, "--resume", "auto", *words)) == 0
    assert rows(output) == rows(finished)
    assert (output / "samples" / "predictions_00000004.png").is_file()


def test_a_run_told_to_stop_while_it_decodes_does_not_finish_the_batch(finished, shapes_root, tmp_path, monkeypatch):
    original, positions = Pix2SeqForObjectDetection.step, []

    def step(self, ids, position, cache, rows):
        positions.append(position)
        if position == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, ids, position, cache, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Pix2SeqForObjectDetection, "step", step)
        assert train.main(arguments(shapes_root, tmp_path / "out")) == 75
    assert positions == list(range(15)), "of 30: it stops before the next object"
    assert json.loads((tmp_path / "out" / "status.json").read_text())["step"] == 3
    assert train.main(arguments(shapes_root, tmp_path / "out", "--resume", "auto")) == 0
    assert rows(tmp_path / "out") == rows(finished)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_ends_no_run(finished, shapes_root, tmp_path, monkeypatch, error):
    output = tmp_path / "out"
    original = torch.save
    calls = []

    def fails(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fails)
    assert train.main(arguments(shapes_root, output, "--ckpt_every", "2", "--keep_last", "5")) == 0
    assert "the checkpoint of step 4 could not be written" in (output / "train.log").read_text()
    # Nothing half-written is left, and the others are whole.
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]
    assert all(checkpoint.verify(folder) is None for folder in (output / "checkpoints").iterdir())
    assert rows(output) == rows(finished)


def test_a_disk_that_really_is_full(finished, shapes_root, tmp_path, monkeypatch, record_property):
    """A small one of its own, filled while the run is under way and freed again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting a disk is for root alone")
    ballast, original = disk / "ballast", train.save

    def save(training):
        if training.step == 2:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if training.step == 4:
            assert checkpoint.latest(disk / "out" / "checkpoints", pytest.fail).name == "step_00000001"
            assert ballast.stat().st_size > 2**20
            ballast.unlink()
        return original(training)

    monkeypatch.setattr(train, "save", save)
    try:
        assert train.main(arguments(shapes_root, disk / "out", "--ckpt_every", "1", "--keep_last", "9")) == 0
        log = (disk / "out" / "train.log").read_text()
        record_property("saves_that_failed", log.count("could not be written"))
        for step in (2, 3):
            assert f"the checkpoint of step {step} could not be written" in log
        assert "No space left on device" in log
        kept = sorted((disk / "out" / "checkpoints").iterdir())
        assert [folder.name for folder in kept] == [f"step_{step:08d}" for step in (1, 4, 5, 6)]
        assert all(checkpoint.verify(folder) is None for folder in kept)
        ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (disk / "out", finished))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # loaded weights still lie on it


@pytest.mark.parametrize("step", [1, 4])
def test_accumulation_resumes_exactly_too(shapes_root, tmp_path, monkeypatch, step):
    """Told to stop while the second of three micro-batches is read: the step is finished first."""
    words = ("--batch_size", "2", "--gradient_accumulation_steps", "3", "--ema_decay", "0.9")
    assert train.main(arguments(shapes_root, tmp_path / "whole", *words)) == 0
    original, calls = Pix2SeqForObjectDetection.forward, []

    def forward(self, *args, **kwargs):
        if self.training:
            calls.append(0)
            if len(calls) == 3 * step - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Pix2SeqForObjectDetection, "forward", forward)
        assert train.main(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["step"] == step
    assert train.main(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step_00000006" / "trainer.pt", weights_only=True)
        for name in ("cut", "whole")
    ]
    flat = [torch.utils._pytree.tree_flatten(state)[0] for state in states]
    assert len(flat[0]) > 100
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def lend_a_scaler(monkeypatch, scale: float) -> None:
    """fp16 as on a GPU, which a CPU does not get from Accelerate."""
    join = train.join_processes

    def join_in_half(args):
        accelerator = join(args)
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        accelerator.native_amp = True
        return accelerator

    monkeypatch.setattr(train, "join_processes", join_in_half)
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})


def test_the_loss_scaler_skips_what_overflows_and_resumes_exactly(shapes_root, tmp_path, monkeypatch):
    words = ("--log_every", "1", "--eval_every", "0", "--sample_every", "0", "--max_grad_norm", "1")
    seen = []
    original = train.train_step

    def watched(training, *rest):
        before = training.unwrapped.bridge.projection.weight.detach().clone()
        scale = training.accelerator.scaler.get_scale()
        found = original(training, *rest)
        moved = not torch.equal(before, training.unwrapped.bridge.projection.weight)
        seen.append((scale, moved, training.accelerator.scaler.get_scale()))
        return found

    with monkeypatch.context() as patch:
        lend_a_scaler(patch, 2.0**30)
        patch.setattr(train, "train_step", watched)
        assert train.main(arguments(shapes_root, tmp_path / "whole", *words, "--max_steps", "20")) == 0
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
        assert train.main(arguments(shapes_root, tmp_path / "cut", *words, "--max_steps", "20")) == 75
    with monkeypatch.context() as patch:
        lend_a_scaler(patch, 2.0**30)
        more = (*words, "--max_steps", "20", "--resume", "auto")
        assert train.main(arguments(shapes_root, tmp_path / "cut", *more)) == 0
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
    assert train.main(arguments(shapes_root, tmp_path / "out", *words)) == 1
    assert "the gradient of step 3 is not finite however small the loss is scaled" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"


def test_a_run_made_longer_goes_on_at_its_new_rate(shapes_root, tmp_path):
    words = ("--log_every", "1", "--eval_every", "0", "--sample_every", "0")
    rates = {}
    for name, steps in (("whole", "8"), ("parts", "4"), ("parts", "8")):
        more = ("--max_steps", steps, "--resume", "auto")
        assert train.main(arguments(shapes_root, tmp_path / name, *words, *more)) == 0
        rates[name] = [row["train/lr"] for row in rows(tmp_path / name) if "train/lr" in row]
    assert rates["parts"][4:] == rates["whole"][4:]


def test_steps_skipped_from_the_start_do_not_hold_up_the_schedule(shapes_root, tmp_path, monkeypatch):
    words = ("--log_every", "1", "--eval_every", "0", "--sample_every", "0")
    with monkeypatch.context() as patch:
        poison(patch, {1, 2})
        assert train.main(arguments(shapes_root, tmp_path / "whole", *words)) == 0
    with monkeypatch.context() as patch:
        poison(patch, {1, 2})
        interrupt_at(patch, 2, signal.SIGTERM)
        assert train.main(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    assert train.main(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert rows(tmp_path / "cut")[0]["train/loss"] is None, "the loss of no step is no 0"


def test_a_checkpoint_of_another_form_is_refused_and_flags_newer_than_it_are_not(
    finished, shapes_root, tmp_path, capsys
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    folder = output / "checkpoints" / "step_00000006"

    def rewrite(name: str, content: bytes) -> None:
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "MANIFEST.json"} | {name: content}
        checkpoint.commit(folder, lambda new: [(new / n).write_bytes(data) for n, data in files.items()], step=6)

    flags = (folder / "training.yaml").read_text().splitlines(keepends=True)
    rewrite("training.yaml", "".join(line for line in flags if "decay_steps" not in line).encode())
    assert train.main(arguments(shapes_root, output, "--resume", "auto")) == 0
    content = torch.load(folder / "trainer.pt", weights_only=True)
    older = {"format": 2, "statistics": torch.ones(4, 5, dtype=torch.float64)}  # those of the row being counted
    torch.save(content | older, tmp_path / "old.pt")
    rewrite("trainer.pt", (tmp_path / "old.pt").read_bytes())
    assert train.main(arguments(shapes_root, output, "--resume", "auto", "--max_steps", "8")) == 0
    assert rows(output)[-2]["step"] == 8
    shutil.rmtree(output / "checkpoints" / "step_00000008")
    torch.save(content | {"format": 1}, tmp_path / "old.pt")
    rewrite("trainer.pt", (tmp_path / "old.pt").read_bytes())
    assert train.main(arguments(shapes_root, output, "--resume", "auto")) == 2
    assert "was written by another version of the code" in capsys.readouterr().err


def test_a_run_told_to_stop_while_it_saves_finishes_the_save(finished, shapes_root, tmp_path, monkeypatch):
    output = tmp_path / "out"
    original = checkpoint.commit

    def commit(final, write, *rest):
        def told_to_stop(folder):
            write(folder)
            if final.name == "step_00000003":
                os.kill(os.getpid(), signal.SIGUSR1)

        original(final, told_to_stop, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "commit", commit)
        assert train.main(arguments(shapes_root, output)) == 75
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGUSR1")
    folders = list((output / "checkpoints").iterdir())
    assert "step_00000003" in {folder.name for folder in folders}
    assert all(checkpoint.verify(folder) is None for folder in folders)
    assert train.main(arguments(shapes_root, output, "--resume", "auto")) == 0
    assert rows(output) == rows(finished)


def test_a_disk_too_full_for_anything_but_checkpoints_ends_no_run(
    finished, shapes_root, tmp_path, monkeypatch, capsys
):
    """Rows, pictures, the best detector: all lost but the run."""
    output = tmp_path / "out"
    original = checkpoint.commit

    def commit(final, *args):
        if final.name == "best":
            raise OSError(28, "No space left on device")
        original(final, *args)

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "commit", commit)
    monkeypatch.setattr("PIL.Image.Image.save", fails)
    assert train.main(arguments(shapes_root, output)) == 0
    said = capsys.readouterr().out
    assert "evaluation could not be written" in said
    assert "sample could not be written" in said
    assert "best/ could not be written" in (output / "train.log").read_text()
    assert not (output / "best").exists()
    assert rows(output) == rows(finished)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (output, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_cannot_save_when_told_to_stop_says_so(shapes_root, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    monkeypatch.setattr(torch, "save", fails)
    assert train.main(arguments(shapes_root, tmp_path / "out")) == 1
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_fp16_on_a_cpu_is_refused(finished, shapes_root, tmp_path, program):
    """Accelerate takes it, does nothing and says nothing. In a process of its own: its state is one per process."""
    words = (
        [*TINY, "--output_dir", str(tmp_path / "out")]
        if program == "train.py"
        else ["--checkpoint", finished / "final"]
    )
    command = [sys.executable, program, *words, "--root", shapes_root, "--mixed_precision", "fp16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (
        2,
        f"{program}: error: --mixed_precision fp16: needs a GPU; use bf16 or no\n",
    )


def test_a_run_that_died_before_its_first_checkpoint_begins_its_metrics_anew(
    finished, shapes_root, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    words = ("--ckpt_every", "0", "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda training: 1 / 0)
        interrupt_at(patch, 4, signal.SIGTERM)
        with pytest.raises(ZeroDivisionError):
            train.main(arguments(shapes_root, output, *words))
    assert train.main(arguments(shapes_root, output, *words)) == 0
    assert rows(output) == rows(finished)


def test_a_tracker_that_cannot_start_is_a_failed_run(shapes_root, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no account")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fails)
    assert train.main(arguments(shapes_root, tmp_path / "out", "--report_to", "wandb")) == 2
    assert "--report_to wandb: cannot be started (no account)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"


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
    assert train.main(arguments(shapes_root, tmp_path / "out")) == 0
    assert "step 3 is not finite" in (tmp_path / "out" / "train.log").read_text()
    weights = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_an_older_checkpoint_is_told_by_its_step_not_its_name(finished, shapes_root, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    for step, name, code in ((6, "a_backup", 0), (3, "zzz", 2)):
        shutil.copytree(finished / "checkpoints" / f"step_0000000{step}", tmp_path / name)
        assert train.main(arguments(shapes_root, output, "--resume", str(tmp_path / name))) == code
    assert "which this would abandon" in capsys.readouterr().err


def test_evaluate_refuses_more_objects_than_a_decoder_has_positions_for(shapes_root, tmp_path):
    assert train.main(arguments(shapes_root, tmp_path / "out", "--decoder", "transformer", "--max_steps", "1")) == 0
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root), "--max_objects", "50"]
    with pytest.raises(UserError, match="--max_objects 50: this detector can write 6"):
        evaluate.main(parse(EvaluateArguments, words))


def test_accelerate_launch_with_one_process_passes_sigterm_on(shapes_root, tmp_path, record_property):
    """It dies of it without a word to its child; the kernel tells the child."""
    output = tmp_path / "out"
    words = [*TINY, "--root", str(shapes_root), "--output_dir", str(output)]
    words += ["--max_steps", "100000", "--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train.py", *words]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        told = time.monotonic()
        launcher.terminate()
        launcher.wait(timeout=60)
        while json.loads((output / "status.json").read_text())["state"] == "running" and time.monotonic() < deadline:
            time.sleep(0.05)
        seconds = time.monotonic() - told
        record_property("seconds_from_signal_to_end", seconds)
        assert seconds < 20
    finally:
        launcher.kill()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGTERM")
    assert checkpoint.latest(output / "checkpoints").name == f"step_{status['step']:08d}"


def test_ctrl_c_saves_and_leaves_with_130(shapes_root, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2, signal.SIGINT)
    assert train.main(arguments(shapes_root, tmp_path / "out")) == 130
    assert checkpoint.latest(tmp_path / "out" / "checkpoints").name == "step_00000002"


def test_resuming_a_finished_run_takes_no_step_and_keeps_it(finished, shapes_root, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    assert train.main(arguments(shapes_root, output, "--resume", "auto")) == 0
    assert rows(output) == rows(finished)


def test_a_broken_newest_checkpoint_is_passed_over(finished, shapes_root, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    weights = output / "checkpoints" / "step_00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert train.main(arguments(shapes_root, output, "--resume", "auto")) == 0
    assert rows(output) == rows(finished)
    assert "step_00000006 is passed over: model.safetensors" in (output / "train.log").read_text()


def test_any_flipped_byte_in_any_file_is_found_and_the_checkpoint_before_it_used(finished, tmp_path, record_property):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step_00000006"
    files = sorted(path for path in newest.iterdir())
    assert {"model.safetensors", "trainer.pt", "config.json", "MANIFEST.json"} <= {path.name for path in files}
    record_property("files", len(files))
    record_property("bytes_flipped", 3 * len(files))
    for path in files:
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
            said = []
            assert checkpoint.latest(tmp_path / "checkpoints", said.append).name == "step_00000003"
            assert path.name in said[0]
        path.write_bytes(whole)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step_00000006"


def test_resuming_with_other_flags_is_refused_and_says_which(finished, shapes_root, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    assert train.main(arguments(shapes_root, output, "--resume", "auto", "--lr", "0.5", "--num_bins", "64")) == 2
    message = capsys.readouterr().err
    assert "--lr 0.5 (was 0.001)" in message
    assert "--num_bins 64 (was 32)" in message
    assert train.main(arguments(shapes_root, output, "--resume", "auto", "--batch_size", "2")) == 2
    assert "is 2 and was 4" in capsys.readouterr().err


def test_a_used_folder_is_not_overwritten(finished, shapes_root, capsys):
    before = sorted((finished / "checkpoints").iterdir())
    assert train.main(arguments(shapes_root, finished)) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert sorted((finished / "checkpoints").iterdir()) == before


def test_a_pickle_in_a_checkpoint_is_never_run(finished, shapes_root, tmp_path):
    """The trainer state is loaded with weights_only, so a malicious file is an error, not a shell."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    folder = output / "checkpoints" / "step_00000006"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    torch.save({"step": Malicious()}, folder / "trainer.pt")
    content = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "MANIFEST.json"}
    checkpoint.commit(folder, lambda new: [(new / name).write_bytes(data) for name, data in content.items()], step=6)
    with pytest.raises(Exception, match="(?i)weights_only|unsupported"):
        train.main(arguments(shapes_root, output, "--resume", "auto"))
    assert not (tmp_path / "pwned").exists()


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
        assert train.main(arguments(shapes_root, tmp_path / name, *common, *words)) == 0
    for whole, split in zip(rows(tmp_path / "whole"), rows(tmp_path / "split"), strict=True):
        for key in {"train/loss", "train/grad_norm", "train/lr"} & whole.keys():
            assert split[key] == pytest.approx(whole[key], rel=1e-4)


def poison(monkeypatch, steps) -> None:
    """Gives the first image of these steps (counted from 1) an infinite weight."""
    original = train.train_step

    def poisoned(training, micro_batches):
        if training.step + 1 in steps:
            for batch in micro_batches:
                batch["weights"][0] = math.inf
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
    assert train.main(arguments(shapes_root, output)) == 0
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
        assert train.main(arguments(shapes_root, output, "--max_skipped_steps", "1")) == 1
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
        assert train.main(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    with monkeypatch.context() as patch:
        poison(patch, {1, 2})
        assert train.main(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--decoder", "transformer", "--decoder_size", "24", "--decoder_heads", "3", "--decoder_mlp_size", "40"],
        ["--gradient_accumulation_steps", "2", "--gradient_checkpointing"],
        ["--freeze_backbone"],
        ["--batch_norm", "frozen"],
        ["--position_code", "ruler", "--bin_init", "ruler"],
        ["--causal_prefix"],
    ],
    ids=lambda words: words[0].strip("-"),
)
def test_options_train_and_their_detectors_are_what_was_trained(shapes_root, tmp_path, words):
    args = arguments(shapes_root, tmp_path / "out", *words, "--max_steps", "2", "--eval_every", "2")
    assert train.main(args) == 0
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)]
    metrics = evaluate.main(parse(EvaluateArguments, words))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_2" / "metrics.json").read_text())


def test_averaged_weights(shapes_root, tmp_path, monkeypatch):
    """Evaluated beside the others, resumed exactly, and in the end the detector; a plain one."""
    words = ["--ema_decay", "0.5", "--max_steps", "4", "--eval_every", "2", "--ckpt_every", "1"]
    seen = []
    original = train.train_step

    def remembers(training, *rest):
        norm = original(training, *rest)
        seen.append(training.unwrapped.bridge.projection.weight.detach().clone())
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", remembers)
        assert train.main(arguments(shapes_root, tmp_path / "out", *words)) == 0
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.5 * expected + 0.5 * weights
    final = load_detector(tmp_path / "out" / "final", "")
    torch.testing.assert_close(final.bridge.projection.weight.detach(), expected)
    evaluations = [row for row in rows(tmp_path / "out") if "eval/ema/AP" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    metrics = evaluate.main(
        parse(EvaluateArguments, ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)])
    )
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_4" / "ema" / "metrics.json").read_text())

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert train.main(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    assert train.main(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "out")
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("cut", "out"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_evaluation_broken_off_between_two_detectors_is_written_once(shapes_root, tmp_path, monkeypatch):
    output, words = tmp_path / "out", ("--ema_decay", "0.5", "--max_steps", "2", "--eval_every", "2")
    original = reporting.predict

    def interrupted(*args, stop, warn):
        if (output / "eval" / "step_2").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, stop=stop, warn=warn)

    with monkeypatch.context() as patch:
        patch.setattr(reporting, "predict", interrupted)
        assert train.main(arguments(shapes_root, output, *words)) == 75
    assert [key for row in rows(output) for key in row if key.endswith("/AP")] == ["eval/AP"]
    assert train.main(arguments(shapes_root, output, *words, "--resume", "auto")) == 0
    assert [key for row in rows(output) for key in row if key.endswith("/AP")] == ["eval/AP", "eval/ema/AP"]
    assert sum("train/loss" in row for row in rows(output)) == 1


def test_a_best_detector_that_could_not_be_written_is_tried_again(shapes_root, tmp_path, monkeypatch):
    original = checkpoint.commit
    tried = []

    def commit(final, *args):
        if final.name == "best":
            tried.append(final)
            if len(tried) == 1:
                raise OSError(28, "No space left on device")
        original(final, *args)

    monkeypatch.setattr(checkpoint, "commit", commit)
    monkeypatch.setattr(reporting, "coco_metrics", lambda *args: {"AP": 0.5, "AP50": 0.5, "AP75": 0.5})
    monkeypatch.setattr(train, "metrics_table", str)
    assert train.main(arguments(shapes_root, tmp_path / "out")) == 0
    assert len(tried) == 2
    assert checkpoint.verify(tmp_path / "out" / "best") is None
    # Another folder has no best detector yet, whatever the checkpoint's was worth.
    newest = str(tmp_path / "out" / "checkpoints" / "step_00000003")
    assert train.main(arguments(shapes_root, tmp_path / "other", "--resume", newest)) == 0
    assert checkpoint.verify(tmp_path / "other" / "best") is None


def test_what_is_printed_may_go_to_the_full_disk_too(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pix2seq.run_folder.tqdm.write", fails)
    folder = RunFolder(tmp_path, is_main=True)
    folder.log("all is well")
    assert (tmp_path / "train.log").read_text() == "all is well\n"


def test_a_compiled_run_leaves_a_plain_detector(shapes_root, tmp_path, monkeypatch):
    """Compiled by the launcher's setting, as `accelerate launch --dynamo_backend` does."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert train.main(arguments(shapes_root, tmp_path / "out", "--max_steps", "2", "--eval_every", "2")) == 0
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "out" / "final" / "model.safetensors"))
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)]
    metrics = evaluate.main(parse(EvaluateArguments, words))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_2" / "metrics.json").read_text())


def test_sentences_without_noise_objects_train_too(shapes_root, tmp_path):
    assert train.main(arguments(shapes_root, tmp_path / "out", "--no_noise_objects")) == 0


def test_overfit_evaluates_the_images_it_trains_on(shapes_root, tmp_path):
    assert train.main(arguments(shapes_root, tmp_path / "out", "--overfit", "3")) == 0
    predictions = json.loads((tmp_path / "out" / "eval" / "step_6" / "predictions.json").read_text())
    assert {row["image_id"] for row in predictions} == {1, 2, 3}
    # evaluate.py finds the same images by itself.
    metrics = evaluate.main(parse(EvaluateArguments, ["--checkpoint", str(tmp_path / "out" / "final")]))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_6" / "metrics.json").read_text())


def test_explicit_paths_instead_of_a_root(shapes_root, tmp_path):
    words = []
    for split in ("train", "val"):
        words += [f"--{split}_images", str(shapes_root / "images" / f"{split}2017")]
        words += [f"--{split}_json", str(shapes_root / "annotations" / f"instances_{split}2017.json")]
    output = tmp_path / "out"
    assert train.main(parse(Arguments, [*TINY, *words, "--output_dir", str(output), "--max_steps", "2"])) == 0


def test_the_flat_coco_layout(shapes_root, tmp_path):
    shutil.copytree(shapes_root, tmp_path / "coco")
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / "images" / split).rename(tmp_path / "coco" / split)
    assert train.main(arguments(tmp_path / "coco", tmp_path / "out", "--max_steps", "1")) == 0


@pytest.mark.parametrize(
    ("tracker", "left"), [("wandb", "wandb/offline-run-*"), ("tensorboard", "out/pix2seq/events*")]
)
def test_trackers_work_without_network_or_account(shapes_root, tmp_path, monkeypatch, tracker, left):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train.main(arguments(shapes_root, tmp_path / "out", "--report_to", tracker)) == 0
    assert list(tmp_path.glob(left))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--root", "nowhere"], ["--root nowhere", "no such folder"]),
        (["--backbone", "nobody/nothing"], ["--backbone nobody/nothing"]),
        (["--backbone", "{model_type: resnetto}"], ["--backbone", "resnetto"]),
        (["--resume", "nowhere"], ["--resume nowhere", "MANIFEST.json"]),
        (["--report_to", "wandbb"], ["--report_to wandbb", "tensorboard"]),
        (["--report_to", "dvclive"], ["--report_to dvclive", "not installed"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(shapes_root, tmp_path, capsys, monkeypatch, words, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train.main(arguments(shapes_root, tmp_path / "out", *words)) == 2
    assert not (tmp_path / "out").exists(), "a run that cannot start leaves nothing behind"
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines


def test_a_mistake_ends_the_program_within_seconds(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "train.py", "--root", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "no such folder" in done.stderr
    assert time.monotonic() - started < 30


def test_an_older_checkpoint_does_not_abandon_newer_ones(finished, shapes_root, capsys):
    """Resuming from step 3 where step 6 exists would have rotation and --resume auto mix two histories."""
    words = ["--resume", str(finished / "checkpoints" / "step_00000003")]
    assert train.main(arguments(shapes_root, finished, *words)) == 2
    assert "step_00000006" in capsys.readouterr().err
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_an_older_checkpoint_can_be_continued_in_another_folder(finished, shapes_root, tmp_path):
    words = ["--resume", str(finished / "checkpoints" / "step_00000003")]
    assert train.main(arguments(shapes_root, tmp_path / "out", *words)) == 0
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "out", finished))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_detector_is_no_checkpoint_to_resume_from(finished, shapes_root, tmp_path, capsys):
    assert train.main(arguments(shapes_root, tmp_path / "out", "--resume", str(finished / "best"))) == 2
    assert "trainer.pt" in capsys.readouterr().err


def edited(root: Path, folder: Path, split: str, edit) -> Path:
    """A copy of a dataset with one annotation file changed."""
    shutil.copytree(root, folder)
    path = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return folder


def test_validation_may_lack_a_class(shapes_root, tmp_path):
    """What the model finds of it has nothing to match, but is no mistake in a file."""

    def drop_the_first_class(content):
        dropped = content["categories"].pop(0)["id"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != dropped]

    root = edited(shapes_root, tmp_path / "data", "val", drop_the_first_class)
    assert train.main(arguments(root, tmp_path / "out")) == 0
    trained = json.loads((tmp_path / "out" / "eval" / "step_6" / "metrics.json").read_text())
    assert trained["per_class/ellipse"] == -1
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(root)]
    assert evaluate.main(parse(EvaluateArguments, words)) == trained


def test_resuming_with_other_classes_is_refused(finished, shapes_root, tmp_path, capsys):
    def rename(content):
        content["categories"][0]["name"] = "blob"

    root = edited(shapes_root, tmp_path / "data", "train", rename)
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    root = edited(root, tmp_path / "both", "val", rename)
    assert train.main(arguments(root, output, "--resume", "auto")) == 2
    assert "its classes are not those" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_images_only(finished, shapes_root, tmp_path, capsys):
    """As many of them, in another place, are fine; others are not."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    moved = edited(shapes_root, tmp_path / "moved", "train", lambda content: None)
    assert train.main(arguments(moved, output, "--resume", "auto")) == 0

    def swap(content):
        images = content["images"]
        images[0]["file_name"], images[1]["file_name"] = images[1]["file_name"], images[0]["file_name"]

    other = edited(shapes_root, tmp_path / "other", "train", swap)
    assert train.main(arguments(other, output, "--resume", "auto")) == 2
    assert "as many images, but not those" in capsys.readouterr().err


def test_a_training_set_without_objects_is_refused(shapes_root, tmp_path, capsys):
    root = edited(shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].clear())
    assert train.main(arguments(root, tmp_path / "out")) == 2
    assert "holds no objects to train on" in capsys.readouterr().err


def test_a_step_whose_tokens_all_have_weight_0_is_no_accident(shapes_root, tmp_path):
    """A picture without objects, without noise objects that count."""
    root = edited(
        shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].__delitem__(slice(3, None))
    )
    assert train.main(arguments(root, tmp_path / "out", "--noise_weight", "0", "--batch_size", "1")) == 0


def test_the_precision_the_launcher_chose_is_kept(shapes_root, tmp_path, monkeypatch):
    """evaluate.py repeats it, or it would not reproduce the number training printed."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert train.main(arguments(shapes_root, tmp_path / "out")) == 0
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert "mixed_precision: bf16" in (tmp_path / "out" / "final" / "training.yaml").read_text()
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root)]
    metrics = evaluate.main(parse(EvaluateArguments, words))
    assert metrics == json.loads((tmp_path / "out" / "eval" / "step_6" / "metrics.json").read_text())


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_weight(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.startswith("bridge")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_the_flags(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    (folder / "training.yaml").write_text("a: [")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (damage_weights, "model.safetensors is not what was written"),
        (lose_a_weight, "lacks the weights bridge"),
        (lambda folder: (folder / "config.json").write_text("{}"), "holds a model of type None"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "training.yaml").write_text("a: ["), "training.yaml is not what was written"),
        (spoil_the_flags, "training.yaml cannot be read"),
    ],
)
def test_evaluate_refuses_a_damaged_detector(finished, shapes_root, tmp_path, damage, part):
    folder = tmp_path / "best"
    shutil.copytree(finished / "best", folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        evaluate.main(parse(EvaluateArguments, ["--checkpoint", str(folder), "--root", str(shapes_root)]))
    assert part in str(error.value)


def test_evaluate_asks_for_its_folder_before_it_works(finished, shapes_root, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("")
    words = ["--checkpoint", str(finished / "best"), "--root", str(shapes_root), "--output_dir", str(taken)]
    with pytest.raises(UserError, match="--output_dir"):
        evaluate.main(parse(EvaluateArguments, words))
