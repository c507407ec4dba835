"""The texts of a report."""

METRIC_DESCRIPTIONS = {
    "AP": "mean over classes and IoU thresholds 0.50 to 0.95, the main COCO metric",
    "AP50": "AP at IoU 0.50",
    "AP75": "AP at IoU 0.75",
    "AP_small": "AP of objects smaller than 32 x 32 pixels",
    "AP_medium": "AP of objects between 32 x 32 and 96 x 96 pixels",
    "AP_large": "AP of objects larger than 96 x 96 pixels",
    "AR_1": "recall with 1 prediction per image and class",
    "AR_10": "recall with 10 predictions per image and class",
    "AR_100": "recall with 100 predictions per image and class",
    "AR_small": "AR_100 of small objects",
    "AR_medium": "AR_100 of medium objects",
    "AR_large": "AR_100 of large objects",
}
# Caption and alternative text of each figure.
FIGURE_TEXTS = {
    "classes": (
        "AP rewards accurate boxes, AP50 accepts loose ones. Start with classes that have many objects and a low AP: "
        "check their labels, and add training images.",
        "Bars: AP and AP50 of each class",
    ),
    "precision_recall": (
        "Precision is the share of predictions that are correct, recall the share of objects that are found. A curve "
        "that ends early means missed objects; one that drops early means wrong predictions with high scores. A large "
        "gap between the two IoU thresholds means inaccurate boxes.",
        "Curves: precision against recall",
    ),
    "sizes": (
        "If small objects have a low AP, train with a larger --image_size. If images with many objects have a low "
        "AP, add such images or raise --max_objects.",
        "Bars: AP and AP50 by size of the object and by number of objects in the image",
    ),
    "errors": (
        "AP50 gained if all errors of a type were corrected. The gains do not add up.",
        "Bars: AP50 gained by correcting each type of error",
    ),
    "confusion": (
        "Rows are true classes, columns predicted classes. The last column holds missed objects, the last row "
        "predictions where no object is. Each row sums to 1.",
        "Confusion matrix: true class against predicted class",
    ),
    "calibration": (
        "Share of correct predictions (IoU 0.5) by score. On the diagonal, a score is the probability of being "
        "correct. Below it the model is overconfident, above it underconfident. Calibration does not change AP.",
        "Reliability diagram: share of correct predictions against score",
    ),
}
ERROR_DESCRIPTIONS = {
    "classification": "IoU with an object is at least 0.5, but the class is wrong.",
    "localization": "The class is right, but the IoU is only 0.1 to 0.5.",
    "both": "The class is wrong and the box is inaccurate.",
    "duplicate": "The object is already found by a prediction with a higher score.",
    "background": "No object is there (IoU at most 0.1), or its label is missing.",
    "missed": "No prediction finds the object, not even with a wrong class or box.",
}
NO_OBJECTS = "The images have no objects, so AP is not defined."
NO_IMAGES = "Examples need the images: use --checkpoint instead of --predictions."
NO_EXAMPLES = "There are no errors with a score worth showing, or the images cannot be read."
EXAMPLE_COLORS = "Blue: the target. Orange: the error. Errors with the highest scores come first."
MISSING_EXAMPLES = "Not shown: {types}. There are no such errors with a score of at least {score}."
THRESHOLD = (
    "The matrix counts predictions with a score of at least {score}. This threshold has the best F1 ({F1:.3f}): "
    "precision {precision:.3f}, recall {recall:.3f}. Use it as a first threshold in applications."
)
NO_THRESHOLD = "The matrix counts all predictions: none is correct at IoU 0.5, so no score threshold is useful."
FOOTER = (
    "AP and AR equal those of pycocotools. Error types follow TIDE (Bolya et al., 2020) at IoU 0.5. Predictions on "
    "crowds are ignored. report.json holds all numbers, report/ the figures."
)
