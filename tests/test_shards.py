"""Training on shards is bitwise identical to training on the files they were packed from."""

import json
import os
import pickle
import signal
import tarfile
import zlib

import numpy as np
import pytest
import torch
import webdataset

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.cli import main
from pix2seq.data import Split, StepSampler, TrainDataset, find_split, load_annotations, train_loader
from pix2seq.data.image_files import BadImageError
from pix2seq.data.image_stores import open_store
from pix2seq.data.shards import write_shards
from pix2seq.errors import UserError
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.train import run_training
from pix2seq.transforms import TrainTransform
from tests.runs import TINY, arguments, assert_same_run, interrupt_at


@pytest.fixture(scope="module")
def files(shapes_root):
    return load_annotations(find_split("train", shapes_root))


@pytest.fixture(scope="module")
def shards(files, tmp_path_factory):
    """A folder with the 12 training images in several shards."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    counts = write_shards(files, folder, shard_mb=0.04)
    assert counts == {"images": 12, "shards": len(list(folder.glob("*.tar")))}
    assert counts["shards"] >= 3
    return folder


def load_batches(annotations, num_workers: int) -> list[dict]:
    dataset = TrainDataset(annotations, TrainTransform(48), SequenceBuilder(Tokenizer(4, 200), 8), seed=7)
    batches = iter(train_loader(dataset, StepSampler(12, 4, seed=1), num_workers, pin_memory=False))
    return [next(batches) for _ in range(7)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_shards_equal_batches_of_files(files, shards, num_workers):
    packed = load_annotations(find_split("train", None, shards=str(shards)))
    assert packed.issues == []
    for expected, batch in zip(load_batches(files, 0), load_batches(packed, num_workers), strict=True):
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value) if torch.is_tensor(value) else batch[key] == value


def test_resumed_training_on_shards_equals_training_on_files(finished, shapes_root, shards, tmp_path, monkeypatch):
    output, flags = tmp_path / "run", ("--train_shards", str(shards))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert run_training(arguments(shapes_root, output, *flags, "--num_workers", "2")) == 75
    assert run_training(arguments(shapes_root, output, *flags, "--resume", "auto")) == 0
    assert_same_run(output, finished)


def test_webdataset_reads_the_shards(files, shards):
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 12
    for index, sample in enumerate(samples):
        content = json.loads(sample["json"])
        assert content["image_id"] == files.image_ids[index]
        assert sample["png"] == files.store.read(files.locations[index]).tobytes()
        boxes = np.array([entry["bbox"] for entry in content["annotations"]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(boxes, files.objects(index)[0])


def test_the_command_writes_and_replaces_shards(shapes_root, tmp_path, capsys):
    words = ["shard", "--root", str(shapes_root), "--output", str(tmp_path / "out")]
    for _ in range(2):
        assert main(words) == 0
        assert f"--train_shards {tmp_path}/out" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("text")
    assert main([*words[:-1], str(tmp_path / "other")]) == 2
    assert f"{tmp_path}/other: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_broken_image_stops_the_packing(shapes_root, files, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in files.file_names.tolist():
        (images / name).write_bytes((shapes_root / "images/train2017" / name).read_bytes())
    (images / str(files.file_names[5])).write_bytes(b"broken")
    broken = load_annotations(Split(images, files.split.json))
    with pytest.raises(UserError, match=f"{files.file_names[5]}: not an image"):
        write_shards(broken, tmp_path / "out")
    assert not (tmp_path / "out/shards.json").exists()
    with pytest.raises(UserError, match=r"has no annotations\.json"):
        find_split("train", None, shards=str(tmp_path / "out"))
    assert write_shards(files, tmp_path / "out")["images"] == 12  # replaces the unfinished shards


def test_truncated_and_missing_shards_are_errors(files, tmp_path):
    write_shards(files, tmp_path, shard_mb=0.04)
    split = find_split("train", None, shards=str(tmp_path))
    shard = tmp_path / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"000001\.tar: "):
        load_annotations(split)
    shard.unlink()
    with pytest.raises(UserError, match=r"000001\.tar: is missing"):
        load_annotations(split)


def test_the_index_has_offsets_sizes_and_checksums(files, shards):
    index = json.loads((shards / "shards.json").read_text())
    for name, (shard, offset, size, checksum) in zip(index["names"], index["rows"], strict=True):
        with tarfile.open(shards / index["files"][shard]) as archive:
            (member,) = [m for m in archive if m.offset_data == offset]
            assert member.size == size
            assert zlib.crc32(archive.extractfile(member).read()) == checksum
            assert member.name.endswith(".png")
        assert name in files.file_names.tolist()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train_shards", "s", "--val_images", "v"], "--val_json: missing"),
        (["--train_shards", "s", "--train_json", "t", "--val_images", "v", "--val_json", "w"], "exclude each other"),
    ],
)
def test_contradictory_flags_are_refused(words, expected, capsys):
    with pytest.raises(SystemExit):
        parse(TrainArguments, [*TINY, *words])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "edit",
    [
        {"files": ["../000000.tar"]},
        {"files": ["/etc/passwd"]},
        {"sizes": []},
        {"names": 5},
        {"rows": [[0, -1, 5]]},
        {"rows": [[7, 0, 5]]},
        {"rows": [[0, 0, -5]]},
        {"rows": [[0, 0, 2**45]]},
        {"rows": [[0, 2**70, 5]]},
        {"rows": [[0, 2**62, 2**62]]},
        {"rows": [[0, 0]]},
        {"rows": []},
    ],
)
def test_an_invalid_index_is_an_error(files, tmp_path, edit):
    write_shards(files.subset([0]), tmp_path / "out")
    (tmp_path / "000000.tar").write_bytes((tmp_path / "out/000000.tar").read_bytes())
    index = json.loads((tmp_path / "out/shards.json").read_text())
    (tmp_path / "out/shards.json").write_text(json.dumps(index | edit))
    with pytest.raises(UserError, match=r"shards\.json: "):
        open_store(tmp_path / "out")


def test_packing_removes_neither_its_input_nor_other_files(shapes_root, files, tmp_path):
    write_shards(files, tmp_path / "out")
    packed = load_annotations(find_split("train", None, shards=str(tmp_path / "out")))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for folder in (tmp_path / "out", tmp_path):
        with pytest.raises(UserError, match="contains the images or annotations to pack"):
            write_shards(packed, folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    for name in ("000000.tar", "annotations.json", "shards.json"):
        folder = tmp_path / f"other {name}"
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match="has files that are not shards"):
            write_shards(files, folder)
        assert (folder / name).read_text() == "{}"


def test_damaged_bytes_in_a_shard_are_found(files, tmp_path):
    write_shards(files, tmp_path / "out")
    split = Split(tmp_path / "out", tmp_path / "out/annotations.json")
    annotations = load_annotations(split)
    shard, offset, size, _ = annotations.locations[0].tolist()
    path = tmp_path / f"out/{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadImageError, match="damaged: "):
        annotations.image_file(0)
    annotations.image_file(1)


def test_names_that_are_not_in_the_shards_are_missing(files, shards):
    store = open_store(shards)
    locations, errors = store.locate(["none.jpg", files.file_names[2]])
    assert {index: error.kind for index, error in errors.items()} == {0: "missing-file"}
    expected = files.store.read(files.locations[2]).tobytes()
    for copy in (store, pickle.loads(pickle.dumps(store))):  # a spawned worker receives a copy
        assert copy.read(locations[1]).tobytes() == expected


def test_forked_workers_read_shards_concurrently(files, shards):
    store = open_store(shards)
    locations, _ = store.locate(files.file_names.tolist())
    expected = [files.store.read(location).tobytes() for location in files.locations]
    store.read(locations[0])
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            pairs = list(zip(locations, expected, strict=True)) * 30
            os._exit(0 if all(store.read(location).tobytes() == data for location, data in pairs) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_shard_deleted_after_opening_is_reported(files, tmp_path):
    write_shards(files.subset([0]), tmp_path / "out")
    store = open_store(tmp_path / "out")
    locations, _ = store.locate(files.file_names[:1].tolist())
    (tmp_path / "out/000000.tar").unlink()
    with pytest.raises(BadImageError, match=r"^000000\.tar: No such file or directory$"):
        store.read(locations[0])
