"""What wandb and the others get of a run, without network or account, and what becomes of those that fail."""

import contextlib
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.training import setup
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.trackers import Example, Trackers
from tests.runs import edited

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

# What a run has to show, by name.
NAMES = {
    *("train/loss", "train/loss_coord", "train/loss_class", "train/lr", "train/grad_norm"),
    *("train/acc_y1", "train/acc_x1", "train/acc_y2", "train/acc_x2", "train/acc_class"),
    *("perf/images_per_s", "perf/tokens_per_s", "perf/data_wait_frac", "perf/mfu"),
    *("eval/AP", "eval/AP50", "eval/AP75", "eval/AP_small", "eval/AP_medium", "eval/AP_large"),
    *("eval/AR_1", "eval/AR_10", "eval/AR_100"),
    *("eval/per_class/ellipse", "eval/per_class/rectangle", "eval/per_class/triangle", "eval/per_class/cross"),
}
ON_A_GPU = {"perf/gpu_mem_gb"}
PICTURES = {"samples/predictions", "eval/predictions"}


def run(root: Path, output: Path, *words: str, shape=TINY) -> int:
    return train.run_training(
        parse(TrainArguments, [*shape, "--root", str(root), "--output_dir", str(output), *words])
    )


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
    """The demo, shortened, killed after step 3, past its checkpoint of step 2, and resumed from there: its folder, and
    wandb's. Its FLOPs are counted as if the CPU's peak were known."""
    folder = tmp_path_factory.mktemp("wandb")
    take_step = train.train_step

    def killed(training, micro_batches):
        if training.step == 3:
            raise RuntimeError("killed")
        return take_step(training, micro_batches)

    words = ("--report_to", "wandb", "tensorboard", "--resume", "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "mfu_factor", lambda *args: 1e-6)
        with offline_wandb(folder), patch.context() as deadly:
            deadly.setattr(train, "train_step", killed)
            with pytest.raises(RuntimeError, match="killed"):
                run(shapes_root, folder / "out", *words, shape=DEMO)
        with offline_wandb(folder):
            assert run(shapes_root, folder / "out", *words, shape=DEMO) == 0
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
    names = {name for row in history for name in row}
    assert NAMES | (ON_A_GPU if torch.cuda.is_available() else set()) <= names
    assert {f"{name}.all_boxes" for name in PICTURES} <= names
    assert {name.split("/")[0] for name in names} >= {"train", "data", "perf", "eval", "samples"}


def test_wandb_is_one_run_whose_summary_is_the_best(resumed):
    output, folders = resumed
    records = [record for folder in folders for record in wandb_records(folder)]
    kinds = [record.WhichOneof("record_type") for record in records]
    ids = {record.run.run_id for record, kind in zip(records, kinds, strict=True) if kind == "run"}
    assert ids == {json.loads((output / "trackers.json").read_text())["wandb"]}
    metrics = [record.metric for record, kind in zip(records, kinds, strict=True) if kind == "metric"]
    exits = [record.exit.exit_code for record, kind in zip(records, kinds, strict=True) if kind == "exit"]
    assert exits == [1, 0], "the first part failed"
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
    for file in sorted((output / "demo").glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file)).Reload()
        steps += [event.step for event in events.Scalars("train/loss")]
        assert {"samples/predictions", "eval/predictions"} & set(events.Tags()["images"])
    assert steps == [1, 2, 3, 4, 5, 6]


def fails(*args, **kwargs):
    raise ConnectionError("no route to host")


def test_a_tracker_that_fails_stops_nothing_and_is_told_of_once(shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fails)
    output = tmp_path / "out"
    with offline_wandb(tmp_path):
        assert run(shapes_root, output, "--max_steps", "3", "--report_to", "tensorboard", "wandb") == 0
    told = "--report_to tensorboard: left out from now on (ConnectionError('no route to host'))"
    assert (output / "train.log").read_text().count(told) == capsys.readouterr().out.count(told) == 1
    assert json.loads((output / "status.json").read_text())["state"] == "finished"
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["_step"] for row in wandb_history(folder)] == [0, 1, 2, 3], "the other one goes on"


