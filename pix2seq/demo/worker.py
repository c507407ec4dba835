"""Where the detector is asked: pictures come one after the other, and what is written can be read meanwhile.

One thread writes, at full speed, and is all that ever touches the model. Who reads how fast is nothing to it.
"""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data.image_files import BadImageError
from pix2seq.generation import Interrupted, NonFiniteLogits, write
from pix2seq.generation.decoding_state import DecodingState
from pix2seq.inference.predictor import Pix2Seq, open_image
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.transforms import EvalTransform, resized_size, to_original_pixels
from pix2seq.visualization import GREY, color_of

LOG = logging.getLogger(__name__)
SHOWN = 640  # pixels of the longer side of a picture on the page
LEAST_SIDE = 8
FULL = "Too many pictures are waiting already. Please come back in a minute."
NOT_FINITE = "The detector's logits for this picture are not finite."
FAILED = "The detector failed at this picture. The server's log says why."


@dataclass(frozen=True)
class Line:
    """An object of a sentence, or as much as is written of it.

    words   of its tokens, five if it is finished     color   as its box, grey for noise; none before it is finished
    then also: the detector's `name` for it, `score`, and `box` (4,), xyxy in pixels of the picture
    """

    words: list[str]
    color: str = ""
    name: str = ""
    score: float = 1.0
    box: np.ndarray | None = None

    @property
    def is_noise(self) -> bool:
        return self.color == GREY


@dataclass(eq=False)
class Sentence:
    """What is written about a picture, which the desk's thread adds to until the `work` is done.

    preview   the picture, small, and its `size` (height, width); None before its turn has come
    lines     as far as they are written. A new list each time: who holds one holds what was then
    fault     why there is nothing to read, in words for strangers: no file of the server's is named
    """

    work: Future = field(default_factory=Future)
    preview: Image.Image | None = None
    size: tuple[int, int] = (0, 0)
    lines: list[Line] = field(default_factory=list)
    fault: str = ""
    left: threading.Event = field(default_factory=threading.Event)

    def leave(self) -> None:
        """Nobody reads on: it is not begun, or ends at the next token."""
        self.left.set()
        self.work.cancel()


class InferenceWorker:
    """A detector, and the pictures that wait for it: `max_queue` at most, and sides of `max_side` pixels. To be asked
    by one thread."""

    def __init__(self, detector: Pix2Seq, max_side: int, max_queue: int):
        self.detector, self.max_side, self.max_queue = detector, max_side, max_queue
        self._pool, self._line = ThreadPoolExecutor(1, "desk"), []

    def ask(self, path: str) -> Sentence:
        """The sentence about a picture, which will be written when its turn has come."""
        self._line = [one for one in self._line if not one.work.done()]
        sentence = Sentence()
        if len(self._line) > self.max_queue:  # the first one does not wait
            sentence.fault = FULL
            sentence.work.set_result(None)
        else:
            sentence.work = self._pool.submit(self._write, path, sentence)
            self._line.append(sentence)
        return sentence

    def ahead(self, sentence: Sentence) -> int:
        """How many come before it."""
        return sum(not one.work.done() for one in self._line[: self._line.index(sentence)])

    def close(self) -> None:
        for sentence in self._line:
            sentence.leave()
        self._pool.shutdown()

    def _write(self, path: str, sentence: Sentence) -> None:
        try:
            self._read_and_write(path, sentence)
        except Interrupted:
            pass
        except BadImageError as bad:
            sentence.fault = f"This picture cannot be used: {bad}."
        except NonFiniteLogits:
            sentence.fault = NOT_FINITE
        except Exception:  # out of memory, say: that was this picture, and others are waiting
            LOG.exception("a picture could not be written about")
            sentence.fault = FAILED

    def _read_and_write(self, path: str, sentence: Sentence) -> None:
        model, options = self.detector.model, self.detector.options
        picture = open_image(path)
        _, height, width = picture.shape
        if min(height, width) < LEAST_SIDE or max(height, width) > self.max_side:
            sides = f"{width} x {height} pixels: each side must have {LEAST_SIDE} to {self.max_side}"
            raise BadImageError("unreadable-file", sides)
        pixels = picture.pixels()
        preview = to_pil_image(pixels)
        preview.thumbnail((SHOWN, SHOWN))
        sentence.size, sentence.preview = (height, width), preview
        canvas = EvalTransform(model.config.image_size)(pixels).image[None].to(self.detector.device)
        writing = DecodingState.create(canvas, model.tokenizer, options)

        def look_on() -> bool:
            sentence.lines = lines_of(self.detector, writing, sentence.size)
            return sentence.left.is_set()

        written = write(model, canvas, model.tokenizer, options, look_on, writing)
        sentence.lines = lines_of(self.detector, written, sentence.size)


def lines_of(detector: Pix2Seq, writing: DecodingState, size: tuple[int, int]) -> list[Line]:
    """The sentence of one picture of this (height, width), as far as it is written. Raises NonFiniteLogits."""
    tokenizer, side, names = detector.model.tokenizer, detector.model.config.image_size, detector.names
    found = writing.detections(tokenizer, detector.options.box_score_power)[0]
    boxes = to_original_pixels(found.boxes, side, resized_size(size, side), size)
    tokens = writing.tokens[0].tolist()
    words = [tokenizer.token_to_str(token, names) for token in tokens[: tokens.index(tokenizer.eos_id)]]
    lines = []
    for number, start in enumerate(range(0, len(words), TOKENS_PER_OBJECT)):
        line = Line(words[start : start + TOKENS_PER_OBJECT])
        if len(line.words) == TOKENS_PER_OBJECT:
            label, noise = found.labels[number], tokens[start + TOKENS_PER_OBJECT - 1] == tokenizer.noise_id
            color = GREY if noise else color_of(label)
            line = Line(line.words, color, names[label], float(found.scores[number]), boxes[number])
        lines.append(line)
    return lines


def beginning(lines: list[Line], count: int) -> list[Line]:
    """The first `count` tokens of a sentence."""
    whole, rest = divmod(count, TOKENS_PER_OBJECT)
    return [*lines[:whole], *(Line(line.words[:rest]) for line in lines[whole : whole + 1] if rest)]
