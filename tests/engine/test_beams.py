"""Beam search against that of transformers."""

import functools

import numpy as np
import pytest
import torch
from helpers import random_params, tiny
from interop.hf_cases import MODELS, randomize

import jaxgpt
from jaxgpt.config import Config, ConfigError, SampleConfig
from jaxgpt.engine import prepare_decode_params
from jaxgpt.engine.beam import search_beams
from jaxgpt.generate import generate
from jaxgpt.tokenizer import make_byte_tokenizer

BEAMS, TOKENS, EOS = 5, 10, 7
PROMPT = [5, 11, 3, 20, 9, 14]


@functools.cache
def load_case(name, folder):
    """Return a model of transformers, and the same model."""
    reference = randomize(MODELS[name]())
    with torch.no_grad():  # so that texts end at different lengths
        reference.get_output_embeddings().weight[EOS] *= 1.5
    reference.save_pretrained(folder)
    model = jaxgpt.load(folder)
    cfg = model.config.model
    return reference, cfg, prepare_decode_params(cfg, model.params)


@pytest.fixture(scope="module", params=["gpt2", "bart", "t5"])
def case(request, tmp_path_factory):
    return load_case(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("length_penalty", [-1.0, 0.5, 2.0])
def test_beams_are_those_of_transformers(case, length_penalty):
    reference, cfg, params = case
    has_source = reference.config.is_encoder_decoder
    ids = torch.tensor([PROMPT])
    start = 0
    settings = dict(
        num_beams=BEAMS, num_return_sequences=BEAMS, do_sample=False, max_new_tokens=TOKENS,
        eos_token_id=EOS, pad_token_id=0, bos_token_id=1, length_penalty=length_penalty,
        early_stopping=False, output_scores=True, return_dict_in_generate=True,
        forced_bos_token_id=None, forced_eos_token_id=None,
    )  # fmt: skip
    if has_source:
        settings["decoder_start_token_id"] = start
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    prompt, source = ([start], PROMPT) if has_source else (PROMPT, [])
    found = search_beams(
        cfg, params, prompt, source,
        beams=BEAMS, tokens=TOKENS, ends=[EOS], length_penalty=length_penalty,
    )  # fmt: skip
    scores = expected.sequences_scores.numpy()
    assert len(found) == BEAMS
    np.testing.assert_allclose([beam.score for beam in found], scores, rtol=1e-4)
    for beam, sequence in zip(found, expected.sequences[:, len(prompt) :].tolist(), strict=True):
        n = sequence.index(EOS) + 1 if EOS in sequence else len(sequence)
        assert list(beam.tokens) == sequence[:n]
        total = sum(beam.logprobs)
        assert beam.score == pytest.approx(total / len(beam.tokens) ** length_penalty, rel=1e-4)


def test_generate_returns_the_best_beam_beside_rows_that_sample():
    tokenizer, cfg = make_byte_tokenizer(), tiny(vocab=270, context=64)
    params = random_params(cfg, std=0.3)
    greedy = SampleConfig(temperature=0, tokens=6)
    samples = [greedy, SampleConfig(beams=3, tokens=6, min_tokens=6)]
    plain, best = generate(Config(model=cfg), params, tokenizer, ["hello", "hello"], samples)
    assert plain == generate(Config(model=cfg), params, tokenizer, ["hello"], [greedy])[0]
    assert (len(best.tokens), best.ending) == (6, "tokens")
    assert sum(best.logprobs) > sum(plain.logprobs) - 1e-4
    assert best.text == tokenizer.decode(list(best.tokens))


def test_beams_refuse_what_they_do_not_have():
    with pytest.raises(ConfigError, match=r"sample.beams=2.*sample.regex"):
        SampleConfig(beams=2, regex="a+")
    with pytest.raises(ConfigError, match=r"sample.beams=2.*sample.slide"):
        SampleConfig(beams=2, slide=True)
    with pytest.raises(ConfigError, match="beams=200 need 400 tokens"):
        search_beams(tiny(), {}, [1], beams=200, tokens=2, ends=[0])
