"""A disk that is full or read-only ends no run."""

import contextlib
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from pix2seq import train
from pix2seq.training import checkpoint, evaluator
from pix2seq.training.run_folder import RunFolder
from tests.runs import arguments, rows


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
    assert train.run_training(arguments(shapes_root, output, "--ckpt_every", "2", "--keep_last", "5")) == 0
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
        assert train.run_training(arguments(shapes_root, disk / "out", "--ckpt_every", "1", "--keep_last", "9")) == 0
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
    assert train.run_training(arguments(shapes_root, output)) == 0
    said = capsys.readouterr().out
    assert "evaluation could not be written" in said
    assert "sample could not be written" in said
    assert "best/ could not be written" in (output / "train.log").read_text()
    assert not (output / "best").exists()
    assert rows(output) == rows(finished)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (output, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
    monkeypatch.setattr(evaluator, "coco_metrics", lambda *args: {"AP": 0.5, "AP50": 0.5, "AP75": 0.5})
    monkeypatch.setattr(train, "metrics_table", str)
    assert train.run_training(arguments(shapes_root, tmp_path / "out")) == 0
    assert len(tried) == 2
    assert checkpoint.verify(tmp_path / "out" / "best") is None
    # Another folder has no best detector yet, whatever the checkpoint's was worth.
    newest = str(tmp_path / "out" / "checkpoints" / "step_00000003")
    assert train.run_training(arguments(shapes_root, tmp_path / "other", "--resume", newest)) == 0
    assert checkpoint.verify(tmp_path / "other" / "best") is None


def test_what_is_printed_may_go_to_the_full_disk_too(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pix2seq.training.run_folder.tqdm.write", fails)
    folder = RunFolder(tmp_path, is_main=True)
    folder.log("all is well")
    assert (tmp_path / "train.log").read_text() == "all is well\n"
