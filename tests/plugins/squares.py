"""A source of made-up text: data.source=squares:100 has 100 documents."""

from functools import partial

from jaxgpt.data.sources import SOURCES
from jaxgpt.data.units import SourceUnit


def list_squares(cfg):
    """Return one unit. Its facts are what the text depends on; `read` can be pickled."""
    count = int(cfg.source.partition(":")[2])
    return [SourceUnit(cfg.source, facts=["squares", count], size=20 * count,
                       read=partial(read_squares, count))]  # fmt: skip


def read_squares(count):
    """Yield (name, content, part, target) of each document."""
    for n in range(count):
        yield f"squares/{n}", f"the square of {n} is {n * n}.\n".encode(), "", b""


SOURCES["squares:"] = list_squares
