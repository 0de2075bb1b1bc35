"""Read and replace the inner activations of a model: `capture`."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.model.masks import Coords
from jaxgpt.model.taps import CAPTURED, LAYER_INDEX, Group, Patch, Request, serve
from jaxgpt.model.transformer import EncoderInput, abstract_params, build


def capture(
    cfg: ModelConfig,
    params,
    tokens: jax.Array,
    coords: Coords,
    names: Sequence[str] = ("*",),
    *,
    patches: Mapping[str, Patch] | None = None,
    **inputs: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Apply a model and return activations inside it, after replacing some of them.

        hidden, found = capture(cfg, params, tokens, coords, ["layers.*.mixer.weights"])
        found["layers.3.mixer.weights"]  # [B H T S]

        ablate = {"layers.3.mixer.z": lambda z: z.at[:, :, 5].set(0)}  # without head 5 of layer 3
        hidden, _ = capture(cfg, params, tokens, coords, [], patches=ablate)

    What is not requested is not computed. The names of a model are listed by `list_activations`:

        embedding, final_norm       [B T D], the first and last values of the residual stream
        layers.N.residual_pre       [B T D], the residual stream before layer N
        layers.N.residual_mid       [B T D], between the mixer (or cross-attention) and feed-forward
        layers.N.residual_cross     [B T D], between the mixer and the cross-attention
        layers.N.residual_post      [B T D], after layer N
        layers.N.mixer.in, out      [B T D], of the mixer, after its norm and before the sum
        layers.N.mixer.q, k, v      [B T H K], [B S G K]: after QK-norm and rotation
        layers.N.mixer.logits       float32 [B H T S], masked, with bias and soft cap
        layers.N.mixer.weights      float32 [B H T S], their softmax: computed by the reference
                                    implementation, whichever kernel the model uses
        layers.N.mixer.z            [B T H K], the output of each head, before its projection
        layers.N.cross.*            as mixer.*, of cross-attention to the encoder
        layers.N.ffn.in, out        [B T D]
        layers.N.ffn.gate, up       [B T F], before the activation
        layers.N.ffn.hidden         [B T F], the input of the last projection
        layers.N.ffn.router         float32 [B T E], router logits of a mixture of experts

    The encoder of an encoder_decoder has these names after "encoder.". Other mixers have q, k, v
    and z as far as they exist, and the inner values that their modules name by `tap`: the states of
    recurrent ones are [B T ...], after each token, and can be captured but not replaced; an LSTM's
    or GRU's `h` that is replaced changes the output, not the recurrence.

    Args:
        params: as from `init_params`, with layers stacked.
        tokens: int32 [B T]. coords: [B T].
        names: patterns as in a shell ("layers.*.mixer.q"); all activations by default.
        patches: a function for each pattern, from the activation to its replacement of the same
            shape. Logits and weights that are replaced are used in place of the kernel's. A patch
            that is defined once, not at each call, is compiled once.
        **inputs: what the family takes: `source` of an encoder_decoder, `types` of an encoder.

    Returns:
        (hidden [B T D], {name: array}), in the order of `list_activations`.

    Raises:
        ValueError: a pattern matches no activation of this model.

    Source: the names follow TransformerLens (Nanda and Bloom 2022), hook_resid_pre and others.
    """
    fixed = (cfg, tuple(names), tuple((patches or {}).items()))
    hidden, found = _capture(fixed, params, tokens, coords, inputs)
    return hidden, {name: found[name] for name in sorted(found, key=order_by_layer)}


@partial(jax.jit, static_argnums=0)
def _capture(fixed, params, tokens, coords, inputs):
    cfg, names, patches = fixed
    request = Request(names, patches, find_groups(params))
    variables = {"params": params, LAYER_INDEX: _make_layer_index(request.groups)}
    with serve(request):
        (hidden, _), stored = build(cfg).apply(
            variables, tokens, coords, mutable=[CAPTURED], **inputs
        )
    known = sorted({*request.seen}, key=order_by_layer)
    for pattern in (*names, *(pattern for pattern, _ in patches)):
        if not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, known, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"no activation of this model is named {pattern!r}.{hint} "
                f"There are: {', '.join(known)}."
            )
    return hidden, _name_activations(request, stored.get(CAPTURED, {}))


def list_activations(cfg: ModelConfig) -> list[str]:
    """Return the names of all activations of a model, by layer. Nothing is computed."""
    params, _ = abstract_params(cfg)
    tokens: Any = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    coords = Coords(tokens, tokens, tokens if "prefix" in cfg.pattern else None)
    is_paired = cfg.family == "encoder_decoder"
    inputs = {"source": EncoderInput(tokens, coords)} if is_paired else {}
    run = partial(_capture, (cfg, ("*",), ()))
    _, found = jax.eval_shape(run, params, tokens, coords, inputs)
    return sorted(found, key=order_by_layer)


def find_groups(params) -> dict[tuple[str, str], Group]:
    """Return the layer groups of every stack of a model, by their path in its parameters.

    A stack has a group "layers" of repeated cycles, and may have one of a rest, its tail.
    """
    groups = {}
    for stack in ("encoder", "stack"):
        first = 0
        found = {k: v for k, v in params.get(stack, {}).items() if "block_0" in v}
        for name in sorted(found, key="layers".__ne__):  # "layers" first
            size, repeats = len(found[name]), len(jax.tree.leaves(found[name])[0])
            groups[stack, name] = Group(first, size, repeats)
            first += size * repeats
    return groups


def _make_layer_index(groups: Mapping[tuple[str, str], Group]) -> dict:
    index: dict = {}
    for (stack, name), group in groups.items():
        index.setdefault(stack, {})[name] = {"index": jnp.arange(group.repeats)}
    return index


def _name_activations(request: Request, stored) -> dict[str, jax.Array]:
    """Split stored activations by layer and return those that were requested, by full name."""
    found = {}
    for keys, x in jax.tree.leaves_with_path(stored):
        *path, name = (key.key for key in keys)
        layers = x if tuple(path[:2]) in request.groups else [x]
        for full, layer in zip(request.expand(tuple(path), name), layers, strict=True):
            if request.wants(full):
                found[full] = layer
    return found


def order_by_layer(name: str) -> list:
    """Order the encoder before the decoder, and layers by number."""
    is_encoder = name.startswith("encoder.")
    parts = name.removeprefix("encoder.").split(".")
    rank = {"embedding": 0, "layers": 1}.get(parts[0], 2)
    return [not is_encoder, rank, int(parts[1]) if rank == 1 else 0, name]
