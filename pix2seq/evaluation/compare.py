"""Compares two models with a paired bootstrap over the images.

A resample draws as many images as there are, with replacement, the same for both models. Predictions are matched once;
a resample only weights the images by how often they were drawn.

hotcoco.compare is not used: its resamples count an image that was drawn several times once, so its intervals are about
a quarter too narrow (`test_hotcoco_intervals_are_too_narrow`), and it has none for single classes.
"""

from dataclasses import dataclass

import numpy as np

from pix2seq.data.issues import sanitize
from pix2seq.evaluation.coco_metrics import class_names, remap_ids
from pix2seq.evaluation.report.matching import IOU_THRESHOLDS, Matches, match
from pix2seq.progress import progress

RECALLS = np.linspace(0, 1, 101)
MIN_RESAMPLES = 100  # with fewer, the ends of an interval depend on two or three resamples
MIN_IMAGES = 20  # with fewer, bootstrap intervals are too narrow
PERCENTILES = (2.5, 97.5)


class BootstrapAP:
    """Computes COCO's AP of a resample of the images.

    Args:
        matches: Matches of predictions and objects.
    """

    def __init__(self, matches: Matches):
        order = np.lexsort((matches.image, -matches.score, matches.label))
        ends = np.searchsorted(matches.label[order], np.arange(matches.num_classes), side="right")
        self.classes = []
        for indices in np.split(order, ends[:-1]):
            correct, ignored = matches.correct[:, indices], matches.ignored[:, indices]
            # Precision is highest and recall increases at true positives: the other predictions are only counted.
            hits, skipped = (np.flatnonzero(mask.any(axis=0)) for mask in (correct, ignored))
            self.classes.append(
                {
                    "image": matches.image[indices],
                    "hits": hits,
                    "correct": correct[:, hits],
                    "skipped": skipped,
                    "ignored": ignored[:, skipped],
                }
            )
        self.object_image = matches.object_image[~matches.is_crowd]
        self.object_label = matches.object_label[~matches.is_crowd]

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Computes the AP at each IoU threshold.

        Args:
            counts: int (images,), how often each image was drawn.

        Returns:
            (10, classes), NaN for a class without objects in the resample.
        """
        num_objects = np.bincount(self.object_label, counts[self.object_image], len(self.classes))
        ap = np.full((len(IOU_THRESHOLDS), len(num_objects)), np.nan)
        for label in np.flatnonzero(num_objects):
            ap[:, label] = _average_precision(**self.classes[label], counts=counts, num_objects=num_objects[label])
        return ap


def _average_precision(
    image: np.ndarray,
    hits: np.ndarray,
    correct: np.ndarray,
    skipped: np.ndarray,
    ignored: np.ndarray,
    counts: np.ndarray,
    num_objects: float,
) -> np.ndarray:
    """Computes the AP (10,) of one class.

    Args:
        image: int (P,), image index of each prediction, highest score first.
        hits: int (H,), predictions that are correct at any IoU threshold.
        correct: bool (10, H).
        skipped: int (I,), predictions that are ignored at any IoU threshold.
        ignored: bool (10, I).
        counts: int (images,), how often each image was drawn.
        num_objects: Number of objects in the resample.
    """
    weights = counts[image]
    num_ignored = np.cumsum(np.pad(ignored * weights[skipped], ((0, 0), (1, 0))), axis=1)
    predicted = np.cumsum(weights)[hits] - num_ignored[:, np.searchsorted(skipped, hits)]
    true_positives = np.cumsum(correct * weights[hits], axis=1)
    precision = true_positives / np.maximum(predicted, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = true_positives / num_objects
    positions = [np.searchsorted(row, RECALLS) for row in recall]
    return np.array([row[at[at < len(row)]].sum() for row, at in zip(precision, positions, strict=True)]) / len(
        RECALLS
    )


@dataclass
class Comparison:
    """One metric of both models, with the interval of the difference B - A that holds 95 % of the resamples.

    `low` and `high` are NaN if there is no interval.
    """

    name: str
    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def compare(
    ground_truth: dict, a: list[dict], b: list[dict], resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """Compares two models.

    Args:
        ground_truth: COCO annotations from `load_ground_truth`.
        a: Predictions of model A that `check_predictions` accepts.
        b: Predictions of model B.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        AP, AP50, AP75, then the AP of each class; NaN for a class without objects. With fewer than `MIN_IMAGES`
        images, there are no intervals.
    """
    names = [name for _, name in sorted(class_names(ground_truth).items())]
    models = [BootstrapAP(match(*remap_ids(ground_truth, predictions))) for predictions in (a, b)]
    num_images = len(ground_truth["images"])
    metrics_a, metrics_b = (_summarize(model(np.ones(num_images, int))) for model in models)
    rng = np.random.default_rng(seed)
    if num_images < MIN_IMAGES:
        resamples = 0
    differences = np.empty((resamples, len(metrics_a)))
    for number in progress(range(resamples), "comparing"):
        counts = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        first, second = (_summarize(model(counts)) for model in models)
        differences[number] = second - first
    low, high = np.full((2, len(metrics_a)), np.nan)
    for column, values in enumerate(differences.T):
        values = values[~np.isnan(values)]  # a class may be missing from some resamples
        if values.size:
            low[column], high[column] = np.percentile(values, PERCENTILES)
    columns = (values.tolist() for values in (metrics_a, metrics_b, low, high))
    return [Comparison(*values) for values in zip(["AP", "AP50", "AP75", *names], *columns, strict=True)]


def _summarize(ap: np.ndarray) -> np.ndarray:
    """AP (10, classes) -> AP, AP50, AP75 and the AP of each class (3 + classes,)."""
    with_objects = ~np.isnan(ap[0])
    if not with_objects.any():
        return np.full(3 + ap.shape[1], np.nan)
    means = ap[:, with_objects].mean(axis=1)
    return np.array([means.mean(), means[0], means[5], *ap.mean(axis=0)])


def common_ground_truth(a: dict, b: dict) -> tuple[dict | None, str]:
    """Returns one ground truth for both models, or None and what differs.

    Images and objects must be equal, and a category id must have one name. The ground truth of a model has the classes
    of the model, so one of the two may have more classes.
    """
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    for part, part_keys in (("images", ("id",)), ("annotations", keys)):
        first, second = (sorted([entry[key] for key in part_keys] for entry in truth[part]) for truth in (a, b))
        if first != second:
            return None, part
    categories = {category["id"]: category for category in (*b["categories"], *a["categories"])}
    if any(categories[category["id"]]["name"] != category["name"] for category in b["categories"]):
        return None, "classes"
    return a | {"categories": [categories[key] for key in sorted(categories)]}, ""


def summary_line(ap: Comparison, num_images: int) -> str:
    """Summarizes the comparison of AP in one line."""
    interval = f"95 % interval {ap.low:+.3f} to {ap.high:+.3f}"
    if num_images < MIN_IMAGES:
        return f"too few images for an interval (at least {MIN_IMAGES}): B - A is {ap.difference:+.3f} AP"
    if not ap.is_significant:
        return f"no significant difference: B - A is {ap.difference:+.3f} AP ({interval})"
    return f"{'B' if ap.low > 0 else 'A'} is better: B - A is {ap.difference:+.3f} AP ({interval})"


def comparison_table(comparisons: list[Comparison]) -> str:
    """Formats the comparisons for a terminal, with a star where the interval excludes 0."""
    names = [sanitize(comparison.name) for comparison in comparisons]
    width = max(map(len, names))
    has_intervals = not np.isnan([comparison.low for comparison in comparisons]).all()
    lines = [f"{'':<{width}}{'A':>9}{'B':>9}{'B - A':>9}{'   95 % interval' * has_intervals}"]
    for index, (name, row) in enumerate(zip(names, comparisons, strict=True)):
        if index == 3:
            lines.append("AP by class")
        if np.isnan(row.a):
            lines.append(f"{name:<{width}}   no objects")
            continue
        interval = f"   {row.low:+.3f} to {row.high:+.3f}" if has_intervals else ""
        values = f"{row.a:>9.3f}{row.b:>9.3f}{row.difference:>+9.3f}{interval}"
        lines.append(f"{name:<{width}}{values}{' *' * row.is_significant}")
    return "\n".join(lines)
