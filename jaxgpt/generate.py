"""Text generation: prompts become requests of the decoding engine, and its pieces become text.

A decoder continues a prompt; an encoder-decoder reads it as its source and generates the target.
A row depends on its own prompt, its rules and its index in the list, never on the other rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from jaxgpt.config import Config, ModelConfig, SampleConfig
from jaxgpt.engine import (
    DraftModel,
    Engine,
    Generation,
    Request,
    Row,
    Size,
    join_pieces,
    prepare_decode_params,
)
from jaxgpt.engine.beam import search_beams
from jaxgpt.engine.constraints import make_constraint
from jaxgpt.engine.processors import make_rules
from jaxgpt.engine.worker import EngineWorker
from jaxgpt.model.lowrank import choose_one
from jaxgpt.prompts import shorten
from jaxgpt.sampling import make_row_keys, sampleable_tokens
from jaxgpt.seeds import make_key
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of
from jaxgpt.tokenizer import StreamDecoder, Tokenizer

MIN_BUCKET_TOKENS = 32  # rows have this times a power of two of slots
MAX_ROWS = 32  # that decode at once: more prompts wait

Prompt = str | Sequence[int] | np.ndarray  # a text, or token ids

# --- rows of text ----------------------------------------------------------------------------

MASK = "<mask>"  # how a masked token or span is written in a prompt


def encode_with_masks(tokenizer: Tokenizer, text: str, mask: Callable[[int], int]) -> np.ndarray:
    """Tokenize a text, with the token mask(i) for the i-th `<mask>`."""
    start, *rest = text.split(MASK)
    first, others = tokenizer.encode(start), [tokenizer.encode(x, "section") for x in rest]
    return np.concatenate([first, *(x for i, ids in enumerate(others) for x in ([mask(i)], ids))])


def round_up_to_bucket(length: int) -> int:
    """Round up to MIN_BUCKET_TOKENS times a power of two."""
    return MIN_BUCKET_TOKENS * 2 ** max(
        0, int(np.ceil(np.log2(max(1, length) / MIN_BUCKET_TOKENS)))
    )


def stream(
    config: Config,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samples: Sequence[SampleConfig],
    decode_params=None,
    adapters: Sequence[int] | None = None,
) -> Iterator[list[Generation]]:
    """Stream the continuation of each prompt, or its target if the model is an encoder-decoder.

    Args:
        config, params: the model.
        prompts: texts, or token ids; an empty text starts a new document.
        samples: the sampling rules of each prompt; their `prompt` is not used.
        decode_params: `prepare_decode_params` of the parameters, if they are at hand.
        adapters: the number of each prompt's adapter, if the parameters hold several.

    Yields:
        The next piece of every prompt; a row that has ended gives empty pieces.

    Raises:
        ConfigError: a prompt does not fit the context and `slide` of its rules is off.
    """
    rows = encode_prompts(config, tokenizer, prompts, samples)
    if not rows:
        return
    if decode_params is None:
        with use_mesh_of(params):
            decode_params = prepare_decode_params(config.model, params)
    keys = make_row_keys(samples)
    sampled = [number for number, row in enumerate(rows) if row.sample.beams == 1]
    for number in sorted(set(range(len(rows))) - set(sampled)):
        params = decode_params if adapters is None else choose_one(decode_params, adapters[number])
        piece = _search_beams(config, params, tokenizer, rows[number])
        yield [piece if i == number else _make_empty_piece(row) for i, row in enumerate(rows)]
    if not sampled:
        return
    engine = make_engine(config, decode_params, tokenizer, [rows[n] for n in sampled])
    requests = {make_request(config, tokenizer, rows[n], keys[n]): n for n in sampled}
    for request, number in requests.items():
        request.adapter = 0 if adapters is None else adapters[number]
        engine.submit(request)
    while not engine.is_idle:
        pieces: dict[int, list[Generation]] = {}
        for request, piece in engine.step():
            if request.error is not None:
                raise request.error
            pieces.setdefault(requests[request], []).append(piece)
        if pieces:
            yield [
                join_pieces(pieces[i]) if i in pieces else _make_empty_piece(row)
                for i, row in enumerate(rows)
            ]


def _make_empty_piece(row: Row) -> Generation:
    return Generation("", (), (), row.ending)


def make_engine(config: Config, decode_params, tokenizer: Tokenizer, rows: Sequence[Row]) -> Engine:
    """Return an engine with room for these rows."""
    cfg, context = config.model, config.model.context
    slots = sum(
        round_up_to_bucket(max(counts))
        for counts in ([len(row.ids) for row in rows], [row.room for row in rows])
    )
    if any(row.sample.slide for row in rows):
        slots = context
    source = max(len(row.source) for row in rows)
    size = Size(
        rows=min(MAX_ROWS, 1 << (len(rows) - 1).bit_length()),
        slots=max(2, min(context, slots)),
        source=round_up_to_bucket(source) if source else 0,
        cache=choose_cache([row.sample for row in rows]),
    )
    allowed = sampleable_tokens(tokenizer, cfg.vocab, list_masks(config))
    return Engine(cfg, decode_params, size, tokenizer.ends, allowed)


def choose_cache(samples: Sequence[SampleConfig]) -> str:
    """Return the `sample.cache` of rows that are decoded together.

    Raises:
        ConfigError: they have several.
    """
    kinds = {sample.cache for sample in samples}
    if len(kinds) > 1:
        raise ConfigError(f"rows of one batch share a cache: sample.cache is {sorted(kinds)}.")
    return kinds.pop()


def make_request(
    config: Config, tokenizer: Tokenizer, row: Row, key, bias=None, top: int = 0
) -> Request:
    """Return the request of a row.

    Args:
        key: its random key.
        bias: what is added to the scores of tokens, by token.
        top: how many of the likeliest tokens to return at each place.

    Raises:
        ConfigError: a rule of the row cannot be followed.
    """
    vocab = config.model.vocab
    banned = [ids for word in row.sample.banned for ids in spell_word(tokenizer, word)]
    constraint = make_constraint(tokenizer, vocab, row.sample)
    return Request(row, make_rules(row.sample, vocab, key, bias, banned), constraint, top)


def spell_word(tokenizer: Tokenizer, word: str) -> list[list[int]]:
    """Return the tokens of a word at the start of a line, after a space, and inside a text."""
    spellings = [tokenizer.encode(text, "section").tolist() for text in (word, f" {word}")]
    return [ids for n, ids in enumerate(spellings) if ids and ids not in spellings[:n]]


def start_worker(
    config: Config,
    decode_params,
    tokenizer: Tokenizer,
    size: Size,
    draft: DraftModel | None = None,
    max_waiting: int = 1024,
) -> EngineWorker:
    """Start a thread with an engine, compiled for all that it may need.

    Its `submit(prompt, sample, index=0, bias=None, top=0, adapter=0)` takes a prompt (or a row of
    `encode_prompts`), its sampling rules, its index in the list of prompts with the same seed, the
    next two as `make_request`, and the number of one of the adapters in the parameters.

    Raises:
        ConfigError: the model cannot do this.
    """
    cfg = config.model

    def make() -> Engine:
        allowed = sampleable_tokens(tokenizer, cfg.vocab, list_masks(config))
        engine = Engine(
            cfg,
            decode_params,
            size,
            tokenizer.ends,
            allowed,
            draft=draft,
            is_interactive=True,
            has_reuse=True,
        )
        engine.warm_up()
        return engine

    def make_submitted(
        prompt: Prompt | Row, sample: SampleConfig, index=0, bias=None, top=0, adapter=0
    ) -> Request:
        if isinstance(prompt, Row):
            row = prompt
        else:
            (row,) = encode_prompts(config, tokenizer, [prompt], [sample])
        key = jax.random.fold_in(make_key(sample.seed), index)
        request = make_request(config, tokenizer, row, key, bias, top)
        request.follow_constraint(())  # one that nothing follows is refused here
        request.adapter = adapter
        return request

    return EngineWorker(make, make_submitted, max_waiting)


def _search_beams(config: Config, decode_params, tokenizer: Tokenizer, row: Row) -> Generation:
    """Return the continuation of a row that beam search finds."""
    cfg, sample = config.model, row.sample
    allowed = sampleable_tokens(tokenizer, cfg.vocab, list_masks(config))
    found = search_beams(
        cfg,
        decode_params,
        row.ids,
        row.source,
        beams=sample.beams,
        tokens=min(sample.tokens, cfg.context - len(row.ids)),
        ends=tokenizer.ends,
        allowed=allowed,
        length_penalty=sample.length_penalty,
        min_tokens=sample.min_tokens,
        cache=sample.cache,
    )[0]
    text, logprobs = "", []
    for token, logprob in zip(found.tokens, found.logprobs, strict=True):
        if row.ending:
            break
        text += row.push(token, tokenizer.ends)
        logprobs.append(logprob)
    if not row.ending:
        text += row.end("context" if len(row.ids) >= cfg.context else "tokens")
    return Generation(text, tuple(row.drawn), tuple(logprobs[: len(row.drawn)]), row.ending)


def generate(
    config: Config,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samples: Sequence[SampleConfig],
    decode_params=None,
) -> list[Generation]:
    """Return the whole continuations, or targets, that `stream` yields in pieces."""
    pieces = stream(config, params, tokenizer, prompts, samples, decode_params)
    return [join_pieces(row) for row in zip(*pieces, strict=True)]


def count_masks(config: Config) -> int:
    """Return how many token ids of a model stand for a `<mask>`."""
    return config.objective.task.count_mask_tokens(config)


def list_masks(config: Config) -> range:
    """Return the token ids that stand for a `<mask>`, in the order of a text's masks."""
    first = config.model.first_mask
    return range(first, first - count_masks(config), -1)


