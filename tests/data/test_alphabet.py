from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from performers.data import (
    BOS,
    EOS,
    MASK,
    PAD,
    RESIDUES,
    STANDARD_RESIDUES,
    VOCAB_SIZE,
    VOCABULARY,
    decode,
    encode,
)
from performers.errors import InputError


def test_the_ids_are_those_of_every_checkpoint_ever_written() -> None:
    assert (PAD, BOS, EOS, MASK) == (0, 1, 2, 3)
    assert list(VOCABULARY) == ["<pad>", "<bos>", "<eos>", "<mask>", *"ACDEFGHIKLMNPQRSTVWYBOUXZ"]
    assert VOCAB_SIZE == 29
    assert encode(RESIDUES).tolist() == list(range(4, 29))
    assert len(STANDARD_RESIDUES) == 20


@settings(deadline=None)
@given(st.text(alphabet=RESIDUES))
def test_decoding_undoes_encoding(sequence: str) -> None:
    ids = encode(sequence)
    assert ids.dtype == np.uint8
    assert decode(ids) == sequence
    assert decode(ids.astype(np.int64)) == sequence


def test_both_cases_and_bytes_are_alike() -> None:
    assert encode("mkT").tolist() == encode("MKT").tolist() == encode(b"MKT").tolist()


@pytest.mark.parametrize("letter", ["*", "-", ".", "J", "1", " ", "\0", "é", "\u017f", "\u0131", "蛋", "\n"])
def test_a_character_that_is_no_residue_is_named_with_its_position(letter: str) -> None:
    with pytest.raises(InputError, match="position 3 is not a residue") as caught:
        encode("MK" + letter + "A")
    assert repr(letter) in str(caught.value)


@pytest.mark.parametrize("token", [0, 3, 29, 255])
def test_special_tokens_are_not_decoded(token: int) -> None:
    with pytest.raises(InputError, match=f"Token {token} at position 2"):
        decode([4, token])


def test_importing_the_data_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "pymmseqs", "pandas", "needletail")
    code = f"import sys, performers.data; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
