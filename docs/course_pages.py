"""The notebooks of the course as pages of the site, in both languages, made while mkdocs builds.

notebooks/NN_slug.ipynb becomes course/NN_slug.md, notebooks/fr/NN_slug.ipynb course/fr/NN_slug.md,
and every figure a file beside it: nothing is kept twice, and no page needs a script. The heading of
a cell has its key as anchor, so that docs/course.md can link to each.
"""

import base64
import html
import json
import pathlib
import re

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
LINK = re.compile(r"\((?:\.\./)+notebooks/((?:fr/)?\d\d_\w+)\.ipynb(#[\w-]+)?\)")
NEIGHBOR = re.compile(r"\(((?:\.\./)?(?:fr/)?\d\d_\w+)\.ipynb(#[\w-]+)?\)")
BADGE = re.compile(r"\[!\[(.+?)\]\(https://colab\..+?\)\](\(https://colab\..+?\))")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
CODE_TITLES = {
    "setup": ("Set up", "Préparation"),
    "reader": ("Your answer", "Votre réponse"),
    "solution": ("Solution", "Solution"),
    "check": ("Check", "Vérification"),
}


def join(source: str | list[str]) -> str:
    """Return a field of a notebook's JSON, a string or its lines, as a string."""
    return source if isinstance(source, str) else "".join(source)


def fence(text: str, language: str) -> str:
    """Return a block of code."""
    marks = "```" if "```" not in text else "````"
    return f"{marks}{language}\n{text.rstrip()}\n{marks}\n"


def fold(title: str, text: str) -> str:
    """Return a text that is folded away under its title."""
    return f'<details markdown="1"><summary>{title}</summary>\n\n{text}\n</details>\n'


def render_markdown(cell: dict) -> str:
    """Return a markdown cell: its key an anchor, its answers markdown too, its badge a link."""
    text = join(cell["source"]).replace("<details>", '<details markdown="1">')
    text = NEIGHBOR.sub(r"(\1.md\2)", BADGE.sub(r"[\1]\2{ .md-button }", text))
    text, count = re.subn(r"^(#+ .+)$", rf"\1 {{#{cell['id']}}}", text, count=1, flags=re.M)
    return text + "\n" if count else f'<span id="{cell["id"]}"></span>\n\n{text}\n'


def render_output(output: dict, name: str, images: dict[str, bytes]) -> str:
    """Return an output as markdown; figures are put into `images`."""
    data = output.get("data", {})
    if "image/png" in data:
        images[f"{name}.png"] = base64.b64decode(join(data["image/png"]))
        return f"![{name.replace('_', ' ')}]({name}.png)\n"
    if "text/html" in data and "<table" in join(data["text/html"]):
        return f"{join(data['text/html'])}\n"
    if "text/html" in data:  # a page of its own, such as that of jaxgpt look
        return f'<iframe srcdoc="{html.escape(join(data["text/html"]))}"></iframe>\n'
    text = ANSI.sub("", join(output.get("text", data.get("text/plain", ""))))
    return fence(text, "text") if text.strip() else ""


def render_code(cell: dict, name: str, language: int, images: dict[str, bytes]) -> str:
    """Return a code cell and its outputs; the set-up and solutions are folded away."""
    code = fence(join(cell["source"]), "python")
    tags = [tag for tag in cell["metadata"].get("tags", []) if tag in CODE_TITLES]
    if tags:
        title = CODE_TITLES[tags[0]][language]
        is_folded = tags[0] in ("setup", "solution")
        code = fold(title, code) if is_folded else f"**{title}**\n\n{code}"
    outputs = (
        render_output(output, f"{name}_{n}", images) for n, output in enumerate(cell["outputs"])
    )
    return "\n".join([code, *outputs])


def render(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as a page of markdown, and its figures by file name."""
    images: dict[str, bytes] = {}
    language = int(path.parent.name == "fr")
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(render_markdown(cell))
        else:
            name = f"{path.stem}_{cell['id'].replace('--', '_')}"
            parts.append(render_code(cell, name, language, images))
    return "\n".join(parts), images


def on_files(files, config, **_):
    """Add a page for each notebook, and its figures (called by mkdocs)."""
    from mkdocs.structure.files import File

    for path in sorted(NOTEBOOKS.rglob("[0-9][0-9]_*.ipynb")):
        folder = "course/fr" if path.parent.name == "fr" else "course"
        text, images = render(path)
        files.append(File.generated(config, f"{folder}/{path.stem}.md", content=text))
        for name, image in images.items():
            files.append(File.generated(config, f"{folder}/{name}", content=image))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Let links to notebooks lead to their pages (called by mkdocs)."""
    return LINK.sub(r"(course/\1.md\2)", markdown)
