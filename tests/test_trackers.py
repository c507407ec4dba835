"""Trackers receive every metric and image of a run once, and a failing tracker does not end the run."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.training import setup
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.trackers import Trackers

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


DEMO = [
    *("--config", "configs/demo.yaml", "--num_workers", "0", "--max_steps", "6", "--warmup_steps", "2"),
    *("--log_every", "1", "--eval_every", "6", "--sample_every", "2", "--ckpt_every", "2"),
]

# Names that a run logs.
NAMES = {
    *("train/loss", "train/loss_coord", "train/loss_class", "train/lr", "train/grad_norm"),
    *("train/acc_y1", "train/acc_x1", "train/acc_y2", "train/acc_x2", "train/acc_class"),
    *("perf/images_per_s", "perf/tokens_per_s", "perf/data_wait_frac", "perf/mfu"),
    *("eval/AP", "eval/AP50", "eval/AP75", "eval/AP_small", "eval/AP_medium", "eval/AP_large"),
    *("eval/AR_1", "eval/AR_10", "eval/AR_100"),
    *("eval/per_class/ellipse", "eval/per_class/rectangle", "eval/per_class/triangle", "eval/per_class/cross"),
}
GPU_NAMES = {"perf/gpu_mem_gb"}
IMAGES = {"samples/predictions", "eval/predictions"}


def run(root: Path, output: Path, *argv: str, model=TINY) -> int:
    return train.run_training(parse(TrainArguments, [*model, "--root", str(root), "--output_dir", str(output), *argv]))


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def wandb_records(folder: Path) -> Iterator:
    """The records of the file of an offline run: chunks with a checksum, a length and a kind, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    content, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # not enough bytes for the header of a chunk
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            yield Record.FromString(parts)
            parts = b""


