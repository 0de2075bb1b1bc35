"""Extend a context: a model trained on short rows goes on at four times their length.

    python -m benchmarks.context runs_of_context/ --source my_texts/ --steps 600 --more 150

It trains one model on rows of 64 bytes, goes on from it in three ways on rows of 256 (the encoding
as it is, YaRN, a larger base), and measures the loss by position of all of them, and of YaRN
without further training, on the same held-out rows. docs/howto/context.md has what came out.
"""

import argparse
import dataclasses
import json
import os

from jaxgpt import config as configs
from jaxgpt import inspect, load, train, visualize

CONTEXT, FACTOR = 64, 4
YARN = ("model.rope.scaling=yarn", f"model.rope.factor={FACTOR}")
WAYS = {"as it is": (), "YaRN": YARN, "theta 100,000": ("model.rope.theta=100000",)}


def train_run(folder: str, name: str, settings) -> str:
    """Train a run, or the rest of it, and return its folder."""
    common = [f"folder={folder}", f"name={name}", "train.sample_every=0", "train.batch=16"]
    cfg = configs.load("shakespeare", [*common, *settings])
    train(cfg)
    return cfg.run_folder


def main() -> None:
    """Train, measure, draw, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of the runs")
    parser.add_argument("--source", default="tfds:tiny_shakespeare", help="data.source")
    parser.add_argument("--steps", type=int, default=600, help="at the short context")
    parser.add_argument("--more", type=int, default=150, help="at the long one")
    parser.add_argument("--rows", type=int, default=128, help="of the measurement")
    parser.add_argument("--out", default="context.png", help="the figure")
    args = parser.parse_args()
    data = [f"data.source={args.source}", f"data.cache={os.path.join(args.folder, 'tokens')}"]
    first = [f"train.steps={args.steps}", f"train.eval_every={args.steps}"]
    short = train_run(args.folder, "short", [*data, *first])
    model = load(short)
    rows = inspect.read_long_rows(model, FACTOR * CONTEXT, args.rows)
    found = {"trained at 64": inspect.loss_by_position(model, rows)}
    scaled = configs.override(model.config, [f"model.context={FACTOR * CONTEXT}", *YARN])
    found["YaRN, not trained on"] = inspect.loss_by_position(
        dataclasses.replace(model, config=scaled), rows
    )
    for name, changes in WAYS.items():
        settings = [
            *data, *changes, f"train.start={short}", f"model.context={FACTOR * CONTEXT}",
            "train.batch=4", f"train.steps={args.more}", f"train.eval_every={args.more}",
            "optimizer.warmup=10",
        ]  # fmt: skip
        run = train_run(args.folder, "long-" + name.split()[0].lower(), settings)
        found[f"trained on at 256: {name}"] = inspect.loss_by_position(load(run), rows)
    visualize.draw_context(found).savefig(args.out)
    print(inspect.format_bins(found))
    bins = {name: [x._asdict() for x in one.bins] for name, one in found.items()}
    print(json.dumps({"rows": len(rows), "bins": bins}))


if __name__ == "__main__":
    main()
