"""Sends metrics and images of a run to Accelerate's trackers: wandb, TensorBoard and others."""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

TRACKERS_FILE = "trackers.json"  # in the run folder: names of the trackers, with the id of the wandb run


class Trackers:
    """The trackers of a run on the main process. On other processes there are none and every method does nothing.

    A tracker that raises is reported once and left out from then on; the run continues. A resumed run continues its
    wandb run, and steps that it repeats are not sent again.

    Args:
        folder: run folder.
        warn: function that prints a message.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self._file = folder / TRACKERS_FILE
        self._warn = warn
        self._running: list = []  # of Accelerate's GeneralTracker
        self._continued: set[str] = set()  # names of the trackers that continue the run of the folder
        self._last_step = -1  # of the rows that a continued run has sent
        self._last_names: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._running)

    def start(self, accelerator, project: str, arguments: dict, resumed: bool) -> None:
        """Starts the trackers named in the accelerator's `log_with`.

        Args:
            accelerator: Accelerate's Accelerator.
            project: project name.
            arguments: arguments of the run, plain values by name.
            resumed: whether the run continues the one in the folder.

        Raises:
            Exception: whatever a tracker raises that cannot be started.
        """
        known = self._read_ids() if resumed else {}
        wandb_id = os.environ.get("WANDB_RUN_ID") or known.get("wandb") or uuid.uuid4().hex[:8]
        try:
            accelerator.init_trackers(project, init_kwargs={"wandb": {"id": wandb_id, "resume": "allow"}})
        finally:
            # Taken from Accelerate, whose end_training() would raise what a tracker raises. A tracker that was not
            # started has no attribute `tracker`.
            self._running = [tracker for tracker in accelerator.trackers if hasattr(tracker, "tracker")]
            accelerator.trackers = []
        ids = {tracker.name: wandb_id if tracker.name == "wandb" else None for tracker in self._running}
        self._continued = {name for name, run_id in ids.items() if name in known and known[name] == run_id}
        for tracker in self._running:
            tracker.store_init_configuration(arguments)
        if ids:
            with contextlib.suppress(OSError):  # only a resumed run would need the file
                self._file.write_text(json.dumps(known | ids))

    def _read_ids(self) -> dict[str, str | None]:
        try:
            return dict(json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def set_sent_rows(self, rows: Sequence[dict]) -> None:
        """Takes the rows of metrics.jsonl that a continued run has sent before it was resumed."""
        self._last_step = max((row["step"] for row in rows), default=-1)
        self._last_names = {name for row in rows if row["step"] == self._last_step for name in row}

    def _was_sent(self, tracker, step: int, names: Sequence[str] = ()) -> bool:
        if tracker.name not in self._continued:
            return False
        return step < self._last_step or (step == self._last_step and bool(names) and self._last_names >= {*names})

    def log_metrics(self, step: int, row: dict[str, float]) -> None:
        """Sends a row of metrics."""

        def send(tracker):
            if not self._was_sent(tracker, step, row):
                tracker.log(row, step=step)

        self._for_each(send)

    def log_image(self, name: str, step: int, image: Image) -> None:
        """Sends an image to the trackers that take images."""

        def send(tracker):
            if hasattr(tracker, "log_images") and not self._was_sent(tracker, step):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)

        self._for_each(send)

    def finish(self) -> None:
        """Ends the run in all trackers."""
        self._for_each(lambda tracker: tracker.finish())
        self._running = []

    def _for_each(self, send: Callable) -> None:
        for tracker in list(self._running):
            try:
                send(tracker)
            except Exception as error:  # each tracker raises errors of its own
                self._running.remove(tracker)
                self._warn(f"--report_to {tracker.name}: left out from now on ({error!r})")
