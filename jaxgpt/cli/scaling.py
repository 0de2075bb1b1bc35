"""Scaling laws: train a sweep of sizes and budgets, fit a law, predict a run before it is trained.

    jaxgpt scaling tune sweep/ --sizes 64,96,128 --tokens 1e6       the learning rate of each width
    jaxgpt scaling sweep sweep/ --sizes 48,64,96,128,160,192 --tokens 1e6,2e6,4e6
    jaxgpt scaling fit sweep/ --bootstrap 200
    jaxgpt scaling predict sweep/ --parameters 5e6 --tokens 1e8
    jaxgpt scaling predict sweep/ --flops 1e18                      the best size and budget
    jaxgpt scaling study study/ --out docs/scaling_laws.md          all of it, in about an hour
    jaxgpt scaling plot sweep/ --leave-out 192x6-2000 --out scaling.png

A sweep is resumed by the same command. `fit`, `predict` and `plot` also take a table (.csv with
parameters, tokens, loss, or parameters, flops, loss), or the name of a published law
(hoffmann, besiroglu). Settings of the runs are path=value, on top of --config.
"""

import csv
import dataclasses
import json
import os

from jaxgpt import config as configs
from jaxgpt.cli import make_parser
from jaxgpt.prompts import check_output
from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError, choose
from jaxgpt.suggestions import check_options

ACTIONS = ("sweep", "fit", "predict", "plot", "tune", "study")


