"""An `Archive` <-> a `LanguageModel`: the only place where foreign models become ours.

Parameters are made one at a time: the tensors of a stacked one are read into it, and it goes to its
device or its shards of a mesh before the next is begun. So no device holds the whole of a sharded
model, and the host no more than the result and one parameter.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.hosts import fetch
from jaxgpt.interop import aliases, families, rows
from jaxgpt.interop.archive import Archive, Stored, store
from jaxgpt.interop.families import Family
from jaxgpt.interop.huggingface import list_ids
from jaxgpt.interop.safetensors_files import allocate_aligned, get_dtype
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import abstract_params
from jaxgpt.model.layers import DTYPES
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_load_shardings
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.placeholder import make_placeholder

OBJECTIVES = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "pairs"}
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Plan(NamedTuple):
    """A model that can be read: its config, and where its parameters are.

    Attributes:
        notes: messages: what was left out, or decided.
        places: the location of every parameter, by path.
        tensors: by the names of the tables.
    """

    config: Config
    notes: tuple[str, ...]
    places: Mapping[str, rows.Location]
    tensors: Mapping[str, Stored]
    origin: str


# --- reading -------------------------------------------------------------------------------------


def plan_import(archive: Archive) -> Plan:
    """Return how an archive becomes a model; of the tensors only names and shapes are looked at.

    Raises:
        ConfigError: the architecture is not supported, a tensor is missing, left over, or has
            another shape than the config gives it.
    """
    origin = archive.origin
    config, notes = families.select_text_model(archive.config)
    _, family = families.get_family(config, origin)
    tensors, more = aliases.rename_tensors(archive.tensors, family.aliases, origin)
    cfg = families.read_config(config, tensors, origin)
    tensors, dropped = _drop_unused_head(cfg, tensors)
    cfg, tensors, tied = resolve_head(cfg, family, tensors, origin)
    cfg = dataclasses.replace(cfg, dtype=_choose_dtype(tensors), **_find_mask(archive, cfg))
    places = _locate(cfg, family, tensors, origin)
    full = Config(
        name=_make_name(origin),
        model=cfg,
        data=DataConfig(tokenizer=origin or "tokenizer.json"),
        train=TrainConfig(objective="classify" if cfg.classes else OBJECTIVES[cfg.family]),
    )
    return Plan(full, (*notes, *more, *dropped, *tied), places, tensors, origin)


def _make_name(origin: str) -> str:
    name = os.path.basename(os.path.normpath(origin))
    return re.sub(r"\.(gguf|bin)$", "", name) or "imported"


def _find_mask(archive: Archive, cfg: ModelConfig) -> dict[str, Any]:
    """Return the id of the mask of an encoder, which is one of its tokenizer's."""
    if cfg.family != "encoder":
        return {}
    specials = {} if archive.tokenizer is None else archive.tokenizer.special_ids
    return {"mask_token": specials.get("[MASK]", specials.get("<mask>", cfg.vocab - 1))}


def make_tokenizer(cfg: ModelConfig, archive: Archive) -> Tokenizer:
    """Return the tokenizer of an archive, or one of ids only."""
    if archive.tokenizer is not None:
        return archive.tokenizer
    sources = (archive.generation, archive.config)

    def find(name: str, default: int) -> int:
        ids = [i for x in sources for i in list_ids(x.get(f"{name}_token_id")) if i < cfg.vocab]
        return ids[0] if ids else default

    eos = find("eos", 0)
    return make_placeholder(cfg.vocab, find("bos", eos), eos, find("pad", eos), archive.origin)


def _drop_unused_head(
    cfg: ModelConfig, tensors: dict[str, Stored]
) -> tuple[dict[str, Stored], list[str]]:
    """Leave out the pooler of a BERT that does not classify."""
    if cfg.family != "encoder" or cfg.classes:
        return tensors, []
    kept = {n: x for n, x in tensors.items() if not re.fullmatch(r"bert\.pooler\..*", n)}
    left_out = [f"left out: {what}" for what in aliases.BERT_POOLER.values()]
    return kept, left_out if len(kept) < len(tensors) else []


