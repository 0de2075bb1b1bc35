"""Models of llama.cpp: one GGUF file with parameters, settings and tokenizer, read and written.

    archive = open_file("SmolLM2-135M-Instruct.Q4_1.gguf")
    write_file(archive, "mine.gguf", quantize="Q8_0")

Every quantization that the package gguf dequantizes is read, and every one that it computes is
written. Matrices take the kind that is asked for; what llama.cpp wants in float32 (norms, biases,
positions, routers, convolutions) stays so.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxgpt.interop import gguf_format, gguf_tokenizer, gguf_tokenizer_write
from jaxgpt.interop.archive import Archive, Stored
from jaxgpt.interop.gguf_architectures import ARCHITECTURES, Architecture, expand
from jaxgpt.interop.gguf_format import NewTensor, TensorEntry, Value
from jaxgpt.interop.gguf_rope import ROPE_FACTORS, make_rope_factors
from jaxgpt.interop.gguf_rows import Row
from jaxgpt.interop.gguf_settings import Config, Settings
from jaxgpt.settings import ConfigError, choose

MAX_LAYERS = 10_000
# The number in general.file_type, by the kind of the matrices.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip
# Beginnings and endings of the names of tensors that llama.cpp reads in float32 alone.
_FLOAT32_TENSORS = ("position_embd", "token_types", "ffn_gate_inp", "ssm_conv1d", "attn_rel_b")
_TABLES = ("token_embd.weight", "output.weight")  # of at least 8 bits, since errors there are large
_PLAIN_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# --- reading -----------------------------------------------------------------------------------


def open_file(path: str | os.PathLike) -> Archive:
    """Read what a GGUF file holds, without its tensors: they are read when they are needed.

    Args:
        path: the file; of a model in parts, the first.

    Returns:
        The archive, in the names, layouts and settings of transformers. Quantized tensors are
        float32.

    Raises:
        ConfigError: the file is damaged, or holds something that is not supported; the message
            names the file and the tensor or setting.
    """
    path = os.fspath(path)
    header = gguf_format.read_header(path)
    settings = Settings(header, path)
    if settings.architecture == "bart":
        raise ConfigError(f"{path}: llama.cpp has no BART.")
    architecture = choose(ARCHITECTURES, settings.architecture, f"{path}: general.architecture")
    config = _read_config(architecture, settings)
    tensors = dict(_match_tensors(architecture, settings, config))
    content = gguf_tokenizer.read(header.metadata, config["vocab_size"], path)
    _add_special_ids(config, content)
    generation = {} if content is None else content.generation()
    tokenizer = None if content is None else content.make(path)
    return Archive(config, tensors, tokenizer, generation, path)


def _read_config(architecture: Architecture, settings: Settings) -> Config:
    header, path = settings.header, settings.path
    config: Config = {
        "model_type": architecture.model_types[0],
        "architectures": [architecture.kind],
    }
    for key in architecture.keys:
        kind = {"float32": float, "bool": bool}.get(key.type, int)
        default = key.default(config) if key.default else None
        value = settings.get(key.gguf, kind, default)
        if value == 0 and kind is int and key.hf != "decoder_start_token_id":
            raise ConfigError(f"{path}: the setting {settings.architecture}.{key.gguf} is 0.")
        config[key.hf] = value
    if (layers := _count_layers(config)) > MAX_LAYERS:
        raise ConfigError(f"{path}: it has {layers:,} layers, more than {MAX_LAYERS:,}.")
    config |= {key: values[0] for key, values in architecture.fixed.items()}
    if "token_embd.weight" not in header.tensors:
        raise ConfigError(f"{path}: the tensor 'token_embd.weight' is missing.")
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    architecture.read_extra(config, settings)
    settings.require("vocab_size", [config["vocab_size"]], config["vocab_size"])
    settings.ignore("tensor_data_layout")
    settings.check_all_read()
    return config


def _count_layers(config: Mapping[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
    return max(config.get(name) or 0 for name in names)


def _match_tensors(
    architecture: Architecture, settings: Settings, config: Config
) -> Iterator[tuple[str, Stored]]:
    """Yield the name in transformers and the tensor, for every tensor of a file."""
    found = dict(settings.header.tensors)
    for row in _select_rows(architecture, config):
        if row.gguf.count("{}") == 1:  # one tensor for each expert, in old files
            for expert in range(config.get("num_local_experts", 0)):
                if entry := found.pop(row.gguf.format(expert), None):
                    yield row.hf.format(expert), _store(entry, row, config)
        elif entry := found.pop(row.gguf, None):
            if row.hf.count("{}") == 1:
                yield from _split_experts(entry, row, config)
            else:
                yield row.hf, _store(entry, row, config)
    found.pop(ROPE_FACTORS, None)  # read with the settings
    if found:
        raise ConfigError(
            f"{settings.path}: the tensor {min(found)!r} is none of the architecture "
            f"{architecture.name} with {_count_layers(config)} layers."
        )


def _select_rows(architecture: Architecture, config: Config) -> Iterator[Row]:
    skipped = architecture.skipped(config)
    for row in expand(architecture, _count_layers(config)):
        if not skipped or skipped not in row.hf:
            yield row


def _store(entry: TensorEntry, row: Row, config: Config) -> Stored:
    gguf_format.check_kind(entry)
    try:
        shape = row.layout.read_shape(entry.shape)
    except IndexError as error:
        raise ConfigError(f"{entry.path}: {entry.name!r} has the shape {entry.shape}.") from error

    def read() -> np.ndarray:
        array = gguf_format.read_tensor(entry)
        try:
            return row.layout.read(array, config).astype(entry.dtype, copy=False)
        except ValueError as error:
            raise ConfigError(
                f"{entry.path}: the tensor {entry.name!r} of the shape {entry.shape} does not fit "
                "the number of heads."
            ) from error

    return Stored(shape, entry.dtype, read, entry.quantization)


def _split_experts(entry: TensorEntry, row: Row, config: Config) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of all experts, each of which is read without the others."""
    gguf_format.check_kind(entry)
    experts = config.get("num_local_experts", 0)
    if len(entry.shape) != 3 or entry.shape[0] != experts:
        raise ConfigError(
            f"{entry.path}: the tensor {entry.name!r} has the shape {entry.shape}, not one matrix "
            f"for each of {experts} experts."
        )
    for expert in range(experts):
        read = lambda i=expert: gguf_format.read_tensor(entry, i, i + 1)[0]  # noqa: E731
        yield row.hf.format(expert), Stored(entry.shape[1:], entry.dtype, read, entry.quantization)


