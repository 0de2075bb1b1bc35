"""An attention kernel that computes one row of the batch after another, in less memory."""

import jax
import jax.numpy as jnp

from jaxgpt.model.kernels import KERNELS


def by_row(q, k, v, q_coords, k_coords, score_mod):
    """Attend: q [B T H K], k and v [B S G K] -> [B T H K]."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    def attend_row(arrays):
        q, k, v, q_coords, k_coords = jax.tree.map(lambda x: x[None], arrays)
        q = score_mod.scale_queries(q)
        logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
        weights = score_mod.compute_weights(score_mod(logits, q_coords, k_coords))
        return jnp.einsum("bhts,bshk->bthk", weights.astype(v.dtype), v)[0]

    return jax.lax.map(attend_row, (q, k, v, q_coords, k_coords))


KERNELS["by_row"] = by_row
