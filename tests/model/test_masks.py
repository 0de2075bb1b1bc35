"""Masks against Python loops over every pair of tokens."""

import jax
import numpy as np
import pytest

from jaxgpt.model.masks import Coords, all_of, any_of, causal, same_document

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
    at = [list(zip(*(x[b].tolist() for x in end), strict=True)) for b in range(B) for end in (q, k)]
    return [[[rule(i, j) for j in at[2 * b + 1]] for i in at[2 * b]] for b in range(B)]


def test_causal_tokens_see_themselves_and_what_came_before(ends):
    wanted = by_pairs(lambda q, k: k[0] <= q[0], *ends)
    np.testing.assert_array_equal(causal(*ends), wanted)


def test_tokens_see_only_their_own_document_and_nobody_sees_an_empty_slot(ends):
    wanted = by_pairs(lambda q, k: k[1] == q[1] and k[1] != 0, *ends)
    np.testing.assert_array_equal(same_document(*ends), wanted)


def test_all_of_is_where_every_mask_agrees(ends):
    wanted = by_pairs(lambda q, k: k[0] <= q[0] and k[1] == q[1] != 0, *ends)
    np.testing.assert_array_equal(all_of(causal, same_document)(*ends), wanted)


def test_any_of_is_where_one_mask_agrees(ends):
    wanted = by_pairs(lambda q, k: k[0] <= q[0] or k[1] == q[1] != 0, *ends)
    np.testing.assert_array_equal(any_of(causal, same_document)(*ends), wanted)


def test_a_mask_of_a_block_of_keys_is_that_block_of_the_mask(ends):
    q, k = ends
    both = all_of(causal, same_document)
    block = jax.tree.map(lambda x: x[:, 2:5], k)
    np.testing.assert_array_equal(both(q, block), both(q, k)[:, :, 2:5])


def test_coordinates_of_another_shape_than_the_tokens_are_refused(ends):
    with pytest.raises(AssertionError):
        ends[0].check(np.zeros((B, T + 1), np.int32))
