"""Constraints: a JSON schema, a regular expression or a grammar that the text of a row follows.

llguidance computes, for each token, which tokens may come next. Where a single text can follow, its
tokens are forced: the engine reads them in one pass instead of drawing them.
"""

import functools
import json
from typing import Any

import numpy as np

from jaxgpt.config import CONSTRAINTS, SampleConfig
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer


def compile_schema(matcher: Any, schema: str) -> str:
    """Return the grammar of a JSON schema, in which whitespace is fixed.

    With free whitespace, a model may write spaces until it has no tokens left.
    """
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise ConfigError(f"sample.json_schema is not JSON: {error}.") from None
    return matcher.grammar_from_json_schema(parsed, overrides={"whitespace_flexible": False})


# (LLMatcher, text) -> a grammar of llguidance, by the setting
COMPILERS = {
    "json_schema": compile_schema,
    "regex": lambda matcher, text: matcher.grammar_from_regex(text),
    "grammar": lambda matcher, text: matcher.grammar_from_lark(text),
}


class Vocabulary:
    """A tokenizer as llguidance reads it: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        lengths = tokenizer.lengths
        self.tokens = [
            tokenizer.join_bytes([i]) if lengths[i] else f"\xff<{i}>".encode("latin1")
            for i in range(tokenizer.vocab_size)
        ]
        self.special_token_ids = np.flatnonzero(np.asarray(lengths) == 0).tolist()
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos

    def __call__(self, text: str | bytes) -> list[int]:
        return self.tokenizer.encode(text, "section").tolist()


@functools.lru_cache(maxsize=4)
def make_vocabulary(tokenizer: Tokenizer, vocab: int) -> Any:
    """Return the tokenizer of llguidance, for a model with so many tokens."""
    library = require("llguidance", "a constraint")
    wrapper = library.TokenizerWrapper(Vocabulary(tokenizer))
    return library.LLTokenizer(wrapper, n_vocab=vocab, eos_token=tokenizer.eos)


class Constraint:
    """The state of a constraint after the tokens of a row so far."""

    def __init__(self, matcher: Any, vocab: int):
        self.matcher, self.vocab = matcher, vocab

    def compute_mask(self) -> np.ndarray:
        """Return the tokens that may come next, packed: uint32 [W]."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)
        self._check()
        words = -(-self.vocab // 32)
        # A model's vocabulary may have more entries than its tokenizer: none of them is allowed.
        return np.pad(bits[:words], (0, max(0, words - len(bits))))

    def list_forced(self) -> list[int]:
        """Return the tokens of the only text that may come next; none if there are several."""
        tokens = self.matcher.compute_ff_tokens()
        self._check()
        return tokens

    def push(self, token: int):
        """Append a token."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self):
        if self.matcher.is_error():
            raise ConfigError(f"the constraint cannot be followed: {self.matcher.get_error()}")


def make_constraint(tokenizer: Tokenizer, vocab: int, sample: SampleConfig) -> Constraint | None:
    """Return the constraint of a sample, or None.

    Raises:
        ConfigError: it is not valid, or llguidance is not installed.
    """
    name = next((name for name in CONSTRAINTS if getattr(sample, name)), None)
    if name is None:
        return None
    library = require("llguidance", f"sample.{name}")
    try:
        grammar = COMPILERS[name](library.LLMatcher, getattr(sample, name))
    except ValueError as error:
        raise ConfigError(f"sample.{name}: {error}") from None
    matcher = library.LLMatcher(make_vocabulary(tokenizer, vocab), grammar, log_level=0)
    if matcher.is_error():
        raise ConfigError(f"sample.{name}={getattr(sample, name)[:60]!r}: {matcher.get_error()}")
    return Constraint(matcher, vocab)
