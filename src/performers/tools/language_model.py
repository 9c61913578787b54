"""One way to ask any protein language model: rows of tokens in, hidden states and log-probabilities per residue out.

A `LanguageModel` is opened by the name of a bundled model or from a folder: a Performer (or its run), a converted model, or any
Hugging Face protein model whose tokenizer gives one token per residue. It makes rows of tokens from chains, and reads rows in
batches whose size is a number of tokens. Performers take rows packed end to end, other models take them padded; either way a
row's numbers do not depend on what it shares a batch with (to 1e-5 in float32). A row that cannot be read, for want of memory or
because its numbers are not finite, comes back as an `Unread` with the reason, and its batch mates come back as they are alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor

from performers.conversion import load
from performers.data import BOS, EOS, FIRST_RESIDUE, MASK, RESIDUES, STANDARD_RESIDUES, VOCAB_SIZE
from performers.errors import CheckpointError, InputError, PerformersError, UnsupportedError
from performers.folders import MANIFEST, sha256_of, verify_folder
from performers.models.bundled import MASKED, model_or_default, name_of
from performers.models.context import PerformerContext
from performers.tools.context_states import ContextState
from performers.training.checkpoint import find_model, open_model, weights_files
from performers.training.distributed import autocast, choose_device, choose_dtype

_LETTER_CODES = np.full(128, -1, dtype=np.int64)
_LETTER_CODES[[ord(letter) for letter in RESIDUES]] = np.arange(len(RESIDUES))

_Ints = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """What the model reads at a time: one chain, or several chains jointly.

    Attributes:
        ids: (T,) the model's token ids.
        positions: (T,) the position of each token, counted from 0 in every chain.
        residues: (L,) where in `ids` the residues are.
        wanted: indices into `residues` of those that the caller asks log-probabilities for; None for all.
    """

    ids: _Ints
    positions: _Ints
    residues: _Ints
    wanted: _Ints | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Reading:
    """What the model made of a row.

    Attributes:
        hidden: for each layer asked for, a float32 tensor (T, d) on the model's device. Layer 0 is the embeddings, the last is
            after the final norm.
        log_probabilities: float32 (W, 25), natural logarithms, for each wanted residue that of every letter of `RESIDUES`,
            normalised over all of the model's tokens. A causal model's are those given what comes before.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    log_probabilities: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Unread:
    """A row that could not be read, and why, as a sentence without a full stop."""

    reason: str


