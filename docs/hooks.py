"""What mkdocs cannot read from the pages: numbers and tables that are computed from the code.

`<!-- table: settings -->` is replaced by a table of all settings, and the reading path gets the
numbers of lines of what it names.
"""

import ast
import pathlib
import re

from jaxgpt.config import Config
from jaxgpt.settings import get, list_fields, resolve_table

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = "<!-- table: settings -->"
READING_ROW = re.compile(r"^\| (`[\w/]+\.py`.*?) \| (.*) \|$", re.M)
EXTERNAL = re.compile(
    r"""<(?:script|img|iframe)[^>]*?\ssrc=["']?(?:https?:)?//[^>]*>|"""
    r"""<link[^>]*?rel=["']?stylesheet[^>]*?href=["']?(?:https?:)?//[^>]*>"""
)
READING_HEAD = "| read | for |\n|---|---|\n"


def format_settings() -> str:
    """Format every setting, its default, its meaning and its choices, a table per section."""
    sections: dict[str, list[str]] = {}
    defaults = Config()
    for key, field in list_fields(Config).items():
        default = {None: "none", "": "''", (): "''"}.get(get(defaults, key), get(defaults, key))
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        meaning = field.metadata["doc"].replace("|", "\\|").replace("*", "\\*")
        if field.metadata["table"]:
            choices = ", ".join(f"`{name}`" for name in resolve_table(field.metadata["table"]))
            meaning += f": {choices}"
        section = key.rpartition(".")[0] or "run"
        sections.setdefault(section, []).append(f"| `{key}` | `{default}` | {meaning} |")
    head = "| setting | default | meaning |\n|---|---|---|\n"
    return "\n\n".join(f"## {name}\n\n{head}" + "\n".join(rows) for name, rows in sections.items())


def count_lines(entry: str) -> int:
    """Count the lines of an entry of the reading path: "`file`", or "`file`: `name`, `name`".

    Raises:
        ValueError: the file does not define a name.
    """
    path, *names = re.findall(r"`([^`]+)`", entry)
    text = (ROOT / path).read_text()
    if not names:
        return len(text.splitlines())
    found = {
        node.name: node.end_lineno - min(n.lineno for n in (node, *node.decorator_list)) + 1
        for node in ast.parse(text).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"docs/reading.md: {path} has no {' and no '.join(missing)}.")
    return sum(found[name] for name in names)


def read_reading_path(markdown: str) -> list[tuple[str, str, int]]:
    """Return (what to read, for what, number of lines) of the rows of the reading path."""
    return [(entry, why, count_lines(entry)) for entry, why in READING_ROW.findall(markdown)]


def add_line_counts(markdown: str) -> str:
    """Add a column with the numbers of lines, and their total, to the reading path."""
    rows = read_reading_path(markdown)
    markdown = READING_ROW.sub(
        lambda match: f"| {match[1]} | {match[2]} | {count_lines(match[1])} |", markdown
    )
    total = f"| | **together** | **{sum(count for _, _, count in rows):,}** |"
    last = f"| {rows[-1][0]} | {rows[-1][1]} | {rows[-1][2]} |"
    markdown = markdown.replace(READING_HEAD, "| read | for | lines |\n|---|---|---:|\n")
    return markdown.replace(last, f"{last}\n{total}")


def on_post_page(output: str, page, **_) -> str:
    """Refuse a page that would load something from elsewhere (called by mkdocs)."""
    if found := EXTERNAL.findall(output):
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {', '.join(found)}.")
    return output


def on_page_markdown(markdown: str, page, **_) -> str:
    """Complete a page (called by mkdocs)."""
    if SETTINGS in markdown:
        return markdown.replace(SETTINGS, format_settings())
    return add_line_counts(markdown) if page.file.src_uri == "reading.md" else markdown
