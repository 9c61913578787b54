"""Every kind of model through one door: the same numbers alone and in any batch, and those of the model itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, EsmForMaskedLM, EsmTokenizer

from performers import PerformerForMaskedLM, PerformerTokenizer
from performers.data import RESIDUES, Record
from performers.errors import CheckpointError, UnsupportedError
from performers.models.bundled import CAUSAL, MASKED, describe
from performers.tools import LanguageModel
from performers.tools.language_model import Reading, Unread

Folders = Callable[[str], Path]
KINDS = ["masked", "causal", "esm", "converted", "bert"]


def read(model: LanguageModel, chains: list[tuple[str, ...]], toks_per_batch: int = 256) -> list[Reading]:
    rows = [model.row(group) for group in chains]
    found = dict(model.read(rows, layers=[0, 1, 2], log_probabilities=True, toks_per_batch=toks_per_batch))
    readings = [found[index] for index in range(len(rows))]
    assert not any(isinstance(reading, Unread) for reading in readings)
    return readings


@pytest.mark.parametrize("kind", KINDS)
def test_a_proteins_numbers_are_the_same_alone_and_in_any_batch(
    folders: Folders, kind: str, records: list[Record]
) -> None:
    model = LanguageModel.open(folders(kind), device="cpu")
    chains = [(record.sequence,) for record in records]
    order = random.Random(1).sample(range(len(chains)), len(chains))
    alone = [read(model, [group])[0] for group in chains]
    for toks_per_batch in (100, 1000):
        together = dict(zip(order, read(model, [chains[i] for i in order], toks_per_batch), strict=True))
        for index, single in enumerate(alone):
            for layer in single.hidden:
                torch.testing.assert_close(together[index].hidden[layer], single.hidden[layer], atol=1e-5, rtol=0)
            np.testing.assert_allclose(together[index].log_probabilities, single.log_probabilities, atol=1e-5, rtol=0)


def test_the_numbers_of_esm_are_those_of_transformers(folders: Folders, records: list[Record]) -> None:
    folder, sequence = folders("esm"), records[0].sequence
    stock, tokenizer = EsmForMaskedLM.from_pretrained(folder).eval(), EsmTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        expected = stock(**tokenizer(sequence, return_tensors="pt"), output_hidden_states=True)
    model = LanguageModel.open(folder, device="cpu")
    (reading,) = read(model, [(sequence,)])
    for layer in (0, 1, 2):
        torch.testing.assert_close(reading.hidden[layer], expected.hidden_states[layer][0], atol=1e-5, rtol=0)
    letters = tokenizer.convert_tokens_to_ids(list(RESIDUES))
    log_probabilities = torch.log_softmax(expected.logits[0, 1:-1].float(), -1)[:, letters]
    np.testing.assert_allclose(reading.log_probabilities, log_probabilities.numpy(), atol=1e-5)


def test_the_last_layer_of_a_performer_is_after_its_final_norm(masked: Path, records: list[Record]) -> None:
    sequence = records[0].sequence
    stock = PerformerForMaskedLM.from_pretrained(masked).eval()
    with torch.inference_mode():
        inputs = PerformerTokenizer()(sequence, return_tensors="pt")
        expected = stock.performer(inputs["input_ids"]).last_hidden_state[0]
    model = LanguageModel.open(masked, device="cpu")
    assert model.layer(-1) == 2
    (reading,) = read(model, [(sequence,)])
    torch.testing.assert_close(reading.hidden[2], expected, atol=1e-5, rtol=0)


def test_a_causal_model_predicts_a_residue_from_those_before_it(causal: Path) -> None:
    model = LanguageModel.open(causal, device="cpu")
    (whole,) = read(model, [("MKTAYIAK",)])
    (other,) = read(model, [("MKTAYWWW",)])
    assert whole.log_probabilities is not None
    assert other.log_probabilities is not None
    assert whole.log_probabilities.shape == (8, 25)
    np.testing.assert_allclose(whole.log_probabilities[:6], other.log_probabilities[:6], atol=1e-6)
    assert np.abs(whole.log_probabilities[6:] - other.log_probabilities[6:]).max() > 1e-4


def test_masked_residues_are_hidden(folders: Folders) -> None:
    for kind in ("masked", "esm", "bert"):
        model = LanguageModel.open(folders(kind), device="cpu")
        rows = [model.row([text], masked=[2], wanted=[2]) for text in ("MKTAYIAK", "MKWAYIAK")]
        found = dict(model.read(rows, log_probabilities=True))
        first, second = (found[index] for index in (0, 1))
        assert isinstance(first, Reading)
        assert isinstance(second, Reading)
        assert first.log_probabilities is not None
        assert first.log_probabilities.shape == (1, 25)
        np.testing.assert_allclose(first.log_probabilities, second.log_probabilities, atol=1e-6)


def test_chains_are_read_jointly_with_positions_of_their_own(masked: Path, folders: Folders) -> None:
    model = LanguageModel.open(masked, device="cpu")
    row = model.row(("MKT", "AYIAK"))
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert row.residues.tolist() == [1, 2, 3, 6, 7, 8, 9, 10]
    joint, alone, swapped = read(model, [("MKT", "AYIAK"), ("MKT",), ("AYIAK", "MKT")], 12)
    assert (joint.hidden[2][:5] - alone.hidden[2]).abs().max() > 1e-4
    # No chain is first: positions begin anew in each, and attention has no other order.
    torch.testing.assert_close(joint.hidden[2][:5], swapped.hidden[2][7:], atol=1e-5, rtol=0)
    with pytest.raises(UnsupportedError, match="jointly"):
        LanguageModel.open(folders("esm"), device="cpu").row(("MKT", "AYIAK"))


def test_a_model_with_a_table_of_positions_refuses_what_is_longer(folders: Folders) -> None:
    model = LanguageModel.open(folders("bert"), device="cpu")
    assert model.position_limit == 60
    rows = [model.row(["M" * 58]), model.row(["M" * 59])]
    found = dict(model.read(rows, layers=[2]))
    assert isinstance(found[0], Reading)
    assert found[1] == Unread("it takes 61 tokens, and the model has positions for 60 only")


def test_letters_that_the_model_does_not_know_are_said_to_be_read_otherwise(folders: Folders) -> None:
    remark = LanguageModel.open(folders("bert"), device="cpu").remark()
    assert remark is not None
    assert "U" in remark
    assert "[UNK]" in remark
    assert LanguageModel.open(folders("esm"), device="cpu").remark() is None


def test_numbers_that_are_not_finite_fail_alone(masked: Path, records: list[Record]) -> None:
    model = LanguageModel.open(masked, device="cpu")
    stock = model._model
    stock.performer.embed_tokens = torch.nn.Embedding.from_pretrained(
        stock.performer.embed_tokens.weight.detach().clone()
    )
    stock.performer.embed_tokens.weight[PerformerTokenizer().convert_tokens_to_ids("U")] = torch.nan
    rows = [model.row([records[0].sequence]), model.row(["MKUT"]), model.row([records[1].sequence])]
    found = dict(model.read(rows, layers=[2]))
    assert isinstance(found[1], Unread)
    assert "not finite" in found[1].reason
    for index in (0, 2):
        (expected,) = read(LanguageModel.open(masked, device="cpu"), [(records[index // 2].sequence,)])
        reading = found[index]
        assert isinstance(reading, Reading)
        torch.testing.assert_close(reading.hidden[2], expected.hidden[2], atol=1e-5, rtol=0)


def test_want_of_memory_fails_alone(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.open(masked, device="cpu")
    forward = model._forward

    def small(rows, layers, log_probabilities):
        if sum(map(len, rows)) > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return forward(rows, layers, log_probabilities)

    monkeypatch.setattr(model, "_forward", small)
    rows = [model.row(["M" * length]) for length in (10, 30, 12)]
    found = dict(model.read(rows, layers=[2]))
    assert [isinstance(found[index], Reading) for index in range(3)] == [True, False, True]
    assert "not enough memory" in str(found[1])


def test_a_model_without_language_or_without_proteins_is_refused(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model folder"):
        LanguageModel.open(tmp_path)
    BertForMaskedLM.from_pretrained(folders("bert")).save_pretrained(tmp_path / "words")
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        LanguageModel.open(tmp_path / "words")
    assert "\n" not in str(caught.value)


def test_the_bundled_models_are_opened_where_none_is_given() -> None:
    masked, causal = LanguageModel.open(device="cpu"), LanguageModel.open(None, device="cpu", default=CAUSAL)
    assert (masked.name, masked.is_causal, causal.name, causal.is_causal) == (MASKED, False, CAUSAL, True)
    assert masked.can_mask
    assert masked.trained_length == describe(MASKED).context


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "esm"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickle"):
        LanguageModel.open(tmp_path)
