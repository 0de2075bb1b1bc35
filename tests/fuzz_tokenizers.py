"""Damage files of tokenizers at random: each gives a clear error or a tokenizer that works.

    PYTHONPATH=tests python -m tests.fuzz_tokenizers --count 1000 --seed 0

The suite runs a small dose of it (test_tokenizer_files.py).
"""

import argparse
import collections
import pathlib
import random
import tempfile
import time

from tokenizer_kinds import make_content, train_sentencepiece

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import StreamDecoder, load

FORMS = {
    "byte_level.json": lambda: make_content("llama3").encode(),
    "sentencepiece.json": lambda: make_content("llama2").encode(),
    "unigram.json": lambda: make_content("t5").encode(),
    "wordpiece.json": lambda: make_content("wordpiece").encode(),
    "bpe.model": lambda: train_sentencepiece(model_type="bpe", byte_fallback=True, vocab_size=800),
    "unigram.model": lambda: train_sentencepiece(model_type="unigram"),
}
TEXTS = ("The word, 'the' é 北京 🙂\n  12345", b"\xff\xfe a\xc3", "", "</s><s>\0")
MAX_SECONDS = 20  # for one file of 100 kB


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return the content with a few random changes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(data) or 1)
        size = rng.choice([1, 1, 1, 2, 8, 100])
        kind = rng.randrange(7)
        if kind == 0:  # flip a bit
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:  # other bytes
            data[place : place + size] = rng.randbytes(size)
        elif kind == 2:  # a part is missing
            del data[place : place + size]
        elif kind == 3:  # a part is there twice
            data[place:place] = data[place : place + size]
        elif kind == 4:  # cut off
            del data[place:]
        elif kind == 5:  # another number, or structure
            data[place:place] = rng.choice([b"9", b"-", b"1e99", b"[", b"}", b'"', b"null", b"\\"])
        else:  # the end of another part
            other = rng.randrange(len(data) or 1)
            data[place : place + size] = data[other : other + size]
        if not data:
            data = bytearray(b"{")
    return bytes(data)


def try_file(path: pathlib.Path, content: bytes) -> str:
    """Load a file and use it. Return its error, or "".

    Raises:
        Exception: it is not the error that users should see.
    """
    path.write_bytes(content)
    start = time.monotonic()
    try:
        tokenizer = load(path)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            stream = StreamDecoder(tokenizer)
            parts = [stream.push(index) for index in ids] + [stream.flush()]
            assert "".join(parts) == tokenizer.decode(ids)
        message = ""
    except ConfigError as error:
        message = str(error)
    path.unlink()
    assert not message or str(path) in message, f"without the file: {message}"
    assert time.monotonic() - start < MAX_SECONDS
    return message


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="damaged files of each form")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for form, make in FORMS.items():
            content, errors = make(), collections.Counter()
            for number in range(arguments.count):
                rng = random.Random(f"{arguments.seed} {form} {number}")
                damaged = mutate(content, rng)
                try:
                    errors[bool(try_file(pathlib.Path(folder) / form, damaged))] += 1
                except BaseException as error:
                    print(f"{form} number {number}: {type(error).__name__}: {error}")
                    raise
            print(f"{form}: {errors[True]} errors, {errors[False]} tokenizers that work")


if __name__ == "__main__":
    main()
