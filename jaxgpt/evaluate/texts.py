"""The perplexity of any text: per token, per byte and per word.

Each document is read in windows of the model's context, as lm-evaluation-harness rolls them: every
token is scored once, the first one after bos, and that of a later window after as many tokens as
the context holds. Perplexities per byte and per word can be compared between tokenizers.
"""

import glob
import os
import re
import time
from collections.abc import Sequence

import numpy as np

from jaxgpt.evaluate.likelihood import Pair, score_pairs
from jaxgpt.evaluate.metrics import Estimate, estimate_perplexity
from jaxgpt.evaluate.run import TaskResult
from jaxgpt.language_model import LanguageModel
from jaxgpt.score import BATCH_TOKENS
from jaxgpt.settings import ConfigError

PERPLEXITY = "perplexity"  # as it is named among tasks
BLOCK_TOKENS = 64


def read_texts(path: str) -> list[str]:
    """Return the texts of a file, of a folder's files, or of those that a pattern matches.

    Raises:
        ConfigError: there are none, or one is no UTF-8.
    """
    pattern = os.path.join(path, "**") if os.path.isdir(path) else path
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    if not files:
        raise ConfigError(f"--text {path}: there is no such file or folder with files.")
    texts = []
    for file in files:
        try:
            with open(file, encoding="utf-8", newline="") as opened:
                texts.append(opened.read())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--text {file} cannot be read as UTF-8: {error}.") from error
    return texts


def roll_windows(ids: Sequence[int], prefix: int, context: int) -> list[Pair]:
    """Return pairs that score each token of a text once, within a context of tokens.

    Args:
        ids: the tokens of the text.
        prefix: the token before the first one.
        context: the longest input.
    """
    whole, pairs = [prefix, *ids], []
    for first in range(0, len(ids), context):
        last = min(first + context, len(ids))  # whole[first + 1 : last + 1] is scored
        begin = max(0, last - context)
        pairs.append(Pair(tuple(whole[begin : first + 1]), tuple(whole[first + 1 : last + 1])))
    return pairs


def score_rolling(
    model: LanguageModel, texts: Sequence[str], batch_tokens: int = BATCH_TOKENS
) -> list[np.ndarray]:
    """Return the log-probability of each token of texts, float64 [n], nats.

    Raises:
        ConfigError: the model has no likelihood of a text.
    """
    if "score" not in model.abilities or model.config.model.family != "decoder":
        raise ConfigError(
            "the perplexity of a text is that of a decoder that generates text; this model has "
            f"model.family={model.config.model.family} and "
            f"train.objective={model.config.train.objective}."
        )
    model.check_finite()
    tokenizer, context = model.tokenizer, model.config.model.context
    encoded = [[*tokenizer.prefix, *tokenizer.encode(text).tolist()] for text in texts]
    windows = [roll_windows(ids, tokenizer.bos, context) for ids in encoded]
    pairs = [pair for part in windows for pair in part]
    found = iter(score_pairs(model.config.model, model.params, pairs, batch_tokens))
    empty = [np.zeros(0)]
    return [np.concatenate(empty + [next(found).logprobs for _ in part]) for part in windows]


def measure_perplexity(
    model: LanguageModel, texts: Sequence[str], batch_tokens: int = BATCH_TOKENS
) -> TaskResult:
    """Return the perplexity of texts per token, per byte (of UTF-8) and per word.

    A word is what stands between whitespace. The standard errors are those of blocks of
    BLOCK_TOKENS tokens; see `metrics.estimate_perplexity`.

    Raises:
        ConfigError: the texts are empty, or the model has no likelihood of a text.
    """
    start = time.perf_counter()
    scored = score_rolling(model, texts, batch_tokens)
    totals = {
        "perplexity": sum(map(len, scored)),
        "byte_perplexity": sum(len(text.encode("utf-8", "replace")) for text in texts),
        "word_perplexity": sum(len(re.split(r"\s+", text)) for text in texts),
    }
    if not totals["byte_perplexity"]:
        raise ConfigError("the text is empty: there is nothing to score.")
    blocks = [x[i : i + BLOCK_TOKENS] for x in scored for i in range(0, len(x), BLOCK_TOKENS)]
    nats, units = [float(block.sum()) for block in blocks], [len(block) for block in blocks]
    metrics: dict[str, Estimate] = {
        name: estimate_perplexity(nats, units, total) for name, total in totals.items()
    }
    names = ("tokens", "bytes", "words")
    size = ", ".join(f"{n:,} {name}" for n, name in zip(totals.values(), names, strict=True))
    seconds = round(time.perf_counter() - start, 3)
    return TaskResult(PERPLEXITY, f"{len(texts)} texts, {size}", 0, metrics, seconds=seconds)
