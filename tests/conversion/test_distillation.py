"""A converted model learns from its original: the losses fall, a killed run goes on, and what comes out opens again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import performers
from performers.conversion.distillation import DistilConfig, Distillation, distil
from performers.conversion.teaching import Classroom
from performers.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from performers.folders import sha256_of
from performers.training.run_folder import RunResult, list_checkpoints, run_task

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
Original = Callable[[str], Path]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty sequences, a line each."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "sequences.txt"
    path.write_text("".join("".join(draw.choices(RESIDUES, k=draw.randint(5, 30))) + "\n" for _ in range(60)))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """The folder of a small random model with a tokenizer of residues, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name in made:
            return made[name]
        tokenizer = performers.PerformerTokenizer(add_eos=True)
        torch.manual_seed(0)
        common: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if name == "GPT2LMHeadModel":
            config: Any = transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        else:
            config = transformers.BertConfig(**common, **SIZE, max_position_embeddings=64)
        model = getattr(transformers, name)(config)
        with torch.no_grad():  # small random weights attend to everything alike, which leaves nothing to learn
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(10)
        made[name] = tmp_path_factory.mktemp(name) / "original"
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def converted(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(name: str, **arguments: Any) -> Path:
        folder = tmp_path_factory.mktemp(name) / "converted"
        arguments = {"num_features": 32, **arguments}
        performers.convert(performers.load(original(name)), "favor", **arguments).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(original(name)).save_pretrained(folder)
        return folder

    return make


def settings(model: Path, texts: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "input": [str(texts)],
        "output": str(output),
        "stages": ["layers:4", "end:4"],
        "batch_size": 4,
        "learning_rate": 3e-3,
        "layers_learning_rate": 3e-3,
        "held_out": 0.2,
        "evaluate_every": 4,
        "checkpoint_every": 3,
        "threads": 1,
        "device": "cpu",
        **changes,
    }


def run(*arguments: Any, resume_from: str | None = None, **changes: Any) -> RunResult:
    return run_task(
        Distillation(DistilConfig.parse(settings(*arguments, **changes))), resume=True, resume_from=resume_from
    )


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log(folder) if "learning_rate" in entry]


