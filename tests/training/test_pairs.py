"""Pretraining on pairs, through the configuration and the loop."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from performers.data import read_fasta
from performers.errors import ConfigError, InputError
from performers.training import PretrainConfig, pretrain

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, object]:
    records = [record for record in read_fasta("bundled:validation") if len(record.sequence) <= 60][:6]
    (tmp_path / "p.fasta").write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records))
    (tmp_path / "p.tsv").write_text("".join(f"{a.id}\t{b.id}\t1\n" for a, b in itertools.pairwise(records)))
    return {
        "input": [str(tmp_path / "p.fasta")],
        "output": str(tmp_path / "run"),
        "objective": "clm",
        "contexts": "pairs",
        "pairs": str(tmp_path / "p.tsv"),
        "context": 128,
        "batch_size": 2,
        "steps": 3,
        "preset": "tiny",
        "architecture": TINY,
        "num_features": 8,
        "device": "cpu",
    }


def test_a_model_is_trained_on_pairs(values: dict[str, object], tmp_path: Path) -> None:
    pretrain(PretrainConfig.parse(values))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "p.tsv" in (tmp_path / "run" / "run.json").read_text()


def test_pairs_that_do_not_fit_or_are_not_there_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected a --context of at least as many"):
        pretrain(PretrainConfig.parse({**values, "context": 16}))
    with pytest.raises(InputError, match="expected a table of pairs"):
        pretrain(PretrainConfig.parse({**values, "pairs": "nowhere.tsv"}))
    with pytest.raises(ConfigError, match="contexts=pairs and pairs belong together"):
        PretrainConfig.parse({**values, "pairs": None})
