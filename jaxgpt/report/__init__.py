"""A report of a run: one offline HTML page to hand in.

    from jaxgpt import report

    report.write("runs/stdlib").save("report.html")

It has the config, the data, curves, samples, parameters, speed, evaluations, a look inside, and how
to repeat it. There is no script in it and nothing is requested: it opens from the disk, in dark and
light, and prints to paper or PDF.
"""

from jaxgpt.report.facts import Facts, make_command, read_facts
from jaxgpt.report.page import make_page, write

__all__ = ["Facts", "make_command", "make_page", "read_facts", "write"]
