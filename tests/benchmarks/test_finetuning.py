"""The benchmark of finetuning on small files of the same form: who is in which set, and what the report says."""

from __future__ import annotations

import csv
import gzip
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from performers import PerformerConfig, PerformerForMaskedLM, PerformerTokenizer
from performers.benchmarks import experiment
from performers.benchmarks.finetuning import FinetuningSettings, avgfp, domains, measure_finetuning, tables
from performers.data import STANDARD_RESIDUES
from performers.errors import InputError

WILD_TYPE = "SKGEELFTGVVPILVELDGDVNGHKFSV"


@pytest.fixture(autouse=True)
def _unchanged_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be editing the package while the tests run: figures of another version are measured anew."""
    monkeypatch.setattr(experiment, "source_version", lambda: "under test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("finetuning")
    generator = random.Random(0)
    (folder / "wild-types.fasta").write_text(f">other\nMKT\n>avgfp numbered from 0\n{WILD_TYPE}\n")
    rows = ["variant,num_mutations,score", "S0*,1,1.3"]
    for number in range(80):
        count = 1 + number % 3
        places = sorted(generator.sample(range(len(WILD_TYPE)), count))
        names = [
            f"{WILD_TYPE[i]}{i}{generator.choice([a for a in STANDARD_RESIDUES if a != WILD_TYPE[i]])}" for i in places
        ]
        rows.append(f'"{",".join(names)}",{count},{4 - count + generator.random():.3f}')
    (folder / "avgfp.csv").write_text("\n".join(rows) + "\n")
    with gzip.open(folder / "scope.tsv.gz", "wt") as stream:
        for number in range(120):
            length = generator.randint(12, 30)
            sequence = "".join(generator.choices(STANDARD_RESIDUES, k=length))
            states = "".join(
                "H" if letter in "AEKLMQR" else "E" if letter in "VIFYW" else "TSLB"[number % 4] for letter in sequence
            )
            stream.write(f"d{number}\ta.{number // 3}.1.{number % 3}\t{sequence}\t{states}\n")
        stream.write("odd\ta.1.1.1\tMJT\tHHH\nodd\ta.1.1.1\tMKT\tHXH\n")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    PerformerForMaskedLM(PerformerConfig(**sizes, attention_kwargs={"num_features": 8})).save_pretrained(
        folder / "model"
    )
    PerformerTokenizer().save_pretrained(folder / "model")
    return {
        "variants": str(folder / "avgfp.csv"),
        "wild_type": str(folder / "wild-types.fasta"),
        "structures": str(folder / "scope.tsv.gz"),
        "model": str(folder / "model"),
    }


def test_stops_are_dropped_and_another_numbering_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    found = list(avgfp(files["variants"], files["wild_type"]))
    assert len(found) == 80
    for name, sequence, _, mutations in found:
        changed = [i for i, (old, new) in enumerate(zip(WILD_TYPE, sequence, strict=True)) if old != new]
        assert len(changed) == int(mutations) == name.count(":") + 1
        assert int(name.split(":")[0][1:-1]) == changed[0]
    (tmp_path / "from-one.csv").write_text("variant,num_mutations,score\nS1A,1,2.0\n")
    with pytest.raises(InputError, match=r"row 1 \(S1A\): .*residue 1 of the wild type is K"):
        list(avgfp(tmp_path / "from-one.csv", files["wild_type"]))


def test_structure_has_three_states_and_superfamilies(files: dict[str, Any]) -> None:
    found = list(domains(files["structures"]))
    assert len(found) == 120
    assert set("".join(states for _, _, states, _ in found)) == set("HEC")
    assert {superfamily for *_, superfamily in found} == {f"a.{number}.1" for number in range(40)}


def test_every_system_is_measured_within_mutations_and_across_superfamilies(
    files: dict[str, Any], tmp_path: Path
) -> None:
    settings = FinetuningSettings.of_size(
        True, **files, ways=("frozen",), proteins=90, steps=2, device="cpu", dtype="float32", threads=1
    )
    report = measure_finetuning(settings, tmp_path / "out", quick=True)
    assert report["failed"] == 0
    assert report["pictures"] == ["finetuning.png"]
    (_, header, body), (_, _, structure) = tables(report)
    assert header[:3] == ["system", "all", "1 mutation"]
    assert [row[0] for row in body] == ["frozen", "ridge on embeddings", "ridge on one-hot residues", "fewer mutations"]
    assert body[-1][2] == "undefined"  # all have one
    assert len(structure) == 3
    with (tmp_path / "out" / "structure.csv").open() as stream:
        sets = defaultdict(set)
        for row in csv.DictReader(stream):
            sets[row["group"]].add(row["split"])
    assert {len(names) for names in sets.values()} == {1}
    again = measure_finetuning(settings, tmp_path / "out", quick=True)
    assert again["cells"] == report["cells"]


def test_settings_that_make_no_sense_are_refused(files: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="nothing to measure on"):
        FinetuningSettings.of_size(True)
    with pytest.raises(InputError, match="--variants and --wild-type together"):
        FinetuningSettings.of_size(True, variants=files["variants"])
    with pytest.raises(InputError, match="--way half"):
        FinetuningSettings.of_size(True, structures=files["structures"], ways=("half",))
