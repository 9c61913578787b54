"""All single substitutions of a protein as a picture: a table of scores in, a PNG out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from performers.data import STANDARD_RESIDUES

# Grouped by chemistry, so that what a position tolerates shows as a block.
_ORDER = "GAVLIMCFYWPSTNQHKRDE"
_MOST_LINES, _POSITIONS_IN_A_LINE = 20, 100


def plot_saturation(scores: npt.NDArray[np.float64], wild_type: str, picture: Path, *, title: str, first: int) -> None:
    """Draw the score of every substitution; white is as good as the wild type, red is worse, dots are the wild type.

    Arguments:
        scores: (L, 20) in the order of `STANDARD_RESIDUES`, 0 for the wild type, nan where nothing is known.
        wild_type: L residues.
        picture: the PNG to write.
        title: the heading.
        first: the number of the first residue.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    scores = scores[:, [STANDARD_RESIDUES.index(letter) for letter in _ORDER]]
    length = len(wild_type)
    width = max(_POSITIONS_IN_A_LINE, -(-length // _MOST_LINES))
    lines = -(-length // width)
    finite = scores[np.isfinite(scores)]
    low, high = (float(x) for x in np.quantile(finite, [0.02, 0.98])) if finite.size else (-1.0, 1.0)
    norm = TwoSlopeNorm(0.0, vmin=min(low, -1e-3), vmax=max(high, 1e-3))
    shown = min(length, width)
    figure = Figure(figsize=(2 + 0.11 * min(shown, 150), 1 + 2.4 * lines), layout="constrained")
    all_axes = figure.subplots(lines, 1, squeeze=False)[:, 0]
    for line, axes in enumerate(all_axes):
        start = line * width
        part = np.full((len(_ORDER), shown), np.nan, dtype=np.float32)
        stop = min(start + shown, length)
        part[:, : stop - start] = scores[start:stop].T
        axes.imshow(part, cmap="RdBu", norm=norm, aspect="auto", interpolation="nearest")
        dots = [(i - start, _ORDER.index(wild_type[i])) for i in range(start, stop) if wild_type[i] in _ORDER]
        if dots:
            axes.plot(*zip(*dots, strict=True), "k.", markersize=2)
        step = 10 if width <= _POSITIONS_IN_A_LINE else max(10, 10 * (width // 100))
        ticks = [i for i in range(stop - start) if (start + i + first) % step == 0]
        axes.set_xticks(ticks, [str(start + i + first) for i in ticks], fontsize=7)
        axes.set_yticks(range(len(_ORDER)), list(_ORDER), fontsize=5)
    all_axes[-1].set_xlabel("residue")
    bar = figure.colorbar(ScalarMappable(norm, "RdBu"), ax=list(all_axes), shrink=min(1.0, 1.6 / lines + 0.2), pad=0.01)
    bar.set_label("log-odds against the wild type", fontsize=8)
    figure.suptitle(f"{title} (not for clinical use)", fontsize=9)
    figure.savefig(picture, dpi=110, metadata={"Software": None})


def picture_bytes(length: int) -> int:
    """About how many bytes the picture of so many residues takes, as measured from 5 to 35,000; long ones are drawn finer."""
    return 20_000 + 320 * min(length, 2000) + 130 * max(length - 2000, 0)
