"""Which of two detectors is better, and whether that can be told from so many images: a paired bootstrap.

A resample draws as many images as there are, with replacement, the same for both. Matches are computed once; a
resample only counts some images several times and others not at all.
"""

from dataclasses import dataclass

import numpy as np

from pix2seq.data.issues import sanitize
from pix2seq.evaluation.coco_metrics import class_names, remap_ids
from pix2seq.evaluation.report.matching import IOUS, Matches, match
from pix2seq.progress import progress

RECALLS = np.linspace(0, 1, 101)
FEWEST_RESAMPLES = 100  # of fewer, an interval's ends are two or three resamples
FEWEST_IMAGES = 20  # of fewer, noise is called a difference more often than in one case of twenty
INTERVAL = (2.5, 97.5)  # percentiles


class BootstrapAP:
    """AP of a resample of the images, given how often each has been drawn."""

    def __init__(self, matches: Matches):
        self.image, self.num_classes = matches.image, matches.num_classes
        self.object_image = matches.object_image[matches.counted]
        self.object_label = matches.object_label[matches.counted]
        self.starts = np.searchsorted(matches.label, np.arange(self.num_classes))  # of classes among the predictions
        self.rows = []  # of each IoU: true positives, their classes; ignored ones, how many of them before each
        for right, ignored in zip(matches.right, matches.ignored, strict=True):
            hits, passed = np.flatnonzero(right), np.flatnonzero(ignored)
            before = [np.searchsorted(passed, places) for places in (hits, self.starts)]
            self.rows.append((hits, matches.label[hits], passed, *before))

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Counts (images,) -> AP (10, classes), NaN of a class without objects."""
        weight = counts[self.image]
        objects = np.bincount(self.object_label, counts[self.object_image], self.num_classes)
        every, ap = _cumulated(weight), np.full((len(IOUS), self.num_classes), np.nan)
        for row, (hits, label, passed, before_hit, before_class) in enumerate(self.rows):
            skipped = _cumulated(weight[passed])
            seen = every[hits + 1] - skipped[before_hit] - (every[self.starts] - skipped[before_class])[label]
            precision = _average_precision(weight[hits], seen, label, objects)
            ap[row, objects > 0] = precision[objects > 0]
        return ap


def _cumulated(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(values)])


def _average_precision(weight: np.ndarray, seen: np.ndarray, label: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """COCO's AP of each class, given its `objects` (classes,). Of true positives, sorted by class, then score: how
    often each counts, the predictions of its class seen up to it, its class.

    Precision has its maxima there, and recall grows nowhere else: the false positives between them need no look.
    """
    before = np.searchsorted(label, np.arange(len(objects)))  # of each class
    total = _cumulated(weight)
    found = total[1:] - total[before][label]
    precision = np.divide(found, seen, out=np.zeros(len(found)), where=seen > 0)
    # The highest precision from here on, in the class: classes are set apart, so that a maximum ends where they do.
    apart = 2.0 * (len(objects) - label)
    highest = np.maximum.accumulate((precision + apart)[::-1])[::-1] - apart
    # How many of COCO's recalls are first reached here. 0 is reached by the first, whether it is drawn or not.
    reached = np.searchsorted(RECALLS, found / np.maximum(objects, 1)[label], side="right")
    new = np.diff(reached, prepend=0)
    first = before[before < len(label)]
    new[first] = reached[first]
    return np.bincount(label, highest * new, len(objects)) / len(RECALLS)


def common_truth(a: dict, b: dict) -> tuple[dict | None, str]:
    """One ground truth for both, if they have the same images and objects and no id is two classes; else None and what
    differs. A detector's has its classes, which may be more than those of the file."""
    for what, keys in (("images", ("id",)), ("annotations", ("image_id", "category_id", "bbox", "area", "iscrowd"))):
        one, other = (sorted([entry[key] for key in keys] for entry in truth[what]) for truth in (a, b))
        if one != other:
            return None, what
    categories = {entry["id"]: entry for entry in (*b["categories"], *a["categories"])}
    if any(categories[entry["id"]]["name"] != entry["name"] for entry in b["categories"]):
        return None, "classes"
    return a | {"categories": [categories[key] for key in sorted(categories)]}, ""


