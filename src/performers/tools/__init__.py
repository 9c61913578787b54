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
    from performers.tools.contact_prediction import Contacts, contacts, contacts_to
    from performers.tools.context_states import ContextState, read_context
    from performers.tools.designs import Design
    from performers.tools.embedding import Embedding, embed, embed_to
    from performers.tools.finetuning import FinetuneResult, finetune
    from performers.tools.generation import generate, generate_to
    from performers.tools.language_model import LanguageModel
    from performers.tools.prediction import Prediction, predict, predict_to
    from performers.tools.proteins import Protein, read_proteins
    from performers.tools.reporting import report
    from performers.tools.scorer import Score
    from performers.tools.scoring import score, score_to

_HOME = {
    "ContextState": "context_states",
    "Contacts": "contact_prediction",
    "Design": "designs",
    "Embedding": "embedding",
    "FinetuneResult": "finetuning",
    "LanguageModel": "language_model",
    "Prediction": "prediction",
    "Protein": "proteins",
    "Score": "scorer",
    "contacts": "contact_prediction",
    "contacts_to": "contact_prediction",
    "embed": "embedding",
    "embed_to": "embedding",
    "finetune": "finetuning",
    "generate": "generation",
    "generate_to": "generation",
    "predict": "prediction",
    "predict_to": "prediction",
    "read_context": "context_states",
    "read_proteins": "proteins",
    "report": "reporting",
    "score": "scoring",
    "score_to": "scoring",
}

__all__ = [
    "Contacts",
    "ContextState",
    "Design",
    "Embedding",
    "FinetuneResult",
    "LanguageModel",
    "Prediction",
    "Protein",
    "Score",
    "contacts",
    "contacts_to",
    "embed",
    "embed_to",
    "finetune",
    "generate",
    "generate_to",
    "predict",
    "predict_to",
    "read_context",
    "read_proteins",
    "report",
    "score",
    "score_to",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'performers.tools' has no attribute {name!r}")
    return getattr(importlib.import_module(f"performers.tools.{_HOME[name]}"), name)
