"""Parts of proteins written anew by a masked model, as a tool: proteins with open positions in, filled ones out.

Open positions are "?" in the sequence, or ranges that count from 1. They are masked, and filled over a number of steps: in each,
all that are still open are predicted, a letter is drawn for each of them, and those of which the model is surest are kept
(Ghazvininejad et al., 2019, arXiv:1904.09324, without going back). All other residues stay as they are. Chains of one record,
joined by a colon, are read together by Performers, so that one of them can be redesigned in sight of the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from performers import __version__
from performers.data import MAX_LENGTH, RESIDUES, STANDARD_RESIDUES, FastaReport, InputFile
from performers.data.fasta import FastaReader, OnInvalid
from performers.errors import InputError
from performers.randomness import derive_seed
from performers.tools.designs import Design, write_designs
from performers.tools.language_model import LanguageModel, Unread
from performers.tools.likelihood import STRIPES, pseudo_log_likelihoods
from performers.tools.proteins import CHAIN_BREAK
from performers.tools.sampling import Drawing, Noise
from performers.tools.tool import Outcome, Result, Tool, Written

OPEN = "?"
Order: TypeAlias = Literal["confident", "entropy", "random"]

_STANDARD = [RESIDUES.index(letter) for letter in STANDARD_RESIDUES]
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_STEPS = 32


class Variant(NamedTuple):
    """One redesign of one record.

    Attributes:
        number: of the record, counted from 1.
        id: of the record.
        chains: with any residue at open positions.
        positions: that are open, counted from 0 through all chains.
        variant: counted from 1.
    """

    number: int
    id: str
    chains: tuple[str, ...]
    positions: tuple[int, ...]
    variant: int


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """Ranges such as "10-40,55": first and last position, counted from 1.

    Raises:
        InputError: something else is in it, or a range ends before it begins.
    """
    found: list[tuple[int, int]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match and len(part) < 40 else (0, 0)
        if not 1 <= first <= last:
            raise InputError(f"mask: {part!r} is no range of positions; expected such as 10-40, counted from 1.")
        found.append((first, last))
    if not found:
        raise InputError("mask: expected ranges of positions such as 10-40,55, counted from 1.")
    return found


class _OpenReader(FastaReader):
    """FASTA in which "?" and ":" may stand between residues, and whose records that are left out are listed.

    Attributes:
        before: how many records the sources before this one have.
    """

    before = 0

    def clean(self, header: str, sequence: str) -> str | None:
        """As of FASTA, with open positions and chain breaks left in their places."""
        text = "".join(sequence.split())
        letters = super().clean(header, text.replace(OPEN, "X").replace(CHAIN_BREAK, "X"))
        if letters is None:
            assert self.report is not None
            reason = "it holds characters that are not residues"
            self.report.left_out.append((self.before + self.number, (header.split() or [""])[0], reason))
            return None
        return "".join(old if old in (OPEN, CHAIN_BREAK) else new for old, new in zip(text, letters, strict=True))


class Redesigner(Tool[Variant]):
    """`generate` with a masked model as a `Tool`.

    Arguments:
        model: a masked language model.
        sources: FASTA files.
        mask: ranges of positions that are open in every record besides those that are "?", counted from 1 through its chains.
        count: redesigns of each record.
        steps: in which the open positions of a record are filled; None for one at a time, at most 32 steps.
        order: which positions are kept first: those with the likeliest letter ("confident"), with the least entropy ("entropy"),
            or any ("random").
        drawing: how letters are drawn.
        seed: of everything random.
        toks_per_batch: tokens in one forward pass.
        max_length, on_invalid: as in `read_fasta`.
        reference, inputs: as in `Sampler`; `inputs` without the sources.

    Raises:
        InputError: an argument is out of range, or the model is causal.
    """

    command: ClassVar[str] = "generate"
    noun: ClassVar[str] = "designs"

    def __init__(
        self,
        model: LanguageModel,
        sources: Sequence[str],
        *,
        mask: str | None = None,
        count: int = 1,
        steps: int | None = None,
        order: Order = "confident",
        drawing: Drawing | None = None,
        seed: int = 0,
        toks_per_batch: int = 16_384,
        max_length: int = MAX_LENGTH,
        on_invalid: OnInvalid = "error",
        reference: Sequence[str] = (),
        inputs: Sequence[InputFile] = (),
    ) -> None:
        model.check_language_model()
        if not model.can_mask:
            raise InputError(
                f"{model.folder} holds a causal language model, which cannot fill open positions: expected a masked one."
            )
        if count < 1 or toks_per_batch < 1 or (steps is not None and steps < 1):
            raise InputError(f"count is {count} and steps {steps}: expected at least 1.")
        if order not in get_args(Order):
            raise InputError(f"order is {order!r}: expected {', '.join(get_args(Order))}.")
        self.drawing = drawing or Drawing()
        if self.drawing.controls_repetition:
            raise InputError("Repetition is controlled where residues are drawn one after the other, by causal models.")
        self.model, self.sources, self.mask = model, tuple(sources), mask
        self.count, self.steps, self.seed = count, steps, seed
        self.order: Order = order
        self.toks_per_batch, self.max_length = toks_per_batch, max_length
        self.on_invalid: OnInvalid = on_invalid
        self.reference, self.inputs = tuple(reference), tuple(inputs)
        self._ranges = [] if mask is None else parse_ranges(mask)

    def items(self, report: FastaReport) -> Iterator[Variant]:
        """The redesigns, record by record."""
        before = 0
        for source in self.sources:
            reader = _OpenReader(source, self.max_length, self.on_invalid, report)
            reader.before = before
            for record in reader:
                number = before + record.number
                where = f"{reader.name}, record {record.number:,}" + (f" ({record.id})" if record.id else "")
                chains, positions = self._opened(record.sequence, where)
                for variant in range(1, self.count + 1):
                    yield Variant(number, record.id, chains, positions, variant)
            before += reader.number
        report.inputs += self.inputs

    def _opened(self, sequence: str, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The chains of a record and its open positions."""
        letters = sequence.replace(CHAIN_BREAK, "")
        chains = tuple(sequence.replace(OPEN, "X").split(CHAIN_BREAK))
        if not all(chains):
            raise InputError(f"{where}: a chain is empty; expected residues on either side of a colon.")
        is_open = np.array([letter == OPEN for letter in letters])
        for first, last in self._ranges:
            if last > len(letters):
                raise InputError(f"{where}: the mask {first}-{last} goes beyond its {len(letters):,} residues.")
            is_open[first - 1 : last] = True
        if not is_open.any():
            raise InputError(f"{where}: no position is open; expected ? in its sequence, or --mask.")
        if len(chains) > 1 and not self.model.is_performer:
            raise InputError(f"{where}: it has several chains, and only a Performer reads them together.")
        return chains, tuple(np.flatnonzero(is_open).tolist())

    def to_json(self, item: Variant) -> Any:
        """A list of five."""
        return item

    def from_json(self, content: Any) -> Variant:
        """The inverse of `to_json`."""
        number, identifier, chains, positions, variant = content
        return Variant(number, identifier, tuple(chains), tuple(positions), variant)

    def label(self, item: Variant) -> tuple[int, str]:
        """The number of its record, and the design's name."""
        return item.number, f"{item.id or f'record-{item.number}'}-{item.variant}"

    def tokens(self, item: Variant) -> int:
        """Those of all passes: a step each, and those of the pseudo-log-likelihood."""
        return self.longest(item) * (self._steps_of(item) + min(STRIPES, sum(map(len, item.chains))))

    def longest(self, item: Variant) -> int:
        """The tokens of one pass."""
        return sum(len(chain) + 2 for chain in item.chains)

    def refusal(self, item: Variant) -> str | None:
        """Why the model has no positions for it, if so."""
        return self.model.refusal(self.longest(item))

    def about(self, report: FastaReport) -> str:
        """Records and redesigns of each."""
        return f"{report.records:,} records, {self.count:,} redesigns of each"

    def num_bytes(self, item: Variant) -> int:
        """Two files with the sequence, and what stands beside it."""
        return 2 * self.longest(item) + 8 * len(item.positions) + 400

    def _steps_of(self, item: Variant) -> int:
        return min(len(item.positions), _MOST_STEPS if self.steps is None else self.steps)

    def compute(self, items: Sequence[Variant]) -> Sequence[Result]:
        """For each redesign its letters, chains joined, and its pseudo-log-likelihood."""
        works = [_Work(item, self._steps_of(item), self.seed) for item in items]
        while active := [work for work in works if work.open and work.unread is None]:
            rows = [self.model.row(work.chains(), masked=work.open, wanted=work.open) for work in active]
            for index, reading in self.model.read(rows, log_probabilities=True, toks_per_batch=self.toks_per_batch):
                if isinstance(reading, Unread):
                    active[index].unread = reading
                else:
                    assert reading.log_probabilities is not None
                    active[index].fill(reading.log_probabilities[:, _STANDARD], self.drawing, self.order)
        done = [work for work in works if work.unread is None]
        found = pseudo_log_likelihoods(self.model, [work.chains() for work in done], toks_per_batch=self.toks_per_batch)
        for work, likelihood in zip(done, found, strict=True):
            if isinstance(likelihood, Unread):
                work.unread = likelihood
            else:
                work.log_likelihood = likelihood
        return [work.result() for work in works]

    def designs(self, results: Iterable[tuple[Variant, Result]]) -> Iterator[Design]:
        """The redesigns that were made."""
        for item, result in results:
            if isinstance(result, Unread):
                continue
            letters = result["letters"].tobytes().decode("ascii")
            yield Design(
                id=self.label(item)[1],
                sequence=CHAIN_BREAK.join(_split(letters, item.chains)),
                log_likelihood=float(result["log_likelihood"][0]) / len(letters),
                about={"redesigned": len(item.positions)},
            )

    def write(self, results: Iterable[tuple[Variant, Result]], path: Any) -> Written | None:
        """FASTA, and a TSV of the same name."""
        failed = [(*self.label(item), result.reason) for item, result in results if isinstance(result, Unread)]
        designs = list(self.designs(results))
        return Written(len(designs) + len(failed), failed, write_designs(designs, path, self.reference))

    def methods(self, outcome: Outcome) -> str:
        """What was done."""
        most = f"at most {_MOST_STEPS}" if self.steps is None else f"{self.steps}"
        surest = {"confident": "the likeliest letter", "entropy": "the least entropy", "random": "no preference"}
        return (
            f"{outcome.figures['designs']:,} protein sequences were redesigned at their open positions with performers "
            f"{__version__} and the masked protein language model {self.model.name} ({self.model.num_parameters:,} parameters) "
            f"by iterative unmasking in {most} steps, positions with {surest[self.order]} first (temperature "
            f"{self.drawing.temperature:g}; seed {self.seed}). All other residues were kept; log-likelihoods are "
            "pseudo-log-likelihoods in nats per residue under the same model and were not used to judge the designs."
        )


