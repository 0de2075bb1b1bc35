"""Masks against Python loops over every pair of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, tiny, whole

from jaxgpt.architecture import SparseConfig
from jaxgpt.model import init_cache
from jaxgpt.model.masks import (
    PATTERNS,
    Blocks,
    Causal,
    Coords,
    InPrefix,
    OneDocument,
    SameDocument,
    Strided,
    Window,
    layer_mask,
)

B, T, S = 3, 7, 9


@pytest.fixture
def ends():
    """Random coordinates of queries and of keys, with holes (document 0) among both."""
    rng = np.random.default_rng(0)
    q = Coords(rng.integers(0, 6, (B, T)), rng.integers(0, 3, (B, T)))
    k = Coords(rng.integers(0, 6, (B, S)), rng.integers(0, 3, (B, S)))
    return q, k


def by_pairs(rule, q: Coords, k: Coords):
    """rule((position, document) of q, the same of k), asked for one pair after the other."""
    at = [
        list(zip(*(x[b].tolist() for x in end[:2]), strict=True))
        for b in range(B)
        for end in (q, k)
    ]
    return [[[rule(i, j) for j in at[2 * b + 1]] for i in at[2 * b]] for b in range(B)]


def test_causal_tokens_see_themselves_and_what_came_before(ends):
    wanted = by_pairs(lambda q, k: k[0] <= q[0], *ends)
    np.testing.assert_array_equal(Causal()(*ends), wanted)


def test_tokens_see_only_their_own_document_and_nobody_sees_an_empty_slot(ends):
    wanted = by_pairs(lambda q, k: k[1] == q[1] and k[1] != 0, *ends)
    np.testing.assert_array_equal(SameDocument()(*ends), wanted)


def test_tokens_of_a_row_that_is_one_document_see_all_but_empty_slots(ends):
    wanted = by_pairs(lambda q, k: k[1] != 0, *ends)
    np.testing.assert_array_equal(np.broadcast_to(OneDocument()(*ends), (B, T, S)), wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_window_is_all_that_is_less_than_its_size_away(ends, size):
    wanted = by_pairs(lambda q, k: abs(q[0] - k[0]) < size, *ends)
    np.testing.assert_array_equal(Window(size)(*ends), wanted)


def test_a_stride_is_every_so_manieth_token_from_the_query_on(ends):
    wanted = by_pairs(lambda q, k: (q[0] - k[0]) in (-6, -3, 0, 3, 6), *ends)
    np.testing.assert_array_equal(Strided(3)(*ends), wanted)


def test_all_see_the_prefix_of_a_document(ends):
    q, k = ends
    k = k._replace(prefix=jnp.asarray(np.random.default_rng(1).integers(0, 6, (B, S))))
    lengths = [[k.prefix[b].tolist()] * T for b in range(B)]
    places = [[k.position[b].tolist()] * T for b in range(B)]
    found = np.broadcast_to(InPrefix()(q, k), (B, T, S))
    np.testing.assert_array_equal(found, np.less(places, lengths))


def test_a_prefix_of_unknown_length_is_refused(ends):
    with pytest.raises(ValueError, match=r"Coords\.prefix says how long"):
        InPrefix()(*ends)


def test_and_is_where_every_mask_agrees(ends):
    wanted = by_pairs(lambda q, k: k[0] <= q[0] and k[1] == q[1] != 0, *ends)
    np.testing.assert_array_equal((Causal() & SameDocument())(*ends), wanted)


def test_or_is_where_one_mask_agrees(ends):
    wanted = by_pairs(lambda q, k: k[0] <= q[0] or k[1] == q[1] != 0, *ends)
    np.testing.assert_array_equal((Causal() | SameDocument())(*ends), wanted)


def test_a_mask_of_a_block_of_keys_is_that_block_of_the_mask(ends):
    q, k = ends
    both = Causal() & SameDocument()
    block = jax.tree.map(lambda x: x[:, 2:5], k)
    np.testing.assert_array_equal(both(q, block), both(q, k)[:, :, 2:5])


def test_coordinates_of_another_shape_than_the_tokens_are_refused(ends):
    with pytest.raises(AssertionError):
        ends[0].check(np.zeros((B, T + 1), np.int32))


# --- blocks ---


def scrambled(x: int, salt: int) -> int:
    """The finaliser of MurmurHash3 in Python's whole numbers, and its upper 31 bits."""
    x = (x + (salt + 1) * 0x9E3779B9) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return (x ^ x >> 16) >> 1


def seen_by_block(mask: Blocks, blocks: int) -> np.ndarray:
    """[blocks blocks]: whether tokens of one see those of another, the same for all of them."""
    at = whole(jnp.zeros((1, blocks * mask.size), jnp.int32))
    seen = np.asarray(mask(at, at))[0].reshape(blocks, mask.size, blocks, mask.size)
    np.testing.assert_array_equal(seen.all((1, 3)), seen.any((1, 3)))
    return seen.any((1, 3))


@pytest.mark.parametrize("total", [0, 12])
@pytest.mark.parametrize(("near", "anchors", "random"), [(3, 1, 2), (1, 0, 1), (5, 2, 0)])
def test_a_block_sees_its_neighbours_the_anchors_and_its_draws_and_no_more(
    total, near, anchors, random
):
    found = seen_by_block(Blocks(4, near, anchors, random, total), 12)
    for here in range(12):
        drawn = [scrambled(here, i) % (total or max(here, 1)) for i in range(random)]
        wanted = [
            abs(here - there) <= near // 2 or min(here, there) < anchors or there in drawn
            for there in range(12)
        ]
        np.testing.assert_array_equal(found[here], wanted)