def _add_special_ids(config: Config, content: "gguf_tokenizer.Content | None") -> None:
    if content is None:
        return
    for name in ("bos", "eos", "pad"):
        if (index := content.ids.get(name)) is not None:
            config[f"{name}_token_id"] = index


# --- writing -----------------------------------------------------------------------------------


def write_file(archive: Archive, path: str | os.PathLike, quantize: str | None = None) -> None:
    """Write a GGUF file that llama.cpp loads, one tensor at a time, atomically.

    Args:
        archive: the model.
        path: of the file.
        quantize: how to store matrices: "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1",
            "Q4_0", "TQ2_0", "TQ1_0", "MXFP4"; None keeps the dtype of the archive. Tables of
            embeddings and heads have at least 8 bits. Rows that are no multiple of the quantization
            block become F16.

    Raises:
        ConfigError: llama.cpp has no such model, or it would compute it otherwise.
    """
    path = os.fspath(path)
    if quantize is not None:
        _check_quantize(quantize)
    config = dict(archive.config)
    architecture = _find_architecture(config)
    metadata = _describe(archive, config, architecture, quantize)
    tensors = list(_plan_tensors(archive, config, architecture, quantize))
    gguf_format.write(path, architecture.name, metadata, tensors)


def _check_quantize(quantize: str) -> None:
    writable = gguf_format.list_writable_kinds()
    if quantize in writable:
        return
    known = gguf_format.list_readable_kinds()
    reason = "can be read but not written" if quantize in known else "is not known"
    raise ConfigError(
        f"quantize={quantize!r} {reason}. Known: {', '.join(writable)}. For K- and IQ-quants, "
        "write F16 or BF16 and use llama.cpp's llama-quantize."
    )


def _find_architecture(config: Config) -> Architecture:
    kind = config.get("model_type")
    for architecture in ARCHITECTURES.values():
        if kind in architecture.model_types:
            return architecture
    known = sorted(name for row in ARCHITECTURES.values() for name in row.model_types)
    raise ConfigError(
        f"model_type={kind!r} has no counterpart in llama.cpp. Known: {', '.join(known)}."
    )


def _describe(
    archive: Archive, config: Config, architecture: Architecture, quantize: str | None
) -> dict[str, Value]:
    """Return all metadata of a file."""
    for key, values in architecture.fixed.items():
        if config.get(key, values[0]) not in values:
            raise ConfigError(
                f"{key}={config[key]!r}: llama.cpp computes a {architecture.name} with "
                f"{' or '.join(map(repr, values))}."
            )
    settings: dict[str, Value] = {}
    for setting in architecture.keys:
        value = config.get(setting.hf)
        if value is None and setting.default:
            value = setting.default(config)
        if value is None:
            raise ConfigError(f"{archive.origin}: the config has no {setting.hf}.")
        config[setting.hf] = value
        settings[setting.gguf] = Value(value, setting.type)
    settings |= architecture.write_extra(config, archive.tensors)
    rows = _find_embeddings(archive, config, architecture).shape[0]
    settings["vocab_size"] = Value(rows, "uint32")
    dtype = archive.tensors[max(archive.tensors, key=lambda x: math.prod(archive.tensors[x].shape))]
    general = {
        "general.type": Value("model", "string"),
        "general.name": Value(_make_name(archive, config), "string"),
        "general.file_type": Value(
            FILE_TYPES[quantize or _PLAIN_KINDS.get(dtype.dtype, "F32")], "uint32"
        ),
        "general.quantization_version": Value(2, "uint32"),
    }
    own = {f"{architecture.name}.{key}": value for key, value in settings.items()}
    tokens = gguf_tokenizer_write.write(archive.tokenizer, archive.generation, config, rows)
    return general | own | tokens


