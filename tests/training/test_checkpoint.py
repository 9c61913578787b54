import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from victims import outcome

from performers.errors import CheckpointError, OutputError
from performers.folders import MANIFEST, sealed_folder, verify_folder
from performers.training import PretrainResult, open_model
from performers.training.run_folder import GENERATOR, OPTIMIZER, list_checkpoints, load_progress

Train = Callable[..., PretrainResult]
FIXTURE = Path(__file__).parent / "fixtures" / "run-format-1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., dict]) -> Path:
    from performers.training import PretrainConfig, pretrain

    return pretrain(
        PretrainConfig.parse(settings(tmp_path_factory.mktemp("run") / "run", steps=6, checkpoint_every=2))
    ).output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flip_a_bit(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut_in_half(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path, other: Path) -> None:
    file.unlink()


def swap_with_another_step(file: Path, other: Path) -> None:
    # Only files that differ between steps can be swapped; the others are the same file.
    if file.read_bytes() == other.read_bytes():
        file.write_bytes(other.read_bytes() + b" ")
    else:
        shutil.copy(other, file)


def test_every_kind_of_damage_to_every_file_is_found_named_and_the_previous_checkpoint_offered(run: Path) -> None:
    previous, last = list_checkpoints(run)
    files = sorted(path.name for path in last.iterdir())
    assert {"model.safetensors", "config.json", OPTIMIZER, GENERATOR, MANIFEST, "tokenizer.json"} <= set(files)
    for name in files:
        original = (last / name).read_bytes()
        for damage in (flip_a_bit, cut_in_half, empty, remove, swap_with_another_step):
            damage(last / name, previous / name)
            with pytest.raises(CheckpointError, match="previous checkpoint with --resume-from step-00000004") as caught:
                load_progress(last)
            assert name in str(caught.value), (name, damage.__name__)
            (last / name).write_bytes(original)
    assert load_progress(last).step == 6


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(run: Path, bit: int) -> None:
    last = list_checkpoints(run)[-1]
    manifest = last / MANIFEST
    original = manifest.read_bytes()
    for position in range(0, len(original), 7):
        content = bytearray(original)
        content[position] ^= 1 << bit
        manifest.write_bytes(content)
        with pytest.raises(CheckpointError):
            verify_folder(last)


@pytest.mark.parametrize("name", [OPTIMIZER, GENERATOR])
def test_a_checkpoint_without_its_optimizer_or_generator_is_refused_even_if_the_manifest_agrees(
    run: Path, name: str
) -> None:
    last = list_checkpoints(run)[-1]
    manifest = json.loads((last / MANIFEST).read_text())
    del manifest["files"][name]
    (last / MANIFEST).write_text(json.dumps(manifest))
    (last / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_progress(last)


def test_a_damaged_checkpoint_stops_the_run_and_resume_from_goes_on_to_the_same_end(run: Path, train: Train) -> None:
    expected = outcome(run)
    changes = {"steps": 6, "checkpoint_every": 2}
    flip_a_bit(list_checkpoints(run)[-1] / "model.safetensors", run)
    with pytest.raises(CheckpointError, match="SHA-256"):
        train(run, **changes)
    train(run, resume_from="step-00000004", **changes)
    assert outcome(run) == expected


def test_an_interrupted_write_leaves_nothing_that_is_taken_for_a_checkpoint(run: Path, train: Train) -> None:
    leftover = run / "checkpoints" / ".writing-step-00000008"
    shutil.copytree(list_checkpoints(run)[-1], leftover)
    train(run, steps=6, checkpoint_every=2)
    assert not leftover.exists()
    assert [path.name for path in list_checkpoints(run)] == ["step-00000004", "step-00000006"]


def test_a_failed_write_leaves_neither_the_folder_nor_a_part_of_it(tmp_path: Path) -> None:
    def fail() -> None:
        with sealed_folder(tmp_path / "sealed") as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    with sealed_folder(tmp_path / "sealed") as folder:
        (folder / "inside").write_text("inside")
    (tmp_path / "outside").write_text("outside")
    content = (tmp_path / "sealed" / MANIFEST).read_text()
    (tmp_path / "sealed" / MANIFEST).write_text(content.replace('"inside"', '"../outside"'))
    with pytest.raises(CheckpointError, match="outside the folder"):
        verify_folder(tmp_path / "sealed")


def test_a_run_of_format_1_can_be_read_and_goes_on_to_the_end_it_had(tmp_path: Path) -> None:
    from performers.training import PretrainConfig, pretrain

    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    expected = json.loads((run / "expected.json").read_text())
    (run / "expected.json").unlink()
    result = pretrain(PretrainConfig.for_run({"output": str(run)}))
    assert result.steps == expected["steps"]
    assert result.loss == pytest.approx(expected["loss"], rel=1e-5)
    model = open_model(run)
    assert model.get_input_embeddings().weight.abs().sum().item() == pytest.approx(expected["embedding_sum"], rel=1e-5)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "last.ckpt"])
def test_a_pickle_is_never_executed_and_the_refusal_says_what_to_do(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = run / "model"
    (model / "model.safetensors").unlink()
    (model / MANIFEST).unlink()
    torch.save({"weights": _Trap()}, model / name)
    for path in (model, model / name):
        with pytest.raises(CheckpointError, match=r"is a pickle.*save the model as safetensors"):
            open_model(path)
    assert not (tmp_path / "executed").exists()


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


HOSTILE = {
    "oversized header": header(b"{}", 1 << 60),
    "header longer than the file": header(b"{}", 1 << 20),
    "no JSON": header(b"\xff\xfe{{{"),
    "overlap": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    + bytes(12),
    "negative offset": header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}') + bytes(8),
    "huge offset": header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9223372036854775807]}}') + bytes(8),
    "shape does not fit": header(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}') + bytes(8),
    "shape overflows": header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}') + bytes(8),
    "duplicate key": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    )
    + bytes(16),
    "hole": header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}') + bytes(16),
    "names with ../": header(b'{"../../x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}') + bytes(8),
    "deep nesting": header(b"[" * 100_000),
    "other weights": header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}') + bytes(8),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_weights_file_is_refused(kind: str, run: Path) -> None:
    model = run / "model"
    (model / MANIFEST).unlink()
    (model / "model.safetensors").write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError):
        open_model(model)


def test_a_changed_model_folder_is_refused_until_its_manifest_is_removed(run: Path) -> None:
    model = run / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.0}))
    with pytest.raises(CheckpointError, match=r"After a change on purpose, remove manifest\.json"):
        open_model(model)
    (model / MANIFEST).unlink()
    assert open_model(model).config.hidden_dropout_prob == 0.0


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model folder"):
        open_model(tmp_path)


def test_a_run_folder_stands_for_its_model_and_before_that_for_its_newest_checkpoint(run: Path) -> None:
    final = open_model(run).state_dict()
    shutil.rmtree(run / "model")
    newest = open_model(run).state_dict()
    assert all(torch.equal(final[name], newest[name]) for name in final)


def test_a_run_is_refused_where_resuming_was_not_wanted_and_in_a_folder_of_other_things(
    run: Path, tmp_path: Path, train: Train
) -> None:
    with pytest.raises(OutputError, match="holds a run already"):
        train(run, resume=False, steps=6, checkpoint_every=2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("Chapter 1")
    with pytest.raises(OutputError, match="in use"):
        train(tmp_path / "thesis")
    with pytest.raises(OutputError):
        train(tmp_path / "thesis" / "thesis.tex")
