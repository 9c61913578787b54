"""What ran: every output folder says with which command, version, inputs and weights it was made, and whom to cite.

`RunRecord` is a context manager around a command's work: it writes `run.json` when the work begins, again when it ends, and
`cite.bibtex` beside it. It knows nothing of training; every command that has an output folder uses it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from performers import __version__
from performers.folders import sha256_of, write_file

CITATION = """\
@inproceedings{choromanski2021rethinking,
  title     = {Rethinking Attention with Performers},
  author    = {Choromanski, Krzysztof and Likhosherstov, Valerii and Dohan, David and Song, Xingyou and Gane, Andreea and
               Sarlos, Tamas and Hawkins, Peter and Davis, Jared and Mohiuddin, Afroz and Kaiser, Lukasz and
               Belanger, David and Colwell, Lucy and Weller, Adrian},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  url       = {https://openreview.net/forum?id=Ua6zuk0WRH}
}

@misc{choromanski2020masked,
  title         = {Masked Language Modeling for Proteins via Linearly Scalable Long-Context Transformers},
  author        = {Choromanski, Krzysztof and Likhosherstov, Valerii and Dohan, David and Song, Xingyou and Davis, Jared and
                   Sarlos, Tamas and Belanger, David and Colwell, Lucy and Weller, Adrian},
  year          = {2020},
  eprint        = {2006.03555},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG}
}
"""


def describe_file(path: str | Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, as `run.json` lists it."""
    file = Path(path)
    return {"name": str(path), "num_bytes": file.stat().st_size, "sha256": sha256_of(file)}


# Grams of CO2 equivalent per kWh, the world average of codecarbon 3.3 (Our World in Data); a country's may be ten times less.
WORLD_AVERAGE = 475.0


class RunRecord:
    """Writes `run.json` and `cite.bibtex` for the work done inside its `with` block.

    A run that is interrupted and goes on adds a session to the same record.

    Arguments:
        folder: the output folder; one that appears only when the work is done gets its record then.
        command: the verb, as in `performers VERB`.
        arguments: the settings the command ran with; anything JSON can hold.
        seed: the seed of everything random, or None where nothing is.
        device: the device the work runs on.
        inputs: what was read, one `describe_file` each; may be given later by `inputs`.
        references: BibTeX of what else the command rests on, for `cite.bibtex`.
        announce: write the record when the work begins and when it fails, too; False where the folder is not yet the command's.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        *,
        arguments: dict[str, Any],
        seed: int | None,
        device: str,
        inputs: Iterable[dict[str, Any]] = (),
        references: str = "",
        announce: bool = True,
    ) -> None:
        self._path = folder / "run.json"
        self._announce = announce
        self._citations = "\n".join(filter(None, [CITATION, references]))
        self._content: dict[str, Any] = {
            "command": command,
            "arguments": arguments,
            "version": __version__,
            "seed": seed,
            "inputs": list(inputs),
            "weights": [],
            "results": {},
            "sessions": self._earlier_sessions(command),
        }
        self._session: dict[str, Any] = {
            "command_line": sys.argv,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "python": platform.python_version(),
            "torch": version("torch"),
            "platform": platform.platform(),
            "status": "running",
        }

    def _earlier_sessions(self, command: str) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._path.read_text(encoding="utf-8"))
            if record["command"] == command and isinstance(record["sessions"], list):
                return record["sessions"]
        return []

    def inputs(self, files: Iterable[dict[str, Any]]) -> None:
        """Names what was read, one `describe_file` each."""
        self._content["inputs"] = list(files)

    def weights(self, path: Path) -> None:
        """Names a weights file that the command used or made."""
        self._content["weights"].append(describe_file(path))

    def results(self, **figures: Any) -> None:
        """Adds figures to the record."""
        self._content["results"].update(figures)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._tracker = energy_tracker()
        if self._announce:
            self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session["seconds"] = round(time.monotonic() - self._started, 3)
        self._session["status"] = "finished" if kind is None else f"stopped: {kind.__name__}"
        if self._tracker is not None:
            self._tracker.stop()
            self._session["energy_kwh"] = self._tracker.final_emissions_data.energy_consumed
            self._session["carbon_kg"] = self._tracker.final_emissions_data.emissions
        if self._announce or kind is None:
            self._write()

    def _write(self) -> None:
        if not self._path.parent.is_dir():
            return
        content = {**self._content, "sessions": [*self._content["sessions"], self._session]}
        write_file(self._path, json.dumps(content, indent=1, default=str) + "\n")
        write_file(self._path.with_name("cite.bibtex"), self._citations)


def energy_tracker(**settings: Any) -> Any:
    """A started codecarbon tracker that asks nothing of a network, or None where codecarbon is not installed.

    Carbon is that of the world's average grid: where the machine stands would have to be asked for.
    """
    try:
        from codecarbon import OfflineEmissionsTracker  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it looks at its own level
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA",  # demanded, and of no effect beside the intensity
        force_carbon_intensity_g_co2e_kwh=WORLD_AVERAGE,
        output_methods=[],
        log_level="critical",
        allow_multiple_runs=True,
        **settings,
    )
    tracker.start()
    return tracker