def wandb_history(folder: Path) -> list[dict]:
    """The logged rows in order, with `_step`; nested names are joined by dots."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


@contextlib.contextmanager
def offline_wandb(folder: Path) -> Iterator[None]:
    """Sets the variables of wandb, which reads them once in a process unless it is torn down."""
    import wandb

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        wandb.teardown()
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def resumed(shapes_root, tmp_path_factory) -> tuple[Path, list[Path]]:
    """Run folder and wandb folders of a shortened demo run that is killed after step 3 and resumed at step 2."""
    folder = tmp_path_factory.mktemp("wandb")
    train_step = train.train_step

    def killed(context, micro_batches):
        if context.step == 3:
            raise RuntimeError("killed")
        return train_step(context, micro_batches)

    argv = ("--report_to", "wandb", "tensorboard", "--resume", "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "mfu_factor", lambda *args, **kwargs: 1e-6)
        with offline_wandb(folder), patch.context() as failing:
            failing.setattr(train, "train_step", killed)
            with pytest.raises(RuntimeError, match="killed"):
                run(shapes_root, folder / "out", *argv, model=DEMO)
        with offline_wandb(folder):
            assert run(shapes_root, folder / "out", *argv, model=DEMO) == 0
    return folder / "out", sorted((folder / "wandb").glob("offline-run-*"))


def test_wandb_receives_every_metric_and_image_with_increasing_steps(resumed):
    output, folders = resumed
    assert len(folders) == 2
    history = [row for folder in folders for row in wandb_history(folder)]
    assert [row["_step"] for row in history] == [0, 1, 2, 3, 4, 5, 6]
    sent = {row["_step"]: row for row in history}
    for row in rows(output):
        metrics = {name: value for name, value in row.items() if name != "step" and not name.startswith("perf/")}
        assert metrics.items() <= sent[row["step"]].items()
    names = {name for row in history for name in row}
    assert NAMES | (GPU_NAMES if torch.cuda.is_available() else set()) <= names
    assert {f"{name}.count" for name in IMAGES} <= names


def test_a_resumed_run_continues_its_wandb_run(resumed):
    output, folders = resumed
    records = [record for folder in folders for record in wandb_records(folder)]
    ids = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert ids == {json.loads((output / "trackers.json").read_text())["wandb"]}


def test_tensorboard_receives_the_same(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = resumed
    steps = []
    for file in sorted((output / "demo").glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        steps += [event.step for event in events.Scalars("train/loss")]
        assert IMAGES & set(events.Tags()["images"])
    assert steps == [1, 2, 3, 4, 5, 6]


def fails(*args, **kwargs):
    raise ConnectionError("no route to host")


def test_a_failing_tracker_is_reported_once_and_training_continues(shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fails)
    output = tmp_path / "out"
    with offline_wandb(tmp_path):
        assert run(shapes_root, output, "--max_steps", "3", "--report_to", "tensorboard", "wandb") == 0
    message = "--report_to tensorboard: left out from now on (ConnectionError('no route to host'))"
    assert (output / "train.log").read_text().count(message) == capsys.readouterr().out.count(message) == 1
    assert json.loads((output / "status.json").read_text())["state"] == "finished"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["_step"] for row in wandb_history(folder)] == [0, 1, 2, 3]


def test_a_tracker_that_cannot_start_ends_the_run_before_training(shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", fails)
    with offline_wandb(tmp_path):
        assert run(shapes_root, tmp_path / "out", "--report_to", "wandb", "tensorboard") == 2
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [record for record in wandb_records(folder) if record.WhichOneof("record_type") == "exit"]
    assert "cannot be started (no route to host)" in capsys.readouterr().err


class RecordingTracker:
    """An Accelerate tracker that records what it receives."""

    def __init__(self, name: str):
        self.name, self.received, self.tracker = name, [], object()

    def store_init_configuration(self, values):
        self.values = values

    def log(self, row, step):
        self.received.append((step, row))

    def log_images(self, images, step):
        self.received.append((step, *images))

    def finish(self):
        self.received.append("finished")


def started(folder: Path, *running: RecordingTracker, resumed: bool = False) -> tuple[Trackers, dict]:
    """Started trackers, and the keyword arguments that Accelerate received."""
    kwargs = {}

    def init_trackers(project, init_kwargs):
        kwargs.update(init_kwargs)
        accelerator.trackers = list(running)

    accelerator = SimpleNamespace(init_trackers=init_trackers, trackers=[])
    run_folder = RunFolder(folder, is_main=True)
    run_folder.trackers.start(accelerator, "pix2seq", {"lr": 1e-3}, resumed=resumed)
    assert accelerator.trackers == []  # end_training() must not raise what a tracker raises
    return run_folder.trackers, kwargs


@pytest.mark.parametrize("method", ["log", "log_images", "finish"])
def test_other_trackers_continue_when_a_method_fails(tmp_path, capsys, method):
    broken, working = RecordingTracker("comet_ml"), RecordingTracker("clearml")
    trackers, _ = started(tmp_path, broken, working)
    setattr(broken, method, fails)
    for step in (1, 2):
        trackers.log_metrics(step, {"train/loss": 1.0})
        trackers.log_image("samples/predictions", step, Image.new("RGB", (8, 8)))
    trackers.finish()
    assert capsys.readouterr().out.count("--report_to comet_ml: left out from now on") == 1
    rows = [(1, {"train/loss": 1.0}), (1, "samples/predictions"), (2, {"train/loss": 1.0}), (2, "samples/predictions")]
    assert working.received == [*rows, "finished"]


def test_a_resumed_run_does_not_send_rows_again(tmp_path):
    """A tracker that the first part did not use receives all rows."""
    started(tmp_path, RecordingTracker("tensorboard"))
    old, new = RecordingTracker("tensorboard"), RecordingTracker("comet_ml")
    trackers, _ = started(tmp_path, old, new, resumed=True)
    trackers.set_sent_rows([{"step": 2, "train/loss": 3.0}, {"step": 4, "train/loss": 2.0}])
    again = [(2, {"train/loss": 3.0}), (4, {"train/loss": 2.0}), (4, {"eval/AP": 0.1}), (6, {"train/loss": 1.0})]
    for step, row in again:
        trackers.log_metrics(step, row)
    assert old.received == again[2:]
    assert new.received == again


@pytest.mark.parametrize("environment_id", [None, "xyz"])
def test_wandb_run_ids(tmp_path, monkeypatch, environment_id):
    """A resumed run continues its wandb run unless WANDB_RUN_ID names another one, which has no rows yet."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    _, first = started(tmp_path, RecordingTracker("wandb"))
    if environment_id:
        monkeypatch.setenv("WANDB_RUN_ID", environment_id)
    wandb = RecordingTracker("wandb")
    trackers, then = started(tmp_path, wandb, resumed=True)
    assert then["wandb"] == {"id": environment_id or first["wandb"]["id"], "resume": "allow"}
    trackers.set_sent_rows([{"step": 4, "train/loss": 2.0}])
    trackers.log_metrics(3, {"train/loss": 3.0})
    assert bool(wandb.received) == bool(environment_id)


def test_a_new_run_in_the_same_folder_is_a_new_wandb_run(tmp_path):
    _, first = started(tmp_path, RecordingTracker("wandb"))
    _, second = started(tmp_path, RecordingTracker("wandb"))
    assert first["wandb"]["id"] != second["wandb"]["id"]


def test_trackers_are_finished_when_a_run_ends(tmp_path):
    """Also if the status cannot be written, and once only."""
    tracker = RecordingTracker("comet_ml")
    folder = RunFolder(tmp_path / "missing", is_main=True)
    folder.trackers = started(tmp_path, tracker)[0]
    folder.status("running", 1)
    assert tracker.received == []
    folder.status("failed", 1, "power cut")
    folder.status("failed", 1, "again")
    assert tracker.received == ["finished"]
