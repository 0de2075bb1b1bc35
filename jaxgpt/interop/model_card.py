"""The README.md of an exported model: what it is, how it was trained, how to use it."""

import importlib.metadata
import json
import os
from typing import Any

import jaxgpt
from jaxgpt.interop.archive import Archive
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import count_params

PIPELINES = {
    "decoder": "text-generation", "encoder": "fill-mask", "encoder_decoder": "text2text-generation"
}  # fmt: skip
_MODEL_SETTINGS = ("family", "vocab", "context", "width", "layers", "heads")


def write_model_card(model: LanguageModel, archive: Archive, license: str, run: str) -> str:
    """Return the text of a model card.

    Args:
        license: an identifier of the Hugging Face hub, such as apache-2.0.
        run: the run folder of the model, "" if there is none.
    """
    cfg = model.config
    task = "text-classification" if cfg.model.classes else PIPELINES[cfg.model.family]
    kind, settings = archive.config["model_type"], cfg.model
    rows = [(name, getattr(settings, name)) for name in _MODEL_SETTINGS]
    rows += [("parameters", f"{count_params(settings)['total']:,}")]
    rows += [(name, archive.config[name]) for name in ("dtype",) if name in archive.config]
    versions = {name: _find_version(name) for name in ("jax", "flax", "safetensors", "tokenizers")}
    lines = [
        "---",
        f"license: {license}",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        "tags:",
        f"- {kind}",
        "- jaxgpt",
        "---",
        "",
        f"# {cfg.name}",
        "",
        f"A model of the architecture `{kind}`, exported from jaxgpt {jaxgpt.__version__}.",
        "",
        "## Training",
        "",
        f"- data: `{cfg.data.source if model.step else 'see the model that it was made from'}`",
        f"- steps: {model.step:,}, of {cfg.train.batch} x {settings.context} tokens",
        f"- objective: {cfg.train.objective}; optimizer: {cfg.optimizer.name}, "
        f"learning rate {cfg.optimizer.lr:g}",
        f"- {describe_loss(run, model.step)}",
        *([f"- begun with: `{cfg.train.start}`"] if cfg.train.start else []),
        "",
        "## Architecture",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Use",
        "",
        "```python",
        f"from transformers import {archive.config['architectures'][0]}, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(PATH)",
        f"model = {archive.config['architectures'][0]}.from_pretrained(PATH)",
        "```",
        "",
        *_describe_bos(model),
        f"License: {license}.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _describe_bos(model: LanguageModel) -> list[str]:
    if not model.tokenizer.adds_bos or model.config.model.family != "decoder":
        return []
    return [f"Texts begin with the token {model.tokenizer.bos} (bos), as in training.", ""]


def _find_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_loss(run: str, step: int) -> str:
    """Return the held-out metrics of a run at a step, in words."""
    records = [x for x in _read_records(run) if x.get("kind") == "eval" and "loss" in x]
    if not records:
        return "held-out loss: not measured"
    nearest = min(records, key=lambda x: abs(x["step"] - step))
    accuracy = nearest.get("accuracy")
    more = f", accuracy {accuracy:.4f}" if isinstance(accuracy, float) else ""
    return f"held-out loss: {nearest['loss']:.4f} nats at step {nearest['step']:,}{more}"


def _read_records(run: str) -> list[dict[str, Any]]:
    path = os.path.join(run, "metrics.jsonl")
    if not run or not os.path.isfile(path):
        return []
    found = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # the last line of a run that was killed
    return [x for x in found if isinstance(x, dict)]
