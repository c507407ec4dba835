"""Spatially modulated attention (SMCA, arXiv 2101.07448): tokens attend near what is known of the box they describe."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PretrainedConfig

from pix2seq.tokenizer import TOKENS_PER_OBJECT

# The weights of the last five input tokens in the reference point (y, x) of each predicted slot. The point is that of
# the previous object until the coordinates of the current one are known. "p" marks tokens of the previous object.
_REFERENCE_WEIGHTS = (
    # y                                          x                             last five tokens     predicted
    ((1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0)),  # py1 px1 py2 px2 pclass   y1
    ((0.0, 0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0, 0.0)),  # px1 py2 px2 pclass y1    x1
    ((0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0, 1.0)),  # py2 px2 pclass y1 x1     y2
    ((0.0, 0.0, 0.5, 0.0, 0.5), (0.0, 0.0, 0.0, 1.0, 0.0)),  # px2 pclass y1 x1 y2      x2
    ((0.0, 0.5, 0.0, 0.5, 0.0), (0.0, 0.0, 0.5, 0.0, 0.5)),  # pclass y1 x1 y2 x2       class
)
# Initial precision (1 / variance / 2) of the heads, geometrically spaced: a standard deviation of a tenth of the image
# down to a fiftieth. Where the reference is that of the previous object, it starts wider by these factors.
_MIN_PRECISION, _MAX_PRECISION = 50.0, 1600.0
_INITIAL_FACTORS = ((0.4, 0.02), (1.0, 0.02), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
# Objects extend below and to the right of a known top left corner: initial offsets of groups of heads.
_INITIAL_OFFSETS = (0.0, 0.04, 0.08, 0.16)
_HAS_INITIAL_OFFSET = ((True, False), (True, False), (True, True), (False, True), (False, False))


class SpatialModulation(nn.Module):
    """Adds a Gaussian around a reference point to the attention scores between a sequence and the visual tokens.

    While the tokens of an object are predicted, its box becomes known: after y1 the row, after x1 the corner, after y2
    and x2 the center. The score of head h for the visual token at (y_k, x_k) changes by

        -a_h (y_k - y - o_h)^2 - b_h (x_k - x - p_h)^2

    with the reference point (y, x), learned precisions a_h and b_h and learned offsets o_h and p_h for each of the five
    slots. Coordinates are in [0, 1] of the padded image. All layers of a decoder add the same values.

    Args:
        num_heads: Number of attention heads H.
        num_bins: Number of bins of a coordinate, which are the last ids of the vocabulary.
        vocab_size: Number of tokens of the vocabulary.
    """

    def __init__(self, num_heads: int, num_bins: int, vocab_size: int):
        super().__init__()
        self.num_heads, self.num_bins, self.first_bin_id = num_heads, num_bins, vocab_size - num_bins
        self.log_precision = nn.Parameter(torch.empty(TOKENS_PER_OBJECT, 2, num_heads))
        self.offset = nn.Parameter(torch.empty(TOKENS_PER_OBJECT, 2, num_heads))
        self.register_buffer("reference_weights", torch.empty(TOKENS_PER_OBJECT, 2, 5), persistent=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "SpatialModulation | None":
        """Returns the module if a decoder config enables it with `spatial_modulation`."""
        if not getattr(config, "spatial_modulation", False):
            return None
        num_heads = getattr(config, "decoder_attention_heads", config.num_attention_heads)
        return cls(num_heads, config.num_bins, config.vocab_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes parameters and buffers, like `_init_weights` of transformers."""
        init.copy_(self.reference_weights, torch.tensor(_REFERENCE_WEIGHTS))
        precision = torch.logspace(math.log10(_MIN_PRECISION), math.log10(_MAX_PRECISION), self.num_heads)
        init.copy_(self.log_precision, (torch.tensor(_INITIAL_FACTORS)[..., None] * precision).log())
        offsets = torch.tensor(_INITIAL_OFFSETS)
        offsets = offsets.repeat(-(-self.num_heads // len(offsets)))[: self.num_heads]
        init.copy_(self.offset, torch.tensor(_HAS_INITIAL_OFFSET)[..., None] * offsets)

    def forward(self, input_ids: torch.Tensor, num_visual: int, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Computes what is added to attention scores.

        Args:
            input_ids: Token ids (B, L), BOS first; with `positions`, the last five tokens (B, 5) of each sequence,
                filled with any ids at the start of a sequence.
            num_visual: Number of visual tokens N, which form a square, row by row.
            positions: Position (B,) or (1,) of the last of the five tokens; BOS is at 0.

        Returns:
            Values (B, H, L, N), float32; (B, H, 1, N) with `positions`.

        Raises:
            ValueError: The visual tokens do not form a square.
        """
        if positions is None:
            last_five = F.pad(input_ids, (TOKENS_PER_OBJECT - 1, 0)).unfold(1, TOKENS_PER_OBJECT, 1)
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        else:
            last_five, positions = input_ids[:, None], positions[:, None]
        slots = positions % TOKENS_PER_OBJECT
        coordinates = (last_five - self.first_bin_id).float() / (self.num_bins - 1)  # (B, L, 5)
        reference = self.reference_weights[slots].float() @ coordinates[..., None]  # (B, L, 2, 1)
        # The reference of the first object has no y before its y1, and no x before its x1.
        is_known = positions[..., None] >= torch.arange(1, 3, device=positions.device)
        precision = self.log_precision[slots].float().exp() * is_known[..., None]  # (B, L, 2, H)
        center = (reference + self.offset[slots].float()).transpose(1, 3)  # (B, H, 2, L)
        cells = cell_centers(num_visual, center.device)
        scores = -precision.transpose(1, 3)[..., None] * (cells - center[..., None]).square()
        y, x = scores.unbind(2)  # (B, H, L, side)
        return (y[..., None] + x[..., None, :]).flatten(3)


def cell_centers(num_visual: int, device: torch.device) -> torch.Tensor:
    """Returns the coordinates (sqrt(N),) in [0, 1] of the rows, and of the columns, of N visual tokens.

    Raises:
        ValueError: The visual tokens do not form a square.
    """
    side = math.isqrt(num_visual)
    if side * side != num_visual:
        raise ValueError(f"spatial_modulation: {num_visual} visual tokens do not form a square")
    return (torch.arange(side, device=device) + 0.5) / side
