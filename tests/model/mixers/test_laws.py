"""Properties that every mixer must have: each registered mixer is tested."""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, single_document_coords, tiny

from jaxgpt.architecture import MixerConfig
from jaxgpt.model import Coords, abstract_params, build, init_cache
from jaxgpt.model.mixers import MIXERS

# So small that a row of a dozen tokens has many chunks, blocks, segments and full buckets.
MIXER_SIZES = MixerConfig(
    state=4, features=8, summary=2, chunk=3, hashes=2, buckets=4, bucket_window=2, memory=3
)
TOLERANCE = dict(atol=1e-5, rtol=1e-5)  # float32 sums in another order, through two layers
FAMILIES = {"causal": "decoder", "both": "encoder"}

every_causal_mixer = pytest.mark.parametrize(
    "name", [name for name, mixer in MIXERS.items() if "causal" in mixer.DIRECTIONS]
)
every_direction = pytest.mark.parametrize(
    ("name", "direction"),
    [(name, direction) for name, mixer in MIXERS.items() for direction in mixer.DIRECTIONS],
)


def make_config(name: str, direction: str = "causal", **changes):
    position = "rope" if "rotation" in MIXERS[name].USES else "none"
    settings = dict(
        mixers=(name,), position=position, family=FAMILIES[direction], mixer=MIXER_SIZES
    )
    return tiny(**settings | changes)


# All tests except those of the cache share one compiled program per mixer, for rows of this shape.
B, T = 15, 14


@partial(jax.jit, static_argnames="cfg")
def run(cfg, params, tokens, coords):
    """Return (hidden [B T D], gradients of a mean over the tokens)."""

    def loss(params):
        hidden, _ = build(cfg).apply({"params": params}, tokens, coords)
        is_token = (coords.segment_ids > 0)[..., None]
        return jnp.mean(jnp.where(is_token, jnp.sin(3 * hidden.astype(jnp.float32)), 0)), hidden

    gradients, hidden = jax.grad(loss, has_aux=True)(params)
    return hidden, gradients


@functools.cache
def random_model(name, direction):
    cfg = make_config(name, direction)
    return cfg, random_params(cfg), random_tokens(cfg, 0, 1, T)


def repeat_rows(tokens, coords: Coords):
    """Repeat rows [b T], b <= B, to B of them."""
    return jax.tree.map(lambda x: jnp.resize(x, (B, T)), (tokens, coords))


def pad_document(tokens, start: int = 0):
    """Pad a document [1 t] on both sides, so that it starts at column `start`."""
    sides = ((0, 0), (start, T - start - tokens.shape[1]))
    coords = single_document_coords(tokens)
    return repeat_rows(
        jnp.pad(tokens, sides, constant_values=7),
        Coords(jnp.pad(coords.positions, sides), jnp.pad(coords.segment_ids, sides)),
    )


PACKED = Coords(
    jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0, 0]]),
    jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0]]),
)  # three documents, and padding; only the first begins at a multiple of 3, the chunk size


@every_direction
def test_a_token_depends_on_its_own_document_only_and_not_on_the_future(name, direction):
    cfg, params, tokens = random_model(name, direction)
    # Row s has another token at position s; the last row is unchanged.
    changed = jnp.where(jnp.arange(B)[:, None] == jnp.arange(T), (tokens + 1) % cfg.vocab, tokens)
    hidden, _ = run(cfg, params, changed, repeat_rows(tokens, PACKED)[1])
    influence = np.abs(hidden[:T] - hidden[T]).max(-1).T  # [T S]
    segment_ids = np.asarray(PACKED.segment_ids[0])
    allowed = np.equal.outer(segment_ids, segment_ids) & (segment_ids > 0)
    if direction == "causal":
        allowed &= np.tri(T, dtype=bool)
    is_token = segment_ids > 0
    # Not even by rounding, except that a Fourier transform rounds all tokens together.
    rounding = 5e-6 if name == "s4" else 0
    assert influence[is_token][~allowed[is_token]].max() <= rounding
    assert influence[range(12), range(12)].min() > 1e-3  # on itself
    for t in (1, 2, 4, 6, 8, 10):  # and on some earlier token
        assert (influence[t, :t] > 1e-6).any(), (t, influence[t])


@every_direction
def test_packed_documents_equal_the_same_documents_in_separate_rows(name, direction):
    cfg, params, tokens = random_model(name, direction)
    packed, gradients = run(cfg, params, *repeat_rows(tokens, PACKED))
    chex.assert_tree_all_finite((packed, gradients))
    for start, end in ((0, 5), (5, 11), (11, 12)):
        separate, _ = run(cfg, params, *pad_document(tokens[:, start:end]))
        np.testing.assert_allclose(packed[0, start:end], separate[0, : end - start], **TOLERANCE)


