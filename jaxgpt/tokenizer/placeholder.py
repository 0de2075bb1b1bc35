"""The tokenizer of a model that comes without one: ids only."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.core import Tokenizer

KIND = "none"


def make_placeholder(vocab: int, bos: int, eos: int, pad: int, origin: str) -> Tokenizer:
    """Return a tokenizer without text, for `vocab` ids."""
    spec = dict(kind=KIND, vocab=vocab, bos=bos, eos=eos, pad=pad, origin=origin)
    return NoTokenizer(json.dumps(spec), origin)


class NoTokenizer(Tokenizer):
    """The special ids of a model, and an error for any text."""

    def parse(self, content: str, name: str) -> None:
        """Set the special ids."""
        spec = json.loads(content)
        self.origin = str(spec["origin"])
        self.bos, self.eos, self.pad = (int(spec[key]) for key in ("bos", "eos", "pad"))
        self.unk = self.eos
        self.token_bytes = [b""] * int(spec["vocab"])

    def _fail(self) -> ConfigError:
        return ConfigError(
            f"{self.origin} came without a tokenizer, so that there are ids and no text: put its "
            "tokenizer.json beside config.json, and load it again."
        )

    def encode_batch(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        """Raise ConfigError, unless there is no text."""
        if any(documents):
            raise self._fail()
        return [np.zeros(0, np.int32) for _ in documents]

    def encode_pieces(self, documents: Sequence[str | bytes]) -> Iterator[tuple[int, np.ndarray]]:
        """Raise ConfigError, unless there is no text."""
        return iter(enumerate(self.encode_batch(list(documents))))
