import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from victims import outcome

from performers.data import Contexts, build_corpus, in_memory_corpus, read_fasta
from performers.errors import ConfigError, InputError, NonFiniteError
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.randomness import derive_seed
from performers.training import PretrainConfig, PretrainResult, evaluate, open_model
from performers.training.configuration import read_config
from performers.training.distributed import World
from performers.training.language_modelling import micro_batches, new_model, redraw_interval
from performers.training.run_folder import list_checkpoints, load_progress

Train = Callable[..., PretrainResult]
Settings = Callable[..., dict[str, Any]]
GOLDEN = Path(__file__).parent / "fixtures" / "golden-losses.json"


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "learning_rate" in entry]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_fifty_steps_give_the_losses_they_have_always_given(objective: str, tmp_path: Path, train: Train) -> None:
    train(tmp_path, objective=objective, steps=50, evaluate_every=0, checkpoint_every=50, learning_rate=3e-3)
    golden = json.loads(GOLDEN.read_text())[objective]
    assert losses(tmp_path) == pytest.approx(golden, abs=2e-6)
    assert np.mean(golden[-10:]) < np.mean(golden[:10])


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "mlm", "contexts": "packed", "scheme": "published"},
        {"objective": "clm", "contexts": "packed", "attention": ["favor", "exact"]},
        {"objective": "mlm", "contexts": "concatenated", "kernel": "softmax"},
        {"objective": "clm", "contexts": "concatenated", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_run_leaves_a_model_a_log_a_curve_and_a_record(
    changes: dict, tmp_path: Path, fasta: Path, train: Train
) -> None:
    result = train(tmp_path / "run", steps=4, validation=[str(fasta)], evaluate_proteins=5, **changes)
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    assert record["command"] == "pretrain"
    assert record["inputs"][0]["name"] == str(fasta)
    assert record["weights"][0]["sha256"] == outcome(run)[0]
    assert record["sessions"][0]["status"] == "finished"
    assert "Rethinking Attention with Performers" in (run / "cite.bibtex").read_text()
    assert list((run / "tensorboard").iterdir())
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert result.steps == 4
    assert result.evaluations["validation"]["proteins"] == 5
    model = open_model(result.model)
    # Tools warn beyond this length, also where the folder is moved away from its run.
    contexts = [read_config(folder / "config.yaml")["context"] for folder in (result.model, run)]
    assert contexts[0] == contexts[1]
    assert isinstance(model, PerformerForCausalLM if changes["objective"] == "clm" else PerformerForMaskedLM)
    assert model.config.mechanisms == (changes.get("attention") or ["favor", "favor"])


def test_training_lowers_the_loss_on_proteins_it_trains_on(tmp_path: Path, fasta: Path, train: Train) -> None:
    result = train(
        tmp_path, objective="clm", steps=150, learning_rate=1e-2, dropout=0.0, validation=[str(fasta)], evaluate_every=0
    )
    assert result.evaluations["validation"]["perplexity"] < result.evaluations["validation"]["baseline_perplexity"]


def test_resuming_across_a_redraw_gives_the_same_bits_and_evaluation_redraws_nothing(
    tmp_path: Path, train: Train
) -> None:
    changes = {"kernel": "softmax", "redraw_every": 3, "checkpoint_every": 4, "keep": 10}
    train(tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    train(tmp_path / "again", resume_from="step-00000004", **changes)
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")

    def projection(folder: Path) -> torch.Tensor:
        return next(tensor for name, tensor in open_model(folder).named_buffers() if name.endswith("projection"))

    first, second, third = (projection(path) for path in list_checkpoints(tmp_path / "whole"))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    model = open_model(tmp_path / "whole")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model.train(), in_memory_corpus([("a", "MKTAYIAKQRQISFVKSHFSRQ")]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_muon_lowers_the_loss_and_goes_on_to_the_same_bits(tmp_path: Path, train: Train) -> None:
    changes = {"steps": 40, "checkpoint_every": 20, "keep": 10, "learning_rate": 3e-3, "evaluate_every": 0}
    train(tmp_path / "whole", optimizer="muon", **changes)
    assert np.mean(losses(tmp_path / "whole")[-10:]) < np.mean(losses(tmp_path / "whole")[:10])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    train(tmp_path / "again", optimizer="muon", resume_from="step-00000020", **changes)
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")


def test_softmax_kernels_are_redrawn_by_default_and_relu_is_not(settings: Settings, tmp_path: Path) -> None:
    for kernel, interval in (("softmax", 1000), ("relu", 0)):
        config = PretrainConfig.parse(settings(tmp_path, kernel=kernel))
        assert redraw_interval(config, new_model(config)) == interval


@pytest.mark.parametrize("contexts", ["packed", "concatenated"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_the_tokens_of_a_step_do_not_depend_on_how_they_are_dealt_out(
    contexts: str, objective: str, settings: Settings, tmp_path: Path, fasta: Path
) -> None:
    corpus = in_memory_corpus(read_fasta(str(fasta)))

    def rows(step: int, size: int, micro_batch_size: int | None) -> dict[int, tuple[bytes, bytes]]:
        config = PretrainConfig.parse(
            settings(tmp_path, contexts=contexts, objective=objective, micro_batch_size=micro_batch_size)
        )
        source = Contexts(corpus, config.context, mode=config.contexts, seed=config.seed)
        found = {}
        for rank in range(size):
            for example in micro_batches(config, source, step, World(rank, size, torch.device("cpu"))):
                inputs = example["input_ids"].reshape(-1, config.context)
                labels = example["labels"].reshape(-1, config.context)
                for key, row, label in zip(example["dropout_keys"].tolist(), inputs, labels, strict=True):
                    found[key] = (row.numpy().tobytes(), label.numpy().tobytes())
        return found

    for step in (0, 1, 17):
        expected = rows(step, 1, None)
        assert list(expected) == [derive_seed(0, "dropout", step, step * 4 + row) for row in range(4)]
        for size, micro_batch_size in ((1, 1), (1, 3), (2, None), (2, 1), (4, None)):
            assert rows(step, size, micro_batch_size) == expected


def test_accumulated_gradients_take_the_steps_of_one_large_batch(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "at once")
    train(tmp_path / "in parts", micro_batch_size=1)
    assert losses(tmp_path / "in parts") == pytest.approx(losses(tmp_path / "at once"), abs=1e-5)


def test_checkpointed_gradients_and_bfloat16_stay_near_the_plain_losses(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "checkpointed", gradient_checkpointing=True)
    train(tmp_path / "bfloat16", dtype="bfloat16")
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "plain"), abs=0.05)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "plain")


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(tmp_path: Path, train: Train) -> None:
    train(tmp_path / "plain", contexts="concatenated", dropout=0.0)
    train(tmp_path / "compiled", contexts="concatenated", dropout=0.0, compile=True)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_step_is_taken(
    where: str, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "good", steps=6, checkpoint_every=2)
    forward = PerformerForMaskedLM.forward
    calls = 0

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += self.training
        output = forward(self, *args, **kwargs)
        if calls == 6 and self.training:
            weight = self.performer.norm.weight
            # The loss of the second is finite, its gradient is not.
            output.loss = (
                output.loss * float("nan") if where == "loss" else output.loss + (weight - weight).abs().sqrt().sum()
            )
        return output

    monkeypatch.setattr(PerformerForMaskedLM, "forward", poisoned)
    what = "The loss is nan" if where == "loss" else r"The gradient is not finite \(first in performer\.norm\.weight\)"
    with pytest.raises(NonFiniteError, match=rf"{what} at step 6; the step was not taken, and .*step-00000004"):
        train(tmp_path / "bad", steps=6, checkpoint_every=2)
    monkeypatch.undo()
    assert [load_progress(path).step for path in list_checkpoints(tmp_path / "bad")] == [2, 4]
    assert len(losses(tmp_path / "bad")) == 5
    train(tmp_path / "bad", steps=6, checkpoint_every=2)
    assert outcome(tmp_path / "bad") == outcome(tmp_path / "good")


def test_a_run_goes_on_with_the_settings_it_began_with_and_no_others(
    tmp_path: Path, train: Train, settings: Settings
) -> None:
    train(tmp_path / "run", steps=4)
    with pytest.raises(ConfigError, match=r"learning_rate=0\.5 \(the run has 0\.001\)"):
        train(tmp_path / "run", steps=4, learning_rate=0.5)
    assert PretrainConfig.for_run({"output": str(tmp_path / "run")}) == PretrainConfig.parse(
        settings(tmp_path / "run", steps=4)
    )


def test_a_run_that_failed_before_its_first_checkpoint_can_be_begun_anew(
    tmp_path: Path, fasta: Path, train: Train
) -> None:
    bad = tmp_path / "bad.fasta"
    bad.write_text(">a\nMKT1\n")
    with pytest.raises(InputError, match=r"bad\.fasta"):
        train(tmp_path / "run", input=[str(bad)])
    assert train(tmp_path / "run", input=[str(fasta)]).steps == 12


def test_training_starts_from_a_model_folder_with_another_objective(
    tmp_path: Path, train: Train, settings: Settings
) -> None:
    first = train(tmp_path / "masked", steps=4)
    changes = {"preset": None, "attention": None, "architecture": {}, "num_features": None, "dropout": None}
    second = train(
        tmp_path / "causal", steps=2, objective="clm", init_from=str(first.model), learning_rate=1e-9, **changes
    )
    before, after = open_model(first.model).state_dict(), open_model(second.model).state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "local"),
    [
        ({}, 1),
        ({"preset": "paper-regular"}, 0),
        ({"attention": ["favor"]}, 0),
        ({"sequence_parallel": 2}, 0),
        ({"architecture": {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}}, 0),
        ({"architecture": {"hidden_size": 16, "num_hidden_layers": 1, "attention_kwargs": {"num_features": 8}}}, 0),
    ],
    ids=["nothing", "the paper's size", "another attention", "rows on two processes", "one head", "its own arguments"],
)
def test_unless_something_else_is_asked_for_one_head_is_local(
    changes: dict[str, Any], local: int, settings: Settings, tmp_path: Path
) -> None:
    own_arguments = "attention_kwargs" in changes.get("architecture", {})
    features = {"num_features": None} if own_arguments else {"num_features": 8, "kernel": "elu"}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = settings(tmp_path, attention=None, architecture=sizes, **features)
    config = new_model(PretrainConfig.parse({**base, **changes})).config
    favor = {"kernel": "relu" if own_arguments else "elu", "num_features": 8}
    if local:
        window = {"first": "local", "first_kwargs": {"window": 16}}
        expected = {"heads": 1, **window, "second": "favor", "second_kwargs": favor}
        assert (config.attention, config.attention_kwargs) == ("split", expected)
    else:
        assert (config.attention, config.attention_kwargs) == ("favor", favor)


