"""What people read on a terminal: predictions as text, and the command `jaxgpt sample`."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxgpt.config import override
from jaxgpt.generate import MASK, Generation, TextError, find_cut_texts, join_pieces
from jaxgpt.language_model import LanguageModel
from jaxgpt.loading import load
from jaxgpt.plugins import parse_plugins
from jaxgpt.predict import DEFAULT_CANDIDATES, Classification, FilledMask
from jaxgpt.prompts import check_output, decode_argument, read_prompts, shorten, write_answers
from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError
from jaxgpt.timing import SpeedMeter

ENDING_MESSAGES = {
    "eos": "the document ended",
    "stop": "a stop string was generated",
    "tokens": "reached sample.tokens",
    "context": "the context is full: slide=true continues",
}


def load_model(
    run_folder: str, checkpoint: str, settings: Sequence[str], **quantization
) -> LanguageModel:
    """Load the model of a run, with `path=value` assignments on top of its config.

    Args:
        quantization: `quantize` and `group` of `load`.

    Raises:
        ConfigError: a setting or the run is invalid.
    """
    model = load(run_folder, checkpoint=checkpoint, plugins=parse_plugins(settings), **quantization)
    return dataclasses.replace(model, config=override(model.config, settings))


def sample_cli(
    run_folder: str,
    checkpoint: str,
    prompts: Sequence[str] | None,
    file: str | None,
    settings: Sequence[str],
    out: str | None = None,
    **quantization,
):
    """Generate from prompts with the model of a run, and print the text as it is generated.

    Args:
        run_folder, checkpoint: see `load`.
        prompts: texts to continue, to answer, to fill or to classify, by the run's objective;
            None takes those of `file`, or the run's `sample.prompt`.
        file: a path with one prompt a line, "-" for standard input, or None.
        settings: assignments such as "sample.tokens=300", on top of the run's `sample` section; and
            plugins=..., in place of those that the run names.
        out: a file for the answers as JSON lines, with ids from 1: the number of the prompt, or of
            its line in `file`.
        quantization: see `load_model`.

    Raises:
        ConfigError: a setting, the run, the file or a text is invalid.
    """
    if out:
        check_output(out)
    lines: list[str | None] = [*map(decode_argument, prompts or ())]
    lines += read_prompts(file) if file else []
    model = load_model(run_folder, checkpoint, settings, **quantization)
    sample = model.config.sample
    lines = lines or [sample.prompt]
    kind = f", {model.quantized}" if model.quantized else ""
    print_note(f"[{run_folder}, step {model.step}{kind}, seed {sample.seed}]")
    numbers = [number for number, line in enumerate(lines, 1) if line is not None]
    texts = [line for line in lines if line is not None]
    try:
        answers = answer(model, texts, numbers)
    except TextError as error:
        place = f"line {numbers[error.number]} of {file}" if file and not prompts else (
            f"prompt {numbers[error.number]}"
        )  # fmt: skip
        raise ConfigError(f"{place} ({shorten(error.text)}): {error.reason}") from error
    if out:
        by_number = dict(zip(numbers, answers, strict=True))
        blank: dict[str, Any] = {"prompt": None}  # a blank line
        rows = [{"id": n} | by_number.get(n, blank) for n in range(1, len(lines) + 1)]
        write_answers(out, rows)
        print_note(f"[{len(rows)} answers in {out}]")


def answer(
    model: LanguageModel, texts: Sequence[str], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Print what a model makes of texts.

    Returns:
        For each text, the prompt and the answer as a JSON object.
    """
    cut = set(find_cut_texts(model.config, model.tokenizer, texts))
    if cut:
        first = min(cut)
        print_note(
            f"[{len(cut)} of {len(texts)} texts are longer than model.context="
            f"{model.config.model.context} and cut, as in training; the first is "
            f"{numbers[first]}, {shorten(texts[first])}]"
        )
    run = _generate_answers if "generate" in model.abilities else _predict_answers
    rows = zip(texts, run(model, texts, numbers), strict=True)
    return [
        {"prompt": text, "is_cut": number in cut} | found
        for number, (text, found) in enumerate(rows)
    ]


