"""Layers that run a chunk of tokens at a time give what whole ones give, and keep nothing but their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from performers import PerformerForCausalLM, PerformerForMaskedLM, PerformerModel
from performers.errors import InputError
from performers.models import PerformerCache

from .conftest import gradients, recompute_activations, residues

Make = Callable[..., Any]
LANGUAGE_MODELS = [PerformerForMaskedLM, PerformerForCausalLM]
LENGTH = 101


def train_once(model: Any, padded: bool = False, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids, labels = residues(3, LENGTH), residues(3, LENGTH, seed=1)
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 60:], mask[2, :37] = 0, 0
        inputs["attention_mask"], labels = mask, labels.masked_fill(mask == 0, -100)
    inputs.setdefault("dropout_keys", torch.tensor([1, 2, 3]))
    model.zero_grad()
    loss = model(ids, labels=labels, **inputs).loss
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def assert_equal_training(
    actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    assert actual[1].keys() == expected[1].keys()
    for name, found in {"loss": actual[0], **actual[1]}.items():
        wanted = expected[0] if name == "loss" else expected[1][name]
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", ["relu", "softmax"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_a_layer_in_chunks_gives_the_loss_and_the_gradients_of_the_whole(
    model_class: type, padded: bool, kernel: str, dtype: torch.dtype, tolerance: float, make: Make
) -> None:
    kwargs = {"attention_kwargs": {"kernel": kernel, "num_features": 24}, "hidden_dropout_prob": 0.2}
    expected = train_once(make(model_class, chunk_size_layer=0, **kwargs).to(dtype).train(), padded)
    for size in (1, 13, 50, 100):
        model = make(model_class, chunk_size_layer=size, **kwargs).to(dtype).train()
        assert_equal_training(train_once(model, padded), expected, tolerance)
    recompute_activations(model)
    assert_equal_training(train_once(model, padded), expected, tolerance)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_layers_of_mechanisms_without_a_fixed_state_and_packed_rows_are_not_cut(model_class: type, make: Make) -> None:
    hybrid = {"attention": ["favor", "exact"]}
    whole, cut = (make(model_class, chunk_size_layer=size, **hybrid).train() for size in (0, 32))
    assert_equal_training(train_once(cut), train_once(whole), 1e-5)
    ids, offsets = residues(1, LENGTH), torch.tensor([0, 40, LENGTH])
    assert torch.equal(cut(ids, cu_seqlens=offsets).logits, whole(ids, cu_seqlens=offsets).logits)
    assert not cut.has_fixed_states
    assert make(model_class).has_fixed_states


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_under_autocast_the_stream_is_bfloat16_and_stays_close(model_class: type, make: Make) -> None:
    sizes = {"initializer_range": 0.1, "hidden_dropout_prob": 0.1}
    expected, found = train_once(make(model_class, chunk_size_layer=0, **sizes).train())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = make(model_class, chunk_size_layer=32, **sizes).train()
        ids = residues(3, LENGTH)
        outputs = model.performer(ids, output_hidden_states=True)
        loss = model(ids, labels=residues(3, LENGTH, seed=1), dropout_keys=torch.tensor([1, 2, 3])).loss
    loss.backward()
    assert {hidden.dtype for hidden in outputs.hidden_states} == {torch.bfloat16}
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        if name.endswith("weight"):
            assert (gradient - found[name]).norm() < 0.1 * found[name].norm(), name


def test_without_keys_a_replay_drops_what_the_forward_pass_dropped(make: Make) -> None:
    results = []
    for size in (13, 50):
        torch.manual_seed(7)
        model = make(PerformerForMaskedLM, chunk_size_layer=size, hidden_dropout_prob=0.3).train()
        torch.manual_seed(7)
        results.append(train_once(model, dropout_keys=None))
    assert_equal_training(results[0], results[1], 1e-5)


def test_dropout_of_a_long_span_is_the_same_in_chunks(make: Make) -> None:
    keys, ids = (
        torch.tensor([5, 6, 7]),
        residues(1, 3 * 700),
    )  # three packed contexts, each drawn in more than one block
    outputs = [
        make(PerformerModel, chunk_size_layer=size, hidden_dropout_prob=0.5).train()(ids, dropout_keys=keys)[0]
        for size in (0, 999, 100)
    ]
    for cut in outputs[1:]:
        torch.testing.assert_close(cut, outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_what_is_kept_of_a_layer_is_its_input(model_class: type, make: Make) -> None:
    sizes = {"num_hidden_layers": 4, "intermediate_size": 512, "vocab_size": 512}
    model = make(model_class, chunk_size_layer=64, chunk_size_feed_forward=64, **sizes).train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = residues(1, 1024)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, dropout_keys=torch.tensor([1])).loss
    hidden_states = ids.shape[1] * model.config.hidden_size * 4
    assert sum(kept.values()) < (4 + 3) * hidden_states  # one per layer, and the ends
    loss.backward()


def test_a_causal_layer_in_chunks_does_not_see_the_future(make: Make) -> None:
    model = make(PerformerForCausalLM, chunk_size_layer=32)
    ids = residues(2, LENGTH)
    changed = ids.clone()
    changed[:, 70:] = residues(2, LENGTH - 70, seed=1)
    assert torch.equal(model(ids).logits[:, :70], model(changed).logits[:, :70])


def test_chunks_that_carry_a_state_drop_what_the_whole_drops_by_a_key_per_row(make: Make) -> None:
    model = make(PerformerForCausalLM, hidden_dropout_prob=0.5).performer.train()
    ids, keys = residues(3, 700), torch.arange(3)
    whole, cache = model(ids, dropout_keys=keys)[0], PerformerCache(2)
    parts = [model(part, dropout_keys=keys, past_key_values=cache)[0] for part in ids.split(300, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"with past_key_values expected \(3,\), a key for each row"):
        model(ids, dropout_keys=torch.arange(6), past_key_values=cache)
