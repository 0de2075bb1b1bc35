"""Folders of peft: adapters of LoRA, onto and from the adapters of a model.

    adapter_config.json            rank, alpha, which modules
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight [r in], lora_B [out r]

Both factors are rearranged as the weight would be: the layouts of interop permute its inputs and
its outputs, so A takes the order of the inputs and B that of the outputs. Where several maps of
jaxgpt are one module (c_attn, query_key_value), reading shares A and splits B; writing puts their
factors side by side, A of rank 3 r and B in blocks, unless they share A.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.adapters import (
    BASE_FILE,
    Adapter,
    Base,
    check_base,
    compute_fingerprint,
    read_base,
)
from jaxgpt.config import LoraConfig, ModelConfig
from jaxgpt.hosts import fetch
from jaxgpt.interop import families, rows, safetensors_files
from jaxgpt.interop.archive import Archive, Stored
from jaxgpt.language_model import LanguageModel
from jaxgpt.lora import TABLES, Map, list_maps, select_maps
from jaxgpt.model.lowrank import KEY
from jaxgpt.settings import ConfigError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys of adapter_config.json that are read here, or that change nothing of what is computed.
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "bias",
         "alpha_pattern", "init_lora_weights", "base_model_name_or_path")  # fmt: skip
_UNUSED = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
           "layers_pattern", "fan_in_fan_out", "task_type", "inference_mode", "auto_mapping",
           "peft_version", "revision", "runtime_config", "megatron_core", "megatron_config",
           "qalora_group_size", "ensure_weight_tying")  # fmt: skip
# Initializations that keep the base as it is. Others (pissa, olora, corda, loftq) change it.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_REFUSED = {
    "use_dora": "DoRA, which also scales every column of a weight",
    "lora_bias": "a bias of the factors",
    "trainable_token_indices": "single rows of the embedding",
    "target_parameters": "adapters of parameters that are no modules, such as fused experts",
    "layer_replication": "a base whose layers are repeated",
}


# --- how a module's factors lie in ours ----------------------------------------------------------


class Site(NamedTuple):
    """One map of jaxgpt in one layer, and the module of transformers that it is (a part of).

    Attributes:
        map: of jaxgpt, with all of its layers.
        number: of the layer among the stacked ones, or None.
        module: the path of the module.
        row: of the table of names.
    """

    map: Map
    number: int | None
    module: str
    row: rows.Row

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of inputs and outputs of the map."""
        stacked, inputs = len(self.map.stacked), len(self.map.inputs)
        shape = self.map.shape[stacked:]
        return int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))


def list_sites(cfg: ModelConfig) -> Iterator[Site]:
    """Yield all maps of a model that can have an adapter, by layer, as transformers has them.

    Raises:
        ConfigError: transformers has no such model.
    """
    kind, _ = families.find_family(cfg)
    maps = {x.path: x for x in list_maps(cfg)}
    for place in rows.list_locations(families.FAMILIES[kind].table, cfg):
        path, _, leaf = place.path.rpartition(".")
        is_weight = leaf in ("w", "table") and path in maps and place.row.only != "read"
        if not is_weight or len(place.dims) > 1 or not place.names[0].endswith(".weight"):
            continue
        for number, name in enumerate(place.names):
            layer = number if place.dims else None
            yield Site(maps[path], layer, name.removesuffix(".weight"), place.row)


def find_order(site: Site, cfg: ModelConfig, inputs: int, outputs: int) -> tuple[Any, Any]:
    """Return which inputs and outputs of a module are those of our map, in our order.

    Args:
        inputs, outputs: of the module, of which the map may be a part.

    Returns:
        (int [I], int [O]).
    """
    if site.map.path in TABLES:  # the same order in both
        return np.arange(inputs), np.arange(outputs)
    is_conv1d = families.find_family(cfg)[0] == "gpt2"  # [in out], and others [out in]
    shape = (inputs, outputs) if is_conv1d else (outputs, inputs)
    index = np.arange(inputs * outputs, dtype=np.int64).reshape(shape)
    try:
        part = site.row.fusion.take(index, site.row.part, cfg) if site.row.fusion else index
        ours = site.row.layout.read(part, cfg).reshape(site.sizes)
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"{site.module} has {inputs} inputs and {outputs} outputs, which do not fit the model."
        ) from error
    ins, outs = np.unravel_index(ours[:, 0], shape), np.unravel_index(ours[0], shape)
    return (ins[0], outs[1]) if is_conv1d else (ins[1], outs[0])


# --- reading -------------------------------------------------------------------------------------