def resolve_head(
    cfg: ModelConfig, family: Family, tensors: dict[str, Stored], origin: str
) -> tuple[ModelConfig, dict[str, Stored], list[str]]:
    """Decide by the tensors whether the output head is the embedding.

    An equal head is dropped where the config ties them; a different one is kept, with a message.

    Raises:
        ConfigError: the config does not tie them, and there is no head.
    """
    heads = [row.hf_name + ".weight" for row in family.table if row.path == "head"]
    found = next((name for name in heads if name in tensors), None)
    is_t5 = cfg.family == "encoder_decoder" and cfg.position == "t5"
    if found is None:
        has_no_head = cfg.family == "encoder" and cfg.head == "linear"
        if not cfg.tie and not is_t5 and not has_no_head:
            raise ConfigError(
                f"{origin}: tie_word_embeddings is false, and there is no {heads[0]}: the file is "
                "incomplete, or tie_word_embeddings must be true."
            )
        return dataclasses.replace(cfg, tie=True), tensors, []
    is_equal = family.embedding in tensors and aliases.are_equal(
        tensors[found], tensors[family.embedding]
    )
    if cfg.tie and is_equal:
        return cfg, {name: x for name, x in tensors.items() if name != found}, []
    note = f"{found} differs from {family.embedding}: untied, although tie_word_embeddings is true"
    return dataclasses.replace(cfg, tie=False), tensors, [note] if cfg.tie and not is_t5 else []


def _choose_dtype(tensors: Mapping[str, Stored]) -> str:
    """Return the dtype to compute in: that of most numbers, as far as there is such a one."""
    sizes: dict[str, int] = {}
    for x in tensors.values():
        sizes[x.dtype] = sizes.get(x.dtype, 0) + math.prod(x.shape)
    most = max(sizes, key=sizes.__getitem__, default="float32")
    return most if most in DTYPES else "float32"


def _locate(
    cfg: ModelConfig, family: Family, tensors: Mapping[str, Stored], origin: str
) -> dict[str, rows.Location]:
    """Return the location of every parameter, after all names and shapes have been checked."""
    stored = sum(math.prod(x.shape) for x in tensors.values())
    if max(cfg.layers, cfg.encoder_layers or 0) > len(tensors) or cfg.vocab > max(stored, 1):
        raise ConfigError(
            f"{origin}: the config is of a model with {cfg.layers} layers and {cfg.vocab} tokens, "
            f"and there are {len(tensors)} tensors with {stored:,} numbers."
        )
    expected = flatten_dict(abstract_params(cfg)[0], sep=".")
    places: dict[str, rows.Location] = {}
    for place in rows.locate_weights(family.table, tensors, cfg):
        places.setdefault(place.path, place)
    if missing := sorted(expected.keys() - places.keys()):
        known = {x.path: x for x in rows.list_locations(family.table, cfg)}
        wanted = known[missing[0]].names[0] if missing[0] in known else missing[0]
        raise ConfigError(f"{origin}: the tensor {wanted!r} is missing.")
    places = {path: place for path, place in places.items() if path in expected}
    used = {name for place in places.values() for name in place.names}
    if left := sorted(tensors.keys() - used):
        raise ConfigError(
            f"{origin}: the tensor {left[0]!r} has no place in the model that the config "
            f"describes, nor have {len(left) - 1} others."
        )
    for path, place in places.items():
        _check_shapes(cfg, place, tensors, expected[path].shape, origin)
    return places


