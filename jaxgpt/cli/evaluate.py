"""Measure a trained model: on any text, and on benchmarks.

    jaxgpt evaluate runs/stdlib                                the text that training held out
    jaxgpt evaluate runs/stdlib data.source=other_texts/       all of another text
    jaxgpt evaluate runs/sentiment data.test=test.csv --json
    jaxgpt evaluate runs/stdlib --quantize int4                what quantization costs on a text
    jaxgpt evaluate runs/stdlib --tasks blimp,wic --limit 10   benchmarks
    jaxgpt evaluate model.gguf --tasks mmlu --shots 5 --limit 2 --out results.json
    jaxgpt evaluate runs/stdlib --text essay.txt               perplexity per token, byte and word
    jaxgpt evaluate runs/stdlib --tasks blimp --contamination  what training has seen of it
    jaxgpt evaluate runs/a runs/b runs/c --emergence --text held_out.txt --out emergence.png

Loss, perplexity, bits per byte and accuracy on a text are computed as those of the evaluations
during training. The settings are the `data.*` ones of the run's config, train.batch and
train.eval_batches; any of them is set with path=value. Benchmarks are read from the folder --data
(or data.benchmarks=, or $JAXGPT_BENCHMARKS); every number has its standard error.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from jaxgpt import config as configs
from jaxgpt import interrupts
from jaxgpt.cli import (
    add_quantize,
    check_runs,
    get_quantization,
    make_parser,
    split_runs,
)
from jaxgpt.evaluate.tasks import TASKS
from jaxgpt.interop.formats import find_format
from jaxgpt.prompts import check_output, write_answers
from jaxgpt.script import print_text
from jaxgpt.settings import choose
from jaxgpt.suggestions import check_options

PERPLEXITY = "perplexity"  # stands among the tasks, and needs --text


def main(argv: list[str], program: str) -> int:
    """Print the metrics of the model of a run on a text, or on benchmarks.

    Returns:
        The exit status: 0, or 2 if no run is given.

    Raises:
        ConfigError: the folder is not a run, a setting is invalid, or the text cannot be read.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run folder, or any other model")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tasks", default="", help=f"benchmarks: {', '.join(TASKS)}; perplexity")
    parser.add_argument("--limit", type=int, default=0, help="questions of each group, 0 = all")
    parser.add_argument("--shots", type=int, help="worked examples before each question")
    parser.add_argument("--data", default="", help="the folder of the benchmarks' files")
    parser.add_argument("--text", default="", help="a text file or folder: its perplexity")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a batch (2048)")
    parser.add_argument("--contamination", action="store_true", help="n-grams seen in training")
    parser.add_argument("--ngram", type=int, default=8, help="n of --contamination, words (8)")
    parser.add_argument("--emergence", action="store_true", help="exact match against likelihood")
    parser.add_argument("--out", default="", help="results as .json; the figure of --emergence")
    add_quantize(parser)
    check_options(argv, parser, list_keys())
    args, more = parser.parse_known_intermixed_args(argv)
    runs, settings = split_runs(args.runs, more)
    if args.help or not runs:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe('data.')}")
        return 0 if args.help else 2
    reason = "belongs to the run: an evaluation takes data.*, train.batch and train.eval_batches."
    values = check_runs(runs, args.checkpoint, settings, list_keys(), reason)
    tasks = check_tasks(args)
    if len(runs) > 1 and not args.emergence:
        raise configs.ConfigError(
            f"{len(runs)} runs are given, {runs[1]} besides {runs[0]}: several are compared by "
            "--emergence, and evaluated one at a time."
        )
    interrupts.raise_keyboard_interrupt()
    if args.emergence:
        return compare_sizes(runs, args, settings)
    if tasks:
        return evaluate_tasks(runs[0], tasks, args, settings, values)
    return measure_text(runs[0], args, settings, values)


def check_tasks(args: argparse.Namespace) -> list[str]:
    """Return the names of the tasks, and check the options that belong to them.

    Raises:
        ConfigError: a task is not known, or an option is of no use.
    """
    tasks = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    for name in tasks:
        choose(dict.fromkeys([*TASKS, PERPLEXITY]), name, "--tasks")
    if args.text and not args.emergence and PERPLEXITY not in tasks:
        tasks.append(PERPLEXITY)
    needs = {
        "--text": (PERPLEXITY in tasks or args.emergence) and not args.text,
        "--tasks": (args.contamination or args.out) and not (tasks or args.emergence),
    }
    for option, is_missing in needs.items():
        if is_missing:
            user = next(x for x in ("emergence", "contamination", "out", "tasks")
                        if getattr(args, x))  # fmt: skip
            raise configs.ConfigError(f"--{user} needs {option} as well; --help has an example.")
    if args.limit < 0:
        raise configs.ConfigError(f"--limit {args.limit} must be at least 0 (all questions).")
    if args.ngram < 1 or args.batch_tokens < 1:
        raise configs.ConfigError("--ngram and --batch-tokens must be at least 1.")
    if args.out:
        check_output(args.out)
    return tasks


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


