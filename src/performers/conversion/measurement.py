"""What a model computes on a handful of sequences, laid open layer by layer, so that a converted model can be held against it.

Sequences come in as strings or token ids and become one padded batch; out come the calls of every attention module, the hidden
states by depth and the logits. Errors are relative: the Frobenius norm of the difference, over that of the exact one, of real
tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.conversion import interface
from performers.conversion.interface import Call
from performers.errors import InputError
from performers.randomness import derive_seed

Inputs: TypeAlias = dict[str, Tensor]
Sequence_: TypeAlias = "str | Sequence[int] | Tensor"

# A vocabulary of single residues reads a protein as one unknown word, unless they are set apart.
_MOST_UNKNOWN = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a model computed.

    Attributes:
        calls: of every attention module, by its number, in order.
        hidden: the hidden states before and after every layer, (B, L, D) each; of an encoder-decoder both, one after the other.
        logits: (B, L, V) or (B, V); None if the model has none.
        real: (B, L) bool, the real tokens; None if all are.
    """

    calls: dict[int, list[Call]]
    hidden: list[Tensor]
    logits: Tensor | None
    real: Tensor | None


@torch.no_grad()
def outcome(model: PreTrainedModel, inputs: Inputs, *, keep_calls: bool = False) -> Outcome:
    """Runs a model whose attention is ours, in evaluation mode.

    Arguments:
        model: a converted model.
        inputs: a batch, as `batch_of` makes it.
        keep_calls: keep what goes into every attention module and what comes out.
    """
    calls: dict[int, list[Call]] = {}

    def keep(call: Call) -> None:
        if keep_calls:
            calls.setdefault(call.number, []).append(call)

    was_training = model.training
    try:
        with interface.listening(keep):
            out: Any = model.eval()(**inputs, output_hidden_states=True)
    finally:
        model.train(was_training)
    names = ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")
    hidden = [state for name in names for state in getattr(out, name, None) or ()]
    mask = inputs.get("attention_mask")
    return Outcome(calls, hidden, getattr(out, "logits", None), None if mask is None else mask.bool())


def relative_error(estimate: Tensor, exact: Tensor, real: Tensor | None = None) -> float:
    """|estimate - exact| / |exact|; of tensors (B, L, ...) over the tokens that are `real`, (B, L)."""
    if real is not None and exact.shape[:2] == real.shape:
        estimate, exact = estimate[real], exact[real]
    exact = exact.double()
    return ((estimate.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def call_error(estimates: Iterable[Tensor], calls: Sequence[Call]) -> float:
    """The relative error of attention outputs, (B, H, L, Dv), over all calls of a module."""
    pairs = [(real_rows(out, call), real_rows(call.out, call)) for out, call in zip(estimates, calls, strict=True)]
    return relative_error(torch.cat([estimate for estimate, _ in pairs]), torch.cat([exact for _, exact in pairs]))


def real_rows(x: Tensor, call: Call) -> Tensor:
    """(B, H, L, D) as (tokens, H, D), without padding where the queries are the tokens of the mask."""
    mask: Tensor | None = call.arguments.get("key_padding_mask")
    x = x.transpose(1, 2)
    return x.flatten(0, 1) if mask is None or mask.shape != x.shape[:2] else x[mask]


def token_ids(
    model: PreTrainedModel, sequences: Iterable[Sequence_], tokenizer: Any = None, *, at_most: int | None = None
) -> list[Tensor]:
    """The sequences as token ids, checked.

    Arguments:
        model: whose vocabulary and positions have to hold them.
        sequences: strings, or token ids with the special tokens that the model expects.
        tokenizer: for strings; None takes the one in the model's folder.
        at_most: the longest sequence that the model can read, None for any; see `longest_input`.

    Raises:
        InputError: none at all, one that is empty or too long, an id outside the vocabulary, or strings without a tokenizer that
            knows them.
    """
    if isinstance(sequences, str):
        raise InputError("sequences is one string: expected a list of strings, or of token ids.")
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{type(model).__name__} reads {model.main_input_name}, not sequences: nothing can be measured on them."
        )
    found: list[Tensor] = []
    vocabulary = model.config.get_text_config().vocab_size
    for number, sequence in enumerate(sequences, start=1):
        if not len(sequence):
            raise InputError(f"sequence {number} is empty.")
        if isinstance(sequence, str):
            tokenizer = tokenizer or _tokenizer_of(model)
            ids = _encoded(tokenizer, sequence, number)
        else:
            ids = torch.as_tensor(sequence)
            if ids.ndim != 1 or ids.is_floating_point():
                raise InputError(f"sequence {number} is of shape {tuple(ids.shape)}: expected a list of token ids.")
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(
                f"sequence {number} has token ids from {int(ids.min())} to {int(ids.max())}, but the model has {vocabulary}."
            )
        if at_most is not None and len(ids) > at_most:
            raise InputError(
                f"sequence {number} has {len(ids):,} tokens, but {type(model).__name__} has learned {at_most:,} positions: give "
                f"shorter sequences, or parts of them."
            )
        found.append(ids.long())
    if not found:
        raise InputError("there is no sequence to measure with.")
    return found


def _tokenizer_of(model: PreTrainedModel) -> Any:
    folder = model.name_or_path
    try:
        if folder:
            return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        pass
    where = f"{folder} has none" if folder else "the model was not opened from a folder"
    raise InputError(f"Sequences are strings, which need a tokenizer, but {where}: give one, or token ids.")


def _encoded(tokenizer: Any, text: str, number: int) -> Tensor:
    unknown = getattr(tokenizer, "unk_token_id", None)
    for attempt in (text, " ".join(text)):
        ids = torch.tensor(tokenizer(attempt)["input_ids"], dtype=torch.long)
        plain = torch.tensor(tokenizer(attempt, add_special_tokens=False)["input_ids"])
        if unknown is None or not len(plain) or (plain == unknown).double().mean() <= _MOST_UNKNOWN:
            return ids
    raise InputError(f"sequence {number}: the model's tokenizer does not know most of it: {text[:30]!r}.")


def batch_of(model: PreTrainedModel, sequences: Sequence[Tensor]) -> Inputs:
    """One batch of sequences of token ids, padded on the right; an encoder-decoder reads them on both sides."""
    config = model.config.get_text_config()
    padding = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=padding).to(model.device)
    inputs = {"input_ids": ids}
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    if not real.all():
        inputs["attention_mask"] = real.long()
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
        if "attention_mask" in inputs:
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def halves(sequences: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Sequences to fit to, and others to judge on; of one alone there is no other."""
    return (sequences, sequences) if len(sequences) == 1 else (sequences[::2], sequences[1::2])


def random_ids(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """Token ids without meaning, for where only the time that a model takes counts, or there is nothing better."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "token ids", length))
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(min(4, vocabulary - 1), vocabulary, (length,), generator=generator)


@torch.no_grad()
def longest_input(model: PreTrainedModel) -> int | None:
    """How many tokens a model has learned positions for; None if it has none, as with rotary ones, which go on for ever."""
    found: list[int] = []

    def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Embedding)
        # Some families put the first token at position 2: what lies before is for padding.
        first = getattr(module, "offset", None)
        if first is None:
            first = int(arguments[0].min()) if arguments and torch.is_tensor(arguments[0]) else 0
        found.append(module.num_embeddings - first)

    embeddings = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
    ]
    handles = [module.register_forward_pre_hook(see) for module in embeddings]
    was_training = model.training
    try:
        if embeddings:
            model.eval()(**batch_of(model, [random_ids(model, 8, 0)]))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return min(found, default=None)
