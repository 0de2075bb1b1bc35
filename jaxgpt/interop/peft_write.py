"""Write the adapter of a model as a folder of peft: see peft.py."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.adapters import BASE_FILE, Adapter, Base, format_base
from jaxgpt.config import ModelConfig
from jaxgpt.hosts import fetch
from jaxgpt.interop import convert, families, rows, safetensors_files
from jaxgpt.interop.archive import store
from jaxgpt.interop.peft import CONFIG, PREFIX, TENSORS, Site, find_order, list_sites
from jaxgpt.language_model import LanguageModel
from jaxgpt.lora import TABLES, list_full, list_maps
from jaxgpt.model.lowrank import KEY
from jaxgpt.settings import ConfigError

# task_type of peft by objective.
TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}  # by family


def make_folder(model: LanguageModel, dtype: str | None = None) -> tuple[dict[str, Any], Any, Base]:
    """Return adapter_config.json and the tensors of a model's adapter, and its base.

    Args:
        dtype: of the tensors; None = float32.

    Raises:
        ConfigError: the model has no single adapter in use, or peft has no such adapter.
    """
    adapter = model.adapters.get(model.adapter)
    if adapter is None:
        raise ConfigError("--format peft writes an adapter, and this model has none in use.")
    cfg, lora = model.config.model, adapter.config
    flat = {k: np.asarray(fetch(v)) for k, v in flatten_dict(adapter.trained, sep=".").items()}
    paths = {path.removesuffix(f".{KEY}.a") for path in flat if path.endswith(f".{KEY}.a")}
    groups: dict[str, list[Site]] = {}
    everything: dict[str, None] = {}
    for site in list_sites(cfg):
        everything[site.module] = None
        if site.map.path in paths:
            groups.setdefault(site.module, []).append(site)
    if lost := paths - {site.map.path for sites in groups.values() for site in sites}:
        raise ConfigError(f"the adapter of {min(lost)} has no counterpart in peft's files.")
    tensors, ranks = {}, {}
    for module, sites in groups.items():
        a, b = _write_pair(sites, cfg, flat)
        if not a.any() and not b.any():
            continue  # a layer without an adapter
        ranks[module] = len(a)
        is_embedding = sites[0].map.path == "embed"
        kind = "lora_embedding_{}" if is_embedding else "lora_{}.weight"
        for name, value in (("A", a), ("B", b)):
            tensors[f"{PREFIX}{module}.{kind.format(name)}"] = value
    full, modules = _write_full(model, adapter)
    tensors |= full
    target = safetensors_files.get_dtype(dtype or "float32")
    other = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    grown = {m: r / lora.rank for m, r in other.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if cfg.classes else TASKS.get(cfg.family),
        "base_model_name_or_path": adapter.base.path or model.config.train.start or None,
        "r": lora.rank,
        "lora_alpha": _shorten(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": _name_modules([*ranks], [*everything]),
        "rank_pattern": other,
        "alpha_pattern": {
            m: _shorten(lora.alpha * (x**0.5 if lora.rslora else x)) for m, x in grown.items()
        },
        "modules_to_save": modules or None,
        "bias": "none",
        "fan_in_fan_out": families.find_family(cfg)[0] == "gpt2" and paths - {*TABLES} != set(),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    stored = {name: store(np.ascontiguousarray(x, dtype=target)) for name, x in tensors.items()}
    return config, stored, adapter.base


def _shorten(value: float) -> float:
    return int(value) if value == int(value) else value


def _write_pair(sites: Sequence[Site], cfg: ModelConfig, flat: Mapping[str, Any]):
    """Return lora_A [r in] and lora_B [out r] of a module, of the factors of its maps."""
    parts = []
    for site in sites:
        a, b = (flat[f"{site.map.path}.{KEY}.{x}"] for x in "ab")
        a, b = (a, b) if site.number is None else (a[site.number], b[site.number])
        parts.append((a.reshape(site.sizes[0], -1), b.reshape(b.shape[0], -1)))
    inputs = sites[0].sizes[0]
    outputs = _count_outputs(sites[0], cfg)
    rank, first = parts[0][0].shape[1], parts[0][0]
    is_shared = all(np.array_equal(a, first) for a, _ in parts)
    total = rank if is_shared else rank * len(parts)
    left, right = np.zeros((total, inputs), np.float32), np.zeros((outputs, total), np.float32)
    for number, (site, (a, b)) in enumerate(zip(sites, parts, strict=True)):
        ins, outs = find_order(site, cfg, inputs, outputs)
        block = slice(0, rank) if is_shared else slice(number * rank, (number + 1) * rank)
        left[block, ins] = a.T
        right[outs, block] = b.T
    return left, right


def _count_outputs(site: Site, cfg: ModelConfig) -> int:
    """Return the number of outputs of a site's module, with those of other maps in it."""
    if site.row.fusion is None:
        return site.sizes[1]
    kind, _ = families.find_family(cfg)
    fused = [x for x in families.FAMILIES[kind].table if x.hf_name == site.row.hf_name]
    maps = {x.path: x for x in list_maps(cfg)}
    prefix = site.map.path.rpartition(".")[0]
    total = 0
    for row in fused:
        found = maps[f"{prefix}.{row.path.rpartition('.')[2]}"]
        total += site._replace(map=found).sizes[1]
    return total


