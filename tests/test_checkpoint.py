"""Checkpoints are complete or absent."""

import json

import pytest

from pix2seq.manifest import verify, write_folder_atomically
from pix2seq.training.checkpoint import latest_checkpoint, save_checkpoint


def writer(text: str):
    def write(folder):
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text(text * 2)

    return write


def failing_writer(folder):
    (folder / "weights").write_text("incomplete")
    raise OSError("No space left on device")


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        save_checkpoint(tmp_path, step, writer(str(step)), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_100000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100000000"
    assert all(verify(folder) is None for folder in tmp_path.iterdir())
    assert (tmp_path / "step_00000003" / "sub" / "more").read_text() == "33"


@pytest.mark.parametrize("name", ["weights", "sub/more", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_skipped(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer("some text"), keep_last=2)
    path = tmp_path / "step_00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    warnings = []
    assert latest_checkpoint(tmp_path, warnings.append) == tmp_path / "step_00000001"
    assert len(warnings) == 1
    assert "step_00000002" in warnings[0]


def test_a_failed_save_leaves_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, writer("x"), keep_last=2)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, failing_writer, keep_last=2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"
    assert save_checkpoint(tmp_path, 2, writer("y"), keep_last=2) == latest_checkpoint(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    (tmp_path / "step_00000009").mkdir()
    assert latest_checkpoint(tmp_path, lambda message: None) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_damaged_later_checkpoints_do_not_count_as_kept(tmp_path):
    """A run that resumed from an older checkpoint must not remove its new ones in favour of damaged ones."""
    for step in (7, 8, 9):
        save_checkpoint(tmp_path, step, writer("x"), keep_last=9)
        (tmp_path / f"step_{step:08d}" / "weights").unlink()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, writer("x"), keep_last=2)
    assert latest_checkpoint(tmp_path, lambda message: None) == tmp_path / "step_00000003"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    best = tmp_path / "best"
    write_folder_atomically(best, writer("old"))
    write_folder_atomically(best, lambda folder: (folder / "other").write_text("new"))
    assert sorted(path.name for path in best.iterdir()) == ["MANIFEST.json", "other"]
    assert list(tmp_path.iterdir()) == [best]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    best = tmp_path / "best"
    write_folder_atomically(best, writer("good"))
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            write_folder_atomically(best, failing_writer)
        assert verify(best) is None


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    save_checkpoint(tmp_path, 5, writer("x"), keep_last=2)
    (tmp_path / "step_00000005").rename(tmp_path / ".old-step_00000005")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000005"


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    folder = save_checkpoint(tmp_path, 1, writer("abc"), keep_last=2)
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert files["weights"]["size"] == 3
    assert files["weights"]["sha256"].startswith("ba7816bf")  # sha256 of "abc"
    assert set(files) == {"weights", "sub/more"}


@pytest.mark.parametrize("manifest", ["[]", '{"files": []}', '{"files": {"a": 1}}', "null", ""])
def test_a_malformed_manifest_is_reported(tmp_path, manifest):
    (tmp_path / "MANIFEST.json").write_text(manifest)
    assert "MANIFEST.json" in verify(tmp_path)
