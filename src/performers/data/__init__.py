"""From FASTA to contexts of tokens, for any length.

`read_fasta` is the one door for sequences; `build_corpus` writes them once as a flat, memory-mapped array of residue ids;
`Contexts` cuts that into rows of any length, and `mask_tokens` or `next_token_labels` turn rows into training examples.
`split_records` makes training, validation and test sets that do not leak. Rows and masks are pure functions of a seed and a
step, so there is no iterator state anywhere. Everything here is numpy: no torch, no transformers.
"""

from performers.data.alphabet import (
    BOS,
    EOS,
    FIRST_RESIDUE,
    MASK,
    PAD,
    RESIDUES,
    SPECIAL_TOKENS,
    STANDARD_RESIDUES,
    UNKNOWN,
    VOCAB_SIZE,
    VOCABULARY,
    decode,
    encode,
)
from performers.data.contexts import ContextBatch, Contexts
from performers.data.corpus import Corpus, in_memory_corpus
from performers.data.corpus_building import build_corpus, is_corpus_of
from performers.data.fasta import BUNDLED, MAX_LENGTH, FastaReport, InputFile, Record, read_fasta
from performers.data.objectives import IGNORED, mask_tokens, next_token_labels
from performers.data.splits import SplitResult, split_records

__all__ = [
    "BOS",
    "BUNDLED",
    "EOS",
    "FIRST_RESIDUE",
    "IGNORED",
    "MASK",
    "MAX_LENGTH",
    "PAD",
    "RESIDUES",
    "SPECIAL_TOKENS",
    "STANDARD_RESIDUES",
    "UNKNOWN",
    "VOCABULARY",
    "VOCAB_SIZE",
    "ContextBatch",
    "Contexts",
    "Corpus",
    "FastaReport",
    "InputFile",
    "Record",
    "SplitResult",
    "build_corpus",
    "decode",
    "encode",
    "in_memory_corpus",
    "is_corpus_of",
    "mask_tokens",
    "next_token_labels",
    "read_fasta",
    "split_records",
]
