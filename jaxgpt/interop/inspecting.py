"""What a model is, of any format, without its tensors: for `jaxgpt inspect`."""

import math
import os
from typing import Any

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config
from jaxgpt.interop import convert, loaders
from jaxgpt.interop.archive import Archive
from jaxgpt.interop.families import FAMILIES
from jaxgpt.interop.formats import FORMATS, find_format
from jaxgpt.model import count_params
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

Facts = dict[str, Any]


def inspect_foreign(path: str) -> Facts:
    """Return what is known of a foreign model, also of one that is not supported.

    Raises:
        ConfigError: it cannot be read at all.
    """
    archive = loaders.open_archive(path)
    kind = archive.config.get("model_type")
    facts: Facts = {
        "path": path,
        "format": FORMATS[find_format(path)].title,
        "architecture": kind,
        "title": FAMILIES[kind].title if kind in FAMILIES else "",
        "dtypes": count_dtypes(archive),
        "tensors": len(archive.tensors),
        "tokenizer": describe_tokenizer(archive.tokenizer),
        "chat_template": bool(archive.tokenizer and archive.tokenizer.chat_template),
        "not_supported": [],
        "notes": [],
    }
    try:
        plan = convert.plan_import(archive)
    except ConfigError as error:
        count = sum(facts["dtypes"].values())
        return facts | {"not_supported": [str(error)], "parameters": {"total": count}}
    return facts | {"notes": list(plan.notes)} | describe_config(plan.config)


def inspect_run(path: str, config: Config, dtypes: dict[str, int]) -> Facts:
    """Return the same of a run folder.

    Args:
        dtypes: numbers of parameters by dtype.
    """
    tokenizer = tokenizers.load(os.path.join(path, "tokenizer.json"))
    return {
        "path": path,
        "format": "a run of jaxgpt",
        "architecture": config.model.family,
        "title": "",
        "dtypes": dtypes,
        "tokenizer": describe_tokenizer(tokenizer),
        "chat_template": bool(tokenizer.chat_template),
        "not_supported": [],
        "notes": [describe_adapters(config)] if config.lora.rank else [],
    } | describe_config(config)


def describe_adapters(config: Config) -> str:
    """Return a line about the adapters of a run."""
    lora = config.lora
    return (
        f"adapters of rank {lora.rank} on {', '.join(lora.targets) or 'all maps in layers'}; the "
        f"base, in {lora.base}, is {config.train.start or 'the initial model'}"
    )


def describe_config(config: Config) -> Facts:
    """Return the facts that follow from a config."""
    cfg = config.model
    sizes = dict(
        family=cfg.family, layers=cfg.layers, width=cfg.width, heads=cfg.heads,
        kv_heads=cfg.sizes["G"], head_width=cfg.sizes["K"], ffn=cfg.sizes["F"], tied=cfg.tie,
    )  # fmt: skip
    return dict(
        parameters=count_params(cfg), context=cfg.context, vocab=cfg.vocab, sizes=sizes,
        objective=config.train.objective,
    )  # fmt: skip


def count_dtypes(archive: Archive) -> dict[str, int]:
    """Return how many numbers there are of each dtype, or quantization."""
    found: dict[str, int] = {}
    for stored in archive.tensors.values():
        kind = stored.kind or stored.dtype
        found[kind] = found.get(kind, 0) + math.prod(stored.shape)
    return found


def describe_tokenizer(tokenizer: Tokenizer | None) -> Facts | None:
    """Return the facts of a tokenizer."""
    if tokenizer is None or not tokenizer.kind:
        return None
    names = {index: name for name, index in tokenizer.special_ids.items()}
    return {
        "kind": tokenizer.kind,
        "vocab": tokenizer.vocab_size,
        "begins_with_bos": tokenizer.adds_bos,
        **{role: getattr(tokenizer, role) for role in ("bos", "eos", "pad", "unk")},
        "ends": [{"id": index, "token": names.get(index, "")} for index in tokenizer.ends],
        "is_lossless": tokenizer.is_lossless,
    }


def format_facts(facts: Facts) -> str:
    """Return facts as lines for people."""
    title = f" ({facts['title']})" if facts["title"] else ""
    rows = [("architecture", f"{facts['architecture']}{title}, {facts['format']}")]
    if sizes := facts.get("sizes"):
        rows.append(("sizes", ", ".join(f"{name} {value}" for name, value in sizes.items())))
    parts = facts["parameters"]
    rows.append(("parameters", f"{parts['total']:,}"))
    rows += [("", f"{name:12} {count:15,}") for name, count in parts.items()
             if name != "total" and count]  # fmt: skip
    dtypes = ", ".join(f"{name} {count:,}" for name, count in facts["dtypes"].items())
    rows.append(("dtypes", dtypes or "none"))
    if "context" in facts:
        rows.append(("context", f"{facts['context']:,} tokens"))
    rows += [("tokenizer", _format_tokenizer(facts["tokenizer"]))]
    rows.append(("chat template", "yes" if facts["chat_template"] else "no"))
    rows += [("note", note) for note in facts["notes"]]
    rows += [("not supported", text) for text in facts["not_supported"] or ["nothing"]]
    return "\n".join(f"{name:14} {value}" for name, value in rows)


def _format_tokenizer(tokenizer: Facts | None) -> str:
    if tokenizer is None:
        return "none"
    ends = ", ".join(f"{x['id']} {x['token']}".strip() for x in tokenizer["ends"])
    bos = "begins with bos" if tokenizer["begins_with_bos"] else "does not begin with bos"
    loss = "" if tokenizer["is_lossless"] else "; not every text comes back exactly"
    return f"{tokenizer['kind']}, {tokenizer['vocab']:,} ids, {bos}, ends: {ends}{loss}"
