"""WordPiece, as in BERT: whole words, and pieces inside of words, which begin with ##.

It is not lossless: text is cleaned, often lowercased and without accents, a word without pieces is
one unknown token, and the spaces between words are not kept. Decoding writes one space between two
words. Its result is exactly what the tokens mean, not the text that they were made of.

Source: Wu et al. 2016 (arXiv:1609.08144), section 4.1; Devlin et al. 2019.
"""

from typing import Any

from jaxgpt.tokenizer.kind import IsBorder, Kind, keep_steps
from jaxgpt.tokenizer.spec import Spec

# What a decoder with "cleanup" writes without the spaces that separate tokens.
_CONTRACTIONS = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                 (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"),
                 (" 're", "'re"))  # fmt: skip


def _is_wordpiece(spec: Spec) -> bool:
    return spec.model_type == "WordPiece"


def _read_token(spec: Spec, token: str) -> bytes:
    prefix = spec.model.get("continuing_subword_prefix", "##")
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    text = f" {token}"
    if any(step.get("cleanup") for step in spec.steps["decoder"] if step["type"] == "WordPiece"):
        for old, new in _CONTRACTIONS:
            text = text.replace(old, new)
    return text.encode()


def _make_is_border(spec: Spec, library: Any) -> IsBorder | None:
    steps = {*spec.list_types("normalizer"), *spec.list_types("pre_tokenizer")}
    words = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"} & steps
    known = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"}
    if not words or not steps <= known | words | {"Punctuation", "Digits"}:
        return None
    return lambda text, place: text[place] == " " or text[place - 1] == "\n"


WORDPIECE = Kind(
    name="WordPiece",
    is_for=_is_wordpiece,
    read_token=_read_token,
    read_added=_read_token,
    name_byte=None,
    drops_first_space=lambda spec: True,
    continue_steps=keep_steps,
    make_is_border=_make_is_border,
)
