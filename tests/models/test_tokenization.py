from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from performers import PerformerConfig, PerformerTokenizer
from performers.data.alphabet import VOCABULARY
from performers.errors import InputError

from .conftest import PROTEINS


def test_residues_stand_between_bos_and_eos(tokenizer: PerformerTokenizer) -> None:
    assert tokenizer("MKT")["input_ids"] == [1, 14, 12, 20, 2]
    assert tokenizer.convert_ids_to_tokens([1, 14, 12, 20, 2]) == ["<bos>", "M", "K", "T", "<eos>"]
    assert tokenizer.decode([1, 14, 12, 20, 2], skip_special_tokens=True) == "MKT"


def test_the_vocabulary_is_the_alphabet(tokenizer: PerformerTokenizer) -> None:
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}
    assert len(tokenizer) == tokenizer.vocab_size == PerformerConfig().vocab_size


def test_lower_case_and_white_space_make_no_difference(tokenizer: PerformerTokenizer) -> None:
    assert tokenizer("mk\nt ")["input_ids"] == tokenizer("MKT")["input_ids"]


def test_mask_in_the_text_is_one_token(tokenizer: PerformerTokenizer) -> None:
    assert tokenizer("M<mask>T")["input_ids"] == [1, 14, 3, 20, 2]


@pytest.mark.parametrize("text", ["MKJ", "MK*", "MK1", "MK-A", "MKé", "MK\0", "MK<unk>", "MK\u00a0", "MK\u017f"])
def test_anything_else_is_refused_with_its_position(text: str, tokenizer: PerformerTokenizer) -> None:
    for call in (tokenizer, tokenizer.tokenize, tokenizer.encode, lambda text: tokenizer(["MKT", text], padding=True)):
        with pytest.raises(
            InputError, match="at position 3 is not a residue; expected one of ACDEFGHIKLMNPQRSTVWY or B, O"
        ):
            call(text)
    with pytest.raises(InputError, match=r"Protein 2: .* at position 3 is not a residue"):
        tokenizer.encode_bulk(["MKT", text])


def test_a_batch_is_padded_on_the_right_and_for_prompts_on_the_left(tokenizer: PerformerTokenizer) -> None:
    assert tokenizer(["MK", "M"], padding=True)["input_ids"] == [[1, 14, 12, 2], [1, 14, 2, 0]]
    prompts = PerformerTokenizer(add_eos=False)(["MK", "M"], padding=True)
    assert prompts["input_ids"] == [[1, 14, 12], [0, 1, 14]]
    assert prompts["attention_mask"] == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("opener", [AutoTokenizer, PreTrainedTokenizerFast, PerformerTokenizer])
def test_a_saved_tokenizer_comes_back_the_same(add_eos: bool, opener: type, tmp_path: Path) -> None:
    tokenizer = PerformerTokenizer(add_eos=add_eos)
    tokenizer.save_pretrained(tmp_path)
    PerformerConfig().save_pretrained(tmp_path)
    loaded = opener.from_pretrained(tmp_path)
    texts = [*PROTEINS, "m<mask>t "]
    assert loaded(texts, padding=True) == tokenizer(texts, padding=True)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 1, 2, 3)
    if opener is AutoTokenizer:
        assert type(loaded) is PerformerTokenizer


def test_an_option_given_at_loading_wins_over_the_saved_one(tmp_path: Path) -> None:
    PerformerTokenizer(add_eos=False).save_pretrained(tmp_path)
    assert PerformerTokenizer.from_pretrained(tmp_path, add_eos=True)("M")["input_ids"] == [1, 14, 2]


def test_the_stock_class_refuses_what_is_no_residue_as_well(tmp_path: Path) -> None:
    PerformerTokenizer().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="vocabulary"):
        PreTrainedTokenizerFast.from_pretrained(tmp_path)("MKJ")


@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_the_bulk_path_gives_the_same_ids(add_eos: bool, add_special_tokens: bool) -> None:
    tokenizer = PerformerTokenizer(add_eos=add_eos)
    texts = [*PROTEINS, "", "m k"]
    ids, offsets = tokenizer.encode_bulk(texts, add_special_tokens=add_special_tokens)
    assert (ids.dtype, offsets.dtype) == (np.uint8, np.int64)
    expected = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected


def test_the_bulk_path_takes_no_proteins_at_all(tokenizer: PerformerTokenizer) -> None:
    ids, offsets = tokenizer.encode_bulk([])
    assert (ids.tolist(), offsets.tolist()) == ([], [0])
