"""The card of a bundled model: the records of its training and of its evaluation in, Markdown with a YAML front matter out.

Every figure in it is read from a record; nothing is measured here. `bundle_models.py` collects the records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import yaml

SOURCE = "https://www.uniprot.org"
REPOSITORY_SCRIPTS = "`scripts/prepare_pretraining.py`"

ROWS = {
    "random": "random: drawn from the same proteins as training, which has relatives of them",
    "test": "clusters: no training protein of their cluster, nor one at 50 % identity or more",
    "ood": "families: besides, no training protein of their Pfam families",
}


@dataclass(frozen=True)
class Part:
    """One run; a training may have several, each of which begins with the weights that the one before left.

    Attributes:
        settings: its config.yaml.
        run: its run.json.
        step, tokens: how far it came.
        log: the lines of its log, up to there.
    """

    settings: dict[str, Any]
    run: dict[str, Any]
    step: int
    tokens: int
    log: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return sum(session.get("seconds", 0) for session in self.run["sessions"])


@dataclass(frozen=True)
class Records:
    """What a card is made of.

    Attributes:
        name: the model's.
        parts: of its training.
        architecture: the model's config.json.
        evaluation: what `evaluate_folder` gave for the held-out sets; under "exact" what it gave for the exact Transformer,
            with the seconds that its training took (None if no run of it was given) and what else is to be said of it ("but").
        corpus: the corpus.json of the proteins it was trained on.
        num_bytes: of the weights.
        hardware: in words; None for what run.json says.
    """

    name: str
    parts: list[Part]
    architecture: dict[str, Any]
    evaluation: dict[str, Any]
    corpus: dict[str, Any]
    num_bytes: int
    hardware: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the last part."""
        return self.parts[-1].settings

    @property
    def log(self) -> list[dict[str, Any]]:
        """All parts one after the other, as if they were one."""
        lines: list[dict[str, Any]] = []
        step = tokens = 0
        for part in self.parts:
            for line in part.log:
                # An evaluation's tokens are those that were scored.
                read = {} if "evaluation" in line else {"tokens": line["tokens"] + tokens}
                lines.append({**line, **read, "step": line["step"] + step})
            step, tokens = step + part.step, tokens + part.tokens
        return lines

    @property
    def seconds(self) -> float:
        """How long all parts took."""
        return sum(part.seconds for part in self.parts)

    @property
    def is_causal(self) -> bool:
        """Whether it predicts the next residue."""
        return self.settings["objective"] == "clm"

    @property
    def parameters(self) -> str:
        """In millions."""
        return f"{self.evaluation['parameters'] / 1e6:.1f} M"


def model_card(records: Records) -> str:
    """The whole card."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(records), sort_keys=False, allow_unicode=True, width=120)}---\n",
        f"# {records.name}\n\n{_summary(records)}",
        _use(records),
        _figures(records),
        _data(records),
        _training(records),
        _purpose(records),
        _DUAL_USE,
        _LICENCE,
    ]
    return "\n".join(parts)


def _front_matter(records: Records) -> dict[str, Any]:
    task = "text-generation" if records.is_causal else "fill-mask"
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": f"bundled:{name}", "type": "performers"},
            "metrics": [
                {"type": "accuracy", "value": round(figures["accuracy"], 4)},
                {"type": "perplexity", "value": round(figures["perplexity"], 3)},
            ],
        }
        for name, figures in records.evaluation["sets"].items()
    ]
    return {
        "license": "apache-2.0",
        "library_name": "performers",
        "pipeline_tag": task,
        "tags": ["biology", "protein", "protein-language-model", "performer", "linear-attention"],
        "model-index": [{"name": records.name, "results": results}],
    }


def _summary(records: Records) -> str:
    what = "next residue of a protein from those before it" if records.is_causal else "hidden residues of a protein"
    return f"""\
