"""Limits the number of training images that are replaced because they cannot be read."""

from dataclasses import dataclass, field

from pix2seq.data.coco import Annotations
from pix2seq.data.issues import join_names
from pix2seq.errors import UserError


class TooManyUnreadableError(UserError):
    """More images than allowed are missing or broken. All processes raise it at the same step."""


@dataclass
class UnreadableImages:
    """The training images that cannot be read, the same on all processes.

    Args:
        max_fraction: Largest allowed share of the images.
        num_images: Number of training images.
        lines: "path: reason" of each image.
    """

    max_fraction: float
    num_images: int
    lines: set[str] = field(default_factory=set)

    @classmethod
    def from_annotations(cls, annotations: Annotations, max_fraction: float) -> "UnreadableImages":
        """Starts with the images that are missing before any file is opened.

        Raises:
            TooManyUnreadableError: They are more than the fraction of all images that is allowed.
        """
        lines = {f"{annotations.name(index)}: {error}" for index, error in annotations.bad_images.items()}
        unreadable = cls(max_fraction, len(annotations), lines)
        unreadable.check_limit()
        return unreadable

    def find_new(self, micro_batches: list[dict]) -> set[str]:
        """Returns the lines in batches of `TrainDataset` that are not in `lines`."""
        texts = (text for batch in micro_batches for text in batch["unreadable"])
        return {line for text in texts for line in text.splitlines()} - self.lines

    def check_limit(self) -> None:
        """Raises TooManyUnreadableError if there are more images than allowed."""
        max_count = self.max_fraction * self.num_images
        if len(self.lines) > max_count:
            raise TooManyUnreadableError(
                f"--max_unreadable {self.max_fraction:g}: {len(self.lines)} of {self.num_images} training images are "
                f"missing or broken, at most {int(max_count)} may be: {join_names(sorted(self.lines))}"
            )
