"""What a token mixer is: the part of a block in which tokens hear of each other."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from jax.tree_util import Partial

from jaxgpt.config import ModelConfig
from jaxgpt.model.masks import Coords


class Sight(NamedTuple):
    """What every layer of a stack is told, and no layer changes."""

    q_at: Coords  # of the tokens at hand, [B T]
    k_at: Coords  # of the tokens in the cache, [B S]; without a cache, the same as q_at
    rotate: Partial | None = None  # queries or keys of these tokens, [B T H K] -> [B T H K]
    bias: Partial | None = None  # (q at [B T], k at [B S]) -> float32 [B H T S]
    cursor: Any = None  # int32 [], the next free slot of the cache, the same for every row
    memory: jax.Array | None = None  # what the encoder made of the source, [B S D]
    memory_at: Coords | None = None  # [B S]

    def rotated(self, x: jax.Array) -> jax.Array:
        """x [B T H K], turned where positions do that."""
        return x if self.rotate is None else self.rotate(x)


class Mixer(nn.Module):
    """A token mixer: (x [B T D], sight, state) -> (y [B T D], state).

    A new document begins where `sight.q_at.position` is 0, and is not to hear of the one before it.
    Where `sight.q_at.document` is 0 there is no token: nobody hears of it, and what comes out
    there does not matter.

    `state` is what the mixer remembers of the tokens before those at hand, for decoding. It is
    None in training, where a row begins with nothing before it; else it comes from `state`, and
    goes on to the next call. A call with a state may be given any number of tokens.
    """

    # What it does of what can be asked for: "rotation" and "bias" (of positions), "pattern" (of
    # masks), "softcap", "qk_norm".
    USES: ClassVar[tuple[str, ...]] = ()
    DIRECTIONS: ClassVar[tuple[str, ...]] = ("causal", "both")
    HAS_HEADS: ClassVar[bool] = True
    # Whether the tokens of a row may lie on several devices; else each gets the whole row.
    DIVIDES_ROWS: ClassVar[bool] = False

    cfg: ModelConfig
    pattern: str = "full"
    direction: str = "causal"

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> Any:
        """The empty state of one layer for `batch` rows of up to `slots` tokens."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, sight: Sight, state: Any) -> tuple[jax.Array, Any]:
        raise NotImplementedError


class KV(NamedTuple):
    """Keys and values of one layer, [B S G K]; as a state [B G S K].

    One token is multiplied by a state as it lies. For 8 rows of 192 slots, 6 heads of width 64, a
    CPU takes 90 us for its attention, and 1,430 us if it must turn [B S G K] first.
    """

    k: jax.Array
    v: jax.Array

    def turned(self) -> "KV":
        """Heads before tokens, or tokens before heads again."""
        return KV(self.k.swapaxes(1, 2), self.v.swapaxes(1, 2))


def write(old, new, cursor: jax.Array, axis: int = 1):
    """Writes new entries [B T ...] into old ones [B S ...] from slot `cursor` on, leaf by leaf."""

    def put(o, n):
        return jax.lax.dynamic_update_slice_in_dim(o, n.astype(o.dtype), cursor, axis)

    return jax.tree.map(put, old, new)


def recall(state: KV, new: KV, cursor: jax.Array) -> tuple[KV, KV]:
    """Keys and values of all slots [B S G K], after new ones [B T G K] are written, and the state.

    A state is [B G S K].
    """
    state = write(state, new.turned(), cursor, axis=2)
    return state.turned(), state
