"""Tokenizers: text to integers and back.

core.py        `Tokenizer` and `StreamDecoder`, for every kind
byte_level.py  metaspace.py  wordpiece.py   the kinds: how tokens spell bytes
training.py    learns a byte-level BPE
files.py       reads and writes every form of file; sentencepiece_model.py: tokenizer.model
spec.py  roles.py  library.py               a tokenizer.json: checked, its special tokens, encoded
placeholder.py the tokenizer of a model without one
chat.py        chat templates: a conversation as text and as ids
"""

from jaxgpt.text import PRE_TOKENIZER
from jaxgpt.tokenizer.byte_level import BYTE_CHARACTERS, CHARACTER_BYTES
from jaxgpt.tokenizer.core import StreamDecoder, Tokenizer, measure_compression
from jaxgpt.tokenizer.files import TOKENIZER_KINDS, load
from jaxgpt.tokenizer.spec import MAX_VOCAB
from jaxgpt.tokenizer.training import (
    MAX_TRAINED_WORD_BYTES,
    MIN_VOCAB,
    SPECIALS,
    make_byte_tokenizer,
    train,
)

__all__ = [
    "BYTE_CHARACTERS",
    "CHARACTER_BYTES",
    "MAX_TRAINED_WORD_BYTES",
    "MAX_VOCAB",
    "MIN_VOCAB",
    "PRE_TOKENIZER",
    "SPECIALS",
    "TOKENIZER_KINDS",
    "StreamDecoder",
    "Tokenizer",
    "load",
    "make_byte_tokenizer",
    "measure_compression",
    "train",
]
