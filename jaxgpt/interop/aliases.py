"""Tensors that files name otherwise, hold twice, or hold without need: by model family.

Files of a bare model lack a prefix, old ones have other endings, some hold masks and tables that
are computed, and tied tables may be written several times.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxgpt.interop.archive import Stored
from jaxgpt.settings import ConfigError


class Aliases(NamedTuple):
    """What to make of tensors before they are looked up in a table of names.

    Each key is a regular expression that a whole name matches.
    """

    renames: Mapping[str, str] = {}  # -> the name of the table
    unused: tuple[str, ...] = ()  # buffers, which are computed
    copies: Mapping[str, str] = {}  # -> the tensor that it must be equal to
    zeros: tuple[str, ...] = ()  # added somewhere: only zeros mean nothing
    dropped: Mapping[str, str] = {}  # -> what is left out, for the message


_ROTARY = (r".*\.rotary_emb\.inv_freq",)
_GPT2_MASKS = (r".*\.attn\.(bias|masked_bias)",)

LLAMA = Aliases({r"((?:embed_tokens|layers|norm)\..*)": r"model.\1"}, _ROTARY)
GEMMA = Aliases(
    {
        **LLAMA.renames,
        r"language_model\.(model\..*|lm_head\..*)": r"\1",
        r"model\.language_model\.(?!model\.)(.*)": r"model.\1",
    },
    _ROTARY,
    dropped={
        r"(model\.)?vision_tower\..*": "the vision tower",
        r"(model\.)?multi_modal_projector\..*": "the projector of images",
    },
)
GPT2 = Aliases({r"((?:wte|wpe|h|ln_f)\..*)": r"transformer.\1"}, _GPT2_MASKS)
GPT_NEOX = Aliases(
    {r"((?:embed_in|layers|final_layer_norm)\..*)": r"gpt_neox.\1"},
    (r".*\.attention\.(bias|masked_bias)", r".*\.rotary_emb\.inv_freq"),
)
BLOOM = Aliases({r"((?:word_embeddings|word_embeddings_layernorm|h|ln_f)\..*)": r"transformer.\1"})
MPT = Aliases({r"((?:wte|blocks|norm_f)\..*)": r"transformer.\1"})
BERT = Aliases(
    {
        r"((?:embeddings|encoder|pooler)\..*)": r"bert.\1",
        r"(.*LayerNorm)\.gamma": r"\1.weight",
        r"(.*LayerNorm)\.beta": r"\1.bias",
    },
    (r".*\.position_ids",),
    {r"cls\.predictions\.decoder\.bias": "cls.predictions.bias"},
    dropped={r"cls\.seq_relationship\..*": "the head for next sentences"},
)
BERT_POOLER = {r"bert\.pooler\..*": "the pooler, which no head of this model uses"}
T5 = Aliases(
    unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    copies={r"(encoder|decoder)\.embed_tokens\.weight": "shared.weight"},
)
BART = Aliases(
    {r"((?:shared|encoder|decoder)\..*)": r"model.\1"},
    copies={r"model\.(encoder|decoder)\.embed_tokens\.weight": "model.shared.weight"},
    zeros=("final_logits_bias",),
)
MAMBA = Aliases(
    {
        r"((?:embeddings?|layers|norm_f)\..*)": r"backbone.\1",
        r"backbone\.embedding\.weight": "backbone.embeddings.weight",
    }
)


def rename_tensors(
    tensors: Mapping[str, Stored], aliases: Aliases, where: str
) -> tuple[dict[str, Stored], list[str]]:
    """Return the tensors by the names of the tables, and messages about what is left out.

    Raises:
        ConfigError: two tensors have one name, or one that must be a copy, or zero, is not.
    """
    found: dict[str, Stored] = {}
    for name, stored in tensors.items():
        new = _rename(name, aliases.renames)
        if new in found:
            raise ConfigError(f"{where}: two tensors are {new!r}; one of them is {name!r}.")
        found[new] = stored
    notes: dict[str, None] = {}
    for name in list(found):
        if _matches(name, aliases.unused):
            del found[name]
        elif _matches(name, aliases.zeros):
            if np.any(found.pop(name).read()):
                raise ConfigError(
                    f"{where}: {name} is not zero, and a bias of the logits is not supported."
                )
        elif what := _find(name, aliases.dropped):
            del found[name]
            notes[f"left out: {what}"] = None
        elif other := _find(name, aliases.copies):
            found.setdefault(other, found[name])
            if not are_equal(found[name], found[other]):
                raise ConfigError(
                    f"{where}: {name} differs from {other}; a table of its own is not supported."
                )
            del found[name]
    return found, list(notes)


def are_equal(a: Stored, b: Stored) -> bool:
    """Return whether two tensors have the same bits."""
    return a is b or (
        (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()
    )


def _rename(name: str, renames: Mapping[str, str]) -> str:
    for pattern, replacement in renames.items():
        if match := re.fullmatch(pattern, name):
            name = match.expand(replacement)
    return name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _find(name: str, table: Mapping[str, str]) -> str:
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), "")
