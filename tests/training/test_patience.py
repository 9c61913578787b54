"""Runs that stop when the validation loss no longer falls, seen with scripted losses: what stops them, and what they keep."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model

from performers.errors import ConfigError
from performers.folders import sha256_of
from performers.training.configuration import PretrainConfig, TrainConfig
from performers.training.distributed import World
from performers.training.run_folder import RunResult, list_checkpoints, run_task
from performers.training.task import Figures, Task

#         step  2    4    6    8    10   12   14
LOSSES = (None, 5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 9.0, 9.0, 9.0, 9.0)


class Scripted(Task[TrainConfig]):
    """Counts its steps in its only weight; the validation loss is read from a list."""

    command: ClassVar[str] = "scripted"
    elsewhere: ClassVar[str] = "elsewhere"
    needs_less: ClassVar[str] = "Nothing needs less."
    measures: ClassVar[str] = "validation"
    dies_at: int | None = None

    def inputs(self) -> list[dict[str, Any]]:
        return []

    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        if checkpoint:
            load_model(model, str(checkpoint / "model.safetensors"))
        return model

    def describe(self) -> str:
        return "a script"

    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        if step == self.dies_at:
            raise KeyboardInterrupt
        loss = -model.weight.sum()
        loss.backward()
        return loss.detach()

    def tokens(self, step: int) -> int:
        return 1

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        step = round(model.weight.item() / 0.1)
        yield Figures("other", {"loss": -step}, {}, "falls for ever")
        yield Figures(self.measures, {"loss": LOSSES[step // 2]}, {}, "as scripted")

    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        save_model(model, str(folder / "model.safetensors"))

    def picture(self, run: Path) -> None:
        pass


def run(output: Path, task: type[Scripted] = Scripted, *, resume_from: str | None = None, **changes: Any) -> RunResult:
    values = {"output": str(output), "steps": 20, "warmup_steps": 0, "learning_rate": 0.1, "final_learning_rate": 0.1}
    values |= {
        "weight_decay": 0.0,
        "evaluate_every": 2,
        "checkpoint_every": 3,
        "keep": 1,
        "device": "cpu",
        "threads": 1,
    }
    return run_task(task(TrainConfig.parse({**values, "patience": 3, **changes})), resume_from=resume_from)


def steps_in(folder: Path) -> int:
    """How many steps the model of a folder has taken."""
    return round(load_file(folder / "model.safetensors")["weight"].item() / 0.1)


def test_a_run_stops_when_its_patience_is_lost_and_leaves_the_best_model(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    assert result.steps == 14  # 2.0 at step 8, then 2.5, 2.0 (no lower) and 9.0
    assert steps_in(tmp_path / "run" / "model") == 8
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000008", "step-00000014"]
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry.get("evaluation") == "validation"] == [2, 4, 6, 8, 10, 12, 14]


def test_more_patience_takes_all_steps_and_none_keeps_the_last_model(tmp_path: Path) -> None:
    assert run(tmp_path / "more", patience=7).steps == 20
    assert steps_in(tmp_path / "more" / "model") == 8
    assert run(tmp_path / "none", patience=0).steps == 20
    assert steps_in(tmp_path / "none" / "model") == 20
    assert [path.name for path in list_checkpoints(tmp_path / "none")] == ["step-00000020"]


@pytest.mark.parametrize("dies_at", [5, 9, 13])
def test_a_run_that_died_goes_on_to_the_same_end(dies_at: int, tmp_path: Path) -> None:
    class Mortal(Scripted):
        pass

    Mortal.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", Mortal)
    assert run(tmp_path / "again").steps == run(tmp_path / "whole").steps == 14
    for name in ("log.jsonl", "model/model.safetensors", "checkpoints/step-00000014/generator.json"):
        assert sha256_of(tmp_path / "again" / name) == sha256_of(tmp_path / "whole" / name)


def test_a_run_that_has_stopped_stays_so_and_an_earlier_checkpoint_leads_to_the_same_best(tmp_path: Path) -> None:
    run(tmp_path / "run", keep=9)
    assert run(tmp_path / "run", keep=9).steps == 14
    assert run(tmp_path / "run", keep=9, resume_from="step-00000006").steps == 14
    assert steps_in(tmp_path / "run" / "model") == 8


def test_patience_needs_a_validation_set_and_evaluations_at_the_same_steps(tmp_path: Path) -> None:
    class Blind(Scripted):
        measures: ClassVar[str] = "another set"

    with pytest.raises(ConfigError, match="patience=3: there is no validation set"):
        run(tmp_path / "blind", Blind)
    with pytest.raises(ConfigError, match="patience=2: expected a validation set"):
        PretrainConfig.parse({"output": "run", "input": "x.fasta", "patience": 2})
    run(tmp_path / "run")
    with pytest.raises(ConfigError, match="evaluate_every=4"):
        run(tmp_path / "run", evaluate_every=4)
