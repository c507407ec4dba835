"""Writing a sentence token by token: what of a decoder's layers a step needs, laid out for it.

Around a step's few products, transformers' modules and caches do more than the products take: a cache is copied as a
whole for every token. Here keys and values have their place from the start, products of the same input are one, and
weights have the type and the layout they are read fastest in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 4  # from here on, packing weights for the processor pays


def step_dtype(like: torch.Tensor) -> torch.dtype:
    """The type that products run in: autocast's, where it is on."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def unit(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """(B, D) divided by its root mean square and by the square root of D, which whoever reads it makes up for."""
    squares = torch.linalg.vecdot(hidden, hidden).add_(hidden.shape[-1] * eps)
    return hidden * squares.rsqrt_().unsqueeze(-1)


@dataclass
class Product:
    """x (B, in) -> x W' + b (B, out) of one or more linear layers with the same input, side by side."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: torch.Tensor | None = None

    @classmethod
    def of(
        cls, *layers: nn.Linear, like: torch.Tensor, rows: slice = slice(None), scale: torch.Tensor | None = None
    ) -> "Product":
        """As it is best for a batch `like` (B, ...). `rows`: of the output; `scale` (in,): of x."""
        dtype, on_cpu = step_dtype(like), like.device.type == "cpu"
        weight = torch.cat([layer.weight[rows] for layer in layers])
        weight = (weight if scale is None else weight * scale).to(dtype)
        bias = None
        if layers[0].bias is not None:
            bias = torch.cat([layer.bias[rows] for layer in layers]).to(dtype)
        packed = None
        if on_cpu and len(like) >= FEW_ROWS and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(like))
        elif on_cpu and weight.shape[0] > weight.shape[1]:
            # The product with a row or two reads the weight once: fastest along its longer side.
            weight = weight.t().contiguous().t()
        return cls(weight, bias, packed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x if x.dtype == self.weight.dtype else x.to(self.weight.dtype), self.weight, self.bias)


class KeyValues:
    """Keys and values of at most T tokens in each layer: (B, 2 H, T, d), the keys' heads first."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        batch, heads, most, width = shape
        self.num_heads, self.most = heads, most
        self.layers = [torch.empty(batch, 2 * heads, most, width, dtype=dtype, device=device) for _ in range(layers)]

    def write(self, layer: int, place: int, keys_and_values: torch.Tensor) -> None:
        """(B, 2 H, n, d) of the tokens from `place` on."""
        self.layers[layer].narrow(2, place, keys_and_values.shape[2]).copy_(keys_and_values)

    def look(self, layer: int, query: torch.Tensor, length: int) -> torch.Tensor:
        """What a query (B, H', 1, d) finds in the first `length` tokens: (B, H' d)."""
        keys, values = self.layers[layer].narrow(2, 0, length).chunk(2, dim=1)
        grouped = query.shape[1] != self.num_heads
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped).flatten(1)

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows of the batch."""
        self.layers = [layer[rows] for layer in self.layers]
