"""The README, the documentation and the project's own files: they build, their links lead somewhere, and they agree."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import performers
from performers.models.bundled import bundled_names, describe

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ["performers", *(f"performers.{name}" for name in ("attention", "data", "models", "training"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    program = Path(sys.executable).with_name("mkdocs")
    command = [str(program), "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_documentation_builds_without_a_warning(site: Path) -> None:
    assert (site / "tutorial" / "index.html").is_file()


def test_the_command_line_reference_names_every_command(site: Path) -> None:
    page = (site / "command-line" / "index.html").read_text(encoding="utf-8")
    papers = ("cost", "concatenated", "quality", "context", "redraw", "recall")
    of_tools = ("contacts", "corpus", "design", "family", "finetuning", "interactions")
    names = ("training", "attention", "approximation", "conversion", *papers, *of_tools)
    tools = ("embed", "score", "contacts", "finetune", "predict", "generate", "read", "report", "models list")
    tools += ("interact train", "interact predict", "convert", "calibrate", "distil", "corpus build")
    for command in ("pretrain", "evaluate", "split", *tools, *(f"benchmark {name}" for name in names)):
        assert f">performers {command}<" in page
    assert "--resume-from" in page


def test_the_page_of_the_models_shows_the_figures_of_their_cards(site: Path) -> None:
    page = (site / "models" / "index.html").read_text(encoding="utf-8")
    for name in bundled_names():
        for figures in describe(name).held_out.values():
            assert f"{figures['accuracy']:.2%}" in page


def test_every_public_name_is_in_the_python_reference(site: Path) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("index.html"))
    headings = set(re.findall(r'<h\d id="performers\.[\w.]*?(\w+)" class="doc', reference))
    assert set(performers.__all__) - {"__version__"} <= headings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        if "://" in name or heading.startswith("performers."):  # the reference's own anchors: mkdocs checks them
            continue
        file = page.parent / name if name else page
        assert file.is_file(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings], target


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1] == performers.__version__


def test_the_citation_has_what_the_format_requires_and_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
        assert all({"family-names", "given-names"} == set(author) for author in reference["authors"])
    named = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert named == ["arXiv:2009.14794", "arXiv:2006.03555"]


def test_the_citation_file_names_the_papers_that_every_output_folder_cites() -> None:
    from performers.training.runs import CITATION

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for reference in citation["references"]:
        assert reference["title"] in CITATION
        for author in reference["authors"]:
            assert f"{author['family-names']}, {author['given-names']}" in CITATION


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{package}.{name}"
            own = vars(value).items() if inspect.isclass(value) and value.__module__.startswith("performers") else ()
            for member, method in own:
                if inspect.isfunction(method) and not member.startswith("_"):
                    assert method.__doc__, f"{package}.{name}.{member}"


def test_the_pictures_are_small_enough_for_a_repository() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 100_000, picture.name
