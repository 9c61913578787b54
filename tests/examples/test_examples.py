"""The examples as a reader runs them, in their `--quick` form: a fresh process each, real files out."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(__file__).parent / "data"  # berlin52 and its best tour, from TSPLIB


def run(*command: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def figures_of(script: str, output: Path, *options: str | Path) -> dict[str, Any]:
    run(EXAMPLES / script, "--quick", "--output", output, *options)
    figures: dict[str, Any] = json.loads((output / "figures.json").read_text())
    del figures["seconds"]
    return figures


def test_digits_are_read_and_drawn(tmp_path: Path) -> None:
    figures = figures_of("images.py", tmp_path)
    assert figures["accuracy"]["logistic regression"] > 0.9
    assert all(accuracy > 0.15 for accuracy in figures["accuracy"].values())  # one in ten would be chance
    assert all(bits < math.log2(17) for bits in figures["bits per pixel"].values())
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Two recordings of 5 s: strings of 110 and 165 Hz, and of 196 Hz, plucked every half second (Karplus and Strong)."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name, pitches in (("duet.ogg", (110, 165)), ("solo.flac", (196,))):
        sound = np.zeros(5 * 22050)
        for pitch in pitches:
            period, string = 22050 // pitch, np.zeros(0)
            for i in range(len(sound)):
                if i % 11025 == 0:
                    string = noise.uniform(-1, 1, period)
                sound[i] += string[i % period] / 2
                string[i % period] = (string[i % period] + string[(i + 1) % period]) * 0.498
        soundfile.write(folder / name, np.stack([sound, sound], axis=1) * 0.5, 22050)
    return folder


@pytest.mark.slow
def test_music_is_learnt_and_played_from_recordings(tmp_path: Path, recordings: Path) -> None:
    output = tmp_path / "music"
    figures = figures_of("music.py", output, "--recordings", recordings, "--tracks", "duet", "solo")
    for row in figures["bits per sample"].values():
        assert all(0 < bits < 12 for bits in row)
    bits = {name: np.mean(row) for name, row in figures["bits per sample"].items()}
    assert bits["Performer"] < 8  # what a sample takes before anything is learnt
    assert bits["Markov, order 1"] < bits["levels alone (unigram)"] < 8
    for name in ("duet", "solo"):
        sound, rate = soundfile.read(output / f"{name}.wav")
        assert rate == 8000
        assert len(sound) == 2048 + 800  # a context of held-out music, and a tenth of a second played after it
        assert np.abs(sound).max() > 0.1


@pytest.mark.slow
def test_tours_through_berlin_are_never_shorter_than_the_best_and_repeat_with_the_seed(tmp_path: Path) -> None:
    first, again = (figures_of("salesman.py", tmp_path / name, "--instances", DATA) for name in ("first", "again"))
    assert first == again
    assert first["instances"] == {"berlin52": 7542}
    above = first["mean above the best"]
    assert all(0 <= share < 1 for share in above.values())
    assert above["Performer + 2-opt"] <= above["Performer"]


def test_a_pole_is_balanced(tmp_path: Path) -> None:
    returns = figures_of("reinforcement.py", tmp_path)["mean return"]
    assert 10 < returns["random"] < 60
    assert returns["expert"] == 500
    assert returns["random"] < returns["the player who gathered"] < 500
    assert 8 <= returns["Performer, asked for 500"] <= 500


@pytest.mark.parametrize(
    ("script", "package"),
    [("images.py", "sklearn"), ("music.py", "soundfile"), ("reinforcement.py", "gymnasium")],
)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(script: str, package: str) -> None:
    block = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path({str(EXAMPLES / script)!r})"
    done = run("-c", block, status=1)
    assert done.stderr.startswith(package)
    assert " is needed for this example: pip install " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "option", "expected"),
    [("music.py", "--recordings", "has no recording"), ("salesman.py", "--instances", "has no .tsp file")],
)
def test_a_folder_without_data_is_one_line(tmp_path: Path, script: str, option: str, expected: str) -> None:
    done = run(EXAMPLES / script, "--quick", "--output", tmp_path / "out", option, tmp_path, status=1)
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_instances_are_fetched_from_pypi(tmp_path: Path) -> None:
    figures = figures_of("salesman.py", tmp_path)
    assert figures["instances"] == {"pcb442": 50778, "att532": 27686}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="only Debian has Debian's packages")
def test_recordings_are_fetched_from_debian(tmp_path: Path) -> None:
    figures = figures_of("music.py", tmp_path, "--tracks", "elf-land", "victory2")
    assert np.mean(figures["bits per sample"]["Performer"]) < 8
