"""The table of families and formats in docs/interop.md, from the registries.

python -m tests.interop.table
"""

from jaxgpt.interop.families import FAMILIES
from jaxgpt.interop.gguf_architectures import ARCHITECTURES


def make_table() -> str:
    """Return the table as Markdown."""
    of_gguf = {kind for row in ARCHITECTURES.values() for kind in row.model_types}
    lines = ["| family | `model_type` | transformers | GGUF | llama2.c |", "|---|---|---|---|---|"]
    for kind, family in FAMILIES.items():
        gguf = "both ways" if kind in of_gguf else ""
        llama2c = "in" if kind == "llama" else ""
        lines.append(f"| {family.title} | `{kind}` | both ways | {gguf} | {llama2c} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(make_table(), end="")
