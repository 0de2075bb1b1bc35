"""What every mixer owes the model, whatever it computes: a mixer is tested by being registered."""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, tiny, whole

from jaxgpt.architecture import MixerConfig
from jaxgpt.model import Coords, abstract_params, build, init_cache
from jaxgpt.model.mixers import MIXERS

# So small that a row of a dozen tokens has many chunks, blocks, segments and full buckets.
NUMBERS = MixerConfig(
    state=4, features=8, summary=2, chunk=3, hashes=2, buckets=4, bucket_window=2, memory=3
)
CLOSE = dict(atol=1e-5, rtol=1e-5)  # float32 sums in another order, through two layers
FAMILIES = {"causal": "decoder", "both": "encoder"}

every_causal_mixer = pytest.mark.parametrize(
    "name", [name for name, mixer in MIXERS.items() if "causal" in mixer.DIRECTIONS]
)
every_way = pytest.mark.parametrize(
    ("name", "direction"),
    [(name, direction) for name, mixer in MIXERS.items() for direction in mixer.DIRECTIONS],
)


def model(name: str, direction: str = "causal", **changes):
    position = "rope" if "rotation" in MIXERS[name].USES else "none"
    given = dict(mixers=(name,), position=position, family=FAMILIES[direction], mixer=NUMBERS)
    return tiny(**given | changes)


# All laws but those of the cache ask one compiled program per mixer, for rows of this shape.
B, T = 15, 14


@partial(jax.jit, static_argnames="cfg")
def run(cfg, params, tokens, at):
    """(hidden [B T D], gradients of a sum over the rows that have weight)."""

    def loss(params):
        hidden, _ = build(cfg).apply({"params": params}, tokens, at)
        real = (at.document > 0)[..., None]
        return jnp.mean(jnp.where(real, jnp.sin(3 * hidden.astype(jnp.float32)), 0)), hidden

    gradients, hidden = jax.grad(loss, has_aux=True)(params)
    return hidden, gradients


@functools.cache
def random_model(name, direction):
    cfg = model(name, direction)
    return cfg, random_params(cfg), random_tokens(cfg, 0, 1, T)


def rows(tokens, at: Coords):
    """Rows [b T], b <= B, repeated to B of them."""
    return jax.tree.map(lambda x: jnp.resize(x, (B, T)), (tokens, at))


def alone(tokens, begin: int = 0):
    """A document [1 t] from column `begin` on, with padding on both sides."""
    sides = ((0, 0), (begin, T - begin - tokens.shape[1]))
    at = whole(tokens)
    return rows(
        jnp.pad(tokens, sides, constant_values=7),
        Coords(jnp.pad(at.position, sides), jnp.pad(at.document, sides)),
    )


PACKED = Coords(
    jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0, 0]]),
    jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0]]),
)  # three documents, and padding; none but the first begins where a chunk of 3 does


@every_way
def test_a_token_hears_of_its_own_document_only_and_of_no_future(name, direction):
    cfg, params, tokens = random_model(name, direction)
    # Row s has another token in place s, the last row none.
    changed = jnp.where(jnp.arange(B)[:, None] == jnp.arange(T), (tokens + 1) % cfg.vocab, tokens)
    hidden, _ = run(cfg, params, changed, rows(tokens, PACKED)[1])
    heard = np.abs(hidden[:T] - hidden[T]).max(-1).T  # [T S]
    document = np.asarray(PACKED.document[0])
    allowed = np.equal.outer(document, document) & (document > 0)
    if direction == "causal":
        allowed &= np.tri(T, dtype=bool)
    real = document > 0
    # Not even by rounding; but a Fourier transform rounds all tokens together.
    rounding = 5e-6 if name == "s4" else 0
    assert heard[real][~allowed[real]].max() <= rounding
    assert heard[range(12), range(12)].min() > 1e-3  # of itself
    for t in (1, 2, 4, 6, 8, 10):  # and of some before
        assert (heard[t, :t] > 1e-6).any(), (t, heard[t])


@every_way
def test_packed_documents_equal_the_same_documents_alone(name, direction):
    cfg, params, tokens = random_model(name, direction)
    packed, gradients = run(cfg, params, *rows(tokens, PACKED))
    chex.assert_tree_all_finite((packed, gradients))
    for begin, end in ((0, 5), (5, 11), (11, 12)):
        one, _ = run(cfg, params, *alone(tokens[:, begin:end]))
        np.testing.assert_allclose(packed[0, begin:end], one[0, : end - begin], **CLOSE)


@every_way
def test_padding_on_either_side_does_not_matter(name, direction):
    cfg, params, tokens = random_model(name, direction)
    tokens = tokens[:, :8]
    bare, _ = forward(cfg, params, tokens, whole(tokens))
    for left in (0, 4, 6):
        padded, _ = run(cfg, params, *alone(tokens, left))
        chex.assert_tree_all_finite(padded)
        np.testing.assert_allclose(padded[0, left : left + 8], bare[0], **CLOSE)


@every_causal_mixer
def test_decoding_prompts_padded_on_the_left_equals_one_pass(name):
    """A prefill, three tokens at once, then one by one; the prompts are of 7 and 4 tokens."""
    cfg, params, _ = random_model(name, "causal")
    lengths, steps = np.array([7, 4]), (7, 3, 1, 1, 1, 1)
    tokens = random_tokens(cfg, 1, 2, T)
    position = np.arange(T)[None] - (7 - lengths)[:, None]
    at = Coords(jnp.maximum(position, 0), jnp.asarray(position >= 0, jnp.int32))
    cache, begin, found = init_cache(cfg, batch=2, slots=17), 0, []
    for size in steps:
        here = jax.tree.map(lambda x, a=begin, b=begin + size: x[:, a:b], at)
        hidden, cache = forward(cfg, params, tokens[:, begin : begin + size], here, cache)
        found.append(hidden)
        begin += size
    found = jnp.concatenate(found, axis=1)
    for row, length in enumerate(lengths):
        wanted, _ = run(cfg, params, *alone(tokens[row : row + 1, 7 - length :]))
        np.testing.assert_allclose(found[row, 7 - length :], wanted[0, : length + 7], **CLOSE)


@every_way
def test_every_parameter_has_a_gradient(name, direction):
    cfg, params, tokens = random_model(name, direction)
    _, gradients = run(cfg, params, *rows(tokens, whole(tokens)))
    chex.assert_tree_all_finite(gradients)
    for path, g in jax.tree.leaves_with_path(gradients):
        assert np.abs(g).max() > 1e-7, jax.tree_util.keystr(path)


@every_way
def test_bfloat16_stays_bfloat16_and_near_float32(name, direction):
    cfg, params, tokens = random_model(name, direction)
    params = jax.tree.map(lambda x: x / 2, params)
    exact, _ = run(cfg, params, *rows(tokens, PACKED))
    low, _ = forward(model(name, direction, dtype="bfloat16"), params, tokens, PACKED)
    assert low.dtype == jnp.bfloat16
    error = np.abs(low[0, :12].astype(jnp.float32) - exact[0, :12])
    # Some ten roundings of 2^-9 of values of order 1. (A hash may flip a token or two.)
    assert error.mean() < 0.02
    assert np.median(error) < 0.015


@every_way
def test_the_letters_of_every_parameter_spell_its_shape(name, direction):
    cfg = model(name, direction)
    params, letters = abstract_params(cfg)
    sizes = cfg.sizes | {"L": cfg.layers}
    spelled = jax.tree.map(lambda d: tuple(sizes[x] for x in d if x != ">"), letters)
    assert spelled == jax.tree.map(lambda x: x.shape, params)
