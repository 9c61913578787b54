"""What a training run is asked to do: one flat table of keys, the same in a YAML file, on the command line and in Python.

`TrainConfig` holds the keys that every training has: how long, how fast, how often, on what. A task adds its own, as
`PretrainConfig` does. A table knows types, ranges and which keys contradict each other, and nothing of torch: the command line
builds its options from it without loading anything heavy. A wrong key or value becomes a `ConfigError` of one sentence.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from performers.errors import ConfigError


def _number(value: object) -> object:
    """Whole numbers, and the spelling 1e-3 that YAML takes for a string, become floats; anything else is left to be refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_or_more(value: object) -> object:
    """One string becomes a list of one; commas separate."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [piece.strip() for item in value for piece in (item.split(",") if isinstance(item, str) else [item])]
    return value


def _path_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Names = Annotated[list[str], BeforeValidator(_one_or_more)]
Paths = Annotated[list[str], BeforeValidator(_path_list)]


RUN_CONFIG = "config.yaml"
"""The file in a run folder that holds the configuration."""


class TrainConfig(BaseModel):
    """The keys of any training.

    Every key is an option of the task's command (`batch_size` is `--batch-size`) and a key of its YAML file. Keys that are left
    at None take the value that their description gives. The keys in `FREE_ON_RESUME` may change when a run goes on; all others
    decide the result, and a run keeps them from its first step to its last.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        {"output", "evaluate_every", "checkpoint_every", "keep", "device", "dtype", "threads", "micro_batch_size"}
    )
    """Keys that may change when a run goes on: they decide where and how fast it runs and what it reports, not what it learns."""

    output: str = Field(min_length=1, description="The run folder; if it holds this run already, the run goes on.")
    steps: int = Field(10_000, ge=1, le=2**40, description="Optimizer steps.")
    batch_size: int = Field(8, ge=1, le=2**24, description="Contexts in one optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Contexts in one forward pass of one process; gradients accumulate. [all at once]"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="AdamW for all weights, or Muon for the matrices of hidden layers and AdamW for the others.",
    )
    learning_rate: Number = Field(1e-3, gt=0, description="Peak learning rate.")
    final_learning_rate: Number = Field(0.0, ge=0, description="Learning rate that the cosine ends at.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up. [a tenth of the steps, at most 1000]"
    )
    beta1: Number = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    beta2: Number = Field(0.98, ge=0, lt=1, description="Decay of AdamW's second moment.")
    epsilon: Number = Field(1e-9, gt=0, description="AdamW's epsilon.")
    weight_decay: Number = Field(0.1, ge=0, description="Weight decay of matrices; biases and norms have none.")
    clip: Number = Field(0.5, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")

    evaluate_every: int | None = Field(
        None, ge=0, description="Steps between evaluations; 0 only at the end. [a tenth]"
    )
    patience: int = Field(
        0,
        ge=0,
        description="Stop after so many evaluations without a lower validation loss and keep the best model; 0 takes all steps.",
    )
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Checkpoints kept, besides the best where there is one.")

    device: str = Field("auto", description="auto (cuda, then mps, then cpu), or one by name, e.g. cuda:1.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the forward pass: bfloat16 is autocast. [bfloat16 on cuda, else float32]"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads. [as torch finds them]")

    @model_validator(mode="after")
    def _consistent_schedule(self) -> Self:
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: expected fewer than steps={self.steps}.")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate}: expected at most learning_rate={self.learning_rate}."
            )
        return self

    @classmethod
    def for_run(cls, values: Mapping[str, Any]) -> Self:
        """As `parse`; keys that are not given are those of the run that the output folder holds, if it holds one.

        A run that has not come to its first checkpoint is begun anew by other settings; it lends its own only to a call that
        gives none.
        """
        run = Path(str(values.get("output", "")))
        inherits = any((run / "checkpoints").glob("step-*")) or cls.FREE_ON_RESUME.issuperset(values)
        saved = run / RUN_CONFIG
        return cls.parse({**read_config(saved), **values} if inherits and saved.is_file() else values)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `values` describe.

        Raises:
            ConfigError: a key that does not exist, a value of the wrong type or out of range, or keys that contradict each
                other; the sentence names all of them.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(" ".join(_sentence(problem, cls) for problem in error.errors())) from None

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations, the default filled in; the last step is always one."""
        interval = max(1, self.steps // 10) if self.evaluate_every is None else self.evaluate_every
        return interval or self.steps

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.scheduled(step, self.steps, self.learning_rate)

    def scheduled(self, step: int, steps: int, peak: float) -> float:
        """Linear warm-up to `peak`, then half a cosine to `final_learning_rate`, in `steps` steps."""
        warmup = min(1000, steps // 10) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / (steps - warmup)
        span = peak - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))

    def to_yaml(self) -> str:
        """All keys as YAML, which `read_config` reads back to an equal configuration."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


class _LanguageModelling(BaseModel):
    """The keys of pretraining alone: what is read, what is predicted, and by which model."""

    input: Paths = Field(
        min_length=1, description="FASTA files (.gz too), '-' for stdin, bundled:train, or a corpus folder."
    )
    validation: Paths = Field([], description="FASTA files evaluated during training, e.g. bundled:validation.")
    ood: Paths = Field([], description="FASTA files of held-out families, evaluated beside the validation set.")
    max_length: int = Field(10_000_000, ge=1, description="Residues; a longer record is refused, never cut.")
    on_invalid: Literal["error", "x", "skip"] = Field(
        "error", description="What to do with a character that is no residue: stop, read it as X, or skip the record."
    )

    objective: Literal["mlm", "clm"] = Field("mlm", description="Masked or causal (next-residue) language modelling.")
    context: int = Field(1024, ge=4, le=2**31 - 1, description="Tokens in one context.")
    contexts: Literal["packed", "concatenated", "related", "pairs"] = Field(
        "packed",
        description="Proteins isolated in a context, joined and read together (the paper's 8,192 experiment), or read with the "
        "summed states of members of their cluster (see clusters), or pairs one after the other (see pairs).",
    )
    clusters: str | None = Field(
        None, description="TSV of representative and member: which proteins are related, for contexts=related."
    )
    pairs: str | None = Field(
        None, description="TSV of two identifiers, and a label of which 1 counts: the pairs, for contexts=pairs."
    )
    scheme: Literal["bert", "published", "mask"] = Field(
        "bert",
        description="Chosen residues become mask/random/kept: 80/10/10, the published code's 10/80/10, or 100/0/0.",
    )
    mask_proportion: Number = Field(0.15, gt=0, lt=1, description="Share of the residues that are chosen.")

    preset: str | None = Field(
        None, description="Size of the model: tiny, small, base, paper-regular, paper-trembl. [small]"
    )
    init_from: str | None = Field(
        None, description="A model folder whose weights and architecture the run starts from."
    )
    attention: Names | None = Field(
        None,
        description="One mechanism, or one per layer with commas: favor, exact, reformer, sparse, local, split. [split: one head "
        "local, with a window of 16, the others favor; favor alone in the paper's presets and with sequence_parallel]",
    )
    kernel: str | None = Field(
        None, description="Kernel of the favor heads: relu, softmax, elu, ... (see FavorFeatures). [relu]"
    )
    num_features: int | None = Field(None, ge=1, description="Random features of the favor heads. [256]")
    projection: str | None = Field(None, description="Projection of the favor heads: orthogonal, iid. [orthogonal]")
    architecture: dict[str, Any] = Field({}, description="Further keys of PerformerConfig, e.g. hidden_size=256.")
    dropout: Number | None = Field(None, ge=0, lt=1, description="Probability to drop an element. [as the preset says]")
    gradient_checkpointing: bool = Field(False, description="Recompute layers in the backward pass to save memory.")

    sequence_chunk: int | None = Field(
        None,
        ge=1,
        description="Train causal models on so many tokens at a time, carrying attention states; memory is that of a chunk.",
    )
    redraw_every: int | None = Field(
        None,
        ge=0,
        description="Steps between redraws of the random features; 0 never. [1000 for softmax kernels, else 0]",
    )
    evaluate_proteins: int = Field(
        512, ge=1, description="At most so many proteins of a set are evaluated during training."
    )
    evaluate_tokens: int = Field(16_384, ge=1, description="Tokens evaluated at once.")
    compile: bool = Field(False, description="Run the model through torch.compile.")
    sharding: Literal["none", "full"] = Field(
        "none",
        description="Several processes: each holds the whole model, or a share of weights, gradients and moments (FSDP).",
    )
    sequence_parallel: int = Field(
        1, ge=1, description="Processes that hold a context's tokens between them; attention must be favor."
    )


class PretrainConfig(TrainConfig, _LanguageModelling):
    """The keys of a pretraining run: those of every training, and what is read, what is predicted, and by which model."""

    FREE_ON_RESUME: ClassVar[frozenset[str]] = TrainConfig.FREE_ON_RESUME | {
        *("validation", "ood", "evaluate_proteins", "evaluate_tokens"),
        *("compile", "gradient_checkpointing", "sequence_chunk", "sharding", "sequence_parallel"),
    }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.patience and not self.validation:
            raise ValueError(f"patience={self.patience}: expected a validation set to go by.")
        if self.init_from is not None:
            for key in ("preset", "attention", "kernel", "num_features", "projection", "architecture"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key} and init_from exclude each other: a model folder brings its own architecture."
                    )
        if (self.contexts == "related") != (self.clusters is not None):
            raise ValueError("contexts=related and clusters belong together: a table that says who is related.")
        if (self.contexts == "pairs") != (self.pairs is not None):
            raise ValueError("contexts=pairs and pairs belong together: a table that says which proteins are pairs.")
        if self.contexts == "related":
            for key in ("gradient_checkpointing", "compile"):
                if getattr(self, key):
                    raise ValueError(f"contexts=related and {key} exclude each other.")
            if self.sequence_parallel > 1:
                raise ValueError("contexts=related and sequence_parallel exclude each other.")
        if self.sequence_chunk is not None:
            self._check_sequence_chunk()
        if self.optimizer == "muon" and self.sharding == "full":
            raise ValueError("optimizer=muon and sharding=full exclude each other: Muon takes a matrix as a whole.")
        for key in ("compile", "sequence_chunk"):
            for other, given in (
                ("sharding=full", self.sharding == "full"),
                ("sequence_parallel", self.sequence_parallel > 1),
            ):
                if getattr(self, key) and given:
                    raise ValueError(f"{key} and {other} exclude each other.")
        return self

    def _check_sequence_chunk(self) -> None:
        chunk = f"sequence_chunk={self.sequence_chunk}"
        if self.objective != "clm":
            raise ValueError(
                f"{chunk}: expected objective='clm'; a masked model needs what comes after a chunk, too "
                "(architecture chunk_size_layer bounds its memory)."
            )
        if self.contexts != "concatenated":
            raise ValueError(f"{chunk}: expected contexts='concatenated'; packed proteins are read at once.")
        for key in ("gradient_checkpointing", "compile"):
            if getattr(self, key):
                raise ValueError(f"sequence_chunk and {key} exclude each other.")


def read_config(path: str | Path) -> dict[str, Any]:
    """The keys that a YAML file gives; `PretrainConfig.parse` checks them.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or is not a table of keys.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected YAML ({detail}).") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected a table of 'key: value' lines.")
    return values


def _sentence(problem: Any, cls: type[BaseModel]) -> str:
    """One of pydantic's findings as: which key, which value, what was expected."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, cls.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(cls.model_fields)}."
        return f"{key} is not a key of the configuration: {hint}"
    if problem["type"] == "missing":
        return f"{key} is missing: {cls.model_fields[key].description}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}={problem['input']!r}: expected it to be {problem['msg'].removeprefix('Input should be ')}."
