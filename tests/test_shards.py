"""Images in shards: the same training as from the files they were packed from, to the last bit."""

import json
import signal
import tarfile
import zlib

import numpy as np
import pytest
import torch
import webdataset

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.cli import main as data_command
from pix2seq.data import Split, StepSampler, TrainDataset, find_split, load_annotations, train_loader
from pix2seq.data.image_files import BadImageError, open_store
from pix2seq.data.shards import write_shards
from pix2seq.errors import UserError
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.train import run_training
from pix2seq.transforms import TrainTransform
from tests.runs import TINY, arguments, interrupt_at, rows


@pytest.fixture(scope="module")
def files(shapes_root):
    return load_annotations(find_split("train", shapes_root))


@pytest.fixture(scope="module")
def shards(files, tmp_path_factory):
    """The 12 training images in several shards."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    written = write_shards(files, folder, shard_mb=0.04)
    assert written == {"images": 12, "shards": len(list(folder.glob("*.tar")))}
    assert written["shards"] >= 3
    return folder


def examples(annotations, num_workers: int) -> list[dict]:
    data = TrainDataset(annotations, TrainTransform(48), SequenceBuilder(Tokenizer(4, 200), 8), seed=7)
    batches = iter(train_loader(data, StepSampler(12, 4, seed=1), num_workers, pin_memory=False))
    return [next(batches) for _ in range(7)]


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_shards_give_the_sequences_of_the_files(files, shards, num_workers):
    packed = load_annotations(find_split("train", None, shards=str(shards)))
    assert packed.issues == []
    for one, other in zip(examples(files, 0), examples(packed, num_workers), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]


def test_training_on_shards_is_training_on_files_and_resumes_exactly(
    finished, shapes_root, shards, tmp_path, monkeypatch
):
    words = ("--train_shards", str(shards), "--num_workers", "2")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert run_training(arguments(shapes_root, tmp_path / "shards", *words)) == 75
    again = ("--train_shards", str(shards), "--resume", "auto")
    assert run_training(arguments(shapes_root, tmp_path / "shards", *again)) == 0
    assert rows(tmp_path / "shards") == rows(finished)
    weights = [(output / "final/model.safetensors").read_bytes() for output in (finished, tmp_path / "shards")]
    assert weights[0] == weights[1]


def test_any_reader_of_webdataset_takes_them(files, shards):
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 12
    for index, sample in enumerate(samples):
        about = json.loads(sample["json"])
        assert about["image_id"] == files.image_ids[index]
        assert sample["png"] == files.store.read(files.locations[index]).tobytes()
        boxes = np.array([entry["bbox"] for entry in about["annotations"]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(boxes, files.objects(index)[0])


def test_the_command_packs_a_training_set(shapes_root, tmp_path, capsys):
    words = ["shard", "--root", str(shapes_root), "--output", str(tmp_path / "out")]
    assert data_command(words) == 0
    assert f"12 images in 1 shards; train.py reads them with --train_shards {tmp_path}/out" in capsys.readouterr().out
    assert data_command(words) == 0  # written anew
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("dear to me")
    assert data_command([*words[:-1], str(tmp_path / "mine")]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_broken_image_is_not_packed(shapes_root, files, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in files.file_names.tolist():
        (images / name).write_bytes((shapes_root / "images/train2017" / name).read_bytes())
    (images / str(files.file_names[5])).write_bytes(b"broken")
    broken = load_annotations(Split(images, files.split.json))
    with pytest.raises(UserError, match=f"{files.file_names[5]}: not an image"):
        write_shards(broken, tmp_path / "out")
    assert not (tmp_path / "out/shards.json").exists()
    with pytest.raises(UserError, match="holds no annotations.json"):
        find_split("train", None, shards=str(tmp_path / "out"))
    assert write_shards(files, tmp_path / "out")["images"] == 12  # what was half written is written anew


def test_a_shard_that_was_not_copied_whole_is_named(files, tmp_path):
    write_shards(files, tmp_path, shard_mb=0.04)
    split = find_split("train", None, shards=str(tmp_path))
    shard = tmp_path / "000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    says = f"000001.tar: has {len(whole) - 512} bytes, and {len(whole)} bytes were written"
    with pytest.raises(UserError, match=says):
        load_annotations(split)
    shard.unlink()
    with pytest.raises(UserError, match="000001.tar: is missing"):
        load_annotations(split)


def test_members_lie_where_the_index_says(files, shards):
    index = json.loads((shards / "shards.json").read_text())
    for name, (shard, offset, size, checksum) in zip(index["names"], index["rows"], strict=True):
        with tarfile.open(shards / index["files"][shard]) as archive:
            (member,) = [m for m in archive if m.offset_data == offset]
            assert member.size == size
            assert zlib.crc32(archive.extractfile(member).read()) == checksum
            assert member.name.endswith(".png")
        assert name in files.file_names.tolist()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train_shards", "s", "--val_images", "v"], "--val_json: missing"),
        (["--train_shards", "s", "--train_json", "t", "--val_images", "v", "--val_json", "w"], "exclude each other"),
    ],
)
def test_shards_are_named_one_way(words, says, capsys):
    with pytest.raises(SystemExit):
        parse(TrainArguments, [*TINY, *words])
    assert says in capsys.readouterr().err


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
def test_an_index_that_was_tampered_with_is_one_line_and_opens_nothing_outside(files, tmp_path, edit):
    one = files.subset([0])
    write_shards(one, tmp_path / "out")
    (tmp_path / "000000.tar").write_bytes((tmp_path / "out/000000.tar").read_bytes())
    index = json.loads((tmp_path / "out/shards.json").read_text())
    (tmp_path / "out/shards.json").write_text(json.dumps(index | edit))
    with pytest.raises(UserError, match="shards.json: "):
        open_store(tmp_path / "out")


def test_packing_never_removes_what_it_packs_or_what_is_not_its_own(shapes_root, files, tmp_path):
    write_shards(files, tmp_path / "out")
    packed = load_annotations(find_split("train", None, shards=str(tmp_path / "out")))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for folder in (tmp_path / "out", tmp_path):
        with pytest.raises(UserError, match="holds what is to be packed"):
            write_shards(packed, folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    for name in ("000000.tar", "annotations.json", "shards.json"):
        mine = tmp_path / f"mine {name}"
        mine.mkdir()
        (mine / name).write_text("{}")
        with pytest.raises(UserError, match="holds something else"):
            write_shards(files, mine)
        assert (mine / name).read_text() == "{}"


def test_damage_inside_a_shard_is_told(files, tmp_path):
    write_shards(files, tmp_path / "out")
    split = Split(tmp_path / "out", tmp_path / "out/annotations.json")
    annotations = load_annotations(split)
    shard, offset, size, _ = annotations.locations[0].tolist()
    path = tmp_path / f"out/{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadImageError, match="damaged: not what was put into out"):
        annotations.image_file(0)
    annotations.image_file(1)
