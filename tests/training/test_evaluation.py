import math
from pathlib import Path

import numpy as np
import pytest
import torch

from performers.data import Corpus, in_memory_corpus, read_fasta
from performers.errors import InputError
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.training import evaluate

FIGURES = ("accuracy", "perplexity", "baseline_accuracy", "baseline_perplexity", "accuracy_gain", "perplexity_ratio")


@pytest.fixture(scope="module")
def proteins(fasta: Path) -> Corpus:
    return in_memory_corpus(read_fasta(str(fasta)))


@pytest.fixture(scope="module", params=["mlm", "clm"])
def model(request: pytest.FixtureRequest) -> PerformerForMaskedLM | PerformerForCausalLM:
    torch.manual_seed(0)
    config = PerformerConfig.preset("tiny", hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    return (PerformerForCausalLM if request.param == "clm" else PerformerForMaskedLM)(config).eval()


def test_figures_do_not_depend_on_the_batch_size(model: PerformerForMaskedLM, proteins: Corpus) -> None:
    reference = evaluate(model, proteins, batch_tokens=1)
    for batch_tokens in (100, 1000, 100_000):
        figures = evaluate(model, proteins, batch_tokens=batch_tokens)
        assert figures.tokens == reference.tokens
        for name in FIGURES:
            assert getattr(figures, name) == pytest.approx(getattr(reference, name), rel=1e-5), name


def test_figures_are_a_function_of_the_seed(model: PerformerForMaskedLM, proteins: Corpus) -> None:
    first = evaluate(model, proteins, seed=3)
    torch.manual_seed(99)
    assert evaluate(model, proteins, seed=3) == first
    if first.objective == "mlm":
        assert evaluate(model, proteins, seed=4).perplexity != first.perplexity


def test_evaluating_leaves_the_model_as_it_was(model: PerformerForMaskedLM, proteins: Corpus) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    evaluate(model, proteins)
    assert model.training
    model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_causal_model_is_scored_on_every_residue_as_its_own_loss_has_it(proteins: Corpus) -> None:
    torch.manual_seed(0)
    model = PerformerForCausalLM(PerformerConfig.preset("tiny", hidden_size=32, num_hidden_layers=2)).eval()
    one = proteins.subset([0])
    figures = evaluate(model, one)
    tokens = torch.tensor([[1, *one[0].tolist()]])
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert figures.tokens == len(one[0])
    assert figures.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_baseline_is_the_unigram_of_the_scored_residues() -> None:
    torch.manual_seed(0)
    model = PerformerForCausalLM(PerformerConfig.preset("tiny", hidden_size=32, num_hidden_layers=1)).eval()
    figures = evaluate(model, in_memory_corpus([("a", "LLLLAAGG"), ("b", "LLLL")]))
    counts = np.array([8, 2, 2])
    entropy = -(counts / 12 * np.log(counts / 12)).sum()
    assert figures.tokens == 12
    assert figures.baseline_accuracy == pytest.approx(8 / 12)
    assert figures.baseline_perplexity == pytest.approx(math.exp(entropy))


def test_masked_scoring_hides_every_scored_residue_unless_told_otherwise(proteins: Corpus) -> None:
    torch.manual_seed(0)
    model = PerformerForMaskedLM(PerformerConfig.preset("tiny", hidden_size=32, num_hidden_layers=1)).eval()
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    figures = evaluate(model, proteins, scheme="mask", batch_tokens=10**6)
    assert figures.tokens == int((seen[-1] == 3).sum())
    assert figures.tokens == pytest.approx(0.15 * proteins.num_residues, rel=0.1)
    bert = evaluate(model, proteins, scheme="bert", batch_tokens=10**6)
    assert int((seen[-1] == 3).sum()) == pytest.approx(0.8 * bert.tokens, rel=0.1)
    handle.remove()
    assert (figures.scheme, bert.scheme) == ("mask", "bert")


def test_a_model_that_copies_beats_the_baseline_with_an_interval_that_excludes_zero(proteins: Corpus) -> None:
    class Oracle(torch.nn.Module):
        """Names the next residue of these very proteins nine times in ten."""

        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            following = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 29).float() * 5
            following[:, ::10] = 0
            return type("Output", (), {"logits": following})()

    Oracle.__name__ = "OracleForCausalLM"
    figures = evaluate(Oracle(), proteins)
    assert figures.accuracy > 0.8
    low, high = figures.accuracy_gain_interval
    assert 0 < low < figures.accuracy_gain < high
    assert figures.perplexity_ratio_interval[1] < 1


def test_a_protein_longer_than_the_batch_is_read_whole(model: PerformerForMaskedLM) -> None:
    sequence = "".join(record.sequence for record in list(read_fasta("bundled:test"))[:5])
    figures = evaluate(model, in_memory_corpus([("long", sequence), ("short", "MKT")]), batch_tokens=64)
    assert figures.proteins == 2
    assert math.isfinite(figures.perplexity)


def test_fasta_is_read_where_a_corpus_is_not_given(model: PerformerForMaskedLM, fasta: Path, proteins: Corpus) -> None:
    assert evaluate(model, str(fasta)) == evaluate(model, proteins)


def test_arguments_out_of_range_are_refused(model: PerformerForMaskedLM, proteins: Corpus) -> None:
    with pytest.raises(InputError, match="batch_tokens"):
        evaluate(model, proteins, batch_tokens=0)
    with pytest.raises(InputError, match="resamples"):
        evaluate(model, proteins, resamples=1)
