"""The models in the box: they open by name and without a network, are what their cards say, and show it when they are damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import performers
from performers import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM, PerformerModel, PerformerTokenizer
from performers.data import in_memory_corpus, read_fasta
from performers.errors import CheckpointError, InputError
from performers.folders import sha256_of, verify_folder
from performers.models import bundled
from performers.models.bundled import (
    CAUSAL,
    INTERACTIONS,
    MASKED,
    bundled_folder,
    bundled_names,
    describe,
    describe_head,
    head_names,
)
from performers.training.evaluation import evaluate, evaluate_folder, held_out_sets

NAMES = [MASKED, CAUSAL]

# In a process of its own, where nothing tells Hugging Face to stay off the network: asking for it at all is an error.
OFFLINE = """
import socket

def refuse(*arguments, **options):
    raise AssertionError(f"the network was asked: {arguments}")

socket.getaddrinfo = socket.socket.connect = refuse

import performers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers import AutoModelForTokenClassification

MASKED, CAUSAL = "performers/protein-masked", "performers/protein-causal"
own = (
    performers.PerformerConfig, performers.PerformerTokenizer, performers.PerformerForMaskedLM, performers.PerformerModel,
    performers.PerformerForTokenClassification, performers.PerformerForSequenceClassification,
)
for opener in (*own, AutoConfig, AutoTokenizer, AutoModel, AutoModelForMaskedLM, AutoModelForTokenClassification):
    print(type(opener.from_pretrained(MASKED)).__name__)
for opener in (performers.PerformerForCausalLM, performers.PerformerTokenizer, AutoModelForCausalLM):
    print(type(opener.from_pretrained(CAUSAL)).__name__)
print(type(performers.load(MASKED)).__name__, type(performers.load(CAUSAL)).__name__)
"""


def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled models in a folder that may be changed; its path."""
    shelf = tmp_path / "weights"
    shutil.copytree(bundled.WEIGHTS, shelf)
    monkeypatch.setattr(bundled, "WEIGHTS", shelf)
    return shelf


def test_two_models_come_with_the_package_in_eighty_megabytes() -> None:
    assert bundled_names() == sorted(NAMES)
    assert [describe(name).objective for name in NAMES] == ["mlm", "clm"]
    assert sum(describe(name).num_bytes for name in NAMES) <= 80_000_000


