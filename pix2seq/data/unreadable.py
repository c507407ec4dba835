"""How many training images may be unusable: each is replaced by another, and too many end the run."""

from dataclasses import dataclass, field

from pix2seq.data.coco import Annotations
from pix2seq.errors import UserError

LISTED = 10


class TooManyUnreadable(UserError):
    """More images than allowed are missing or broken. All ranks raise it at the same step."""


@dataclass
class UnreadableImages:
    """The training images found to be unusable, on all ranks alike: lines of file and reason.

    most   how many of them there may be
    """

    most: float
    lines: set[str] = field(default_factory=set)

    @classmethod
    def from_annotations(cls, annotations: Annotations, share: float) -> "UnreadableImages":
        """Those known before any file is opened. Raises TooManyUnreadable if they are more than a `share`."""
        unreadable = cls(share * len(annotations))
        unreadable.lines |= {f"{annotations.name(index)}: {bad}" for index, bad in annotations.bad_images.items()}
        unreadable.enforce()
        return unreadable

    def new(self, micro_batches: list[dict]) -> set[str]:
        """The lines of TrainDataset's examples that are not known yet."""
        said = {line for batch in micro_batches for text in batch["unreadable"] for line in text.splitlines()}
        return said - self.lines

    def enforce(self) -> None:
        """Raises TooManyUnreadable."""
        if len(self.lines) > self.most:
            shown = sorted(self.lines)
            more = f" and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
            raise TooManyUnreadable(
                f"{len(shown)} training images are missing or broken, more than --max_unreadable allows "
                f"({self.most:.4g}): {'; '.join(shown[:LISTED])}{more}"
            )
