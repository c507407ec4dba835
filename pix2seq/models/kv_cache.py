"""Reading a sentence a token at a time: what of a decoder's layers a step needs, laid out for it.

Around a step's few products, transformers' modules and caches do more than the products take: a cache is copied as a
whole for every token. Here keys and values have their place from the start, products of the same input are one, and
weights have the type and the layout they are read fastest in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 4  # from here on, packing weights for the processor pays
WORTH_SPLITTING = 2**16  # weights
MASK_ALIGNMENT = 16  # what CUDA's attention asks of the length of a mask


def step_dtype(like: torch.Tensor) -> torch.dtype:
    """The type that products run in: autocast's, where it is on."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


class RMSNorm:
    """(B, D) divided by its root mean square and by the square root of D, which whoever reads it makes up for."""

    def __init__(self, width: int, eps: float, like: torch.Tensor):
        self.eps, self.scale = eps, like.new_full((width,), width**-0.5)
        self.least = like.new_tensor(math.sqrt(width * eps))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.is_cuda:
            return F.rms_norm(hidden, self.scale.shape, self.scale, self.eps)
        return hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).hypot_(self.least)


@dataclass
class FusedLinear:
    """x (R, in) -> x W' + b (R, out) of one or more linear layers with the same input, side by side."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: torch.Tensor | None = None
    split: torch.Tensor | None = None  # (parts, in, out / parts)

    @classmethod
    def from_linears(
        cls,
        *layers: nn.Linear,
        like: torch.Tensor,
        count: int,
        rows: slice = slice(None),
        scale: torch.Tensor | None = None,
    ) -> "FusedLinear":
        """As it is best for `count` rows of type and device `like`. `rows`: of the output; `scale` (in,): of x."""
        dtype, on_cpu = step_dtype(like), like.device.type == "cpu"
        weight = torch.cat([layer.weight[rows] for layer in layers])
        weight = (weight if scale is None else weight * scale).to(dtype)
        bias = None
        if layers[0].bias is not None:
            bias = torch.cat([layer.bias[rows] for layer in layers]).to(dtype)
        packed = split = None
        parts = math.gcd(len(weight), torch.get_num_threads())
        if on_cpu and count >= FEW_ROWS and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, count)
        elif on_cpu and parts > 1 and weight.numel() >= WORTH_SPLITTING and dtype == torch.float32:
            # The product with a row or two reads the weight once, on one core; a batch of products runs on all.
            split = weight.unflatten(0, (parts, -1)).transpose(1, 2).contiguous()
        elif on_cpu and weight.shape[0] > weight.shape[1]:
            weight = weight.t().contiguous().t()  # fastest along its longer side
        return cls(weight, bias, packed, split)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if self.split is not None:
            rows, width = x.shape  # and not len(x), which takes longer than the product of a small layer
            product = torch.bmm(x.expand(self.split.shape[0], rows, width), self.split)
            product = product.view(1, -1) if rows == 1 else product.transpose(0, 1).flatten(1)
            return product if self.bias is None else product + self.bias
        return F.linear(x if x.dtype == self.weight.dtype else x.to(self.weight.dtype), self.weight, self.bias)


@dataclass
class CachePositions:
    """Where the one token of each row that a pass reads stands: `at`, a number or, known to the device alone, a tensor
    without dimensions. `end`: how many of the cached tokens it attends to, but for those the `mask` hides."""

    at: int | torch.Tensor
    end: int
    mask: torch.Tensor | None = None


class StaticKVCache:
    """Keys and values of at most T tokens in each layer: (2, B, H, T, d), the keys first."""

    def __init__(self, layers: list[torch.Tensor]):
        self.layers, self.num_heads = layers, layers[0].shape[2]
        self.masks: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> "StaticKVCache":
        """Room for (B, H, T, d) of each."""
        batch, heads, most, width = shape
        if device.type == "cuda":
            most = -(-most // MASK_ALIGNMENT) * MASK_ALIGNMENT
        # Zeros: what is hidden by a mask is still multiplied, and must not be NaN.
        return cls([torch.zeros(2, batch, heads, most, width, dtype=dtype, device=device) for _ in range(layers)])

    def positions(self, at: int | torch.Tensor) -> CachePositions:
        """Where the next tokens stand, see Places."""
        if isinstance(at, int):
            return CachePositions(at, at + 1)
        room, like = self.layers[0].shape[3], self.layers[0]
        if self.masks is None:
            # Numbers, not yes and no: attention would make them such in every layer.
            self.masks = like.new_full((room, room), -torch.inf).triu(1)
        return CachePositions(at, room, self.masks[at.view(1)])

    def prefill(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """(B, H, n, d) of the first n tokens."""
        for index, new in enumerate((keys, values)):
            self.layers[layer][index].narrow(2, 0, new.shape[2]).copy_(new)

    def update(self, layer: int, places: CachePositions, keys_and_values: torch.Tensor) -> None:
        """(B, 2 H, d) of the tokens of one pass, the keys' heads first."""
        rows, heads, width = keys_and_values.shape
        kept, new = self.layers[layer], keys_and_values.view(rows, 2, heads // 2, width).transpose(0, 1)
        if isinstance(places.at, int):
            kept.select(3, places.at).copy_(new)
        else:
            kept.index_copy_(3, places.at.view(1), new.unsqueeze(3).to(kept.dtype))

    def attend(self, layer: int, query: torch.Tensor, places: CachePositions | None = None) -> torch.Tensor:
        """What queries (B, H', d) find in the tokens up to their own, or in all of them: (B, H' d)."""
        kept = self.layers[layer] if places is None else self.layers[layer].narrow(3, 0, places.end)
        keys, values = kept.unbind()
        query, grouped = query.unsqueeze(2), query.shape[1] != self.num_heads
        mask = None if places is None else places.mask
        if mask is not None:
            if query.dtype == keys.dtype == torch.float32 and not grouped:
                return _attention_to_one(query, keys, values, mask)
            mask = mask.expand(*query.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=grouped).flatten(1)

    def select_batch(self, rows: torch.Tensor) -> None:
        """Only these rows of the batch."""
        self.layers = [layer[:, rows] for layer in self.layers]


def _attention_to_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Queries (B, H, 1, d), one in each row, under a mask (1, T): (B, H d). For a single query in full precision,
    CUDA's own attention takes several times as long as these products."""
    shape, scale = query.shape, query.shape[-1] ** -0.5
    query, keys, values = (part.flatten(0, 1) for part in (query, keys, values))
    likely = torch.baddbmm(mask.expand(len(query), 1, -1), query, keys.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(likely, values).view(shape[0], -1)
