"""What sample.py does: prompts in, text out as it comes."""

import sys
import time
from collections.abc import Sequence

from jaxgpt.config import override
from jaxgpt.generate import Row, generate_rows
from jaxgpt.predict import ANSWERS, ask
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.checkpoint import load_run, read_labels
from jaxgpt.trainer.logging import duration

ENDINGS = {
    "eos": "the document ended",
    "stop": "a stop string came",
    "tokens": "as many tokens as asked for",
    "context": "the context is full: slide=true goes on",
}


def speak(
    run_folder: str,
    checkpoint: str,
    prompts: Sequence[str] | None,
    file: str | None,
    settings: Sequence[str],
):
    """Puts prompts to the model of a run, and prints what it says while it comes.

    Args:
        run_folder, checkpoint: see `load_run`.
        prompts: texts to continue, to answer, to fill or to classify, as the run's objective is;
            None takes those of `file`, or the run's own.
        file: a path with one prompt a line, "-" for standard input, or None.
        settings: assignments such as "sample.tokens=300", on top of the run's `sample` section.

    Raises:
        ConfigError: a setting, the run or the file can not be used.
    """
    config, tokenizer, params, step = load_run(run_folder, checkpoint)
    config = override(config, settings)
    texts = [*(prompts or ()), *(_read_prompts(file) if file else ())] or [config.sample.prompt]
    print(f"[{run_folder}, step {step}, seed {config.sample.seed}]", file=sys.stderr)
    if config.train.objective in ANSWERS:
        (answers,) = ask(config, params, tokenizer, texts, read_labels(run_folder))
        for text, answer in zip(texts, answers, strict=True):
            print(f"{text}\n{answer}" if len(texts) > 1 else answer)
        return
    start = time.perf_counter()
    masks = config.objective.task.reserved(config)
    drawn = generate_rows(config.model, params, tokenizer, texts, config.sample, masks)
    # A decoder goes on with the prompt; an encoder-decoder answers it on a line of its own.
    shown = texts if config.model.family == "decoder" else [f"{text}\n" for text in texts]
    rows = _print_rows(shown, drawn)
    seconds = time.perf_counter() - start
    total = sum(len(row.drawn) for row in rows)
    why = "; ".join(dict.fromkeys(ENDINGS[row.ending] for row in rows))
    print(
        f"[{total} tokens in {duration(seconds)}, {total / seconds:.0f} tokens/s; {why}]",
        file=sys.stderr,
    )


def _print_rows(prompts: Sequence[str], stream) -> list[Row]:
    """Prints rows one after the other, each as it comes; rows further down wait their turn."""
    rows: list[Row] = []
    waiting = list(prompts)
    turn = 0
    if len(prompts) > 1:
        print("[1]", file=sys.stderr)
    for rows, pieces in stream:
        waiting = [old + new for old, new in zip(waiting, pieces, strict=True)]
        while turn < len(rows):
            sys.stdout.write(waiting[turn])
            sys.stdout.flush()
            waiting[turn] = ""
            if not rows[turn].ending:
                break
            turn += 1
            sys.stdout.write("\n")
            sys.stdout.flush()
            if turn < len(rows):
                print(f"\n[{turn + 1}]", file=sys.stderr)
    return rows


def _read_prompts(file: str) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        if file == "-":
            text = sys.stdin.read()
        else:
            with open(file, encoding="utf-8", errors="surrogateescape") as handle:
                text = handle.read()
    except OSError as error:
        raise ConfigError(f"--file {file}: {error.strerror}.") from None
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"--file {file} holds no prompt: give one a line.")
    return prompts
