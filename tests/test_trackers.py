"""What wandb and the others get of a run, without network or account, and what becomes of those that fail."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train
from pix2seq.command_line import parse
from pix2seq.config import Arguments
from pix2seq.run_folder import RunFolder
from pix2seq.trackers import Example, Trackers

TINY = [
    *(
        "--backbone",
        "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
    ),
    *("--hidden_size", "16", "--encoder_layers", "0", "--decoder_layers", "1", "--num_heads", "2", "--mlp_size", "32"),
    *("--image_size", "64", "--num_bins", "32", "--max_objects", "6", "--batch_size", "4", "--eval_batch_size", "5"),
    *("--num_workers", "0", "--warmup_steps", "2", "--max_steps", "6"),
    *("--log_every", "1", "--eval_every", "6", "--sample_every", "2", "--ckpt_every", "2"),
]


def run(root: Path, output: Path, *words: str) -> int:
    return train.main(parse(Arguments, [*TINY, "--root", str(root), "--output_dir", str(output), *words]))


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def wandb_records(folder: Path) -> Iterator:
    """The records of an offline run's file: chunks with a checksum, a length and a kind, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    content, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # no room for a chunk's head
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def wandb_history(folder: Path) -> list[dict]:
    """By logged step, in order, with `_step`; names of nested values are joined by dots."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


@contextlib.contextmanager
def offline_wandb(folder: Path) -> Iterator[None]:
    """wandb reads its variables once in a process, unless it is torn down."""
    import wandb

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        wandb.teardown()
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def resumed(shapes_root, tmp_path_factory) -> tuple[Path, list[Path]]:
    """A run killed after step 3, past its checkpoint of step 2, and resumed from there: its folder, and wandb's."""
    folder = tmp_path_factory.mktemp("wandb")
    take_step = train.train_step

    def killed(training, micro_batches):
        if training.step == 3:
            raise RuntimeError("killed")
        return take_step(training, micro_batches)

    words = ("--report_to", "wandb", "tensorboard", "--resume", "auto")
    with offline_wandb(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(shapes_root, folder / "out", *words)
    with offline_wandb(folder):
        assert run(shapes_root, folder / "out", *words) == 0
    return folder / "out", sorted((folder / "wandb").glob("offline-run-*"))


def test_wandb_has_every_metric_and_steps_only_grow(resumed):
    output, folders = resumed
    assert len(folders) == 2
    history = [row for folder in folders for row in wandb_history(folder)]
    steps = [row["_step"] for row in history]
    assert steps == sorted(steps) == [0, 1, 2, 3, 4, 5, 6], "step 3 was taken twice"
    sent = {}
    for row in history:
        sent.setdefault(row["_step"], {}).update(row)
    for row in rows(output):
        plain = {name: value for name, value in row.items() if name != "step" and not name.startswith("perf/")}
        assert plain.items() <= sent[row["step"]].items()
    assert {name.split("/")[0] for name in sent[6] if "/" in name} >= {"train", "data", "perf", "eval", "samples"}


def test_wandb_is_one_run_whose_summary_is_the_best(resumed):
    output, folders = resumed
    records = [record for folder in folders for record in wandb_records(folder)]
    kinds = [record.WhichOneof("record_type") for record in records]
    ids = {record.run.run_id for record, kind in zip(records, kinds, strict=True) if kind == "run"}
    assert ids == {json.loads((output / "trackers.json").read_text())["wandb"]}
    metrics = [record.metric for record, kind in zip(records, kinds, strict=True) if kind == "metric"]
    summaries = {(m.glob_name or m.name): "max" if m.summary.max else "min" for m in metrics}
    assert summaries == {"eval/*": "max", "train/loss*": "min"}


def test_wandb_draws_the_boxes_itself_in_two_layers(resumed):
    _, folders = resumed
    last = wandb_history(folders[-1])[-1]
    for name in ("samples/predictions", "eval/predictions"):
        assert last[f"{name}.count"] == 5
        for layers in last[f"{name}.all_boxes"]:
            assert layers.keys() == {"ground_truth", "predictions"}
            contents = {
                layer: json.loads((folders[-1] / "files" / entry["path"]).read_text())
                for layer, entry in layers.items()
            }
            assert set(contents["predictions"]["class_labels"].values()) == {
                *("ellipse", "rectangle", "triangle", "cross")
            }
            for box in contents["predictions"]["box_data"]:
                assert 0 <= box["scores"]["score"] <= 1
                assert box["position"].keys() == {"minX", "maxX", "minY", "maxY"}
    assert sum(len(contents[layer]["box_data"]) for layer in contents) > 0
    assert last["eval/AP_of_classes._type"] == "table-file"
    table = json.loads((folders[-1] / "files" / last["eval/AP_of_classes.path"]).read_text())
    assert table["columns"] == ["class", "AP"]
    assert [row[0] for row in table["data"]] == ["ellipse", "rectangle", "triangle", "cross"]


def test_tensorboard_has_the_same_beside_it(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = resumed
    steps = []
    for file in sorted((output / "pix2seq").glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        steps += [event.step for event in events.Scalars("train/loss")]
        assert {"samples/predictions", "eval/predictions"} & set(events.Tags()["images"])
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", ["log", "log_images", "finish"])
def test_a_tracker_that_fails_stops_nothing_and_is_told_of_once(shapes_root, tmp_path, monkeypatch, capsys, method):
    def fails(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", fails)
    output = tmp_path / "out"
    with offline_wandb(tmp_path):
        assert run(shapes_root, output, "--max_steps", "3", "--report_to", "tensorboard", "wandb") == 0
    told = "--report_to tensorboard: left out from now on (ConnectionError('no route to host'))"
    assert (output / "train.log").read_text().count(told) == capsys.readouterr().out.count(told) == 1
    assert json.loads((output / "status.json").read_text())["state"] == "finished"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["_step"] for row in wandb_history(folder)] == [0, 1, 2, 3], "the other one goes on"


class Fake:
    """A tracker of Accelerate's that keeps what it is given."""

    def __init__(self, name: str, **kinds):
        self.name, self.given, self.tracker = (
            name,
            [],
            SimpleNamespace(info=SimpleNamespace(run_id="abc"), name="red-1"),
        )
        for method in kinds:
            setattr(self, method, lambda *values, method=method, **named: self.given.append((method, *values)))

    def store_init_configuration(self, flags):
        self.flags = flags

    def log(self, row, step):
        self.given.append((step, row))

    def finish(self):
        self.given.append("finished")


def started(folder: Path, *fakes: Fake, resumed: bool = False) -> tuple[Trackers, dict]:
    asked = {}

    def init_trackers(project, init_kwargs):
        asked.update(init_kwargs)
        accelerator.trackers = list(fakes)

    accelerator = SimpleNamespace(init_trackers=init_trackers, trackers=[])
    run_folder = RunFolder(folder, is_main=True)
    run_folder.trackers.start(accelerator, "pix2seq", {"lr": 1e-3}, resumed=resumed)
    assert accelerator.trackers == [], "end_training would let one that fails end the run"
    return run_folder.trackers, asked


def test_mlflow_and_trackio_go_on_in_their_run_too(tmp_path):
    _, first = started(tmp_path, before := Fake("mlflow"), Fake("trackio"))
    assert not {"mlflow", "trackio"} & first.keys()
    _, then = started(tmp_path, again := Fake("mlflow"), Fake("trackio"), resumed=True)
    assert before.flags == {"lr": 1e-3}
    assert not hasattr(again, "flags"), "MLflow raises where a flag has another value than before"
    assert then["mlflow"] == {"run_id": "abc"}
    assert then["trackio"] == {"name": "red-1", "resume": "allow"}


def test_pictures_go_to_each_tracker_the_way_it_takes_them(tmp_path):
    files, plain, nothing = Fake("mlflow", log_artifact=None), Fake("comet_ml", log_images=None), Fake("trackio")
    trackers, _ = started(tmp_path, files, plain, nothing)
    image, boxes = Image.new("RGB", (8, 8)), np.zeros((0, 4))
    example = Example(image, boxes, boxes[:, 0], boxes, boxes[:, 0], boxes[:, 0])
    trackers.picture("samples/predictions", 3, tmp_path / "x.png", image, [example], ["cat"])
    trackers.finish()
    assert files.given == [("log_artifact", str(tmp_path / "x.png"), "samples/step_3"), "finished"]
    assert plain.given[0][0] == "log_images"
    assert nothing.given == ["finished"]


def test_what_a_resumed_run_repeats_is_not_sent_again(tmp_path):
    """A tracker that has only now been asked for gets all of it."""
    before = [{"step": 2, "train/loss": 3.0}, {"step": 4, "train/loss": 2.0}]
    started(tmp_path, Fake("tensorboard"))
    old, new = Fake("tensorboard"), Fake("comet_ml")
    trackers, _ = started(tmp_path, old, new, resumed=True)
    trackers.sent(before)
    again = [(2, {"train/loss": 3.0}), (4, {"train/loss": 2.0}), (4, {"eval/AP": 0.1}), (6, {"train/loss": 1.0})]
    for step, row in again:
        trackers.metrics(step, row)
    assert old.given == again[2:]
    assert new.given == again


def test_another_run_in_the_same_folder_is_another_run(tmp_path):
    """The first one may have ended before it left anything to go on from."""
    started(tmp_path, Fake("tensorboard"), Fake("mlflow"))
    trackers, asked = started(tmp_path, new := Fake("tensorboard"), Fake("mlflow"))
    assert "mlflow" not in asked
    trackers.sent([{"step": 4, "train/loss": 2.0}])
    trackers.metrics(2, {"train/loss": 9.0})
    assert new.given == [(2, {"train/loss": 9.0})]
