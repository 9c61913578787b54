"""Tiny random models of each kind, and a few short real proteins."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, EsmConfig, EsmForMaskedLM, EsmTokenizer

from performers import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM, PerformerTokenizer, convert
from performers.data import STANDARD_RESIDUES, Record, read_fasta

sys.path.insert(0, str(Path(__file__).parent))

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ESM_TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
# As AntiBERTy: the twenty residues, separated by spaces in the text.
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *STANDARD_RESIDUES]


def _performer(folder: Path, causal: bool) -> None:
    config = PerformerConfig(**SIZES, attention_kwargs={"num_features": 8})
    model = (PerformerForCausalLM if causal else PerformerForMaskedLM)(config)
    # Spread out, so that a residue's surroundings show in its numbers.
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.save_pretrained(folder)
    PerformerTokenizer(add_eos=not causal).save_pretrained(folder)


def _esm(folder: Path, converted: bool) -> None:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(ESM_TOKENS))
    config = EsmConfig(
        **SIZES,
        vocab_size=len(ESM_TOKENS),
        pad_token_id=1,
        mask_token_id=ESM_TOKENS.index("<mask>"),
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = EsmForMaskedLM(config)
    (convert(model, "favor", num_features=8) if converted else model).save_pretrained(folder)
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def _bert(folder: Path) -> None:
    config = BertConfig(**SIZES, vocab_size=len(BERT_TOKENS), max_position_embeddings=60)
    BertForMaskedLM(config).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(BERT_TOKENS)}
    BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model: "masked", "causal", "esm", "converted" or "bert"; made on first use."""
    root = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[Path], None]] = {
        "masked": lambda folder: _performer(folder, False),
        "causal": lambda folder: _performer(folder, True),
        "esm": lambda folder: _esm(folder, False),
        "converted": lambda folder: _esm(folder, True),
        "bert": _bert,
    }

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                makers[kind](root / kind)
        return root / kind

    return folder


@pytest.fixture(scope="session")
def masked(folders: Callable[[str], Path]) -> Path:
    """A masked Performer."""
    return folders("masked")


@pytest.fixture(scope="session")
def causal(folders: Callable[[str], Path]) -> Path:
    """A causal Performer."""
    return folders("causal")


@pytest.fixture(scope="session")
def records() -> list[Record]:
    """Twelve real proteins of 20 to 58 standard residues."""
    short = (r for r in read_fasta("bundled:train") if len(r.sequence) <= 58 and not set(r.sequence) & set("BOUXZ"))
    return sorted(short, key=lambda record: record.id)[:12]


@pytest.fixture(scope="session")
def fasta(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records as a file."""
    path = tmp_path_factory.mktemp("proteins") / "proteins.fasta"
    path.write_text("".join(f">{record.id} {record.description}\n{record.sequence}\n" for record in records))
    return path


@pytest.fixture(scope="session")
def start() -> Callable[..., BaseProcess]:
    """Starts a function of `tool_processes` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    # What the tools import on their way is imported once as well.
    libraries = ["h5py", "matplotlib.figure", "matplotlib.backends.backend_agg", "pandas", "sklearn.linear_model"]
    context.set_forkserver_preload(
        ["performers.tools.embedding", "performers.models.modeling_performer", "tool_processes", *libraries]
    )
    import tool_processes

    def start_process(name: str, *arguments: Any) -> BaseProcess:
        process = context.Process(target=getattr(tool_processes, name), args=arguments)
        process.start()
        return process

    return start_process