def _check_shapes(
    cfg: ModelConfig,
    place: rows.Location,
    tensors: Mapping[str, Stored],
    shape: tuple[int, ...],
    origin: str,
):
    """Check the tensors of one parameter, by arrays that take no memory."""
    for name in place.names:
        if name not in tensors:
            raise ConfigError(f"{origin}: the tensor {name!r} is missing.")
        stored = tensors[name]
        if stored.dtype not in FLOATS:
            raise ConfigError(
                f"{origin}: the tensor {name!r} is of {stored.dtype}, and parameters must be of "
                f"{', '.join(FLOATS)}: a quantized model must be converted first."
            )
        try:
            found = place.read(np.broadcast_to(np.float32(0), stored.shape), cfg).shape
        except (ValueError, IndexError, TypeError, MemoryError):
            found = None
        if found != shape[len(place.dims) :]:
            raise ConfigError(
                f"{origin}: the tensor {name!r} has the shape {list(stored.shape)}, which does not "
                f"fit the config: it becomes {place.path}, {list(shape[len(place.dims) :])}."
            )


def to_model(
    archive: Archive,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    log: Callable[[str], None] = lambda note: None,
) -> LanguageModel:
    """Return the model of an archive.

    Args:
        dtype: "float32" or "bfloat16", of the parameters and of the computation; None keeps those
            of the archive (float16 becomes float32).
        mesh: a mesh to shard the parameters over; None = the first device.
        log: takes messages about what is left out, or decided.

    Raises:
        ConfigError: see `plan_import`.
    """
    plan = plan_import(archive)
    for note in plan.notes:
        log(f"{archive.origin}: {note}")
    config = plan.config
    if dtype is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    shapes, letters = abstract_params(config.model)
    shardings = make_load_shardings(shapes, letters, mesh)
    params = read_params(plan, flatten_dict(shardings, sep="."), dtype)
    tokenizer = make_tokenizer(config.model, archive)
    labels = families.list_labels(archive.config) if config.model.classes else ()
    return LanguageModel(config, params, tokenizer, labels, 0, archive.origin)


def read_params(plan: Plan, shardings: Mapping[str, Any], dtype: str | None = None) -> Any:
    """Read the parameters of a plan onto devices.

    Args:
        shardings: by path, of the parameters to read.
        dtype: see `to_model`.
    """
    groups: dict[tuple[str, ...], list[rows.Location]] = {}
    for path in shardings:  # those of fused tensors together, so that each tensor is read once
        groups.setdefault(plan.places[path].names, []).append(plan.places[path])
    arrays = {}
    for places in groups.values():
        values = read_parameters(plan, places, dtype)
        for place in places:
            arrays[place.path] = _put(values.pop(place.path), shardings[place.path])
    return unflatten_dict(arrays, sep=".")


def _put(value: np.ndarray, sharding) -> jax.Array:
    """Move an array to its device, or each shard of it to its own."""
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def read_parameters(
    plan: Plan, places: Sequence[rows.Location], dtype: str | None = None
) -> dict[str, np.ndarray]:
    """Read the tensors of one parameter, or of several that share them, into arrays by path.

    Args:
        dtype: see `to_model`.
    """
    cfg, first = plan.config.model, places[0]
    tensors = [plan.tensors[name] for name in first.names]
    target = get_dtype(dtype) if dtype else np.result_type(*(keep_dtype(x.dtype) for x in tensors))
    out: dict[str, np.ndarray] = {}
    for i, tensor in enumerate(tensors):
        whole = tensor.read()
        for place in places:
            value = place.read(whole, cfg)
            if i == 0:
                out[place.path] = allocate_aligned((len(tensors), *value.shape), target)
            out[place.path][i] = value
    return {
        place.path: out[place.path].reshape(*place.dims, *out[place.path].shape[1:])
        for place in places
    }


def keep_dtype(name: str) -> np.dtype:
    """Return the dtype that numbers are kept in: their own, if this library computes in it."""
    return get_dtype(name if name in DTYPES else "float32")


# --- writing -------------------------------------------------------------------------------------


