from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from performers import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
    PerformerTokenizer,
)
from performers.errors import InputError, UnsupportedError
from performers.models import PerformerCache
from performers.models.modeling_performer import DropoutKeys, PerformerRotary, rotate

from .conftest import PROTEINS, gradients, recompute_activations, residues

Make = Callable[..., Any]
LANGUAGE_MODELS = [PerformerForMaskedLM, PerformerForCausalLM]


def close(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def assert_same_training(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> None:
    close(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    for name in first[1]:
        close(first[1][name], second[1][name])


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_invisible(
    model_class: type, padding_side: str, mixture: dict[str, Any], make: Make, tokenizer: PerformerTokenizer
) -> None:
    model = make(model_class, **mixture)
    batch = tokenizer(PROTEINS, padding=True, padding_side=padding_side, return_tensors="pt")
    together = model(**batch).logits
    for row, protein in enumerate(PROTEINS):
        alone = model(**tokenizer(protein, return_tensors="pt")).logits[0]
        close(together[row][batch["attention_mask"][row].bool()], alone)


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_packed_proteins_are_as_each_alone(
    model_class: type, mixture: dict[str, Any], make: Make, tokenizer: PerformerTokenizer
) -> None:
    model = make(model_class, **mixture)
    ids, offsets = tokenizer.encode_bulk([*PROTEINS, "M"])
    offsets = torch.from_numpy(offsets)[torch.tensor([0, 1, 2, 2, 3, 4])]  # and an empty one in between
    packed = model(torch.from_numpy(ids)[None].long(), cu_seqlens=offsets).logits[0]
    alone = [model(**tokenizer(protein, return_tensors="pt")).logits[0] for protein in [*PROTEINS, "M"]]
    close(packed, torch.cat(alone))


def test_proteins_joined_in_one_row_see_each_other(make: Make) -> None:
    model = make(PerformerForMaskedLM)
    joined = torch.cat([residues(1, 20), torch.tensor([[2]]), residues(1, 20, seed=1)], dim=1)
    changed = torch.cat([residues(1, 20, seed=2), joined[:, 20:]], dim=1)
    assert not torch.allclose(model(joined).logits[:, 21:], model(changed).logits[:, 21:], atol=1e-3)


def test_a_causal_model_does_not_see_the_future(mixture: dict[str, Any], make: Make) -> None:
    model = make(PerformerForCausalLM, **mixture)
    ids = residues(2, 150)
    changed = ids.clone()
    changed[:, 100:] = residues(2, 50, seed=1)
    assert torch.equal(model(ids).logits[:, :100], model(changed).logits[:, :100])
    assert not torch.allclose(model(ids).logits[:, 100:], model(changed).logits[:, 100:], atol=1e-3)


def test_a_masked_model_sees_both_sides(mixture: dict[str, Any], make: Make) -> None:
    model = make(PerformerForMaskedLM, **mixture)
    ids = residues(1, 50)
    changed = ids.clone()
    changed[:, -1] = 3
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0], atol=1e-4)


def test_causality_comes_from_the_class_and_never_from_the_configuration(make: Make) -> None:
    causal, masked = make(PerformerForCausalLM), make(PerformerForMaskedLM)
    assert causal.config.to_diff_dict() == masked.config.to_diff_dict()
    base = PerformerModel(causal.config, is_causal=True).eval()
    base.load_state_dict(causal.performer.state_dict())
    ids = residues(1, 9)
    assert torch.equal(base(ids).last_hidden_state, causal.performer(ids).last_hidden_state)


def test_a_shift_of_a_million_positions_changes_nothing(make: Make) -> None:
    model = make(PerformerForMaskedLM, attention="exact")
    ids, positions = residues(1, 40), torch.arange(40)[None]
    close(model(ids, position_ids=positions + 1_000_000).logits, model(ids, position_ids=positions).logits, atol=1e-4)


def test_rotary_products_depend_on_the_distance_alone(make: Make) -> None:
    rotary = PerformerRotary(make(PerformerModel).config)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(m: int, n: int) -> Tensor:
        return (rotate(q, rotary(torch.tensor([[m]]))) * rotate(k, rotary(torch.tensor([[n]])))).sum()

    close(product(3, 10), product(999_993, 1_000_000))
    assert abs(product(3, 10) - product(3, 11)) > 1e-3


def test_position_matters(make: Make) -> None:
    model = make(PerformerForMaskedLM)
    ids = residues(1, 30)
    assert not torch.allclose(model(ids).logits.flip(1), model(ids.flip(1)).logits, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_the_loss_is_the_mean_cross_entropy_of_the_labelled_tokens(chunk_size: int, make: Make) -> None:
    ids, labels = residues(2, 30), residues(2, 30, seed=1)
    labels[:, ::3] = -100
    masked = make(PerformerForMaskedLM, chunk_size_feed_forward=chunk_size)(ids, labels=labels)
    close(masked.loss, F.cross_entropy(masked.logits.flatten(0, 1), labels.flatten()))
    causal = make(PerformerForCausalLM, chunk_size_feed_forward=chunk_size)(ids, labels=labels)
    close(causal.loss, F.cross_entropy(causal.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_num_items_in_batch_is_what_the_loss_is_divided_by(make: Make) -> None:
    for model in (make(PerformerForMaskedLM), make(PerformerForTokenClassification, num_labels=29)):
        ids, labels = residues(2, 30), residues(2, 30, seed=1)
        whole = model(ids, labels=labels).loss
        parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=60).loss for i in range(2)]
        close(sum(parts, torch.tensor(0.0)), whole)


def test_a_batch_without_labelled_tokens_has_no_loss_and_no_gradient(make: Make) -> None:
    loss, found = loss_and_gradients(
        make(PerformerForMaskedLM), input_ids=residues(1, 9), labels=torch.full((1, 9), -100)
    )
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


def test_training_returns_no_logits_and_evaluation_does(make: Make) -> None:
    model, ids = make(PerformerForMaskedLM), residues(1, 9)
    assert model(ids, labels=ids).logits.shape == (1, 9, 29)
    assert model.train()(ids, labels=ids).logits is None
    assert model(ids).logits.shape == (1, 9, 29)


def test_logits_to_keep_are_the_last_ones(make: Make) -> None:
    model, ids = make(PerformerForCausalLM), residues(2, 9)
    close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_hidden_states_are_the_embeddings_and_every_layers_output(make: Make) -> None:
    model, ids = make(PerformerModel), residues(1, 9)
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(outputs.hidden_states[0], model.embed_tokens(ids))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert model(ids).hidden_states is None
    assert torch.equal(model(ids, return_dict=False)[0], outputs.last_hidden_state)


def test_embeddings_stand_for_token_ids(make: Make) -> None:
    model, ids = make(PerformerForMaskedLM), residues(1, 9)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("single_label_classification", 3, torch.tensor([0, 2])),
        ("regression", 1, torch.tensor([0.5, -1.0])),
        ("multi_label_classification", 3, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    ],
)
def test_a_protein_is_classified_by_the_mean_of_its_tokens(
    problem: str, num_labels: int, labels: Tensor, make: Make, tokenizer: PerformerTokenizer
) -> None:
    model = make(PerformerForSequenceClassification, num_labels=num_labels, problem_type=problem)
    batch = tokenizer(PROTEINS[:2], padding=True, return_tensors="pt")
    outputs = model(**batch, labels=labels)
    assert outputs.logits.shape == (2, num_labels)
    assert outputs.loss.isfinite()
    alone = tokenizer(PROTEINS[1], return_tensors="pt")
    close(outputs.logits[1:], model(**alone).logits)
    close(outputs.logits[1:], model.classifier(model.performer(**alone).last_hidden_state.mean(1)))


def test_each_residue_is_classified(make: Make) -> None:
    model = make(PerformerForTokenClassification, num_labels=3)
    ids, labels = residues(2, 9), residues(2, 9) % 3
    outputs = model(ids, labels=labels)
    close(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()))


