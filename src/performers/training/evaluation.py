"""How well a language model predicts the residues of proteins it has not seen, beside the unigram baseline.

Proteins come in, `Evaluation` goes out. Every protein is read alone (many share a forward pass as isolated segments), whole, and
with masks that depend on the seed and its position in the input alone, so neither the batch size nor the number of processes
changes the figures. The baseline knows the frequencies of the very residues that are scored: it is the best that any model
can do that ignores the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from performers import __version__
from performers.data import (
    BOS,
    EOS,
    FIRST_RESIDUE,
    MAX_LENGTH,
    VOCAB_SIZE,
    Corpus,
    in_memory_corpus,
    mask_tokens,
    read_fasta,
)
from performers.errors import InputError
from performers.models.bundled import model_or_default, name_of
from performers.randomness import derive_seed
from performers.training.checkpoint import find_model, objective_of, open_model, weights_files
from performers.training.distributed import World, autocast, choose_device, choose_dtype, use_threads
from performers.training.runs import describe_file

Interval = tuple[float, float]

HELD_OUT = {"random": "bundled:random", "test": "bundled:test", "ood": "bundled:ood"}
"""The proteins that the bundled models were not trained on, from easy to hard: drawn at random, so that training has relatives
of them; of clusters (50 % identity) that training has nothing of; of families that training has nothing of."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures over all scored residues; intervals are 95 % bootstrap intervals over proteins.

    Attributes:
        accuracy: the fraction of scored residues whose most probable token is right.
        perplexity: exp of the mean negative log-likelihood in nats per residue.
        tokens: scored residues.
        baseline_accuracy: that of always naming the commonest scored residue.
        baseline_perplexity: exp of the entropy of the scored residues.
        accuracy_interval: of `accuracy`.
        perplexity_interval: of `perplexity`.
        accuracy_gain: `accuracy` - `baseline_accuracy`, on the same residues.
        accuracy_gain_interval: of `accuracy_gain`, resampling model and baseline together.
        perplexity_ratio: `perplexity` / `baseline_perplexity`; below 1 is better than the baseline.
        perplexity_ratio_interval: of `perplexity_ratio`.
        proteins: how many there were.
        objective: "mlm" (masked residues) or "clm" (each residue from those before it).
        scheme: how chosen residues were shown to a masked model; None for a causal one.
        seed: what the masks and the resampling were drawn from.
    """

    accuracy: float
    perplexity: float
    tokens: int
    baseline_accuracy: float
    baseline_perplexity: float
    accuracy_interval: Interval
    perplexity_interval: Interval
    accuracy_gain: float
    accuracy_gain_interval: Interval
    perplexity_ratio: float
    perplexity_ratio_interval: Interval
    proteins: int
    objective: str
    scheme: str | None
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The figures, fit for JSON."""
        return dataclasses.asdict(self)


def evaluate(
    model: Any,
    proteins: Corpus | str | Sequence[str],
    *,
    scheme: Literal["mask", "bert", "published"] = "mask",
    mask_proportion: float = 0.15,
    seed: int = 0,
    batch_tokens: int = 16_384,
    dtype: torch.dtype = torch.float32,
    max_length: int = MAX_LENGTH,
    resamples: int = 1000,
    world: World | None = None,
) -> Evaluation:
    """Scores a masked or causal Performer on proteins.

    Arguments:
        model: a PerformerForMaskedLM or PerformerForCausalLM; it stays on its device and in its mode.
        proteins: a corpus, or what `read_fasta` reads.
        scheme: how the chosen residues are shown to a masked model. "mask" hides them all; "bert" and "published" keep some,
            which makes the task easier and the figures higher.
        mask_proportion: the share of residues that are chosen and scored; a causal model is scored on all.
        seed: of the masks and of the bootstrap.
        batch_tokens: proteins share a forward pass up to so many tokens; a longer protein has one to itself.
        dtype: torch.bfloat16 runs the forward passes under autocast.
        max_length: residues; a longer record is refused.
        resamples: bootstrap samples of the proteins.
        world: processes that share the work; all get the same figures.

    Raises:
        InputError: an argument is out of range, or there are no proteins.
        FastaError: the proteins cannot be read.
    """
    if batch_tokens < 1 or resamples < 2:
        raise InputError(f"batch_tokens is {batch_tokens} and resamples is {resamples}: expected at least 1 and 2")
    corpus = proteins if isinstance(proteins, Corpus) else in_memory_corpus(read_fasta(proteins, max_length=max_length))
    objective = objective_of(model)
    world = world or World(0, 1, model.device)
    # Columns: negative log-likelihood, right predictions, then how often each token was the label.
    sums = np.zeros((len(corpus), 2 + VOCAB_SIZE))
    training = model.training
    model.eval()
    try:
        batches = _batches(corpus, batch_tokens)
        for first in range(0, len(batches), world.size):
            # All processes make as many passes, since they share the weights of a sharded model; one may not count.
            batch = batches[min(first + world.rank, len(batches) - 1)]
            examples = [_example(corpus[index], index, objective, scheme, mask_proportion, seed) for index in batch]
            found = _score(model, examples, objective, dtype)
            if first + world.rank < len(batches):
                sums[batch] = found
    finally:
        model.train(training)
    if world.size > 1:
        # Each row is nonzero on one process only, so this sum is exact.
        sums = world.sum_(torch.from_numpy(sums).to(world.device)).cpu().numpy()
    return _summarise(sums, objective, scheme if objective == "mlm" else None, seed, resamples)


def held_out_sets() -> dict[str, Corpus]:
    """The sets of `HELD_OUT`, read."""
    return {name: in_memory_corpus(read_fasta(source)) for name, source in HELD_OUT.items()}