class LanguageModel:
    """A protein language model, ready to read. `LanguageModel.open` makes one.

    Attributes:
        folder: where it was opened from.
        is_causal: whether a residue is predicted from those before it alone.
        is_performer: whether it is a Performer, which packs rows and can read chains jointly.
        num_layers: L; layers are numbered 0 (embeddings) to L.
        hidden_size: d.
        position_limit: the most tokens in a row that it has positions for, or None.
        trained_length: tokens it was trained on at a time, or None where the folder does not say.
        context: what other proteins left behind, which every row is read with; None for rows alone.
        device, dtype: of the forward passes; weights stay in float32.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        *,
        table: Sequence[int],
        prefix: Sequence[int],
        suffix: Sequence[int],
        mask: int | None,
        stand_ins: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model = model.to(device)
        self.folder = folder
        self.device, self.dtype = device, dtype
        self.is_performer = model.config.model_type == "performer"
        self.is_causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.num_layers = int(model.config.num_hidden_layers)
        self.hidden_size = int(model.config.hidden_size)
        self.position_limit = _position_limit(model)
        self.trained_length = self.position_limit or _trained_length(model.config, folder)
        self._table = np.asarray(table, dtype=np.int64)
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._mask = mask
        self._stand_ins = stand_ins
        self._has_logits = "ForMaskedLM" in type(model).__name__ or self.is_causal
        self.context: ContextState | None = None
        self._context: PerformerContext | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        default: str = MASKED,
        context: str | Path | None = None,
    ) -> LanguageModel:
        """Open a bundled model, a model folder, or a run's.

        Arguments:
            folder: where the model is, or its name.
            device: "auto" (cuda, then mps, then cpu), or one by name.
            dtype: "auto", "float32" or "bfloat16".
            default: the bundled model that is opened where no folder is given.
            context: a file that `performers read` wrote, to read every row with.

        Raises:
            InputError: there is no bundled model of that name; the context is no state, or another model's.
            CheckpointError: the folder holds no model, or one that is damaged or unsafe to open.
            UnsupportedError: the model's tokenizer does not give one token per residue.
        """
        chosen = choose_device(device)
        path = find_model(model_or_default(folder, default))
        precision = choose_dtype(dtype, chosen)
        try:
            kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path / 'config.json'}: expected JSON with a 'model_type'.") from None
        if kind == "performer":
            table = range(FIRST_RESIDUE, VOCAB_SIZE)
            tokens: dict[str, Any] = {"table": table, "prefix": [BOS], "suffix": [EOS], "mask": MASK, "stand_ins": ""}
            opened = cls(open_model(path, any_head=True), path, **tokens, device=chosen, dtype=precision)
            return opened if context is None else opened.use_context(ContextState.read(context))
        if context is not None:
            raise UnsupportedError(f"{path}: only a Performer can read a protein with a context.")
        if (path / MANIFEST).exists():
            verify_folder(path)
        try:
            model: Any = load(path)
            tokens = _residue_tokens(path)
        except PerformersError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise CheckpointError(f"{path} cannot be opened: {' '.join(str(error).split())}.") from None
        return cls(model.float().eval(), path, **tokens, device=chosen, dtype=precision)

    @property
    def can_mask(self) -> bool:
        """Whether residues can be hidden from it."""
        return self._mask is not None and not self.is_causal

    @property
    def num_parameters(self) -> int:
        """How many numbers it has learned."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def network(self) -> Any:
        """The Hugging Face model, for what it alone can do."""
        return self._model

    @property
    def name(self) -> str:
        """For people: a bundled model's, that of its folder, or that of the run where the folder is just called `model`."""
        folder = self.folder.resolve()
        return name_of(folder) or (folder.parent.name if folder.name == "model" else folder.name)

    def fingerprint(self) -> dict[str, str]:
        """The SHA-256 of each file that decides its numbers, and of the context that it reads with."""
        context = {} if self.context is None else {"context": self.context.digest}
        return {**self.weights_fingerprint(), **context}

    def weights_fingerprint(self) -> dict[str, str]:
        """The SHA-256 of each file that decides the model."""
        files = [self.folder / "config.json", *weights_files(self.folder)]
        return {file.name: sha256_of(file) for file in files}

    @property
    def weights(self) -> list[Path]:
        """Its weights files."""
        return list(weights_files(self.folder))

    def use_context(self, context: ContextState) -> LanguageModel:
        """Itself, reading every row from now on with what other proteins left behind.

        Raises:
            InputError: it is another model's state.
            UnsupportedError: the model is no Performer.
        """
        if not self.is_performer:
            raise UnsupportedError(f"{self.folder}: only a Performer can read a protein with a context.")
        self._context = context.for_model(self)
        self.context = context
        return self

    def shareable_states(self) -> list[type]:
        """The kinds of states that its layers share with other sequences, those of halves on their own."""
        mechanisms = [layer.attention.mechanism for layer in self._model.performer.layers]
        return [kind for mechanism in mechanisms for kind in mechanism.shared_kinds]

    def left_behind(self, rows: Sequence[Row]) -> PerformerContext | Unread:
        """What rows leave behind for others, each read alone: their sum; or why they cannot be read."""

        def read() -> PerformerContext:
            return self._model.performer.read_context(**self._end_to_end(rows)).summed()

        with torch.inference_mode(), autocast(self.device, self.dtype):
            context = self._unless_too_large(read, rows)
        if isinstance(context, PerformerContext) and not context.is_finite():
            return Unread("the model's numbers for it are not finite")
        return context

    def check_language_model(self) -> None:
        """Refuse a model that predicts no residues.

        Raises:
            UnsupportedError: names the class of the model.
        """
        if not self._has_logits:
            raise UnsupportedError(
                f"{self.folder} holds a {type(self._model).__name__}, which predicts no residues: expected a masked or causal "
                "language model."
            )

    def layer(self, number: int) -> int:
        """A layer's number counted from 0, given one that may count from the end.

        Raises:
            InputError: there is no such layer.
        """
        if not -self.num_layers - 1 <= number <= self.num_layers:
            raise InputError(
                f"layers has {number}: the model has layers 0 (embeddings) to {self.num_layers}, or "
                f"{-self.num_layers - 1} to -1 from the end."
            )
        return number % (self.num_layers + 1)

    def refusal(self, tokens: int) -> str | None:
        """Why it cannot read a row of so many tokens, if so; without a full stop."""
        if self.position_limit is None or tokens <= self.position_limit:
            return None
        return f"it takes {tokens:,} tokens, and the model has positions for {self.position_limit:,} only"

    def remark(self) -> str | None:
        """What a user should be told of the model's alphabet, and of the context it reads with."""
        said = [self._stand_ins, *([] if self.context is None else self.context.remarks(self))]
        return " ".join(filter(None, said)) or None

    def company(self) -> str:
        """What a protein is read with, as in "read alone"."""
        if self.context is None:
            return "alone"
        return f"in the context of the summed states of {self.context.proteins:,} other proteins"

    def row(
        self, chains: Sequence[str], *, masked: Sequence[int] | _Ints = (), wanted: Sequence[int] | _Ints | None = None
    ) -> Row:
        """Chains as one row, which are read jointly if there are several.

        Arguments:
            chains: residues; each chain is enclosed by the model's start and end tokens, with positions of its own.
            masked: indices of residues to hide, counted from 0 through all chains.
            wanted: indices of residues that log-probabilities are asked for; None for all.

        Raises:
            InputError: the model has no mask token.
            UnsupportedError: it cannot read several chains jointly.
        """
        if len(chains) > 1 and not self.is_performer:
            raise UnsupportedError(
                f"{self.folder}: only a Performer can read several chains jointly; read them isolated instead."
            )
        pieces: list[_Ints] = []
        positions: list[_Ints] = []
        residues: list[_Ints] = []
        start = 0
        for chain in chains:
            codes = _LETTER_CODES[np.frombuffer(chain.encode("ascii"), dtype=np.uint8)]
            ids = np.concatenate((self._prefix, self._table[codes], self._suffix)).astype(np.int64)
            pieces.append(ids)
            positions.append(np.arange(len(ids)))
            residues.append(np.arange(len(codes)) + start + len(self._prefix))
            start += len(ids)
        ids, where = np.concatenate(pieces), np.concatenate(residues)
        hidden = np.asarray(masked, dtype=np.int64)
        if len(hidden):
            if self._mask is None:
                raise InputError(f"{self.folder}: the model has no mask token, so no residue can be hidden from it.")
            ids[where[hidden]] = self._mask
        return Row(ids, np.concatenate(positions), where, None if wanted is None else np.asarray(wanted, np.int64))

    def read(
        self,
        rows: Sequence[Row],
        *,
        layers: Sequence[int] = (),
        log_probabilities: bool = False,
        toks_per_batch: int = 16_384,
    ) -> Iterator[tuple[int, Reading | Unread]]:
        """Read rows, in batches of at most so many tokens; a longer row has a batch to itself.

        Arguments:
            rows: what to read.
            layers: the layers to return, as `layer` numbers them.
            log_probabilities: whether to return log-probabilities.
            toks_per_batch: tokens in one forward pass, padding included.

        Returns:
            The index of each row and what became of it, in the order in which batches are done.
        """
        readable: list[int] = []
        for index, row in enumerate(rows):
            refusal = self.refusal(len(row))
            if refusal is None:
                readable.append(index)
            else:
                yield index, Unread(refusal)
        for batch in self._batches(rows, readable, toks_per_batch):
            yield from self._read_batch(rows, batch, tuple(layers), log_probabilities)

    def _batches(self, rows: Sequence[Row], indices: list[int], toks_per_batch: int) -> Iterator[list[int]]:
        """Rows of like length together, longest first."""
        batch: list[int] = []
        used = 0
        for index in sorted(indices, key=lambda i: -len(rows[i])):
            if batch:
                after = used + len(rows[index]) if self.is_performer else (len(batch) + 1) * len(rows[batch[0]])
                if after > toks_per_batch:
                    yield batch
                    batch, used = [], 0
            batch.append(index)
            used += len(rows[index])
        if batch:
            yield batch

    def _read_batch(
        self, rows: Sequence[Row], batch: list[int], layers: tuple[int, ...], log_probabilities: bool
    ) -> Iterator[tuple[int, Reading | Unread]]:
        readings = self._try([rows[index] for index in batch], layers, log_probabilities)
        for place, index in enumerate(batch):
            reading = readings if isinstance(readings, Unread) else readings[place]
            if isinstance(reading, Unread) and len(batch) > 1:  # it may be a batch mate's fault
                alone = self._try([rows[index]], layers, log_probabilities)
                reading = alone if isinstance(alone, Unread) else alone[0]
            yield index, reading

    def _try(
        self, rows: list[Row], layers: tuple[int, ...], log_probabilities: bool
    ) -> Sequence[Reading | Unread] | Unread:
        readings = self._unless_too_large(lambda: self._forward(rows, layers, log_probabilities), rows)
        if isinstance(readings, Unread):
            return readings
        return [
            reading if _is_finite(reading) else Unread("the model's numbers for it are not finite")
            for reading in readings
        ]

    def _unless_too_large(self, read: Callable[[], T], rows: Sequence[Row]) -> T | Unread:
        """What `read` makes of rows, unless it wants more memory than there is."""
        try:
            return read()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_want_of_memory(error):
                raise
            return Unread(f"there is not enough memory on {self.device} for {max(map(len, rows)):,} tokens")

    @torch.inference_mode()
    def _forward(self, rows: list[Row], layers: tuple[int, ...], log_probabilities: bool) -> list[Reading]:
        with autocast(self.device, self.dtype):
            output, slots = self._packed(rows, layers) if self.is_performer else self._padded(rows, layers)
        hidden = {
            layer: output.hidden_states[layer] if output.hidden_states is not None else output.last_hidden_state
            for layer in layers
        }
        return [
            Reading(
                {layer: states[slot].float() for layer, states in hidden.items()},
                self._log_probabilities(row, output, slot) if log_probabilities else None,
            )
            for row, slot in zip(rows, slots, strict=True)
        ]

    def _packed(self, rows: list[Row], layers: tuple[int, ...]) -> tuple[Any, list[Any]]:
        """The outputs of a Performer's body for rows end to end, and where in them each row is."""
        ends = np.cumsum([len(row) for row in rows])
        output = self._model.performer(
            **self._end_to_end(rows),
            output_hidden_states=any(layer != self.num_layers for layer in layers),
            context=self._context,
        )
        return output, [(0, slice(end - len(row), end)) for row, end in zip(rows, ends.tolist(), strict=True)]

    def _end_to_end(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows packed into one, as arguments of a Performer's body."""
        arguments: dict[str, Tensor] = {}
        # A single chain goes without offsets: then long sequences run through the layers a chunk at a time.
        if len(rows) > 1 or (rows[0].positions[1:] <= rows[0].positions[:-1]).any():
            positions = np.concatenate([row.positions for row in rows])
            ends = np.cumsum([len(row) for row in rows])
            arguments["position_ids"] = torch.from_numpy(positions)[None].to(self.device)
            arguments["cu_seqlens"] = torch.from_numpy(np.concatenate(([0], ends))).to(self.device)
        ids = torch.from_numpy(np.concatenate([row.ids for row in rows]))[None].to(self.device)
        return {"input_ids": ids, **arguments}

    def _padded(self, rows: list[Row], layers: tuple[int, ...]) -> tuple[Any, list[Any]]:
        """The outputs of another model for rows padded on the right, and where in them each row is."""
        width = max(map(len, rows))
        padding = self._model.config.pad_token_id or 0
        ids = torch.full((len(rows), width), padding, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.from_numpy(row.ids)
            mask[number, : len(row)] = 1
        arguments: dict[str, Any] = {"output_hidden_states": True} if layers else {}
        output = self._model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **arguments)
        return output, [(number, slice(0, len(row))) for number, row in enumerate(rows)]

    def _log_probabilities(self, row: Row, output: Any, slot: Any) -> npt.NDArray[np.float32]:
        tokens = row.residues if row.wanted is None else row.residues[row.wanted]
        # A causal model predicts a residue at the token before it; its start token stands before the first.
        where = torch.from_numpy(tokens - 1 if self.is_causal else tokens).to(self.device)
        if self.is_performer:
            hidden = output.last_hidden_state[slot][where]
            with autocast(self.device, self.dtype):
                logits = self._model.lm_head(hidden)
        else:
            logits = output.logits[slot][where]
        letters = torch.from_numpy(self._table).to(self.device)
        return torch.log_softmax(logits.float(), dim=-1)[:, letters].cpu().numpy()


def is_want_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def _is_finite(reading: Reading) -> bool:
    probabilities = reading.log_probabilities
    if probabilities is not None and not np.isfinite(probabilities).all():
        return False
    return all(bool(states.isfinite().all()) for states in reading.hidden.values())


def _residue_tokens(folder: Path) -> dict[str, Any]:
    """The token of every letter, and what encloses a protein, by the folder's own tokenizer.

    Raises:
        UnsupportedError: it does not give one token per residue.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    prefix, suffix = _enclosing(tokenizer, folder)
    for separator in ("", " "):
        expected = [*prefix, *(vocabulary.get(letter, -1) for letter in STANDARD_RESIDUES), *suffix]
        if list(tokenizer(separator.join(STANDARD_RESIDUES))["input_ids"]) == expected:
            break
    else:
        raise UnsupportedError(
            f"{folder}: its tokenizer does not give one token for each of {STANDARD_RESIDUES}; expected a protein model."
        )
    stand_in = vocabulary.get("X", tokenizer.unk_token_id)
    missing = [letter for letter in RESIDUES if letter not in vocabulary]
    if missing and stand_in is None:
        raise UnsupportedError(
            f"{folder}: its tokenizer has no token for {', '.join(missing)}, nor one for unknown ones."
        )
    as_what = "X" if "X" in vocabulary else tokenizer.unk_token
    return {
        "table": [vocabulary.get(letter, stand_in) for letter in RESIDUES],
        "prefix": prefix,
        "suffix": suffix,
        "mask": tokenizer.mask_token_id,
        "stand_ins": f"The model has no token for {', '.join(missing)}: they are read as {as_what}." if missing else "",
    }


def _enclosing(tokenizer: Any, folder: Path) -> tuple[list[int], list[int]]:
    """The tokens before and after a protein."""
    letter = tokenizer.convert_tokens_to_ids("A")
    ids = list(tokenizer("A")["input_ids"])
    if ids.count(letter) != 1:
        raise UnsupportedError(f"{folder}: its tokenizer does not give one token for the residue A.")
    place = ids.index(letter)
    return ids[:place], ids[place + 1 :]


def _position_limit(model: Any) -> int | None:
    """The most tokens that a learned table of positions holds; None where positions are computed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", "wpe")):
            # Families that count positions from behind the padding token lose the first rows.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    return None


def _trained_length(config: Any, folder: Path) -> int | None:
    """Tokens at a time in training: what the card of a head says, or the settings of the run in or above the folder, or the
    model's configuration."""
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
        return int(json.loads((folder / "head.json").read_text(encoding="utf-8"))["trained_length"])
    for parent in (folder, folder.parent, folder.parent.parent):
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            return int(yaml.safe_load((parent / "config.yaml").read_text(encoding="utf-8"))["context"])
    return getattr(config, "max_position_embeddings", None)