def test_every_class_opens_them_by_name_and_never_asks_the_network() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    heads = ["Performer" + name for name in ("ForMaskedLM", "Model", "ForTokenClassification")]
    found = done.stdout.split()
    assert found[:5] == ["PerformerConfig", "PerformerTokenizer", *heads]
    assert found[6:11] == ["PerformerConfig", "PerformerTokenizer", heads[1], heads[0], heads[2]]
    assert found[11:] == [
        *("PerformerForCausalLM", "PerformerTokenizer", "PerformerForCausalLM"),
        *("PerformerForMaskedLM", "PerformerForCausalLM"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_the_numbers_of_its_file_in_float32_and_in_bfloat16(name: str) -> None:
    kind = PerformerForCausalLM if name == CAUSAL else PerformerForMaskedLM
    stored = load_file(bundled_folder(name) / "model.safetensors")
    wide, narrow = kind.from_pretrained(name), kind.from_pretrained(name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    for key, tensor in wide.state_dict().items():
        source = stored.get(key, stored["performer.embed_tokens.weight"])  # what is tied is stored once
        is_random = ".mechanism." in key
        assert source.dtype == (torch.float32 if is_random else torch.bfloat16)
        assert torch.equal(tensor, source.float()), key
        assert torch.equal(narrow.state_dict()[key].float(), tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_a_model_knows_more_of_proteins_it_was_not_trained_on_than_their_frequencies(name: str) -> None:
    short = [record for record in read_fasta("bundled:test") if len(record.sequence) <= 200][:100]
    figures = evaluate(performers.load(name), in_memory_corpus(short), scheme="mask")
    assert figures.perplexity < figures.baseline_perplexity
    assert figures.perplexity_ratio_interval[1] < 1
    assert figures.accuracy > figures.baseline_accuracy


def test_the_masked_model_reads_whole_proteins_and_the_causal_one_writes() -> None:
    model, tokenizer = PerformerForMaskedLM.from_pretrained(MASKED), PerformerTokenizer.from_pretrained(MASKED)
    assert tokenizer("MKT").input_ids[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        assert model(**tokenizer("MKTAYIA<mask>QRQISFVK", return_tensors="pt")).logits.isfinite().all()
    writer, tokenizer = PerformerForCausalLM.from_pretrained(CAUSAL), PerformerTokenizer.from_pretrained(CAUSAL)
    prompt = tokenizer("MKTAYIAKQR", return_tensors="pt")
    assert prompt.input_ids[0, -1] != tokenizer.eos_token_id
    written = writer.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert written.shape[1] == prompt.input_ids.shape[1] + 5 or written[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_a_card_states_what_was_measured_of_the_very_weights(name: str) -> None:
    model = describe(name)
    evaluation = json.loads((model.folder / "evaluation.json").read_text())
    assert evaluation["weights"][0]["sha256"] == sha256_of(model.folder / "model.safetensors")
    assert list(evaluation["sets"]) == ["random", "test", "ood"]
    opened = performers.load(name)
    assert model.parameters == sum(parameter.numel() for parameter in opened.parameters())
    _, front, text = model.card.split("---\n", 2)
    (index,) = yaml.safe_load(front)["model-index"]
    for result, (part, figures) in zip(index["results"], evaluation["sets"].items(), strict=True):
        assert figures["scheme"] == (None if name == CAUSAL else "mask")
        assert result["dataset"]["name"] == f"bundled:{part}"
        assert result["metrics"][0]["value"] == round(figures["accuracy"], 4)
        assert f"{figures['accuracy']:.2%}" in text
        assert f"{figures['baseline_accuracy']:.2%}" in text
        assert figures["accuracy_gain_interval"][0] > 0  # better than naming the commonest residue
    for needed in (
        "CC BY 4.0",
        "UniProt Consortium",
        "Pfam 35.0",
        "held out",
        "Dual use",
        "Limitations",
        "(curve.png)",
    ):
        assert needed in text
    kept = "".join(file.read_text() for file in model.folder.iterdir() if file.suffix in (".md", ".json", ".yaml"))
    assert not any(folder in kept for folder in ("/tmp", "/home", "/root", "/work"))


def test_a_card_says_what_each_part_of_its_training_read() -> None:
    for name in NAMES:
        folder = bundled_folder(name)
        parts = [yaml.safe_load((folder / file).read_text()) for file in ("config-part-1.yaml", "config.yaml")]
        contexts = "; then ".join(f"{part['context']:,} tokens, {part['contexts']}" for part in parts)
        assert f"| contexts | {contexts} |" in describe(name).card


def test_a_card_says_how_the_exact_transformer_was_trained_or_that_there_is_none() -> None:
    card, exact = describe(MASKED).card, json.loads((bundled_folder(MASKED) / "evaluation.json").read_text())["exact"]
    assert f"Time was not equal: it took {exact['seconds'] / 3600:.2f} hours" in card
    assert "it had no tuning of its own" in card
    assert "those of the exact Transformer are what it printed for that model, whose weights are not bundled" in card
    card = describe(CAUSAL).card
    assert "No exact Transformer was trained to compare it with." in card
    assert "prints the table again" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_figures_of_a_card_are_measured_again(name: str) -> None:
    again = evaluate_folder(name, held_out_sets(), device="cpu", dtype="float32")
    for part, figures in describe(name).held_out.items():
        assert again["sets"][part]["accuracy"] == pytest.approx(figures["accuracy"], abs=1e-3)
        assert again["sets"][part]["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-3)


def test_what_was_held_out_at_random_was_in_no_other_set() -> None:
    others = ["bundled:train", "bundled:validation", "bundled:test", "bundled:ood"]
    taken = {record.sequence for record in read_fasta(others)}
    assert not taken & {record.sequence for record in read_fasta("bundled:random")}


def test_a_flipped_bit_is_one_sentence_whoever_opens_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copied(tmp_path, monkeypatch) / "protein-masked" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for opener in (PerformerForMaskedLM.from_pretrained, PerformerConfig.from_pretrained, performers.load, describe):
        with pytest.raises(
            CheckpointError, match=r"model.safetensors is damaged: its SHA-256 .* install it again"
        ) as caught:
            opener(MASKED)
        assert "\n" not in str(caught.value)
    assert performers.load(CAUSAL) is not None


def test_a_missing_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied(tmp_path, monkeypatch) / "protein-causal" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing. It belongs to the package"):
        PerformerTokenizer.from_pretrained(CAUSAL)


def test_an_unknown_name_lists_those_that_exist() -> None:
    for opener in (PerformerForMaskedLM.from_pretrained, PerformerTokenizer.from_pretrained, performers.load):
        with pytest.raises(InputError, match=f"performers/protein is neither .* {CAUSAL} or {MASKED}"):
            opener("performers/protein")
    with pytest.raises(InputError, match=f"is not a bundled model; expected {CAUSAL}, {INTERACTIONS} or {MASKED}"):
        describe("protein-masked")


def test_a_head_is_known_by_name_and_is_no_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head_names() == [INTERACTIONS]
    head = describe_head(INTERACTIONS)
    assert head.body == MASKED
    assert head.verdict.lower() in head.card.lower()
    for opener in (PerformerForMaskedLM.from_pretrained, PerformerTokenizer.from_pretrained, performers.load):
        with pytest.raises(
            InputError, match=f"`performers interact predict`; expected a folder, or {CAUSAL} or {MASKED}"
        ):
            opener(INTERACTIONS)
    with pytest.raises(InputError, match=f"is a head, not a language model; expected {CAUSAL} or {MASKED}"):
        describe(INTERACTIONS)
    with pytest.raises(InputError, match=f"is a language model, not a head; expected {INTERACTIONS}"):
        describe_head(MASKED)
    (copied(tmp_path, monkeypatch) / "protein-interactions" / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README.md is missing. It belongs to the package"):
        describe_head(INTERACTIONS)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PerformerConfig.preset("tiny", num_hidden_layers=1)
    PerformerModel(config).save_pretrained(tmp_path / MASKED)
    monkeypatch.chdir(tmp_path)
    assert PerformerConfig.from_pretrained(MASKED).num_hidden_layers == 1
    assert PerformerModel.from_pretrained(MASKED).config.num_hidden_layers == 1


def test_an_installation_without_models_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "WEIGHTS", tmp_path)
    assert bundled_names() == head_names() == []
    with pytest.raises(InputError, match="No --model was given, and performers/protein-masked is not part"):
        bundled.model_or_default(None)
    with pytest.raises(InputError, match="this installation has no bundled models"):
        performers.load(MASKED)


def test_a_bundled_folder_is_sealed_and_a_run_can_begin_from_it() -> None:
    from performers.training.checkpoint import find_model

    verify_folder(bundled_folder(INTERACTIONS))
    for name in NAMES:
        verify_folder(bundled_folder(name))
        assert find_model(name) == bundled_folder(name)
