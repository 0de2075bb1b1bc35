"""Plan large models on the TPU pods that they need, without a TPU.

    python -m benchmarks.pods                            every model, a few minutes each
    python -m benchmarks.pods --models llama_7b          one of them
    python -m benchmarks.pods --docs docs/plan.md  rewrite the table of that page

The step of every model is compiled by the TPU compiler (see jaxgpt/planning/tpu.py), and nothing
runs: memory, and the bytes that a chip sends, are those of the compiled program. "Theory" is what
fully sharded data parallelism must send: every parameter gathered in bfloat16 for the forward and
for the backward pass, and its gradient reduced and scattered, each (n - 1) / n of it.
"""

import argparse
import pathlib
import sys

from jaxgpt import config as configs
from jaxgpt.planning.chips import parse_topology
from jaxgpt.planning.plan import Plan, plan
from jaxgpt.script import run
from jaxgpt.settings import ConfigError, choose

GIB = 2**30
COMMON = ("model.dtype=bfloat16", "model.remat=full", "mesh.data=1", "mesh.fsdp=-1",
          "model.context=2048", "train.accumulate=1")  # fmt: skip
# Name: (config, topology, rows of a chip).
PODS = {
    "llama_7b": ("llama_7b", "v5e:4x4", 1),
    "llama_65b": ("llama_65b", "v5p:4x4x4", 1),
    "gpt3_175b": ("gpt3_175b", "v5p:4x4x8", 1),
}
BEGIN, END = "<!-- pods: begin -->", "<!-- pods: end -->"


def plan_pod(config: str, topology: str, rows: int) -> Plan:
    """Plan a config on a pod, with so many rows a chip."""
    batch = rows * parse_topology(topology).count
    cfg = configs.load(config, [*COMMON, f"train.batch={batch}"])
    return plan(cfg, topology=topology, quick=True)


def count_theory_bytes(found: Plan) -> float:
    """Return the bytes that a chip must send in one step of fully sharded data parallelism."""
    n = found.devices
    return 3 * 2 * found.parameters["total"] * (n - 1) / n


def format_row(found: Plan, topology: str) -> str:
    """Format a line of the table."""
    sent = sum(x.sent for x in found.exchanges)
    theory = count_theory_bytes(found)
    memory = found.memory
    return (
        f"| {found.name} | {found.parameters['total'] / 1e9:,.1f} | {topology} | {found.devices} "
        f"| {found.batch} x {found.tokens_per_step // found.batch} "
        f"| {memory['arguments'] / GIB:,.1f} | {memory['temporaries'] / GIB:,.1f} "
        f"| {memory['peak'] / memory['device']:.0%} | {sent / 1e9:,.1f} | {theory / 1e9:,.1f} "
        f"| {found.seconds_per_step:,.2f} |"
    )


HEADER = (
    "| config | 10^9 parameters | pod | chips | rows x tokens | state GiB | temporaries GiB "
    "| of the chip's memory | sent GB | theory GB | seconds at 40% MFU |\n"
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def write_table(path: pathlib.Path, table: str):
    """Replace the table between the marks of a page.

    Raises:
        ConfigError: the page has no marks.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ConfigError(f"{path} has no lines {BEGIN} and {END} around the table.")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default=",".join(PODS), help="comma-separated names")
    parser.add_argument("--docs", type=pathlib.Path, help="a page to write the table into")
    args = parser.parse_args(arguments)
    lines = [HEADER]
    for name in args.models.split(","):
        config, topology, rows = choose(PODS, name, "--models")
        lines.append(format_row(plan_pod(config, topology, rows), topology))
        print(lines[-1], flush=True)
    if args.docs:
        write_table(args.docs, "\n".join(lines))
    return 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
