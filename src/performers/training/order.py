"""Which examples a step reads: every pass over them has an order of its own, a function of (seed, pass)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from performers.randomness import derive_seed


class Order:
    """An endless order of examples, dealt out to steps.

    Arguments:
        number: of examples, at least one.
        batch_size: examples a step.
        seed: of the run.
    """

    def __init__(self, number: int, batch_size: int, seed: int) -> None:
        self._number, self._batch_size, self._seed = number, batch_size, seed
        self._pass: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def rows(self, step: int) -> list[int]:
        """The examples of step `step` (from 0), over all processes."""
        found: list[int] = []
        for place in range(step * self._batch_size, (step + 1) * self._batch_size):
            number, index = divmod(place, self._number)
            if self._pass[0] != number:
                self._pass = number, shuffled(self._number, derive_seed(self._seed, "order", number))
            found.append(int(self._pass[1][index]))
        return found


def shuffled(number: int, seed: int) -> npt.NDArray[np.int64]:
    """0 to number - 1 in an order that is a function of the seed."""
    return np.argsort(np.random.Philox(key=seed).random_raw(number), kind="stable")