@dataclass
class Row:
    """A number of both, their difference B - A, and the interval that holds 95 % of the resamples' differences."""

    name: str
    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.b - self.a


def compare(truth: dict, a: list[dict], b: list[dict], resamples: int = 1000, seed: int = 0) -> list[Row]:
    """AP, AP50, AP75, then the AP of each class; NaN where there is nothing to find. Both have been checked."""
    names = [name for _, name in sorted(class_names(truth).items())]
    scorers = [BootstrapAP(match(*remap_ids(truth, predictions))) for predictions in (a, b)]
    num_images = len(truth["images"])
    whole = [_rows(scorer(np.ones(num_images, int))) for scorer in scorers]
    rng = np.random.default_rng(seed)
    differences = np.empty((resamples, len(whole[0])))
    for number in progress(range(resamples), "comparing"):
        counts = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        first, second = (_rows(scorer(counts)) for scorer in scorers)
        differences[number] = second - first
    low, high = _percentiles(differences)
    return [Row(*map(_plain, row)) for row in zip(["AP", "AP50", "AP75", *names], *whole, low, high, strict=True)]


def _plain(value):
    return value if isinstance(value, str) else float(value)


def _rows(ap: np.ndarray) -> np.ndarray:
    """AP (10, classes) -> AP, AP50, AP75 and the AP of each class (3 + classes,)."""
    present = ~np.isnan(ap[0])
    if not present.any():
        return np.full(3 + ap.shape[1], np.nan)
    means = ap[:, present].mean(axis=1)
    return np.array([means.mean(), means[0], means[5], *ap.mean(axis=0)])


def _percentiles(differences: np.ndarray) -> np.ndarray:
    """(2, columns); a class may be missing from some resamples, and is NaN if it is missing from all."""
    bounds = np.full((2, differences.shape[1]), np.nan)
    for column, values in enumerate(differences.T):
        if (present := values[~np.isnan(values)]).size:
            bounds[:, column] = np.percentile(present, INTERVAL)
    return bounds


def summary_line(row: Row, num_images: int) -> str:
    """One sentence. Of a few images, intervals by resampling are too narrow to go by."""
    if num_images < FEWEST_IMAGES:
        return (
            f"no difference can be told by {num_images} images, at least {FEWEST_IMAGES} are needed: "
            f"B - A is {row.difference:.3f} AP"
        )
    interval = "(95 % interval {:.3f} to {:.3f})"
    if row.low > 0:
        return f"B is better by {row.difference:.3f} AP {interval.format(row.low, row.high)}"
    if row.high < 0:
        return f"A is better by {-row.difference:.3f} AP {interval.format(-row.high, -row.low)}"
    return f"no difference can be told: B - A is {row.difference:.3f} AP {interval.format(row.low, row.high)}"


def table(rows: list[Row]) -> str:
    """For a terminal; a star where the interval leaves out 0."""
    names = [sanitize(row.name) for row in rows]
    width = max(map(len, names))
    lines = [f"{'':<{width}}{'A':>9}{'B':>9}{'B - A':>9}   95 % interval"]
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        if number == 3:
            lines.append("AP by class")
        told = " *" if row.low > 0 or row.high < 0 else ""
        if np.isnan(row.a):
            lines.append(f"{name:<{width}}   no objects")
            continue
        values = f"{row.a:>9.3f}{row.b:>9.3f}{row.difference:>+9.3f}"
        lines.append(f"{name:<{width}}{values}   {row.low:+.3f} to {row.high:+.3f}{told}")
    return "\n".join(lines)
