"""Make the notebooks of the course, execute them, and check that nothing has drifted apart.

    python -m notebooks.build                     execute all, write both editions and the lists
    python -m notebooks.build 03 06               these only
    python -m notebooks.build --prose 03          write, but keep the outputs: no code was changed
    python -m notebooks.build --check             compare, write nothing: seconds
    python -m notebooks.build --check --execute   and execute all, at COURSE_SCALE: what CI does

notebooks/README.md has the rules of the sources.
"""

import argparse
import base64
import io
import os
import pathlib
import re
import sys
import time

import jupytext
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
COLAB = "https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks"
BADGE = "[![{text}](https://colab.research.google.com/assets/colab-badge.svg)]({colab}/{path})"
BADGE_TEXTS = {"en": "Open in Colab", "fr": "Ouvrir dans Colab"}
KINDS = {  # of the cells that docs/course.md and docs/cours.md list
    "concept": "concept",
    "example": "exemple",
    "lab": "labo",
    "exercise": "exercice",
    "question": "question",
    "picture": "figure",
}
LISTS = {"en": ROOT / "docs" / "course.md", "fr": ROOT / "docs" / "cours.md"}
LIST_HEADS = {"en": "| kind | cell |\n|---|---|\n", "fr": "| genre | cellule |\n|---|---|\n"}
LIST = re.compile(r"(?<=<!-- course -->\n).*?(?=<!-- end -->)", re.S)
FRENCH_CELL = re.compile(r"^<!-- cell: ([\w-]+) -->\n", re.M)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
HEADING = re.compile(r"^(#{1,4}) (.+)$", re.M)
MAX_BYTES = 400_000  # of a notebook file
MAX_COLORS = 128  # of a figure
DEADLINE = 900  # seconds for a cell
SETUP = """import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("jaxgpt") is None:  # in Colab
    source = "jaxgpt[inspect,measure] @ git+https://github.com/jaxgpt/jaxgpt"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

import matplotlib.pyplot as plt

scale = float(os.environ.get("COURSE_SCALE", "1"))  # below 1, long cells do less
plt.rcParams.update({"figure.figsize": (7, 3), "figure.dpi": 110, "axes.grid": True})
plt.rcParams.update({"grid.alpha": 0.3, "font.size": 9, "axes.axisbelow": True})"""


class DriftError(Exception):
    """Sources and what is made from them, or the two editions, differ."""


