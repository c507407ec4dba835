"""What the report says of its figures, to somebody who sees them for the first time: how to read them, what to do."""

CAPTIONS = {
    "classes": (
        "Long bars are good; the dark one is strict about where a box lies, the light one is not. Begin with "
        "the worst classes that have many objects: look at their examples below and at their labels, and add "
        "training images."
    ),
    "precision_recall": (
        "From left to right the score from which a box counts is lowered: more objects are found, and more "
        "boxes are wrong. A curve that ends early misses objects; one that falls early is sure of wrong "
        "boxes. A large gap between the two IoUs means that objects are found, but boxed loosely."
    ),
    "sizes": (
        "AP (strict about where a box lies) and AP50 (not) of parts of the data. Poor on small objects: train "
        "with a larger --image_size. Poor on full images: more images like these, or a larger --max_objects."
    ),
    "confusion": (
        "A row is what is there, a column what the detector says: the diagonal is right. Elsewhere in a row, "
        "it says another class (look at the labels of both) or nothing (missed); the last row is boxes where "
        "nothing is."
    ),
    "errors": (
        "Left: what AP50 would gain if this kind of error did not exist; the longest bar is where work pays "
        "most. Right: how many there are, and in brackets those of a score that counts; the others cost "
        "little. The gains do not add up."
    ),
    "calibration": (
        "On the dotted line a score is a probability: of boxes with score 0.8, 80 % are right. Below it the "
        "detector is too sure, above it not sure enough; points of few boxes (right) lie where they do by "
        "chance. It changes no AP, but what a threshold on the score means."
    ),
    "kept": (
        "What is left if only the predictions of an image with the best scores are kept. Where the curve is "
        "flat, more of them change nothing. (--max_objects keeps those that are written first: not the same.)"
    ),
}
ALTERNATIVES = {  # for who cannot see them
    "classes": "Bars: AP and AP50 of each class",
    "precision_recall": "Curves: precision against recall",
    "sizes": "Bars: AP and AP50 by size of the object and by number of objects in the image",
    "confusion": "Table in shades: true class against predicted class",
    "errors": "Bars: AP50 gained by correcting each kind of error, and number of errors",
    "calibration": "Curve: share of right predictions against score; bars: predictions of each score",
    "kept": "Curves: AP and AP50 against the number of predictions kept of each image",
}
EXAMPLES = {
    "classification": (
        "Well placed, but the wrong class (IoU with the object at least 0.5). Often two classes that look "
        "alike, or labels that disagree."
    ),
    "localisation": (
        "The right class, but badly placed (IoU 0.1 to 0.5). Loose labels, too few coordinate bins or too "
        "small a canvas make these; so do boxes around two objects at once."
    ),
    "both": "The wrong class and badly placed.",
    "duplicate": "An object that a better-scored box of the same class has found already.",
    "background": "Nothing is there that has a label. Look closely: a forgotten label looks the same.",
    "missed": (
        "An object that is not found, not even by a badly placed or misnamed box; the largest first. Are there "
        "such objects in the training images?"
    ),
}
MEANINGS = {
    "AP": "mean over classes and IoU thresholds 0.5 to 0.95: the number detectors are ranked by",
    "AP50": "a box is right from IoU 0.5 on",
    "AP75": "a box is right from IoU 0.75 on",
    "AP_small": "objects below 32 x 32 pixels",
    "AP_medium": "objects of 32 x 32 to 96 x 96 pixels",
    "AP_large": "objects above 96 x 96 pixels",
    "AR_1": "recall with one box per class and image",
    "AR_10": "recall with ten boxes per class and image",
    "AR_100": "recall with a hundred boxes per class and image",
    "AR_small": "AR_100 of small objects",
    "AR_medium": "AR_100 of medium objects",
    "AR_large": "AR_100 of large objects",
}
LOST_TO = {
    "classification": "boxes of the wrong class",
    "localisation": "boxes of the right class that are badly placed",
    "both": "boxes that are badly placed and of the wrong class",
    "duplicate": "duplicates",
    "background": "boxes where nothing is",
    "missed": "objects that are not found at all",
}
NO_PICTURES = (
    "There are no pictures here: predictions were scored against an annotation file, without the images. With "
    "--checkpoint, the report shows examples of each kind of error."
)
UNREADABLE = "There is no picture here: there are no errors of a score worth showing, or their images cannot be read."
COLORS = (
    "Thick and blue, named above: the truth. Thin and orange, named below: what is wrong. The surest errors "
    "come first, four images at most."
)
NONE_OF_A_KIND = (
    "Not shown: {kinds}. There are none, or none with a score of {score} or more, or their images cannot be read."
)
FOOTER = (
    "AP, AP by class and precision are pycocotools' numbers. Kinds of errors follow TIDE (Bolya et al., "
    "2020), at IoU 0.5, background up to 0.1. Crowds are neither right nor wrong anywhere. report.json has "
    "every number, report/ every figure."
)
THRESHOLD = (
    "Counted are boxes with a score of at least {score}, where precision ({precision:.3f}) and recall "
    "({recall:.3f}) are in the best balance (F1 {F1:.3f}): a threshold to start with when you use the "
    "detector. Best score first, a box takes the object it overlaps most, from IoU 0.5 on, whatever its "
    "class."
)
AT_THRESHOLD = (
    "With boxes of score {score} and above, {recall:.0%} of the objects are found, and {precision:.0%} of the "
    "boxes are right (IoU 0.5)."
)
NONE_RIGHT = "No box is right, whatever its score (IoU 0.5)."
NOTHING_RIGHT = (
    "Counted are all boxes, whatever their score. None of them is right at IoU 0.5, so there is no threshold to go "
    "by. Best score first, a box takes the object it overlaps most, from IoU 0.5 on, whatever its class."
)
DUPLICATES = (
    "{count:,} of {total:,} predictions lie, at IoU 0.5, on an object that a better-scored one of the same "
    "class has found already. Without them AP would be {without[AP]:.3f} instead of {before[AP]:.3f}, and "
    "AP50 {without[AP50]:.3f} instead of {before[AP50]:.3f}. Where AP falls, some of the duplicates are "
    "better placed than the boxes that were scored higher. Little gained means that no suppression of "
    "overlapping boxes is needed."
)
