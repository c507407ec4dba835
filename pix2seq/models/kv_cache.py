"""Static key-value cache and fused linear layers for incremental decoding, one token per step.

At this size, the modules and caches of transformers take longer than the matrix products: a dynamic cache is copied
for every token. Here the cache is allocated once, projections of the same input are one product, and weights have the
dtype and memory layout that is fastest for the batch size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MIN_PACKED_BATCH = 4  # batch size from which packing weights pays off
MIN_SPLIT_WEIGHTS = 2**16  # number of weights from which splitting a product pays off
MASK_ALIGNMENT = 16  # CUDA attention kernels need masks whose length is a multiple of this


def compute_dtype(like: torch.Tensor) -> torch.dtype:
    """Returns the dtype of matrix products: that of autocast if it is enabled, else that of the tensor."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


class UnscaledRMSNorm:
    """RMS norm without its weight and without a factor of sqrt(D): x / sqrt(sum(x^2) + D eps).

    Both are folded into the weights of the following linear layer, see `FusedLinear.from_linears`.

    Args:
        width: Number of channels D.
        eps: The epsilon of the RMS norm.
        like: A tensor of the dtype and device of the inputs.
    """

    def __init__(self, width: int, eps: float, like: torch.Tensor):
        self.eps, self.scale = eps, like.new_full((width,), width**-0.5)
        self.min_norm = like.new_tensor(math.sqrt(width * eps))

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, self.scale.shape, self.scale, self.eps)
        return hidden_states / torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True).hypot_(self.min_norm)


@dataclass
class FusedLinear:
    """One matrix product for several linear layers that have the same input: x W^T + b.

    On a CPU in float32, the weight is stored in the layout that is fastest for the batch size:

    - packed by oneDNN for `MIN_PACKED_BATCH` rows or more,
    - otherwise split into one part per thread. PyTorch computes a product with few rows on one core; a batch of
      smaller products uses all cores. Small weights and weights that cannot be divided are not split.

    Args:
        weight: Weight (out, in).
        bias: Bias (out,).
        packed_weight: The weight in oneDNN's layout, or None.
        split_weight: The weight as (parts, in, out / parts), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed_weight: torch.Tensor | None = None
    split_weight: torch.Tensor | None = None

    @classmethod
    def from_linears(
        cls,
        *linears: nn.Linear,
        like: torch.Tensor,
        output_slice: slice = slice(None),
        input_scale: torch.Tensor | None = None,
    ) -> "FusedLinear":
        """Fuses linear layers.

        Args:
            linears: Layers with the same number of input features.
            like: A tensor of the batch size, dtype and device of the inputs.
            output_slice: The output features to compute, of each layer.
            input_scale: Factors (in,) of the input features, which are folded into the weight.
        """
        dtype, batch_size, on_cpu = compute_dtype(like), len(like), like.device.type == "cpu"
        weight = torch.cat([linear.weight[output_slice] for linear in linears])
        weight = (weight if input_scale is None else weight * input_scale).to(dtype)
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([linear.bias[output_slice] for linear in linears]).to(dtype)
        packed = split = None
        parts = math.gcd(len(weight), torch.get_num_threads())
        fast = on_cpu and dtype == torch.float32
        if fast and batch_size >= MIN_PACKED_BATCH and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch_size)
        elif fast and parts > 1 and weight.numel() >= MIN_SPLIT_WEIGHTS:
            split = weight.unflatten(0, (parts, -1)).transpose(1, 2).contiguous()
        elif on_cpu and weight.shape[0] > weight.shape[1]:
            weight = weight.t().contiguous().t()  # products are fastest along the longer side
        return cls(weight, bias, packed, split)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Computes outputs (B, out) from inputs (B, in). The outputs of the layers are concatenated."""
        if self.packed_weight is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed_weight, self.bias, "none", [], "")
        if self.split_weight is not None:
            batch_size, width = x.shape  # len(x) takes longer than the product of a small layer
            product = torch.bmm(x.expand(self.split_weight.shape[0], batch_size, width), self.split_weight)
            product = product.view(1, -1) if batch_size == 1 else product.transpose(0, 1).flatten(1)
            return product if self.bias is None else product + self.bias
        return F.linear(x if x.dtype == self.weight.dtype else x.to(self.weight.dtype), self.weight, self.bias)


@dataclass
class CachePositions:
    """The position of the current tokens in a `StaticKVCache`, see `StaticKVCache.positions`.

    Args:
        index: Position of the current token, an int or a 0-d tensor.
        length: Number of cached tokens that attention reads.
        mask: Additive mask (1, length) that hides the tokens after the current one, or None.
    """

    index: int | torch.Tensor
    length: int
    mask: torch.Tensor | None = None


class StaticKVCache:
    """Keys and values of each layer, in tensors (2, B, H, T, d) that are allocated once. Keys come first.

    Args:
        num_layers: Number of layers.
        batch_size: Number of rows B.
        num_heads: Number of key-value heads H.
        max_length: Number of tokens T; rounded up to a multiple of `MASK_ALIGNMENT` on a GPU.
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
        if device.type == "cuda":
            max_length = -(-max_length // MASK_ALIGNMENT) * MASK_ALIGNMENT
        shape = 2, batch_size, num_heads, max_length, head_dim
        # Zeros, because attention also multiplies the values of masked tokens, which must not be NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.num_heads = num_heads
        self._causal_mask: torch.Tensor | None = None

    def positions(self, index: int | torch.Tensor) -> CachePositions:
        """Returns what `update` and `attend` need for the token at a position, the same for all rows.

        With an int, attention reads the tokens up to this position. With a 0-d tensor, whose value only the device
        knows, it reads the whole cache under a mask.
        """
        if isinstance(index, int):
            return CachePositions(index, index + 1)
        length, like = self.layers[0].shape[3], self.layers[0]
        if self._causal_mask is None:
            # An additive mask: attention would convert a boolean one in every layer.
            self._causal_mask = like.new_full((length, length), -torch.inf).triu(1)
        return CachePositions(index, length, self._causal_mask[index.view(1)])

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

    def attend(self, layer: int, query: torch.Tensor, positions: CachePositions | None = None) -> torch.Tensor:
        """Computes attention of the current token over the cached tokens of a layer.

        Args:
            layer: Index of the layer.
            query: Queries (B, H', d). H' is a multiple of H.
            positions: Position of the current token, which attends to the tokens up to itself. Without it, it attends
                to the whole cache.

        Returns:
            The concatenated outputs (B, H' d) of the heads.
        """
        cache = self.layers[layer] if positions is None else self.layers[layer].narrow(3, 0, positions.length)
        keys, values = cache.unbind()
        query, is_grouped = query.unsqueeze(2), query.shape[1] != self.num_heads
        mask = None if positions is None else positions.mask
        if mask is not None:
            if query.dtype == keys.dtype == torch.float32 and not is_grouped:
                return _single_query_attention(query, keys, values, mask)
            mask = mask.expand(*query.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=is_grouped).flatten(1)

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch."""
        self.layers = [layer[:, rows] for layer in self.layers]


def _single_query_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of one query per row and head, (B, H, 1, d) -> (B, H d), under a mask (1, T).

    In float32 this is several times faster than the CUDA kernels of scaled_dot_product_attention.
    """
    shape, scale = query.shape, query.shape[-1] ** -0.5
    query, keys, values = (tensor.flatten(0, 1) for tensor in (query, keys, values))
    scores = torch.baddbmm(mask.expand(len(query), 1, -1), query, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(shape[0], -1)