def list_sources() -> list[pathlib.Path]:
    """Return the English sources in order: notebooks/NN_slug.py."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def find_french(source: pathlib.Path) -> pathlib.Path:
    """Return the file with the French prose of a notebook."""
    return FOLDER / "fr" / f"{source.stem}.md"


def find_notebook(source: pathlib.Path, language: str) -> pathlib.Path:
    """Return the notebook that is made from a source."""
    folder = FOLDER if language == "en" else FOLDER / "fr"
    return folder / f"{source.stem}.ipynb"


def get_badge(source: pathlib.Path, language: str) -> str:
    """Return the badge that opens a notebook in Colab."""
    path = find_notebook(source, language).relative_to(FOLDER).as_posix()
    return BADGE.format(text=BADGE_TEXTS[language], colab=COLAB, path=path)


def require(condition, message: str):
    """Raise DriftError with a message unless the condition holds."""
    if not condition:
        raise DriftError(message)


def get_tags(cell) -> list[str]:
    """Return the tags of a cell."""
    return cell.metadata.get("tags", [])


def read_english(source: pathlib.Path) -> nbformat.NotebookNode:
    """Read a source as a notebook without outputs; a cell's id is its key.

    Raises:
        DriftError: a key is missing or occurs twice, or a rule of notebooks/README.md is broken.
    """
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    key, count, keys = "", 0, set()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            key, count = cell.metadata.get("key", ""), 0
            require(re.fullmatch(r"[a-z0-9-]{1,50}", key), f"no key: {cell.source[:60]!r}")
            require(key not in keys, f"two cells have the key {key!r}")
            keys.add(key)
            cell.id = key
        else:
            count += 1
            cell.id = f"{key}--{count}"
    check_rules(notebook, source)
    return notebook


def check_rules(notebook: nbformat.NotebookNode, source: pathlib.Path):
    """Raise DriftError if an English notebook breaks a rule of notebooks/README.md."""
    title, setup, *cells = notebook.cells
    require(HEADING.match(title.source), "the first cell has no title")
    require(get_badge(source, "en") in title.source, f"no badge: {get_badge(source, 'en')}")
    require(setup.source == SETUP, "the second cell is not SETUP of notebooks/build.py")
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        kinds = [tag for tag in get_tags(cell) if tag in KINDS]
        if not kinds:
            continue
        require(cell.cell_type == "markdown" and len(kinds) == 1, f"{cell.id}: tags {kinds}")
        require(HEADING.match(cell.source), f"{cell.id}: a {kinds[0]} begins with a heading")
        if kinds == ["question"]:
            require(
                "<details>" in cell.source, f"{cell.id}: a question has its answer in <details>"
            )
        if kinds == ["picture"]:
            require(after is not None and after.cell_type == "code", f"{cell.id}: no picture")
    check_exercises(cells)


def check_exercises(cells: list):
    """Raise DriftError unless every exercise is followed by cells reader, solution, check."""
    wanted = ["reader", "solution", "check"]
    found: list[str] = []
    for n, cell in enumerate(cells):
        tags = [tag for tag in get_tags(cell) if tag in wanted]
        found += tags
        if "exercise" in get_tags(cell):
            following = [t for c in cells[n + 1 : n + 4] for t in get_tags(c)]
            require(following == wanted, f"{cell.id}: followed by {following}, not {wanted}")
        if tags == ["solution"]:
            is_hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
            require(is_hidden and cell.metadata.get("cellView") == "form", f"{cell.id}: not hidden")
    count = sum("exercise" in get_tags(cell) for cell in cells)
    require(found == wanted * count, f"{count} exercises have the cells {found}")


def read_french(source: pathlib.Path) -> dict[str, str]:
    """Return the French prose of a notebook by key.

    Raises:
        DriftError: a key occurs twice.
    """
    text = find_french(source).read_text(encoding="utf-8")
    _, *parts = FRENCH_CELL.split(text)
    keys, texts = parts[::2], [part.strip() for part in parts[1::2]]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    require(not twice, f"{find_french(source).name}: twice: {twice}")
    return dict(zip(keys, texts, strict=True))


def outline(text: str) -> dict[str, object]:
    """Return what both editions of a markdown cell must have in common."""
    prose = FENCE.sub("", text)
    return {
        "headings": [len(marks) for marks, _ in HEADING.findall(prose)],
        "answers": text.count("<details>"),
        "blocks of code": len(FENCE.findall(text)),
        "rows of tables": len(re.findall(r"^\|", prose, re.M)),
    }


def translate(notebook: nbformat.NotebookNode, source: pathlib.Path) -> nbformat.NotebookNode:
    """Return the French edition of an English notebook: the same code, cell by cell.

    Raises:
        DriftError: the prose of a cell is missing, left over, or built differently.
    """
    french = read_french(source)
    english = {c.id: c.source for c in notebook.cells if c.cell_type == "markdown"}
    name = f"fr/{find_french(source).name}"
    require(not (missing := list(english.keys() - french.keys())), f"{name} lacks {missing}")
    require(not (extra := list(french.keys() - english.keys())), f"{name} has only {extra}")
    require(list(french) == list(english), f"{name}: cells in another order")
    for key, text in english.items():
        ours, theirs = outline(text), outline(french[key])
        require(ours == theirs, f"{name}: cell {key}: {theirs}; in English {ours}")
    require(get_badge(source, "fr") in french[notebook.cells[0].id], f"{name}: no badge")
    result = nbformat.from_dict(notebook)
    for cell in result.cells:
        if cell.cell_type == "markdown":
            cell.source = french[cell.id]
    return result


def execute(notebook: nbformat.NotebookNode):
    """Execute a notebook top to bottom in its folder; the outputs are put into it, small."""
    from nbclient import NotebookClient

    here = {"metadata": {"path": str(FOLDER)}}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"}
    client = NotebookClient(notebook, timeout=DEADLINE, resources=here, record_timing=False)
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = list(map(shrink_output, cell.outputs))
    check_pictures(notebook)


def check_pictures(notebook: nbformat.NotebookNode):
    """Raise DriftError if the cell after a picture's heading shows none."""
    for cell, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if "picture" in get_tags(cell):
            kinds = {kind for output in after.outputs for kind in output.get("data", {})}
            require(kinds & {"image/png", "text/html"}, f"{cell.id}: the cell shows no picture")