def outcome(folder: Path) -> tuple[str, bytes]:
    return sha256_of(folder / "model" / "model.safetensors"), (folder / "log.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_layer_by_layer_and_then_end_to_end_the_student_comes_nearer_to_the_teacher(
    name: str, converted: Callable[..., Path], original: Original, texts: Path, tmp_path: Path
) -> None:
    result = run(converted(name), texts, tmp_path / "run", stages=["layers:60", "end:60"], evaluate_every=60)
    found = losses(tmp_path / "run")
    assert sum(found[50:60]) < 0.7 * sum(found[:10])  # by layer
    assert sum(found[110:]) < 0.7 * sum(found[60:70])  # end to end
    before, between, after = (entry for entry in log(tmp_path / "run") if "evaluation" in entry)
    assert [entry["step"] for entry in (before, between, after)] == [0, 60, 120]
    assert after["divergence"] < between["divergence"] < before["divergence"]
    assert result.evaluations["validation"] == after
    assert (tmp_path / "run" / "quality.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"] == "distil"
    assert record["sessions"][0]["status"] == "finished"

    model = performers.load(result.model)
    assert type(model).__name__ == name
    assert model.config._attn_implementation == "favor"
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.model)
    inputs = tokenizer("MKTAYIAKQR", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    teacher = performers.load(original(name))
    student = performers.load(converted(name))
    with torch.no_grad():
        expected, first, last = (m(**inputs).logits.log_softmax(-1) for m in (teacher, student, model))
    assert (last - expected).square().mean() < (first - expected).square().mean()


def test_the_teacher_is_the_original_whether_it_is_given_or_not(
    converted: Callable[..., Path], original: Original, texts: Path, tmp_path: Path
) -> None:
    folder = converted("BertForMaskedLM")
    run(folder, texts, tmp_path / "same weights")
    run(folder, texts, tmp_path / "given", teacher=str(original("BertForMaskedLM")))
    assert losses(tmp_path / "given") == losses(tmp_path / "same weights")


def test_a_layer_that_computes_what_the_teacher_does_has_nothing_to_learn(
    original: Original, texts: Path, tmp_path: Path
) -> None:
    """`sparse` with a window that covers everything is exact attention: this proves that layers get the teacher's inputs."""
    model = performers.convert(performers.load(original("BertForMaskedLM")), "sparse", stride=64)
    model.save_pretrained(tmp_path / "converted")
    transformers.AutoTokenizer.from_pretrained(original("BertForMaskedLM")).save_pretrained(tmp_path / "converted")
    run(tmp_path / "converted", texts, tmp_path / "run", learning_rate=1e-12, layers_learning_rate=1e-12)
    assert max(losses(tmp_path / "run")) < 1e-6
    start = log(tmp_path / "run")[0]
    assert start["accuracy"] == start["teacher_accuracy"]
    assert start["cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"lora": 2}, {"objective": "finetune", "stages": None, "steps": 8}], ids=str)
def test_a_run_that_goes_on_in_either_stage_ends_bit_identical(
    changes: dict[str, Any], converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
    folder = converted("BertForMaskedLM")
    run(folder, texts, tmp_path / "whole", keep=10, **changes)
    assert [path.name for path in list_checkpoints(tmp_path / "whole")] == [f"step-{n:08d}" for n in (3, 6, 8)]
    for step in (3, 6):
        again = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", again)
        run(folder, texts, again, keep=10, resume_from=f"step-{step:08d}", **changes)
        assert outcome(again) == outcome(tmp_path / "whole")


def test_a_step_does_not_depend_on_how_its_rows_are_batched(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = converted("BertForMaskedLM")
    run(folder, texts, tmp_path / "at once")
    run(folder, texts, tmp_path / "in parts", micro_batch_size=1, evaluate_tokens=1)
    assert losses(tmp_path / "in parts") == pytest.approx(losses(tmp_path / "at once"), abs=1e-5)
    for one, other in zip(log(tmp_path / "at once"), log(tmp_path / "in parts"), strict=True):
        if "evaluation" in one:
            assert other["divergence"] == pytest.approx(one["divergence"], abs=1e-5)
            assert other["tokens"] == one["tokens"]


def test_adapters_alone_are_trained_and_merged_into_a_folder_that_opens(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder = converted("BertForMaskedLM")
    result = run(folder, texts, tmp_path / "run", lora=2)
    trained = list_checkpoints(tmp_path / "run")[-1] / "trained.safetensors"
    assert trained.stat().st_size < 0.2 * (folder / "model.safetensors").stat().st_size
    before, after = performers.load(folder).state_dict(), performers.load(result.model).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"bert.encoder.layer.{layer}.attention.self.{part}.weight"
        for layer in range(2)
        for part in ("query", "key", "value")
    }


def test_a_projection_that_can_be_learned_is_learned_and_saved(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = converted("BertForMaskedLM", trainable=True)
    result = run(folder, texts, tmp_path / "run")
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def projection(path: Path) -> torch.Tensor:
        from performers.conversion.interface import mechanism_of

        model = performers.load(path)
        with torch.no_grad():
            model(ids)
        mechanism = mechanism_of(model.bert.encoder.layer[0].attention.self)
        assert mechanism is not None
        return next(tensor for name, tensor in mechanism.state_dict().items() if name.endswith("projection"))

    assert not torch.equal(projection(folder), projection(result.model))


def test_an_encoder_without_a_head_learns_its_teachers_embeddings(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = converted("BertModel")
    run(folder, texts, tmp_path / "run", stages=["end:40"], evaluate_every=40)
    before, after = (entry for entry in log(tmp_path / "run") if "evaluation" in entry)
    assert before["cosine"] < after["cosine"] <= 1
    with pytest.raises(UnsupportedError, match="no language modelling head"):
        run(folder, texts, tmp_path / "other", objective="finetune", stages=None, steps=4)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_fine_tuning_lowers_the_loss_of_the_original_objective(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "same.txt").write_text("MKTAYIAKQRQISFVKSHFSRQ\n" * 8)
    changes = {"objective": "finetune", "stages": None, "steps": 60, "validation": [str(tmp_path / "same.txt")]}
    run(converted(name), tmp_path / "same.txt", tmp_path / "run", evaluate_every=60, **changes)
    before, after = (entry for entry in log(tmp_path / "run") if "evaluation" in entry)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > before["accuracy"]


def test_sequences_that_are_measured_on_are_never_trained_on_even_if_they_repeat(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "twice.txt").write_text(texts.read_text() * 2)
    run(converted("BertForMaskedLM"), tmp_path / "twice.txt", tmp_path / "run", stages=["end:1"])
    training, held_out = ((tmp_path / "run" / name).read_text().split() for name in ("sequences.txt", "validation.txt"))
    assert len(training) + len(held_out) == 120
    assert not set(training) & set(held_out)


def test_dropout_is_off_unless_it_is_asked_for(converted: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    folder = converted("BertForMaskedLM")
    for dropout in (False, True):
        config = DistilConfig.parse(settings(folder, texts, tmp_path, dropout=dropout))
        student = Classroom(config, ["MKTAY"], ["MKTAY"]).student(None)
        assert {module.training for module in student.modules()} == {dropout}


def test_longer_sequences_are_refused_cut_or_left_out_as_asked(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = converted("BertForMaskedLM")
    (tmp_path / "long.txt").write_text("M" * 100 + "\nMKTAY\n")
    with pytest.raises(InputError, match=r"1 of 2 sequences are longer than 64 tokens, first sequence 1 with 102"):
        run(folder, tmp_path / "long.txt", tmp_path / "error", validation=[str(texts)])
    for on_long, lengths in (("cut", [64, 7]), ("skip", [7])):
        config = DistilConfig.parse(settings(folder, texts, tmp_path, on_long=on_long))
        classroom = Classroom(config, ["M" * 100, "MKTAY"], ["MKTAY"])
        assert [len(sequence) for sequence in classroom.training] == lengths
        eos = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
        assert {int(sequence[-1]) for sequence in classroom.training} == {eos}


def test_what_was_trained_already_needs_its_original_as_the_teacher(
    converted: Callable[..., Path], original: Original, texts: Path, tmp_path: Path
) -> None:
    result = run(converted("BertForMaskedLM"), texts, tmp_path / "run")
    with pytest.raises(InputError, match="give the original with --teacher"):
        run(result.model, texts, tmp_path / "again")
    run(result.model, texts, tmp_path / "again", teacher=str(original("BertForMaskedLM")))


def test_a_teacher_of_another_kind_or_size_is_refused(
    converted: Callable[..., Path], original: Original, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="The teacher is a BertModel, the student a BertForMaskedLM"):
        run(converted("BertForMaskedLM"), texts, tmp_path / "run", teacher=str(original("BertModel")))
    wider = transformers.BertConfig(vocab_size=30, **{**SIZE, "hidden_size": 64})
    transformers.BertForMaskedLM(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(ConfigError, match="has 30 tokens, hidden states of 64 and 2 attention layers, the student"):
        run(converted("BertForMaskedLM"), texts, tmp_path / "run", teacher=str(tmp_path / "wider"))


def test_a_run_does_not_go_on_with_a_converted_model_that_has_changed(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = converted("BertForMaskedLM")
    run(folder, texts, tmp_path / "run")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what it was when the run"):
        run(folder, texts, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": ["layers:0"]}, "expected layers:STEPS, end:STEPS"),
        ({"stages": ["end:3", "layers:3"]}, "expected layers:STEPS, end:STEPS"),
        ({"stages": ["end:3"], "steps": 4}, "expected their sum to be steps=4"),
        ({"stages": ["end:3"], "objective": "finetune"}, "stages and objective='finetune' exclude each other"),
        ({"stages": ["layers:30", "end:3"], "warmup_steps": 3}, "expected fewer than a stage has, 3"),
        ({"stages": ["end:3"], "input": ["none.txt"]}, "none.txt"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_in_one_sentence(
    changes: dict[str, Any], words: str, converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, InputError)) as caught:
        run(converted("BertForMaskedLM"), texts, tmp_path / "run", **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_steps_alone_are_dealt_out_to_the_stages() -> None:
    config = DistilConfig.parse({"model": "m", "input": "x", "output": "o", "steps": 10})
    assert config.stages == ["layers:3", "end:7"]
    assert [config.stage_at(step)[0] for step in range(10)] == ["layers"] * 3 + ["end"] * 7
    assert DistilConfig.parse({"model": "m", "input": "x", "output": "o"}).steps == 1000


def test_a_model_that_is_not_converted_is_refused(original: Original, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a converted model"):
        distil(original("BertForMaskedLM"), texts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_function_and_the_command_take_the_same_settings(
    converted: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = converted("BertForMaskedLM")
    given = settings(folder, texts, tmp_path / "a")
    result = distil(
        folder, texts, tmp_path / "b", **{k: v for k, v in given.items() if k not in ("model", "input", "output")}
    )
    run(folder, texts, tmp_path / "a")
    assert outcome(result.output) == outcome(tmp_path / "a")
