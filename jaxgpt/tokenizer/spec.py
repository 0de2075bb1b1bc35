"""The parts of a tokenizer.json, read and checked before the library gets them.

Source: the format of the `tokenizers` library, whose `Tokenizer.to_str` writes it.
"""

import base64
import binascii
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.settings import ConfigError

MAX_VOCAB = 1 << 24  # ids in a tokenizer.json: a larger one is a mistake, and would fill the memory
_MAX_UNUSED_IDS = 1 << 16  # beside three for each token: gaps cost memory
USAGE_HINT = (
    "Use 'train', 'bytes', or the path of a tokenizer.json, of a tokenizer.model (SentencePiece), "
    "or of a folder with one of them, or with vocab.json and merges.txt, encoder.json and "
    "vocab.bpe, or vocab.txt."
)


@dataclass(frozen=True)
class Spec:
    """A tokenizer.json.

    Args:
        tree: its JSON.
        name: of the tokenizer, for messages.
    """

    tree: dict[str, Any]
    name: str

    @property
    def model(self) -> dict[str, Any]:
        """The table of tokens, and how they are found."""
        return self.tree["model"]

    @property
    def model_type(self) -> str:
        """Return "BPE", "Unigram", "WordPiece" or "WordLevel"."""
        return self.model.get("type") or "BPE"

    @property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens, which are found in a text before all others."""
        return self.tree["added_tokens"]

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        """Return the ids of the model's tokens."""
        vocab = self.model["vocab"]
        if self.model_type != "Unigram":
            return vocab
        return {piece: index for index, (piece, _) in enumerate(vocab)}

    @functools.cached_property
    def steps(self) -> dict[str, list[dict[str, Any]]]:
        """Return the steps of the normalizer, pre_tokenizer, post_processor and decoder."""
        names = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers",
                 "post_processor": "processors", "decoder": "decoders"}  # fmt: skip
        return {name: list(_flatten(self.tree.get(name), part)) for name, part in names.items()}

    def list_types(self, part: str) -> list[str]:
        """Return the types of the steps of a part."""
        return [step["type"] for step in self.steps[part]]


def _flatten(step: dict[str, Any] | None, part: str) -> Iterator[dict[str, Any]]:
    if step and step["type"] == "Sequence":
        for inner in step[part]:
            yield from _flatten(inner, part)
    elif step:
        yield step


def make_error(name: str, found: str) -> ConfigError:
    """Return the error for a file that is no tokenizer, or not one that can be used."""
    return ConfigError(f"data.tokenizer={name!r} cannot be used: {found}. {USAGE_HINT}")


def read_spec(content: str, name: str) -> Spec:
    """Parse a tokenizer.json and check what the library does not.

    Raises:
        ConfigError: it is not a tokenizer.json, or has ids that would fill the memory.
    """
    try:
        spec = Spec(json.loads(content), name)
        ids = [*spec.vocab.values(), *(token["id"] for token in spec.added)]
        _check_ids(name, ids)
        for token in spec.added:
            if not isinstance(token["content"], str) or not isinstance(token["special"], bool):
                raise make_error(name, f"an added token is {token['content']!r}")
        _check_names(spec)
        for step in spec.steps["normalizer"]:
            if step["type"] == "Precompiled":
                check_charsmap(base64.b64decode(step["precompiled_charsmap"], validate=True), name)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
            binascii.Error) as error:  # fmt: skip
        raise make_error(name, f"{type(error).__name__}: {error}") from error
    return spec


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_ids(name: str, ids: list[Any]):
    """Refuse ids that a table, or the library, would never come to the end of."""
    if wrong := [index for index in ids if not is_integer(index) or not 0 <= index < MAX_VOCAB]:
        raise make_error(name, f"it has the token id {wrong[0]!r}, not 0 to {MAX_VOCAB - 1:,}")
    if ids and max(ids) >= 4 * len(ids) + _MAX_UNUSED_IDS:
        raise make_error(name, f"it has the token id {max(ids)!r} and only {len(ids)} tokens")


def _check_names(spec: Spec):
    """Refuse two tokens with one id: one of them could not be decoded."""
    if spec.model_type == "Unigram":
        size = len(spec.model["vocab"])
        if len(spec.vocab) != size:
            raise make_error(spec.name, "a piece is in its vocabulary twice")
    by_id: dict[int, str] = {}
    for token, index in [*spec.vocab.items(), *((t["content"], t["id"]) for t in spec.added)]:
        if by_id.setdefault(index, token) != token:
            raise make_error(spec.name, f"{by_id[index]!r} and {token!r} have the id {index}")


def check_charsmap(charsmap: bytes, name: str):
    """Check a table of replaced characters, which the library reads without looking.

    It is the size of a double array in bytes, the array of uint32 units, and texts that end in a
    zero byte. Unit i leads by byte c to unit i ^ offset ^ c.

    Raises:
        ConfigError: a unit leads outside of the array, or a text is not inside of its block.

    Source: SentencePiece, `src/normalizer.h`; Yata, darts-clone.
    """
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    if len(charsmap) < 4 or size % 4 or size == 0 or size > len(charsmap) - 4:
        raise make_error(name, "its table of characters (precompiled_charsmap) is cut off")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)  # [N]
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    targets = np.arange(units.size) ^ offsets
    is_leaf = units >= 1 << 31
    leaves = targets[~is_leaf & (units >> 8 & 1 == 1)]
    is_inside = ((targets | 255) < max(units.size, 256)) | is_leaf
    try:
        texts.decode()
        starts = units[leaves] & 0x7FFFFFFF
        inside = np.array([byte & 0xC0 == 0x80 for byte in texts], bool)
        is_right = is_inside.all() and units.size % 256 == 0 and not inside[starts].any()
    except (UnicodeDecodeError, IndexError):
        is_right = False
    if not is_right:
        raise make_error(name, "its table of characters (precompiled_charsmap) is damaged")