def _make_name(archive: Archive, config: Config) -> str:
    path = config.get("_name_or_path") or archive.origin or "model"
    return os.path.splitext(os.path.basename(os.path.normpath(path)))[0] or "model"


def _find_embeddings(archive: Archive, config: Config, architecture: Architecture) -> Stored:
    name = next(row.hf for row in architecture.rows if row.gguf == "token_embd.weight")
    if name not in archive.tensors:
        raise ConfigError(f"{archive.origin}: the tensor {name!r} is missing.")
    return archive.tensors[name]


def _plan_tensors(
    archive: Archive, config: Config, architecture: Architecture, quantize: str | None
) -> Iterator[NewTensor]:
    left = dict(archive.tensors)
    architecture.complete(config, left)
    for row in _select_rows(architecture, config):
        if row.gguf.count("{}") == 1:
            continue
        if row.hf.count("{}") == 1:
            if parts := _pop_experts(left, row, config):
                yield _stack(row.gguf, parts, quantize)
        elif stored := left.pop(row.hf, None):
            factor = architecture.write_factor(config, row.gguf)
            yield _rearrange(stored, row, config, quantize, factor)
    if (factors := _make_factors(architecture, config)) is not None:
        yield NewTensor(ROPE_FACTORS, factors.shape, "F32", lambda: factors)
    dropped = [name for name in left if name.startswith(architecture.dropped or ("\n",))]
    if dropped:
        warnings.warn(
            f"llama.cpp has no place for {', '.join(sorted(dropped))}: the file is without.",
            stacklevel=2,
        )
    if unknown := sorted(left.keys() - set(dropped)):
        raise ConfigError(
            f"{archive.origin}: the tensor {unknown[0]!r} has no place in llama.cpp's "
            f"{architecture.name}."
        )


def _make_factors(architecture: Architecture, config: Config) -> np.ndarray | None:
    return make_rope_factors(config) if architecture.name == "llama" else None


def _pop_experts(left: dict[str, Stored], row: Row, config: Config) -> list[Stored]:
    names = [row.hf.format(i) for i in range(config.get("num_local_experts") or 0)]
    found = [name for name in names if name in left]
    if found and len(found) < len(names):
        raise ConfigError(f"the tensor {min(set(names) - set(found))!r} is missing.")
    return [left.pop(name) for name in found]


def _stack(name: str, parts: list[Stored], quantize: str | None) -> NewTensor:
    shape = (len(parts), *parts[0].shape)
    kind = _choose_kind(name, shape, parts[0].dtype, quantize)
    return NewTensor(
        name, shape, kind, lambda: _to_kind(np.stack([part.read() for part in parts]), kind, name)
    )


def _rearrange(
    stored: Stored, row: Row, config: Config, quantize: str | None, factor: float
) -> NewTensor:
    shape = row.layout.write_shape(stored.shape)
    kind = _choose_kind(row.gguf, shape, stored.dtype, quantize)
    is_exact = row.layout.is_exact and factor == 1.0

    def read() -> np.ndarray:
        array = stored.read()
        array = array if is_exact else array.astype(np.float32)
        array = row.layout.write(array, config)
        return _to_kind(array if is_exact else array * np.float32(factor), kind, row.gguf)

    return NewTensor(row.gguf, shape, kind, read)


def _to_kind(array: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Refuse values that float16 cannot hold, which would become infinite."""
    if kind == "F16" and array.dtype != np.float16:
        largest = float(np.abs(array.astype(np.float32, copy=False)).max(initial=0))
        if largest >= 65520:  # half a step above the largest float16
            raise ConfigError(f"{name!r} has the value {largest:.6g}, too large for F16: use BF16.")
    return array


def _choose_kind(name: str, shape: tuple[int, ...], dtype: str, quantize: str | None) -> str:
    """Return how to store a tensor."""
    is_matrix = len(shape) > 1 and name.endswith(".weight")
    if not is_matrix or any(part in name for part in _FLOAT32_TENSORS):
        return "F32"
    kind = quantize or _PLAIN_KINDS.get(dtype, "F32")
    if kind in gguf_format.PLAIN_KINDS:
        return kind
    kind = "Q8_0" if name in _TABLES else kind
    return kind if gguf_format.fits(shape, kind) else "F16"
