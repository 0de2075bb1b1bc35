"""A tiny model for tests of the engine, and the slow, plain way to the same tokens."""

import dataclasses
import functools

import jax
import numpy as np
from helpers import compute_logits, random_params, single_document_coords, tiny

from jaxgpt.config import Config, SampleConfig
from jaxgpt.engine import Engine, Request, Row, Size, prepare_decode_params
from jaxgpt.engine.processors import check_scores
from jaxgpt.generate import make_request
from jaxgpt.sampling import SamplingParams, draw, sampleable_tokens
from jaxgpt.tokenizer import StreamDecoder, make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
CFG = tiny(vocab=270, context=64)
PARAMS = random_params(CFG, std=0.3)
ALLOWED = sampleable_tokens(TOKENIZER, CFG.vocab)
GREEDY = SampleConfig(temperature=0, tokens=12)
DRAWN = SampleConfig(temperature=1.2, top_k=40, top_p=0.95, repetition_penalty=1.1, tokens=12)


@functools.lru_cache(maxsize=8)
def prepare(cfg=CFG, seed: int | None = None):
    """Return the parameters for decoding: those of PARAMS, or others."""
    params = PARAMS if seed is None else random_params(cfg, seed, std=0.3)
    return prepare_decode_params(cfg, params)


def make_engine(cfg=CFG, params=None, rows=3, slots=64, chunk=16, speculate=0, **more) -> Engine:
    params = prepare(cfg) if params is None else params
    size = Size(rows, slots, chunk=chunk, speculate=speculate)
    return Engine(cfg, params, size, TOKENIZER.ends, ALLOWED, **more)


def make_row_request(prompt: str | list[int], sample=GREEDY, index=0, top=0, bias=None) -> Request:
    """Return the request of a prompt: a text after bos, or token ids."""
    is_text = isinstance(prompt, str)
    ids = [TOKENIZER.bos, *TOKENIZER.encode(prompt).tolist()] if is_text else list(prompt)
    row = Row(sample, [], ids, StreamDecoder(TOKENIZER, not is_text))
    key = jax.random.fold_in(jax.random.key(sample.seed), index)
    return make_request(Config(model=CFG), TOKENIZER, row, key, bias, top)


def run_all(engine: Engine, requests: list[Request]) -> list[list[float]]:
    """Run requests to their ends. Return their log-probabilities."""
    logprobs: dict[Request, list[float]] = {request: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while not engine.is_idle:
        for request, piece in engine.step():
            assert request.error is None
            logprobs[request] += piece.logprobs
    return [logprobs[request] for request in requests]


@functools.partial(jax.jit, static_argnames="cfg")
def score_last(cfg, params, tokens, n):
    """Return the logits after the first n of tokens [1 context], without a cache."""
    logits = compute_logits(cfg, params, tokens, single_document_coords(tokens))
    return jax.lax.dynamic_index_in_dim(logits, n - 1, 1, False)


_draw = jax.jit(draw)


def recompute(prompt: str | list[int], sample, index=0, cfg=CFG, params=PARAMS) -> list[int]:
    """Return the tokens after a prompt, by a whole forward pass for each."""
    ids = list(make_row_request(prompt, dataclasses.replace(sample, tokens=1)).row.ids)
    settings = SamplingParams.from_configs([sample], ALLOWED)
    key = jax.random.fold_in(jax.random.key(sample.seed), index)
    out: list[int] = []
    while len(out) < sample.tokens and len(ids) < cfg.context:
        padded = np.zeros((1, cfg.context), np.int32)
        padded[0, : len(ids)] = ids
        seen = np.isin(np.arange(cfg.vocab), ids)[None]
        scores = score_last(cfg, params, padded, len(ids))
        check_scores(scores)
        token = int(_draw(scores, seen, settings, jax.random.fold_in(key, len(out))[None])[0])
        if token == TOKENIZER.eos:
            break
        ids.append(token)
        out.append(token)
    return out
