"""Reversible layers give the gradients of layers that keep everything, and keep nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers import PerformerForCausalLM, PerformerForMaskedLM, PerformerModel
from performers.benchmarks.isolation import RETURN_FREED_MEMORY
from performers.errors import UnsupportedError
from performers.models.modeling_performer import DropoutKeys

from .conftest import gradients, recompute_activations, residues
from .test_chunking import assert_equal_training

Make = Callable[..., Any]
LANGUAGE_MODELS = [PerformerForMaskedLM, PerformerForCausalLM]
LENGTH = 83
ATTENTION: dict[str, dict[str, Any]] = {
    "favor-relu": {"attention": "favor", "attention_kwargs": {"num_features": 24}},
    "favor-softmax": {"attention": "favor", "attention_kwargs": {"kernel": "softmax", "num_features": 24}},
    "exact": {"attention": "exact"},
    "exact-materialised": {"attention": "exact-materialised"},
    "reformer": {"attention": "reformer", "attention_kwargs": {"num_hashes": 2, "bucket_size": 8}},
    "sparse": {"attention": "sparse", "attention_kwargs": {"stride": 6}},
    "local": {"attention": "local", "attention_kwargs": {"window": 6}},
    "split": {"attention": "split", "attention_kwargs": {"first_kwargs": {"window": 6}}},
    "hybrid": {"attention": ["favor", "exact", "local"]},
}


def reversible(make: Make, model_class: type, **overrides: Any) -> Any:
    return make(model_class, **{"num_hidden_layers": 3, "reversible": True, **overrides})


def by_the_book(
    body: PerformerModel,
    ids: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keys: Tensor | None = None,
) -> list[Tensor]:
    """The embeddings and what is behind every layer, all of it kept by autograd: 2001.04451, equation 9, written down."""
    dropout = None if keys is None else DropoutKeys(keys, 0, ids.shape[1])
    positions = torch.arange(ids.shape[1])[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    if cu_seqlens is not None:
        positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])[None]
    rotary, real = body.rotary(positions), None if mask is None else mask.bool()
    x1 = x2 = body.embed_dropout(body.embed_tokens(ids), dropout)
    behind = [x1]
    layers: Any = body.layers
    for layer in layers:
        attended, _ = layer.attention(layer.attention_norm(x2), rotary, real, cu_seqlens, None, False)
        x1 = x1 + layer.attention_dropout(attended, dropout)
        block = layer.feed_forward
        pieces = x1.split(block.chunk_size or ids.shape[1], dim=1)
        fed = torch.cat([block.out_proj(F.gelu(block.in_proj(block.norm(piece)))) for piece in pieces], 1)
        x2 = x2 + layer.feed_forward_dropout(fed, dropout)
        behind.append((x1 + x2) / 2)
    return [*behind[:-1], body.norm(behind[-1])]


Trained = tuple[Tensor, dict[str, Tensor]]


def trained(model: Any, loss: Tensor) -> Trained:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def both(model: Any, layout: str = "plain", keys: Tensor | None = None) -> tuple[Trained, Trained]:
    """A training step of the model, and the same by the book."""
    ids, labels = residues(2, LENGTH), residues(2, LENGTH, seed=1)
    mask = cuts = None
    if layout == "padded":
        mask = torch.ones_like(ids)
        mask[0, 50:], mask[1, :30] = 0, 0
        labels = labels.masked_fill(mask == 0, -100)
    if layout == "packed":
        ids, labels, cuts = ids[:1], labels[:1], torch.tensor([0, 20, 20, 61, LENGTH])
    torch.manual_seed(5)
    inputs: dict[str, Any] = {"labels": labels, "attention_mask": mask, "cu_seqlens": cuts, "dropout_keys": keys}
    found = trained(model, model(ids, **inputs).loss)
    torch.manual_seed(5)
    if model.is_causal:
        if cuts is not None:
            labels = labels.index_fill(1, cuts[:-1], -100)
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return found, trained(model, model.cross_entropy(by_the_book(model.performer, ids, mask, cuts, keys)[-1], labels))


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-4)], ids=str)
def test_gradients_are_those_of_layers_that_keep_everything(
    attention: str, model_class: type, layout: str, dtype: torch.dtype, tolerance: float, make: Make
) -> None:
    """In float32 about 1e-5, and more where rounding turns the sign under a ReLU, whose slope jumps there."""
    model = reversible(make, model_class, hidden_dropout_prob=0.2, **ATTENTION[attention]).to(dtype).train()
    keys = torch.tensor([7]) if layout == "packed" else torch.tensor([7, 8])
    assert_equal_training(*both(model, layout, keys), tolerance)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
@pytest.mark.parametrize("attention", ["favor-relu", "favor-softmax", "exact", "local", "split"])
def test_layers_and_feed_forward_blocks_in_chunks_combine_with_it(
    attention: str, model_class: type, make: Make
) -> None:
    for layer, feed_forward in ((0, 7), (13, 0), (13, 7), (40, 64)):
        sizes = {"chunk_size_layer": layer, "chunk_size_feed_forward": feed_forward, "hidden_dropout_prob": 0.2}
        model = reversible(make, model_class, **sizes, **ATTENTION[attention]).double().train()
        for layout in ("plain", "padded"):
            assert_equal_training(*both(model, layout, torch.tensor([3, 4])), 1e-10)


def test_dropout_without_keys_is_replayed(make: Make) -> None:
    """One key is drawn for the batch, from torch's global generator."""
    model = reversible(make, PerformerForMaskedLM, hidden_dropout_prob=0.3).train()
    torch.manual_seed(5)
    key = torch.randint(2**62, (1,))
    found, _ = both(model)
    _, expected = both(model, keys=key)
    assert_equal_training(found, expected, 2e-5)


