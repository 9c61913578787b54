"""What it costs to read a corpus of any size: counted in numbers read and bytes of memory, not in time."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from performers.data import BOS, EOS, PAD, Contexts, Corpus, in_memory_corpus, order

SIZE = 350  # residues of each protein of an endless corpus
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


class Counted:
    """Numbers that are computed when asked for, so that there can be 10^12 of them; counts how many were."""

    def __init__(self, count: int, factor: int) -> None:
        self.count, self.factor, self.read = count, factor, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            self.read += place.stop - place.start
            return np.full(place.stop - place.start, 7, dtype=np.uint8)
        self.read += np.size(place)
        return np.asarray(place, dtype=np.int64) * self.factor


@pytest.mark.parametrize("mode", ["packed", "concatenated"])
def test_a_batch_reads_its_own_residues_and_offsets_however_large_the_corpus(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_MOST", 1 << 15)
    reads: dict[int, tuple[int, int, int]] = {}
    for proteins in (10**6, 10**9):
        tokens, offsets = Counted(proteins * SIZE, 1), Counted(proteins + 1, SIZE)
        corpus = Corpus(tokens, offsets, tokens, offsets)  # type: ignore[arg-type]
        assert corpus.num_residues == proteins * SIZE
        tracemalloc.start()
        contexts = Contexts(corpus, 1024, mode, seed=1)  # type: ignore[arg-type]
        contexts.rows(range(16))
        to_begin = offsets.read
        tokens.read = offsets.read = 0
        batch = contexts.rows(range(16, 48))
        reads[proteins] = tokens.read, offsets.read, to_begin
        # A permutation of 10^9 numbers would take 8 gigabytes.
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
        tracemalloc.stop()
        residues = int((batch.input_ids == 7).sum())
        pieces = int((batch.input_ids == BOS).sum() + (batch.input_ids == EOS).sum())
        assert 32 * 650 < residues <= tokens.read <= residues + 32 * SIZE
        assert offsets.read <= 2 * pieces
        # What is read once for a window depends on the window alone.
        assert to_begin < 8 * (1 << 15)
    assert max(read for _, read, _ in reads.values()) < 1.2 * min(read for _, read, _ in reads.values())


def test_offsets_and_residues_stay_on_the_disk(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("Linux alone tells what of a memory map is resident")
    text = "".join(f">{i}\n{(LETTERS * 2600)[: 40_000 + i % 9000]}\n" for i in range(1000))
    (tmp_path / "x.fasta").write_text(text)
    code = """
import sys
from performers.data import Contexts, build_corpus
corpus = build_corpus(sys.argv[1], sys.argv[2])
contexts = Contexts(corpus, 1024)
contexts.epoch_of(0)
contexts.rows(range(0, 80, 10))
resident, name = {}, ""
for line in open("/proc/self/smaps"):
    if ".bin" in line or ".npy" in line:
        name = line.split("/")[-1].strip()
    elif line.startswith("Rss:") and name:
        resident[name] = int(line.split()[1]) * 1024
        name = ""
print(resident["tokens.bin"], "offsets.npy" in resident)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.fasta"), str(tmp_path / "corpus")],
        capture_output=True,
        text=True,
        check=True,
    )
    resident, offsets_are_mapped = done.stdout.split()
    # The system maps some pages around one that is touched; the corpus has 44 MB.
    assert 8 * 1024 <= int(resident) < 11_000_000
    assert offsets_are_mapped == "True"


@pytest.fixture
def windows_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_MOST", 16)


def proteins_of(count: int) -> Corpus:
    random = np.random.Generator(np.random.PCG64(count))
    lengths = random.integers(1, 60, size=count)
    return in_memory_corpus((f"p{i}", "".join(random.choice(list(LETTERS), size))) for i, size in enumerate(lengths))


@pytest.mark.parametrize("count", [16, 17, 33, 100, 257])
@pytest.mark.parametrize("is_subset", [False, True])
def test_windows_hold_every_protein_once(windows_of_sixteen: None, count: int, is_subset: bool) -> None:
    corpus = proteins_of(2 * count).subset(np.arange(count) * 2 + 1) if is_subset else proteins_of(count)
    shuffled = order.ProteinOrder(corpus, seed=3)
    assert (shuffled.num_windows > 1) == (count > 16)
    for epoch in (0, 1):
        windows = [shuffled.window(epoch, number) for number in range(shuffled.num_windows)]
        assert sorted(np.concatenate(windows).tolist()) == list(range(count))
        assert max(map(len, windows)) <= 16 + count // 16
        tokens = [int((corpus.lengths[window] + 1).sum()) for window in windows]
        assert shuffled.tokens_before(epoch, 1).tolist() == [0, *np.cumsum(tokens).tolist()]
    assert shuffled.everything(0).tolist() != shuffled.everything(1).tolist()
    assert shuffled.everything(0).tolist() != sorted(shuffled.everything(0).tolist())


def test_packed_windows_lose_nothing_and_rows_depend_on_their_number_alone(windows_of_sixteen: None) -> None:
    corpus = proteins_of(100)
    contexts = Contexts(corpus, 48, seed=5)
    first, second = contexts.contexts_in_epoch(0), contexts.contexts_in_epoch(1)
    batch = contexts.rows(range(first, first + second))
    assert (batch.input_ids != PAD).sum() == contexts.num_tokens_per_epoch
    assert batch.segments is not None
    pieces = np.split(batch.input_ids.reshape(-1), batch.segments[1:-1])
    expected: Counter[tuple[int, ...]] = Counter()
    for ids in corpus:
        protein = (BOS, *ids.tolist(), EOS)
        expected.update(protein[start : start + 48] for start in range(0, len(protein), 48))
    assert Counter(tuple(piece.tolist()) for piece in pieces if piece[0] != PAD) == expected
    fresh = Contexts(corpus, 48, seed=5)
    for number in (first + second - 1, 3, first, 0):
        assert (fresh.rows([number]).input_ids == contexts.rows([number]).input_ids).all()
        assert fresh.epoch_of(number) == (number >= first)


def test_concatenated_windows_are_one_stream(windows_of_sixteen: None) -> None:
    corpus = proteins_of(100)
    contexts = Contexts(corpus, 100, "concatenated", seed=5)
    count = contexts.contexts_in_epoch(1)
    assert count == (corpus.num_residues + len(corpus)) // 99
    batch = contexts.rows(range(count, 2 * count))
    proteins = order.ProteinOrder(corpus, 5).everything(1)
    stream = np.concatenate([np.append(corpus[int(index)], EOS) for index in proteins])
    assert (batch.input_ids[:, 1:].reshape(-1) == stream[: count * 99]).all()
    alone = Contexts(corpus, 100, "concatenated", seed=5)
    for number in (2 * count - 1, count + 7, 1):
        assert (alone.rows([number]).input_ids == contexts.rows([number]).input_ids).all()
        assert alone.epoch_of(number) == number // count
