"""Masks against Python loops over every pair of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, single_document_coords, tiny

from jaxgpt.architecture import PATTERN_OF_SIZE, SparseConfig
from jaxgpt.config import ModelConfig
from jaxgpt.model import init_cache
from jaxgpt.model.masks import (
    PATTERNS,
    BlockSparse,
    Causal,
    Coords,
    InPrefix,
    OneSegment,
    SameSegment,
    Strided,
    Window,
    make_layer_mask,
)

B, T, S = 3, 7, 9


@pytest.fixture
def q_and_k():
    """Random coordinates of queries and of keys, with padding (segment id 0) among both."""
    rng = np.random.default_rng(0)
    q = Coords(rng.integers(0, 6, (B, T)), rng.integers(0, 3, (B, T)))
    k = Coords(rng.integers(0, 6, (B, S)), rng.integers(0, 3, (B, S)))
    return q, k


def evaluate_by_pairs(is_visible, q: Coords, k: Coords):
    """Evaluate is_visible((position, segment id) of q, of k) for one pair after the other."""
    coords = [
        list(zip(*(x[b].tolist() for x in end[:2]), strict=True))
        for b in range(B)
        for end in (q, k)
    ]
    return [
        [[is_visible(i, j) for j in coords[2 * b + 1]] for i in coords[2 * b]] for b in range(B)
    ]


def test_causal_attention_is_to_the_token_and_those_before(q_and_k):
    wanted = evaluate_by_pairs(lambda q, k: k[0] <= q[0], *q_and_k)
    np.testing.assert_array_equal(Causal()(*q_and_k), wanted)


def test_attention_is_within_documents_and_never_to_padding(q_and_k):
    wanted = evaluate_by_pairs(lambda q, k: k[1] == q[1] and k[1] != 0, *q_and_k)
    np.testing.assert_array_equal(SameSegment()(*q_and_k), wanted)


def test_attention_in_a_row_of_one_document_is_to_all_but_padding(q_and_k):
    wanted = evaluate_by_pairs(lambda q, k: k[1] != 0, *q_and_k)
    np.testing.assert_array_equal(np.broadcast_to(OneSegment()(*q_and_k), (B, T, S)), wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_window_is_all_tokens_less_than_its_size_away(q_and_k, size):
    wanted = evaluate_by_pairs(lambda q, k: abs(q[0] - k[0]) < size, *q_and_k)
    np.testing.assert_array_equal(Window(size)(*q_and_k), wanted)


def test_a_stride_is_every_third_token_counted_from_the_query(q_and_k):
    wanted = evaluate_by_pairs(lambda q, k: (q[0] - k[0]) in (-6, -3, 0, 3, 6), *q_and_k)
    np.testing.assert_array_equal(Strided(3)(*q_and_k), wanted)


def test_prefix_attention_is_to_the_prefix_of_the_document(q_and_k):
    q, k = q_and_k
    k = k._replace(prefix=jnp.asarray(np.random.default_rng(1).integers(0, 6, (B, S))))
    lengths = [[k.prefix[b].tolist()] * T for b in range(B)]
    places = [[k.positions[b].tolist()] * T for b in range(B)]
    found = np.broadcast_to(InPrefix()(q, k), (B, T, S))
    np.testing.assert_array_equal(found, np.less(places, lengths))


def test_a_prefix_of_unknown_length_is_refused(q_and_k):
    with pytest.raises(ValueError, match=r"prefix lengths in Coords\.prefix"):
        InPrefix()(*q_and_k)


def test_and_is_the_intersection_of_masks(q_and_k):
    wanted = evaluate_by_pairs(lambda q, k: k[0] <= q[0] and k[1] == q[1] != 0, *q_and_k)
    np.testing.assert_array_equal((Causal() & SameSegment())(*q_and_k), wanted)


def test_or_is_the_union_of_masks(q_and_k):
    wanted = evaluate_by_pairs(lambda q, k: k[0] <= q[0] or k[1] == q[1] != 0, *q_and_k)
    np.testing.assert_array_equal((Causal() | SameSegment())(*q_and_k), wanted)


def test_a_mask_on_a_block_of_keys_is_that_block_of_the_mask(q_and_k):
    q, k = q_and_k
    both = Causal() & SameSegment()
    block = jax.tree.map(lambda x: x[:, 2:5], k)
    np.testing.assert_array_equal(both(q, block), both(q, k)[:, :, 2:5])


def test_coordinates_of_another_shape_than_the_tokens_are_refused(q_and_k):
    with pytest.raises(AssertionError):
        q_and_k[0].check(np.zeros((B, T + 1), np.int32))


# --- blocks ---


def hash_in_python(x: int, salt: int) -> int:
    """Apply the finalizer of MurmurHash3 in Python integers and return the upper 31 bits."""
    x = (x + (salt + 1) * 0x9E3779B9) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return (x ^ x >> 16) >> 1


def find_visible_blocks(mask: BlockSparse, blocks: int) -> np.ndarray:
    """Return [blocks blocks]: whether a block attends to another, the same for all its tokens."""
    coords = single_document_coords(jnp.zeros((1, blocks * mask.size), jnp.int32))
    visible = np.asarray(mask(coords, coords))[0].reshape(blocks, mask.size, blocks, mask.size)
    np.testing.assert_array_equal(visible.all((1, 3)), visible.any((1, 3)))
    return visible.any((1, 3))


@pytest.mark.parametrize("total", [0, 12])
@pytest.mark.parametrize(("near", "anchors", "random"), [(3, 1, 2), (1, 0, 1), (5, 2, 0)])
def test_block_attention_is_to_neighbors_anchors_and_drawn_blocks_only(
    total, near, anchors, random
):
    found = find_visible_blocks(BlockSparse(4, near, anchors, random, total), 12)
    for q_block in range(12):
        drawn = [hash_in_python(q_block, i) % (total or max(q_block, 1)) for i in range(random)]
        wanted = [
            abs(q_block - k_block) <= near // 2
            or min(q_block, k_block) < anchors
            or k_block in drawn
            for k_block in range(12)
        ]
        np.testing.assert_array_equal(found[q_block], wanted)


def test_blocks_drawn_under_a_causal_mask_are_earlier_ones():
    drawn = find_visible_blocks(BlockSparse(2, 1, 0, 3, 0), 40) & ~np.eye(40, dtype=bool)
    assert not np.triu(drawn[1:], 2).any()
    assert np.all(drawn[1:].sum(1) <= 3)
    assert np.all(drawn[1:].sum(1) >= 1)


@pytest.mark.parametrize("draws", [1, 2])
def test_drawn_blocks_are_uniform_over_all_blocks_and_independent(draws):
    # Blocks of one token, of which the first 8 are drawn; the queries are too far to be neighbors.
    n, blocks = 8000, 8
    q, k = (single_document_coords(jnp.zeros((1, size), jnp.int32)) for size in (n, blocks))
    q = q._replace(positions=q.positions + 100)
    drawn = np.asarray(BlockSparse(1, 1, 0, draws, blocks)(q, k))[0]  # [n blocks]
    # A block is among 1 with probability 1/8, among 2 with 1 - (7/8)²: in 1000 and 1875 of 8000
    # queries, with a standard deviation of 30 and 38; 5 of them. The hash is the same everywhere.
    np.testing.assert_allclose(drawn.sum(0), n * (1 - (7 / 8) ** draws), atol=190)


@pytest.mark.parametrize(("context", "blocks"), [(12, 3), (13, 4), (15, 4), (16, 4), (17, 5)])
def test_blocks_of_an_encoder_are_drawn_from_its_whole_context(context, blocks):
    sparse = SparseConfig(block=4, near=3, anchors=1, random=2)
    cfg = tiny(context=context, sparse=sparse, pattern=("blocks",))
    assert PATTERNS["blocks"](cfg, None) == BlockSparse(4, 3, 1, 2, total=blocks)


# --- patterns ---


SIZES = dict(window=3, chunk=5, stride=4, block=2, near=3, anchors=1, random=1)


def make_config(pattern: str) -> ModelConfig:
    """Return a model of this pattern with sizes of its own."""
    sizes = {name: size for name, size in SIZES.items() if PATTERN_OF_SIZE[name] == pattern}
    return tiny(sparse=SparseConfig(**sizes), pattern=(pattern,))


def is_allowed(pattern: str, direction: str, q: int, k: int, prefix: int, context: int) -> bool:
    """Return whether token q of a document attends to token k of it."""
    is_before = k <= q or direction == "both"
    if pattern == "window":
        return is_before and abs(q - k) < 3
    if pattern == "chunked":
        return is_before and q // 5 == k // 5
    if pattern == "strided":
        return is_before and (abs(q - k) < 4 or (q - k) % 4 == 0)
    if pattern == "blocks":
        q_block, k_block = q // 2, k // 2
        draw = hash_in_python(q_block, 0) % (
            max(q_block, 1) if direction == "causal" else context // 2
        )
        return is_before and (
            abs(q_block - k_block) <= 1 or min(q_block, k_block) < 1 or k_block == draw
        )
    if pattern == "prefix":
        return k <= q or k < prefix
    return is_before


def make_packed_coords(*lengths: int) -> Coords:
    """Return a row of documents with prefixes of 3 tokens, and two tokens of padding."""
    position = [i for n in lengths for i in range(n)] + [0, 0]
    segment_ids = [d for d, n in enumerate(lengths, 1) for _ in range(n)] + [0, 0]
    rows = (position, segment_ids, [3] * len(position))
    return Coords(*(jnp.asarray([row], jnp.int32) for row in rows))


PATTERNS_AND_DIRECTIONS = [
    (p, d) for p in PATTERNS for d in ("causal", "both") if (p, d) != ("prefix", "both")
]


@pytest.mark.parametrize(("pattern", "direction"), PATTERNS_AND_DIRECTIONS)
def test_a_layer_mask_is_its_pattern_within_documents(pattern, direction):
    cfg = make_config(pattern)
    coords = make_packed_coords(13, 6)
    found = np.asarray(make_layer_mask(cfg, pattern, direction)(coords, coords))[0]
    position, segment_ids = (np.asarray(x)[0].tolist() for x in coords[:2])
    for t, s in np.ndindex(21, 21):
        wanted = segment_ids[t] == segment_ids[s] != 0 and is_allowed(
            pattern, direction, position[t], position[s], 3, cfg.context
        )
        assert found[t, s] == wanted, (t, s)
    assert (
        0 < found.sum() < np.equal.outer(segment_ids, segment_ids).sum() - 4 or direction == "both"
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_hidden_state_depends_on_all_tokens_reachable_through_its_layers(pattern):
    """Over two layers, the reachable tokens are those visible to the visible ones."""
    cfg = make_config(pattern)
    params, coords = random_params(cfg), make_packed_coords(13, 6)
    tokens = random_tokens(cfg, 0, 1, 21)
    mask = np.asarray(make_layer_mask(cfg, pattern, "causal")(coords, coords))[0].astype(int)
    reachable = (mask @ mask > 0)[:19]
    before = np.asarray(forward(cfg, params, tokens, coords)[0])[0, :19]
    for s in range(21):
        other = tokens.at[0, s].set((tokens[0, s] + 1) % cfg.vocab)
        after = np.asarray(forward(cfg, params, other, coords)[0])[0, :19]
        change = np.abs(after - before).max(-1)
        np.testing.assert_array_equal(change[~reachable[:, s]], 0)
        assert np.all(change[reachable[:, s]] > 1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_gives_the_same_with_a_cache_as_without(pattern):
    cfg = make_config(pattern)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 16)
    coords = single_document_coords(tokens)
    if pattern == "prefix":
        coords = coords._replace(prefix=jnp.full_like(coords.positions, 3))
    wanted, _ = forward(cfg, params, tokens, coords)
    # The prompts of 4 and 6 tokens are left-padded.
    lengths, rows = np.array([4, 6]), np.arange(2)[:, None]
    cache = init_cache(cfg, batch=2, slots=20)
    for step in (np.arange(-6, 0), [0], [1, 2, 3], [4], [5], [6], [7]):
        index = lengths[:, None] + np.array(step)
        is_token, index = index >= 0, np.maximum(index, 0)
        q_block = jax.tree.map(lambda x, i=index: x[rows, i], coords)
        q_block = q_block._replace(segment_ids=jnp.asarray(is_token, jnp.int32))
        hidden, cache = forward(cfg, params, tokens[rows, index], q_block, cache)
        # Two orders of the same float32 sums through two layers.
        np.testing.assert_allclose(
            hidden[is_token], np.asarray(wanted)[rows, index][is_token], atol=1e-5, rtol=1e-5
        )
