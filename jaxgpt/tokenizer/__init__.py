"""Tokenizers: text to integers and back.

core.py has `Tokenizer`, for every kind, and streaming.py `StreamDecoder`. The kinds (byte_level.py,
metaspace.py, wordpiece.py) differ in how a token spells its bytes. training.py learns a byte-level
BPE. files.py loads every form of file: convert.py and sentencepiece_model.py make a tokenizer.json
of the others, and companions.py has what stands beside it. spec.py, roles.py and library.py check a
tokenizer.json, find its special tokens, and make its encoder. chat.py renders conversations.
placeholder.py stands in where a model has no tokenizer.
"""

from jaxgpt.text import PRE_TOKENIZER
from jaxgpt.tokenizer.byte_level import BYTE_CHARACTERS, CHARACTER_BYTES
from jaxgpt.tokenizer.core import Tokenizer
from jaxgpt.tokenizer.files import TOKENIZER_KINDS, load
from jaxgpt.tokenizer.spec import MAX_VOCAB
from jaxgpt.tokenizer.streaming import StreamDecoder, measure_compression
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
