"""Models of llama2.c: one .bin file, and a tokenizer.bin beside it.

    version 0   7 int32: D F L H G V S; V negative if the head is not tied; then float32
    version 1   "ak42" 1, the 7 int32, whether the head is tied, zeros to byte 256; then float32
    version 2   as 1 with a group size; norms in float32, matrices as int8 and a float32 per group

Version 0 stores embeddings, attention norms, wq, wk, wv, wo, feed-forward norms, w1, w2, w3, the
last norm, two tables of RoPE, which are skipped, and the head; the others store all norms first.
RoPE rotates neighbors, as in GGUF's llama: q and k are permuted.

Source: https://github.com/karpathy/llama2.c, export.py and run.c.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.interop import gguf_tokenizer
from jaxgpt.interop.archive import Archive, Stored
from jaxgpt.interop.gguf_rows import KEEP, PERMUTE_K, PERMUTE_Q, Layout
from jaxgpt.settings import ConfigError

MAGIC = b"24ka"  # the number 0x616b3432
HEADER_BYTES = 256  # of versions 1 and 2
MAX_SIZE = 1 << 24  # of each number in the header
MAX_LAYERS = 10_000
_LAYERS = "model.layers.{}"


class Sizes(NamedTuple):
    """The seven numbers of a header: D F L H G V S."""

    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int


class Tensor(NamedTuple):
    """One tensor of every layer, or one of the model: its name in transformers, and its shape."""

    name: str
    shape: tuple[int, ...]
    layout: Layout = KEEP


class Header(NamedTuple):
    """What a file begins with."""

    version: int
    sizes: Sizes
    is_tied: bool
    group: int  # values with one scale, in version 2
    start: int  # in bytes


def is_llama2c(path: str | os.PathLike) -> bool:
    """Return whether a file begins as one of llama2.c does."""
    if not os.path.isfile(path):
        return False
    try:
        _read_sizes(os.fspath(path))
    except ConfigError:
        return False
    return True


def open_file(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None) -> Archive:
    """Read what a file of llama2.c holds, without its tensors.

    Args:
        path: the file, such as stories15M.bin.
        tokenizer: its tokenizer file; None takes tokenizer.bin beside it, or tok<V>.bin.

    Returns:
        The archive of a Llama in the layouts of transformers, float32; without a tokenizer if
        there is none.

    Raises:
        ConfigError: a file is damaged, or another one.
    """
    path = os.fspath(path)
    header = _read_header(path)
    size = header.sizes
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": size.width,
        "intermediate_size": size.ffn, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "head_dim": size.width // size.heads, "vocab_size": size.vocab,
        "max_position_embeddings": size.context, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": header.is_tied, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    tensors = {tensor.name: stored for tensor, stored in _store(path, header, config)}
    found = tokenizer or _find_tokenizer(path, size.vocab)
    if found is None:
        return Archive(config, tensors, None, {}, path)
    content = _read_tokenizer(os.fspath(found), size.vocab)
    return Archive(config, tensors, content.make(os.fspath(found)), content.generation(), path)


def _read_header(path: str) -> Header:
    header, total = _read_sizes(path), os.path.getsize(path)
    expected = header.start + sum(length for *_, length in _list_tensors(header))
    if total != expected:
        raise ConfigError(
            f"{path}: it has {total:,} bytes, and a model of llama2.c with {header.sizes} has "
            f"{expected:,}: it is cut short, damaged, or of another kind."
        )
    return header


def _read_sizes(path: str) -> Header:
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes are no model of llama2.c.")
    if raw[:4] != MAGIC:
        header = _read_header_0(raw)
    else:
        (version,) = struct.unpack_from("<i", raw, 4)
        if version not in (1, 2):
            raise ConfigError(f"{path}: version {version} of llama2.c is not 0, 1 or 2.")
        values = struct.unpack_from("<7iBi", raw, 8)
        group = values[8] if version == 2 else 1
        header = Header(version, Sizes(*values[:7]), values[7] != 0, group, HEADER_BYTES)
    _check_sizes(path, header)
    return header


def _read_header_0(raw: bytes) -> Header:
    values = struct.unpack_from("<7i", raw)
    return Header(0, Sizes(*values)._replace(vocab=abs(values[5])), values[5] > 0, 1, 28)


def _check_sizes(path: str, header: Header) -> None:
    size = header.sizes
    wrong = [name for name, value in size._asdict().items() if not 0 < value <= MAX_SIZE]
    if wrong:
        raise ConfigError(
            f"{path}: it is no model of llama2.c: {wrong[0]} would be {getattr(size, wrong[0])}."
        )
    is_even = size.width % size.heads == 0 and size.heads % size.kv_heads == 0
    if size.layers > MAX_LAYERS or not is_even or size.width // size.heads % 2:
        raise ConfigError(f"{path}: it is no model of llama2.c: it would have {size}.")
    matrices = (size.width, size.width // size.heads * size.kv_heads * size.width, size.ffn)
    if header.group < 1 or any(size.width * count % header.group for count in matrices):
        raise ConfigError(f"{path}: a group size of {header.group} does not divide its matrices.")


def _list_layer(size: Sizes) -> dict[str, Tensor]:
    key_width = size.width // size.heads * size.kv_heads
    square, attention, ffn = (size.width, size.width), f"{_LAYERS}.self_attn", f"{_LAYERS}.mlp"
    tensors = {
        "attention_norm": Tensor(f"{_LAYERS}.input_layernorm", (size.width,)),
        "wq": Tensor(f"{attention}.q_proj", square, PERMUTE_Q),
        "wk": Tensor(f"{attention}.k_proj", (key_width, size.width), PERMUTE_K),
        "wv": Tensor(f"{attention}.v_proj", (key_width, size.width)),
        "wo": Tensor(f"{attention}.o_proj", square),
        "ffn_norm": Tensor(f"{_LAYERS}.post_attention_layernorm", (size.width,)),
        "w1": Tensor(f"{ffn}.gate_proj", (size.ffn, size.width)),
        "w2": Tensor(f"{ffn}.down_proj", (size.width, size.ffn)),
        "w3": Tensor(f"{ffn}.up_proj", (size.ffn, size.width)),
    }
    return {key: x._replace(name=f"{x.name}.weight") for key, x in tensors.items()}


def _list_tensors(header: Header) -> Iterator[tuple[Tensor | None, int, bool, int]]:
    """Yield (tensor, layer, whether it is quantized, bytes) in the order of the file."""
    size, of_layer = header.sizes, _list_layer(header.sizes)
    embeddings = Tensor("model.embed_tokens.weight", (size.vocab, size.width))
    last_norm = Tensor("model.norm.weight", (size.width,))
    head = [] if header.is_tied else [Tensor("lm_head.weight", embeddings.shape)]
    norms, matrices = ["attention_norm", "ffn_norm"], ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    order: list[Any] = [*norms, last_norm, embeddings, *matrices, *head]
    if header.version == 0:
        table = size.context * (size.width // size.heads // 2) * 4  # cosines, then sines
        order = [embeddings, *of_layer, last_norm, table, table, *head]
    for item in order:
        if isinstance(item, int):
            yield None, 0, False, item
            continue
        tensor = of_layer[item] if isinstance(item, str) else item
        is_quantized = header.version == 2 and len(tensor.shape) > 1
        count = math.prod(tensor.shape)
        length = count + 4 * (count // header.group) if is_quantized else 4 * count
        for layer in range(size.layers if isinstance(item, str) else 1):
            yield tensor, layer, is_quantized, length


def _store(path: str, header: Header, config: dict[str, Any]) -> Iterator[tuple[Tensor, Stored]]:
    offset = header.start
    for tensor, layer, is_quantized, length in _list_tensors(header):
        if tensor is not None:
            named = tensor._replace(name=tensor.name.format(layer))
            group = header.group if is_quantized else 0
            read = _make_reader(path, offset, named, group, config)
            yield named, Stored(named.shape, "float32", read)
        offset += length


def _make_reader(path: str, offset: int, tensor: Tensor, group: int, config: dict[str, Any]):
    count = math.prod(tensor.shape)

    def read() -> np.ndarray:
        if group:
            values = _load(path, "<i1", count, offset).astype(np.float32).reshape(-1, group)
            values *= _load(path, "<f4", count // group, offset + count)[:, None]
        else:
            values = _load(path, "<f4", count, offset)
        if not np.isfinite(values).all():
            raise ConfigError(f"{path}: the tensor {tensor.name!r} has values that are not finite.")
        return tensor.layout.read(values.reshape(tensor.shape), config)

    return read


def _load(path: str, form: str, count: int, offset: int) -> np.ndarray:
    values = np.fromfile(path, form, count, offset=offset)
    if len(values) != count:
        raise ConfigError(f"{path}: the file became shorter while it was read.")
    return values


# --- the tokenizer -----------------------------------------------------------------------------


def _find_tokenizer(path: str, vocab: int) -> str | None:
    folder = os.path.dirname(path)
    names = [os.path.join(folder, name) for name in (f"tok{vocab}.bin", "tokenizer.bin")]
    return next((name for name in names if os.path.isfile(name)), None)


def _read_tokenizer(path: str, vocab: int) -> gguf_tokenizer.Content:
    """Read a tokenizer.bin: the longest token, then the score, length and bytes of every token."""
    with open(path, "rb") as file:
        raw = file.read(64 * MAX_SIZE)
    tokens, scores, at = [], [], 4
    for index in range(vocab):
        if at + 8 > len(raw):
            raise ConfigError(
                f"{path}: it ends after {index:,} of the {vocab:,} tokens of the model."
            )
        score, length = struct.unpack_from("<fi", raw, at)
        text = raw[at + 8 : at + 8 + max(length, 0)]
        if length < 0 or len(text) < length:
            raise ConfigError(f"{path}: token {index} would have {length} bytes: it is damaged.")
        try:
            tokens.append(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: token {index}, {text!r:.60}, is not UTF-8.") from error
        scores.append(score)
        at += 8 + length
    if at != len(raw):
        raise ConfigError(f"{path}: it has more than the {vocab:,} tokens of the model.")
    # The command that writes it puts line ends around bos and eos, and spaces for their mark.
    tokens[:3] = [token.strip("\n") for token in tokens[:3]]
    tokens[3:] = [token.replace(" ", gguf_tokenizer.SPACE) for token in tokens[3:]]
    key = gguf_tokenizer.KEY
    metadata = {
        f"{key}model": "llama",
        f"{key}tokens": tokens,
        f"{key}scores": np.array(scores, np.float32),
        f"{key}token_type": np.array([_find_type(i, x) for i, x in enumerate(tokens)]),
    }
    content = gguf_tokenizer.read(metadata, vocab, path)
    assert content is not None
    # In its data, and in what its models write, a text ends where bos begins the next one.
    return dataclasses.replace(content, ends=(*content.ends, content.ids["bos"]))


def _find_type(index: int, token: str) -> int:
    if index < 3:
        return (gguf_tokenizer.UNKNOWN, gguf_tokenizer.CONTROL, gguf_tokenizer.CONTROL)[index]
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return gguf_tokenizer.BYTE if is_byte else gguf_tokenizer.NORMAL
