"""The `tokenizers` library's encoder of a tokenizer.json, for text alone.

It gives the ids of the file's tokens, without the steps that add, cut, pad or randomize. Special
tokens are renamed to what no text can spell, so text that reads `</s>` is text.
"""

import contextlib
import json
from collections.abc import Collection, Iterator
from typing import Any

import tokenizers

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.spec import Spec, make_error


@contextlib.contextmanager
def catch_library_errors(name: str) -> Iterator[None]:
    """Raise a ConfigError for what the library raises: bare Exceptions, and panics of Rust."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # no subclass of Exception
        if not is_panic and not isinstance(error, Exception):
            raise
        raise make_error(name, f"{type(error).__name__}: {error}") from error


def make_encoder(
    spec: Spec, steps: dict[str, list[dict[str, Any]]], specials: Collection[str]
) -> tokenizers.Tokenizer:
    """Build the library's tokenizer.

    Args:
        spec: the tokenizer.json.
        steps: its normalizer and pre_tokenizer steps, to be used in place of its own.
        specials: the tokens that no text is encoded to by spelling them.

    Raises:
        Exception: the library refuses the file; see `catch_library_errors`.
    """
    tree = spec.tree | dict.fromkeys(("post_processor", "truncation", "padding", "decoder"))
    tree |= {
        "normalizer": _join("normalizers", steps["normalizer"]),
        "pre_tokenizer": _join("pretokenizers", steps["pre_tokenizer"]),
    }
    hide = {token: f" {token} " for token in specials}  # no step leaves a space in a word
    # Stripping the whitespace beside an added token would lose it.
    exact = {"lstrip": False, "rstrip": False}
    added = [token | exact for token in spec.added]
    tree["added_tokens"] = [
        token | {"content": hide.get(token["content"], token["content"]),
                 "special": token["content"] in hide}
        for token in added
    ]  # fmt: skip
    tree["model"] = _hide_specials(spec, hide)
    library = tokenizers.Tokenizer.from_str(json.dumps(tree))
    if isinstance(library.model, tokenizers.models.BPE):
        library.model.dropout = None
    library.encode_special_tokens = True
    for token in tree["added_tokens"]:
        found = library.token_to_id(token["content"])
        if not token["special"] and found != token["id"]:
            raise ValueError(
                f"the added token {token['content']!r} has the id {token['id']}, but its place in "
                f"the file gives {found}"
            )
    return library


def _join(part: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", part: steps}


def _hide_specials(spec: Spec, hide: dict[str, str]) -> dict[str, Any]:
    """Return the model with its special tokens renamed, and without merges that make them."""
    model = spec.model
    if not hide.keys() & spec.vocab.keys():
        return model
    if spec.model_type == "Unigram":
        return model | {
            "vocab": [[hide.get(piece, piece), score] for piece, score in model["vocab"]]
        }
    changed = model | {"vocab": {hide.get(token, token): i for token, i in model["vocab"].items()}}
    if model.get("unk_token") in hide:
        changed["unk_token"] = hide[model["unk_token"]]
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        changed["merges"] = [
            [left, right] for left, right in pairs
            if not hide.keys() & {left, right, left + right}
        ]  # fmt: skip
    return changed
