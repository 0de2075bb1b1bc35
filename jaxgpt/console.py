"""The command line of sample.py: read prompts, stream the generated text."""

import codecs
import os
import sys
import time
from collections.abc import Sequence

from jaxgpt.config import override
from jaxgpt.generate import Row, generate_rows
from jaxgpt.plugins import parse_plugins
from jaxgpt.predict import PREDICTORS, predict
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.checkpoint import load_run, read_labels
from jaxgpt.trainer.logging import format_duration

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
        run_folder, checkpoint: see `load_run`.
        prompts: texts to continue, to answer, to fill or to classify, by the run's objective;
            None takes those of `file`, or the run's `sample.prompt`.
        file: a path with one prompt a line, "-" for standard input, or None.
        settings: assignments such as "sample.tokens=300", on top of the run's `sample` section; and
            plugins=..., in place of those that the run names.

    Raises:
        ConfigError: a setting, the run or the file is invalid.
    """
    plugins = parse_plugins(settings)
    config, tokenizer, params, step = load_run(run_folder, checkpoint, plugins)
    config = override(config, settings)
    texts = [*map(_decode_argument, prompts or ()), *(_read_prompts(file) if file else ())]
    texts = texts or [config.sample.prompt]
    print(f"[{run_folder}, step {step}, seed {config.sample.seed}]", file=sys.stderr)
    if config.train.objective in PREDICTORS:
        (answers,) = predict(config, params, tokenizer, texts, read_labels(run_folder))
        for text, answer in zip(texts, answers, strict=True):
            print(f"{text}\n{answer}" if len(texts) > 1 else answer)
        return
    start = time.perf_counter()
    masks = config.objective.task.count_mask_tokens(config)
    stream = generate_rows(config.model, params, tokenizer, texts, config.sample, masks)
    # A decoder continues the prompt; an encoder-decoder answers it on a line of its own.
    headings = texts if config.model.family == "decoder" else [f"{text}\n" for text in texts]
    rows = _print_rows(headings, stream)
    seconds = time.perf_counter() - start
    total = sum(len(row.drawn) for row in rows)
    why = "; ".join(dict.fromkeys(ENDING_MESSAGES[row.ending] for row in rows))
    print(
        f"[{total} tokens in {format_duration(seconds)}, {total / seconds:.0f} tokens/s; {why}]",
        file=sys.stderr,
    )


def _print_rows(prompts: Sequence[str], stream) -> list[Row]:
    """Print rows in order, each as it is generated; the text of later rows is buffered."""
    rows: list[Row] = []
    pending = list(prompts)
    current = 0
    if len(prompts) > 1:
        print("[1]", file=sys.stderr)
    for rows, pieces in stream:
        pending = [old + new for old, new in zip(pending, pieces, strict=True)]
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
