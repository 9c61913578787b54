"""A context: proteins are read alone, their states are summed, and another protein sees the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from performers import PerformerForCausalLM, PerformerForMaskedLM, PerformerTokenizer
from performers.errors import InputError, UnsupportedError
from performers.models import PerformerCache, PerformerContext

from .conftest import INSULIN_A, INSULIN_B, UBIQUITIN, gradients

# In each of them some layer can see other proteins.
MIXTURES: dict[str, dict[str, Any]] = {
    "favor": {"attention": "favor"},
    "favor-softmax": {"attention": "favor", "attention_kwargs": {"kernel": "softmax"}},
    "exact": {"attention": "exact"},
    "local": {"attention": ["local", "favor"], "attention_kwargs": {"local": {"window": 5}}},
    "split": {"attention": "split", "attention_kwargs": {"first_kwargs": {"window": 5}}},
    "reversible": {"attention": ["exact", "favor"], "reversible": True},
}
LINEAR = ["favor", "favor-softmax", "local", "split"]
MODELS = [PerformerForMaskedLM, PerformerForCausalLM]
TIGHT = {"rtol": 1e-4, "atol": 1e-5}

Make = Callable[..., Any]


@pytest.fixture
def family(tokenizer: PerformerTokenizer) -> list[Tensor]:
    """Three proteins as rows of one."""
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in (UBIQUITIN, INSULIN_A, INSULIN_B)]


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def read(model: Any, ids: Tensor, **arguments: Any) -> PerformerContext:
    with torch.no_grad():
        return model.performer.read_context(ids, **arguments)


def added(*contexts: PerformerContext) -> PerformerContext:
    total = contexts[0]
    for other in contexts[1:]:
        total = total.joined(other).summed()
    return total


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("model_class", MODELS)
def test_a_context_changes_what_is_predicted_and_its_order_does_not(
    make: Make, family: list[Tensor], kind: str, model_class: type
) -> None:
    model = make(model_class, **MIXTURES[kind])
    first, second, target = family
    contexts = [read(model, ids) for ids in (first, second)]
    one_way, other_way = (logits(model, target, context=added(*order)) for order in (contexts, contexts[::-1]))
    assert_close(one_way, other_way, **TIGHT)
    assert (one_way - logits(model, target)).abs().max() > 1e-2
    assert (one_way - logits(model, target, context=contexts[0])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", LINEAR)
def test_what_was_added_can_be_taken_out_again(make: Make, family: list[Tensor], kind: str) -> None:
    model = make(PerformerForMaskedLM, **MIXTURES[kind])
    first, second, target = family
    both = read(model, first).joined(read(model, second))
    without = both.summed().joined(read(model, second)).mixed(torch.tensor([[1.0, -1.0]]))
    assert_close(
        logits(model, target, context=without), logits(model, target, context=read(model, first)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("model_class", MODELS)
def test_packed_padded_and_single_proteins_leave_the_same_context(
    make: Make, family: list[Tensor], kind: str, model_class: type
) -> None:
    model = make(model_class, **MIXTURES[kind])
    target = family[2]
    alone = added(*(read(model, ids) for ids in family))
    packed = torch.cat(family, dim=1)
    offsets = torch.tensor([0, *(ids.shape[1] for ids in family)]).cumsum(0)
    width = max(ids.shape[1] for ids in family)
    padded = torch.cat([torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids in family])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(ids), (0, width - ids.shape[1])) for ids in family])
    expected = logits(model, target, context=alone)
    assert_close(logits(model, target, context=read(model, packed, cu_seqlens=offsets).summed()), expected, **TIGHT)
    assert_close(logits(model, target, context=read(model, padded, attention_mask=mask).summed()), expected, **TIGHT)
    # And as readers: packed sequences see the context as single ones do.
    together = logits(model, packed, cu_seqlens=offsets, context=alone)
    assert_close(together[:, offsets[2] :], expected, **TIGHT)


@pytest.mark.parametrize("kind", ["favor", "favor-softmax", "exact"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_layer_with_a_state_attends_to_all_keys_at_once(make: Make, kind: str, is_causal: bool) -> None:
    mechanism = make(PerformerForMaskedLM, **MIXTURES[kind]).performer.layers[0].attention.mechanism
    torch.manual_seed(0)
    q, own_key, own_value = torch.randn(3, 1, 2, 9, 16)
    key, value = torch.randn(2, 1, 2, 20, 16)
    empty = q[:, :, :0]
    pieces = [(key[:, :, rows], value[:, :, rows]) for rows in (slice(0, 13), slice(13, 20))]
    states = [mechanism(empty, k, v, return_state=True)[1] for k, v in pieces]
    state = states[1].joined(states[:1]).mixed(torch.ones(1, 2))
    found = mechanism(q, own_key, own_value, is_causal=is_causal, state=state)
    expected = mechanism(q, torch.cat([key, own_key], 2), torch.cat([value, own_value], 2), is_causal=is_causal)
    assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("kind", LINEAR)
def test_a_causal_model_generates_from_a_context_as_it_reads_with_one(
    make: Make, family: list[Tensor], kind: str
) -> None:
    model = make(PerformerForCausalLM, **MIXTURES[kind])
    context = read(model, family[0])
    prompt = family[1][:, :6]
    made = model.generate(
        prompt, past_key_values=PerformerCache.after(context), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    ids = prompt
    for _ in range(5):
        ids = torch.cat([ids, logits(model, ids, context=context)[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == model.config.eos_token_id:
            break
    assert torch.equal(made, ids)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("kind", ["favor", "favor-softmax", "exact"])
def test_training_with_relatives_is_training_with_their_summed_states(
    make: Make, family: list[Tensor], kind: str, model_class: type
) -> None:
    model = make(model_class, **MIXTURES[kind]).train()
    packed, offsets = torch.cat(family, dim=1), torch.tensor([0, *(ids.shape[1] for ids in family)]).cumsum(0)
    relatives = torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 0, 0]])
    labels = packed.clone()
    model(packed, cu_seqlens=offsets, labels=labels, context_ids=packed, relatives=relatives).loss.backward()
    together = gradients(model)
    together = {name: gradient.clone() for name, gradient in together.items()}
    model.zero_grad()
    rows = [model.performer.read_context(ids) for ids in family]
    contexts = [added(rows[1], rows[2]), None, rows[0]]
    count = sum(ids.shape[1] - (model_class is PerformerForCausalLM) for ids in family)
    losses = [
        model(ids, labels=ids, context=context, num_items_in_batch=count).loss
        for ids, context in zip(family, contexts, strict=True)
    ]
    torch.stack(losses).sum().backward()
    for name, gradient in gradients(model).items():
        assert_close(together[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_contexts_that_do_not_fit_are_refused(make: Make, family: list[Tensor]) -> None:
    model = make(PerformerForMaskedLM)
    context = read(model, family[0])
    with pytest.raises(InputError, match="2 rows for 1 sequences"):
        model(family[1], context=context.joined(context))
    with pytest.raises(InputError, match="states for 2 layers, and the model has 3"):
        make(PerformerForMaskedLM, num_hidden_layers=3)(family[1], context=context)
    with pytest.raises(InputError, match="either context or past_key_values"):
        make(PerformerForCausalLM)(family[1], context=context, past_key_values=PerformerCache(2))
    with pytest.raises(InputError, match="belong together"):
        model(family[1], relatives=torch.ones(1, 1))
    with pytest.raises(UnsupportedError, match="no layer can read another protein's state"):
        make(PerformerForMaskedLM, attention="local").performer.read_context(family[0])


def test_keys_of_exact_attention_cannot_be_taken_out_of_a_sum(make: Make, family: list[Tensor]) -> None:
    context = read(make(PerformerForMaskedLM, attention="exact"), family[0])
    with pytest.raises(UnsupportedError, match="weights of 0 and 1"):
        context.mixed(torch.tensor([[-1.0]]))
