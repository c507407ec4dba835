"""A full or read-only disk does not end a run."""

import contextlib
import subprocess

import pytest
import torch

from pix2seq import manifest, train
from pix2seq.manifest import verify
from pix2seq.training import checkpoint, evaluator
from pix2seq.training.run_folder import RunFolder
from tests.runs import assert_same_run, final_weights, run

DISK_FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [DISK_FULL, RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_save_leaves_the_other_checkpoints_and_the_run_intact(
    finished, shapes_root, tmp_path, monkeypatch, error
):
    original = torch.save
    calls = []

    def failing_once(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", failing_once)
    assert run(shapes_root, tmp_path, "--ckpt_every", "2", "--keep_last", "5") == 0
    assert "the checkpoint of step 4 could not be written" in (tmp_path / "train.log").read_text()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]
    assert all(verify(folder) is None for folder in (tmp_path / "checkpoints").iterdir())
    assert_same_run(tmp_path, finished)


def test_a_disk_that_is_full_for_two_saves(finished, shapes_root, tmp_path, monkeypatch, record_property):
    """A small file system, filled before step 2 and freed before step 4."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("only root can mount a file system")
    output, filler, original = disk / "out", disk / "filler", train.save

    def save(context):
        if context.step == 2:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if context.step == 4:
            assert checkpoint.latest_checkpoint(output / "checkpoints", pytest.fail).name == "step_00000001"
            assert filler.stat().st_size > 2**20
            filler.unlink()
        return original(context)

    monkeypatch.setattr(train, "save", save)
    try:
        assert run(shapes_root, output, "--ckpt_every", "1", "--keep_last", "9") == 0
        log = (output / "train.log").read_text()
        record_property("saves_that_failed", log.count("could not be written"))
        for step in (2, 3):
            assert f"the checkpoint of step {step} could not be written" in log
        assert "No space left on device" in log
        kept = sorted((output / "checkpoints").iterdir())
        assert [folder.name for folder in kept] == [f"step_{step:08d}" for step in (1, 4, 5, 6)]
        assert all(verify(folder) is None for folder in kept)
        weights, expected = final_weights(output), final_weights(finished)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # loaded weights are still mapped


def test_metrics_images_and_the_best_model_may_be_lost(finished, shapes_root, tmp_path, monkeypatch, capsys):
    original = manifest.write_folder_atomically

    def failing_for_best(folder, *args):
        if folder.name == "best":
            raise DISK_FULL
        original(folder, *args)

    def failing(*args, **kwargs):
        raise DISK_FULL

    monkeypatch.setattr(manifest, "write_folder_atomically", failing_for_best)
    monkeypatch.setattr("PIL.Image.Image.save", failing)
    assert run(shapes_root, tmp_path) == 0
    output = capsys.readouterr().out
    assert "evaluation could not be written" in output
    assert "sample could not be written" in output
    assert "best/ could not be written" in (tmp_path / "train.log").read_text()
    assert not (tmp_path / "best").exists()
    assert_same_run(tmp_path, finished)


def test_a_best_model_that_could_not_be_written_is_tried_again(shapes_root, tmp_path, monkeypatch):
    original = manifest.write_folder_atomically
    attempts = []

    def failing_once(folder, *args):
        if folder.name == "best":
            attempts.append(folder)
            if len(attempts) == 1:
                raise DISK_FULL
        original(folder, *args)

    monkeypatch.setattr(manifest, "write_folder_atomically", failing_once)
    monkeypatch.setattr(evaluator, "coco_metrics", lambda *args: {"AP": 0.5, "AP50": 0.5, "AP75": 0.5})
    monkeypatch.setattr(train, "metrics_table", str)
    assert run(shapes_root, tmp_path / "out") == 0
    assert len(attempts) == 2
    assert verify(tmp_path / "out" / "best") is None
    # A resumed run in another folder writes a best model of its own.
    assert run(shapes_root, tmp_path / "other", "--resume", str(tmp_path / "out/checkpoints/step_00000003")) == 0
    assert verify(tmp_path / "other" / "best") is None


def test_standard_output_may_be_on_the_full_disk(tmp_path, monkeypatch):
    def failing(*args):
        raise DISK_FULL

    monkeypatch.setattr("pix2seq.training.run_folder.tqdm.write", failing)
    RunFolder(tmp_path, is_main=True).log("a line")
    assert (tmp_path / "train.log").read_text() == "a line\n"