def test_a_tracker_that_cannot_start_leaves_none_unfinished(shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", fails)
    with offline_wandb(tmp_path):
        assert run(shapes_root, tmp_path / "out", "--report_to", "wandb", "tensorboard") == 2
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    exits = [r.exit.exit_code for r in wandb_records(folder) if r.WhichOneof("record_type") == "exit"]
    assert exits == [1]
    assert "cannot be started (no route to host)" in capsys.readouterr().err


class Fake:
    """A tracker of Accelerate's that keeps what it is given."""

    def __init__(self, name: str, run_id: str = "abc", **kinds):
        self.name, self.given = name, []
        self.tracker = SimpleNamespace(
            id=run_id, info=SimpleNamespace(run_id=run_id), name="red-1", define_metric=lambda *names, **summary: None
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


@pytest.mark.parametrize("method", ["log", "log_images", "log_table", "finish"])
def test_whatever_fails_in_a_tracker_the_others_go_on(tmp_path, capsys, method):
    kinds = dict.fromkeys(["log_images", "log_table"])
    trackers, _ = started(tmp_path, broken := Fake("comet_ml", **kinds), whole := Fake("clearml", **kinds))
    setattr(broken, method, fails)
    for step in (1, 2):
        trackers.metrics(step, {"train/loss": 1.0})
        trackers.image("samples/predictions", step, tmp_path / "x.png", Image.new("RGB", (8, 8)), [], [])
        trackers.table("eval/AP_of_classes", step, ["class", "AP"], [["cat", 0.5]])
    trackers.finish()
    said = capsys.readouterr().out
    assert said.count("--report_to comet_ml: left out from now on (ConnectionError('no route to host'))") == 1
    assert [given if given == "finished" else given[0] for given in whole.given] == [
        *(1, "log_images", "log_table", 2, "log_images", "log_table", "finished")
    ]


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
    trackers.image("samples/predictions", 3, tmp_path / "x.png", image, [example], ["cat"])
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


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_that_the_environment_names_is_not_the_one_before(tmp_path, name):
    """WANDB_RUN_ID and MLFLOW_RUN_ID win over trackers.json, and that run has nothing yet."""
    started(tmp_path, Fake(name))
    trackers, _ = started(tmp_path, other := Fake(name, run_id="xyz"), resumed=True)
    assert other.flags == {"lr": 1e-3}
    trackers.sent([{"step": 4, "train/loss": 2.0}])
    trackers.metrics(3, {"train/loss": 3.0})
    assert other.given == [(3, {"train/loss": 3.0})]
    again, _ = started(tmp_path, same := Fake(name, run_id="xyz"), resumed=True)
    again.sent([{"step": 4, "train/loss": 2.0}])
    again.metrics(3, {"train/loss": 3.0})
    assert same.given == [], "this one has it"


@pytest.fixture
def mlflow_ends(monkeypatch) -> list:
    """MLflow's end_run, in its place."""
    ends = []
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(end_run=ends.append))
    return ends


def test_a_failed_run_is_finished_as_one(tmp_path, mlflow_ends):
    """Also where its status cannot be written."""
    codes, wandb, other = [], Fake("wandb"), Fake("trackio")
    wandb.tracker.finish = lambda exit_code: codes.append(exit_code)
    folder = RunFolder(tmp_path / "full", is_main=True)
    folder.trackers = started(tmp_path, wandb, Fake("mlflow"), other)[0]
    folder.status("running", 1)
    assert not codes
    folder.status("failed", 1, "power cut")
    folder.status("failed", 1, "twice")
    assert (codes, mlflow_ends, other.given) == ([1], ["FAILED"], ["finished"])


def test_mlflow_gets_names_that_it_takes_and_the_log_says_which(tmp_path, capsys):
    row = {"eval/per_class/cup, (it's) red": 0.1, "eval/per_class/cup_ _it_s_ red": 0.2, "eval/per_class/..": 0.3}
    row |= {"eval/per_class/n/a": 0.4, "eval/per_class/": 0.5, "eval/AP": 0.6, "eval/per_class/été": 0.7}
    trackers, _ = started(tmp_path, mlflow := Fake("mlflow"), other := Fake("trackio"))
    for step in (1, 2):
        trackers.metrics(step, row)
    taken = {"eval/per_class/cup_ _it_s_ red": 0.1, "eval/per_class/cup_ _it_s_ red_": 0.2, "eval/per_class_..": 0.3}
    taken |= {"eval/per_class/n/a": 0.4, "eval/per_class_": 0.5, "eval/AP": 0.6, "eval/per_class/été": 0.7}
    assert mlflow.given == [(1, taken), (2, taken)]
    assert other.given == [(1, row), (2, row)]
    said = capsys.readouterr().out
    assert said.count("--report_to mlflow: names that it does not take are changed") == 1
    assert "\"eval/per_class/cup, (it's) red\" is 'eval/per_class/cup_ _it_s_ red'" in said
    trackers.metrics(3, {f"eval/per_class/{'long, ' * 50}{end}": 0.8 for end in range(30)})
    assert len(mlflow.given[-1][1]) == 30
    assert max(map(len, mlflow.given[-1][1])) <= 250


def installed(name: str):
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"pip install {name}; stand-ins are above")


