"""New proteins from a causal model, as a tool: a number of designs in, sequences with their log-likelihoods out.

Designs are drawn side by side, `at_once` rows at a time, by Hugging Face's `generate()`. Rows belong to designs once and for
all: design i is row i mod `at_once` of group i div `at_once`, a group is always drawn whole, and each row has random numbers of
its own. So a design is a function of the seed and its number: more designs, a resumed run or another order change none of them.
What a group takes is its sequences and one attention state per row, whose size does not depend on the length (FAVOR; a local
window, once it is full).

With partners, their chains are read first, in one context in which positions restart with every chain, and the design is drawn
after them. Of several candidates the one with the largest preference is kept:

    preference(x) = (log P(x | wanted) - log P(x | unwanted)) / residues of x

where "wanted" are the chains that are read first, and "unwanted" the chains of the unwanted partners, read in the same way; where
there are none, log P(x | nothing) takes their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig

from performers import __version__
from performers.data import RESIDUES, STANDARD_RESIDUES, FastaReport, InputFile
from performers.data.alphabet import expected_residues
from performers.errors import InputError
from performers.randomness import derive_seed
from performers.tools.designs import Design, write_designs
from performers.tools.language_model import LanguageModel, Unread, is_want_of_memory
from performers.tools.likelihood import Past, log_likelihoods
from performers.tools.partners import PartnerEffect, Partners, said_of
from performers.tools.sampling import Drawing, Noise
from performers.tools.tool import Outcome, Result, Tool, Written
from performers.training.distributed import autocast

AT_ONCE = 16
_PROBED = 8  # residues that are drawn to tell how long all will take


class Group(NamedTuple):
    """Designs that are drawn side by side.

    Attributes:
        number: of the group, counted from 0.
        size: how many of its rows are wanted, the first ones.
        length: residues of a design, at most; the prompt counted.
    """

    number: int
    size: int
    length: int


class Sampler(Tool[Group]):
    """`generate` with a causal model as a `Tool`.

    Arguments:
        model: a causal language model. The context that it reads with, if any, comes before every design.
        count: designs.
        min_length, max_length: residues of a design, the prompt counted. Equal, they are its length, and the model is not asked
            where a protein ends; otherwise a design ends where the model says so, from `min_length` on.
        prompt: residues that every design begins with.
        drawing: how residues are drawn.
        partners: proteins that are read first, or held against it; a causal Performer only.
        candidates: sequences drawn for each design, of which the one with the largest preference is kept.
        seed: of everything random.
        at_once: designs drawn side by side.
        reference, inputs: the FASTA sources of the nearest proteins, and the files behind all options.

    Attributes:
        partner_effect: with partners, a sentence on whether the model heeds any; otherwise None.

    Raises:
        InputError: an argument is out of range, or the model is not a causal language model.
        UnsupportedError: the model cannot read partners.
        CheckpointError: what was measured of partners is damaged.
    """

    command: ClassVar[str] = "generate"
    noun: ClassVar[str] = "groups of designs"

    def __init__(
        self,
        model: LanguageModel,
        *,
        count: int = 1,
        min_length: int,
        max_length: int,
        prompt: str = "",
        drawing: Drawing | None = None,
        partners: Partners | None = None,
        candidates: int = 1,
        seed: int = 0,
        at_once: int = AT_ONCE,
        reference: Sequence[str] = (),
        inputs: Sequence[InputFile] = (),
    ) -> None:
        model.check_language_model()
        if not model.is_causal:
            raise InputError(
                f"{model.folder} holds a masked language model, which redesigns proteins (-i, with ? or --mask) but writes no "
                "new ones: expected a causal one."
            )
        if count < 1 or at_once < 1 or candidates < 1:
            raise InputError(
                f"count is {count}, candidates {candidates} and at-once {at_once}: expected at least 1 of each."
            )
        self.prompt = "".join(prompt.split()).upper()
        for place, letter in enumerate(self.prompt, start=1):
            if letter not in RESIDUES:
                raise InputError(
                    f"prompt: {letter!r} at position {place} is not a residue; expected {expected_residues()}."
                )
        if not 1 <= min_length <= max_length:
            raise InputError(
                f"The length is {min_length} to {max_length}: expected at least 1, and no maximum below the minimum."
            )
        if max_length <= len(self.prompt):
            raise InputError(
                f"The length is {max_length:,} and the prompt has {len(self.prompt):,} residues: expected a longer design."
            )
        if candidates > 1 and not partners:
            raise InputError("Candidates are ranked by what partners make of them: expected --partner.")
        self.model, self.count = model, count
        self.min_length, self.max_length = min_length, max_length
        self.drawing = drawing or Drawing()
        self.partners = partners or Partners()
        self.candidates, self.seed, self.at_once = candidates, seed, at_once
        self.reference, self.inputs = tuple(reference), tuple(inputs)
        if partners and model.context is not None:
            raise InputError("--partner and --context exclude each other: read the partners into the context.")
        wanted, unwanted = self.partners.wanted_chains, self.partners.unwanted_chains
        self._past = Past.of(model, wanted) if wanted else None
        if model.context is not None:
            self._past = Past(model.context.for_model(model).states)
        self._against = Past.of(model, unwanted) if unwanted else None
        # Read in turn: the longer of the two is what a model has to have been trained on.
        self._context_tokens = max(sum(len(chain) + 2 for chain in chains) for chains in (wanted, unwanted))
        # What is known of whether the model heeds partners at all.
        self.partner_effect = (
            said_of(PartnerEffect.find(model.folder, model.weights_fingerprint())) if self.partners else None
        )
        row = model.row([self.prompt + STANDARD_RESIDUES])
        self._begin = row.ids[: int(row.residues[0]) + len(self.prompt)]
        self._letters = row.ids[row.residues[len(self.prompt) :]]
        ending = row.ids[int(row.residues[-1]) + 1 :]
        self._eos = int(ending[0]) if len(ending) else None
        if not len(self._begin):
            raise InputError(f"{model.folder}: the model has no start token, so expected a prompt to go on from.")
        if self._eos is None and min_length < max_length:
            raise InputError(f"{model.folder}: the model has no token that ends a protein, so expected --length.")
        self.state_bytes: int | None = None

    def items(self, report: FastaReport) -> Iterator[Group]:
        """The groups."""
        report.inputs += self.inputs
        for start in range(0, self.count, self.at_once):
            yield Group(start // self.at_once, min(self.at_once, self.count - start), self.max_length)

    def to_json(self, item: Group) -> Any:
        """A list of three."""
        return item

    def from_json(self, content: Any) -> Group:
        """The inverse of `to_json`."""
        return Group(*content)

    def label(self, item: Group) -> tuple[int, str]:
        """The number of its first design, and the names of the first and last."""
        first = item.number * self.at_once + 1
        return first, f"design-{first} to design-{first + item.size - 1}"

    def tokens(self, item: Group) -> int:
        """Those of all rows and candidates."""
        return self.at_once * self.candidates * (item.length + 2)

    def probe(self, item: Group) -> Group:
        """The same with a few residues: every one of them takes as long."""
        return item._replace(length=min(item.length, len(self.prompt) + _PROBED))

    def longest(self, item: Group) -> int:
        """The tokens of a row, with those that were read before it."""
        return self._context_tokens + item.length + 2

    def refusal(self, item: Group) -> str | None:
        """Why the model has no positions for it, if so."""
        return self.model.refusal(item.length + 2)

    def about(self, report: FastaReport) -> str:
        """Designs and their length."""
        length = f"{self.min_length:,}" if self.min_length == self.max_length else f"up to {self.max_length:,}"
        after = f", after {len(self.partners.wanted_chains):,} chains of partners" if self.partners.wanted else ""
        return f"{self.count:,} designs of {length} residues{after}"

    def num_bytes(self, item: Group) -> int:
        """Two files with the sequences, and what stands beside them."""
        return item.size * (2 * item.length + 400)

    def compute(self, items: Sequence[Group]) -> Sequence[Result]:
        """For each group, of the designs that are wanted: letters (n, L) filled with zeros, lengths, sums of log-likelihoods,
        preferences (NaN without partners), and whether the model ended them itself.
        """
        return [self._computed(item) for item in items]

    def _computed(self, item: Group) -> Result:
        if (refusal := self.refusal(item)) is not None:
            return Unread(refusal)
        try:
            best = self._candidate(item, 0)
            for candidate in range(1, self.candidates):
                other = self._candidate(item, candidate)
                better = other["preference"] > best["preference"]
                for name, values in other.items():
                    best[name][better] = values[better]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_want_of_memory(error):
                raise
            return Unread(f"there is not enough memory on {self.model.device} for {self.at_once:,} designs at once")
        if not np.isfinite(best["log_likelihood"]).all():
            return Unread("the model's numbers for them are not finite")
        return {name: values[: item.size] for name, values in best.items()}

    def _candidate(self, item: Group, candidate: int) -> dict[str, npt.NDArray[Any]]:
        sequences, ended = self._drawn(item, candidate)
        lengths = np.array([len(sequence) for sequence in sequences])
        likelihoods = log_likelihoods(self.model, sequences, self._past)
        preferences = np.full(len(sequences), np.nan)
        if self.partners:
            preferences = (likelihoods - log_likelihoods(self.model, sequences, self._against)) / lengths
        letters = np.zeros((len(sequences), item.length), dtype=np.uint8)
        for row, sequence in zip(letters, sequences, strict=True):
            row[: len(sequence)] = np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)
        return {
            "letters": letters,
            "length": lengths,
            "log_likelihood": likelihoods,
            "preference": preferences,
            "ended": ended,
        }

    @torch.inference_mode()
    def _drawn(self, item: Group, candidate: int) -> tuple[list[str], npt.NDArray[np.bool_]]:
        """The sequences of a group's rows, and which of them the model ended."""
        first = item.number * self.at_once
        seeds = [derive_seed(self.seed, "generate", number, candidate) for number in range(first, first + self.at_once)]
        begin = torch.from_numpy(self._begin).to(self.model.device).repeat(self.at_once, 1)
        ends_itself = self._eos if self.min_length < self.max_length else None
        prefix = len(self._begin) - len(self.prompt)
        arguments: dict[str, Any] = {}
        if self.model.is_performer:
            past = self._past or Past([None] * self.model.num_layers)
            arguments["past_key_values"] = past.cache(self.at_once)
        with autocast(self.model.device, self.model.dtype):
            ids = self.model.network.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                generation_config=GenerationConfig(
                    do_sample=False,  # the noise draws
                    max_new_tokens=item.length - len(self.prompt),
                    eos_token_id=ends_itself,
                    pad_token_id=self._eos,
                    use_cache=True,
                ),
                logits_processor=self.drawing.processors(
                    self._letters.tolist(), ends_itself, prefix + max(self.min_length, 1), Noise(seeds)
                ),
                **arguments,
            )
        if arguments:
            states = arguments["past_key_values"].states
            self.state_bytes = sum(state.nbytes for state in states) // self.at_once
        names = {int(token): letter for token, letter in zip(self._letters, STANDARD_RESIDUES, strict=True)}
        found: list[str] = []
        for row in ids[:, len(self._begin) :].tolist():
            drawn = row[: row.index(ends_itself)] if ends_itself in row else row
            found.append(self.prompt + "".join(names[token] for token in drawn))
        return found, np.array([len(sequence) < item.length for sequence in found])

    def designs(self, results: Iterable[tuple[Group, Result]]) -> Iterator[Design]:
        """The designs of the groups that were drawn."""
        for group, result in results:
            if isinstance(result, Unread):
                continue
            first = group.number * self.at_once + 1
            for row in range(group.size):
                length = int(result["length"][row])
                about: dict[str, Any] = {"ended_by": "model" if result["ended"][row] else "length"}
                if self.partners:
                    about["preference"] = float(result["preference"][row])
                yield Design(
                    id=f"design-{first + row}",
                    sequence=result["letters"][row, :length].tobytes().decode("ascii"),
                    log_likelihood=float(result["log_likelihood"][row]) / length,
                    about=about,
                )

    def write(self, results: Iterable[tuple[Group, Result]], path: Any) -> Written:
        """FASTA, and a TSV of the same name."""
        failed = [
            (number, f"design-{number}", result.reason)
            for group, result in results
            if isinstance(result, Unread)
            for number in range(self.label(group)[0], self.label(group)[0] + group.size)
        ]
        figures = write_designs(list(self.designs(results)), path, self.reference)
        if self.partner_effect is not None:
            figures["partner_effect"] = self.partner_effect
        return Written(self.count, failed, figures)

    def methods(self, outcome: Outcome) -> str:
        """What was done."""
        drawing = self.drawing
        how = f"temperature {drawing.temperature:g}"
        how += f", the {drawing.top_k} likeliest residues" if drawing.top_k else ""
        how += f", nucleus sampling at {drawing.top_p:g}" if drawing.top_p < 1 else ""
        if drawing.repetition_penalty != 1:
            how += f", a repetition penalty of {drawing.repetition_penalty:g} over {drawing.repetition_window} residues"
        how += f", at most {drawing.max_run} equal residues in a row" if drawing.max_run else ""
        prompt = f" after a prompt of {len(self.prompt)} residues" if self.prompt else ""
        partners = ""
        if self.partners:
            partners = (
                f" They were drawn after {len(self.partners.wanted)} wanted partners and held against "
                f"{len(self.partners.unwanted)} unwanted ones, the best of {self.candidates} candidates by the difference of "
                f"log-likelihoods. {self.partner_effect}"
            )
        elif self.model.context is not None:
            partners = f" They were drawn {self.model.company()}."
        return (
            f"{outcome.figures['designs']:,} protein sequences were drawn residue by residue{prompt} with performers "
            f"{__version__} from the causal protein language model {self.model.name} ({self.model.num_parameters:,} "
            f"parameters; {how}; seed {self.seed}).{partners} "
            "Log-likelihoods are in nats per residue under the same model; they were not used to judge the designs."
        )