@every_direction
def test_padding_on_either_side_does_not_matter(name, direction):
    cfg, params, tokens = random_model(name, direction)
    tokens = tokens[:, :8]
    bare, _ = forward(cfg, params, tokens, single_document_coords(tokens))
    for left in (0, 4, 6):
        padded, _ = run(cfg, params, *pad_document(tokens, left))
        chex.assert_tree_all_finite(padded)
        np.testing.assert_allclose(padded[0, left : left + 8], bare[0], **TOLERANCE)


@every_causal_mixer
def test_decoding_prompts_padded_on_the_left_equals_one_pass(name):
    """A prefill, three tokens at once, then one by one; the prompts have 7 and 4 tokens."""
    cfg, params, _ = random_model(name, "causal")
    lengths, steps = np.array([7, 4]), (7, 3, 1, 1, 1, 1)
    tokens = random_tokens(cfg, 1, 2, T)
    position = np.arange(T)[None] - (7 - lengths)[:, None]
    coords = Coords(jnp.maximum(position, 0), jnp.asarray(position >= 0, jnp.int32))
    cache, start, outputs = init_cache(cfg, batch=2, slots=17), 0, []
    for size in steps:
        step_coords = jax.tree.map(lambda x, a=start, b=start + size: x[:, a:b], coords)
        hidden, cache = forward(cfg, params, tokens[:, start : start + size], step_coords, cache)
        outputs.append(hidden)
        start += size
    outputs = jnp.concatenate(outputs, axis=1)
    for row, length in enumerate(lengths):
        expected, _ = run(cfg, params, *pad_document(tokens[row : row + 1, 7 - length :]))
        np.testing.assert_allclose(
            outputs[row, 7 - length :], expected[0, : length + 7], **TOLERANCE
        )


@every_causal_mixer
def test_decoding_rows_with_cursors_of_their_own_equals_one_pass(name):
    """Prompts of 7 and 4 tokens in chunks, then both or one row at a time, in a used cache."""
    cfg, params, _ = random_model(name, "causal")
    tokens = random_tokens(cfg, 1, 2, T)
    used, lengths = np.zeros(2, int), np.zeros(2, int)
    cache, outputs = init_cache(cfg, batch=2, slots=17, chunk=4), [[], []]
    steps = [(4, 3, 4), (4, 4, 4), (4, 3, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (4, 0, 2)]
    for n, (size, *counts) in enumerate(steps):
        if n == 1:  # what other texts have left is not seen
            used, outputs = lengths * 0, [[], []]
            cache = cache.replace(cursor=jnp.zeros(2, jnp.int32))
        position = used[:, None] + np.arange(size)
        is_token = np.arange(size) < np.array(counts)[:, None]
        chunk = np.take_along_axis(np.asarray(tokens), np.minimum(position, T - 1), axis=1)
        coords = Coords(jnp.asarray(position), jnp.asarray(is_token, jnp.int32))
        hidden, cache = forward(cfg, params, jnp.asarray(chunk), coords, cache)
        used = used + counts
        for row, count in enumerate(counts):
            outputs[row].append(hidden[row, :count])
    np.testing.assert_array_equal(cache.cursor, used)
    for row in range(2):
        expected, _ = run(cfg, params, *pad_document(tokens[row : row + 1]))
        found = jnp.concatenate(outputs[row])
        np.testing.assert_allclose(found, expected[0, : used[row]], **TOLERANCE)


@every_direction
def test_every_parameter_has_a_gradient(name, direction):
    cfg, params, tokens = random_model(name, direction)
    _, gradients = run(cfg, params, *repeat_rows(tokens, single_document_coords(tokens)))
    chex.assert_tree_all_finite(gradients)
    for path, g in jax.tree.leaves_with_path(gradients):
        assert np.abs(g).max() > 1e-7, jax.tree_util.keystr(path)


@every_direction
def test_bfloat16_stays_bfloat16_and_near_float32(name, direction):
    cfg, params, tokens = random_model(name, direction)
    params = jax.tree.map(lambda x: x / 2, params)
    expected, _ = run(cfg, params, *repeat_rows(tokens, PACKED))
    low_precision, _ = forward(
        make_config(name, direction, dtype="bfloat16"), params, tokens, PACKED
    )
    assert low_precision.dtype == jnp.bfloat16
    error = np.abs(low_precision[0, :12].astype(jnp.float32) - expected[0, :12])
    # Some ten roundings of 2^-9 of values of order 1. (A hash may flip a token or two.)
    assert error.mean() < 0.02
    assert np.median(error) < 0.015


@every_direction
def test_the_letters_of_every_parameter_match_its_shape(name, direction):
    cfg = make_config(name, direction)
    params, letters = abstract_params(cfg)
    sizes = cfg.sizes | {"L": cfg.layers}
    shapes = jax.tree.map(lambda d: tuple(sizes[x] for x in d if x != ">"), letters)
    assert shapes == jax.tree.map(lambda x: x.shape, params)
