"""Proteins as token ids: text in, ids between <bos> and <eos> out, one token per residue.

The ids are those of `performers.data.alphabet`. Letters of either case are taken and white space is ignored; anything else is
refused, never turned into X. The saved `tokenizer.json` works without this package as well (and refuses what it does not
know, in the words of the tokenizers library).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import AutoTokenizer

from performers.data.alphabet import (
    BOS,
    ENCODING_TABLE,
    EOS,
    INVALID,
    RESIDUES,
    SPECIAL_TOKENS,
    VOCABULARY,
    expected_residues,
)
from performers.errors import InputError
from performers.models.bundled import located, take_names
from performers.models.configuration_performer import PerformerConfig

_ROLES = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), SPECIAL_TOKENS, strict=True))
_LETTERS = rf"[{RESIDUES}{RESIDUES.lower()}\s]"
_PROTEIN = re.compile(rf"{_LETTERS}*+", re.ASCII)
_TEXT = re.compile(rf"(?:{_LETTERS}|{'|'.join(SPECIAL_TOKENS)})*+", re.ASCII)
_WHITE_SPACE = b" \t\n\r\f\v"  # what \s is in ASCII


class PerformerTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of the residue alphabet.

    `tokenizer("MKT")` gives the ids of <bos> M K T <eos>; "<mask>" in the text is one token.

    Arguments:
        add_eos: whether <eos> closes a protein. A causal model's tokenizer does without, so that a prompt can be continued, and
            pads on the left, unless `padding_side` says otherwise.
        kwargs: those of every Hugging Face tokenizer.

    Raises:
        InputError: when called with text that holds anything but residues, special tokens and white space; names the first
            such character and its position, counted from 1.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (the base class's attribute is a list)

    def __init__(self, add_eos: bool | None = None, **kwargs: Any) -> None:
        saved = kwargs.pop("post_processor", None)  # what from_pretrained found in tokenizer.json
        if add_eos is None:
            add_eos = saved is None or saved.num_special_tokens_to_add(False) == 2
        kwargs.setdefault("padding_side", "right" if add_eos else "left")
        kwargs.pop("tokenizer_file", None)
        kwargs.pop("vocab", None)
        kwargs.pop("tokenizer_object", None)
        super().__init__(tokenizer_object=_backend(), add_bos_token=True, add_eos_token=add_eos, **{**kwargs, **_ROLES})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **kwargs: Any) -> Any:
        """As Hugging Face's, and by the name of a bundled model."""
        return super().from_pretrained(located(pretrained_model_name_or_path), *arguments, **kwargs)

    def encode_bulk(
        self, sequences: Sequence[str], add_special_tokens: bool = True
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The ids of many proteins in one flat array; some hundred times faster than calling the tokenizer.

        Arguments:
            sequences: N proteins, of residues and white space only.
            add_special_tokens: whether <bos> and, if this tokenizer adds it, <eos> enclose each protein.

        Returns:
            The ids, of shape (T,), and the offsets, of shape (N + 1,): protein i is ids[offsets[i] : offsets[i + 1]]. The
            offsets are the `cu_seqlens` of a packed batch.

        Raises:
            InputError: names the protein (counted from 1), the character and its position.
        """
        encoded = [s.encode("ascii", "replace").translate(ENCODING_TABLE, _WHITE_SPACE) for s in sequences]
        residues = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        if (residues == INVALID).any():
            first = next(i for i, ids in enumerate(encoded) if INVALID in ids)
            _refuse_what_follows(_PROTEIN, sequences[first], f"Protein {first + 1}: ")
        add_bos, add_eos = add_special_tokens, add_special_tokens and self.add_eos_token
        offsets = np.concatenate(([0], np.cumsum(lengths + add_bos + add_eos)))
        ids = np.empty(offsets[-1], dtype=np.uint8)
        is_residue = np.ones(len(ids), dtype=bool)
        for added, token, positions in ((add_bos, BOS, offsets[:-1]), (add_eos, EOS, offsets[1:] - 1)):
            if added:
                ids[positions] = token
                is_residue[positions] = False
        ids[is_residue] = residues
        return ids, offsets

    # Every way to call a tokenizer comes through here; its many other arguments are passed on.
    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for string in (*_strings(text), *_strings(text_pair)):
            _refuse_what_follows(_TEXT, string)
        return super()._encode_plus(text, text_pair=text_pair, **kwargs)


def _backend() -> Tokenizer:
    """One token per character; WordLevel without an unknown token refuses characters outside the vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    upper_case = [normalizers.Replace(letter.lower(), letter) for letter in RESIDUES]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s"), ""), *upper_case])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _strings(text: Any) -> Iterator[str]:
    """The strings in whatever a tokenizer is called with: a string, or nested lists and tuples of strings."""
    if isinstance(text, str):
        yield text
    elif isinstance(text, list | tuple):
        for part in text:
            yield from _strings(part)


def _refuse_what_follows(readable: re.Pattern[str], text: str, where: str = "") -> None:
    match = readable.match(text)
    assert match is not None  # the patterns match the empty string
    end = match.end()
    if end < len(text):
        raise InputError(
            f"{where}{text[end]!r} at position {end + 1} is not a residue; expected {expected_residues()}."
        )


AutoTokenizer.register(PerformerConfig, PerformerTokenizer, exist_ok=True)
take_names(AutoTokenizer)
