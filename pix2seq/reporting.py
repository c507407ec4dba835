"""What a run shows of its detectors while it trains: COCO numbers, and pictures of the same few images over time."""

from dataclasses import dataclass

from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.colors import paint
from pix2seq.data import EvalDataset
from pix2seq.decoding import DecodingOptions
from pix2seq.evaluation import predict, prediction_picture
from pix2seq.preemption import StopRequest
from pix2seq.run_folder import RunFolder
from pix2seq.scoring import coco_metrics
from pix2seq.tokenizer import Tokenizer
from pix2seq.visualize import draw_examples

NUM_SAMPLES = 8  # images in every picture


@dataclass
class Reporter:
    """Every rank calls its methods, the main one writes into the run folder. They raise Stopped when any
    rank has been told to `stop`.

    truth   the ground truth of `val_set`: see load_ground_truth
    """

    folder: RunFolder
    accelerator: object
    val_set: EvalDataset
    truth: dict
    options: DecodingOptions
    batch_size: int
    num_workers: int
    stop: StopRequest

    def evaluate(self, detector, step: int, name: str = "") -> dict[str, float] | None:
        """COCO numbers of the validation images; None on other ranks than the main one. `name`: see RunFolder."""
        predictions = self._predict(detector, self.val_set)
        if not self.accelerator.is_main_process:
            return None
        metrics = coco_metrics(self.truth, predictions)
        picture = prediction_picture(self.val_set.annotations, predictions, NUM_SAMPLES)
        self.folder.evaluation(step, metrics, predictions, picture, name)
        return metrics

    def sample(self, detector, step: int) -> None:
        """Ground truth beside predictions, always of the same images."""
        annotations = self.val_set.annotations
        some = annotations.subset(range(min(NUM_SAMPLES, len(annotations))))
        predictions = self._predict(detector, EvalDataset(some, self.val_set.transform))
        if self.accelerator.is_main_process:
            self.folder.sample("predictions", step, prediction_picture(some, predictions, NUM_SAMPLES))

    def show_batch(self, batch: dict, tokenizer: Tokenizer) -> None:
        """What the model is about to learn, decoded back from its tokens: the cheapest detector of data bugs."""
        decoded = [tokenizer.decode(labels.numpy()) for labels in batch["labels"][:NUM_SAMPLES]]
        pixel_values = batch["pixel_values"]
        if "colors" in batch:
            pixel_values = paint(pixel_values, batch["size"], batch["colors"])
        images = [to_pil_image(pixels) for pixels in pixel_values[:NUM_SAMPLES]]
        names = self.val_set.annotations.categories.names
        self.folder.sample("first_batch", 0, draw_examples(images, decoded, names))

    def _predict(self, detector, dataset: EvalDataset) -> list[dict]:
        return predict(
            *(detector, dataset, self.options, self.batch_size, self.accelerator, self.num_workers),
            stop=lambda: bool(self.stop),
            warn=self.folder.log,
        )
