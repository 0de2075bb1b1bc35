"""The notebooks are what their sources make, in both languages; a step of CI executes them."""

import pathlib
import runpy
import shutil

import pytest

from notebooks import build

SOURCES = build.list_sources()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_both_editions_are_what_the_sources_make(source):
    build.check(source)


def test_the_lists_of_the_course_are_those_of_the_notebooks():
    build.check_lists()


@pytest.fixture
def copied(tmp_path, monkeypatch) -> pathlib.Path:
    """Return the source of a copy of the first notebook, which may be spoiled."""
    (tmp_path / "fr").mkdir()
    for path in (SOURCES[0], build.find_french(SOURCES[0])):
        shutil.copy(path, tmp_path / path.relative_to(build.FOLDER))
    for language in ("en", "fr"):
        path = build.find_notebook(SOURCES[0], language)
        shutil.copy(path, tmp_path / path.relative_to(build.FOLDER))
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    return tmp_path / SOURCES[0].name


def replace_once(path: pathlib.Path, old: str, new: str):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_changed_line_of_code_is_found(copied):
    replace_once(copied, "import numpy as np", "import numpy as numpy")
    with pytest.raises(build.DriftError, match="is not that of its source"):
        build.check(copied)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- cell: softmax -->\n", "", "lacks"),
        ("<!-- cell: softmax -->\n", "<!-- cell: softmax -->\n## Un titre\n\n", "in English"),
        ("<!-- cell: softmax -->\n", "<!-- cell: softmax -->\nUn mot.\n\n", "not that of its"),
        ("<summary>", "<summary", "not that of its"),
        ("/fr/01_mathematics.ipynb", "/01_mathematics.ipynb", "no badge"),
    ],
)
def test_french_prose_that_drifts_is_found(copied, old, new, message):
    replace_once(build.find_french(copied), old, new)
    with pytest.raises(build.DriftError, match=message):
        build.check(copied)


def test_an_exercise_without_its_solution_is_refused(copied):
    replace_once(copied, 'tags=["solution"]', 'tags=["check"]')
    with pytest.raises(build.DriftError, match="followed by"):
        build.read_english(copied)


def test_a_notebook_that_is_too_large_is_refused(copied, monkeypatch):
    monkeypatch.setattr(build, "MAX_BYTES", 1000)
    with pytest.raises(build.DriftError, match="bytes"):
        build.check(copied)


def test_every_notebook_is_a_page_of_the_site_in_both_languages():
    nav = (build.ROOT / "mkdocs.yml").read_text()
    pages = [f"course/{f}{source.stem}.md" for source in SOURCES for f in ("", "fr/")]
    assert not [page for page in pages if f"- {page}\n" not in nav]


def test_a_page_of_the_site_has_the_anchor_of_every_listed_cell():
    render = runpy.run_path(str(build.ROOT / "docs" / "course_pages.py"))["render"]
    for source in SOURCES:
        for language in ("en", "fr"):
            page, images = render(build.find_notebook(source, language))
            cells = build.read_english(source).cells
            keys = [cell.id for cell in cells if cell.cell_type == "markdown"]
            assert not [key for key in keys if f"#{key}}}" not in page and f'"{key}"' not in page]
            assert all(f"({name})" in page for name in images)
