"""Attention masks of the decoders, and attention without a mask for visual tokens followed by a sequence."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import AttentionInterface


def prefix_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_visual: int = 0,
    token_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function "prefix": bidirectional among the visual tokens, causal for all other tokens.

    The two parts are computed separately: fast kernels do not accept a mask of both.

    Args:
        query: Queries (B, H, Q, d) of the last Q of K tokens.
        key: Keys (B, H', K, d). H is a multiple of H'.
        value: Values (B, H', K, d).
        attention_mask: Mask (B or 1, H or 1, Q, K) that is used instead.
        num_visual: Number of tokens N at the beginning of the K tokens that attend to each other.
        token_mask: Additive mask (B, H, K - N, K) of the other tokens. Default: causal.
        dropout: Dropout probability of the attention weights.
        scaling: Factor of the scores. Default: d ** -0.5.

    Returns:
        The outputs (B, Q, H, d), and None for the attention weights.
    """
    attend = partial(
        F.scaled_dot_product_attention,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=module.num_key_value_groups > 1,
    )
    if attention_mask is not None:
        return attend(query, key, value, attn_mask=attention_mask).transpose(1, 2), None
    num_cached = key.shape[2] - query.shape[2]
    num_visual_queries = max(num_visual - num_cached, 0)
    visual_query, token_query = query[:, :, :num_visual_queries], query[:, :, num_visual_queries:]
    outputs = []
    if visual_query.shape[2]:
        outputs.append(attend(visual_query, key[:, :, :num_visual], value[:, :, :num_visual]))
    if num_queries := token_query.shape[2]:
        if token_mask is None and num_queries > 1:
            token_mask = prefix_mask(num_queries, key.shape[2], 0, query.device)
        outputs.append(attend(token_query, key, value, attn_mask=token_mask))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def prefix_mask(num_queries: int, num_keys: int, num_visual: int, device: torch.device) -> torch.Tensor:
    """Returns the mask (Q, K) of the last Q of K tokens, True where a token attends to another.

    It is causal, except that the first `num_visual` tokens attend to each other.
    """
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    mask[: max(num_visual - (num_keys - num_queries), 0), :num_visual] = True
    return mask


def add_modulation(mask: torch.Tensor, modulation: torch.Tensor | None) -> torch.Tensor:
    """Adds values (B, H, L, N), if there are any, to the scores of the last L queries and the first N keys.

    Args:
        mask: Additive mask (B or 1, 1, Q, K).
        modulation: The values.

    Returns:
        Additive mask (B, H, Q, K).
    """
    if modulation is None:
        return mask
    padding = (0, mask.shape[3] - modulation.shape[3], mask.shape[2] - modulation.shape[2], 0)
    return mask + F.pad(modulation, padding)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts a boolean mask to one that is added to attention scores, which all attention implementations accept."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


AttentionInterface.register("prefix", prefix_attention)
