"""The smallest task there can be: what the loop does for any training, seen without proteins."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model

from performers.errors import CheckpointError, ConfigError
from performers.folders import sha256_of
from performers.randomness import derive_seed
from performers.training.configuration import TrainConfig
from performers.training.distributed import World
from performers.training.run_folder import RunResult, list_checkpoints, run_task
from performers.training.task import Figures, Task


class Lines(Task[TrainConfig]):
    """Fits y = 2 x + 1. A part of the model is frozen, and another is left alone by the first steps."""

    command: ClassVar[str] = "lines"
    evaluates_at_the_start: ClassVar[bool] = True
    elsewhere: ClassVar[str] = "from {model}"
    needs_less: ClassVar[str] = "Nothing needs less."

    def inputs(self) -> list[dict[str, Any]]:
        return []

    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        torch.manual_seed(derive_seed(self.config.seed, "initialization"))
        layers = {"slope": torch.nn.Linear(1, 1, bias=False), "frozen": torch.nn.Linear(1, 1)}
        model = torch.nn.ModuleDict({**layers, "late": torch.nn.Linear(1, 1)})
        if checkpoint:
            load_model(model, checkpoint / "model.safetensors")
        model["frozen"].requires_grad_(False)
        return model

    def describe(self) -> str:
        return "lines"

    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        loss = torch.zeros(())
        for row in range(world.rank, self.config.batch_size, world.size):
            generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "x", step, row))
            x = torch.randn(1, generator=generator)
            error = (self._predict(model, x, late=step >= 5) - 2 * x - 1).square().sum() / self.config.batch_size
            error.backward()
            loss += error.detach()
        return loss

    def _predict(self, model: Any, x: torch.Tensor, *, late: bool) -> torch.Tensor:
        return model["slope"](x) + (model["late"](x) if late else 0.0)

    def tokens(self, step: int) -> int:
        return self.config.batch_size

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        with torch.no_grad():
            error = (self._predict(model, torch.ones(1), late=True) - 3).abs().item()
        yield Figures("at one", {"loss": error}, {"error": error}, f"error {error:.3f}")

    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        save_model(model, str(folder / "model.safetensors"))

    def picture(self, run: Path) -> None:
        (run / "picture").write_text("a line")


def run(output: Path, *, resume_from: str | None = None, **changes: Any) -> RunResult:
    values = {"output": str(output), "steps": 40, "warmup_steps": 0, "learning_rate": 0.3, "weight_decay": 0.0}
    values |= {"checkpoint_every": 3, "keep": 20, "device": "cpu", "threads": 1, **changes}
    return run_task(Lines(TrainConfig.parse(values)), resume_from=resume_from)


def test_a_task_is_trained_measured_from_the_start_and_leaves_a_run_folder(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    measured = [entry for entry in entries if "evaluation" in entry]
    assert [entry["step"] for entry in measured] == list(range(0, 41, 4))
    assert measured[-1]["loss"] < 0.2 * measured[0]["loss"]
    assert result.evaluations == {"at one": measured[-1]}
    assert result.tokens == 40 * 8
    assert (tmp_path / "run" / "picture").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"] == "lines"


def test_what_is_frozen_stays_and_has_no_moments(tmp_path: Path) -> None:
    run(tmp_path / "run")
    first, *_, last = list_checkpoints(tmp_path / "run")
    before, after = (load_file(path / "model.safetensors") for path in (first, last))
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    assert not torch.equal(before["slope.weight"], after["slope.weight"])
    assert {name.split(".")[0] for name in load_file(first / "optimizer.safetensors")} == {"slope"}
    assert {name.split(".")[0] for name in load_file(last / "optimizer.safetensors")} == {"slope", "late"}


@pytest.mark.parametrize("step", [3, 6, 39])
def test_going_on_gives_the_same_bits_although_parts_have_taken_fewer_steps(step: int, tmp_path: Path) -> None:
    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    run(tmp_path / "again", resume_from=f"step-{step:08d}")
    for name in ("log.jsonl", "model/model.safetensors", "checkpoints/step-00000040/optimizer.safetensors"):
        assert sha256_of(tmp_path / "again" / name) == sha256_of(tmp_path / "whole" / name)


def test_a_run_that_is_begun_anew_before_its_first_checkpoint_does_not_log_twice(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    run(tmp_path / "again")
    assert (tmp_path / "again" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_other_settings_and_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"learning_rate=0\.5 \(the run has 0\.3\).*from {tmp_path}/run/model"):
        run(tmp_path / "run", learning_rate=0.5)

    class Wider(Lines):
        def open(self, checkpoint: Path | None) -> torch.nn.Module:
            return torch.nn.ModuleDict({"slope": torch.nn.Linear(2, 1), "late": torch.nn.Linear(1, 1)})

    values = {"output": str(tmp_path / "run"), "steps": 40, "warmup_steps": 0, "learning_rate": 0.3}
    values |= {"weight_decay": 0.0, "checkpoint_every": 3, "keep": 20, "device": "cpu", "threads": 1}
    with pytest.raises(CheckpointError, match="does not belong to the model beside it"):
        run_task(Wider(TrainConfig.parse(values)))
