"""The files predict.py writes, and the folder they are in, where nothing is lost."""

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pix2seq.errors import UserError
from pix2seq.evaluation import coco_results
from pix2seq.inference import DetectionResult
from pix2seq.models import Pix2SeqConfig

FORMATS = {"coco": ("predictions.json", "images.json"), "yolo": ("classes.txt",), "csv": ("predictions.csv",)}
COLUMNS = ("file_name", "class", "score", "x1", "y1", "x2", "y2")
LIST = "written.ndjson"  # no file of an input has this suffix
GONE = ""  # in place of a file's SHA-256: it could not be written


class ResultFolder:
    """Where predictions are written. LIST in it tells of each file [its name, null] before it is written, and [its
    name, its SHA-256] after that, or "" if it could not be: this is how one that an earlier prediction wrote is known
    from anybody else's.

    files       all that may be written, by their names in the folder; none of them may be there already
    inputs      files that must stay as they are
    overwrite   what earlier predictions wrote is removed, unless it has been changed since

    Raises UserError, before anything is removed.
    """

    def __init__(self, path: Path, files: Sequence[str], inputs: Iterable[str], overwrite: bool):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock()
            noted, there = self._noted(), [file for file in files if os.path.lexists(path / file)]
            digests = {file: _digest(path / file) for file in (noted if overwrite else there) if file in noted}
            earlier = {file for file, digest in digests.items() if digest and noted[file] in (None, digest)}
            sources = {os.path.realpath(file) for file in inputs}
            if lost := [file for file in (*there, *earlier) if os.path.realpath(path / file) in sources]:
                raise self._refusal(lost[:1], "would take the place of an input; name another folder")
            if foreign := [file for file in there if file not in earlier]:
                raise self._refusal(foreign, "is there already, and not as predictions left it; name another folder")
            if there and not overwrite:
                raise self._refusal(there, "is there already; name another folder, or say --overwrite")
            for folder in {path, *((path / file).parent for file in files)}:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            for file in earlier:
                (path / file).unlink()
            # Without a torn line: others follow it.
            os.truncate(path / LIST, 0 if overwrite else (path / LIST).read_bytes().rfind(b"\n") + 1)
        except FileExistsError:
            raise UserError(f"--output_dir {path}: is a file; name a folder") from None
        except OSError as error:
            raise UserError(f"--output_dir {path}: cannot be written to ({error.strerror})") from None

    def _lock(self) -> None:
        """Until the process ends. Not all file systems can; then two at once are the user's to avoid."""
        self._list = (self.path / LIST).open("a")
        try:
            fcntl.flock(self._list, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal([LIST], "is being written by another predict.py; name another folder") from None
        except OSError:
            pass

    @contextlib.contextmanager
    def writing(self, file: str) -> Iterator[Path]:
        """Where to write a file."""
        self._note(file, None)
        try:
            yield self.path / file
        finally:
            self._note(file, _digest(self.path / file) or GONE)

    def _note(self, file: str, digest: str | None) -> None:
        with (self.path / LIST).open("a") as lines:
            lines.write(f"{json.dumps([file, digest])}\n")

    def _noted(self) -> dict[str, str | None]:
        """LIST, but for a last line that is torn: a run was killed at it, or the disk was full."""
        path = self.path / LIST
        lines = path.read_bytes().split(b"\n")[:-1] if os.path.lexists(path) else []
        try:
            noted = {str(file): digest for file, digest in map(json.loads, lines)}
        except (ValueError, TypeError):
            raise self._refusal([LIST], "is not what predict.py writes; name another folder") from None
        if outside := [file for file in noted if Path(file).name != file.removeprefix("labels/")]:
            raise self._refusal([LIST], f"names {outside[0]!r}, which lies elsewhere; name another folder")
        return noted

    def _refusal(self, files: Sequence[str], why: str) -> UserError:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return UserError(f"--output_dir {self.path}: {files[0]}{more} {why}")


def _digest(path: Path) -> str | None:
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def coco_rows(found: DetectionResult, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """Entries of a COCO results file that say the class's name, too."""
    rows = coco_results(image_id, found, category_ids)
    return [row | {"category_name": name} for row, name in zip(rows, found.names, strict=True)]


def write_labels(folder: ResultFolder, found: DetectionResult, name: str) -> None:
    """For YOLO, of each object: class, centre and size as fractions of the picture, score."""
    height, width = found.size
    lines = []
    for label, (x1, y1, x2, y2), score in zip(found.labels, found.boxes, found.scores, strict=True):
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n")
    with folder.writing(f"labels/{name}.txt") as path:
        path.write_text("".join(lines))


def write_results(
    folder: ResultFolder,
    formats: Sequence[str],
    done: Sequence[DetectionResult],
    names: dict[str, str],
    config: Pix2SeqConfig,
) -> None:
    """What the formats say of all pictures together. `names`: of the files that belong to each. `config`: the
    detector's."""
    rows, images, table = [], [], [COLUMNS]
    for number, found in enumerate(done, start=1):
        image = {"id": number, "file_name": found.source, "name": names[found.source]}
        size = {"height": found.size[0], "width": found.size[1]}
        images.append(image | ({"unreadable": found.unreadable} if found.unreadable else size))
        rows += [row | {"file_name": found.source} for row in coco_rows(found, number, config.category_ids)]
        for class_name, score, box in zip(found.names, found.scores, found.boxes, strict=True):
            table.append((found.source, class_name, float(score), *box.tolist()))
    if "coco" in formats:
        for file, content in zip(FORMATS["coco"], (rows, images), strict=True):
            with folder.writing(file) as path:
                path.write_text(json.dumps(content))
    if "yolo" in formats:
        with folder.writing("classes.txt") as path:
            path.write_text("".join(f"{name}\n" for name in config.class_names), "utf-8")
    if "csv" in formats:
        with (
            folder.writing("predictions.csv") as path,
            path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            csv.writer(file).writerows(table)
