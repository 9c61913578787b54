"""A published model, opened with what it is fitted to, distilled on and judged on; and how it is judged, before and after.

- antiberty: the share of masked residues of antibody domains that it finds, all residues masked once, framework and CDR3 apart.
- minilm: the cosine between its embeddings of texts and those of the original, how often the nearest other text stays the same,
  and how often the second half of a text is the nearest of all second halves to the first.
- esm2: how well ESM-2's own regression predicts contacts from its attention weights, P@L.
- all: how far the last hidden states are from the original's.

A model goes in, what was counted in every sequence comes out; `conversion_figures` makes figures of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import normalize

from performers.attention.weights import attention_weights
from performers.benchmarks.contacts import precisions
from performers.benchmarks.conversion_figures import Columns
from performers.benchmarks.conversion_models import Package
from performers.benchmarks.conversion_sequences import Domain, antibody_domains, english, halves_of, proteins
from performers.benchmarks.conversion_settings import ConversionSettings
from performers.conversion import interface
from performers.conversion.calibration import fit_tensors
from performers.conversion.measurement import Outcome, batch_of, longest_input, outcome, relative_error, token_ids
from performers.conversion.saving import LayerTensors, copy_companions
from performers.conversion.specification import Specification
from performers.conversion.wiring import apply, attention_modules, open_model
from performers.errors import InputError
from performers.folders import sealed_folder
from performers.randomness import derive_seed
from performers.training.checkpoint import without_bars

ROUNDS = 7  # every residue of an antibody is masked in one of so many passes
_AT_ONCE = 16  # sequences in one pass


class Subject(ABC):
    """A pretrained model with its sequences.

    Arguments:
        folder: of the model.
        package: where it comes from.
        training, judged: sequences as the tokenizer reads them.
        fit_to: how many of the first training sequences kernels are fitted to.
        device: where the model is.

    Attributes:
        name: as in `PACKAGES`.
        model: with its exact attention, through our path, unless something else was applied.
        modules, classes: its attention modules, and their classes.
        training, judged: the sequences.
        fit_to, judge_on: token ids.
        exact: what the original makes of `judge_on`, with the calls of its attention modules.
    """

    name: ClassVar[str]

    def __init__(
        self,
        folder: Path,
        package: Package,
        training: list[str],
        judged: list[str],
        fit_to: int,
        device: str,
    ) -> None:
        with without_bars():
            self.model: Any = open_model(folder, package.architecture)
        self.model.to(device)
        self.modules: list[nn.Module] = attention_modules(self.model)
        self.classes = sorted({type(module).__name__ for module in self.modules})
        self.training, self.judged = training, judged
        self.folder = folder
        self.tokenizer: Any = self._tokenizer()
        self.fit_to = self._ids(training[:fit_to])
        self.judge_on = self._ids(judged)
        self.apply(self.exactly())
        self.exact: Outcome = outcome(self.model, batch_of(self.model, self.judge_on), keep_calls=True)

    def _tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def _ids(self, texts: list[str]) -> list[Tensor]:
        return token_ids(self.model, texts, self.tokenizer, at_most=longest_input(self.model))

    def exactly(self) -> Specification:
        """No layer converted."""
        return Specification("favor", {}, [], self.classes)

    def apply(self, specification: Specification, tensors: LayerTensors | None = None) -> None:
        """Gives the model this attention."""
        apply(self.model, self.modules, specification, tensors)

    def fitted(self, specification: Specification, sequences: list[Tensor] | None = None) -> LayerTensors:
        """What the features take from the queries and keys of `fit_to`, or of some sequences."""
        return fit_tensors(self.model, self.modules, specification, batch_of(self.model, sequences or self.fit_to))

    def save(self, folder: Path) -> None:
        """Writes the model as it is converted now, with its tokenizer, for `performers.load` and `performers distil`."""
        with without_bars(), sealed_folder(folder, replace=True) as building:
            self.model.save_pretrained(building)
            self.tokenizer.save_pretrained(building)
            copy_companions(self.folder, building)

    def judge(self, model: Any) -> Columns:
        """What a model of the same kind, in whatever way its attention is computed, makes of the judged sequences."""
        found = outcome(model, batch_of(model, self.judge_on))
        lengths = [len(ids) for ids in self.judge_on]
        pairs = zip(found.hidden[-1], self.exact.hidden[-1], lengths, strict=True)
        hidden = [relative_error(ours[:length], theirs[:length]) for ours, theirs, length in pairs]
        return {"hidden": hidden, **self._judge(model, found)}

    @abstractmethod
    def _judge(self, model: Any, found: Outcome) -> Columns: ...


class Antibodies(Subject):
    """AntiBERTy."""

    name = "antiberty"

    def __init__(self, folder: Path, package: Package, settings: ConversionSettings) -> None:
        if settings.antibodies is None:
            raise InputError("AntiBERTy is judged on antibodies: expected --antibodies.")
        path = Path(settings.antibodies)
        self.known, self.domains = antibody_domains(path, settings.fit_to, settings.judge_on, settings.seed)
        training, judged = ([" ".join(domain.sequence) for domain in half] for half in (self.known, self.domains))
        super().__init__(folder, package, training, judged, settings.fit_to, settings.device)
        self.rounds = masked_in(self.domains, settings.seed)

    def _tokenizer(self) -> Any:
        # The package brings a vocabulary alone, of capital letters.
        return transformers.BertTokenizer(str(self.folder / "vocab.txt"), do_lower_case=False)

    @torch.no_grad()
    def _judge(self, model: Any, found: Outcome) -> Columns:
        right = [torch.zeros(len(domain.sequence), dtype=torch.bool) for domain in self.domains]
        padded = [nn.functional.pad(rounds, (1, 1), value=-1) for rounds in self.rounds]
        for turn in range(ROUNDS):
            for start in range(0, len(padded), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                hidden = [
                    ids.masked_fill(rounds == turn, self.tokenizer.mask_token_id)
                    for ids, rounds in zip(self.judge_on[some], padded[some], strict=True)
                ]
                guessed = model(**batch_of(model, hidden)).logits.argmax(-1).cpu()
                for row, ids, rounds, own in zip(
                    guessed, self.judge_on[some], self.rounds[some], right[some], strict=True
                ):
                    own |= (rounds == turn) & (row[1 : len(rounds) + 1] == ids[1:-1])
        return by_region(self.domains, right)


def masked_in(domains: list[Domain], seed: int) -> list[Tensor]:
    """In which of the passes each residue of each domain is masked, (L,) each."""
    found: list[Tensor] = []
    for number, domain in enumerate(domains):
        generator = torch.Generator().manual_seed(derive_seed(seed, "masked residues", number))
        length = len(domain.sequence)
        found.append(torch.arange(length)[torch.randperm(length, generator=generator)] % ROUNDS)
    return found


def by_region(domains: list[Domain], right: list[Tensor]) -> Columns:
    """Right residues and all residues of each domain: together, of the framework and of CDR3; `right` is (L,) bool of each."""
    columns: Columns = {}
    for name in ("", "framework_", "cdr3_"):
        columns[f"{name}right"], columns[f"{name}residues"] = [], []
    for domain, found in zip(domains, right, strict=True):
        cdr3 = torch.zeros(len(domain.sequence), dtype=torch.bool)
        cdr3[domain.cdr3] = True
        for name, where in (("", cdr3 | True), ("framework_", ~cdr3), ("cdr3_", cdr3)):
            columns[f"{name}right"].append(float((found & where).sum()))
            columns[f"{name}residues"].append(float(where.sum()))
    return columns


class Sentences(Subject):
    """all-MiniLM-L6-v2."""

    name = "minilm"

    def __init__(self, folder: Path, package: Package, settings: ConversionSettings) -> None:
        path = None if settings.texts is None else Path(settings.texts)
        training, judged = english(path, settings.fit_to, settings.judge_on, settings.seed)
        super().__init__(folder, package, training, judged, settings.fit_to, settings.device)
        self._halves = [self._ids(half) for half in halves_of(judged)]

    def _judge(self, model: Any, found: Outcome) -> Columns:
        ours, theirs = _embeddings(found), _embeddings(self.exact)
        nearest = [(x @ x.T).fill_diagonal_(-1).argmax(-1) for x in (ours, theirs)]
        first, second = (_embeddings(outcome(model, batch_of(model, half))) for half in self._halves)
        matched = (first @ second.T).argmax(-1).cpu() == torch.arange(len(first))
        return {
            "cosine": (ours * theirs).sum(-1).tolist(),
            "nearest_kept": (nearest[0] == nearest[1]).double().tolist(),
            "halves": matched.double().tolist(),
        }


def _embeddings(result: Outcome) -> Tensor:
    """The normalised means of the last hidden states, (B, D)."""
    states = result.hidden[-1]
    weights = torch.ones(states.shape[:2], device=states.device) if result.real is None else result.real.to(states)
    return normalize((states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True), dim=-1)


class Proteins(Subject):
    """The body of ESM-2."""

    name = "esm2"

    def __init__(self, folder: Path, package: Package, settings: ConversionSettings) -> None:
        training, self._chains = proteins(settings.judge_on)
        judged = [chain.sequence for chain in self._chains]
        super().__init__(folder, package, training, judged, settings.fit_to, settings.device)

    def _judge(self, model: Any, found: Outcome) -> Columns:
        scores = [
            precisions(chain.contacts, _contacts(model, ids))
            for chain, ids in zip(self._chains, self.judge_on, strict=True)
        ]
        return {"contacts": [s["all P@L"] for s in scores], "long_contacts": [s["long P@L"] for s in scores]}


@torch.no_grad()
def _contacts(model: Any, ids: Tensor) -> Any:
    """(L, L): the probabilities of contacts by ESM-2's own regression on its attention weights."""
    calls = outcome(model, batch_of(model, [ids]), keep_calls=True).calls
    layers: list[Tensor] = []
    everything = torch.arange(len(ids), device=model.device)
    for _, (call,) in sorted(calls.items()):
        mechanism = interface.mechanism_of(call.module)
        of_heads = attention_weights(mechanism, call.query[0], call.key[0], scale=call.arguments["scale"])
        layers.append(torch.cat([weights.block(everything, everything).float() for weights in of_heads]))
    tokens = ids[None].to(model.device)
    return model.esm.contact_head(tokens, torch.stack(layers)[None])[0].double().cpu().numpy()


SUBJECTS: dict[str, type[Antibodies] | type[Sentences] | type[Proteins]] = {
    subject.name: subject for subject in (Antibodies, Sentences, Proteins)
}
