"""Causal training chunk by chunk over the whole model: memory of one chunk, and a state per layer and chunk (2012.11346).

A causal model sees what came before a chunk through its layers' states alone. So the states at the chunk borders are computed
once without a graph; then the chunks are run again, the last one first, each with the gradients that its states got from the
chunk after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.errors import UnsupportedError
from performers.models import PerformerCache
from performers.models.chunking import Gradients, detached, state_tensors, with_gradients


def accumulate_in_chunks(
    model: Any,
    example: Mapping[str, Tensor],
    items: Tensor | int,
    size: int,
    precision: Callable[[], contextlib.AbstractContextManager[object]],
) -> Tensor:
    """Adds the gradients of one forward pass, `size` tokens at a time, to those of the model's parameters.

    Arguments:
        model: a PerformerForCausalLM whose layers all have states of fixed size.
        example: input_ids, labels and position_ids of shape (rows, L), and dropout_keys of shape (rows,), or without them.
        items: what the summed loss is divided by.
        size: tokens of a chunk; the last one may be shorter.
        precision: the context of a forward pass, such as autocast.

    Returns:
        The loss of the whole, a scalar.

    Raises:
        UnsupportedError: the example holds packed sequences, or a layer's state grows with the tokens.
    """
    if "cu_seqlens" in example:
        raise UnsupportedError(
            "Packed sequences cannot be trained on chunk by chunk: each would need states of its own."
        )
    if not model.has_fixed_states:
        raise UnsupportedError("A layer whose state grows with the tokens cannot be trained chunk by chunk.")
    labels = F.pad(example["labels"], (0, 1), value=-100)[:, 1:]
    length = labels.shape[1]
    chunks = [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def run(rows: slice, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """The hidden states of a chunk and the layers' states after it."""
        cache = PerformerCache(len(states))
        cache.states, cache.num_tokens = list(states), rows.start
        hidden = model.performer(
            example["input_ids"][:, rows],
            position_ids=example["position_ids"][:, rows],
            past_key_values=cache,
            dropout_keys=example.get("dropout_keys"),
        ).last_hidden_state
        return hidden, cache.states

    borders: list[list[Any]] = [[None] * model.config.num_hidden_layers]
    with torch.no_grad(), precision():
        for rows in chunks[:-1]:
            borders.append(run(rows, borders[-1])[1])

    total = torch.zeros((), device=labels.device)
    d_states: Gradients = ()
    for rows in reversed(chunks):
        before = [detached(state) for state in borders.pop()]
        with precision():
            hidden, after = run(rows, before)
            loss = model.cross_entropy(hidden, labels[:, rows], items)
        later = [tensor for state in after for tensor in state_tensors(state)] if d_states else []
        torch.autograd.backward(*with_gradients([loss, *later], [torch.ones_like(loss), *d_states]))
        d_states = [tensor.grad for state in before for tensor in state_tensors(state)]
        total += loss.detach().float()
    return total