def evaluate_folder(
    folder: str | Path | None,
    sets: Mapping[str, Corpus],
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`evaluate` for a model folder on some sets of proteins, with a record of what was evaluated.

    Arguments:
        folder: a model folder, a checkpoint or a run, or the name of a bundled model; None for the bundled masked one.
        sets: what to evaluate on, by name.
        device, dtype, threads: as in `PretrainConfig`.
        options: those of `evaluate`.

    Returns:
        "sets", the figures of `Evaluation` by name; and model, weights, parameters, attention, device, dtype and version.

    Raises:
        InputError: as `evaluate`; CheckpointError if there is no sound model in the folder.
    """
    with use_threads(threads):
        chosen = choose_device(device)
        precision = choose_dtype(dtype, chosen)
        path = find_model(model_or_default(folder))
        model = open_model(path).to(chosen)
        figures = {
            name: evaluate(model, proteins, dtype=precision, **options).to_dict() for name, proteins in sets.items()
        }
    return {
        "sets": figures,
        "model": name_of(path) or str(path),
        "weights": [describe_file(file) for file in weights_files(path)],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention": list(dict.fromkeys(model.config.mechanisms)),
        "device": str(chosen),
        "dtype": str(precision).removeprefix("torch."),
        "version": __version__,
    }


def _batches(corpus: Corpus, batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index in range(len(corpus)):
        tokens = int(corpus.lengths[index]) + 2
        if not batches or tokens > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(index)
        room -= tokens
    return batches


def _example(
    residues: npt.NDArray[np.uint8], index: int, objective: str, scheme: Any, proportion: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Input tokens and the tokens to be scored (-100 elsewhere) of one protein."""
    tokens = np.concatenate(([BOS], residues, [EOS])).astype(np.int64)
    if objective == "clm":
        return tokens, np.where(tokens >= FIRST_RESIDUE, tokens, -100)
    inputs, labels = mask_tokens(
        tokens[None],
        np.array([index]),
        seed=derive_seed(seed, "evaluation"),
        step=0,
        scheme=scheme,
        proportion=proportion,
    )
    return inputs[0], labels[0]


@torch.no_grad()  # and not inference_mode, whose tensors a sharded model would keep for training
def _score(
    model: Any,
    examples: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    objective: str,
    dtype: torch.dtype,
) -> npt.NDArray[np.float64]:
    """The rows of `sums` for proteins that share a forward pass."""
    lengths = np.array([len(inputs) for inputs, _ in examples])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    owner = np.repeat(np.arange(len(examples)), lengths)
    labels = np.concatenate([labels for _, labels in examples])
    scored = np.flatnonzero(labels >= 0)
    device = model.device
    with autocast(device, dtype):
        logits = model(
            input_ids=torch.from_numpy(np.concatenate([inputs for inputs, _ in examples]))[None].to(device),
            position_ids=torch.from_numpy(np.arange(offsets[-1]) - offsets[owner])[None].to(device),
            cu_seqlens=torch.from_numpy(offsets.astype(np.int32)).to(device),
        ).logits[0]
    # A causal model predicts a residue at the token before it; bos stands before the first.
    predicting = torch.from_numpy(scored - 1 if objective == "clm" else scored).to(device)
    target = torch.from_numpy(labels[scored]).to(device)
    log_probabilities = torch.log_softmax(logits[predicting].float(), dim=-1)
    loss = -log_probabilities.gather(1, target[:, None])[:, 0]
    right = log_probabilities.argmax(dim=-1) == target
    sums = np.zeros((len(examples), 2 + VOCAB_SIZE))
    np.add.at(sums[:, 0], owner[scored], loss.cpu().double().numpy())
    np.add.at(sums[:, 1], owner[scored], right.cpu().numpy())
    np.add.at(sums, (owner[scored], 2 + labels[scored]), 1)
    return sums


def _summarise(
    sums: npt.NDArray[np.float64], objective: str, scheme: str | None, seed: int, resamples: int
) -> Evaluation:
    label_counts = sums[:, 2:]
    frequencies = label_counts.sum(axis=0) / label_counts.sum()
    seen = frequencies > 0
    commonest = int(frequencies.argmax())
    # One column per figure, so that one resampling serves all of them.
    columns = np.stack(
        [
            label_counts.sum(axis=1),
            sums[:, 0],
            sums[:, 1],
            label_counts[:, commonest],
            -label_counts[:, seen] @ np.log(frequencies[seen]),
        ],
        axis=1,
    )

    def figures(totals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        count, loss, right, common, baseline_loss = np.moveaxis(totals, -1, 0)
        return np.stack(
            [
                right / count,
                np.exp(loss / count),
                common / count,
                np.exp(baseline_loss / count),
                (right - common) / count,
                np.exp((loss - baseline_loss) / count),
            ],
            axis=-1,
        )

    accuracy, perplexity, baseline_accuracy, baseline_perplexity, gain, ratio = map(float, figures(columns.sum(axis=0)))
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap")))
    number = len(columns)
    totals = [
        np.bincount(generator.integers(number, size=number), minlength=number) @ columns for _ in range(resamples)
    ]
    low, high = np.quantile(figures(np.stack(totals)), [0.025, 0.975], axis=0)
    interval = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Evaluation(
        accuracy=accuracy,
        perplexity=perplexity,
        tokens=round(float(label_counts.sum())),
        baseline_accuracy=baseline_accuracy,
        baseline_perplexity=baseline_perplexity,
        accuracy_interval=interval[0],
        perplexity_interval=interval[1],
        accuracy_gain=gain,
        accuracy_gain_interval=interval[4],
        perplexity_ratio=ratio,
        perplexity_ratio_interval=interval[5],
        proteins=number,
        objective=objective,
        scheme=scheme,
        seed=seed,
    )