def _name_modules(modules: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Return target_modules: the ends of paths if these name exactly the modules, else all paths.

    >>> _name_modules(["l.0.a.q", "l.1.a.q"], ["l.0.a.q", "l.0.a.k", "l.1.a.q", "l.1.a.k"])
    ['q']
    """
    ends: dict[str, None] = {}
    for module in modules:
        keys = re.sub(r"^.*\.\d+\.", "", module).split(".")
        for size in range(1, len(keys) + 1):
            end = ".".join(keys[-size:])
            found = {x for x in everything if x == end or x.endswith(f".{end}")}
            if found <= {*modules}:
                ends[end] = None
                break
        else:
            return list(modules)
    return list(ends)


def _write_full(model: LanguageModel, adapter: Adapter) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors of what is trained in full, and its modules (modules_to_save)."""
    full = list_full(adapter.nodes)
    if not full:
        return {}, []
    cfg = model.config.model
    archive = convert.to_archive(model.switch(""), "float32")
    flat = flatten_dict(adapter.trained, sep=".")
    kind, _ = families.find_family(cfg)
    modules: dict[str, None] = {}
    tensors: dict[str, Any] = {}
    written = convert.to_archive(_with_full(model, {path: flat[path] for path in full}), "float32")
    for place in rows.list_locations(families.FAMILIES[kind].table, cfg):
        if place.path not in full or place.row.only == "read":
            continue
        for name in place.names:
            module = name.rpartition(".")[0]
            modules[module] = None
            for other in archive.tensors:  # the whole module, also what of it is the base's
                if other.rpartition(".")[0] == module:
                    tensors[PREFIX + other] = written.tensors[other].read()
    return tensors, list(modules)


def _with_full(model: LanguageModel, full: Mapping[str, Any]) -> LanguageModel:
    base = flatten_dict(model.base, sep=".")
    params = unflatten_dict({**base, **full}, sep=".")
    return dataclasses.replace(model, params=params, base=None, adapters={}, adapter="")


def write_folder(model: LanguageModel, folder: str, dtype: str | None = None):
    """Write the adapter of a model as a folder of peft."""
    config, tensors, base = make_folder(model, dtype)
    os.makedirs(folder)
    safetensors_files.write_file(tensors, os.path.join(folder, TENSORS))
    files = {CONFIG: json.dumps(config, indent=2) + "\n"}
    if base.fingerprint:
        files[BASE_FILE] = format_base(base, folder)
    for name, text in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
