"""Runs an exported model with onnxruntime."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.inference.onnx_graphs import ENCODER_FILE, STEP_FILE
from pix2seq.models import Pix2SeqConfig
from pix2seq.models.detections import Detections, to_detections
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer


@dataclass
class OnnxDecoderState:
    """The inputs of the step that depend on the image and on earlier tokens. See `onnx_graphs`."""

    visual_key_values: np.ndarray
    past_key_values: np.ndarray
    past_tokens: np.ndarray
    past_coverage: np.ndarray

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch."""
        for name, values in vars(self).items():
            setattr(self, name, values[rows.numpy()])


class OnnxDetector:
    """An exported model that is decoded by the same code as a `Pix2SeqForObjectDetection`.

    Args:
        folder: Output folder of export.py.
        providers: Execution providers of onnxruntime, such as "CUDAExecutionProvider".

    Raises:
        ValueError: The graphs are of another version.
    """

    def __init__(self, folder: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)):
        import onnxruntime  # an optional dependency

        self.config = Pix2SeqConfig.from_pretrained(folder)
        self.tokenizer = Tokenizer(len(self.config.category_ids), self.config.num_bins)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.encoder, self.step = (
            onnxruntime.InferenceSession(Path(folder) / name, options, list(providers))
            for name in (ENCODER_FILE, STEP_FILE)
        )
        needed = {"input_ids", "position", *(field.name for field in fields(OnnxDecoderState))}
        if missing := needed - {tensor.name for tensor in self.step.get_inputs()}:
            raise ValueError(
                f"{Path(folder) / STEP_FILE} has no input {', '.join(sorted(missing))}: it is of another version; "
                "export the model again"
            )

    def detect(self, pixel_values: torch.Tensor, options: DecodingOptions | None = None) -> list[Detections]:
        """Detects objects, as `Pix2SeqForObjectDetection.detect`.

        Args:
            pixel_values: uint8 (B, 3, S, S), the output of the image processor.
            options: Decoding options. Default: those the model was evaluated with.

        Returns:
            The objects of each image, with boxes in [0, 1] of the padded square.
        """
        options = options or DecodingOptions(**{"max_objects": self.config.max_objects} | self.config.decoding)
        state = generate_tokens(self, pixel_values, self.tokenizer, options)
        return to_detections(state, self.tokenizer, options)

    def prefill(self, pixel_values: torch.Tensor, max_length: int) -> OnnxDecoderState:
        """Encodes images (B, 3, S, S) and allocates the cache of `max_length` tokens."""
        (visual_key_values,) = self.encoder.run(None, {"pixel_values": pixel_values.numpy()})
        shape = (*visual_key_values.shape[:3], max_length, visual_key_values.shape[4])
        batch_size, num_visual = len(visual_key_values), visual_key_values.shape[3]
        return OnnxDecoderState(
            visual_key_values,
            past_key_values=np.zeros(shape, np.float32),
            past_tokens=np.zeros((batch_size, TOKENS_PER_OBJECT), np.int64),
            past_coverage=np.zeros((batch_size, num_visual), np.float32),
        )

    def decode_step(
        self,
        token_ids: torch.Tensor,
        position: int,
        incremental_decoder: OnnxDecoderState,
        vocab_slice: slice = slice(None),
    ) -> torch.Tensor:
        """Processes one token (B,) per row; returns the logits (B, R) of R tokens of the vocabulary."""
        state = incremental_decoder
        inputs = {"input_ids": token_ids.numpy(), "position": np.full(len(token_ids), position)}
        outputs = self.step.run(None, inputs | vars(state))
        logits, state.past_key_values, state.past_tokens, state.past_coverage = outputs
        return torch.from_numpy(logits)[:, vocab_slice]
