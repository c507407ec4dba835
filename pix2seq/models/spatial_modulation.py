"""Spatially modulated attention (SMCA, arXiv 2101.07448): tokens attend near what is known of their box."""

import math
from dataclasses import dataclass

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
_MAX_COVERAGE_WEIGHT = 6.0  # initial weights of the coverage: evenly spaced over the heads, from 0
_MIN_BOX_SIZE = 0.02  # of the boxes in the coverage: a box of size 0 covers something, too


@dataclass
class DecodedBoxes:
    """What the spatial modulation needs of the earlier tokens of a sequence.

    Args:
        last_tokens: The last five tokens (B, 5), any ids before BOS.
        coverage: Coverage (B, N) of the visual tokens by the complete boxes, see `SpatialModulation`.
    """

    last_tokens: torch.Tensor
    coverage: torch.Tensor

    @classmethod
    def empty(cls, visual_tokens: torch.Tensor) -> "DecodedBoxes":
        """Returns the state before BOS, for visual tokens (B, N, D)."""
        batch_size, num_visual = visual_tokens.shape[:2]
        last_tokens = torch.zeros(batch_size, TOKENS_PER_OBJECT, dtype=torch.long, device=visual_tokens.device)
        return cls(last_tokens, torch.zeros(batch_size, num_visual, device=visual_tokens.device))

    def append(self, token_ids: torch.Tensor) -> None:
        """Appends a token (B,) to each sequence. In place, so that a CUDA graph finds the tokens again."""
        self.last_tokens.copy_(torch.cat([self.last_tokens[:, 1:], token_ids[:, None]], dim=1))

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch."""
        self.last_tokens, self.coverage = self.last_tokens[rows], self.coverage[rows]


class SpatialModulation(nn.Module):
    """Adds prior knowledge about places to the attention scores between a sequence and the visual tokens.

    While the tokens of an object are predicted, its box becomes known: after y1 the row, after x1 the corner, after y2
    and x2 the center. The score of head h for the visual token at (y_k, x_k) changes by

        -a_h (y_k - y - o_h)^2 - b_h (x_k - x - p_h)^2 - c_h coverage_k
        coverage_k = max_i exp(-((y_k - cy_i) / r_i)^2 - ((x_k - cx_i) / s_i)^2)

    with the reference point (y, x), the learned precisions a_h and b_h, the learned offsets o_h and p_h and a learned
    weight c_h of the coverage by the boxes i of earlier objects, which have the center (cy_i, cx_i) and half the
    height and width (r_i, s_i). The coverage is not part of SMCA: it tells where objects have been found already.
    Each of the five slots has its own parameters. Coordinates are in [0, 1] of the padded image. All layers of a
    decoder add the same values.

    Args:
        num_heads: Number of attention heads H.
        num_bins: Number of bins of a coordinate, which are the last ids of the vocabulary.
        vocab_size: Number of tokens of the vocabulary.
    """

    reference_weights: torch.Tensor

    def __init__(self, num_heads: int, num_bins: int, vocab_size: int):
        super().__init__()
        self.num_heads, self.num_bins, self.first_bin_id = num_heads, num_bins, vocab_size - num_bins
        self.log_precision = nn.Parameter(torch.empty(TOKENS_PER_OBJECT, 2, num_heads))
        self.offset = nn.Parameter(torch.empty(TOKENS_PER_OBJECT, 2, num_heads))
        self.coverage_weight = nn.Parameter(torch.empty(TOKENS_PER_OBJECT, num_heads))
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
        init.copy_(self.coverage_weight, torch.linspace(0, _MAX_COVERAGE_WEIGHT, self.num_heads).expand(5, -1))

    def forward(
        self,
        input_ids: torch.Tensor,
        num_visual: int,
        positions: torch.Tensor | None = None,
        decoded: DecodedBoxes | None = None,
    ) -> torch.Tensor:
        """Computes what is added to attention scores.

        Args:
            input_ids: Token ids (B, L), BOS first; with `decoded`, the next token (B, 1) of each sequence.
            num_visual: Number of visual tokens N, which form a square, row by row.
            positions: With `decoded`, the positions (B,) or (1,) of the tokens; BOS is at 0.
            decoded: State of the sequences before the tokens, which is updated.

        Returns:
            Values (B, H, L, N), float32.

        Raises:
            ValueError: The visual tokens do not form a square.
        """
        if decoded is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            last_five = F.pad(input_ids, (TOKENS_PER_OBJECT - 1, 0)).unfold(1, TOKENS_PER_OBJECT, 1)
            coordinates = self.coordinates(last_five)  # (B, L, 5)
            # The first token of an object, which follows a complete one, changes the coverage.
            covered = self.covered(coordinates[:, ::TOKENS_PER_OBJECT, :4], num_visual)
            covered[:, 0] = 0  # BOS
            coverage = covered.cummax(1).values.repeat_interleave(TOKENS_PER_OBJECT, 1)[:, : input_ids.shape[1]]
        else:
            assert positions is not None
            decoded.append(input_ids[:, 0])
            positions = positions[:, None]
            coordinates = self.coordinates(decoded.last_tokens[:, None])
            is_complete = (positions % TOKENS_PER_OBJECT == 0) & (positions > 0)
            covered = self.covered(coordinates[:, 0, :4], num_visual) * is_complete
            coverage = decoded.coverage.copy_(torch.maximum(decoded.coverage, covered))[:, None]
        slots = positions % TOKENS_PER_OBJECT
        # Not a matrix product, which autocast would compute in half precision.
        reference = (self.reference_weights[slots].float() * coordinates[..., None, :]).sum(-1, keepdim=True)
        # The reference of the first object has no y before its y1, and no x before its x1.
        is_known = positions[..., None] >= torch.arange(1, 3, device=positions.device)
        precision = self.log_precision[slots].float().exp() * is_known[..., None]  # (B, L, 2, H)
        center = (reference + self.offset[slots].float()).transpose(1, 3)  # (B, H, 2, L)
        cells = cell_centers(num_visual, center.device)
        scores = -precision.transpose(1, 3)[..., None] * (cells - center[..., None]).square()
        y, x = scores.unbind(2)  # (B, H, L, side)
        weight = self.coverage_weight[slots].float().transpose(1, 2)[..., None]  # (B, H, L, 1)
        return torch.addcmul((y[..., None] + x[..., None, :]).flatten(3), weight, coverage[:, None], value=-1)

    def coordinates(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Converts bins to coordinates in [0, 1]; other tokens to other numbers."""
        return (token_ids - self.first_bin_id).float() / (self.num_bins - 1)

    def covered(self, boxes: torch.Tensor, num_visual: int) -> torch.Tensor:
        """Returns the coverage (..., N) by a single box (..., 4), yxyx in [0, 1]."""
        corner, opposite = boxes.unflatten(-1, (2, 2)).unbind(-2)  # (..., 2)
        center, radius = (corner + opposite) / 2, (opposite - corner).clamp(min=_MIN_BOX_SIZE) / 2
        cells = cell_centers(num_visual, boxes.device)
        y, x = (((cells - center[..., None]) / radius[..., None]).square().neg().exp()).unbind(-2)
        return (y[..., None] * x[..., None, :]).flatten(-2)


def cell_centers(num_visual: int, device: torch.device) -> torch.Tensor:
    """Returns the coordinates (sqrt(N),) in [0, 1] of the rows, and of the columns, of N visual tokens.

    Raises:
        ValueError: The visual tokens do not form a square.
    """
    side = math.isqrt(num_visual)
    if side * side != num_visual:
        raise ValueError(f"spatial_modulation: {num_visual} visual tokens do not form a square")
    return (torch.arange(side, device=device) + 0.5) / side
