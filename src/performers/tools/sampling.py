"""How one letter is drawn: scores of the tokens in, scores whose largest is the one that is drawn out.

Everything here is a Hugging Face logits processor, so that `generate()` does the decoding and redesign can use the same. The one
thing `generate()` lacks is a stream of random numbers for each sequence: adding independent Gumbel noise to log-probabilities and
taking the largest is a draw from them (Maddison et al., 2014, arXiv:1411.0030), and the noise can have a seed for each row. So a
sequence depends on its own seed alone, not on how many are drawn or with whom it shares a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from performers.errors import InputError


@dataclass(frozen=True)
class Drawing:
    """How letters are drawn.

    Arguments:
        temperature: log-probabilities are divided by it.
        top_k: only the k likeliest letters are drawn; 0 for all.
        top_p: only the likeliest letters that together have this probability are drawn.
        repetition_penalty: log-probabilities of the letters among the last `repetition_window` ones are multiplied by it, as by
            Keskar et al. (2019, arXiv:1909.05858) over a window; 1 changes nothing.
        repetition_window: residues.
        max_run: at most so many times the same residue in a row; 0 for any number.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int = 8
    max_run: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature is {self.temperature}: expected a number above 0.")
        if self.top_k < 0 or self.max_run < 0:
            raise InputError(f"top-k is {self.top_k} and max-run {self.max_run}: expected numbers from 0.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: expected a probability above 0 and up to 1.")
        if not (self.repetition_penalty >= 1 and math.isfinite(self.repetition_penalty)) or self.repetition_window < 1:
            raise InputError(
                f"repetition-penalty is {self.repetition_penalty} over a window of {self.repetition_window}: expected a number "
                "from 1, and at least one residue."
            )

    @property
    def controls_repetition(self) -> bool:
        """Whether what was drawn before changes what may be drawn next."""
        return self.repetition_penalty != 1 or self.max_run > 0

    def shape(self) -> LogitsProcessorList:
        """Temperature, top-k and top-p, by Hugging Face's processors."""
        found = LogitsProcessorList([LogitNormalization()])
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        return found

    def processors(self, letters: Sequence[int], eos: int | None, eos_from: int, noise: Noise) -> LogitsProcessorList:
        """All that stands between a causal model's logits and the token that is drawn.

        Arguments:
            letters: the tokens that may be drawn.
            eos: the token that ends a protein, or None.
            eos_from: how long a row has to be for it, start tokens counted.
            noise: a stream for each row.
        """
        found = LogitsProcessorList([Allowed(letters, eos, eos_from), LogitNormalization()])
        if self.max_run:
            found.append(MaxRun(self.max_run))
        if self.repetition_penalty != 1:
            found.append(WindowedRepetitionPenalty(self.repetition_penalty, self.repetition_window))
        found += self.shape()
        found.append(noise)
        return found


class Allowed(LogitsProcessor):
    """Nothing but these tokens, and the end from some length on."""

    def __init__(self, letters: Sequence[int], eos: int | None, eos_from: int) -> None:
        self._letters, self._eos, self._eos_from = list(letters), eos, eos_from

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The scores, and -inf for all other tokens."""
        tokens = self._letters
        if self._eos is not None and input_ids.shape[1] >= self._eos_from:
            tokens = [*tokens, self._eos]
        kept = torch.full_like(scores, -torch.inf)
        kept[:, tokens] = scores[:, tokens]
        return kept


class MaxRun(LogitsProcessor):
    """A token that ends its row so many times over may not come once more."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The scores, and -inf for a token that would make a run too long."""
        if input_ids.shape[1] < self._most:
            return scores
        last = input_ids[:, -self._most :]
        is_run = (last == last[:, :1]).all(dim=1)
        banned = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, last[:, -1:], is_run[:, None])
        return scores.masked_fill(banned, -torch.inf)


class WindowedRepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """Hugging Face's penalty, for the tokens in a window alone: over a whole protein it would hit all letters alike."""

    def __init__(self, penalty: float, window: int) -> None:
        super().__init__(float(penalty))
        self._window = window

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores, those of recent tokens multiplied."""
        return super().__call__(input_ids[:, -self._window :], scores)


class Noise(LogitsProcessor):
    """Standard Gumbel noise, each row from a stream of its own.

    Arguments:
        seeds: of the rows.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [np.random.Philox(key=seed) for seed in seeds]

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The scores (rows, tokens) with the next noise of each row added."""
        # From raw bits, which are the same in every version of numpy.
        bits = np.stack([stream.random_raw(scores.shape[1]) for stream in self._streams])
        uniform = np.ldexp((bits >> np.uint64(11)).astype(np.float64) + 0.5, -53)
        return scores.double() + torch.from_numpy(-np.log(-np.log(uniform))).to(scores.device)
