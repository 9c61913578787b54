"""Pretraining with related proteins read for each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import ranks

from performers.data import read_fasta
from performers.errors import ConfigError, InputError
from performers.training import PretrainConfig

Train = Callable[..., Any]
Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def related(fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of a run in which every four proteins are a cluster."""
    ids = [record.id for record in read_fasta(str(fasta))]
    path = tmp_path_factory.mktemp("clusters") / "clusters.tsv"
    path.write_text("".join(f"{ids[index // 4 * 4]}\t{name}\n" for index, name in enumerate(ids)))
    return {"contexts": "related", "clusters": str(path), "context": 512, "batch_size": 2, "steps": 3}


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line and "evaluation" not in line]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_relatives_change_the_losses_and_how_rows_are_dealt_out_does_not(
    tmp_path: Path, train: Train, related: dict[str, Any], objective: str
) -> None:
    keys = {**related, "objective": objective}
    train(tmp_path / "related", **keys)
    train(tmp_path / "in parts", **keys, micro_batch_size=1)
    assert losses(tmp_path / "related") == pytest.approx(losses(tmp_path / "in parts"), abs=1e-5)
    alone = Path(related["clusters"]).with_name("alone.tsv")
    ids = [line.split("\t")[1] for line in Path(related["clusters"]).read_text().splitlines()]
    alone.write_text("".join(f"{name}\t{name}\n" for name in ids))
    train(tmp_path / "alone", **{**keys, "clusters": str(alone)})
    assert losses(tmp_path / "alone") != pytest.approx(losses(tmp_path / "related"), abs=1e-5)
    inputs = json.loads((tmp_path / "related" / "run.json").read_text())["inputs"]
    assert related["clusters"] in {entry["name"] for entry in inputs}


def test_two_processes_with_shares_of_the_weights_read_relatives_as_one_does(
    tmp_path: Path, settings: Settings, related: dict[str, Any], context: ForkServerContext
) -> None:
    values = {**related, "sharding": "full", "validation": [], "evaluate_every": 0}
    for size in (1, 2):
        run = ranks.launch(context, ranks.train, size, settings(tmp_path / f"{size}", **values))
        assert ranks.statuses(run) == [0] * size
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=1e-5)


def test_clusters_and_related_contexts_belong_together(settings: Settings, tmp_path: Path) -> None:
    for changes in ({"contexts": "related"}, {"clusters": "x.tsv"}):
        with pytest.raises(ConfigError, match="belong together"):
            PretrainConfig.parse(settings(tmp_path, **changes))
    for key in ("gradient_checkpointing", "compile"):
        with pytest.raises(ConfigError, match=f"{key} exclude"):
            PretrainConfig.parse(settings(tmp_path, contexts="related", clusters="x.tsv", **{key: True}))


def test_a_missing_table_is_found_before_anything_is_written(tmp_path: Path, train: Train) -> None:
    with pytest.raises(InputError, match="is not there"):
        train(tmp_path / "run", contexts="related", clusters=str(tmp_path / "none.tsv"))
    assert not (tmp_path / "run").exists()
