"""Progress of long loops: a bar on a terminal, otherwise a line every half minute."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0


def progress(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Yields the items and reports on standard error how many are done. Quick loops print nothing.

    Args:
        items: The items.
        description: Name of the work.
        total: Number of items, infinity if unknown. Default: `len(items)`.
    """
    if total is None:
        total = len(items)  # type: ignore[arg-type]  # callers give `total` for iterables without a length
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, leave=False)
        return
    of_total = f" of {total}" if total < math.inf else ""
    last_line = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            print(f"{description}: {number}{of_total}", file=sys.stderr, flush=True)
            last_line = time.monotonic()
        yield item
