"""Which tokens begin, end and pad a text: what a model's files state, else by their names."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.spec import Spec, is_integer, make_error

# Names of the special tokens in common tokenizers, in order of preference.
EOS_NAMES = ("<eos>", "</s>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>",
             "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "[SEP]")  # fmt: skip
BOS_NAMES = ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>",
             "<｜begin▁of▁sentence｜>", "[CLS]")  # fmt: skip
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
UNK_NAMES = ("<unk>", "[UNK]")


class Roles(NamedTuple):
    """Ids of the tokens with a role."""

    bos: int
    eos: int
    pad: int
    unk: int
    ends: tuple[int, ...]  # the tokens that end a text; eos is the first
    adds_bos: bool  # whether a text begins with bos


def find_roles(
    spec: Spec,
    names: Mapping[str, int],
    specials: Mapping[str, int],
    settings: Mapping[str, Any],
    ends: Iterable[int] | None,
) -> Roles:
    """Return the ids of the tokens with a role.

    Args:
        spec: the tokenizer.json.
        names: ids of all tokens.
        specials: ids of the special tokens.
        settings: of tokenizer_config.json.
        ends: ids that end a text, if they are known.

    Raises:
        ConfigError: no token ends a text, or a given one is not in the vocabulary.
    """

    def find(role: str, choices: Sequence[str]) -> int | None:
        stated = read_token_setting(settings.get(f"{role}_token"))
        if stated is not None and stated in names:
            return names[stated]
        return next((specials[name] for name in choices if name in specials), None)

    found = tuple(dict.fromkeys(ends or ()))
    known = {*names.values()}
    if wrong := [index for index in found if not is_integer(index) or index not in known]:
        raise make_error(spec.name, f"a text is to end with the token id {wrong[0]!r}, which no "
                         "token has")  # fmt: skip
    eos = found[0] if found else find("eos", (*EOS_NAMES, *BOS_NAMES))
    if eos is None:
        raise ConfigError(
            f"data.tokenizer={spec.name!r} has no token that ends a document: "
            f"one of {', '.join(EOS_NAMES)} must be among its special tokens."
        )
    bos, pad, unk = find("bos", BOS_NAMES), find("pad", PAD_NAMES), find("unk", UNK_NAMES)
    unk = _find_unknown(spec) if unk is None else unk
    bos, pad, unk = (eos if index is None else index for index in (bos, pad, unk))
    return Roles(bos, eos, pad, unk, found or (eos,), _adds_bos(spec, settings))


def read_token_setting(value: Any) -> str | None:
    """Return the token of a setting: a text, or a table with its `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _find_unknown(spec: Spec) -> int | None:
    """Return the id of the model's unknown token."""
    if spec.model_type == "Unigram":
        return spec.model.get("unk_id")
    return spec.vocab.get(spec.model.get("unk_token") or "")


def find_unknown_token(spec: Spec) -> str | None:
    """Return the model's unknown token."""
    index = _find_unknown(spec)
    return next((token for token, n in spec.vocab.items() if n == index), None)


def _adds_bos(spec: Spec, settings: Mapping[str, Any]) -> bool:
    """Return whether a text begins with bos: stated, or what the post_processor does.

    A file without either is one of our own, or used as one: documents begin with bos.
    """
    if isinstance(settings.get("add_bos_token"), bool):
        return settings["add_bos_token"]
    for step in spec.steps["post_processor"]:
        if step["type"] == "TemplateProcessing":
            return bool(step["single"]) and "SpecialToken" in step["single"][0]
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return True
    return not settings