A Performer of {records.parameters} parameters that predicts the {what}. Its attention is linear in the length, so it reads
proteins of any length; it comes with the Python package `performers` and opens without a network. It is small, made to be useful
at once on a laptop: the figures below say how far it can be trusted, and the package's recipes train bigger ones.
"""


def _use(records: Records) -> str:
    if records.is_causal:
        code = f"""\
from performers import PerformerForCausalLM, PerformerTokenizer

model = PerformerForCausalLM.from_pretrained("{records.name}")
tokenizer = PerformerTokenizer.from_pretrained("{records.name}")
prompt = tokenizer("MKTAYIAKQR", return_tensors="pt")
out = model.generate(**prompt, max_new_tokens=40, do_sample=True, top_p=0.95)
print(tokenizer.decode(out[0], skip_special_tokens=True))"""
        command = f"performers evaluate --model {records.name}"
    else:
        code = f"""\
from performers import PerformerForMaskedLM, PerformerTokenizer

model = PerformerForMaskedLM.from_pretrained("{records.name}")
tokenizer = PerformerTokenizer.from_pretrained("{records.name}")
inputs = tokenizer("MKTAYIA<mask>QRQISFVK", return_tensors="pt")
print(model(**inputs).logits[0, 8].topk(3))"""
        command = f"performers embed --model {records.name} -i proteins.fasta -o embeddings.npz"
    return f"## Use\n\n```python\n{code}\n```\n\n```bash\n{command}\n```\n"


def _figures(records: Records) -> str:
    evaluation = records.evaluation
    exact = evaluation.get("exact")
    header = [
        "held out",
        "proteins",
        "residues scored",
        "accuracy",
        "perplexity",
        "unigram accuracy",
        "unigram perplexity",
    ]
    if exact is not None:
        header += ["exact Transformer: accuracy", "perplexity"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, figures in evaluation["sets"].items():
        row = [
            ROWS[name],
            f"{figures['proteins']:,}",
            f"{figures['tokens']:,}",
            f"**{_with_interval(figures, 'accuracy')}**",
            _with_interval(figures, "perplexity"),
            f"{figures['baseline_accuracy']:.2%}",
            f"{figures['baseline_perplexity']:.2f}",
        ]
        if exact is not None:
            row += [_with_interval(exact["sets"][name], key) for key in ("accuracy", "perplexity")]
        rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    scored = (
        "Every residue is predicted from those before it."
        if records.is_causal
        else "15 % of the residues are chosen, all of them are hidden as [MASK], and only they are scored: figures under BERT's\n"
        "80/10/10, where a tenth of the chosen is left to be seen, are higher and cannot be compared."
    )
    again = (
        "prints the table again."
        if exact is None
        else "prints the figures of the model and the unigram baseline again;\n"
        "those of the exact Transformer are what it printed for that model, whose weights are not bundled."
    )
    measured = f"Measured with performers {evaluation['version']} on {evaluation['device']} in {evaluation['dtype']}"
    return f"""\
## Figures

<!-- figures -->
{table}

{scored} In brackets 95 % bootstrap intervals over proteins. The unigram baseline knows the frequencies of the very residues that
are scored: it is the best that a model can do that ignores the context. {_beside(records)}

{measured}, of the weights as they are bundled;
`performers evaluate --model {records.name}` {again}
<!-- /figures -->
"""


def _beside(records: Records) -> str:
    """What stands beside the model in the table, and how fair that is."""
    exact = records.evaluation.get("exact")
    if exact is None:
        return "No exact Transformer was trained to compare it with."
    alike, time = "trained alike", ""
    if exact["seconds"] is not None:
        alike = "trained with the same settings for as many steps and tokens"
        where = f", on {records.hardware}" if records.hardware else ""
        time = f" Time was not equal: it took {_hours(exact['seconds'])}, this model {_hours(records.seconds)}{where}."
    return (
        f"The exact Transformer is this model with exact attention ({exact['parameters']:,} parameters), {alike}."
        f"{' ' + exact['but'] if exact['but'] else ''}{time} Where intervals overlap, the order is undecided."
    )


def _data(records: Records) -> str:
    corpus = records.corpus
    return f"""\
