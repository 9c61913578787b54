"""Causal training chunk by chunk takes the steps of training on whole contexts, in the memory of a chunk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from victims import outcome

from performers import PerformerConfig, PerformerForCausalLM
from performers.benchmarks.isolation import run_alone
from performers.errors import ConfigError
from performers.training import PretrainConfig, PretrainResult
from performers.training.distributed import World
from performers.training.loop import accumulate_gradients

Train = Callable[..., PretrainResult]
CAUSAL = {"objective": "clm", "contexts": "concatenated"}


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "learning_rate" in entry]


@pytest.mark.parametrize("kernel", ["relu", "softmax"])
@pytest.mark.parametrize("size", [7, 50, 100, 500])
def test_the_gradients_are_those_of_the_whole(kernel: str, size: int) -> None:
    kwargs: dict[str, Any] = {"kernel": kernel, "num_features": 16}
    config = PerformerConfig.preset("tiny", num_hidden_layers=2, hidden_dropout_prob=0.2, attention_kwargs=kwargs)
    ids = torch.randint(4, 24, (3, 101), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, ::5] = -100
    example = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(101).expand(3, -1)}
    example["dropout_keys"] = torch.tensor([1, 2, 3])
    found = []
    for sequence_chunk in (None, size):
        torch.manual_seed(0)
        model = PerformerForCausalLM(config).double().train()
        world = World(0, 1, torch.device("cpu"))
        loss = accumulate_gradients(model, [example, example], world, torch.float32, sequence_chunk)
        found.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-9, atol=1e-12)


def test_a_run_chunk_by_chunk_has_the_losses_of_a_run_on_whole_contexts(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "whole", **CAUSAL)
    train(tmp_path / "chunks", sequence_chunk=24, micro_batch_size=2, **CAUSAL)
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_resuming_gives_the_same_bits_and_the_chunk_may_change(tmp_path: Path, train: Train) -> None:
    changes = {"sequence_chunk": 24, "keep": 10, **CAUSAL}
    train(tmp_path / "whole", **changes)
    for name in ("again", "other"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    train(tmp_path / "again", resume_from="step-00000004", **changes)
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")
    train(tmp_path / "other", resume_from="step-00000004", **{**changes, "sequence_chunk": 40})
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
def test_a_longer_context_takes_the_memory_of_its_states_alone() -> None:
    settings: dict[str, Any] = {"attention": "favor", "preset": "tiny", "kernel": "relu", "batch_size": 1, "steps": 1}
    settings |= {"objective": "clm", "layer_chunk": None, "sequence_chunk": 512, "warm_up": 0, "device": "cpu"}
    settings |= {"dtype": "float32", "threads": 1, "seed": 0}
    short, long = (
        run_alone("performers.benchmarks.training:training_steps", context=context, **settings)["peak_bytes"]
        for context in (2048, 16_384)
    )
    states = (16_384 - 2048) // 512 * 5 * 2 * 256 * (64 + 2) * 4
    assert long - short < states + 60 * 2**20  # whole contexts would take a gigabyte more


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "mlm"}, "sequence_chunk=24: expected objective='clm'"),
        ({"contexts": "packed"}, "sequence_chunk=24: expected contexts='concatenated'"),
        ({"gradient_checkpointing": True}, "sequence_chunk and gradient_checkpointing exclude each other"),
        ({"compile": True}, "sequence_chunk and compile exclude each other"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_chunk_by_chunk_is_refused(changes: dict[str, Any], message: str) -> None:
    values = {"input": ["x.fasta"], "output": "run", "sequence_chunk": 24, **CAUSAL, **changes}
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.parse(values)


def test_a_mechanism_whose_state_grows_is_refused_by_name(tmp_path: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match=r"sequence_chunk=24: expected attention .* but the model has favor, exact"):
        train(tmp_path, sequence_chunk=24, attention=["favor", "exact"], **CAUSAL)