def shrink_output(output):
    """Return an output with its figure in few colors, and without the figure's name as a text."""
    data = output.get("data", {})
    if "image/png" in data:
        from PIL import Image

        image = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        small = io.BytesIO()
        image.quantize(MAX_COLORS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        data["image/png"] = base64.b64encode(small.getvalue()).decode()
        data.pop("text/plain", None)
        output.metadata = {}
    return output


def copy_outputs(notebook: nbformat.NotebookNode, path: pathlib.Path):
    """Put the outputs of a notebook file into one with the same code.

    Raises:
        DriftError: the code differs, or there is no such file.
    """
    require(path.exists(), f"{path.name} does not exist")
    old = nbformat.read(path, as_version=4)
    codes = [[c.source for c in n.cells if c.cell_type == "code"] for n in (old, notebook)]
    require(codes[0] == codes[1], f"{path.name} has other code: execute it")
    outputs = iter([c for c in old.cells if c.cell_type == "code"])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            before = next(outputs)
            cell.outputs, cell.execution_count = before.outputs, before.execution_count


def format_list(language: str) -> str:
    """Format the list of all cells of a kind: a table for each notebook, a row for each cell."""
    parts = []
    for source in list_sources():
        cells = read_english(source).cells
        french = read_french(source) if language == "fr" else {}
        path = os.path.relpath(find_notebook(source, language), ROOT / "docs")
        rows = []
        for cell in cells:
            for kind in set(get_tags(cell)) & set(KINDS):
                text = french.get(cell.id, cell.source)
                title = HEADING.match(text)[2].replace("|", "\\|")
                name = KINDS[kind] if language == "fr" else kind
                rows.append(f"| {name} | [{title}]({path}#{cell.id}) |\n")
        title = HEADING.match(french.get(cells[0].id, cells[0].source))[2]
        head = f"## [{title}]({path})\n\n{LIST_HEADS[language]}"
        parts.append(f"\n{head}{''.join(rows)}\n")
    return "".join(parts)


def make_list(language: str) -> str:
    """Return the page that lists the course, with the table made anew."""
    text = LISTS[language].read_text(encoding="utf-8")
    return LIST.sub(lambda _: format_list(language), text)


def compare(source: pathlib.Path, notebook: nbformat.NotebookNode, language: str):
    """Raise DriftError if a notebook file, but for its outputs, is not what its source makes."""
    path = find_notebook(source, language)
    require(path.exists(), f"{path.name} does not exist")
    require(path.stat().st_size <= MAX_BYTES, f"{path} has {path.stat().st_size:,} bytes")
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    pairs = zip(found.cells, notebook.cells, strict=False)
    for ours, made in pairs:
        is_same = (ours.cell_type, ours.source, ours.metadata, ours.id) == (
            made.cell_type, made.source, made.metadata, made.id,
        )  # fmt: skip
        require(is_same, f"{path}: cell {made.id} is not that of its source")
    require(len(found.cells) == len(notebook.cells), f"{path} has {len(found.cells)} cells")
    codes = [cell for cell in found.cells if cell.cell_type == "code"]
    require(all(cell.execution_count for cell in codes), f"{path} was not executed to its end")
    for cell in codes:
        failed = [o.ename for o in cell.outputs if o.output_type == "error"]
        require(not failed, f"{path}: cell {cell.id} ended with {failed}")
    check_pictures(found)


def check(source: pathlib.Path):
    """Raise DriftError unless both notebook files are what their sources make."""
    english = read_english(source)
    french = translate(english, source)
    compare(source, english, "en")
    compare(source, french, "fr")
    files = [nbformat.read(find_notebook(source, lang), as_version=4) for lang in ("en", "fr")]
    outputs = [[c.get("outputs") for c in file.cells] for file in files]
    require(outputs[0] == outputs[1], f"{source.stem}: the editions show different outputs")


def check_lists():
    """Raise DriftError unless docs/course.md and docs/cours.md are what the notebooks make."""
    for language, path in LISTS.items():
        is_same = path.read_text(encoding="utf-8") == make_list(language)
        require(is_same, f"{path.name} is not that of the notebooks: python -m notebooks.build")


def write(source: pathlib.Path, keep_outputs: bool):
    """Write both editions of a notebook."""
    english = read_english(source)
    translate(english, source)  # fails before anything is executed
    if keep_outputs:
        copy_outputs(english, find_notebook(source, "en"))
    else:
        execute(english)
    for notebook, language in ((english, "en"), (translate(english, source), "fr")):
        path = find_notebook(source, language)
        path.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, path)


def build(source: pathlib.Path, args: argparse.Namespace):
    """Do what the command line asks for with one notebook."""
    if not args.check:
        return write(source, args.prose)
    check(source)
    if args.execute:
        execute(read_english(source))


def main():
    """Make or check the notebooks that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m notebooks.build",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("numbers", nargs="*", help="such as 03; without any, all")
    parser.add_argument("--check", action="store_true", help="compare; write nothing")
    parser.add_argument("--execute", action="store_true", help="with --check: execute as well")
    parser.add_argument("--prose", action="store_true", help="keep the outputs of unchanged code")
    args = parser.parse_args()
    sources = [s for s in list_sources() if not args.numbers or s.stem[:2] in args.numbers]
    try:
        for source in sources:
            start = time.perf_counter()
            build(source, args)
            size = find_notebook(source, "en").stat().st_size
            seconds = time.perf_counter() - start
            print(f"{source.stem}: {seconds:.1f} s, {size / 1000:.0f} kB", flush=True)
        if args.check:
            check_lists()
        else:
            for language, path in LISTS.items():
                path.write_text(make_list(language), encoding="utf-8")
    except DriftError as error:
        sys.exit(f"notebooks.build: {source.stem}: {error}")


if __name__ == "__main__":
    main()
