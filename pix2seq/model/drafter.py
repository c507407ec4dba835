"""A small network that guesses the rest of an object, so that the decoder can read several tokens at once.

As EAGLE (Li et al., 2024), it starts from what the decoder thought before the last token, and from that token, and
goes on from its own thoughts. As a box's other numbers are to be seen in the picture and not in the sentence, it looks
at the visual tokens, not at the sentence: it keeps no state that a wrong guess would have to be taken out of.
"""

import torch
from torch import nn

from pix2seq.model.steps import KeyValues
from pix2seq.tokenizer import TOKENS_PER_OBJECT


class DrafterLayer(nn.Module):
    """Cross-attention to the visual tokens and an MLP, norms first."""

    def __init__(self, width: int, heads: int, mlp_size: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.mlp = nn.Sequential(nn.Linear(width, mlp_size), nn.GELU(), nn.Linear(mlp_size, width))

    def forward(self, hidden: torch.Tensor, memory: KeyValues, index: int) -> torch.Tensor:
        query = self.query(self.attention_norm(hidden)).unflatten(1, (self.heads, -1))
        hidden = hidden + self.out(memory.look(index, query))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Drafter(nn.Module):
    """`look` at the visual tokens once, then `forward` token by token."""

    def __init__(self, width: int, heads: int, mlp_size: int, num_layers: int):
        super().__init__()
        self.thought_norm, self.token_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.join = nn.Linear(2 * width, width)
        self.slots = nn.Embedding(TOKENS_PER_OBJECT, width)
        self.layers = nn.ModuleList(DrafterLayer(width, heads, mlp_size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def look(self, visual: torch.Tensor) -> KeyValues:
        """Visual tokens (B, N, D) -> what the layers attend to."""
        parts = [layer.key_value(visual).unflatten(2, (2, layer.heads, -1)) for layer in self.layers]
        return KeyValues([part.permute(2, 0, 3, 1, 4) for part in parts])

    def forward(
        self, thought: torch.Tensor, token: torch.Tensor, slots: torch.Tensor, memory: KeyValues
    ) -> torch.Tensor:
        """What was thought (R, D) before a token, and its embedding (R, D) -> what to think after it (R, D).

        `slots` (R,): of the token to be guessed. R is a multiple of the B rows of `memory`, whose guesses lie side by
        side.
        """
        thought, token = self.thought_norm(thought), self.token_norm(token)
        hidden = self.join(torch.cat([thought, token], dim=-1)) + self.slots(slots)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, memory, index)
        return self.norm(hidden)