class _Work:
    """A redesign while it is filled.

    Attributes:
        open: positions that are still open.
        unread: why it could not be filled, if so.
        log_likelihood: of the whole, once it is known.
    """

    def __init__(self, item: Variant, steps: int, seed: int) -> None:
        self.open = list(item.positions)
        self.unread: Unread | None = None
        self.log_likelihood = np.nan
        self._item, self._letters = item, list("".join(item.chains))
        self._steps_left = steps
        self._noise = Noise([derive_seed(seed, "redesign", item.number, item.variant)])

    def chains(self) -> list[str]:
        """The chains as they are now."""
        return _split("".join(self._letters), self._item.chains)

    def fill(self, log_probabilities: npt.NDArray[np.float32], drawing: Drawing, order: Order) -> None:
        """Take a step, given log-probabilities (open positions, 20)."""
        scores = torch.from_numpy(log_probabilities.astype(np.float64)).log_softmax(-1)
        nothing_before: Any = torch.zeros(0)
        drawn = self._noisy(drawing.shape()(nothing_before, scores)).argmax(-1).tolist()
        if order == "confident":
            sure = scores.max(-1).values
        elif order == "entropy":
            sure = (scores.exp() * scores).sum(-1)
        else:
            sure = self._noisy(torch.zeros(len(self.open), 1, dtype=torch.float64))[:, 0]
        kept = -(-len(self.open) // self._steps_left)
        self._steps_left -= 1
        chosen = sorted(range(len(self.open)), key=lambda place: (-float(sure[place]), place))[:kept]
        for place in chosen:
            self._letters[self.open[place]] = STANDARD_RESIDUES[drawn[place]]
        self.open = [position for place, position in enumerate(self.open) if place not in set(chosen)]

    def _noisy(self, scores: torch.Tensor) -> torch.Tensor:
        return self._noise(None, scores.reshape(1, -1)).reshape(scores.shape)

    def result(self) -> Result:
        """The letters and the pseudo-log-likelihood, or why there are none."""
        if self.unread is not None:
            return self.unread
        letters = np.frombuffer("".join(self._letters).encode("ascii"), dtype=np.uint8)
        return {"letters": letters, "log_likelihood": np.array([self.log_likelihood])}


def _split(letters: str, like: Sequence[str]) -> list[str]:
    """Letters of all chains, cut into chains as long as these."""
    ends = np.cumsum([len(chain) for chain in like]).tolist()
    return [letters[end - len(chain) : end] for end, chain in zip(ends, like, strict=True)]
