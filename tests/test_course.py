"""The notebooks are what their sources make, in both languages; a step of CI executes them."""

import pathlib
import runpy
import shutil

import nbformat
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


def spoil(path: pathlib.Path, change):
    """Apply a change to the first code cell with an output of a notebook file."""
    notebook = nbformat.read(path, as_version=4)
    change(next(cell for cell in notebook.cells if cell.get("outputs")))
    nbformat.write(notebook, path)


def drop_outputs(cell):
    cell.outputs = []


def drop_count(cell):
    cell.execution_count = None


def add_error(cell):
    cell.outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]))


def change_key(cell):
    cell.id = "another"


@pytest.mark.parametrize(
    ("language", "change", "message"),
    [
        ("fr", drop_outputs, "different outputs"),
        ("en", drop_count, "was not executed"),
        ("en", add_error, "ended with"),
        ("fr", change_key, "is not that of its source"),
    ],
)
def test_a_notebook_file_that_drifts_is_found(copied, language, change, message):
    spoil(build.find_notebook(copied, language), change)
    with pytest.raises(build.DriftError, match=message):
        build.check(copied)


def test_a_picture_that_is_not_there_is_found(copied):
    path = build.find_notebook(copied, "en")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            cell.outputs = []
    nbformat.write(notebook, path)
    with pytest.raises(build.DriftError, match="shows no picture"):
        build.check(copied)


@pytest.mark.parametrize("language", ["en", "fr"])
def test_a_list_without_one_of_the_cells_is_found(tmp_path, monkeypatch, language):
    lists = {}
    for name, path in build.LISTS.items():
        lists[name] = tmp_path / path.name
        shutil.copy(path, lists[name])
    lines = lists[language].read_text(encoding="utf-8").splitlines(keepends=True)
    lines.pop(next(n for n, line in enumerate(lines) if "softmax" in line))
    lists[language].write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(build, "LISTS", lists)
    with pytest.raises(build.DriftError, match="is not that of the notebooks"):
        build.check_lists()


def test_keeping_outputs_of_other_code_is_refused(copied):
    replace_once(copied, "import numpy as np", "import numpy")
    with pytest.raises(build.DriftError, match="execute it"):
        build.write(copied, keep_outputs=True)


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
