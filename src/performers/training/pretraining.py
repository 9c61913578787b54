"""Pretraining on proteins as a task: which proteins are read, and what the loop asks about them.

The run folder holds the corpus besides, where it was built from FASTA files. What a step computes is in
`performers.training.language_modelling`; torch is imported only when the proteins are in order.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from performers.data import Contexts, Corpus, FastaReport, build_corpus, in_memory_corpus, is_corpus_of, read_fasta
from performers.randomness import derive_seed
from performers.training.configuration import PretrainConfig
from performers.training.run_folder import RunResult, run_task
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

    def check(self, *, begun: bool) -> None:
        """Reads the proteins to evaluate on; finds a missing file before anything is written."""
        _ = self.evaluation_sets
        if not begun and not self._is_corpus:
            read_fasta(self.config.input)

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

        return [*self.corpus.metadata["report"]["inputs"], *initial_weights(self.config)]

    def open(self, checkpoint: Path | None) -> torch.nn.Module:
        """The Performer.

        Raises:
            ConfigError: the model cannot be made, or not be trained as asked.
        """
        import torch

        from performers.training import language_modelling

        model = language_modelling.open_for_training(self.config, checkpoint)
        self._forward = torch.compile(model) if self.config.compile else model
        self._contexts = Contexts(self.corpus, self.config.context, mode=self.config.contexts, seed=self.config.seed)
        self._redraw_every = language_modelling.redraw_interval(self.config, model)
        return model

    def describe(self) -> str:
        """Proteins and residues."""
        return f"{len(self.corpus):,} proteins, {self.corpus.num_residues:,} residues"

    def before_step(self, model: Any, step: int) -> None:
        """Redraws random features now and then."""
        if self._redraw_every and step and step % self._redraw_every == 0:
            model.redraw_features_(self.config.seed, step)

    def accumulate(self, model: Any, step: int, world: World, dtype: torch.dtype) -> torch.Tensor:
        """One pass over the contexts of the step."""
        from performers.training.language_modelling import micro_batches
        from performers.training.loop import accumulate_gradients

        examples = micro_batches(self.config, self._contexts, step, world)
        return accumulate_gradients(self._forward, examples, world, dtype, self.config.sequence_chunk)

    def tokens(self, step: int) -> int:
        """All contexts are of one length."""
        return self.config.batch_size * self.config.context

    def evaluate(self, model: Any, world: World, dtype: torch.dtype) -> Iterator[Figures]:
        """Accuracy and perplexity beside the unigram baseline."""
        from performers.training.language_modelling import measure

        for name, proteins in self.evaluation_sets.items():
            yield measure(self.config, name, proteins, model, world, dtype)

    def save(self, model: Any, folder: Path, *, finished: bool) -> None:
        """A Hugging Face folder, tokenizer included."""
        from performers.models import PerformerTokenizer

        PerformerTokenizer(add_eos=self.config.objective == "mlm").save_pretrained(folder)
        model.save_pretrained(folder)

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
