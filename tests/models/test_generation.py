from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from performers import PerformerForCausalLM, PerformerTokenizer
from performers.errors import InputError, UnsupportedError
from performers.models import PerformerCache

from .conftest import PROTEINS, recompute_activations, residues

Make = Callable[..., Any]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def recompute(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding without any state: the whole sequence anew for every token."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_generation_is_the_same_as_recomputing_everything(mixture: dict[str, Any], make: Make) -> None:
    model = make(PerformerForCausalLM, **mixture)
    prompts = residues(3, 40)
    generated = model.generate(prompts, max_new_tokens=60, **GREEDY)
    assert torch.equal(generated, recompute(model, prompts, 60))
    assert len(set(generated[:, 40:].flatten().tolist())) > 5  # not one token over and over


def test_left_padded_prompts_go_on_as_each_alone(mixture: dict[str, Any], make: Make) -> None:
    model = make(PerformerForCausalLM, **mixture)
    tokenizer = PerformerTokenizer(add_eos=False)
    together = model.generate(**tokenizer(PROTEINS, padding=True, return_tensors="pt"), max_new_tokens=20, **GREEDY)
    for row, protein in enumerate(PROTEINS):
        alone = recompute(model, tokenizer(protein, return_tensors="pt")["input_ids"], 20)
        assert together[row, -20:].tolist() == alone[0, -20:].tolist()


def test_generation_with_and_without_a_state_agree_under_beam_search(mixture: dict[str, Any], make: Make) -> None:
    model = make(PerformerForCausalLM, **mixture)
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 20}
    prompts = residues(2, 12)
    assert torch.equal(model.generate(prompts, **options), model.generate(prompts, use_cache=False, **options))


def test_sampling_with_a_seed_is_reproducible_and_independent_of_the_state(make: Make) -> None:
    model = make(PerformerForCausalLM)
    drawn = []
    for use_cache in (True, True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_return_sequences": 4, "eos_token_id": None, "pad_token_id": 0}
        drawn.append(model.generate(residues(1, 5), max_new_tokens=30, use_cache=use_cache, **options))
    assert drawn[0].shape == (4, 35)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_generation_starts_from_nothing_and_stops_at_eos(make: Make) -> None:
    model = make(PerformerForCausalLM)
    torch.manual_seed(0)
    generated = model.generate(do_sample=True, max_new_tokens=200, num_return_sequences=8, pad_token_id=0)
    assert (generated[:, 0] == 1).all()
    for row in generated.tolist():
        end = row.index(2) if 2 in row else len(row)
        assert not any(row[end + 1 :])


def test_a_sequence_read_in_pieces_gives_the_same_logits(mixture: dict[str, Any], make: Make) -> None:
    model = make(PerformerForCausalLM, **mixture)
    ids = residues(2, 150)
    cache, pieces = PerformerCache(2), []
    for piece in ids.split([70, 1, 64, 15], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=1e-4, atol=2e-5)
    assert cache.get_seq_length() == 150


def test_a_prompt_can_be_read_in_chunks(make: Make) -> None:
    model = make(PerformerForCausalLM)
    prompts = residues(2, 50)
    generated = model.generate(
        prompts, past_key_values=PerformerCache(2), prefill_chunk_size=16, max_new_tokens=10, use_cache=True, **GREEDY
    )
    assert torch.equal(generated, recompute(model, prompts, 10))


def test_the_state_has_the_same_size_after_ten_and_after_ten_thousand_tokens(make: Make) -> None:
    model = make(PerformerForCausalLM)
    sizes = []
    with torch.no_grad():
        for length in (10, 10_000):
            states = model(residues(1, length), use_cache=True, logits_to_keep=1).past_key_values.states
            sizes.append(sum(state.nbytes for state in states))
    assert sizes[0] == sizes[1] < 300_000


def test_reset_forgets_everything(make: Make) -> None:
    model = make(PerformerForCausalLM)
    cache = PerformerCache(2)
    first = model(residues(1, 9), past_key_values=cache).logits
    cache.reset()
    assert torch.equal(model(residues(1, 9), past_key_values=cache).logits, first)


def test_what_a_state_cannot_do_is_refused(make: Make) -> None:
    model, ids = make(PerformerForCausalLM), residues(1, 9)
    with pytest.raises(InputError, match="past_key_values is a DynamicCache: expected a PerformerCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(InputError, match="cannot be combined with cu_seqlens"):
        model(ids, use_cache=True, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(
        InputError, match=r"attention_mask has shape \(1, 1\): expected \(1, 10\), for 9 tokens seen before"
    ):
        model(ids[:, :1], attention_mask=torch.ones(1, 1), past_key_values=model(ids, use_cache=True).past_key_values)
    with pytest.raises(UnsupportedError, match="cannot be rolled back"):
        PerformerCache(2).crop(1)
    recompute_activations(model.train())
    with pytest.raises(UnsupportedError, match="gradient checkpointing would move the state on twice"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.eval().generate(ids, assistant_model=model, max_new_tokens=3)