class LongPromptError(ConfigError):
    """A prompt does not fit the context."""


class TextError(ConfigError):
    """A text that a model cannot read, among several.

    Attributes:
        number: of the text, from 0.
        text: the text.
        reason: what is wrong with it.
    """

    def __init__(self, number: int, text: str, reason: str):
        super().__init__(f"text {number + 1} ({shorten(text)}): {reason}")
        self.number, self.text, self.reason = number, text, reason


@contextmanager
def name_text(texts: Sequence[Prompt], number: int) -> Iterator[None]:
    """Make a ConfigError about one of several texts a `TextError`, which says which."""
    try:
        yield
    except ConfigError as error:
        if len(texts) == 1:
            raise
        raise TextError(number, str(texts[number]), str(error)) from error


def is_cutting(config: Config) -> bool:
    """Return whether the task cuts texts that are longer than the context, as in training."""
    return config.objective.task.IS_PAIRED


def find_cut_texts(config: Config, tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Return the numbers of the texts of which an encoder reads the beginning only."""
    if not is_cutting(config):
        return []
    frame = len(tokenizer.prefix) + 1  # bos and eos
    lengths = [len(ids) + frame for ids in tokenizer.encode_batch(texts)]
    return [number for number, n in enumerate(lengths) if n > config.model.context]


def check_vocab(config: Config, tokenizer: Tokenizer):
    """Raise ConfigError if a tokenizer has ids beyond those of the model, or of its masks."""
    vocab, masks = config.model.vocab, config.model.vocab - config.tokenizer_vocab
    if tokenizer.vocab_size > vocab - masks:
        room = f" less {masks} for masks" if masks else ""
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, and the model model.vocab={vocab}"
            f"{room}: it is not the tokenizer of this model."
        )


def add_bos_eos(
    cfg: ModelConfig, tokenizer: Tokenizer, text: np.ndarray, is_cut: bool = False
) -> list[int]:
    """Return the tokens of a text between bos and eos, as an encoder reads it.

    There is no bos if the texts of the tokenizer do not begin with it.

    Args:
        is_cut: what does not fit the context is left out, as in training on pairs and classes.

    Raises:
        ConfigError: it does not fit the context.
    """
    ids = [*tokenizer.prefix, *text.tolist(), tokenizer.eos]
    if is_cut:
        return ids[: cfg.context]
    if len(ids) > cfg.context:
        raise LongPromptError(
            f"the prompt has {len(ids)} tokens, but model.context={cfg.context} must hold it: "
            "shorten it."
        )
    return ids


def encode_prompts(
    config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt], samples: Sequence[SampleConfig]
) -> list[Row]:
    """Make a row of each prompt.

    Raises:
        ConfigError: a prompt is invalid or does not fit the context.
    """
    rows = []
    for number, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        with name_text(prompts, number):
            rows.append(_make_row(config, tokenizer, prompt, sample))
    return rows


def encode_text(
    config: Config, tokenizer: Tokenizer, text: str, place: str = "start"
) -> np.ndarray:
    """Tokenize a text for an objective whose model generates: each `<mask>` is its own sentinel.

    Args:
        place: where the text stands; see `Tokenizer.encode`.

    Raises:
        ConfigError: it has more masks than the model.
    """
    masks = list_masks(config)
    if not masks:
        return tokenizer.encode(text, place)
    if text.count(MASK) > len(masks):
        raise ConfigError(f"the prompt has {text.count(MASK)} masks; the model has {len(masks)}.")
    return encode_with_masks(tokenizer, text, lambda i: masks[i])


def _make_row(config: Config, tokenizer: Tokenizer, prompt: Prompt, sample: SampleConfig) -> Row:
    cfg = config.model
    if isinstance(prompt, str):
        text, prefix = encode_text(config, tokenizer, prompt), tokenizer.prefix
    else:  # the whole prompt: a chat template writes its own bos
        text, prefix = read_ids(cfg, prompt), []
    source, ids = [], [*prefix, *text.tolist()] or [tokenizer.bos]
    is_start = not len(prompt)  # of the text that is generated
    if cfg.family == "encoder_decoder":
        source = add_bos_eos(cfg, tokenizer, text, is_cutting(config))
        ids = [cfg.get_start_token(tokenizer.bos)]
        is_start = True
    if len(ids) >= cfg.context and not sample.slide:
        raise LongPromptError(
            f"the prompt has {len(ids)} tokens, but model.context={cfg.context} must hold it and "
            "at least one more: shorten it, or set slide=true to keep only its end."
        )
    names = {token: f"<{i}>" for i, token in enumerate(list_masks(config))}
    return Row(sample, source, ids, StreamDecoder(tokenizer, is_start), masks=names)


def read_ids(
    cfg: ModelConfig, prompt: Sequence[int] | np.ndarray, most: int | None = None
) -> np.ndarray:
    """Return the ids of a prompt, int32 [T].

    Raises:
        ConfigError: they are no integers of the vocabulary, or more than `most`.
    """
    ids = np.asarray(prompt)
    is_valid = ids.ndim == 1 and (not ids.size or ids.dtype.kind in "iu")
    if not is_valid or ((ids < 0) | (ids >= cfg.vocab)).any():
        raise ConfigError(
            f"a prompt is a text or a list of token ids from 0 to {cfg.vocab - 1}, not "
            f"{prompt!r:.60}."
        )
    if most is not None and len(ids) > most:
        raise LongPromptError(f"the prompt has {len(ids)} tokens: at most {most} are read.")
    return ids.astype(np.int32)
