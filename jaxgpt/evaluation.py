"""Measure a trained model on any text, as training measures it on held-out text.

The same function computes the numbers (`trainer.evaluate`), on the same batches that a task makes
of a stream, so that a run's own held-out text gives the loss that its last evaluation printed.
"""

import math
from typing import Any, NamedTuple

import jax

from jaxgpt.config import Config
from jaxgpt.data import Corpus, prepare, prepare_evaluation
from jaxgpt.data.work import LogFn, print_line
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import build
from jaxgpt.quantization import check_kind, count_bytes
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of
from jaxgpt.trainer.evaluate import evaluate
from jaxgpt.trainer.report import format_confusion
from jaxgpt.trainer.step import make_eval_step


class Measurement(NamedTuple):
    """What a model scores on a text.

    Attributes:
        text: the source, and which part of it.
        values: the metrics; see `trainer.evaluate.evaluate`.
        unit: what the loss is a mean over: "token" or "text".
        labels: names of the classes of `values["confusion"]`, if it is there.
    """

    text: str
    values: dict[str, Any]
    unit: str
    labels: tuple[str, ...] = ()


def measure(model: LanguageModel, setting: str = "", log: LogFn = print_line) -> Measurement:
    """Measure a model on a text that its config names.

    Args:
        model: `model.config` has the source, how it is read, and `train.batch`, the rows at a time;
            its `train.eval_batches` bounds how much of the text is read, 0 for all of it.
        setting: "source" (all of data.source), "test" (data.test), or "" for the text that the run
            has held out of data.source, or data.validation.
        log: receives progress lines of tokenizing.

    Raises:
        ConfigError: the source cannot be read, or has nothing to predict.
    """
    model.check_finite()
    cfg = model.config
    if cfg.objective.settings:
        raise ConfigError(
            f"a model of train.objective={cfg.train.objective!r} is measured while it is trained, "
            "beside its reference or by its reward: give train.objective=chat and a source of "
            "conversations."
        )
    corpus = _prepare(model, setting, log)
    task = cfg.objective.task(cfg, corpus)
    lengths = model.tokenizer.lengths if cfg.objective.is_text else None
    with use_mesh_of(model.params):
        step = jax.jit(make_eval_step(cfg, build(cfg.model)))
        values = evaluate(step, model.params, task.make_eval_batches(), lengths)
    if math.isnan(values["loss"]):
        raise ConfigError(
            f"{_name_text(cfg, setting)} has {corpus.held_out.ids.size} tokens and nothing of them "
            "is to be predicted: give more text."
        )
    text = f"{_name_text(cfg, setting)}: {corpus.held_out_bytes / 1e6:,.2f} MB"
    return Measurement(text, values, cfg.objective.loss_unit, tuple(task.labels))


def measure_quantized(
    model: LanguageModel, found: Measurement, kind: str, group: int | None, setting: str
) -> dict[str, Any]:
    """Measure what quantization costs on a text.

    Args:
        model, setting: as of `measure`.
        found: what the model scores as it is.
        kind, group: as of `LanguageModel.quantize`.

    Returns:
        {"quantized": the metrics of the quantized model, its kind and group, what its loss adds,
        and the bytes of the parameters of both}.
    """
    small = model.quantize(kind, group)
    values = measure(small, setting, lambda line: None).values
    values.pop("confusion", None)
    facts = {
        "kind": kind,
        "group": check_kind(kind, group),
        "loss_added": values["loss"] - found.values["loss"],
        "bytes": count_bytes(small.params),
        "bytes_before": count_bytes(model.params),
    }
    return {"quantized": values | facts}


def format_quantized(found: Measurement, cost: dict[str, Any]) -> str:
    """Format what quantization costs: the loss of both, and the memory of both."""
    group = f"groups of {cost['group']} inputs" if cost["group"] else "one scale per output channel"
    before, after = cost["bytes_before"] / 1e6, cost["bytes"] / 1e6
    return (
        f"\n{cost['kind']}, {group}\n"
        f"loss           {cost['loss']:.4f} nats/{found.unit}, {cost['loss_added']:+.4f}\n"
        f"parameters     {after:,.2f} MB in place of {before:,.2f} MB"
    )


def _prepare(model: LanguageModel, setting: str, log: LogFn) -> Corpus:
    """Return the corpus whose held-out part is to be measured."""
    cfg, task = model.config, model.config.objective.task
    arguments = dict(is_paired=task.IS_PAIRED, log=log, encoder=task.make_encoder(cfg))
    if setting:
        return prepare_evaluation(
            cfg.data, model.tokenizer, labels=model.labels, setting=setting, **arguments
        )
    return prepare(cfg.data, cfg.tokenizer_vocab, tokenizer=model.tokenizer, **arguments)


def _name_text(cfg: Config, setting: str) -> str:
    if setting:
        return f"data.{setting}={getattr(cfg.data, setting)}"
    if cfg.data.validation:
        return f"data.validation={cfg.data.validation}"
    return f"the held-out part of data.source={cfg.data.source}"


def format_measurement(found: Measurement) -> str:
    """Format a measurement, a line for each metric."""
    values = found.values
    rows = {
        "loss": f"{values['loss']:.4f} nats/{found.unit}",
        "perplexity": f"{values['perplexity']:.2f}",
        "bits per byte": f"{values['bits_per_byte']:.4f}" if "bits_per_byte" in values else "",
        "accuracy": f"{values['accuracy']:.2%} of {values['tokens']:,} {found.unit}s",
    }
    own = values.keys() - {"loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "confusion"}
    rows |= {name: f"{values[name]:.4g}" for name in sorted(own)}
    lines = [f"{name:14} {value}" for name, value in rows.items() if value]
    if "confusion" in values:
        lines += ["", format_confusion(values["confusion"], found.labels)]
    return "\n".join(lines)
