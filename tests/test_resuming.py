"""A run that is resumed goes on exactly where it was, and with nothing that is not its own."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pix2seq import train
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.training import checkpoint
from tests.runs import arguments, edited, interrupt_at, rows


@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_run_resumed_equals_one_that_was_not(
    finished, shapes_root, tmp_path, monkeypatch, record_property, step
):
    """Interrupted between rows, checkpoints and evaluations; resumed with another number of workers."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signal.SIGTERM)
        assert train.run_training(arguments(shapes_root, output)) == 75
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("preempted", step, "SIGTERM")
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto", "--num_workers", "1")) == 0
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
            train.run_training(arguments(shapes_root, output))
    assert json.loads((output / "status.json").read_text())["state"] == "failed"
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')  # the line it was writing
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto")) == 0
    assert rows(output) == rows(finished)


ACCUMULATING = ("--batch_size", "2", "--gradient_accumulation_steps", "3", "--ema_decay", "0.9", "--eval_every", "6")


@pytest.fixture(scope="module")
def accumulated(shapes_root, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("accumulated") / "out"
    assert train.run_training(arguments(shapes_root, output, *ACCUMULATING)) == 0
    return output


@pytest.mark.parametrize("step", [1, 4])
def test_accumulation_resumes_exactly_too(accumulated, shapes_root, tmp_path, monkeypatch, step):
    """Told to stop while the second of three micro-batches is read: the step is finished first."""
    original, calls = Pix2SeqForObjectDetection.forward, []

    def forward(self, *args, **kwargs):
        if self.training:
            calls.append(0)
            if len(calls) == 3 * step - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Pix2SeqForObjectDetection, "forward", forward)
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *ACCUMULATING)) == 75
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["step"] == step
    assert train.run_training(arguments(shapes_root, tmp_path / "cut", *ACCUMULATING, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(accumulated)
    states = [
        torch.load(output / "checkpoints" / "step_00000006" / "trainer.pt", weights_only=True)
        for output in (tmp_path / "cut", accumulated)
    ]
    flat = [torch.utils._pytree.tree_flatten(state)[0] for state in states]
    assert len(flat[0]) > 100
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_run_made_longer_goes_on_at_its_new_rate(shapes_root, tmp_path):
    words = ("--log_every", "1", "--eval_every", "0", "--sample_every", "0")
    rates = {}
    for name, steps in (("whole", "8"), ("parts", "4"), ("parts", "8")):
        more = ("--max_steps", steps, "--resume", "auto")
        assert train.run_training(arguments(shapes_root, tmp_path / name, *words, *more)) == 0
        rates[name] = [row["train/lr"] for row in rows(tmp_path / name) if "train/lr" in row]
    assert rates["parts"][4:] == rates["whole"][4:]


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
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto")) == 0
    content = torch.load(folder / "trainer.pt", weights_only=True)
    older = {"format": 2, "statistics": torch.ones(4, 5, dtype=torch.float64)}  # those of the row being counted
    torch.save(content | older, tmp_path / "old.pt")
    rewrite("trainer.pt", (tmp_path / "old.pt").read_bytes())
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto", "--max_steps", "8")) == 0
    assert rows(output)[-2]["step"] == 8
    shutil.rmtree(output / "checkpoints" / "step_00000008")
    torch.save(content | {"format": 1}, tmp_path / "old.pt")
    rewrite("trainer.pt", (tmp_path / "old.pt").read_bytes())
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto")) == 2
    assert "was written by another version of the code" in capsys.readouterr().err


def test_a_run_that_died_before_its_first_checkpoint_begins_its_metrics_anew(
    finished, shapes_root, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    words = ("--ckpt_every", "0", "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda training: 1 / 0)
        interrupt_at(patch, 4, signal.SIGTERM)
        with pytest.raises(ZeroDivisionError):
            train.run_training(arguments(shapes_root, output, *words))
    assert train.run_training(arguments(shapes_root, output, *words)) == 0
    assert rows(output) == rows(finished)


def test_an_older_checkpoint_is_told_by_its_step_not_its_name(finished, shapes_root, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    for step, name, code in ((6, "a_backup", 0), (3, "zzz", 2)):
        shutil.copytree(finished / "checkpoints" / f"step_0000000{step}", tmp_path / name)
        assert train.run_training(arguments(shapes_root, output, "--resume", str(tmp_path / name))) == code
    assert "which this would abandon" in capsys.readouterr().err


def test_resuming_a_finished_run_takes_no_step_and_keeps_it(finished, shapes_root, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto")) == 0
    assert rows(output) == rows(finished)


def test_a_broken_newest_checkpoint_is_passed_over(finished, shapes_root, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    weights = output / "checkpoints" / "step_00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto")) == 0
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
    assert (
        train.run_training(arguments(shapes_root, output, "--resume", "auto", "--lr", "0.5", "--num_bins", "64")) == 2
    )
    message = capsys.readouterr().err
    assert "--lr 0.5 (was 0.001)" in message
    assert "--num_bins 64 (was 32)" in message
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto", "--batch_size", "2")) == 2
    assert "is 2 and was 4" in capsys.readouterr().err


def test_a_used_folder_is_not_overwritten(finished, shapes_root, capsys):
    before = sorted((finished / "checkpoints").iterdir())
    assert train.run_training(arguments(shapes_root, finished)) == 2
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
        train.run_training(arguments(shapes_root, output, "--resume", "auto"))
    assert not (tmp_path / "pwned").exists()


def test_an_older_checkpoint_does_not_abandon_newer_ones(finished, shapes_root, capsys):
    """Resuming from step 3 where step 6 exists would have rotation and --resume auto mix two histories."""
    words = ["--resume", str(finished / "checkpoints" / "step_00000003")]
    assert train.run_training(arguments(shapes_root, finished, *words)) == 2
    assert "step_00000006" in capsys.readouterr().err
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_an_older_checkpoint_can_be_continued_in_another_folder(finished, shapes_root, tmp_path):
    words = ["--resume", str(finished / "checkpoints" / "step_00000003")]
    assert train.run_training(arguments(shapes_root, tmp_path / "out", *words)) == 0
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "out", finished))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_detector_is_no_checkpoint_to_resume_from(finished, shapes_root, tmp_path, capsys):
    assert train.run_training(arguments(shapes_root, tmp_path / "out", "--resume", str(finished / "best"))) == 2
    assert "trainer.pt" in capsys.readouterr().err


def test_resuming_with_other_classes_is_refused(finished, shapes_root, tmp_path, capsys):
    def rename(content):
        content["categories"][0]["name"] = "blob"

    root = edited(shapes_root, tmp_path / "data", "train", rename)
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    root = edited(root, tmp_path / "both", "val", rename)
    assert train.run_training(arguments(root, output, "--resume", "auto")) == 2
    assert "its classes are not those" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_images_only(finished, shapes_root, tmp_path, capsys):
    """As many of them, in another place, are fine; others are not."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    moved = edited(shapes_root, tmp_path / "moved", "train", lambda content: None)
    assert train.run_training(arguments(moved, output, "--resume", "auto")) == 0

    def swap(content):
        images = content["images"]
        images[0]["file_name"], images[1]["file_name"] = images[1]["file_name"], images[0]["file_name"]

    other = edited(shapes_root, tmp_path / "other", "train", swap)
    assert train.run_training(arguments(other, output, "--resume", "auto")) == 2
    assert "as many images, but not those" in capsys.readouterr().err