def test_a_feed_forward_block_in_chunks_is_the_same(make: Make) -> None:
    ids = residues(2, 50)
    at_once = make(PerformerForMaskedLM, chunk_size_feed_forward=0).train()
    in_chunks = make(PerformerForMaskedLM, chunk_size_feed_forward=16).train()
    inputs = {"input_ids": ids, "labels": ids}
    assert_same_training(loss_and_gradients(in_chunks, **inputs), loss_and_gradients(at_once, **inputs))
    with torch.no_grad():
        close(in_chunks.eval()(ids).logits, at_once.eval()(ids).logits)


def test_what_is_kept_for_the_backward_pass_is_a_few_hidden_states(mixture: dict[str, Any], make: Make) -> None:
    sizes = {"intermediate_size": 1024, "vocab_size": 512, "chunk_size_feed_forward": 64, "hidden_dropout_prob": 0.1}
    model = make(PerformerForCausalLM, **sizes, **mixture).train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = residues(1, 1024)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, dropout_keys=torch.tensor([1])).loss
    hidden_states = ids.shape[1] * model.config.hidden_size * 4
    assert sum(kept.values()) < (2 * 9 + 4) * hidden_states  # nine per layer, and the ends
    loss.backward()


@pytest.mark.parametrize("dropout_keys", [None, torch.tensor([3, 4])])
def test_gradient_checkpointing_changes_nothing(
    dropout_keys: Tensor | None, mixture: dict[str, Any], make: Make
) -> None:
    model = make(PerformerForCausalLM, hidden_dropout_prob=0.3, chunk_size_feed_forward=16, **mixture).train()
    inputs = {"input_ids": residues(2, 50), "labels": residues(2, 50), "dropout_keys": dropout_keys}
    torch.manual_seed(1)
    expected = loss_and_gradients(model, **inputs)
    recompute_activations(model)
    if model.config.reversible:
        with pytest.raises(UnsupportedError, match="reversible layers keep nothing that it could save"):
            model(**inputs)
        return
    torch.manual_seed(1)
    assert_same_training(loss_and_gradients(model, **inputs), expected)


