"""Spatial modulation of the fused decoders, which process one token per step."""

import torch

from pix2seq.models.spatial_modulation import DecodedBoxes, SpatialModulation, cell_centers
from pix2seq.tokenizer import TOKENS_PER_OBJECT


class FusedModulation:
    """Computes the `SpatialModulation` of one token per row and step, from tables.

    The steps can be captured as a CUDA graph.

    Args:
        modulation: The module.
        visual_tokens: Visual tokens (B, N, D).
        dtype: Dtype of the values.
    """

    def __init__(self, modulation: SpatialModulation, visual_tokens: torch.Tensor, dtype: torch.dtype):
        self.num_visual = visual_tokens.shape[1]
        device, num_slots = visual_tokens.device, TOKENS_PER_OBJECT
        self.module, self.decoded = modulation, DecodedBoxes.empty(visual_tokens)
        self.dtype = dtype
        # The tables have a row for each of the first five positions, where the reference may be unknown, and for each
        # slot after them.
        is_known = torch.ones(2 * num_slots, 2, 1, device=device)
        is_known[0], is_known[1, 1] = 0, 0
        precision = modulation.log_precision.float().exp().repeat(2, 1, 1)[..., None]
        self.negative_precision = -precision * is_known[..., None]
        self.weights = modulation.reference_weights.float().repeat(2, 1, 1)
        self.cells = cell_centers(self.num_visual, device) - modulation.offset.float().repeat(2, 1, 1)[..., None]
        self.coverage_weight = modulation.coverage_weight.float().repeat(2, 1)[..., None]

    def __call__(self, token_ids: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Returns values (B, H, 1, N), see `SpatialModulation`.

        Args:
            token_ids: Token ids (B,).
            position: Position of the tokens in the sequence, an int or a 0-d tensor.
        """
        num_slots = TOKENS_PER_OBJECT
        if isinstance(position, int):
            row: int | torch.Tensor = position if position < num_slots else num_slots + position % num_slots
        else:
            row = torch.where(position < num_slots, position, num_slots + position % num_slots).view(1)
        self.decoded.append(token_ids)
        coordinates = self.module.coordinates(self.decoded.last_tokens)  # (B, 5)
        self._update_coverage(coordinates[:, :4], position)
        weights, cells, negative_precision, coverage_weight = (
            table[row] if isinstance(row, int) else table[row][0]
            for table in (self.weights, self.cells, self.negative_precision, self.coverage_weight)
        )
        # Not a matrix product, which autocast would compute in half precision.
        reference = (coordinates[:, None] * weights).sum(-1)  # (B, 2)
        scores = (cells - reference[..., None, None]).square_().mul_(negative_precision)
        y, x = scores.unbind(1)  # (B, H, side)
        values = (y[..., None] + x[..., None, :]).flatten(2)  # (B, H, N)
        values = torch.addcmul(values, self.decoded.coverage[:, None], coverage_weight, value=-1)
        return values.to(self.dtype).unsqueeze(2)

    def _update_coverage(self, boxes: torch.Tensor, position: int | torch.Tensor) -> None:
        is_complete = (position % TOKENS_PER_OBJECT == 0) & (position > 0)
        if is_complete is False:
            return
        coverage = self.decoded.coverage
        coverage.copy_(torch.maximum(coverage, self.module.covered(boxes, self.num_visual) * is_complete))
