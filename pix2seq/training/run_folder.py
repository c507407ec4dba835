"""What a run writes about itself: config, environment, status, metrics and log. See `RunFolder`."""

import contextlib
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import pix2seq
from pix2seq.training.launcher import launcher_id
from pix2seq.training.trackers import Example, Trackers
from pix2seq.visualization import strip

MOST_STEPS = 12  # in the strip


def _survives_a_full_disk(method):
    """A run goes on without what cannot be written, and says so."""

    @functools.wraps(method)
    def write(self, *args, **kwargs):
        try:
            method(self, *args, **kwargs)
        except OSError as error:
            with contextlib.suppress(OSError):  # what is printed may go to the same disk
                tqdm.write(f"{self.path}: {method.__name__} could not be written ({error}); the run goes on")

    return write


class RunFolder:
    """A run's folder. On ranks other than the main one every write is a no-op.

    config.yaml      the flags, as a recipe            checkpoints/   see checkpoint.py
    env.json         versions, devices, command        best/ final/   plain from_pretrained folders
    status.json      state, step, reason               samples/       pictures by step
    metrics.jsonl    one row per logged step           eval/step_x/   metrics, predictions, pictures
    train.log        what was printed                  trackers.json  the run's ids there
    """

    def __init__(self, path: str | Path, is_main: bool):
        self.path = Path(path)
        self.is_main = is_main
        self._unwritten: list[str] = []  # said before the folder was made
        self.trackers = Trackers(self.path, self.log)  # they get the metrics and pictures too

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def describe(self, config_yaml: str, device: torch.device, num_processes: int) -> None:
        """Makes the folder and writes what it takes to run the same again."""
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(config_yaml)
        environment = {
            "command": sys.argv,
            "pix2seq": pix2seq.__version__,
            "commit": git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "num_processes": num_processes,
            "launcher": launcher_id(),
            "num_cpus": os.cpu_count(),
            "num_threads": torch.get_num_threads(),
        }
        (self.path / "env.json").write_text(json.dumps(environment, indent=1))

    def is_of_this_launch(self) -> bool:
        """Whether the last run in this folder was started by the launcher that has started this process."""
        try:
            return json.loads((self.path / "env.json").read_text())["launcher"] == launcher_id()
        except (OSError, ValueError, KeyError):
            return False

    @_survives_a_full_disk
    def status(self, state: str, step: int, reason: str = "") -> None:
        """state: running, finished, preempted or failed. Replaced in one go, so readers never see half of it. All but
        the first end the run in the trackers too."""
        if not self.is_main:
            return
        temporary = self.path / ".status.json"
        try:
            temporary.write_text(json.dumps({"state": state, "step": step, "reason": reason, "time": time.time()}))
            temporary.replace(self.path / "status.json")
        finally:
            if state != "running":
                self.trackers.finish(failed=state == "failed")

    @_survives_a_full_disk
    def log(self, message: str) -> None:
        if not self.is_main:
            return
        self._unwritten.append(message)
        if self.path.is_dir():
            with (self.path / "train.log").open("a") as file:
                file.writelines(f"{line}\n" for line in self._unwritten)
            self._unwritten.clear()
        tqdm.write(message)

    @_survives_a_full_disk
    def metrics(self, step: int, row: dict[str, float]) -> None:
        """A row of metrics.jsonl."""
        if not self.is_main:
            return
        # JSON knows no NaN: the gradient of a step that was skipped has no norm.
        plain = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | plain) + "\n")
        self.trackers.metrics(step, row)

    @_survives_a_full_disk
    def evaluation(
        self,
        step: int,
        metrics: dict[str, float],
        predictions: list[dict],
        pictures: dict[str, Image.Image],
        name: str = "",
        examples: Sequence[Example] = (),
        class_names: Sequence[str] = (),
    ) -> None:
        """What an evaluation found: eval/step_x, and a row of metrics.jsonl. `name` tells the model, if not the one
        that learns: eval/step_x/name, and eval/name/AP and so on. `examples`: of the "predictions", for trackers."""
        if not self.is_main:
            return
        prefix = f"eval/{name}/" if name else "eval/"
        self.metrics(step, {prefix + key: value for key, value in metrics.items()})
        numbers = ", ".join(f"{key} {metrics[key]:.4f}" for key in ("AP", "AP50", "AP75"))
        self.log(f"step {step}{' ' + name if name else ''}: {numbers}")
        folder = self.path / "eval" / f"step_{step}" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        (folder / "predictions.json").write_text(json.dumps(predictions))
        classes = [(key.removeprefix("per_class/"), ap) for key, ap in metrics.items() if key.startswith("per_class/")]
        self.trackers.table(f"{prefix}AP_of_classes", step, ("class", "AP"), classes)
        for what, picture in pictures.items():
            file, shown = folder / f"{what}.png", examples if what == "predictions" else ()
            picture.save(file)
            self.trackers.image(f"{prefix}{what}", step, file, picture, shown, class_names)

    @_survives_a_full_disk
    def sample(
        self,
        name: str,
        step: int,
        picture: Image.Image,
        examples: Sequence[Example] = (),
        class_names: Sequence[str] = (),
    ) -> None:
        """A picture by its step: samples/name_x.png. `examples`: of the picture, for trackers."""
        if not self.is_main:
            return
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}_{step:08d}.png"
        picture.save(file)
        self.trackers.image(f"samples/{name}", step, file, picture, examples, class_names)

    @_survives_a_full_disk
    def strip(self, step: int, number: int) -> None:
        """samples/strip.png: one image, the `number`-th of the samples called predictions, over the steps up to this
        one. Drawn from these samples, so a run that is resumed has those from before too."""
        if not self.is_main:
            return
        found = sorted((self.path / "samples").glob(f"predictions_{'[0-9]' * 8}.png"))
        # Later ones were left by a run that broke off, which this one repeats.
        found = [(at, file) for file in found if (at := int(file.stem[-8:])) <= step]
        chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), MOST_STEPS)).round().astype(int))
        sheets = {}
        for at, file in (found[index] for index in chosen):
            with contextlib.suppress(OSError, SyntaxError):  # half of it, written by a process that was killed
                sheets[at] = Image.open(file).convert("RGB")
        if sheets:
            strip(sheets, number).save(self.path / "samples" / "strip.png")

    def rewind_metrics(self, step: int, keep_evaluation: bool = True) -> None:
        """Drops the rows after `step`, and of its own evaluation if that has to be done again: a run resumed there
        writes them again."""
        path = self.path / "metrics.jsonl"
        if not self.is_main or not path.exists():
            return
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # the line a killed process was writing
        self.trackers.sent(rows)
        rows = [row for row in rows if row["step"] <= step]
        if not keep_evaluation:
            rows = [row for row in rows if row["step"] < step or not any(key.startswith("eval/") for key in row)]
        temporary = self.path / ".metrics.jsonl"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)


def git_commit() -> str | None:
    """The commit of the code, if it lies in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
