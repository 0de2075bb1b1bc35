"""A kind of tokenizer: one token per character of an alphabet, as in nanoGPT's first example."""

import json
import string

import numpy as np

from jaxgpt.tokenizer import SPECIALS, TOKENIZER_KINDS, Tokenizer


class Characters(Tokenizer):
    """data.tokenizer=characters:abc has the characters a, b, c; without any, printable ASCII."""

    @staticmethod
    def make(argument):
        alphabet = argument or string.printable
        return Characters(json.dumps({"kind": "characters", "alphabet": alphabet}))

    def parse(self, content, name):
        alphabet = json.loads(content)["alphabet"]
        self.pad, self.unk, self.bos, self.eos = range(len(SPECIALS))
        self.token_bytes = [b""] * len(SPECIALS) + [c.encode() for c in alphabet]
        self.ids = {c: len(SPECIALS) + n for n, c in enumerate(alphabet)}

    def encode_batch(self, documents):
        texts = [d if isinstance(d, str) else d.decode("utf-8", "replace") for d in documents]
        return [np.array([self.ids.get(c, self.unk) for c in t], np.int32) for t in texts]


TOKENIZER_KINDS["characters"] = Characters
