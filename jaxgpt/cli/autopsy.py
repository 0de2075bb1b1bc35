"""Show what a loss spike of a run was made of: its batch, and what that did to each layer.

    jaxgpt autopsy runs/stdlib              the last spike, and a list of all of them
    jaxgpt autopsy runs/stdlib 1250         the spike at step 1250
    jaxgpt autopsy runs/stdlib 1250 --json

With train.on_spike=skip or rollback a run goes on after a spike; see `jaxgpt train --help`.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxgpt.cli import make_parser, parse
from jaxgpt.config_files import find_run_config
from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError


def main(argv: list[str], program: str) -> int:
    """Print the autopsy of a loss spike.

    Returns:
        The exit status: 0, or 2 if no run is given.

    Raises:
        ConfigError: the folder is not a run, or has no such autopsy.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("run", nargs="?", help="a run folder of `jaxgpt train`")
    parser.add_argument("step", nargs="?", help="the step of a spike; the last one by default")
    parser.add_argument("--rows", type=int, default=8, help="how many rows of the batch to show")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all rows")
    args = parse(argv, parser, "run")
    if isinstance(args, int):
        return args
    find_run_config(args.run)

    from jaxgpt.trainer import autopsy

    found = autopsy.list_autopsies(args.run)
    steps = sorted({step for step, _ in found})
    chosen = [path for step, path in found if args.step in (None, str(step))]
    if not chosen:
        raise ConfigError(
            f"{args.run} has no autopsy of step {args.step}: there are those of "
            f"{', '.join(map(str, steps))}."
        )
    record = autopsy.read_autopsy(chosen[-1])
    if args.json:
        print(json.dumps(record))
        return 0
    print_text(format_autopsy(record, args.rows))
    if len(found) > 1 and args.step is None:
        print_text(f"\n{len(found)} spikes, at steps {', '.join(map(str, steps))}")
    return 0


def format_autopsy(record: Mapping[str, Any], max_rows: int) -> str:
    """Format the record of a spike as tables: the step, the layers, the rows, the losses before."""
    return "\n".join([
        f"spike at step {record['step']}, batch {record['batch']}: {record.get('reason', '')} "
        f"({record.get('action', '')})",
        f"loss {_format(record.get('loss'))}   gradient norm {_format(record.get('grad_norm'))}   "
        f"learning rate {_format(record.get('learning_rate'))}",
        *([f"means before: loss {_format(record['mean_loss'])}, gradient norm "
           f"{_format(record['mean_grad_norm'])}"] if record.get("steps") else []),
        "",
        *_format_layers(record["layers"]),
        "",
        *_format_rows(record["rows"], max_rows),
        *_format_losses(record.get("last_losses", [])),
    ])  # fmt: skip


COLUMNS = ("grad_norm", "param_norm", "update_norm", "update_scale")
TITLES = ("gradient", "parameters", "update", "update/param", "largest activation")


def _format_layers(layers: Mapping[str, Any]) -> list[str]:
    wide = max(5, *map(len, layers))
    lines = [f"{'layer':{wide}}" + "".join(f"  {title:>12}" for title in TITLES)]
    for name, values in layers.items():
        line = f"{name:{wide}}" + "".join(f"  {_format(values.get(k)):>12}" for k in COLUMNS)
        parts = values.get("largest_activations", {})
        shown = [f"{part} {_format(x['value'])} (row {x['row']})" for part, x in parts.items()]
        lines.append(f"{line}  {'  '.join(shown)}".rstrip())
    return lines


def _format_rows(rows: list[dict[str, Any]], max_rows: int) -> list[str]:
    """Format the rows of a batch, those with the highest loss first."""
    order = sorted(rows, key=lambda row: -_rank(row["loss"]))
    lines = [f"{'row':>4}  {'loss':>9}  text, the highest losses first"]
    for row in order[:max_rows]:
        text = " -> ".join(repr(row[key])[1:-1][:70] for key in ("source", "text") if key in row)
        if "class" in row:
            text += f" -> {row['class']}"
        lines.append(f"{row['row']:>4}  {_format(row['loss']):>9}  {text}")
    if len(order) > max_rows:
        lines.append(f"{'':>4}  {'':>9}  and {len(order) - max_rows} more (--rows, --json)")
    return lines


def _rank(loss: Any) -> float:
    return float(loss) if isinstance(loss, (int, float)) else float("inf")


def _format_losses(losses: list[dict[str, Any]]) -> list[str]:
    if not losses:
        return []
    shown = "  ".join(f"{x['step']}: {_format(x['loss'])}" for x in losses[-10:])
    return ["", f"losses before, by step: {shown}"]


def _format(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else value
