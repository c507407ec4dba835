"""Detects the plateau of x1: the model has learnt everything but which object begins at a y1."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = 500  # steps that the means below are taken over
# On the plateau: error of x1 in bins, then as a multiple of that of y1, of which it is no better than with the object
# known; errors of y2 and x2 as multiples of that of x1; class accuracy.
MIN_X1_ERROR, MIN_X1_TO_Y1, MAX_SECOND_CORNER, MIN_ACC_REAL = 0.15, 0.8, 0.25, 0.5
FALLING = 0.97  # a run whose error of x1 in the second half of the window is below this share of the mean is not on it
END = 0.5  # the plateau has ended when the error of x1 is below this share of what it was

METRICS = ("train/bin_error_y1", "train/bin_error_x1", "train/bin_error_y2", "train/bin_error_x2", "train/acc_real")


def is_on_plateau(means: Sequence[float], num_bins: int) -> bool:
    """Whether x1 is predicted no better than by chance, while the second corner and the class are learnt.

    A random object's y1 cannot be predicted, but its x1 can be from y1 and the image. Until the decoder does so, the
    error of x1 is that of y1 or larger.

    Args:
        means: means of METRICS.
        num_bins: coordinate bins.
    """
    y1, x1, y2, x2, acc_real = means
    is_x1_at_chance = x1 >= max(MIN_X1_ERROR * num_bins, MIN_X1_TO_Y1 * y1)
    return is_x1_at_chance and max(y2, x2) <= MAX_SECOND_CORNER * x1 and acc_real >= MIN_ACC_REAL


@dataclass
class PlateauHint:
    """Returns a line when a run is on the plateau of x1, and one when the plateau ends; each once.

    Args:
        num_bins: coordinate bins.
        remedies: flags, not used by the run, that end the plateau earlier.
    """

    num_bins: int
    remedies: Sequence[str] = ()
    _rows: deque[tuple[int, list[float]]] = field(default_factory=deque, init=False)
    _x1_error: float | None = field(default=None, init=False)  # on the plateau
    _has_ended: bool = field(default=False, init=False)

    def update(self, row: dict) -> str | None:
        """Takes the next row of metrics.jsonl; rows without METRICS are ignored."""
        if self._has_ended or not all(name in row for name in METRICS):
            return None
        self._rows.append((row["step"], [row[name] for name in METRICS]))
        while len(self._rows) > 1 and self._rows[1][0] <= row["step"] - WINDOW:
            self._rows.popleft()
        if self._rows[0][0] > row["step"] - WINDOW:
            return None
        values = [values for _, values in self._rows]
        means, recent = (
            [sum(column) / len(column) for column in zip(*rows, strict=True)]
            for rows in (values, values[len(values) // 2 :])
        )
        x1 = METRICS.index("train/bin_error_x1")
        x1_error = means[x1]
        if self._x1_error is None:
            if recent[x1] < FALLING * x1_error or not is_on_plateau(means, self.num_bins):
                return None
            self._x1_error = x1_error
            wait = "this plateau can last for thousands of steps"
            if self.remedies:
                wait += f", and in a new run {' and '.join(self.remedies)} may end it earlier"
            return (
                f"hint: x1 is still predicted by chance (train/bin_error_x1 {x1_error:.3g} of {self.num_bins} bins), "
                "while y2, x2 and the class are learnt: the decoder has not found which object begins at y1; wait: "
                f"{wait} (docs/what-to-expect.md)"
            )
        self._has_ended = x1_error < END * self._x1_error
        if not self._has_ended:
            return None
        return f"the plateau of x1 has ended: train/bin_error_x1 is {x1_error:.3g}, it was {self._x1_error:.3g}"
