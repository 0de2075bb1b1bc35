"""Softmax attention: the projections around an attention kernel."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.kernels import ScoreMod, attend
from jaxgpt.model.kernels.dense import apply_weights, compute_logits
from jaxgpt.model.layers import DTYPES, Linear, make_residual_init, zeros
from jaxgpt.model.masks import Coords, SameSegment, make_layer_mask
from jaxgpt.model.mixers.mixer import (
    KV,
    LayerContext,
    Mixer,
    QuantizedKV,
    load_kv,
    store_kv,
    update_kv_cache,
)
from jaxgpt.model.norms import NORMS, apply_rms_norm
from jaxgpt.model.taps import is_patched, is_tapped, tap, tap_input
from jaxgpt.sharding import constrain

# The letters of the scales of the norms of queries and keys, which are normalized over these
# dimensions before the rotation. Without scales, heads are normalized after it, where there is one.
QK_NORMS = {
    "head": ("K", "K"),  # Dehghani et al. 2023, arXiv:2302.05442, section 2
    "width": ("HK", "GK"),  # OLMo 2 (2025), arXiv:2501.00656, section 3.2
    "l2": None,  # Llama 4 (2025), in its code
}


class Attention(Mixer):
    """Multi-head self-attention, which includes the tokens in the cache."""

    HAS_TOKEN_STATE = True
    USES = (
        "rotation",
        "bias",
        "query_scale",
        "pattern",
        "softcap",
        "qk_norm",
        "attention_bias",
        "sinks",
        "attention_dropout",
    )
    HAS_SEQUENCE_SHARDING = True
    HAS_QUANTIZED_CACHE = True

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        shape = (batch, cfg.sizes["G"], slots, cfg.sizes["K"])
        return KV(*(jnp.zeros(shape, DTYPES[cfg.dtype]) for _ in KV._fields))

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: KV | QuantizedKV | None):
        c = self.cfg
        q = Linear(c, "D>HK", site="qkv", name="q")(x)
        k = Linear(c, "D>GK", site="qkv", name="k")(x)
        v = Linear(c, "D>GK", site="qkv", name="v")(x)
        letters = QK_NORMS[c.qk_norm] if c.qk_norm else None
        if letters:
            q = NORMS[c.norm](c, letters[0], name="q_norm")(q)
            k = NORMS[c.norm](c, letters[1], name="k_norm")(k)
        q, k = layer_context.apply_rotation(q), layer_context.apply_rotation(k)
        if c.qk_norm == "l2" and layer_context.rotate is not None:
            q, k = (apply_rms_norm(y, 1.0, c.norm_eps) for y in (q, k))
        q = layer_context.scale_queries(q)
        k_coords = layer_context.k_coords
        if state is not None:
            slots = state.k.shape[2]
            k_coords, is_ring = layer_context.get_key_coords(slots), layer_context.is_ring(slots)
            (k, v), state = update_kv_cache(state, KV(k, v), layer_context.cursor, is_ring)
        mask = make_layer_mask(c, self.pattern, self.direction)
        score = ScoreMod(
            mask,
            layer_context.bias,
            c.attention_scale,
            c.softcap,
            declare_param(self, "sinks", "H", c.sizes, zeros) if c.sinks else None,
            **make_dropout(self),
            is_self=state is None,
        )
        q, k, v = constrain(q, "BTHK"), constrain(k, "BTGK"), constrain(v, "BTGK")
        attend_heads, inputs = prepare_attention(
            self, q, k, v, layer_context.q_coords, k_coords, score
        )
        o = Linear(c, "HK>D", make_residual_init(c), site="attention_output", name="o")
        return o(*inputs, input_fn=attend_heads), state


def make_dropout(module: nn.Module) -> dict[str, Any]:
    """Return the dropout of `ScoreMod`, if the caller passes a "dropout" key."""
    rate = module.cfg.attention_dropout  # type: ignore[attr-defined]
    if not rate or not module.has_rng("dropout"):
        return {}
    return dict(dropout=rate, dropout_key=module.make_rng("dropout"))


class CrossAttention(nn.Module):
    """Attention of x [B T D] to the hidden states of the encoder, `layer_context.memory` [B S D].

    Keys and values of the source are computed once: without a memory they are read from `state`.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: KV | QuantizedKV | None):
        c = self.cfg
        q = Linear(c, "D>HK", site="qkv", name="q")(x)
        if layer_context.memory is not None:
            k = Linear(c, "D>GK", site="qkv", name="k")(layer_context.memory)
            v = Linear(c, "D>GK", site="qkv", name="v")(layer_context.memory)
            state = state and store_kv(state, KV(k, v).transposed())
        else:
            assert state is not None, "without a memory, `state` must hold keys and values"
            k, v = load_kv(state, x.dtype)
        assert layer_context.memory_coords is not None
        score = ScoreMod(SameSegment(), scale=c.attention_scale, **make_dropout(self))
        q, k, v = constrain(q, "BTHK"), constrain(k, "BTGK"), constrain(v, "BTGK")
        attend_heads, inputs = prepare_attention(
            self, q, k, v, layer_context.q_coords, layer_context.memory_coords, score
        )
        o = Linear(c, "HK>D", make_residual_init(c), site="attention_output", name="o")
        return o(*inputs, input_fn=attend_heads), state


def prepare_attention(
    module: nn.Module, q, k, v, q_coords: Coords, k_coords: Coords, score: ScoreMod
) -> tuple[Callable, tuple[jax.Array, ...]]:
    """Return (function, inputs) whose value is the attention output [B T H K], for `Linear`.

    The function runs the kernel. Logits and weights exist only if `capture` requests them; if it
    replaces them, their replacement is applied to the values instead of the kernel's.
    """
    q, k, v = tap(module, "q", q), tap(module, "k", k), tap(module, "v", v)
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]

    def attend_heads(q, k, v):
        return attend(module.cfg.kernel, q, k, v, q_coords, k_coords, score)

    run: Callable = attend_heads
    if is_tapped(module, "logits", "weights"):
        logits = compute_logits(q, k, q_coords, k_coords, score).reshape(B, H, T, S)
        logits = tap(module, "logits", logits)
        weights = tap(module, "weights", score.compute_weights(logits))
        if is_patched(module, "logits", "weights"):
            by_group = weights.reshape(B, G, H // G, T, S)

            def run(q, k, v):
                return apply_weights(by_group, v)

    return tap_input(module, "z", run, q, k, v)