def to_archive(model: LanguageModel, dtype: str | None = None) -> Archive:
    """Return a model in the terms of transformers; its tensors are made when they are read.

    Args:
        dtype: of the tensors, "float32", "bfloat16" or "float16"; None = that of the parameters.

    Raises:
        ConfigError: transformers has no such model.
    """
    kind, config = families.find_family(model.config.model)
    family, cfg = families.FAMILIES[kind], model.config.model
    flat = flatten_dict(model.params, sep=".")
    tensors: dict[str, Stored] = {}
    for name, parts in _group_locations(family, cfg, flat).items():
        tensors[name] = _make_tensor(cfg, parts, flat, dtype)
    if kind == "bart":  # transformers expects it, although it is zero
        tensors["final_logits_bias"] = store(np.zeros((1, cfg.vocab), np.float32))
    if kind == "bert" and not cfg.types:
        zeros = np.zeros((1, cfg.width), np.float32)
        tensors["bert.embeddings.token_type_embeddings.weight"] = store(zeros)
    missing = flat.keys() - {p.path for p in rows.list_locations(family.table, cfg)}
    if missing:
        raise ConfigError(f"the parameter {min(missing)} has no counterpart in {family.title}.")
    stored_in = dtype or str(_most_common([x.dtype for x in flat.values()]))
    config |= {"dtype": stored_in, "torch_dtype": stored_in} | _write_tokens(model)
    if model.labels:
        labels = {str(i): label for i, label in enumerate(model.labels)}
        config |= {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    elif cfg.classes:
        config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(cfg.classes)}}
    generation = {"eos_token_id": list_ends(model.tokenizer)} | _write_tokens(model, True)
    return Archive(config, tensors, model.tokenizer, generation, model.origin)


class Part(NamedTuple):
    """A parameter of jaxgpt, or one layer of it, that goes into a tensor of transformers."""

    place: rows.Location
    number: int  # among the tensors of the parameter


def _group_locations(
    family: Family, cfg: ModelConfig, flat: Mapping[str, Any]
) -> dict[str, list[Part]]:
    """Return the parts of every tensor that is written, in the order of the table."""
    found: dict[str, list[Part]] = {}
    for place in rows.list_locations(family.table, cfg):
        if place.path in flat and place.row.only != "read":
            for number, name in enumerate(place.names):
                found.setdefault(name, []).append(Part(place, number))
    return found


def _make_tensor(
    cfg: ModelConfig, parts: list[Part], flat: Mapping[str, Any], dtype: str | None
) -> Stored:
    row = parts[0].place.row

    def slice_part(part: Part):
        value, dims = flat[part.place.path], part.place.dims
        return value[np.unravel_index(part.number, dims)] if dims else value

    def make() -> np.ndarray:
        values = [fetch(slice_part(part)) for part in parts]
        arrays = [
            part.place.row.layout.write(np.asarray(value), cfg)
            for part, value in zip(parts, values, strict=True)
        ]
        whole = row.fusion.join(arrays, cfg) if row.fusion else arrays[0]
        return np.ascontiguousarray(whole, dtype=get_dtype(dtype) if dtype else whole.dtype)

    shape = _find_shape(cfg, parts, flat)
    name = dtype or np.dtype(flat[parts[0].place.path].dtype).name
    return Stored(shape, name, make)


def _find_shape(cfg: ModelConfig, parts: list[Part], flat: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a tensor without making it."""

    row, written = parts[0].place.row, []
    for part in parts:
        shape = flat[part.place.path].shape[len(part.place.dims) :]
        zeros = np.broadcast_to(np.float32(0), shape)  # without memory
        written.append(part.place.row.layout.write(zeros, cfg))
    return (row.fusion.join(written, cfg) if row.fusion else written[0]).shape


def _most_common(values: list) -> Any:
    return max(set(values), key=values.count)


def _write_tokens(model: LanguageModel, is_generation: bool = False) -> dict[str, Any]:
    """Return the ids of special tokens."""
    cfg, tokenizer = model.config.model, model.tokenizer
    ends = list_ends(tokenizer)
    found = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends if is_generation or len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad,
    }
    if cfg.family == "encoder_decoder":
        found["decoder_start_token_id"] = cfg.get_start_token(tokenizer.bos)
    return found


def list_ends(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a text."""
    return list(tokenizer.ends)
