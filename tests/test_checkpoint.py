"""The commit protocol: complete or absent, never half."""

import json

import pytest

from pix2seq.training import checkpoint


def writer(text: str):
    def write(folder):
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text(text * 2)

    return write


def test_a_saved_checkpoint_verifies_and_is_the_latest(tmp_path):
    for step in (5, 10):
        checkpoint.save(tmp_path, step, writer(str(step)), keep_last=2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000010"
    assert checkpoint.verify(tmp_path / "step_00000005") is None
    assert (tmp_path / "step_00000010" / "sub" / "more").read_text() == "1010"


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        checkpoint.save(tmp_path, step, writer("x"), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_100000000"]


@pytest.mark.parametrize("name", ["weights", "sub/more", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_noticed_and_the_previous_one_used(tmp_path, name, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, writer("some text"), keep_last=2)
    victim = tmp_path / "step_00000002" / name
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    said = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert len(said) == 1
    assert "step_00000002" in said[0]


def test_a_write_that_fails_leaves_the_old_ones_and_no_checkpoint_of_its_own(tmp_path):
    checkpoint.save(tmp_path, 1, writer("x"), keep_last=2)

    def fails(folder):
        (folder / "weights").write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, fails, keep_last=2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
    # What the failure left behind is cleared by the next save of that step.
    assert checkpoint.save(tmp_path, 2, writer("y"), keep_last=2) == checkpoint.latest(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_without_manifest_does_not_exist(tmp_path):
    (tmp_path / "step_00000009").mkdir()
    assert checkpoint.latest(tmp_path, lambda message: None) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_commit_replaces_a_folder_whole(tmp_path):
    best = tmp_path / "best"
    checkpoint.commit(best, writer("old"))
    checkpoint.commit(best, lambda folder: (folder / "other").write_text("new"))
    assert sorted(path.name for path in best.iterdir()) == ["MANIFEST.json", "other"]
    assert list(tmp_path.iterdir()) == [best]


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    folder = checkpoint.save(tmp_path, 1, writer("abc"), keep_last=2)
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert files["weights"]["size"] == 3
    assert files["weights"]["sha256"].startswith("ba7816bf")  # sha256 of "abc"
    assert set(files) == {"weights", "sub/more"}


def test_a_replacement_cut_off_between_its_renames_loses_nothing(tmp_path):
    checkpoint.save(tmp_path, 5, writer("x"), keep_last=2)
    (tmp_path / "step_00000005").rename(tmp_path / ".old-step_00000005")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000005"


def test_a_failing_replacement_keeps_what_it_was_to_replace(tmp_path):
    best = tmp_path / "best"
    checkpoint.commit(best, writer("good"))

    def fails(folder):
        raise OSError("No space left on device")

    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            checkpoint.commit(best, fails)
        assert checkpoint.verify(best) is None


def test_broken_later_folders_do_not_count_as_kept(tmp_path):
    """They must not push what a run saves after falling back from them out of the folder."""
    for step in (7, 8, 9):
        checkpoint.save(tmp_path, step, writer("x"), keep_last=9)
        (tmp_path / f"step_{step:08d}" / "weights").unlink()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, writer("x"), keep_last=2)
    assert checkpoint.latest(tmp_path, lambda message: None) == tmp_path / "step_00000003"


@pytest.mark.parametrize("manifest", ["[]", '{"files": []}', '{"files": {"a": 1}}', "null", ""])
def test_a_manifest_of_another_shape_is_a_fault(tmp_path, manifest):
    (tmp_path / "MANIFEST.json").write_text(manifest)
    assert "MANIFEST.json" in checkpoint.verify(tmp_path)
