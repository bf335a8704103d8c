"""Hugging Face models need no adapter: a `BatchEncoding` is a batch, and a `ModelOutput`'s `logits` are the outputs.

What differs is the labels of a causal language model. Transformers shifts them inside its loss; here the loss is that
of the outputs as they are, so that position t of the labels must hold the token that position t predicts:
`next_token_labels` writes them.

    >>> import torch, curvops as co
    >>> from curvops.interop.huggingface import next_token_labels
    >>> from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=7, n_positions=4, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    >>> model = GPT2LMHeadModel(config).double().eval()
    >>> batch = next_token_labels(BatchEncoding({
    ...     "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    ...     "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    ... }))
    >>> batch["labels"]
    tensor([[   2,    3,    4, -100],
            [   6, -100, -100, -100]])
    >>> G = co.GGN(model, "classification", [batch], params=["transformer.h.0", "transformer.ln_f"])
    >>> G
    GGN(P=252, N=2, classification)
    >>> A = G.add_diagonal(1.0)
    >>> x, report = A.solve(torch.ones(252, dtype=torch.float64), return_report=True)
    >>> report.converged
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvops.errors import DataError
from curvops.nets.forward import rebuilt


def next_token_labels(
    batch: Mapping[str, Any],
    *,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    mask: str = "attention_mask",
    ignore_index: int = -100,
) -> Mapping[str, Any]:
    """The batch with the labels of a causal language model: at every position the token that comes next.

    Args:
        batch: Inputs, tokens `(B, T)` at `dict_key_x`; labels that it has already say where to ignore. It stays as it
            was.
        dict_key_x: Key of the tokens.
        dict_key_y: Key that the labels get.
        mask: Key of the attention mask `(B, T)`, where there is one; what follows is ignored where it is 0.
        ignore_index: What is written at the last position, and at those that padding follows.

    Returns:
        A mapping of the same kind, labels `(B, T)`.

    Raises:
        DataError: No tokens `(B, T)` at that key.
    """
    tokens = batch.get(dict_key_x)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        given = f"shape {tuple(tokens.shape)}, {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise DataError(
            f"next_token_labels: expected tokens (B, T) at {dict_key_x!r}, got {given}; the batch has the keys "
            f"{sorted(map(str, batch))}."
        )
    source = batch.get(dict_key_y)
    source = tokens if source is None else source
    kept = batch.get(mask)
    source = source if kept is None else source.masked_fill(kept == 0, ignore_index)
    last = torch.full_like(tokens[:, :1], ignore_index)
    return rebuilt(batch, {dict_key_y: torch.cat([source[:, 1:], last], 1)})
