import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from performers.errors import InputError, OutputError
from performers.tools import embed, score
from performers.tools.reporting import report

PROTEINS = {
    "first": "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ",
    "<b>second</b>&co": "MNIFEMLRIDEGLRLKIYKDTEGYYTIGIGHLLTK",
    "pair": "MVLSPADKTNVKAAW:MVHLTPEEKSAVTALWGK",
    "fourth": "GDVEKGKKIFIMKCSQCHTVEKGGKHKTGPNLHG",
}


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items()))
    return path


class Reader(HTMLParser):
    """What a browser would fetch, and whether all that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows_of(table: Path) -> list[dict[str, str]]:
    header, *lines = table.read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_report_is_one_page_that_fetches_nothing_and_escapes_names(
    kind: str, folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    outcome = report(tmp_path / "report.html", [str(fasta)], folders(kind))
    assert outcome.items == len(PROTEINS)
    assert not outcome.failed
    text = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert reader.fetched
    assert all(address.startswith("data:image/png;base64,") for address in reader.fetched)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert "<b>second" not in text
    assert "<b>second</b>&co" in unescape(text)
    assert {"run.json", "cite.bibtex", "methods.txt", "report.tsv"} <= {path.name for path in tmp_path.iterdir()}
    methods = (tmp_path / "methods.txt").read_text()
    assert len(re.findall(r"\.(?=\s)", methods.replace("et al.,", ""))) == 2  # sentences, about what was done
    assert "4 proteins" in methods
    assert "contacts were predicted by a logistic regression on attention maps (Rao et al., 2021)" in methods
    assert ("substitutions were scored by masked-marginals" in methods) == (kind == "masked")
    assert ("masked at a time" in methods) == (kind == "masked")
    assert methods.strip() in unescape(text)


def test_the_figures_of_a_report_are_those_of_the_tools(
    folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    report(tmp_path / "report.html", [str(fasta)], folders("masked"), chosen="fourth")
    rows = rows_of(tmp_path / "report.tsv")
    assert [row["id"] for row in rows] == list(PROTEINS)
    vectors = np.stack([found.mean for found in embed(str(fasta), folders("masked"))]).astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    places = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(centred @ directions[:2].T) == pytest.approx(np.abs(places), abs=1e-4)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(len(unit))
    assert [row["nearest"] for row in rows] == [list(PROTEINS)[place] for place in cosines.argmax(axis=1)]
    assert [float(row["cosine"]) for row in rows] == pytest.approx(cosines.max(axis=1), abs=1e-5)

    singles: dict[str, list[float]] = {}
    for single in score(PROTEINS["fourth"], model=folders("masked"), strategy="masked-marginals"):
        if single.status == "ok":
            assert single.score is not None
            singles.setdefault(single.mutant[:-1], []).append(single.score)
    worst = min(singles, key=lambda name: float(np.mean(singles[name])))
    page = (tmp_path / "report.html").read_text()
    assert re.search(rf"<tr><td>{worst}</td><td class=\"number\">{np.mean(singles[worst]):.2f}</td>", page)


def test_interactions_and_designs_are_shown_beside_the_proteins(
    folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    pairs, designs = tmp_path / "pairs.tsv", tmp_path / "designs.tsv"
    pairs.write_text("p0\tp1\tprob\nfirst\tfourth\t0.9\nfirst\tpair\t0.1\n")
    designs.write_text("id\tlog_likelihood\ndesign-1\t-2.5\n")
    report(tmp_path / "report.html", [str(fasta)], folders("masked"), interactions=pairs, designs=designs)
    page = (tmp_path / "report.html").read_text()
    assert 'alt="Matrix of interactions"' in page
    assert "<td>design-1</td><td>-2.5</td>" in page


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ({"chosen": "nobody"}, "", "There is no protein 'nobody' in the input"),
        ({"interactions": "table"}, "p0\tp1\tprob\na\tb\t1.5\n", "row 1: prob is '1.5'; expected a number from 0 to 1"),
        ({"interactions": "table"}, "a\tb\n1\t2\n", "p0"),
        (
            {"interactions": "table"},
            "group\tp0\tp1\tprob\ng\ta\tb\t0.5\nh\ta\tb\t0.9\n",
            "row 2, is of group 'h' and the rows before it of 'g'",
        ),
        ({"designs": "table"}, "id\n", "has no rows; expected designs"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_in_one_sentence(
    options: dict[str, Any], content: str, message: str, folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.tsv"
    table.write_text(content)
    options = {name: table if value == "table" else value for name, value in options.items()}
    with pytest.raises(InputError, match=re.escape(message)):
        report(tmp_path / "report.html", [str(fasta)], folders("masked"), **options)
    assert not (tmp_path / "report.html").exists()


def test_every_chain_of_the_chosen_protein_is_looked_at(
    folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    report(tmp_path / "report.html", [str(fasta)], folders("masked"), chosen="pair")
    page = (tmp_path / "report.html").read_text()
    worst: list[tuple[float, str]] = []
    for number, chain in enumerate(PROTEINS["pair"].split(":"), start=1):
        assert f'alt="Every substitution of chain {number}"' in page
        singles: dict[str, list[float]] = {}
        for single in score(chain, model=folders("masked"), strategy="masked-marginals"):
            if single.status == "ok":
                assert single.score is not None
                singles.setdefault(single.mutant[:-1], []).append(single.score)
        worst += [(float(np.mean(scores)), f"{name} of chain {number}") for name, scores in singles.items()]
    shown = re.findall(r'<tr><td>(\w+ of chain \d)</td><td class="number">(-?[\d.]+)</td>', page)
    assert [(name, float(mean)) for name, mean in shown] == [
        (name, round(mean, 2)) for mean, name in sorted(worst)[:10]
    ]


def test_without_scikit_learn_a_report_is_made_without_contacts(
    folders: Callable[[str], Path], fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("sklearn", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = report(tmp_path / "report.html", [str(fasta)], folders("masked"))
    assert outcome.figures["contacts"] is False
    page = (tmp_path / "report.html").read_text()
    assert 'alt="Every substitution"' in page
    assert 'alt="Contacts"' not in page
    for said in (unescape(page), capsys.readouterr().err):
        assert re.search(r"Without contacts: .*pip install 'performers\[tools\]'", said)
    assert "contacts" not in (tmp_path / "methods.txt").read_text()


def test_a_dry_run_fits_nothing(
    folders: Callable[[str], Path], fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fit(*_: object) -> None:
        raise AssertionError("a dry run has fitted a regression")

    monkeypatch.setattr("performers.tools.reporting.fit_regression", fit)
    before = sorted(tmp_path.iterdir())
    outcome = report(tmp_path / "report.html", [str(fasta)], folders("masked"), dry_run=True)
    assert not outcome.done
    assert "would be fitted first" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_table_that_is_shown_is_not_replaced_by_that_of_the_report(
    folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "report.tsv"
    pairs.write_text("p0\tp1\tprob\nfirst\tfourth\t0.9\n")
    with pytest.raises(OutputError, match=r"report\.tsv is there already"):
        report(tmp_path / "report.html", [str(fasta)], folders("masked"), interactions=pairs)
    assert pairs.read_text() == "p0\tp1\tprob\nfirst\tfourth\t0.9\n"


def test_a_report_made_again_has_the_same_bytes(folders: Callable[[str], Path], fasta: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        report(tmp_path / name / "report.html", [str(fasta)], folders("masked"))
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium to open the page in")
def test_a_browser_shows_every_section_and_sorts_a_table(
    folders: Callable[[str], Path], fasta: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    report(page, [str(fasta)], folders("masked"))
    # A click on the head of the third column, that of lengths, and then what the page has become.
    page.write_text(
        page.read_text().replace(
            "</body>", "<script>document.querySelectorAll('#proteins th')[2].click()</script></body>"
        )
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-quic",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]

    def chromium(*arguments: str) -> str:
        command = ["chromium", *flags, *arguments, f"file://{page}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    dump = chromium("--dump-dom")
    shown = [
        int(number)
        for number in re.findall(r'<tr><td class="number">\d+</td><td>.*?</td><td class="number">(\d+)</td>', dump)
    ]
    assert shown == sorted(len(sequence.replace(":", "")) for sequence in PROTEINS.values())
    for section in ("overview", "map", "proteins", "chosen", "methods"):
        assert f'<section id="{section}">' in dump
    chromium(f"--screenshot={tmp_path / 'page.png'}", "--window-size=900,700")
    assert (tmp_path / "page.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = imread(tmp_path / "page.png")
    assert picture.shape[:2] == (700, 900)
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20  # text and pictures, not an empty page
