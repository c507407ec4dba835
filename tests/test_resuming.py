"""Resumed runs are bit-exact, and a checkpoint is only resumed by the run that it belongs to."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pix2seq import train
from pix2seq.manifest import write_folder_atomically
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.training import checkpoint
from tests.runs import NO_EVALUATION, assert_same_run, edited, final_weights, interrupt_at, read_json, rows, run


@pytest.fixture
def copy_of_finished(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replaces one file of a checkpoint, with a valid manifest."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "MANIFEST.json"} | {name: content}
    write_folder_atomically(folder, lambda new: [(new / n).write_bytes(data) for n, data in files.items()], step=6)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resume_is_bit_exact(finished, shapes_root, tmp_path, monkeypatch, record_property, step):
    """Interrupted between logged steps, checkpoints and evaluations; resumed with another number of workers."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signal.SIGTERM)
        assert run(shapes_root, tmp_path) == 75
    status = read_json(tmp_path, "status.json")
    assert (status["state"], status["step"], status["reason"]) == ("preempted", step, "SIGTERM")
    assert run(shapes_root, tmp_path, "--resume", "auto", "--num_workers", "1") == 0
    weights, expected = final_weights(tmp_path), final_weights(finished)
    difference = max((weights[name].double() - expected[name].double()).abs().max().item() for name in expected)
    record_property("largest_weight_difference", difference)
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("step", [1, 4])
def test_resume_is_bit_exact_with_accumulation_and_ema(shapes_root, tmp_path, monkeypatch, accumulated, step):
    """A signal during the second of three micro-batches: the run finishes the step first."""
    original, calls = Pix2SeqForObjectDetection.forward, []

    def forward(self, *args, **kwargs):
        if self.training:
            calls.append(0)
            if len(calls) == 3 * step - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Pix2SeqForObjectDetection, "forward", forward)
        assert run(shapes_root, tmp_path, *ACCUMULATING) == 75
    assert read_json(tmp_path, "status.json")["step"] == step
    assert run(shapes_root, tmp_path, *ACCUMULATING, "--resume", "auto") == 0
    assert_same_run(tmp_path, accumulated)
    states = [
        torch.load(output / "checkpoints" / "step_00000006" / "trainer.pt", weights_only=True)
        for output in (tmp_path, accumulated)
    ]
    leaves = [torch.utils._pytree.tree_flatten(state)[0] for state in states]
    assert len(leaves[0]) > 100
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


ACCUMULATING = ("--batch_size", "2", "--gradient_accumulation_steps", "3", "--ema_decay", "0.9", "--eval_every", "6")


