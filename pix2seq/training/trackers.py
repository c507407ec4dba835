"""Where a run's metrics and pictures go beside its folder: wandb, TensorBoard, trackio, MLflow and whatever else
Accelerate knows."""

import contextlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import Image

FILE = "trackers.json"  # in the run folder: the ids of the run, by tracker
ILLEGAL = r"[^\w.\- /]|/(?=/|$|\.{1,2}(?:/|$))"  # in MLflow's names, which are paths too
LONGEST = 240  # characters; MLflow takes 250, and some may be added to tell names apart
SUMMARIES = {"eval/*": "max", "train/loss*": "min"}  # what wandb's table of runs shows; the last value of the others


@dataclass
class Example:
    """A picture with its objects and those found in it; boxes xyxy in its pixels, labels contiguous.

    boxes (N, 4)   labels (N,)         found_boxes (M, 4)   found_labels (M,)   scores (M,)
    """

    image: Image
    boxes: np.ndarray
    labels: np.ndarray
    found_boxes: np.ndarray
    found_labels: np.ndarray
    scores: np.ndarray


class Trackers:
    """The trackers of a run, on the main process; on others there are none, and every method does nothing.

    A tracker that fails is told of once, by `warn`, and left out from then on: no run ends for it. A run that is
    resumed goes on under the same id, and what it repeats is not sent again, so steps only grow.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self._file = folder / FILE
        self._warn = warn
        self._running: list = []  # Accelerate's
        self._resumed: set[str] = set()  # those that have rows of this run from before
        self._last_step, self._last_names = -1, set()
        self._names: dict[str, str] = {}  # as MLflow takes them, by ours

    def __bool__(self) -> bool:
        return bool(self._running)

    def start(self, accelerator, project: str, flags: dict, resumed: bool) -> None:
        """Raises what a tracker that cannot be started raises; those started before it wait for finish(). `resumed`:
        this run goes on with that of the folder, and so it does in the trackers."""
        ids = self._ids() if resumed else {}
        try:
            accelerator.init_trackers(project, init_kwargs=self._init_kwargs(ids))
        finally:
            # Taken from Accelerate, whose end_training() passes on what a tracker raises. One that was not started has
            # no `tracker`.
            self._running = [tracker for tracker in accelerator.trackers if hasattr(tracker, "tracker")]
            accelerator.trackers = []
        # The environment may have named another run.
        self._resumed = {t.name for t in self._running if t.name in ids and ids[t.name] == _run_id(t)}
        for tracker in self._running:
            if tracker.name != "mlflow" or tracker.name not in self._resumed:  # which takes no flag a second time
                tracker.store_init_configuration(flags)
        self._each(self._set_up)
        if self._running:
            ids |= {tracker.name: _run_id(tracker) for tracker in self._running}
            with contextlib.suppress(OSError):  # only a resumed run would need it
                self._file.write_text(json.dumps(ids))

    def _ids(self) -> dict[str, str | None]:
        try:
            ids = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return ids if isinstance(ids, dict) else {}

    def _init_kwargs(self, ids: dict[str, str | None]) -> dict[str, dict]:
        wandb_id = os.environ.get("WANDB_RUN_ID") or ids.get("wandb") or uuid.uuid4().hex[:8]
        kwargs = {"wandb": {"id": wandb_id, "resume": "allow"}}
        if ids.get("mlflow"):
            kwargs["mlflow"] = {"run_id": ids["mlflow"]}
        if ids.get("trackio"):
            kwargs["trackio"] = {"name": ids["trackio"], "resume": "allow"}
        return kwargs

    def _set_up(self, tracker) -> None:
        if tracker.name == "wandb":
            for names, summary in SUMMARIES.items():
                tracker.tracker.define_metric(names, summary=summary)

    def sent(self, rows: Sequence[dict]) -> None:
        """Rows of metrics.jsonl of the run so far: what trackers have of it already."""
        self._last_step = max((row["step"] for row in rows), default=-1)
        self._last_names = {name for row in rows if row["step"] == self._last_step for name in row}

    def _is_repeated(self, tracker, step: int, names: Sequence[str] = ()) -> bool:
        if tracker.name not in self._resumed:
            return False
        return step < self._last_step or (step == self._last_step and bool(names) and self._last_names >= {*names})

    def metrics(self, step: int, row: dict[str, float]) -> None:
        def send(tracker):
            if not self._is_repeated(tracker, step, row):
                tracker.log(self._legal(row) if tracker.name == "mlflow" else row, step=step)

        self._each(send)

    def _legal(self, row: dict[str, float]) -> dict[str, float]:
        """With names that MLflow takes, as different as they were."""
        new = [name for name in row if name not in self._names]
        for name in new:
            legal = re.sub(ILLEGAL, "_", name)
            if len(legal) > LONGEST:
                legal = f"{legal[: LONGEST - 9]}_{zlib.crc32(ascii(name).encode()):08x}"
            while legal in self._names.values():
                legal += "_"
            self._names[name] = legal
        changed = [f"{name!r} is {self._names[name]!r}" for name in new if self._names[name] != name]
        if changed:
            self._warn(f"--report_to mlflow: names that it does not take are changed: {', '.join(changed)}")
        return {self._names[name]: value for name, value in row.items()}

    def image(self, name: str, step: int, file: Path, picture: Image, examples: Sequence[Example], class_names):
        """A picture, which `file` holds too. Where boxes can be switched on and off, its `examples` instead."""

        def send(tracker):
            if self._is_repeated(tracker, step):
                return
            if tracker.name == "wandb" and examples:
                tracker.log({name: [_wandb_image(example, class_names) for example in examples]}, step=step)
            elif hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)
            elif hasattr(tracker, "log_artifact"):
                tracker.log_artifact(str(file), f"{os.path.dirname(name)}/step_{step}")

        self._each(send)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        def send(tracker):
            if hasattr(tracker, "log_table") and not self._is_repeated(tracker, step):
                tracker.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)

        self._each(send)

    def finish(self, failed: bool = False) -> None:
        """`failed`: as a run that failed, in trackers that know such a thing."""

        def finish(tracker):
            if failed and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)
            elif failed and tracker.name == "mlflow":
                import mlflow  # is there, for it is running

                mlflow.end_run("FAILED")
            else:
                tracker.finish()

        self._each(finish)
        self._running = []

    def _each(self, send: Callable) -> None:
        for tracker in list(self._running):
            try:
                send(tracker)
            except Exception as error:  # each tracker has errors of its own
                self._running.remove(tracker)
                self._warn(f"--report_to {tracker.name}: left out from now on ({error!r})")


def _run_id(tracker) -> str | None:
    """What the tracker's service calls this run; None if it has no such thing."""
    if tracker.name == "wandb":
        return tracker.tracker.id
    if tracker.name == "mlflow":
        return tracker.tracker.info.run_id
    return tracker.tracker.name if tracker.name == "trackio" else None


def _wandb_image(example: Example, class_names: Sequence[str]):
    """Two layers of boxes, which wandb can filter by class and score."""
    import wandb  # is there, for it is running

    def layer(boxes, labels, scores=None) -> dict:
        data = [
            {
                "position": dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True)),
                "domain": "pixel",
                "class_id": label,
                "box_caption": class_names[label],
            }
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
        ]
        if scores is not None:
            for entry, score in zip(data, scores.tolist(), strict=True):
                entry |= {"box_caption": f"{entry['box_caption']} {score:.2f}", "scores": {"score": score}}
        return {"box_data": data, "class_labels": dict(enumerate(class_names))}

    layers = {
        "ground_truth": layer(example.boxes, example.labels),
        "predictions": layer(example.found_boxes, example.found_labels, example.scores),
    }
    return wandb.Image(example.image, boxes=layers)