def test_every_parameter_gets_a_gradient(mixture: dict[str, Any], make: Make) -> None:
    ids = residues(1, 9)
    for model in (
        make(PerformerForMaskedLM, **mixture),
        make(PerformerForCausalLM, tie_word_embeddings=False, **mixture),
        make(PerformerForTokenClassification, num_labels=29, **mixture),
        make(PerformerForSequenceClassification, **mixture),
    ):
        labels = torch.tensor([1]) if isinstance(model, PerformerForSequenceClassification) else ids
        _, found = loss_and_gradients(model.train(), input_ids=ids, labels=labels)
        assert found.keys() == dict(model.named_parameters()).keys()


def test_bfloat16_autocast_stays_close(mixture: dict[str, Any], make: Make) -> None:
    model = make(PerformerForMaskedLM, initializer_range=0.1, **mixture)
    ids = residues(2, 70)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids).logits.float()
    assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_a_compiled_model_gives_the_same_loss_and_gradients(model_class: type, make: Make) -> None:
    model = make(model_class, hidden_dropout_prob=0.2, chunk_size_feed_forward=16).train()
    inputs = {"input_ids": residues(2, 50), "labels": residues(2, 50), "dropout_keys": torch.tensor([3, 4])}
    expected = loss_and_gradients(model, **inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(**inputs).loss
    loss.backward()
    assert_same_training((loss.detach(), gradients(model)), expected)


def test_dropout_with_keys_does_not_depend_on_the_batch(make: Make) -> None:
    model = make(PerformerModel, hidden_dropout_prob=0.5).train()
    ids, keys = residues(4, 30), torch.tensor([7, 8, 9, 10])
    together = model(ids, dropout_keys=keys).last_hidden_state
    for row in range(4):
        close(model(ids[row : row + 1], dropout_keys=keys[row : row + 1]).last_hidden_state[0], together[row])
    packed = model(ids.view(1, -1), dropout_keys=keys, cu_seqlens=torch.arange(0, 121, 30)).last_hidden_state
    close(packed.view(together.shape), together)
    assert not torch.allclose(model(ids, dropout_keys=keys + 1).last_hidden_state, together)


def test_dropout_with_keys_does_not_depend_on_threads(make: Make) -> None:
    model = make(PerformerModel, hidden_dropout_prob=0.5, hidden_size=512).train()
    hidden = torch.ones(1, 4096, 512)
    threads = torch.get_num_threads()
    try:
        dropped = []
        for number in (1, 2):
            torch.set_num_threads(number)
            dropped.append(model.embed_dropout(hidden, DropoutKeys(torch.tensor([5]), 0, 4096)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*dropped)
    assert (dropped[0] == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert dropped[0].max() == 2


def test_evaluation_drops_nothing(make: Make) -> None:
    model, ids = make(PerformerModel, hidden_dropout_prob=0.5), residues(1, 30)
    assert torch.equal(model(ids).last_hidden_state, model(ids, dropout_keys=torch.tensor([1])).last_hidden_state)


def test_features_are_redrawn_as_a_function_of_seed_and_step(make: Make) -> None:
    model = make(PerformerForMaskedLM, attention=["favor", "exact"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.redraw_features_(seed=1, step=10)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    changed = [name for name in before if not torch.equal(before[name], first[name])]
    assert changed == ["performer.layers.0.attention.mechanism.features.projection"]
    model.redraw_features_(seed=1, step=20)
    assert not torch.equal(model.state_dict()[changed[0]], first[changed[0]])
    model.redraw_features_(seed=1, step=10)
    assert torch.equal(model.state_dict()[changed[0]], first[changed[0]])


def test_layers_have_projections_of_their_own(make: Make) -> None:
    first, second = (layer.attention.mechanism.features.projection for layer in make(PerformerModel).layers)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, UnsupportedError, "attention_mask has 4 dimensions"),
        ({"attention_mask": torch.ones(1, 8)}, InputError, r"attention_mask has shape \(1, 8\): expected \(1, 9\)"),
        ({"output_attentions": True}, UnsupportedError, "never forms attention weights"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, InputError, "position_ids start again"),
        ({"use_cache": True}, UnsupportedError, "only a causal Performer"),
        ({"past_key_values": PerformerCache(2)}, UnsupportedError, "only a causal Performer"),
        ({"inputs_embeds": torch.zeros(1, 9, 32)}, InputError, "either input_ids or inputs_embeds"),
        ({"dropout_keys": torch.arange(2)}, InputError, "dropout_keys has shape .* divides the 9 tokens"),
        ({"attention_mask": torch.ones(1, 9), "cu_seqlens": torch.tensor([0, 9])}, InputError, "cannot be combined"),
    ],
)
def test_what_a_masked_performer_cannot_do_is_refused(
    inputs: dict[str, Any], error: type[Exception], message: str, make: Make
) -> None:
    with pytest.raises(error, match=message):
        make(PerformerForMaskedLM)(residues(1, 9), **inputs)


def test_an_unknown_argument_is_refused(make: Make) -> None:
    with pytest.raises(TypeError, match="sequence_id"):
        make(PerformerForMaskedLM)(residues(1, 9), sequence_id=torch.zeros(1, 9))


def test_packed_rows_are_no_batch_for_sequence_classification(make: Make) -> None:
    with pytest.raises(UnsupportedError, match="one protein per row"):
        make(PerformerForSequenceClassification)(residues(1, 9), cu_seqlens=torch.tensor([0, 9]))


def test_the_causal_loss_of_packed_sequences_is_that_of_each_alone() -> None:
    model = PerformerForCausalLM(PerformerConfig.preset("tiny", num_hidden_layers=1)).eval()
    lengths = [10, 7, 9]
    sequences = [torch.randint(4, 24, (1, length)) for length in lengths]
    ids, offsets = torch.cat(sequences, 1), torch.tensor([0, 10, 17, 26, 26], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=offsets, labels=ids).loss
        alone = [model(x, labels=x).loss * (x.shape[1] - 1) for x in sequences]
    torch.testing.assert_close(packed, sum(alone) / sum(length - 1 for length in lengths))
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert model(empty, labels=empty).loss == 0


def test_positions_that_restart_are_refused_beside_a_mask_too() -> None:
    model = PerformerModel(PerformerConfig.preset("tiny", num_hidden_layers=1))
    ids, positions = torch.randint(4, 24, (1, 20)), torch.cat([torch.arange(8), torch.arange(12)])[None]
    with pytest.raises(InputError, match="position_ids start again"):
        model(ids, position_ids=positions, attention_mask=torch.ones(1, 20))
    left = torch.tensor([[0] * 8 + [1] * 12])
    model(ids, position_ids=positions, attention_mask=left)  # padding has no position


def test_the_classification_heads_drop_by_keys_and_count_no_label_as_no_loss() -> None:
    config = PerformerConfig.preset("tiny", num_hidden_layers=1, hidden_dropout_prob=0.3, num_labels=3)
    ids, keys = torch.randint(4, 24, (2, 20)), torch.tensor([5, 6])
    for kind in (PerformerForTokenClassification, PerformerForSequenceClassification):
        model = kind(config).train()
        assert torch.equal(model(ids, dropout_keys=keys).logits, model(ids, dropout_keys=keys).logits)
    nothing = torch.full((2, 20), -100)
    assert PerformerForTokenClassification(config)(ids, labels=nothing).loss == 0
    with pytest.raises(InputError, match="dropout_keys"):
        model(ids, dropout_keys=torch.zeros(0, dtype=torch.long))


def test_asking_for_attention_maps_in_the_configuration_is_refused() -> None:
    model = PerformerModel(PerformerConfig.preset("tiny", num_hidden_layers=1, output_attentions=True))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(torch.randint(4, 24, (1, 5)))


def test_reformer_layers_share_queries_and_keys_and_are_saved_with_their_rotations(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    model = make(PerformerForMaskedLM, attention="reformer", attention_kwargs={"bucket_size": 8, "num_hashes": 2})
    assert not any("k_proj" in name for name, _ in model.named_parameters())
    ids = residues(2, 50)
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.redraw_features_(seed=3, step=1)
    model.save_pretrained(tmp_path)
    again = PerformerForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
