"""The folder of a training run: configuration, environment, status, metrics, log, samples and evaluations."""

import contextlib
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from PIL import Image
from tqdm import tqdm

import pix2seq
from pix2seq.training.distributed import launcher_id
from pix2seq.training.trackers import Trackers


def _continue_on_disk_error(method):
    """Reports an OSError of a write instead of raising it: a full disk does not end a run."""

    @functools.wraps(method)
    def write(self, *args, **kwargs):
        try:
            method(self, *args, **kwargs)
        except OSError as error:
            with contextlib.suppress(OSError):  # the output may go to the same disk
                tqdm.write(f"{self.path}: {method.__name__} could not be written ({error}); training continues")

    return write


class RunFolder:
    """Writes the files of a run. On ranks other than the main one every write does nothing.

    | file | content |
    |---|---|
    | config.yaml | the arguments, as a recipe |
    | env.json | versions, devices, command |
    | status.json | state, step, reason |
    | metrics.jsonl | one row per logged step |
    | train.log | printed lines |
    | trackers.json | run ids of the trackers |
    | checkpoints/ | see checkpoint.py |
    | best/, final/ | from_pretrained folders |
    | samples/ | images by step |
    | eval/step_x/ | metrics, predictions, images |

    Args:
        path: the folder; it is created by `write_config`.
        is_main: whether this process writes.
    """

    def __init__(self, path: str | Path, is_main: bool):
        self.path = Path(path)
        self.is_main = is_main
        self._unwritten: list[str] = []  # log lines from before the folder was created
        self.trackers = Trackers(self.path, self.log)  # they receive the metrics and images too

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def write_config(self, config_yaml: str, device: torch.device, num_processes: int) -> None:
        """Creates the folder and writes config.yaml and env.json."""
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

    def started_by_this_launch(self) -> bool:
        """Whether the last run in this folder was started by the launcher that started this process."""
        try:
            return json.loads((self.path / "env.json").read_text())["launcher"] == launcher_id()
        except (OSError, ValueError, KeyError):
            return False

    @_continue_on_disk_error
    def status(self, state: str, step: int, reason: str = "") -> None:
        """Replaces status.json atomically. States other than running end the run in the trackers.

        Args:
            state: running, finished, preempted or failed.
            step: optimizer steps taken.
            reason: why the run ended.
        """
        if not self.is_main:
            return
        temporary = self.path / ".status.json"
        try:
            temporary.write_text(json.dumps({"state": state, "step": step, "reason": reason, "time": time.time()}))
            temporary.replace(self.path / "status.json")
        finally:
            if state != "running":
                self.trackers.finish()

    @_continue_on_disk_error
    def log(self, message: str) -> None:
        """Prints a message and appends it to train.log."""
        if not self.is_main:
            return
        self._unwritten.append(message)
        if self.path.is_dir():
            with (self.path / "train.log").open("a") as file:
                file.writelines(f"{line}\n" for line in self._unwritten)
            self._unwritten.clear()
        tqdm.write(message)

    @_continue_on_disk_error
    def metrics(self, step: int, row: dict[str, float]) -> None:
        """Appends a row to metrics.jsonl."""
        if not self.is_main:
            return
        # JSON has no NaN: the gradient norm of a skipped step.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")
        self.trackers.log_metrics(step, row)

    @_continue_on_disk_error
    def evaluation(
        self,
        step: int,
        metrics: dict[str, float],
        predictions: list[dict],
        images: dict[str, Image.Image],
        name: str = "",
    ) -> None:
        """Writes eval/step_x/ and a row of metrics.jsonl.

        Args:
            step: optimizer steps taken.
            metrics: COCO metrics by name.
            predictions: COCO results.
            images: images by name.
            name: name of the model if it is not the trained one: eval/step_x/NAME, eval/NAME/AP and so on.
        """
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
        for image_name, image in images.items():
            image.save(folder / f"{image_name}.png")
            self.trackers.log_image(f"{prefix}{image_name}", step, image)

    @_continue_on_disk_error
    def sample(self, name: str, step: int, image: Image.Image) -> None:
        """Writes samples/NAME_STEP.png."""
        if not self.is_main:
            return
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}_{step:08d}.png")
        self.trackers.log_image(f"samples/{name}", step, image)

    def rewind_metrics(self, step: int, keep_evaluation: bool = True) -> list[dict]:
        """Removes the rows of metrics.jsonl that a run resumed at `step` writes again.

        Args:
            step: step the run is resumed at.
            keep_evaluation: whether the evaluation of that step is kept.

        Returns:
            The rows that are kept; none on ranks other than the main one.
        """
        path = self.path / "metrics.jsonl"
        if not self.is_main or not path.exists():
            return []
        rows = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the line that a killed process was writing
                rows.append(json.loads(line))
        self.trackers.set_sent_rows(rows)
        rows = [row for row in rows if row["step"] <= step]
        if not keep_evaluation:
            rows = [row for row in rows if row["step"] < step or not any(key.startswith("eval/") for key in row)]
        temporary = self.path / ".metrics.jsonl"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)
        return rows


def git_commit() -> str | None:
    """The commit of the code if it is in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