def main(argv: list[str], program: str) -> int:
    """Run one of the actions.

    Returns:
        The exit status: 0, or 2 if no action or folder is given.

    Raises:
        ConfigError: an argument, a setting or the table is invalid.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("action", nargs="?", help=", ".join(ACTIONS))
    parser.add_argument("folder", nargs="?", help="of the sweep; or a .csv table")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="of the runs")
    parser.add_argument("--config", default="stdlib", help="of the runs (stdlib)")
    parser.add_argument("--sizes", default="", help="widths, or WIDTHxLAYERS: 64,96x3,128")
    parser.add_argument("--tokens", default="", help="budgets: 1e6,2e6; of predict, one")
    parser.add_argument("--parameters", type=float, help="of the predicted run")
    parser.add_argument("--flops", type=float, help="a budget: predict its best size and tokens")
    parser.add_argument("--count", default="all", help="N is all parameters, or no_embeddings")
    parser.add_argument("--compute", default="6ND", help="C is 6ND, or counted")
    parser.add_argument("--bootstrap", type=int, default=100, help="resamples for errors (100)")
    parser.add_argument("--leave-out", default="", help="runs that are predicted, not fitted")
    parser.add_argument("--isoflop", action="store_true", help="fit: also by approach 2")
    parser.add_argument("--out", default="", help="of plot (scaling.png); the report of study")
    parser.add_argument("--held-out", default="", help="of study: the predicted size (224x7)")
    parser.add_argument("--held-out-tokens", type=float, default=0, help="and its tokens (4e6)")
    parser.add_argument("--tune-tokens", type=float, default=0, help="of study's rates (5e5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    check_options(argv, parser, configs.list_fields(configs.Config))
    args, more = parser.parse_known_intermixed_args(argv)
    if args.help or not (args.action and args.folder):
        parser.print_help()
        return 0 if args.help else 2
    choose(dict.fromkeys(ACTIONS), args.action, "the action")
    args.settings += more
    run = {"sweep": _sweep, "tune": _tune, "fit": _fit, "predict": _predict, "plot": _plot,
           "study": _study}[args.action]  # fmt: skip
    run(args)
    return 0


def _parse_numbers(text: str, option: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}; give numbers such as 1e6,2e6.") from error
    if not numbers or min(numbers) <= 0:
        raise ConfigError(f"{option} {text}: give one number above 0, or several: 1e6,2e6.")
    return numbers


def _read_sweep(args):
    from jaxgpt.scaling.sweep import Size

    base = configs.load(args.config, args.settings)
    if not args.sizes:
        raise ConfigError("--sizes is missing: widths such as 64,96,128.")
    return base, [Size.parse(part) for part in args.sizes.split(",") if part]


def _sweep(args) -> None:
    from jaxgpt.scaling import sweep

    base, sizes = _read_sweep(args)
    rows = sweep.run_sweep(base, sizes, _parse_numbers(args.tokens, "--tokens"), args.folder)
    print_text(f"{len(rows)} runs in {os.path.join(args.folder, sweep.RUNS)}")


def _tune(args) -> None:
    from jaxgpt.scaling import sweep

    base, sizes = _read_sweep(args)
    law = sweep.tune(base, sizes, _parse_numbers(args.tokens, "--tokens")[0], args.folder)
    print_text(f"best learning rate: {law.coefficient:.3g} * width^{law.exponent:.2f}")


def _study(args) -> None:
    if args.out:
        check_output(args.out)

    from jaxgpt.scaling import study

    plan = study.Plan()
    changes = {
        "sizes": tuple(part for part in args.sizes.split(",") if part),
        "budgets": tuple(_parse_numbers(args.tokens, "--tokens")) if args.tokens else (),
        "held_out": args.held_out,
        "held_out_tokens": args.held_out_tokens,
        "tune_tokens": args.tune_tokens,
        "settings": (*plan.settings, *args.settings),
    }
    if sizes := changes["sizes"]:  # the three smallest
        changes["tuned"] = tuple(sorted(sizes, key=lambda x: study.Size.parse(x).width)[:3])
    plan = dataclasses.replace(plan, **{key: value for key, value in changes.items() if value})
    print_text(study.run_study(configs.load(args.config), args.folder, plan, args.out))


def read_table(path: str):
    """Return the runs of a .csv table, by the names of its columns.

    Raises:
        ConfigError: it has not the columns, or a value is no number.
    """
    from jaxgpt.scaling.laws import FLOPS_PER_PARAMETER, Run

    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    runs = []
    for number, row in enumerate(rows, 2):
        try:
            size, loss = float(row["parameters"]), float(row["loss"])
            flops = float(row["flops"]) if row.get("flops") else None
            if row.get("tokens"):
                tokens = float(row["tokens"])
            else:
                tokens = float(row["flops"]) / (FLOPS_PER_PARAMETER * size)
            runs.append(Run(size, tokens, loss, flops, row.get("name") or f"line {number}"))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(
                f"{path}, line {number}: {error!r}: a table has the columns parameters, loss, and "
                "tokens or flops."
            ) from error
    return runs


def _read_law(args, bootstrap: int):
    """Return (law, fitted runs, runs that were left out)."""
    from jaxgpt import scaling

    if args.folder in scaling.PUBLISHED:
        return scaling.PUBLISHED[args.folder], [], []
    if args.folder.endswith(".csv"):
        runs = read_table(args.folder)
    else:
        runs = scaling.read_runs(args.folder, args.count, args.compute)
    names = [name for name in args.leave_out.split(",") if name]
    kept = scaling.leave_out(runs, names)
    held_out = [run for run in runs if run.name in set(names)]
    return scaling.fit(kept, bootstrap=bootstrap), kept, held_out


def _describe_left_out(law, held_out) -> list[str]:
    lines = []
    for run in held_out:
        predicted = float(law.predict(run.parameters, run.tokens))
        lines.append(
            f"{run.name}: predicted {predicted:.4f}, measured {run.loss:.4f} "
            f"({predicted / run.loss - 1:+.2%})"
        )
    return lines


def _fit(args) -> None:
    from jaxgpt.scaling import fit_isoflop

    law, kept, held_out = _read_law(args, args.bootstrap)
    found = dict(zip(("E", "A", "B", "alpha", "beta"), law.constants.tolist(), strict=True))
    errors = dict(zip(found, law.errors.tolist(), strict=True))
    exponent = law.beta / (law.alpha + law.beta)
    if args.json:
        print(json.dumps({"law": found, "errors": errors, "runs": law.count,
                          "optimum_exponent": exponent}))  # fmt: skip
        return
    print_text(f"L(N, D) = E + A / N^alpha + B / D^beta, of {law.count} runs:\n  {law.format()}")
    print_text(f"  compute-optimal N ~ C^{exponent:.3f}, D ~ C^{1 - exponent:.3f}")
    for line in _describe_left_out(law, held_out):
        print_text(f"  {line}")
    if args.isoflop:
        iso = fit_isoflop(kept)
        print_text(
            f"approach 2 (parabolas over log N, {len(iso.budgets)} budgets): "
            f"N ~ C^{iso.parameters.exponent:.3f}, D ~ C^{iso.tokens.exponent:.3f}; biased where "
            "the sizes are spread far, off-center, or alpha differs from beta"
        )


def _predict(args) -> None:
    law, _, held_out = _read_law(args, args.bootstrap)
    if args.flops:
        size, tokens = law.optimum(args.flops)
    elif args.parameters and args.tokens:
        size, tokens = args.parameters, _parse_numbers(args.tokens, "--tokens")[0]
    elif held_out:
        for line in _describe_left_out(law, held_out):
            print_text(line)
        return
    else:
        raise ConfigError("predict takes --parameters and --tokens, or --flops, or --leave-out.")
    loss = float(law.predict(size, tokens))
    interval = None if law.samples is None else law.predict_interval(size, tokens)
    cost = law.cost_of_overtraining(size, tokens)
    if args.json:
        print(json.dumps({"parameters": size, "tokens": tokens, "loss": loss,
                          "interval": interval, "overtraining": cost}))  # fmt: skip
        return
    spread = "" if interval is None else f" (95%: {interval[0]:.4f} to {interval[1]:.4f})"
    print_text(f"{size:,.0f} parameters, {tokens:,.0f} tokens ({tokens / size:.1f} a parameter)")
    print_text(f"loss {loss:.4f} nats per token{spread}")
    print_text(f"compute: {cost:.2f} times that of the best run with this loss")


def _plot(args) -> None:
    from jaxgpt import scaling

    args.out = args.out or "scaling.png"
    check_output(args.out)
    law, kept, held_out = _read_law(args, args.bootstrap)
    if not kept:
        raise ConfigError(f"{args.folder} is a published law without runs: there is no plot.")
    scaling.plot_law(law, kept, held_out).savefig(args.out)
    print_text(args.out)