def read_config(folder: str) -> dict[str, Any]:
    """Read and check adapter_config.json.

    Raises:
        ConfigError: a key has a value that is not supported, or is not known.
    """
    path = os.path.join(folder, CONFIG)
    values = safetensors_files.read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object.")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type={kind!r} is not supported; 'LORA' is.")
    for name, meaning in _REFUSED.items():
        if values.get(name):
            raise ConfigError(f"{path}: {name}={values[name]!r} is not supported: it is {meaning}.")
    start = values.get("init_lora_weights", True)
    if start not in _INITIALIZATIONS:
        raise ConfigError(
            f"{path}: init_lora_weights={start!r} is not supported: it changes the base. Convert "
            "the adapter in peft first, by save_pretrained(path_initial_model_for_weight_conversion"
            "=...)."
        )
    if values.get("bias", "none") != "none":
        raise ConfigError(f"{path}: bias={values['bias']!r} is not supported; 'none' is.")
    known = {*_READ, *_UNUSED, *_REFUSED}
    if unknown := sorted(k for k, v in values.items() if v and k not in known):
        raise ConfigError(
            f"{path}: the key {unknown[0]!r} (={values[unknown[0]]!r}) is not known, so that the "
            "adapter might be computed wrongly. If it changes nothing, remove it from the file."
        )
    for name in ("r", "lora_alpha"):
        value = values.get(name, 8)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{path}: {name}={value!r} must be a number above 0.")
    return values


def find_base(folder: str) -> str:
    """Return the path, or the name on a hub, of the base of a folder of peft.

    Raises:
        ConfigError: the folder names none.
    """
    path = str(read_config(folder).get("base_model_name_or_path") or "")
    if not path:
        raise ConfigError(
            f"{os.path.join(folder, CONFIG)}: base_model_name_or_path is missing: it names the "
            "model that the adapters are of."
        )
    inside = os.path.join(folder, path)
    return inside if not os.path.exists(path) and os.path.exists(inside) else path


def read_tensors(folder: str) -> dict[str, Stored]:
    """Return the tensors of a folder of peft, by the names of modules in transformers."""
    path = os.path.join(folder, TENSORS)
    if not os.path.isfile(path):
        raise ConfigError(
            f"{path} is missing. (A file adapter_model.bin is a pickle, which could execute "
            "anything and is never opened: save it again by a present version of peft.)"
        )
    found = {}
    for name, stored in safetensors_files.open_file(path).items():
        if not name.startswith(PREFIX):
            raise ConfigError(f"{path}: the tensor {name!r} does not begin with {PREFIX!r}.")
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name.removeprefix(PREFIX))
        found[re.sub(r"(lora_embedding_[AB])$", r"\1.weight", name)] = stored
    return found


def read_folder(folder: str, model: LanguageModel, place: str = "") -> Adapter:
    """Read the adapters in a folder of peft as those of a model.

    Args:
        model: their base.
        place: the path that the base was loaded from.

    Raises:
        ConfigError: the adapters are not supported, or do not fit the model.
    """
    values, tensors, cfg = read_config(folder), read_tensors(folder), model.config.model
    kind, _ = families.find_family(cfg)
    renames = families.FAMILIES[kind].aliases.renames
    factors, others = _split_factors(tensors, renames, folder)
    sites: dict[str, list[Site]] = {}
    for site in list_sites(cfg):
        sites.setdefault(site.module, []).append(site)
    if left := sorted(factors.keys() - sites.keys()):
        raise ConfigError(f"{folder}: the module {left[0]!r} has no place in the model.")
    rank = max((a.shape[0] for a, _ in factors.values()), default=int(values.get("r", 8)))
    lora = LoraConfig(
        rank=rank,
        alpha=float(values.get("lora_alpha", 8)),
        rslora=bool(values.get("use_rslora")),
        dropout=float(values.get("lora_dropout") or 0),
    )
    pieces: dict[str, dict[int | None, tuple[Any, Any]]] = {}
    for module, (a, b) in factors.items():
        alpha = _match(values.get("alpha_pattern"), module, lora.alpha)
        scale = alpha / (a.shape[0] ** 0.5 if lora.rslora else a.shape[0])
        for site in sites[module]:
            pair = _read_pair(site, cfg, a.read(), b.read(), rank, scale / lora.scale, folder)
            pieces.setdefault(site.map.path, {})[site.number] = pair
    full = _read_full(others, model, folder)
    trained = unflatten_dict(_stack(cfg, pieces, rank) | full, sep=".")
    lora = _add_targets(cfg, lora, [*pieces])
    return Adapter(trained, lora, _find_base(folder, place, model, full), folder)


def _find_base(folder: str, place: str, model: LanguageModel, full: Mapping[str, Any]) -> Base:
    """Return the base of a folder: the model, which must be the one that base.json has."""
    params = flatten_dict(model.params if model.base is None else model.base, sep=".")
    frozen = unflatten_dict({k: x for k, x in params.items() if k not in full}, sep=".")
    if not os.path.isfile(os.path.join(folder, BASE_FILE)):
        return Base((place,) if place else (), compute_fingerprint(frozen))
    recorded = read_base(folder)
    if all(x.dtype == "float32" for x in params.values()):  # it is not rounded
        check_base(recorded, frozen, place, folder)
    return Base(tuple(dict.fromkeys(filter(None, [place, *recorded.paths]))), recorded.fingerprint)


