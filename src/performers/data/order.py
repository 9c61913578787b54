"""In which order an epoch takes the proteins of a corpus, in the memory of a million of them whatever their number.

Up to 2^20 proteins the order is a permutation of all, drawn from (seed, epoch). A larger corpus is shuffled twice. It is first
cut into at most 2^20 *runs* of consecutive proteins, and the runs are permuted; then the runs are taken in *windows* of about
2^20 proteins, and the proteins of a window are permuted. So a window is a sample from all over the corpus, and what must be kept
in memory is the order of the runs and of one window: 16 megabytes for any corpus. (A permutation of 2.5 * 10^8 proteins would
take two gigabytes in every process.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from performers.data.corpus import Corpus
from performers.randomness import derive_seed

_Int64s = npt.NDArray[np.int64]

_MOST = 1 << 20  # runs, and proteins in a window


class ProteinOrder:
    """The windows of every epoch, each an array of indices of proteins.

    Arguments:
        corpus: the proteins, N of them.
        seed: of the order.

    Attributes:
        num_windows: of one epoch.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus, self._seed = corpus, seed
        self._run = -(-len(corpus) // _MOST)  # proteins in a run; the last run may be shorter
        self._num_runs = -(-len(corpus) // self._run)
        self._runs_per_window = max(1, _MOST // self._run)
        self.num_windows = -(-self._num_runs // self._runs_per_window)
        self._runs_of: tuple[int, _Int64s] | None = None  # of the epoch that was asked for last

    def window(self, epoch: int, number: int) -> _Int64s:
        """The proteins of window `number` of an epoch, in order."""
        first = number * self._runs_per_window
        runs = self._runs(epoch)[first : first + self._runs_per_window]
        if self._run == 1:
            return runs
        proteins = (runs[:, None] * self._run + np.arange(self._run)).reshape(-1)
        proteins = proteins[proteins < len(self._corpus)]
        return proteins[_shuffled(len(proteins), derive_seed(self._seed, "order", epoch, "window", number))]

    def everything(self, epoch: int) -> _Int64s:
        """All windows of an epoch, one after the other; this is what takes memory for each protein."""
        return np.concatenate([self.window(epoch, number) for number in range(self.num_windows)])

    def tokens_before(self, epoch: int, extra: int) -> _Int64s:
        """Where each window of an epoch begins and the last one ends, shape (windows + 1,), in tokens.

        A protein has as many tokens as residues, and `extra` more.
        """
        bounds = np.minimum(np.arange(self._num_runs + 1) * self._run, len(self._corpus))
        if self.num_windows == 1:
            bounds = bounds[[0, -1]]
        tokens = np.diff(self._corpus.residues_before(bounds)) + extra * np.diff(bounds)
        if self.num_windows > 1:
            firsts = np.arange(0, self._num_runs, self._runs_per_window)
            tokens = np.add.reduceat(tokens[self._runs(epoch)], firsts)
        return np.concatenate([[0], np.cumsum(tokens)])

    def _runs(self, epoch: int) -> _Int64s:
        if self._runs_of is None or self._runs_of[0] != epoch:
            self._runs_of = epoch, _shuffled(self._num_runs, derive_seed(self._seed, "order", epoch))
        return self._runs_of[1]


def _shuffled(count: int, seed: int) -> _Int64s:
    # The raw output of a bit generator is the same in every version of numpy, that of its distributions is not.
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")