def _predict_answers(
    model: LanguageModel, texts: Sequence[str], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Print the predictions of an encoder, each below its text."""
    predictions = predict(model, texts)
    for text, found in zip(texts, predictions, strict=True):
        print_text(f"{text}\n{format_prediction(model, found)}")
    return [describe_prediction(found) for found in predictions]


def _generate_answers(
    model: LanguageModel, texts: Sequence[str], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Print the continuations, and how fast they were generated."""
    meter = SpeedMeter()
    stream = _count_tokens(model.stream(texts), meter)
    rows = _print_rows([format_prompt(model, text) for text in texts], stream, numbers)
    why = "; ".join(dict.fromkeys(ENDING_MESSAGES[row.ending] for row in rows))
    print_note(f"[{meter.format()}; {why}]")
    return [dataclasses.asdict(row) for row in rows]


def _count_tokens(
    stream: Iterator[list[Generation]], meter: SpeedMeter
) -> Iterator[list[Generation]]:
    for pieces in stream:
        meter.mark(sum(len(piece.tokens) for piece in pieces))
        yield pieces


def print_note(text: str):
    """Print what is not the text itself to standard error."""
    print_text(text, sys.stderr)


def format_sample(model: LanguageModel, prompt: str) -> str:
    """Return what a model makes of a prompt: its continuation, its target, or a prediction."""
    if "generate" not in model.abilities:
        return f"{prompt}\n{format_predictions(model, [prompt])[0]}"
    if prompt and model.config.objective.is_chat:
        return f"{prompt}\n> {model.chat(prompt).text}"
    return format_prompt(model, prompt) + model.generate([prompt])[0].text


def format_prompt(model: LanguageModel, prompt: str) -> str:
    """Return a prompt as it stands before generated text.

    A decoder continues it; an encoder-decoder answers it on a line of its own.
    """
    return prompt if model.config.model.family == "decoder" else f"{prompt}\n"


def predict(
    model: LanguageModel, texts: Sequence[str]
) -> Sequence[Classification | list[FilledMask]]:
    """Return the predictions of an encoder for each text: its class, or its masks."""
    if "classify" in model.abilities:
        return model.classify(texts)
    return model.fill(texts, model.config.sample.top_k or DEFAULT_CANDIDATES)


def format_prediction(model: LanguageModel, found: Classification | list[FilledMask]) -> str:
    """Format the prediction for a text, `sample.top_k` candidates of each."""
    if isinstance(found, Classification):
        return format_classes(found, model.config.sample.top_k or DEFAULT_CANDIDATES)
    return "\n".join(map(format_mask, found))


def format_predictions(model: LanguageModel, texts: Sequence[str]) -> list[str]:
    """Return the predictions of an encoder for each text, as text."""
    return [format_prediction(model, found) for found in predict(model, texts)]


def describe_prediction(found: Classification | list[FilledMask]) -> dict[str, Any]:
    """Return a prediction as a JSON object."""
    if isinstance(found, Classification):
        return dataclasses.asdict(found)
    return {"masks": [dataclasses.asdict(filled)["candidates"] for filled in found]}


def format_mask(filled: FilledMask) -> str:
    """Format the candidates for a mask: "<mask>  'cat' 61.0%  'dog' 20.0%"."""
    return f"{MASK}  " + "  ".join(f"{c.text!r} {c.probability:.1%}" for c in filled.candidates)


def format_classes(found: Classification, count: int) -> str:
    """Format the likeliest classes: "positive 98.0%  negative 2.0%"."""
    best = list(found.probabilities.items())[:count]
    return "  ".join(f"{label} {probability:.1%}" for label, probability in best)


def _print_rows(
    prompts: Sequence[str], stream: Iterator[list[Generation]], numbers: Sequence[int]
) -> list[Generation]:
    """Print rows in order, each as it is generated; the text of later rows is buffered."""
    rows = [Generation("", (), (), "") for _ in prompts]
    pending = list(prompts)
    current = 0
    if len(prompts) > 1:
        print_note(f"[{numbers[0]}]")
    for pieces in stream:
        rows = [join_pieces(pair) for pair in zip(rows, pieces, strict=True)]
        pending = [old + new.text for old, new in zip(pending, pieces, strict=True)]
        while current < len(rows):
            print_text(pending[current], end="")
            pending[current] = ""
            if not rows[current].ending:
                break
            current += 1
            print_text("")
            if current < len(rows):
                print_note(f"\n[{numbers[current]}]")
    return rows