def test_draws_behind_a_causal_mask_are_of_blocks_before():
    drawn = seen_by_block(Blocks(2, 1, 0, 3, 0), 40) & ~np.eye(40, dtype=bool)
    assert not np.triu(drawn[1:], 2).any()
    assert np.all(drawn[1:].sum(1) <= 3)
    assert np.all(drawn[1:].sum(1) >= 1)


def test_draws_are_spread_over_all_blocks():
    n, draws = 2000, 4
    chosen = [scrambled(here, i) % 8 for here in range(n) for i in range(draws)]
    # 8000 draws of 8: 1000 each, with a standard deviation of 30; 5 of them.
    np.testing.assert_allclose(np.bincount(chosen), n * draws / 8, atol=150)


# --- patterns ---


SPARSE = SparseConfig(window=3, stride=4, block=2, near=3, anchors=1, random=1)


def allowed(pattern: str, direction: str, q: int, k: int, prefix: int, context: int) -> bool:
    """Whether token q of a document sees token k of it."""
    is_before = k <= q or direction == "both"
    if pattern == "window":
        return is_before and abs(q - k) < 3
    if pattern == "strided":
        return is_before and (abs(q - k) < 4 or (q - k) % 4 == 0)
    if pattern == "blocks":
        here, there = q // 2, k // 2
        draw = scrambled(here, 0) % (max(here, 1) if direction == "causal" else context // 2)
        return is_before and (abs(here - there) <= 1 or min(here, there) < 1 or there == draw)
    if pattern == "prefix":
        return k <= q or k < prefix
    return is_before


def packed(*lengths: int) -> Coords:
    """Documents in a row, the prefix of each being 3 tokens, and two tokens of padding."""
    position = [i for n in lengths for i in range(n)] + [0, 0]
    document = [d for d, n in enumerate(lengths, 1) for _ in range(n)] + [0, 0]
    rows = (position, document, [3] * len(position))
    return Coords(*(jnp.asarray([row], jnp.int32) for row in rows))


DIRECTED = [(p, d) for p in PATTERNS for d in ("causal", "both") if (p, d) != ("prefix", "both")]


@pytest.mark.parametrize(("pattern", "direction"), DIRECTED)
def test_a_layer_sees_its_pattern_inside_its_own_document(pattern, direction):
    cfg = tiny(sparse=SPARSE, pattern=(pattern,))
    at = packed(13, 6)
    found = np.asarray(layer_mask(cfg, pattern, direction)(at, at))[0]
    position, document = (np.asarray(x)[0].tolist() for x in at[:2])
    for t, s in np.ndindex(21, 21):
        wanted = document[t] == document[s] != 0 and allowed(
            pattern, direction, position[t], position[s], 3, cfg.context
        )
        assert found[t, s] == wanted, (t, s)
    assert 0 < found.sum() < np.equal.outer(document, document).sum() - 4 or direction == "both"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_token_has_the_hidden_state_of_all_whom_its_layers_see(pattern):
    """Two layers: who is heard of is who is seen by those who are seen."""
    cfg = tiny(sparse=SPARSE, pattern=(pattern,))
    params, at = random_params(cfg), packed(13, 6)
    tokens = random_tokens(cfg, 0, 1, 21)
    mask = np.asarray(layer_mask(cfg, pattern, "causal")(at, at))[0].astype(int)
    heard = (mask @ mask > 0)[:19]
    before = np.asarray(forward(cfg, params, tokens, at)[0])[0, :19]
    for s in range(21):
        other = tokens.at[0, s].set((tokens[0, s] + 1) % cfg.vocab)
        after = np.asarray(forward(cfg, params, other, at)[0])[0, :19]
        change = np.abs(after - before).max(-1)
        np.testing.assert_array_equal(change[~heard[:, s]], 0)
        assert np.all(change[heard[:, s]] > 1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_gives_the_same_with_a_cache_as_without(pattern):
    cfg = tiny(sparse=SPARSE, pattern=(pattern,))
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 16)
    at = whole(tokens)
    if pattern == "prefix":
        at = at._replace(prefix=jnp.full_like(at.position, 3))
    wanted, _ = forward(cfg, params, tokens, at)
    # The prompts, of 4 and of 6 tokens, are padded on the left.
    lengths, rows = np.array([4, 6]), np.arange(2)[:, None]
    cache = init_cache(cfg, batch=2, slots=20)
    for step in (np.arange(-6, 0), [0], [1, 2, 3], [4], [5], [6], [7]):
        place = lengths[:, None] + np.array(step)
        is_token, place = place >= 0, np.maximum(place, 0)
        here = jax.tree.map(lambda x, i=place: x[rows, i], at)
        here = here._replace(document=jnp.asarray(is_token, jnp.int32))
        hidden, cache = forward(cfg, params, tokens[rows, place], here, cache)
        # Two orders of the same float32 sums through two layers.
        np.testing.assert_allclose(
            hidden[is_token], np.asarray(wanted)[rows, place][is_token], atol=1e-5, rtol=1e-5
        )
