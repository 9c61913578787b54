"""Pretraining on proteins as a task: which proteins are read, and what the loop asks about them.

The run folder holds the corpus besides, where it was built from FASTA files. What a step computes is in
`performers.training.language_modelling`; torch is imported only when the proteins are in order.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import yaml

from performers.data import Contexts, Corpus, FastaReport, build_corpus, in_memory_corpus, is_corpus_of, read_fasta
from performers.data.pair_contexts import PairContexts, read_pairs
from performers.data.relatives import read_clusters
from performers.errors import InputError
from performers.randomness import derive_seed
from performers.training.configuration import PretrainConfig
from performers.training.run_folder import RunResult, run_task
from performers.training.runs import describe_file
from performers.training.task import Figures, Task

if TYPE_CHECKING:
    import torch

    from performers.training.distributed import World

PretrainResult = RunResult


def pretrain(config: PretrainConfig, *, resume: bool = True, resume_from: str | None = None) -> PretrainResult:
    """Pretrains a Performer, or goes on with the run that the output folder holds.

    Under torchrun every process calls it; the processes share each step's contexts.

    Arguments:
        config: what to do; when a run goes on, only the keys in `config.FREE_ON_RESUME` may differ from those it began with.
        resume: False refuses an output folder that holds a run.
        resume_from: the name of the checkpoint to go on from, e.g. "step-00000100"; by default the newest. Checkpoints and log
            lines after it are given up.

    Raises:
        InputError: an input, the configuration, the output folder or a checkpoint is not in order.
        NonFiniteError: a loss or a gradient is not finite; the step was not taken.
        DiskFullError: there is no room to save; the last checkpoint is whole.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; a checkpoint has been saved.
    """
    return run_task(Pretraining(config), resume=resume, resume_from=resume_from)


class Pretraining(Task[PretrainConfig]):
    """Masked or causal language modelling of proteins, with a Performer."""

    command: ClassVar[str] = "pretrain"
    elsewhere: ClassVar[str] = "with --init-from {model} to go on from its weights"
    needs_less: ClassVar[str] = (
        "A smaller --micro-batch-size or --context needs less, and so does --gradient-checkpointing, or --sequence-chunk for a "
        "causal model."
    )

    corpus: Corpus

    @property
    def layout(self) -> dict[str, Any]:
        """As the configuration says."""
        return {"sharding": self.config.sharding, "sequence_parallel": self.config.sequence_parallel}

    def check(self, *, begun: bool) -> None:
        """Reads the proteins to evaluate on; finds a missing file before anything is written."""
        _ = self.evaluation_sets
        if not begun and not self._is_corpus:
            read_fasta(self.config.input)
        if self.config.clusters is not None and not Path(self.config.clusters).is_file():
            raise InputError(f"{self.config.clusters} is not there; expected a table of clusters.")
        if self.config.pairs is not None and not Path(self.config.pairs).is_file():
            raise InputError(f"{self.config.pairs} is not there; expected a table of pairs.")

    def discard(self, run: Path, began: dict[str, Any]) -> None:
        """Removes a corpus that was built of other files, or read in another way."""
        config = self.config
        settings: dict[str, Any] = {"max_length": config.max_length, "on_invalid": config.on_invalid}
        same = "-" in config.input or is_corpus_of(config.input, run / "corpus", **settings)
        if not same or any(began.get(key) != value for key, value in {"input": config.input, **settings}.items()):
            shutil.rmtree(run / "corpus", ignore_errors=True)

    def prepare(self, run: Path) -> None:
        """Opens the corpus: the folder that was given, or one built from the FASTA files in the run folder."""
        config = self.config
        folder = run / "corpus"
        if self._is_corpus:
            self.corpus = Corpus.open(config.input[0])
        elif (folder / "corpus.json").is_file():
            self.corpus = Corpus.open(folder)
        else:
            self.corpus = build_corpus(config.input, folder, max_length=config.max_length, on_invalid=config.on_invalid)
            for remark in FastaReport.from_dict(self.corpus.metadata["report"]).remarks():
                print(remark, file=sys.stderr)

    @functools.cached_property
    def evaluation_sets(self) -> dict[str, Corpus]:
        """The proteins to evaluate on, at most `evaluate_proteins` of each set, drawn with the seed."""
        config = self.config
        sets: dict[str, Corpus] = {}
        for name, sources in (("validation", config.validation), ("ood", config.ood)):
            if sources:
                proteins = in_memory_corpus(
                    read_fasta(sources, max_length=config.max_length, on_invalid=config.on_invalid)
                )
                if len(proteins) > config.evaluate_proteins:
                    keys = np.random.Philox(key=derive_seed(config.seed, "evaluation set", name)).random_raw(
                        len(proteins)
                    )
                    proteins = proteins.subset(np.sort(np.argsort(keys, kind="stable")[: config.evaluate_proteins]))
                sets[name] = proteins
        return sets

    def inputs(self) -> list[dict[str, Any]]:
        """The FASTA files of the corpus, and the weights that the run begins from."""
        from performers.training.language_modelling import initial_weights

        tables = [describe_file(Path(name)) for name in (self.config.clusters, self.config.pairs) if name is not None]
        return [*self.corpus.metadata["report"]["inputs"], *tables, *initial_weights(self.config)]

    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        """The Performer.

        Raises:
            ConfigError: the model cannot be made, or not be trained as asked.
        """
        import torch

        from performers.training import language_modelling

        model = language_modelling.open_for_training(self.config, checkpoint)
        self._forward = torch.compile(model) if self.config.compile else model
        self._contexts = self._make_contexts()
        self._redraw_every = language_modelling.redraw_interval(self.config, model)
        return model

    def _make_contexts(self) -> Contexts | PairContexts:
        config = self.config
        if config.contexts == "pairs":
            assert config.pairs is not None
            return PairContexts(self.corpus, read_pairs(config.pairs, self.corpus), config.context, config.seed)
        clusters = None if config.clusters is None else read_clusters(config.clusters, self.corpus)
        return Contexts(self.corpus, config.context, mode=config.contexts, seed=config.seed, clusters=clusters)

    def describe(self) -> str:
        """Proteins and residues."""
        return f"{len(self.corpus):,} proteins, {self.corpus.num_residues:,} residues"

    def before_step(self, model: Any, step: int) -> bool:
        """Redraws random features now and then."""
        if not self._redraw_every or not step or step % self._redraw_every:
            return False
        model.redraw_features_(self.config.seed, step)
        return True

    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        """One pass over the contexts of the step."""
        from performers.training.language_modelling import micro_batches
        from performers.training.loop import accumulate_gradients

        examples = micro_batches(self.config, self._contexts, step, world)
        # Relatives are read in a pass of their own, whose layers pass gradients on through their states alone.
        whole = world.gathered(model) if self.config.contexts == "related" else contextlib.nullcontext()
        with whole:
            return accumulate_gradients(self._forward, examples, world, dtype, self.config.sequence_chunk)

    def ring_attention_bytes(self, model: Any, world: World, dtype: torch.dtype) -> int:
        """Keys and values of every layer and row, once around the processes that hold the row, and back with their gradients."""
        from performers.attention import ring_attention_bytes

        shape, rows = model.config, len(world.rows(0, self.config.batch_size))
        processes = 1 if world.sequence is None else world.sequence.size
        layer = ring_attention_bytes(
            self.config.context, shape.num_attention_heads, shape.head_dim, processes, dtype.itemsize
        )
        return layer * shape.num_hidden_layers * rows

    def tokens(self, step: int) -> int:
        """All contexts are of one length."""
        return self.config.batch_size * self.config.context

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        """Accuracy and perplexity beside the unigram baseline."""
        from performers.training.language_modelling import measure

        for name, proteins in self.evaluation_sets.items():
            yield measure(self.config, name, proteins, model, world, dtype)

    def save_architecture(self, model: Any, folder: Path) -> None:
        """Configuration and tokenizer."""
        from performers.models import PerformerForCausalLM, PerformerForMaskedLM

        kind = PerformerForCausalLM if self.config.objective == "clm" else PerformerForMaskedLM
        model.config.architectures = [kind.__name__]
        model.config.save_pretrained(folder)
        self._tokenizer().save_pretrained(folder)

    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        """A Hugging Face folder, tokenizer included; a finished one says what length it was trained on wherever it is moved."""
        self._tokenizer().save_pretrained(folder)
        model.save_pretrained(folder)
        if finished:
            settings = yaml.safe_dump({"context": self.config.context})
            (folder / "config.yaml").write_text(settings, encoding="utf-8")

    def _tokenizer(self) -> Any:
        from performers.models import PerformerTokenizer

        return PerformerTokenizer(add_eos=self.config.objective == "mlm")

    def picture(self, run: Path) -> None:
        """The loss against the step."""
        from performers.training.plots import plot_loss

        heading = "Next-residue prediction"
        if self.config.objective == "mlm":
            # Kept residues are easy to name, so the two losses are comparable only where the schemes are the same.
            heading = f"Masked residues: scheme {self.config.scheme} in training, mask in evaluation"
        plot_loss(run / "log.jsonl", run / "loss.png", heading)

    @property
    def _is_corpus(self) -> bool:
        return len(self.config.input) == 1 and (Path(self.config.input[0]) / "corpus.json").is_file()
