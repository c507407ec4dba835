"""Ground truth beside predictions: the first images, and those a detector is most wrong about."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data import Annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation.coco_metrics import box_ious
from pix2seq.visualization import CELL, GREY, PALETTE, color_of, draw_boxes, enlarge, grid, paragraph, side_by_side

RIGHT, WRONG = PALETTE[1], PALETTE[0]  # sky blue and orange: names in black are legible on both
LEAST_SCORE = 0.3  # of the predictions that count, and are drawn
FOREGROUND = 0.5  # IoU from which a prediction is on an object
COLUMNS = 2  # images in a row
TITLE, NOTHING = f"predictions from score {LEAST_SCORE}", f"nothing scored {LEAST_SCORE} or more"


def prediction_image(annotations: Annotations, predictions: list[dict], count: int):
    """The first `count` images with ground truth on the left and predictions of a score of at least 0.3 on the right.

    One that cannot be read is grey, and where there are no predictions the picture says why.
    """
    names = annotations.categories.names
    label_of_category = {category_id: label for label, category_id in enumerate(annotations.categories.ids)}
    pairs = []
    for index in range(min(count, len(annotations))):
        (boxes, labels), why_empty = annotations.objects(index), NOTHING
        try:
            image = to_pil_image(annotations.image_file(index).pixels())
        except BadImageError:
            why_empty = "cannot be read"
            image, boxes, labels = Image.new("RGB", (CELL, CELL), GREY), boxes[:0], labels[:0]
        large, boxes = enlarge(image, boxes, CELL)
        truth = draw_boxes(large, boxes, [names[label] for label in labels], [color_of(label) for label in labels])
        shown = [p for p in predictions if p["image_id"] == annotations.image_ids[index] and p["score"] >= LEAST_SCORE]
        boxes = np.array([p["bbox"] for p in shown]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [label_of_category[p["category_id"]] for p in shown]
        captions = [f"{names[label]} {p['score']:.2f}" for label, p in zip(labels, shown, strict=True)]
        large, boxes = enlarge(image, boxes, CELL)
        said = draw_boxes(large, boxes, captions, [color_of(label) for label in labels])
        if not shown:
            said = draw_boxes(said, np.zeros((1, 4)), [why_empty], ["white"], width=0)
        pairs.append((truth, said))
    return side_by_side(pairs, title=TITLE)


@dataclass(frozen=True)
class Judged:
    """An image with N objects and those M predictions for it that count, `said`, best score first.

    found (N,) bool   whether a prediction of the object's class is on it, at an IoU of at least 0.5
    right (M,) bool   whether the prediction is on an object of its class. Two on one object are both right
    silent            whether nothing scored enough to count, on a crowd either
    """

    index: int
    said: list[dict]
    found: np.ndarray
    right: np.ndarray
    silent: bool

    @property
    def agreement(self) -> float:
        """Objects found, as a share of all objects and wrong predictions; 1 where there are neither."""
        total = len(self.found) + (~self.right).sum()
        return float(self.found.sum() / total) if total else 1.0

    @property
    def surest_mistake(self) -> float:
        """The highest score of a wrong prediction, 0 without one."""
        return max((row["score"] for row, right in zip(self.said, self.right, strict=True) if not right), default=0.0)


def worst(annotations: Annotations, predictions: list[dict], count: int) -> list[Judged]:
    """At most `count` images with something wrong: half of them those of lowest `agreement` (of equals, those with
    more objects), the others those of the `surest_mistake`. COCO's crowds are neither found nor missed, and what lies
    on them is neither right nor wrong."""
    said: dict[int, list[dict]] = {}
    for row in predictions:
        if row["score"] >= LEAST_SCORE:
            said.setdefault(row["image_id"], []).append(row)
    judged = [
        _judge(annotations, index, said.get(image_id, []))
        for index, image_id in enumerate(annotations.image_ids.tolist())
        if index not in annotations.bad_images
    ]
    lowest = sorted((one for one in judged if one.agreement < 1), key=lambda one: (one.agreement, -len(one.found)))
    surest = sorted((one for one in lowest if one.surest_mistake), key=lambda one: -one.surest_mistake)
    in_order = [*lowest[: (count + 1) // 2], *surest, *lowest]
    return list({one.index: one for one in in_order}.values())[:count]


def _judge(annotations: Annotations, index: int, said: list[dict]) -> Judged:
    boxes, labels = annotations.objects(index)
    of_image = slice(annotations.offsets[index], annotations.offsets[index + 1])
    crowd = annotations.crowd[of_image]
    crowds, labels_of_crowds = annotations.boxes[of_image][crowd], annotations.labels[of_image][crowd]
    on_crowd = _is_on(annotations, said, crowds, labels_of_crowds, crowd=True).any(axis=1)
    on, silent = _is_on(annotations, said, boxes, labels), not said
    counts = on.any(axis=1) | ~on_crowd
    on = on[counts]
    said = [row for row, count in zip(said, counts, strict=True) if count]
    return Judged(index, said, found=on.any(axis=0), right=on.any(axis=1), silent=silent)


def _is_on(annotations: Annotations, said: list[dict], boxes: np.ndarray, labels: np.ndarray, crowd: bool = False):
    """Whether each prediction is on each object, boxes (N, 4) xyxy, and of its class: (M, N) bool."""
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    ids = np.array(annotations.categories.ids)[labels]
    same = np.array([row["category_id"] for row in said], int)[:, None] == ids
    return same & (box_ious([row["bbox"] for row in said], boxes, crowd) >= FOREGROUND)


def worst_image(annotations: Annotations, predictions: list[dict], count: int) -> Image.Image:
    """The `worst` images, the objects on the left and the predictions on the right. One that cannot be read is grey.

    No other images are read.
    """
    shown = worst(annotations, predictions, count)
    if not shown:
        words = f"Every object is found, and no prediction with a score of at least {LEAST_SCORE} is wrong."
        return paragraph(words, 2 * CELL)
    drawn = [_drawn(annotations, one) for one in shown]
    rows = [drawn[start : start + COLUMNS] for start in range(0, len(drawn), COLUMNS)]
    return grid(
        [[image for pictures, _ in row for image in pictures] for row in rows],
        ["ground truth (orange: missed)", f"{TITLE} (orange: wrong)"] * min(COLUMNS, len(drawn)),
        CELL,
        [[words for _, captions in row for words in captions] for row in rows],
    )


def _drawn(annotations: Annotations, one: Judged) -> tuple[list[Image.Image], list[str]]:
    """Both pictures, and what stands over them."""
    name_of = dict(zip(annotations.categories.ids, annotations.categories.names, strict=True))
    boxes, labels = annotations.objects(one.index)
    names = [annotations.categories.names[label] for label in labels]
    said = np.array([row["bbox"] for row in one.said], float).reshape(-1, 4)
    said[:, 2:] += said[:, :2]
    names_said = [f"{name_of[row['category_id']]} {row['score']:.2f}" for row in one.said]
    mistakes = [name for name, right in zip(names_said, one.right, strict=True) if not right]
    captions = [
        f"image {annotations.image_ids[one.index]}: {one.found.sum()} of {len(names)} found",
        f"{len(mistakes)} wrong, the surest: {mistakes[0]}" if mistakes else NOTHING if one.silent else "none wrong",
    ]
    try:
        image = to_pil_image(annotations.image_file(one.index).pixels())
    except BadImageError:
        grey = Image.new("RGB", (CELL, CELL), GREY)
        return [grey, grey], [f"{captions[0]} (cannot be read)", captions[1]]
    return [
        _boxes_on(image, boxes, names, one.found),
        _boxes_on(image, said, names_said, one.right),
    ], captions


def _boxes_on(image: Image.Image, boxes: np.ndarray, names: list[str], good: np.ndarray) -> Image.Image:
    """What is wrong is drawn last, over the rest."""
    large, boxes = enlarge(image, boxes, CELL)
    order = np.argsort(~good, kind="stable")
    return draw_boxes(
        large, boxes[order], [names[row] for row in order], [RIGHT if good[row] else WRONG for row in order]
    )