## Data

UniProtKB/Swiss-Prot, release 2014_01, (c) the [UniProt Consortium]({SOURCE}), CC BY 4.0: {corpus["proteins"]:,} proteins,
{corpus["residues"]:,} residues. Headers were cut to the accession. Families are domains of Pfam 35.0 (CC0 1.0) found with
HMMER at the gathering thresholds; they decided what was held out, and training has not seen them.

What was held out, by {REPOSITORY_SCRIPTS}: identical sequences, proteins under 30 residues and those with more than 1 % unknown
residues were removed first. Then everything went that is in a cluster (MMseqs2, 50 % identity) with a member in the package's
validation, test or ood set, every protein with a Pfam family of the ood set and its cluster mates, and every protein that
aligns with a protein of these sets at 50 % identity or more over 80 % of it. `bundled:random` was drawn from the rest and held
out as well. Only about a fifth of the proteins have a Pfam domain in these labels: a protein without one may belong to a
held-out family that was not recognised. The identity criterion holds for all.
"""


def _training(records: Records) -> str:
    architecture, settings = records.architecture, records.settings
    attention = architecture["attention"]
    names = attention if isinstance(attention, str) else ", ".join(attention)
    arguments = ", ".join(f"{key} {value}" for key, value in architecture["attention_kwargs"].items())
    session = records.parts[-1].run["sessions"][-1]
    tokens = sum(part.tokens for part in records.parts)
    epochs = tokens / (records.corpus["residues"] + 2 * records.corpus["proteins"])
    threads = settings.get("threads")
    device = session["device"] + (
        f", {threads} threads" if threads and threads > 1 else ", 1 thread" if threads else ""
    )
    objective = (
        "next residue" if records.is_causal else f"masked residues, {settings['mask_proportion']:.0%} chosen, scheme "
    )
    objective += "" if records.is_causal else {"mask": "all [MASK]"}.get(settings["scheme"], settings["scheme"])
    rows = {
        "layers, width, heads, feed-forward": ", ".join(
            str(architecture[key])
            for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        ),
        "attention": f"{names} ({arguments})" if arguments else names,
        "parameters": f"{records.evaluation['parameters']:,}, {records.num_bytes / 1e6:.1f} MB in bfloat16",
        "objective": objective,
        "contexts": "; then ".join(dict.fromkeys(map(_contexts, records.parts))),
        "optimiser steps": "; then ".join(map(_steps, records.parts)),
        "tokens read": f"{tokens:,} ({epochs:.2f} passes over the data)",
        "optimiser": f"{settings.get('optimizer', 'adamw')}, weight decay {settings['weight_decay']:g}, clipped at "
        f"{settings['clip']:g}",
        "precision": f"{settings['dtype']} (autocast), weights in float32, rounded to bfloat16 at the end",
        "hardware": records.hardware or device,
        "time": _hours(records.seconds) if records.seconds else "not recorded",
        "software": f"performers {records.parts[-1].run['version']}, torch {session['torch']}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""\
## Training

| | |
|---|---|
{table}

{_settings_files(records)} The last evaluation in training was
{_last_evaluation(records)}.

![Loss against the step](curve.png)
"""


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours"


def _contexts(part: Part) -> str:
    """What a part read at a time."""
    return f"{part.settings['context']:,} tokens, {part.settings['contexts']}"


def _steps(part: Part) -> str:
    """Steps and learning rate of a part."""
    settings = part.settings
    rates = [line["learning_rate"] for line in part.log if "learning_rate" in line]
    left = f", left at step {part.step:,}" if part.step != settings["steps"] else ""
    return (
        f"{part.step:,} of {settings['batch_size']} contexts (learning rate {max(rates):.2g} to {rates[-1]:.2g}, half a cosine "
        f"over {settings['steps']:,}{left})"
    )


