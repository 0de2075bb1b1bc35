"""Random keys of seeds."""

import jax

LOW_BITS = 2**32 - 1


def make_key(seed: int | jax.Array) -> jax.Array:
    """Return the random key of a seed, a whole number from 0 on, of which every bit counts.

    `jax.random.key` drops all but 32 bits of it, unless JAX computes in 64 bits. A traced seed has
    no more than these.
    """
    if isinstance(seed, jax.Array):
        return jax.random.key(seed)
    key, high = jax.random.key(seed & LOW_BITS), seed >> 32
    return jax.random.fold_in(key, high) if high else key