@pytest.mark.parametrize("sizes", [{}, {"chunk_size_feed_forward": 16}])
def test_dropout_that_somebody_put_into_a_layer_is_replayed_too(sizes: dict[str, Any], make: Make) -> None:
    """As adapters do; it draws from torch's global generator, which is left as the forward pass left it."""
    model = reversible(make, PerformerForMaskedLM, **sizes).train()
    for layer in model.performer.layers:
        layer.attention.v_proj = nn.Sequential(layer.attention.v_proj, nn.Dropout(0.4))
        layer.feed_forward.out_proj = nn.Sequential(layer.feed_forward.out_proj, nn.Dropout(0.4))
    ids = residues(2, LENGTH)
    torch.manual_seed(5)
    loss = model(ids, labels=ids).loss
    after = torch.get_rng_state()
    found = trained(model, loss)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(5)
    torch.randint(2**62, (1,))  # the key that the model draws for dropout of its own
    expected = trained(model, model.cross_entropy(by_the_book(model.performer, ids)[-1], ids))
    assert_equal_training(found, expected, 2e-5)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
@pytest.mark.parametrize("attention", ["favor-relu", "exact", "exact-materialised", "sparse", "local", "split"])
def test_under_autocast_gradients_are_those_of_kept_activations(attention: str, model_class: type, make: Make) -> None:
    sizes = {"initializer_range": 0.1, "hidden_dropout_prob": 0.1}
    model = reversible(make, model_class, **sizes, **ATTENTION[attention]).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = both(model, keys=torch.tensor([1, 2]))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-4)
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[1][name]).norm() <= 0.02 * expected[1][name].norm() + 1e-6, name


@pytest.mark.parametrize("size", [0, 13])
def test_a_model_in_bfloat16_has_streams_in_float32(size: int, make: Make) -> None:
    sizes = {"initializer_range": 0.1, "chunk_size_layer": size}
    exact = reversible(make, PerformerForMaskedLM, **sizes).train()
    ids = residues(2, LENGTH)
    expected = trained(exact, exact(ids, labels=ids).loss)
    model = reversible(make, PerformerForMaskedLM, **sizes).to(torch.bfloat16).train()
    outputs = model.performer(ids, output_hidden_states=True)
    assert {hidden.dtype for hidden in outputs.hidden_states} == {torch.bfloat16}
    found = trained(model, model(ids, labels=ids).loss)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=0.02)
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.bfloat16
        if name.endswith("weight"):
            assert (gradient - expected[1][name]).norm() < 0.1 * expected[1][name].norm(), name


def test_what_is_behind_every_layer_can_be_asked_for_and_learned_from(make: Make) -> None:
    model = reversible(make, PerformerModel).double().train()
    ids, weights = residues(2, LENGTH), torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).double()
    for wanted in ([0, 1, 2, 3], [1], [2, 3], [0]):
        hidden = model(ids, output_hidden_states=True).hidden_states
        found = trained(model, torch.stack([(hidden[i] * weights[i]).sum() for i in wanted]).sum())
        book = by_the_book(model, ids)
        expected = trained(model, torch.stack([(book[i] * weights[i]).sum() for i in wanted]).sum())
        assert_equal_training(found, expected, 1e-10)


def test_a_graph_that_is_retained_gives_its_gradients_twice(make: Make) -> None:
    model = reversible(make, PerformerForMaskedLM).double().train()
    ids = residues(1, 30)
    loss = model(ids, labels=ids).loss
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True))


def test_frozen_layers_need_no_gradient(make: Make) -> None:
    model = reversible(make, PerformerForMaskedLM).double().train()
    for frozen in (model.performer.embed_tokens, model.performer.layers[0], model.performer.layers[2]):
        frozen.requires_grad_(False)
    found, expected = both(model)
    assert_equal_training(found, expected, 1e-10)
    assert any(name.startswith("performer.layers.1.") for name in found[1])
    assert not any(name.startswith("performer.layers.0.") for name in found[1])