def test_a_corpus_folder_is_trained_on_where_it_is(tmp_path: Path, fasta: Path, train: Train) -> None:
    build_corpus(str(fasta), tmp_path / "corpus")
    train(tmp_path / "from corpus", input=[str(tmp_path / "corpus")], steps=3)
    train(tmp_path / "from fasta", steps=3)
    assert losses(tmp_path / "from corpus") == losses(tmp_path / "from fasta")
    assert not (tmp_path / "from corpus" / "corpus").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ["none.fasta"]}, "none.fasta"),
        ({"validation": ["none.fasta"]}, "none.fasta"),
        ({"preset": "enormous"}, "enormous"),
        ({"kernel": "sofmax"}, "sofmax"),
        ({"attention": ["exact"]}, "num_features belongs to favor attention"),
        ({"attention": ["favor", "exact", "favor"]}, "one per layer"),
        ({"architecture": {"hidden_size": 15}}, "hidden_size=15"),
        ({"architecture": {"hiden_size": 16}}, "hiden_size"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"contexts": "concatenated", "context": 100_000}, "smaller --context"),
        (
            {"init_from": "none", "preset": None, "attention": None, "architecture": {}, "num_features": None},
            "expected a model folder",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_one_sentence(changes: dict, message: str, tmp_path: Path, train: Train) -> None:
    with pytest.raises(InputError) as caught:
        train(tmp_path / "run", **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, train: Train) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        train(Path("/proc/run"))
