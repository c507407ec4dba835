"""Progress of long work: a bar on a terminal, now and then a line elsewhere."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS = 30.0  # between two lines


def progress(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """The items, with word of how many have been dealt with: on standard error, none of it for what is quick.
    `total`: len(items) by default, infinity where nobody knows."""
    total = len(items) if total is None else total
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    of = f" of {total}" if total < math.inf else ""
    told = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - told >= SECONDS:
            print(f"{what}: {number}{of}", file=sys.stderr, flush=True)
            told = time.monotonic()
        yield item