def train_in_two_parts(root: Path, output: Path, tracker: str, **environment: str) -> None:
    for steps in ("3", "6"):
        words = [*TINY, "--root", str(root), "--output_dir", str(output), "--report_to", tracker, "--resume", "auto"]
        command = [sys.executable, "train.py", *words, "--max_steps", steps, "--lr_scheduler", "constant"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
        assert done.returncode == 0, done.stderr
    assert "left out from now on" not in (output / "train.log").read_text()


@pytest.mark.slow
@installed("trackio")
def test_trackio_writes_a_run_and_goes_on_with_it(shapes_root, tmp_path):
    train_in_two_parts(shapes_root, tmp_path / "out", "trackio", TRACKIO_DIR=str(tmp_path))
    with contextlib.closing(sqlite3.connect(tmp_path / "pix2seq.db")) as database:
        written = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in written} == {json.loads((tmp_path / "out/trackers.json").read_text())["trackio"]}
    sent = [{"step": step} | json.loads(metrics) for _, step, metrics in written]
    assert sent == rows(tmp_path / "out")


@pytest.mark.slow
@installed("mlflow")
def test_mlflow_writes_a_run_and_goes_on_with_it(shapes_root, tmp_path):
    def rename(content):
        content["categories"][0]["name"] = "egg (it's, well, round)"

    root = edited(edited(shapes_root, tmp_path / "train", "train", rename), tmp_path / "data", "val", rename)
    output, store = tmp_path / "out", tmp_path / "store"
    place = {"MLFLOW_TRACKING_URI": store.as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    train_in_two_parts(root, output, "mlflow", **place)
    (folder,) = store.glob(f"*/{json.loads((output / 'trackers.json').read_text())['mlflow']}")
    lines = [line.split() for line in (folder / "metrics/train/loss").read_text().splitlines()]
    expected = [(row["step"], row["train/loss"]) for row in rows(output) if "train/loss" in row]
    assert [(int(step), float(value)) for _, value, step in lines] == expected
    names = {file.relative_to(folder / "metrics").as_posix() for file in folder.glob("metrics/**/*") if file.is_file()}
    assert "eval/per_class/egg _it_s_ well_ round_" in names
    assert len(names) == len({name for row in rows(output) for name in row} - {"step"})
    assert (folder / "artifacts/eval/step_6/worst.png").is_file()
