"""Tools: proteins in, answers out. Each is a Python function (records to an iterator of results) and a thin command.

What a new tool finds here, from the bottom up:

- `tables.read_table`: CSV, TSV and parquet, row by row.
- `proteins.read_proteins`: the one door for proteins, whatever the format, as `Protein`s whose `chains` may be several.
- `language_model.LanguageModel`: any model. `row(chains, masked=, wanted=)` makes what is read at a time, `read(rows, layers=,
  log_probabilities=)` reads rows in batches of `toks_per_batch` tokens and gives, per row, a `Reading` or an `Unread` with the
  reason. A row's numbers do not depend on its batch mates. Residue i of row r is `reading.hidden[layer][row.residues[i]]`.
- `tool.Tool`: what a tool says of itself: its items, how to write one as JSON, what it costs, `compute(items)`, `write(results)`,
  `methods(outcome)`. An item is the unit that is saved, resumed and may fail: a protein for `embed`, a block of masked positions
  for `score`. `compute` must give each item the same result whatever the others are: leave batching to `LanguageModel.read`.
- `tool.results_of`: a tool in memory, for the Python function; `jobs.run_tool`: for the command, with the plan and estimate,
  the disk check, shards, resuming, `failed.tsv`, `methods.txt`, `run.json` and `cite.bibtex`. A result is a dictionary of numpy
  arrays; whatever is not one (a picture, a table) is made of them in `write`.
- `embedding_files.Names` and `hdf5_key`: names for identifiers that may repeat or hold anything.

A command hands `Outcome` to `cli.tools`, which prints it and turns failed items into exit status 3. No module here may bear the
name of a public function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from performers.tools.embedding import Embedding, embed, embed_to
    from performers.tools.language_model import LanguageModel
    from performers.tools.proteins import Protein, read_proteins
    from performers.tools.scorer import Score
    from performers.tools.scoring import score, score_to

_HOME = {
    "Embedding": "embedding",
    "LanguageModel": "language_model",
    "Protein": "proteins",
    "Score": "scorer",
    "embed": "embedding",
    "embed_to": "embedding",
    "read_proteins": "proteins",
    "score": "scoring",
    "score_to": "scoring",
}

__all__ = ["Embedding", "LanguageModel", "Protein", "Score", "embed", "embed_to", "read_proteins", "score", "score_to"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'performers.tools' has no attribute {name!r}")
    return getattr(importlib.import_module(f"performers.tools.{_HOME[name]}"), name)
