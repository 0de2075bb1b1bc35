"""Show the loss of a model by position: whether it makes use of a long context, and how far.

    jaxgpt context runs/short --length 1024 --out context.png
    jaxgpt context runs/short runs/long --length 1024          the same text, side by side
    jaxgpt context runs/short model.context=1024 model.rope.scaling=yarn model.rope.factor=4

Settings are data.* (the text; by default what training held out), and model.rope.* with
model.context, which scale a rotary encoding without training it further; they hold for all runs.
"""

import dataclasses
import json

from jaxgpt import config as configs
from jaxgpt.cli import check_runs, make_parser, split_runs
from jaxgpt.cli.evaluate import choose_setting
from jaxgpt.prompts import check_output
from jaxgpt.script import print_text
from jaxgpt.sections import RopeConfig
from jaxgpt.suggestions import check_options


def main(argv: list[str], program: str) -> int:
    """Print the loss by position and draw it.

    Returns:
        The exit status: 0, or 2 if no run is given.

    Raises:
        ConfigError: there is no model, it has no such positions, or the text cannot be read.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, or any models")
    parser.add_argument("--length", type=int, default=0, help="tokens of a row (4 contexts)")
    parser.add_argument("--rows", type=int, default=64, help="rows of the text (64)")
    parser.add_argument("--out", default="", help="a figure, such as context.png")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    check_options(argv, parser, list_keys())
    args, more = parser.parse_known_intermixed_args(argv)
    runs, settings = split_runs(args.runs, more)
    if args.help or not runs:
        parser.print_help()
        return 0 if args.help else 2
    reason = "does not fit: settings of context are data.*, and model.rope.* with model.context."
    values = check_runs(runs, args.checkpoint, settings, list_keys(), reason)
    if "model.context" in values and not any(key.startswith("model.rope.") for key in values):
        raise configs.ConfigError(
            "model.context is of the scaling of a rotary encoding: set model.rope.scaling and "
            "model.rope.factor as well, or use --length."
        )
    if args.length < 0 or args.rows < 1:
        raise configs.ConfigError("--length and --rows must be at least 1.")
    if args.out:
        check_output(args.out)

    from jaxgpt import console, inspect, visualize

    models = {run: console.load_model(run, args.checkpoint, settings) for run in runs}
    first = next(iter(models.values()))
    length = args.length or values.get("model.context") or 4 * first.config.model.context
    for model in models.values():
        inspect.check_length(model, length)
        if model.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise configs.ConfigError(
                f"{runs[0]} and the others have different tokenizers, so their losses by token "
                "cannot be compared: show them one at a time."
            )
    rows = inspect.read_long_rows(
        first, length, args.rows, choose_setting(values), console.print_note
    )
    console.print_note(f"[{len(rows)} rows of {length} tokens]")
    found = {run: inspect.loss_by_position(model, rows) for run, model in models.items()}
    if args.json:
        bins = {run: [x._asdict() for x in one.bins] for run, one in found.items()}
        print(json.dumps({"length": length, "rows": len(rows), "bins": bins}))
    else:
        print_text(inspect.format_bins(found))
    if args.out:
        visualize.draw_context(found).savefig(args.out)
        console.print_note(f"[{args.out}]")
    return 0


def list_keys() -> list[str]:
    """Return the settings that may be changed."""
    rope = [f"model.rope.{field.name}" for field in dataclasses.fields(RopeConfig)]
    keys = configs.list_fields(configs.Config)
    data = [key for key in keys if key.startswith("data.") and key != "data.tokenizer"]
    return ["plugins", "model.context", *data, *rope]