def _match(pattern: Mapping[str, Any] | None, module: str, default: float) -> float:
    """Return the value of the first key of a pattern that ends a module's path, as peft does."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return default


def _split_factors(
    tensors: Mapping[str, Stored], renames: Mapping[str, str], where: str
) -> tuple[dict[str, tuple[Stored, Stored]], dict[str, Stored]]:
    """Return the pairs of factors by module, and the other tensors by name."""
    pairs: dict[str, dict[str, Stored]] = {}
    others = {}
    for name, stored in tensors.items():
        found = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])\.weight", name)
        full = f"{found[1]}.weight" if found else name
        for pattern, replacement in renames.items():
            if match := re.fullmatch(pattern, full):
                full = match.expand(replacement)
        if found:
            pairs.setdefault(full.removesuffix(".weight"), {})[found[2]] = stored
        elif "lora" in name:
            raise ConfigError(f"{where}: the tensor {name!r} is not supported.")
        else:
            others[full] = stored
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ConfigError(f"{where}: {module} needs lora_A [r in] and lora_B [out r].")
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}, others


def _read_pair(site: Site, cfg: ModelConfig, a, b, rank: int, scale: float, where: str):
    """Return the factors [I R], [R O] of our map, padded to a rank, with a scale in b."""
    try:
        ins, outs = find_order(site, cfg, a.shape[1], b.shape[0])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    left, right = np.zeros((len(ins), rank), np.float32), np.zeros((rank, len(outs)), np.float32)
    left[:, : len(a)] = np.asarray(a, np.float32)[:, ins].T
    right[: len(a)] = np.asarray(b, np.float32)[outs].T * np.float32(scale)
    return left, right


def _stack(cfg: ModelConfig, pieces: Mapping[str, Mapping[int | None, Any]], rank: int):
    """Return the factors of all layers by path; layers without an adapter have zeros."""
    maps, out = {x.path: x for x in list_maps(cfg)}, {}
    for path, found in pieces.items():
        shapes = {name: shape for name, (shape, _) in maps[path].describe(rank).items()}
        for i, name in enumerate("ab"):
            whole = np.zeros(shapes[name], np.float32)
            for number, pair in found.items():
                part = whole if number is None else whole[number]
                part[...] = pair[i].reshape(part.shape)
            out[f"{path}.{KEY}.{name}"] = jnp.asarray(whole)
    return out


def _add_targets(cfg: ModelConfig, lora: LoraConfig, paths: Sequence[str]) -> LoraConfig:
    """Return the settings with targets that name exactly these maps: by name if that does."""
    names = tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    for targets in (names, tuple(paths)):
        if targets and {x.path for x in select_maps(cfg, targets)} == {*paths}:
            return dataclasses.replace(lora, targets=targets)
    return lora


def _read_full(others: Mapping[str, Stored], model: LanguageModel, where: str) -> dict[str, Any]:
    """Return the parameters that are trained in full (modules_to_save), by path.

    The table of an embedding that has an adapter is in the file as well: the same as the base's.
    """
    cfg = model.config.model
    base = flatten_dict(model.params if model.base is None else model.base, sep=".")
    kind, _ = families.find_family(cfg)
    out, used = {}, set()
    for place in rows.list_locations(families.FAMILIES[kind].table, cfg):
        found = {n: name for n, name in enumerate(place.names) if name in others}
        tables = {n: name.replace(".weight", ".base_layer.weight")
                  for n, name in enumerate(place.names)}  # fmt: skip
        found |= {n: name for n, name in tables.items() if name in others}
        if not found or (place.path not in base and place.path != "head.table"):
            continue
        used |= {*found.values()}
        like = base.get(place.path, base["embed.table"])
        whole = np.array(fetch(like), np.float32)
        flat = whole.reshape(-1, *whole.shape[len(place.dims) :]) if place.dims else whole[None]
        for number, name in found.items():
            value = np.asarray(place.read(others[name].read(), cfg), np.float32)
            if value.shape != flat[number].shape:
                raise ConfigError(
                    f"{where}: the tensor {name!r} becomes {place.path}, {list(value.shape)}, and "
                    f"the base has {list(flat[number].shape)}: a vocabulary that was resized is "
                    "not supported."
                )
            flat[number] = value
        if not np.array_equal(whole, np.asarray(fetch(like), np.float32)):
            out[place.path] = jnp.asarray(whole)
    if left := sorted(others.keys() - used):
        raise ConfigError(f"{where}: the tensor {left[0]!r} has no place in the model.")
    if cfg.tie and "head.table" in out:
        raise ConfigError(
            f"{where}: modules_to_save has the head, which is tied to the embedding in this base: "
            "untie them first."
        )
    return out


def open_folder(path: str) -> Archive:
    """Return the tensors of a folder of peft under their own names; its config has no model."""
    values = read_config(path)
    config = {"model_type": f"adapters of {values.get('base_model_name_or_path')}", **values}
    return Archive(config, read_tensors(path), origin=path)
