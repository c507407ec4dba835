"""Static key-value cache of the fused decoders, which process one token per step."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

MASK_ALIGNMENT = 16  # CUDA attention kernels need masks whose length is a multiple of this


@dataclass
class CachePositions:
    """The position of the current tokens in a `StaticKVCache`, see `StaticKVCache.positions`.

    Args:
        index: Position of the current token, an int or a 0-d tensor.
        length: Number of cached tokens that attention reads.
        mask: What is added to the attention scores, of a shape that expands to (B, H', 1, length), or None. It hides
            the tokens after the current one, if they are among those that are read.
    """

    index: int | torch.Tensor
    length: int
    mask: torch.Tensor | None = None


def aligned_length(length: int, device: torch.device) -> int:
    """Rounds up the length of a cache that attention reads under a mask."""
    return -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT if device.type == "cuda" else length


class StaticKVCache:
    """Keys and values of each layer, in tensors (2, B, H, T, d) that are allocated once. Keys come first.

    Args:
        num_layers: Number of layers.
        batch_size: Number of rows B.
        num_heads: Number of key-value heads H.
        max_length: Number of tokens T.
        head_dim: Width d of a head.
        dtype: Dtype of keys and values.
        device: Device of keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = 2, batch_size, num_heads, max_length, head_dim
        # Zeros, because attention also multiplies the values of masked tokens, which must not be NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.num_heads = num_heads
        self._causal_mask: torch.Tensor | None = None

    def positions(self, index: int | torch.Tensor, modulation: torch.Tensor | None = None) -> CachePositions:
        """Returns what `update` and `attend` need for the token at a position, the same for all rows.

        Args:
            index: The position. With an int, attention reads the tokens up to it. With a 0-d tensor, whose value only
                the device knows, it reads the whole cache under a mask.
            modulation: Values (B, H', 1, n) that are added to the attention scores of the first n tokens.
        """
        if isinstance(index, int):
            mask = None if modulation is None else F.pad(modulation, (0, index + 1 - modulation.shape[3]))
            return CachePositions(index, index + 1, mask)
        length, like = self.layers[0].shape[3], self.layers[0]
        if self._causal_mask is None:
            # An additive mask: attention would convert a boolean one in every layer.
            self._causal_mask = like.new_full((length, length), -torch.inf).triu(1)
        mask = self._causal_mask[index.view(1)]
        if modulation is not None:
            mask = mask + F.pad(modulation, (0, length - modulation.shape[3]))
        return CachePositions(index, length, mask)

    def prefill(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values (B, H, n, d) of the first n tokens of a layer."""
        for index, new in enumerate((keys, values)):
            self.layers[layer][index].narrow(2, 0, new.shape[2]).copy_(new)

    def update(self, layer: int, positions: CachePositions, keys_and_values: torch.Tensor) -> None:
        """Stores keys and values (B, 2 H, d) of the current token in a layer. The heads of the keys come first."""
        batch_size, num_heads, head_dim = keys_and_values.shape
        cache = self.layers[layer]
        new = keys_and_values.view(batch_size, 2, num_heads // 2, head_dim).transpose(0, 1)
        if isinstance(positions.index, int):
            cache.select(3, positions.index).copy_(new)
        else:
            cache.index_copy_(3, positions.index.view(1), new.unsqueeze(3).to(cache.dtype))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        positions: CachePositions | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes attention of the current token over the cached tokens of a layer.

        Args:
            layer: Index of the layer.
            query: Queries (B, H', d). H' is a multiple of H.
            positions: Position of the current token, which attends to the tokens up to itself. Without it, it attends
                to the whole cache.
            mask: What is added to the scores of the whole cache, of a shape that expands to (B, H', 1, T).

        Returns:
            The concatenated outputs (B, H' d) of the heads.
        """
        cache = self.layers[layer] if positions is None else self.layers[layer].narrow(3, 0, positions.length)
        keys, values = cache.unbind()
        query, is_grouped = query.unsqueeze(2), query.shape[1] != self.num_heads
        mask = mask if positions is None else positions.mask
        if mask is not None:
            mask = mask.expand(*query.shape[:2], -1, -1)
            if query.is_cuda and query.dtype == keys.dtype == torch.float32 and not is_grouped:
                return _single_query_attention(query, keys, values, mask)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=is_grouped).flatten(1)

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch."""
        self.layers = [layer[:, rows] for layer in self.layers]


def _single_query_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of one query per row and head, (B, H, 1, d) -> (B, H d), under a mask (B, H, 1, T).

    In float32 this is several times faster than the CUDA kernels of scaled_dot_product_attention.
    """
    shape, scale = query.shape, query.shape[-1] ** -0.5
    query, keys, values, mask = (tensor.flatten(0, 1) for tensor in (query, keys, values, mask))
    scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(shape[0], -1)