def _settings_files(records: Records) -> str:
    if len(records.parts) == 1:
        return "All settings are in `config.yaml`, beside this file, as `performers pretrain --config` takes them."
    files = ", ".join(f"`config-part-{number}.yaml`" for number in range(1, len(records.parts)))
    return f"All settings are beside this file: those of the last part in `config.yaml`, those before in {files}."


def _last_evaluation(records: Records) -> str:
    entries = [entry for entry in records.log if entry.get("evaluation") == "validation"]
    if not entries:
        return "left out"
    last = entries[-1]
    return (
        f"at step {last['step']:,}, on {last['proteins']:,} proteins of the validation set: loss {last['loss']:.3f} nats "
        f"(unigram {math.log(last['baseline_perplexity']):.3f}), accuracy {last['accuracy']:.2%}"
    )


def _purpose(records: Records) -> str:
    uses = (
        "sampling sequences that look like natural proteins, ranking whole sequences or insertions and deletions by likelihood, "
        "and as a start for fine-tuning on a family of one's own"
        if records.is_causal
        else "embeddings for search, clustering and small supervised models; zero-shot ranking of substitutions; a start\nfor "
        "fine-tuning; and as a reference for work on linear attention"
    )
    longest = max(part.settings["context"] for part in records.parts)
    worst = min(records.evaluation["sets"].items(), key=lambda item: item[1]["accuracy_gain"])
    return f"""\
## Intended use

Research and teaching: {uses}. Compare with a baseline that knows nothing of the model (BLOSUM62, composition, nearest neighbour)
before drawing conclusions.

## Limitations

- It is small and has read little. On its hardest row ({worst[0]}) its accuracy is {100 * worst[1]["accuracy_gain"]:+.1f}
  percentage points from that of always naming the commonest residue; large protein language models, trained on hundreds of times
  as much, are far better.
- Swiss-Prot of 2014 leans towards model organisms, bacteria and conserved, well-studied families. Disordered, viral, designed and
  recently discovered proteins are rare in it, and predictions for them are worse.
- It was trained on at most {longest:,} tokens at a time. Longer proteins are read whole, but what lies further apart
  than that was never seen together.
- It knows sequences alone: no structure, ligand, modification, cell or organism. A likely residue is not a functional one, and a
  score is not a measurement. Not for clinical use.
"""


_DUAL_USE = """\
## Dual use

Models of proteins can in principle help to design harmful ones. This one is small, was trained on a public database without
labels of function or toxicity, and cannot be asked for either; a search in that database gives more. No proteins of pathogens
and no toxins were taken out of its data, though, and what it predicts is not screened. Do not use it to make toxins or to make
pathogens more harmful; have sequences screened before they are synthesised (providers in the IGSC do), and follow your
institution's rules for biosafety and dual-use research.
"""

_LICENCE = """\
## Licence and attribution

The weights are under the Apache License 2.0, like the package. They were trained on UniProtKB/Swiss-Prot, (c) the UniProt
Consortium, under the Creative Commons Attribution 4.0 International licence (CC BY 4.0,
https://creativecommons.org/licenses/by/4.0/); the changes are those under Data. Family labels are Pfam's (CC0 1.0). Please cite

> The UniProt Consortium. UniProt: the Universal Protein Knowledgebase in 2025. Nucleic Acids Research 53, D609-D617 (2025).

> Mistry J. et al. Pfam: the protein families database in 2021. Nucleic Acids Research 49, D412-D419 (2021).

> Choromanski K. et al. Rethinking Attention with Performers. ICLR 2021.
"""


def _with_interval(figures: dict[str, Any], key: str) -> str:
    shown = "{:.2%}" if key == "accuracy" else "{:.2f}"
    low, high = figures[f"{key}_interval"]
    return f"{shown.format(figures[key])} ({shown.format(low)} to {shown.format(high)})"
