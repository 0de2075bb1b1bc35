"""The large dose: see the package. Prints a table in Markdown, and JSON."""

import argparse
import json
import pathlib
import platform
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from . import Commands, Outcome, cost, damage, disks, elastic, kills, readers, soak, spikes

SCENARIOS = (
    "flips",
    "kills",
    "disks",
    "readers",
    "signals",
    "two_runs",
    "processes",
    "spikes",
    "soak",
    "cost",
)


def list_scenarios(args: argparse.Namespace, folder: pathlib.Path):
    """Yield (name, function) of each scenario, by the dose of the arguments."""
    commands = Commands(folder)

    def hurt(how, times):
        with tempfile.TemporaryDirectory() as place:
            return damage.damage(damage.SavedRun(pathlib.Path(place)), how, times)

    few = max(args.kills // 10, 1)
    yield "flips", lambda: hurt(damage.flip, args.flips)
    for how in (damage.cut, damage.zero, damage.remove):
        yield "flips", lambda how=how: hurt(how, args.flips // 5)
    yield "kills", lambda: kills.kill(commands, args.kills)
    yield "signals", lambda: kills.stop(commands, 2 * few)
    yield "two_runs", lambda: kills.start_twice(commands, few)
    if disks.can_mount():
        yield "disks", lambda: disks.fill(commands, 2 * few)
        for how in ("full for a while", "read-only", "vanished"):
            yield "disks", lambda how=how: disks.lose(commands, how)
    yield "readers", lambda: readers.read_beside_writer(folder / "read", args.reads)
    yield "processes", lambda: elastic.shrink(commands)
    yield "spikes", lambda: spikes.spoil(folder / "spikes", 2 * few)
    yield "cost", lambda: cost.measure(folder / "cost")
    if args.minutes:
        yield "soak", lambda: soak.soak(folder / "soak", args.minutes)


def format_row(outcome: Outcome, seconds: float) -> str:
    """Format an outcome as a row of the table."""
    facts = "; ".join(f"{name} {value}" for name, value in outcome.facts.items())
    return (
        f"| {outcome.scenario} | {outcome.dose:,} | {len(outcome.failures)} | {facts} | "
        f"{seconds:,.0f} s |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="kill -9; signals and others follow")
    parser.add_argument(
        "--flips", type=int, default=25, help="flipped bits; a fifth of other damage"
    )
    parser.add_argument("--reads", type=int, default=200, help="reads beside a writer")
    parser.add_argument("--minutes", type=float, default=0.5, help="of the soak; 0 leaves it out")
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="may be repeated")
    parser.add_argument("--json", help="a file for the results; otherwise they are printed")
    args = parser.parse_args()
    results = []
    print(f"{platform.machine()}, {jax.default_backend()}, jax {jax.__version__}\n")
    print("| scenario | dose | failures | details | time |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, run in list_scenarios(args, pathlib.Path(folder)):
            if args.only and name not in args.only:
                continue
            begin = time.monotonic()
            outcome = run()
            seconds = time.monotonic() - begin
            print(format_row(outcome, seconds), flush=True)
            for failure in outcome.failures:
                print(f"    {failure}", file=sys.stderr, flush=True)
            results.append(outcome._asdict() | {"seconds": round(seconds, 1)})
    text = json.dumps(results, indent=1)
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    else:
        print(f"\n{text}")
    return 1 if any(result["failures"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
