"""Quantization for inference: a model in a quarter or an eighth of its memory.

    model.quantize("int8")                 a scale for each output channel
    model.quantize("int4", group=64)       a scale for each 64 inputs of an output channel
    jaxgpt.load("runs/stdlib", quantize="int4")

Kernels are quantized: the weights of every linear map, and of every expert. Tables of embeddings
are by request, and then of 8 bits, a scale for each row: as a head they decide about the last
digits of every logit. Norms, biases, routers, position encodings and what recurrent mixers learn
besides their linear maps stay as they are: they are small, and sensitive.

Weights are rounded to the nearest step, without data: see `quantized_array` for the numbers.
"""

from functools import partial
from typing import Any

import jax

from jaxgpt.config import ModelConfig
from jaxgpt.dims import Letters
from jaxgpt.model import abstract_params
from jaxgpt.quantized_array import QuantizedArray, is_quantized, label_dims, quantize_array
from jaxgpt.selection import select
from jaxgpt.settings import ConfigError, choose
from jaxgpt.sharding import constrain, use_mesh_of

KINDS = {"int8": 8, "int4": 4}  # name -> bits
GROUPS = (32, 64, 128)
DEFAULT_GROUPS = {"int8": 0, "int4": 32}  # 0 = all inputs of an output channel
STACK_LETTERS = "LE"  # dimensions along which kernels are stacked: each has its own scales


def check_kind(kind: str | None, group: int | None = None, key: str = "quantize") -> int:
    """Return the group of a kind of quantization, its own if it is None.

    Raises:
        ConfigError: there is no such kind, or group; or a group without a kind.
    """
    if kind is None:
        raise ConfigError(f"group={group} is of {key}=int8 or int4: give it as well.")
    choose(KINDS, kind, key)
    if group not in (None, 0, *GROUPS):
        raise ConfigError(
            f"a group of {group} inputs: use one of {', '.join(map(str, GROUPS))}, or 0 for one "
            "scale per output channel."
        )
    return DEFAULT_GROUPS[kind] if group is None else group


def quantize_params(
    cfg: ModelConfig, params, kind: str, group: int | None = None, embeddings: bool = False
) -> Any:
    """Return the parameters with quantized kernels, on the devices where they lie.

    Args:
        cfg: of the model.
        params: float32 or bfloat16, of `init_params` or some of them; they are not changed.
        kind: "int8" or "int4".
        group: inputs that share a scale: 32, 64, 128, or 0 for all of an output channel; None is 0
            for int8 and 32 for int4. Where it does not divide the inputs, its largest divisor that
            does is used.
        embeddings: quantize tables of token embeddings too, to int8.

    Raises:
        ConfigError: the kind or the group is not known, or the parameters are quantized already.
    """
    group, bits = check_kind(kind, group), KINDS[kind]
    check_unquantized(params, "quantization")
    letters = select(abstract_params(cfg)[1], params)

    def quantize(path, letters: Letters, x):
        names = [key.key for key in path]
        if is_kernel(names, letters):
            return _quantize(x, letters, bits, group)
        if embeddings and names[-1] == "table" and letters.startswith("V>"):
            return _quantize(x, letters, KINDS["int8"], 0)
        return x

    with use_mesh_of(params):
        return jax.tree.map_with_path(quantize, letters, params)


def is_kernel(names: list[str], letters: Letters) -> bool:
    """Return whether a parameter, by its path and letters, is the kernel of a linear map."""
    return names[-1] == "w" and ">" in letters and "router" not in names


@partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(w: jax.Array, letters: Letters, bits: int, group: int) -> QuantizedArray:
    """Quantize a parameter along its inputs, or the rows of a table "V>D" along D."""
    inputs, outputs = letters.split(">")
    lead = 1 if inputs == "V" else len(inputs) - len(inputs.lstrip(STACK_LETTERS))
    count = len(outputs) if inputs == "V" else len(inputs) - lead
    return constrain_param(quantize_array(w, bits, group, lead, count), letters)


def constrain_param(x, letters: Letters):
    """Constrain the sharding of a parameter, quantized or not, to that of its letters."""
    if is_quantized(x):
        return jax.tree.map(constrain, x, label_dims(x, letters))
    return constrain(x, letters)


def dequantize_params(params, dtype: str = "float32") -> Any:
    """Return plain arrays in place of quantized ones, in a dtype; the others as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def find_kind(params) -> str:
    """Return "int8" or "int4" if parameters are quantized, else ""."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    found = {x.bits for x in leaves if is_quantized(x)}
    return f"int{min(found)}" if found else ""


def check_unquantized(params, what: str):
    """Raise ConfigError if parameters are quantized; `what` needs them whole."""
    if kind := find_kind(params):
        raise ConfigError(
            f"{what} takes parameters of float32 or bfloat16, not of {kind}: load the model "
            "without quantize."
        )


def count_bytes(params) -> int:
    """Return the bytes of parameters in memory, on all devices together."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def count_weights(params) -> int:
    """Return the number of parameters, a quantized weight counted as one."""
    return sum(x.size for x in jax.tree.leaves(params, is_leaf=is_quantized))
