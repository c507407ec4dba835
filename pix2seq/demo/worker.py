"""Inference thread of the demo: images are processed one after the other, and tokens can be read meanwhile."""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data.image_files import BadImageError, open_file
from pix2seq.generation import DecodingOptions, DecodingState, Interrupted, generate_tokens
from pix2seq.inference import Pix2Seq
from pix2seq.models.detections import to_detections
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.transforms import EvalTransform, resized_size, to_original_pixels
from pix2seq.visualization import GREY, color_of

logger = logging.getLogger(__name__)

PREVIEW_SIDE = 640  # pixels
QUEUE_FULL = "Too many images are waiting. Please try again in a minute."
FAILED = "Inference failed for this image. See the log of the server."


@dataclass(frozen=True)
class ObjectTokens:
    """The tokens of one object, and the object if all five have been generated.

    Attributes:
        tokens: Up to five tokens as text.
        color: Color of the box, grey for noise; "" for an incomplete object.
        name: Class name with the highest probability, also for noise.
        score: Probability of this class.
        box: (4,) xyxy in pixels of the image, or None for an incomplete object.
    """

    tokens: list[str]
    color: str = ""
    name: str = ""
    score: float = 1.0
    box: np.ndarray | None = None

    @property
    def is_noise(self) -> bool:
        return self.color == GREY


@dataclass(eq=False)
class Request:
    """An image that waits for inference or is being processed. The worker's thread updates it.

    Attributes:
        preview: Reduced image, None as long as the request waits.
        size: (height, width) of the image.
        objects: The tokens so far. The worker replaces this list and does not modify it.
        error: Message for visitors, which contains no path of the server.
        future: Done when the request has ended.
        cancelled: Set by `cancel`.
    """

    preview: Image.Image | None = None
    size: tuple[int, int] = (0, 0)
    objects: list[ObjectTokens] = field(default_factory=list)
    error: str = ""
    future: Future = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Removes the request from the queue, or ends it at the next token."""
        self.cancelled.set()
        self.future.cancel()


class InferenceWorker:
    """Runs a model in a thread of its own. Its methods are called by one thread.

    Args:
        detector: The model.
        max_queue: Largest number of waiting images.
    """

    def __init__(self, detector: Pix2Seq, max_queue: int):
        self.detector, self.max_queue = detector, max_queue
        self.options = replace(detector.options, num_samples=1)  # the page shows the tokens of one sequence
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self._requests: list[Request] = []

    def submit(self, path: str) -> Request:
        """Appends an image to the queue. The request has an `error` if the queue is full."""
        self._requests = [request for request in self._requests if not request.future.done()]
        request = Request()
        if len(self._requests) > self.max_queue:  # one of them is being processed
            request.error = QUEUE_FULL
            request.future.set_result(None)
        else:
            request.future = self._pool.submit(self._process, path, request)
            self._requests.append(request)
        return request

    def queue_position(self, request: Request) -> int:
        """The number of unfinished requests before this one."""
        earlier = self._requests[: self._requests.index(request)]
        return sum(not other.future.done() for other in earlier)

    def close(self) -> None:
        """Cancels all requests and waits for the thread."""
        for request in self._requests:
            request.cancel()
        self._pool.shutdown()

    def _process(self, path: str, request: Request) -> None:
        try:
            self._detect(path, request)
        except Interrupted:
            pass
        except BadImageError as error:
            request.error = f"This image cannot be used: {error}."
        except Exception:  # such as out of memory or logits that are not finite: the next request may succeed
            logger.exception("inference failed")
            request.error = FAILED

    def _detect(self, path: str, request: Request) -> None:
        model = self.detector.model
        image = open_file(path)
        pixels = image.pixels()
        preview = to_pil_image(pixels)
        preview.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        request.size, request.preview = image.shape[1:], preview
        padded = EvalTransform(model.config.image_size)(pixels)
        pixel_values = padded.image[None].to(self.detector.device)
        state = DecodingState.create(pixel_values, model.tokenizer, self.options)

        def update_and_check() -> bool:
            request.objects = to_objects(self.detector, state, self.options, request.size)
            return request.cancelled.is_set()

        state = generate_tokens(model, pixel_values, model.tokenizer, self.options, update_and_check, state)
        request.objects = to_objects(self.detector, state, self.options, request.size)


def to_objects(
    detector: Pix2Seq, state: DecodingState, options: DecodingOptions, size: tuple[int, int]
) -> list[ObjectTokens]:
    """Converts the tokens of one image so far.

    Args:
        detector: The model.
        state: Decoding state with a batch size of 1.
        options: Its options, with one sequence for an image.
        size: (height, width) of the image.

    Raises:
        NonFiniteLogits: A logit is NaN or infinite.
    """
    tokenizer, side = detector.model.tokenizer, detector.model.config.image_size
    detections = to_detections(state, tokenizer, options)[0]
    boxes = to_original_pixels(detections.boxes, side, resized_size(size, side), size)
    token_ids = state.tokens[0].tolist()
    token_ids = token_ids[: token_ids.index(tokenizer.eos_id)] if tokenizer.eos_id in token_ids else token_ids
    objects = []
    for index, start in enumerate(range(0, len(token_ids), TOKENS_PER_OBJECT)):
        object_ids = token_ids[start : start + TOKENS_PER_OBJECT]
        tokens = [tokenizer.token_to_str(token_id, detector.class_names) for token_id in object_ids]
        if len(tokens) < TOKENS_PER_OBJECT:
            objects.append(ObjectTokens(tokens))
            continue
        label, is_noise = detections.labels[index], object_ids[-1] == tokenizer.noise_id
        objects.append(
            ObjectTokens(
                tokens=tokens,
                color=GREY if is_noise else color_of(label),
                name=detector.class_names[label],
                score=float(detections.scores[index]),
                box=boxes[index],
            )
        )
    return objects


def first_tokens(objects: list[ObjectTokens], count: int) -> list[ObjectTokens]:
    """The first `count` tokens of a sequence."""
    complete, rest = divmod(count, TOKENS_PER_OBJECT)
    incomplete = [ObjectTokens(item.tokens[:rest]) for item in objects[complete : complete + 1] if rest]
    return [*objects[:complete], *incomplete]
