"""What benchmarks.writing tries and the product does not have: beam search, and a temperature fitted to scores."""

from dataclasses import replace

import numpy as np
import torch
from torchvision.ops import box_iou

from pix2seq.decoding import DecodingOptions, Detections
from pix2seq.decoding.grammar import Grammar
from pix2seq.decoding.sentences import Sentences
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT

TEMPERATURES = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)


@torch.inference_mode()
def beam_search(
    model, pixel_values: torch.Tensor, width: int, options: DecodingOptions, heard: torch.Tensor | None = None
) -> list[Detections]:
    """The likeliest of the sentences that come of keeping the `width` likeliest beginnings at each token; 1 is greedy.

    Of pixels (B, 3, S, S) and a model that was trained with noise objects, whose sentences all have one length. A
    single beam fills `heard` (B, N, V) with the logits at class tokens.
    """
    batch, tokenizer = len(pixel_values), model.tokenizer
    grammar = Grammar(tokenizer, allow_eos=False, device=pixel_values.device)
    pixel_values = pixel_values.repeat_interleave(width, 0)
    writing = Sentences.new(pixel_values, tokenizer, options)
    steps = model.start(pixel_values, TOKENS_PER_OBJECT * options.max_objects)
    first = width * torch.arange(batch, device=pixel_values.device)[:, None]
    token = torch.full_like(writing.rows, tokenizer.bos_id)
    likely = torch.full((batch, width), -torch.inf, device=token.device)
    likely[:, 0] = 0  # all begin as one
    for position in range(TOKENS_PER_OBJECT * options.max_objects):
        number, slot = divmod(position, TOKENS_PER_OBJECT)
        logits = model.step(token, position, steps, grammar.rows[slot])
        corner = writing.tokens[:, position - 2] if slot in (2, 3) else None
        allowed = grammar(logits, slot, corner).log_softmax(-1)
        likely, chosen = (likely[..., None] + allowed.view(batch, width, -1)).flatten(1).topk(width)
        parents = (first + chosen // allowed.shape[1]).flatten()
        token = (chosen % allowed.shape[1]).flatten() + grammar.rows[slot].start
        writing = writing.of(parents)
        steps.keep(parents)
        writing.tokens[:, position] = token
        if slot == CLASS_SLOT:
            if heard is not None:
                heard[:, number] = logits
            writing.scores[:, number], writing.labels[:, number] = grammar.best_class(logits[parents])
    writing.passes += width * TOKENS_PER_OBJECT * options.max_objects
    return writing.of(first[:, 0]).detections(tokenizer)  # topk sorts


def scored_anew(found: Detections, heard: torch.Tensor, first_class_id: int, temperature: float) -> Detections:
    """With the probabilities of its classes at another temperature, of their logits (N, V)."""
    rows, likely = np.arange(len(found.labels)), (heard / temperature).softmax(-1).double().cpu().numpy()
    return replace(found, scores=likely[rows, found.labels + first_class_id])


def are_right(found: Detections, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which objects (N,) have one of their class (M,) under them, at an IoU of 0.5; boxes (M, 4) in the same unit."""
    overlap = box_iou(torch.from_numpy(found.boxes), torch.from_numpy(boxes)).numpy()
    return ((overlap >= 0.5) & (found.labels[:, None] == labels)).any(1)


def fitted_temperature(
    found: list[Detections], heard: list[torch.Tensor], right: list[np.ndarray], first_class_id: int
) -> float:
    """The one of TEMPERATURES whose scores say best (log-likelihood) which objects are right."""

    def surprise(temperature: float) -> float:
        scores = [
            scored_anew(one, logits, first_class_id, temperature).scores
            for one, logits in zip(found, heard, strict=True)
        ]
        said, is_right = np.concatenate(scores).clip(1e-6, 1 - 1e-6), np.concatenate(right)
        return float(-np.where(is_right, np.log(said), np.log1p(-said)).mean())

    return min(TEMPERATURES, key=surprise)