@pytest.fixture(scope="module")
def accumulated(shapes_root, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("accumulated")
    assert run(shapes_root, output, *ACCUMULATING) == 0
    return output


def test_a_crashed_run_repeats_the_steps_after_its_last_checkpoint(finished, shapes_root, tmp_path, monkeypatch):
    """Rows of metrics.jsonl after the checkpoint are replaced, not duplicated."""
    original = train.train_step

    def crashing(context, micro_batches):
        if context.step == 4:
            raise RuntimeError("crash")
        return original(context, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", crashing)
        with pytest.raises(RuntimeError, match="crash"):
            run(shapes_root, tmp_path)
    assert read_json(tmp_path, "status.json")["state"] == "failed"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')  # an incomplete line
    assert run(shapes_root, tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, finished)


def test_a_run_that_crashed_before_its_first_checkpoint_starts_anew(finished, shapes_root, tmp_path, monkeypatch):
    words = ("--ckpt_every", "0", "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda context: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(shapes_root, tmp_path, *words)
    assert run(shapes_root, tmp_path, *words) == 0
    assert_same_run(tmp_path, finished)


def test_resuming_a_finished_run_takes_no_step(finished, shapes_root, copy_of_finished):
    assert run(shapes_root, copy_of_finished, "--resume", "auto") == 0
    assert_same_run(copy_of_finished, finished)


def test_an_extended_run_follows_the_new_schedule(shapes_root, tmp_path):
    rates = {}
    for name, steps in (("whole", "8"), ("extended", "4"), ("extended", "8")):
        words = ("--log_every", "1", *NO_EVALUATION, "--max_steps", steps, "--resume", "auto")
        assert run(shapes_root, tmp_path / name, *words) == 0
        rates[name] = [row["train/lr"] for row in rows(tmp_path / name) if "train/lr" in row]
    assert rates["extended"][4:] == rates["whole"][4:]


def test_arguments_that_the_checkpoint_does_not_have_yet_get_their_default(shapes_root, copy_of_finished):
    folder = copy_of_finished / "checkpoints" / "step_00000006"
    lines = (folder / "training.yaml").read_text().splitlines(keepends=True)
    rewrite(folder, "training.yaml", "".join(line for line in lines if "decay_steps" not in line).encode())
    assert run(shapes_root, copy_of_finished, "--resume", "auto") == 0


def test_a_damaged_newest_checkpoint_is_skipped(finished, shapes_root, copy_of_finished):
    weights = copy_of_finished / "checkpoints" / "step_00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run(shapes_root, copy_of_finished, "--resume", "auto") == 0
    assert_same_run(copy_of_finished, finished)
    assert "step_00000006 is skipped: model.safetensors" in (copy_of_finished / "train.log").read_text()


def test_a_run_does_not_start_anew_if_all_checkpoints_are_damaged(shapes_root, copy_of_finished, capsys):
    for folder in (copy_of_finished / "checkpoints").iterdir():
        (folder / "trainer.pt").unlink()
    before = sorted(copy_of_finished.rglob("*"))
    for words in (["--resume", "auto"], []):
        assert run(shapes_root, copy_of_finished, *words) == 2
        error = capsys.readouterr().err
        assert "another" in error
        assert error.count("\n") == 1
        assert not words or "step_00000003, step_00000006" in error
    assert sorted(copy_of_finished.rglob("*")) == before


def test_a_flipped_byte_in_any_file_is_detected(finished, tmp_path, record_property):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    files = sorted((tmp_path / "checkpoints" / "step_00000006").iterdir())
    assert {"model.safetensors", "trainer.pt", "config.json", "MANIFEST.json"} <= {path.name for path in files}
    record_property("files", len(files))
    record_property("bytes_flipped", 3 * len(files))
    for path in files:
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :])
            warnings = []
            assert checkpoint.latest_checkpoint(tmp_path / "checkpoints", warnings.append).name == "step_00000003"
            assert path.name in warnings[0]
        path.write_bytes(content)
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints").name == "step_00000006"


def test_code_in_a_checkpoint_is_never_executed(shapes_root, copy_of_finished, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"step": Malicious()}, tmp_path / "trainer.pt")
    rewrite(copy_of_finished / "checkpoints" / "step_00000006", "trainer.pt", (tmp_path / "trainer.pt").read_bytes())
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
        run(shapes_root, copy_of_finished, "--resume", "auto")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--lr", "0.5", "--num_bins", "64"], ["--lr 0.5 (was 0.001)", "--num_bins 64 (was 32)"]),
        (["--batch_size", "2"], ["batch_size x gradient_accumulation_steps x processes is 2"]),
    ],
)
def test_resuming_with_other_arguments_is_an_error(shapes_root, copy_of_finished, capsys, words, parts):
    assert run(shapes_root, copy_of_finished, "--resume", "auto", *words) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts)


def rename_class(content: dict) -> None:
    content["categories"][0]["name"] = "blob"


def swap_images(content: dict) -> None:
    first, second = content["images"][:2]
    first["file_name"], second["file_name"] = second["file_name"], first["file_name"]


@pytest.mark.parametrize(
    ("edit", "code", "part"),
    [(lambda content: None, 0, ""), (rename_class, 2, "classes"), (swap_images, 2, "training images")],
    ids=["moved", "class", "images"],
)
def test_a_dataset_may_move_but_not_change(shapes_root, copy_of_finished, tmp_path, capsys, edit, code, part):
    root = edited(shapes_root, tmp_path / "data", "train", edit)
    if edit is rename_class:
        root = edited(root, tmp_path / "both", "val", edit)
    assert run(root, copy_of_finished, "--resume", "auto") == code
    assert part in capsys.readouterr().err


def test_existing_checkpoints_are_not_overwritten(finished, shapes_root, tmp_path, capsys):
    """By a new run, or from an older checkpoint. The step in the manifest counts, not the name of the folder."""
    before = sorted((finished / "checkpoints").iterdir())
    assert run(shapes_root, finished) == 2
    assert "--resume auto" in capsys.readouterr().err
    shutil.copytree(finished / "checkpoints" / "step_00000003", tmp_path / "zzz")
    for older in (finished / "checkpoints" / "step_00000003", tmp_path / "zzz"):
        assert run(shapes_root, finished, "--resume", str(older)) == 2
        assert "step_00000006" in capsys.readouterr().err
    assert sorted((finished / "checkpoints").iterdir()) == before
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"


def test_resume_from_a_copy_of_the_newest_checkpoint(finished, shapes_root, copy_of_finished, tmp_path):
    shutil.copytree(finished / "checkpoints" / "step_00000006", tmp_path / "a_backup")
    assert run(shapes_root, copy_of_finished, "--resume", str(tmp_path / "a_backup")) == 0


def test_an_older_checkpoint_can_be_resumed_in_another_folder(finished, shapes_root, tmp_path):
    assert run(shapes_root, tmp_path, "--resume", str(finished / "checkpoints" / "step_00000003")) == 0
    weights, expected = final_weights(tmp_path), final_weights(finished)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_exported_model_is_not_a_checkpoint(finished, shapes_root, tmp_path, capsys):
    assert run(shapes_root, tmp_path / "out", "--resume", str(finished / "best")) == 2
    assert "trainer.pt" in capsys.readouterr().err
