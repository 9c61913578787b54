"""What `score` says of itself in a methods section, made from what was done; and whom to cite for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from performers import __version__
from performers.tools.language_model import LanguageModel

_HOW = {
    "masked-marginals": "log-odds of the new against the old residue, masked in the wild type, summed over the substitutions",
    "wt-marginals": "log-odds of the new against the old residue given the wild type, summed over the substitutions",
    "pseudo-ppl": "mean pseudo-log-likelihood per residue of the mutated sequence minus that of the wild type, times the "
    "length of the wild type",
    "likelihood": "mean log-likelihood per residue of the mutated sequence minus that of the wild type, times the length "
    "of the wild type",
}
_OF_MEIER = ("masked-marginals", "wt-marginals", "pseudo-ppl")

MEIER = """\
@inproceedings{meier2021language,
  title     = {Language models enable zero-shot prediction of the effects of mutations on protein function},
  author    = {Meier, Joshua and Rao, Roshan and Verkuil, Robert and Liu, Jason and Sercu, Tom and Rives, Alexander},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {34},
  year      = {2021}
}
"""


def references(strategies: Sequence[str]) -> str:
    """The BibTeX of the papers that the methods text names."""
    return MEIER if set(strategies) & set(_OF_MEIER) else ""


def methods(model: LanguageModel, strategies: Sequence[str], stripes: int, figures: dict[str, Any]) -> str:
    """Two sentences.

    Arguments:
        model: what read.
        strategies: those that were used, each once.
        stripes: passes over a protein that was masked in stripes.
        figures: of the run: "statuses", "proteins" in all, how many of them were "masked", and of these in stripes ("striped"),
            and whether there are "percentiles".
    """
    scored = figures["statuses"].get("ok", 0) + figures["statuses"].get("synonymous", 0)
    how = "; ".join(
        f"{name} ({_HOW[name]}{'; Meier et al., 2021' if name in _OF_MEIER else ''})" for name in strategies
    )
    scale = ", and percentiles are among all single substitutions of the same protein" if figures["percentiles"] else ""
    return (
        f"{scored:,} protein variants were scored with performers {__version__} and the protein language model {model.name} "
        f"({model.num_parameters:,} parameters) by {how}. "
        f"Every sequence was read {model.company()}, {_masking(stripes, figures)}{scale}; not for clinical use."
    )


def _masking(stripes: int, figures: dict[str, Any]) -> str:
    masked, striped = figures["masked"], figures["striped"]
    if not masked:
        return "nothing being masked"
    in_stripes = f"masked in {stripes} stripes (j, j + {stripes}, j + {2 * stripes} and so on at a time)"
    if striped == masked:
        return f"its residues being {in_stripes}"
    alone = "each residue being masked by itself"
    return f"{alone}, but those of {striped:,} of {masked:,} proteins {in_stripes}" if striped else alone
