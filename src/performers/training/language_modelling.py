"""What a step of pretraining computes: the model it begins with, the rows of a step as examples, and the figures.

Everything is a function of the configuration and the number of the step: contexts are numbered from the start of training, and
masks, dropout and redraws are drawn from (seed, step, row).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from performers.data import VOCAB_SIZE, Contexts, Corpus, mask_tokens, next_token_labels
from performers.data.pair_contexts import PairContexts
from performers.data.relatives import draw_relatives
from performers.errors import ConfigError
from performers.models.bundled import located
from performers.randomness import derive_seed
from performers.training.checkpoint import find_model, open_model, weights_files
from performers.training.configuration import PretrainConfig
from performers.training.distributed import World
from performers.training.evaluation import evaluate
from performers.training.runs import describe_file
from performers.training.task import Figures

_DEFAULT_REDRAW_INTERVAL = 1000

# A split is of local and favor heads. The strongest attention of `performers benchmark quality` (docs/results.md).
_LOCAL_HEAD = {"heads": 1, "first_kwargs": {"window": 16}}


def open_for_training(config: PretrainConfig, checkpoint: Path | None) -> Any:
    """The model of a checkpoint, or the one a run begins with, in training mode.

    Raises:
        ConfigError: it cannot be trained chunk by chunk, which was asked for.
    """
    model = open_model(checkpoint) if checkpoint else new_model(config)
    if config.sequence_chunk is not None and not model.has_fixed_states:
        raise ConfigError(
            f"sequence_chunk={config.sequence_chunk}: expected attention whose state has a fixed size in every layer, such "
            f"as favor, but the model has {', '.join(dict.fromkeys(model.config.mechanisms))}."
        )
    if config.sequence_parallel > 1 and model.cannot_shard_sequences:
        raise ConfigError(
            f"sequence_parallel={config.sequence_parallel}: expected attention that sums its tokens up, such as favor, in every "
            f"layer, but the model has {', '.join(model.cannot_shard_sequences)}."
        )
    if config.gradient_checkpointing:
        # Renamed in the transformers of 2026.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model.train()


def new_model(config: PretrainConfig) -> Any:
    """The model that a run begins with: new from a preset, or from a model folder."""
    from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

    if config.init_from is not None:
        model = open_model(config.init_from, config.objective)
        if config.dropout is not None:
            raise ConfigError("dropout and init_from exclude each other: a model folder brings its own.")
        return model
    values: dict[str, Any] = {**_attention(config), "seed": config.seed}
    if config.dropout is not None:
        values["hidden_dropout_prob"] = config.dropout
    architecture = PerformerConfig.preset(config.preset or "small", **{**values, **config.architecture})
    if architecture.vocab_size != VOCAB_SIZE:
        raise ConfigError(f"vocab_size={architecture.vocab_size}: expected the {VOCAB_SIZE} tokens of residues.")
    torch.manual_seed(derive_seed(config.seed, "initialization"))
    return (PerformerForCausalLM if config.objective == "clm" else PerformerForMaskedLM)(architecture)


def _attention(config: PretrainConfig) -> dict[str, Any]:
    """The keys `attention` and `attention_kwargs` of the model: as they are given, or the default of a preset of ours."""
    favor = {
        key: value
        for key, value in (
            ("kernel", config.kernel),
            ("num_features", config.num_features),
            ("projection", config.projection),
        )
        if value is not None
    }
    if _takes_a_local_head(config):
        return {"attention": "split", "attention_kwargs": {**_LOCAL_HEAD, "second_kwargs": favor}}
    names = config.attention or ["favor"]
    values: dict[str, Any] = {"attention": names[0] if len(names) == 1 else names}
    if favor and "favor" not in names:
        raise ConfigError(f"{next(iter(favor))} belongs to favor attention, which no layer of attention={names} has.")
    if favor:
        values["attention_kwargs"] = favor if len(set(names)) == 1 else {"favor": favor}
    return values


def _takes_a_local_head(config: PretrainConfig) -> bool:
    """Whether nothing stands against it: another wish, the paper's own models, one head alone, or rows on several processes."""
    return (
        config.attention is None
        and config.sequence_parallel == 1
        and not (config.preset or "").startswith("paper-")
        and not config.architecture.keys() & {"attention", "attention_kwargs"}
        and config.architecture.get("num_attention_heads") != 1
    )


def initial_weights(config: PretrainConfig) -> list[dict[str, Any]]:
    """The weights files that a run began from, as far as they are still there when it goes on."""
    if config.init_from is None or not Path(located(config.init_from)).exists():
        return []
    return [describe_file(file) for file in weights_files(find_model(config.init_from))]


def redraw_interval(config: PretrainConfig, model: Any) -> int:
    """Steps between redraws; 0 for never."""
    if config.redraw_every is not None:
        return config.redraw_every
    return _DEFAULT_REDRAW_INTERVAL if model.redraws_by_default else 0


def micro_batches(
    config: PretrainConfig, contexts: Contexts | PairContexts, step: int, world: World
) -> list[dict[str, torch.Tensor]]:
    """This process's share of step `step`, as arguments of the model's forward pass, a forward pass each.

    Row i of the step is context `step * batch_size + i` since the start of training; the world deals the rows out. Masks and
    dropout keys belong to rows, so how that is done changes nothing. Rows that several processes hold are whole in each.

    Returns:
        input_ids, labels and position_ids of shape (rows, context), int64, when contexts are concatenated; of shape
        (1, rows * context) with cu_seqlens when they are packed or related; dropout_keys of shape (rows,); and when they are
        related context_ids, the tokens with none masked, and relatives (segments, segments), who reads whom.
    """
    mine = world.rows(step * config.batch_size, config.batch_size)
    at_once = config.micro_batch_size or len(mine)
    examples: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(mine), at_once):
        rows = np.asarray(mine[start : start + at_once])
        batch = contexts.rows(rows)
        if config.objective == "mlm":
            inputs, labels = mask_tokens(
                batch.input_ids,
                rows,
                seed=config.seed,
                step=step,
                scheme=config.scheme,
                proportion=config.mask_proportion,
            )
        else:
            inputs, labels = batch.input_ids, next_token_labels(batch.input_ids, batch.segments)
        example: dict[str, Any] = {"input_ids": inputs, "labels": labels, "position_ids": batch.position_ids}
        if batch.families is not None:
            example["context_ids"] = batch.input_ids
        if batch.segments is not None:
            example = {key: value.reshape(1, -1) for key, value in example.items()} | {"cu_seqlens": batch.segments}
        if batch.families is not None:
            example["relatives"] = draw_relatives(batch, rows, seed=config.seed, step=step)
        example["dropout_keys"] = np.array([derive_seed(config.seed, "dropout", step, int(row)) for row in rows])
        examples.append({key: torch.from_numpy(value) for key, value in example.items()})
    return examples


def measure(
    config: PretrainConfig, name: str, proteins: Corpus, model: Any, world: World, dtype: torch.dtype
) -> Figures:
    """The figures of one set of proteins."""
    found = evaluate(model, proteins, seed=config.seed, batch_tokens=config.evaluate_tokens, dtype=dtype, world=world)
    losses = {"loss": math.log(found.perplexity), "baseline_loss": math.log(found.baseline_perplexity)}
    return Figures(
        name,
        logged={**losses, **found.to_dict()},
        charted={"accuracy": found.accuracy, "perplexity": found.perplexity},
        sentence=f"{name} accuracy {found.accuracy:.4f} (unigram {found.baseline_accuracy:.4f}), "
        f"perplexity {found.perplexity:.3f} (unigram {found.baseline_perplexity:.3f})",
    )
