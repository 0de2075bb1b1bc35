"""Train on Tiny Shakespeare, byte by byte, by nanoGPT's recipe for CPUs, and report the loss.

    python -m benchmarks.shakespeare --source input.txt --json shakespeare.json --plot loss.png

Two models with the same parameter budget, layers, heads, width and training (4 layers, 4 heads,
width 128, context 64, batch 12, 2000 steps, AdamW at 1e-3, no dropout) are trained on the first
nine tenths of the file and evaluated on the whole last tenth, in windows of 64 bytes. nanoGPT
itself, in this setting, reaches 1.898 nats per character.
"""

import argparse
import json
import os
import platform
import shutil
import time

import jax

from jaxgpt.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from jaxgpt.model import count_params
from jaxgpt.trainer import train
from jaxgpt.trainer.logging import read_metrics, write_text_atomically
from jaxgpt.trainer.memory import retain_freed_memory

SHAPE = dict(vocab=260, context=64, width=128, layers=4, heads=4)
MODELS = {
    "gpt2": ModelConfig(
        **SHAPE,
        ffn=512,
        position="learned",
        norm="layer",
        feedforward="plain",
        activation="gelu",
    ),
    "mini": ModelConfig(**SHAPE, ffn=344),
}
NANOGPT_LOSS = 1.898  # nats per character


def make_config(name: str, source: str, folder: str, seed: int) -> Config:
    return Config(
        name=f"shakespeare_{name}_{seed}",
        folder=folder,
        seed=seed,
        model=MODELS[name],
        data=DataConfig(source=source, tokenizer="bytes", holdout=0.1, split="tail"),
        optimizer=OptimizerConfig(lr=1e-3, b2=0.99, warmup=100, floor=0.1),
        train=TrainConfig(steps=2000, batch=12, eval_every=250, sample_every=0, log_every=50),
        sample=SampleConfig(prompt="\n", tokens=300, slide=True),
    )


def measure(cfg: Config) -> dict:
    """Train from scratch and return the held-out curve with its costs."""
    shutil.rmtree(cfg.run_folder, ignore_errors=True)
    start = time.perf_counter()
    retain_freed_memory()  # as train.py does
    progress = train(cfg, is_quiet=True)
    records = read_metrics(cfg.run_folder)
    with open(os.path.join(cfg.run_folder, "samples", f"step_{progress.step:06d}.txt")) as file:
        sample = file.read()
    return {
        "parameters": count_params(cfg.model)["total"],
        "curve": [(r["step"], r["loss"]) for r in records if r["kind"] == "eval"],
        "training_curve": [(r["step"], r["nats"]) for r in records if r["kind"] == "train"],
        "held_out_tokens": [r["tokens"] for r in records if r["kind"] == "eval"][-1],
        "seconds": time.perf_counter() - start,
        "training_seconds": progress.seconds,
        "sample": sample,
    }


def plot_curves(results: dict, path: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, color in (("gpt2", "#7f8c8d"), ("mini", "#c0392b")):
        curve = results[name]["curve"]
        label = f"{name}, {results[name]['parameters']:,} parameters: {curve[-1][1]:.3f}"
        axes.plot(*zip(*curve, strict=True), marker="o", ms=3, color=color, label=label)
    axes.axhline(NANOGPT_LOSS, color="#2980b9", lw=1, ls="--", label=f"nanoGPT: {NANOGPT_LOSS}")
    axes.set(xlabel="step", ylabel="held-out loss (nats per byte)", title="Tiny Shakespeare, bytes")
    axes.set_ylim(1.6, 2.7)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="input.txt of Tiny Shakespeare")
    parser.add_argument("--folder", default="runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write all figures")
    parser.add_argument("--plot", help="where to draw both curves (PNG)")
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, {jax.devices()[0].platform}, {os.cpu_count()} cores, "
        f"python {platform.python_version()}; {args.source}, seed {args.seed}"
    )
    results = {n: measure(make_config(n, args.source, args.folder, args.seed)) for n in MODELS}
    for name, result in results.items():
        print(
            f"{name}: {result['parameters']:,} parameters, {result['seconds']:.0f} s in all, "
            f"{result['training_seconds']:.0f} s training; "
            f"{result['held_out_tokens']:,} held-out tokens"
        )
    print(f"\n{'step':>6} {'gpt2':>8} {'mini':>8}   held-out loss, nats per byte")
    for (step, a), (_, b) in zip(results["gpt2"]["curve"], results["mini"]["curve"], strict=True):
        print(f"{step:>6} {a:8.4f} {b:8.4f}")
    print(f"{'nanoGPT':>6} {NANOGPT_LOSS:7.3f}\n\nsample of mini:\n{results['mini']['sample']}")
    if args.json:
        write_text_atomically(args.json, json.dumps(results, indent=1))
    if args.plot:
        plot_curves(results, args.plot)


if __name__ == "__main__":
    main()
