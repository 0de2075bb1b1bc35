"""What people read on a terminal: predictions as text, and the command line of sample.py."""

import codecs
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence

from jaxgpt.config import override
from jaxgpt.generate import MASK, Generation, join_pieces
from jaxgpt.language_model import LanguageModel
from jaxgpt.loading import load
from jaxgpt.plugins import parse_plugins
from jaxgpt.predict import DEFAULT_CANDIDATES, Classification, FilledMask
from jaxgpt.settings import ConfigError

ENDING_MESSAGES = {
    "eos": "the document ended",
    "stop": "a stop string was generated",
    "tokens": "reached sample.tokens",
    "context": "the context is full: slide=true continues",
}


def sample_cli(
    run_folder: str,
    checkpoint: str,
    prompts: Sequence[str] | None,
    file: str | None,
    settings: Sequence[str],
):
    """Generate from prompts with the model of a run, and print the text as it is generated.

    Args:
        run_folder, checkpoint: see `load`.
        prompts: texts to continue, to answer, to fill or to classify, by the run's objective;
            None takes those of `file`, or the run's `sample.prompt`.
        file: a path with one prompt a line, "-" for standard input, or None.
        settings: assignments such as "sample.tokens=300", on top of the run's `sample` section; and
            plugins=..., in place of those that the run names.

    Raises:
        ConfigError: a setting, the run or the file is invalid.
    """
    model = load(run_folder, checkpoint=checkpoint, plugins=parse_plugins(settings))
    model = dataclasses.replace(model, config=override(model.config, settings))
    sample = model.config.sample
    texts = [*map(_decode_argument, prompts or ()), *(_read_prompts(file) if file else ())]
    texts = texts or [sample.prompt]
    print(f"[{run_folder}, step {model.step}, seed {sample.seed}]", file=sys.stderr)
    if "generate" not in model.abilities:
        for text, answer in zip(texts, format_predictions(model, texts), strict=True):
            print(f"{text}\n{answer}" if len(texts) > 1 else answer)
        return
    start = time.perf_counter()
    rows = _print_rows([format_prompt(model, text) for text in texts], model.stream(texts))
    seconds = time.perf_counter() - start
    total = sum(len(row.tokens) for row in rows)
    why = "; ".join(dict.fromkeys(ENDING_MESSAGES[row.ending] for row in rows))
    print(
        f"[{total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s; {why}]",
        file=sys.stderr,
    )


def format_sample(model: LanguageModel, prompt: str) -> str:
    """Return what a model makes of a prompt: its continuation, its target, or a prediction."""
    if "generate" not in model.abilities:
        return f"{prompt}\n{format_predictions(model, [prompt])[0]}"
    return format_prompt(model, prompt) + model.generate([prompt])[0].text


def format_prompt(model: LanguageModel, prompt: str) -> str:
    """Return a prompt as it stands before generated text.

    A decoder continues it; an encoder-decoder answers it on a line of its own.
    """
    return prompt if model.config.model.family == "decoder" else f"{prompt}\n"


def format_predictions(model: LanguageModel, texts: Sequence[str]) -> list[str]:
    """Return the predictions of an encoder for each text, `sample.top_k` of them."""
    count = model.config.sample.top_k or DEFAULT_CANDIDATES
    if "classify" in model.abilities:
        return [format_classes(found, count) for found in model.classify(texts)]
    return ["\n".join(map(format_mask, row)) for row in model.fill(texts, count)]


def format_mask(filled: FilledMask) -> str:
    """Format the candidates for a mask: "<mask>  'cat' 61.0%  'dog' 20.0%"."""
    return f"{MASK}  " + "  ".join(f"{c.text!r} {c.probability:.1%}" for c in filled.candidates)


def format_classes(found: Classification, count: int) -> str:
    """Format the likeliest classes: "positive 98.0%  negative 2.0%"."""
    best = list(found.probabilities.items())[:count]
    return "  ".join(f"{label} {probability:.1%}" for label, probability in best)


def _print_rows(prompts: Sequence[str], stream: Iterator[list[Generation]]) -> list[Generation]:
    """Print rows in order, each as it is generated; the text of later rows is buffered."""
    rows = [Generation("", (), (), "") for _ in prompts]
    pending = list(prompts)
    current = 0
    if len(prompts) > 1:
        print("[1]", file=sys.stderr)
    for pieces in stream:
        rows = [join_pieces(pair) for pair in zip(rows, pieces, strict=True)]
        pending = [old + new.text for old, new in zip(pending, pieces, strict=True)]
        while current < len(rows):
            sys.stdout.write(pending[current])
            sys.stdout.flush()
            pending[current] = ""
            if not rows[current].ending:
                break
            current += 1
            sys.stdout.write("\n")
            sys.stdout.flush()
            if current < len(rows):
                print(f"\n[{current + 1}]", file=sys.stderr)
    return rows


def _decode_argument(text: str) -> str:
    """Return an argument as UTF-8, whatever the locale that Python read it by."""
    if sys.getfilesystemencoding() == "utf-8":
        return text
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def _read_prompts(file: str) -> list[str]:
    """Return the lines of a file that are not blank."""
    try:
        if file == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as handle:
                content = handle.read()
    except OSError as error:
        raise ConfigError(f"--file {file}: {error.strerror}.") from None
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"--file {file} has no prompt: give one per line.")
    return prompts
