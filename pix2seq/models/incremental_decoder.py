"""Incremental decoding: one token per step, with the keys and values of earlier tokens in a cache."""

import torch

from pix2seq.models.fused_decoders import FusedDecoder, FusedLlamaDecoder, FusedTransformerDecoder, can_fuse
from pix2seq.models.llama_decoder import LlamaDecoder
from pix2seq.models.spatial_modulation import DecodedBoxes
from pix2seq.models.transformer_decoder import TransformerDecoder

FUSED_DECODERS = {LlamaDecoder: FusedLlamaDecoder, TransformerDecoder: FusedTransformerDecoder}


class IncrementalDecoder:
    """Runs the modules of a decoder on one token per row and step, with a static cache of transformers.

    Adapters, hooks, quantized layers and other attention implementations therefore act as in training.

    Args:
        decoder: The decoder.
        visual_tokens: Visual tokens (B, N, D).
        max_length: Maximum number of tokens of a sequence.
    """

    supports_cuda_graph = False  # hooks may wait for the device or move weights to it

    def __init__(self, decoder: LlamaDecoder | TransformerDecoder, visual_tokens: torch.Tensor, max_length: int):
        self.decoder, self.visual_tokens = decoder, visual_tokens
        self.cache = decoder.prefill(visual_tokens, max_length)
        self.decoded = DecodedBoxes.empty(visual_tokens)

    def __call__(
        self, token_ids: torch.Tensor, position: int | torch.Tensor, vocab_slice: slice = slice(None)
    ) -> torch.Tensor:
        """Processes one token per row and computes the logits of the next one.

        Args:
            token_ids: Token ids (B,).
            position: Position of the tokens in the sequence; BOS is at 0.
            vocab_slice: The R tokens of the vocabulary whose logits are returned.

        Returns:
            Logits (B, R).
        """
        positions = torch.as_tensor(position, device=token_ids.device).view(1)
        output = self.decoder(
            self.visual_tokens, token_ids[:, None], cache=self.cache, positions=positions, decoded=self.decoded
        )
        return self.decoder.lm_head(output.last_hidden_state[:, 0])[:, vocab_slice]

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch."""
        self.visual_tokens = self.visual_tokens[rows]
        self.decoded.select_batch(rows)
        self.cache.reorder_cache(rows)


def create_incremental_decoder(
    decoder: LlamaDecoder | TransformerDecoder, visual_tokens: torch.Tensor, max_length: int
) -> IncrementalDecoder | FusedDecoder:
    """Returns the fastest incremental decoder that computes what the modules of a decoder compute.

    Args:
        decoder: The decoder.
        visual_tokens: Visual tokens (B, N, D).
        max_length: Maximum number of tokens of a sequence.
    """
    fused = FUSED_DECODERS.get(type(decoder))
    if fused is not None and can_fuse(decoder):
        return fused(decoder, visual_tokens, max_length)
    return IncrementalDecoder(decoder, visual_tokens, max_length)