@pytest.mark.parametrize("depths", [(2, 6)])
def test_what_is_kept_does_not_grow_with_the_layers(depths: tuple[int, int], make: Make) -> None:
    kept = []
    for layers in depths:
        model = reversible(make, PerformerForMaskedLM, num_hidden_layers=layers).train()
        found: dict[int, int] = {}

        def keep(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = residues(1, 512)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        kept.append(sum(found.values()))
        loss.backward()
    assert kept[0] == kept[1]


# Each model in a process of its own, forked from one that has only imported torch.
MEMORY = """
import os
import sys
import torch
from performers import PerformerConfig, PerformerForMaskedLM
from performers.memory import forget_peak, peak_memory, resident_memory

def weigh(layers, reversible):
    torch.manual_seed(0)
    config = PerformerConfig.preset("tiny", num_hidden_layers=layers, reversible=reversible, hidden_dropout_prob=0.1,
                                    attention=sys.argv[1])
    model = PerformerForMaskedLM(config).train()
    ids = torch.randint(4, 24, (1, 4096))
    model(ids[:, :64], labels=ids[:, :64]).loss.backward()
    forget_peak()
    before = resident_memory()
    model(ids, labels=ids).loss.backward()
    print(peak_memory() - before, flush=True)

for layers, reversible in ((6, False), (12, False), (6, True), (12, True)):
    child = os.fork()
    if child == 0:
        weigh(layers, reversible)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("attention", ["favor", pytest.param("reformer", marks=pytest.mark.slow)])
def test_twice_the_layers_do_not_take_twice_the_memory(attention: str) -> None:
    environment = {**os.environ, **RETURN_FREED_MEMORY}
    command = [sys.executable, "-c", MEMORY, attention]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    six, twelve, six_reversible, twelve_reversible = map(int, done.stdout.split())
    stored = twelve - six
    assert stored > 80 * 2**20  # what six layers keep otherwise: some 16 MiB each
    assert abs(twelve_reversible - six_reversible) < stored / 20


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_a_run_that_is_saved_and_opened_again_goes_on_as_if_it_had_not_been(
    model_class: Any, make: Make, tmp_path: Path
) -> None:
    def steps(model: Any, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            ids = residues(2, 40, seed=step)
            optimizer.zero_grad()
            model(ids, labels=ids, dropout_keys=torch.tensor([step, step + 100])).loss.backward()
            optimizer.step()

    def begin(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.train().parameters(), lr=1e-2)

    whole = reversible(make, model_class, hidden_dropout_prob=0.1)
    steps(whole, begin(whole), range(4))
    first = reversible(make, model_class, hidden_dropout_prob=0.1)
    optimizer = begin(first)
    steps(first, optimizer, range(2))
    first.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert again.config.reversible
    resumed = begin(again)
    resumed.load_state_dict(optimizer.state_dict())
    steps(again, resumed, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_training_goes_on_from_a_state(make: Make) -> None:
    """With a cache layers keep what autograd needs, and states carry gradients from piece to piece."""
    from performers.models import PerformerCache

    model = reversible(make, PerformerForCausalLM, **ATTENTION["split"]).double().train()
    ids, cache = residues(1, LENGTH), PerformerCache(3)
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    hidden = torch.cat([model.performer(part, past_key_values=cache)[0] for part in ids.split(30, dim=1)], 1)
    found = trained(model, model.cross_entropy(hidden, labels))
    assert_equal_training(found, trained(model, model(ids, labels=ids).loss), 1e-10)


def test_the_weights_of_the_other_architecture_load_but_compute_something_else(make: Make, tmp_path: Path) -> None:
    plain = make(PerformerForMaskedLM, num_hidden_layers=3)
    plain.save_pretrained(tmp_path)
    other = PerformerForMaskedLM.from_pretrained(tmp_path, reversible=True)
    ids = residues(1, 20)
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert not torch.allclose(other(ids).logits, plain(ids).logits, atol=1e-3)


def test_gradient_checkpointing_is_refused(make: Make) -> None:
    model = reversible(make, PerformerForMaskedLM).train()
    recompute_activations(model)
    with pytest.raises(UnsupportedError, match="reversible layers keep nothing that it could save"):
        model(residues(1, 9))


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_a_compiled_model_keeps_what_its_graph_needs_and_gives_the_same(model_class: type, make: Make) -> None:
    model = reversible(make, model_class, hidden_dropout_prob=0.2).train()
    inputs = {"labels": residues(2, 50), "dropout_keys": torch.tensor([3, 4])}
    expected = trained(model, model(residues(2, 50), **inputs).loss)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_equal_training(trained(model, compiled(residues(2, 50), **inputs).loss), expected, 2e-5)
