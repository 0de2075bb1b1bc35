"""Measure a trained model on any text: loss, perplexity, bits per byte, accuracy.

    jaxgpt evaluate runs/stdlib                                the text that training held out
    jaxgpt evaluate runs/stdlib data.source=other_texts/       all of another text
    jaxgpt evaluate runs/sentiment data.test=test.csv --json
    jaxgpt evaluate runs/stdlib --quantize int4                what quantization costs

The numbers are computed as those of the evaluations during training. The settings are the `data.*`
ones of the run's config, train.batch and train.eval_batches; any of them is set with path=value.
"""

import json
from typing import Any

from jaxgpt import config as configs
from jaxgpt import interrupts
from jaxgpt.cli import add_quantize, check_checkpoint, check_model, make_parser
from jaxgpt.script import print_text
from jaxgpt.suggestions import check_data_settings, check_options


def main(argv: list[str], program: str) -> int:
    """Print the metrics of the model of a run on a text.

    Returns:
        The exit status: 0, or 2 if no run is given.

    Raises:
        ConfigError: the folder is not a run, a setting is invalid, or the text cannot be read.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("run", nargs="?", help="a run folder of `jaxgpt train`")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="data.source=..., ...")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_quantize(parser)
    check_options(argv, parser, list_keys())
    args, more = parser.parse_known_intermixed_args(argv)
    if args.help or not args.run:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe('data.')}")
        return 0 if args.help else 2
    settings = args.settings + more
    check_model(args.run)
    check_checkpoint(args.checkpoint)
    values = configs.parse_assignments(settings)
    if wrong := [key for key in values if key not in list_keys()]:
        raise configs.ConfigError(
            f"{wrong[0]} belongs to the run: an evaluation takes data.*, train.batch and "
            "train.eval_batches."
        )
    check_data_settings(values)
    setting = choose_setting(values)

    from jaxgpt import console, evaluation, quantization

    if args.quantize is not None or args.group is not None:
        quantization.check_kind(args.quantize, args.group, "--quantize")
    interrupts.raise_keyboard_interrupt()
    model = console.load_model(args.run, args.checkpoint, settings)
    if not setting and model.config.data.test:
        setting = "test"
    found = evaluation.measure(model, setting, console.print_note)
    console.print_note(f"[{args.run}, step {model.step}, {found.text}]")
    cost: dict[str, Any] = {}
    if args.quantize:
        cost = evaluation.measure_quantized(model, found, args.quantize, args.group, setting)
    if args.json:
        labels = {"labels": found.labels} if "confusion" in found.values else {}
        facts = {"run": args.run, "step": model.step, "text": found.text, "unit": found.unit}
        print(json.dumps(facts | found.values | labels | cost))
    else:
        print_text(evaluation.format_measurement(found))
        if cost:
            print_text(evaluation.format_quantized(found, cost["quantized"]))
    return 0


def list_keys() -> list[str]:
    """Return the settings that an evaluation may change."""
    others = ("plugins", "train.batch", "train.eval_batches")
    keys = configs.list_fields(configs.Config)
    return [k for k in keys if k in others or (k.startswith("data.") and k != "data.tokenizer")]


def choose_setting(values: dict) -> str:
    """Return which source the arguments name: "source", "test", or "" if they name none.

    Raises:
        ConfigError: they name several.
    """
    given = [name for name in ("source", "test", "validation") if f"data.{name}" in values]
    if len(given) > 1:
        raise configs.ConfigError(
            f"data.{given[0]} and data.{given[1]} are two texts: evaluate on one at a time."
        )
    return given[0] if given and given[0] != "validation" else ""
