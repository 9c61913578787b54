"""Published models after distillation, against steps and minutes: the converted one, and a student without global attention.

A subject and a cell of the benchmark go in, the points of a curve come out. The training is that of `performers distil`, with its
loop, checkpoints and resuming; what is new here is only how the student is judged on the way: as the benchmark judges a model
that was not trained, on the same sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.attention import FavorFeatures
from performers.benchmarks.conversion_figures import MAIN, Columns, summary
from performers.benchmarks.conversion_report import FLOOR
from performers.benchmarks.experiment import DONE, Cell, Figures
from performers.conversion.distillation import DistilConfig, Distillation
from performers.conversion.specification import Specification
from performers.folders import write_file, writing
from performers.training import task
from performers.training.run_folder import read_log, run_task

if TYPE_CHECKING:
    import torch

    from performers.benchmarks.conversion_subjects import Subject
    from performers.training.distributed import World

CONVERTED = "converted"
"""The system whose layers are all FAVOR; `conversion_report.FLOOR` is the one each token of which sees a window alone."""

_JUDGED = "judged"


class JudgedDistillation(Distillation):
    """A distillation whose student is judged in a way of one's own.

    Its log holds how long steps took, so unlike other logs it is not the same each time.

    Arguments:
        config: the settings.
        judge: what is counted of a model.
        describe: says in a sentence what was counted.
    """

    def __init__(
        self, config: DistilConfig, judge: Callable[[Any], Columns], describe: Callable[[Columns], str]
    ) -> None:
        super().__init__(config)
        self._judge, self._describe = judge, describe
        self._seconds: list[float] = []
        self._started: float | None = None

    def before_step(self, model: Any, step: int) -> bool:
        """Looks at the clock."""
        self._stop()
        self._started = time.monotonic()
        return super().before_step(model, step)

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[task.Figures]:
        """What was counted, and the mean time of the steps since the last time."""
        self._stop()
        seconds = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        self._seconds = []
        columns = self._judge(model.model)
        yield task.Figures(_JUDGED, {"columns": columns, "seconds_per_step": seconds}, {}, self._describe(columns))

    def picture(self, run: Path) -> None:
        """None: the benchmark draws all curves in one."""

    def _stop(self) -> None:
        if self._started is not None:
            self._seconds.append(time.monotonic() - self._started)
            self._started = None


def specification_of(cell: Cell, classes: list[str]) -> Specification:
    """The attention that a cell asks for in all layers, whose modules are of these classes."""
    if cell.get("system") == FLOOR:
        return Specification("local", {"window": cell["window"]}, None, classes, cell["seed"])
    rows = max(1, cell["num_features"] // FavorFeatures(1, 1, cell["kernel"]).size)
    arguments = {"kernel": cell["kernel"], "num_features": rows}
    return Specification("favor", arguments, None, classes, cell["seed"])


def measure_distillation(cell: Cell, subject: Subject, folder: Path) -> Figures:
    """Distils the model that a cell asks for, or goes on with it.

    Arguments:
        cell: "system", with "kernel" and "num_features" or "window", and the settings of the distillation.
        subject: the teacher and its sequences.
        folder: for the converted model and the run.

    Returns:
        "points": of every evaluation the step, the minutes of training until then, what was counted, and the figures.
    """
    files = {
        "input": (folder / "training.txt", subject.training[: cell["steps"] * cell["batch_size"]]),
        "validation": (folder / "judged.txt", subject.judged),
    }
    if not (folder / "converted").is_dir():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for path, texts in files.values():
            write_file(path, "".join(f"{text}\n" for text in texts))
        specification = specification_of(cell, subject.classes)
        subject.apply(specification, subject.fitted(specification))
        subject.save(folder / "converted")
    rates = {key: cell[key] for key in ("learning_rate", "layers_learning_rate") if cell[key] is not None}
    config = DistilConfig.parse(
        {
            "model": str(folder / "converted"),
            "output": str(folder / "run"),
            **{key: [str(path)] for key, (path, _) in files.items()},
            **{
                key: cell[key]
                for key in ("steps", "batch_size", "evaluate_every", "device", "dtype", "threads", "seed")
            },
            **rates,
            "checkpoint_every": cell["evaluate_every"],
            "keep": 1,
            "on_long": "cut",
        }
    )

    def describe(columns: Columns) -> str:
        found = summary(subject.name, columns, cell["seed"])
        return ", ".join(f"{name} {found[name]['value']:.4f}" for name in ("hidden", MAIN[subject.name]))

    run_task(JudgedDistillation(config, subject.judge, describe))
    measured = [entry for entry in read_log(folder / "run") if entry.get("evaluation") == _JUDGED]
    points: list[Figures] = []
    minutes, step = 0.0, 0
    for entry in measured:
        minutes += (entry["step"] - step) * entry["seconds_per_step"] / 60
        step = entry["step"]
        figures = summary(subject.name, entry["columns"], cell["seed"])
        points.append({"step": step, "minutes": minutes, "columns": entry["columns"], "figures": figures})
    return {"status": DONE, "points": points}