def measure_text(run: str, args: argparse.Namespace, settings: Sequence[str], values: dict) -> int:
    """Print the metrics of a model on a text, as training computes them."""
    setting = choose_setting(values)

    from jaxgpt import console, evaluation, quantization

    if args.quantize is not None or args.group is not None:
        quantization.check_kind(args.quantize, args.group, "--quantize")
    model = console.load_model(run, args.checkpoint, settings)
    if not setting and model.config.data.test:
        setting = "test"
    found = evaluation.measure(model, setting, console.print_note)
    console.print_note(f"[{run}, step {model.step}, {found.text}]")
    cost: dict[str, Any] = {}
    if args.quantize:
        cost = evaluation.measure_quantized(model, found, args.quantize, args.group, setting)
    if args.json:
        labels = {"labels": found.labels} if "confusion" in found.values else {}
        facts = {"run": run, "step": model.step, "text": found.text, "unit": found.unit}
        print(json.dumps(facts | found.values | labels | cost))
    else:
        print_text(evaluation.format_measurement(found))
        if cost:
            print_text(evaluation.format_quantized(found, cost["quantized"]))
    return 0


def evaluate_tasks(
    run: str, tasks: Sequence[str], args: argparse.Namespace, settings: Sequence[str], values: dict
) -> int:
    """Print what a model scores on benchmarks, and write it to --out."""
    from jaxgpt import console
    from jaxgpt.compile_cache import enable_compile_cache
    from jaxgpt.evaluate import contamination, texts
    from jaxgpt.evaluate import run as runs
    from jaxgpt.evaluate.tasks import find_folder, find_task, read_questions

    enable_compile_cache()
    folder = args.data or values.get("data.benchmarks", "")
    for name in tasks:
        if name != PERPLEXITY:
            find_folder(name, folder)  # before the model is read
    documents = texts.read_texts(args.text) if args.text else []
    if args.contamination and find_format(run) and "data.source" not in values:
        raise configs.ConfigError(
            f"--contamination: {run} was not trained here: name the text that it was trained on "
            "by data.source=..."
        )
    model = console.load_model(run, args.checkpoint, settings, **get_quantization(args))
    folder = folder or model.config.data.benchmarks
    kind = f", {model.quantized}" if model.quantized else ""
    console.print_note(f"[{run}, step {model.step}{kind}]")
    results, reports = [], {}
    for name in tasks:
        if name == PERPLEXITY:
            results.append(texts.measure_perplexity(model, documents, args.batch_tokens))
        else:
            shots = args.shots if len(tasks) == 1 or find_task(name).most_shots else None
            shown = read_questions(name, folder, args.limit, shots)
            if args.contamination:
                text = contamination.read_training_text(
                    model.config, model.tokenizer, run, console.print_note
                )
                reports[name] = contamination.find_contamination(shown.questions, text, args.ngram)
            shots = find_task(name).shots if shots is None else shots
            results.append(runs.ask(model, name, shown, shots, args.batch_tokens))
        if not args.json:
            print_text(runs.format_result(results[-1]))
            if name in reports:
                print_text(f"  contamination: {reports[name].format()}")
    content = runs.make_report(run, model.step, results, reports)
    if args.out:
        write_answers(args.out, [content])
        console.print_note(f"[{sum(len(x.answers) for x in results)} answers in {args.out}]")
    if args.json:
        print(json.dumps(content))
    return 0


def compare_sizes(runs: Sequence[str], args: argparse.Namespace, settings: Sequence[str]) -> int:
    """Print exact match and log-likelihood of several models on --text, and draw both."""
    from jaxgpt import console
    from jaxgpt.evaluate import emergence, texts

    documents = texts.read_texts(args.text)
    quantization = get_quantization(args)
    models = {x: console.load_model(x, args.checkpoint, settings, **quantization) for x in runs}
    points = emergence.measure_emergence(models, documents)
    print_text(emergence.format_points(points))
    if args.out:
        emergence.plot_emergence(points, args.out)
        console.print_note(f"[{args.out}]")
    return 0
