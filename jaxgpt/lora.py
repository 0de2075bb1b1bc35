"""LoRA: which maps of a model have an adapter, and the tree of what is trained.

The adapters are a tree of their own, on the paths of what they adapt, with the letters of it:

    {"stack": {"layers": {"block_0": {"mixer": {"q": {"lora": {"a": LD>R, "b": LR>HK}}}}}}}

so that optimizer state, shardings and checkpoints are made for it as for parameters. Parameters
that are trained in full beside the adapters (`optimizer.train`) stand in the same tree. `to_nodes`
gives what `model.lowrank.attach` puts into the frozen base.
"""

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.config import Config, LoraConfig, ModelConfig
from jaxgpt.dims import Letters
from jaxgpt.model import abstract_params
from jaxgpt.model.layers import DTYPES
from jaxgpt.model.lowrank import KEY, LowRank, attach, detach
from jaxgpt.quantization import KINDS, dequantize_params, quantize_params
from jaxgpt.selection import select, select_letters
from jaxgpt.settings import ConfigError, find_nearest

Tree = Any  # nested dicts

BASE_FORMATS = {
    "float32": "4 bytes a number",
    "bfloat16": "2 bytes a number, rounded once",
    "int8": "1 byte a weight, with a scale for each output; see quantization.py",
    "int4": "half a byte a weight, with a scale for each 32 inputs",
}
TABLES = ("embed", "head")  # adapted as maps from V to D, and from D to V
_NO_LINEAR = ("router", "mixer", "cross")  # have a matrix "w" that is not of a `Linear`


class Map(NamedTuple):
    """A linear map or table that can have an adapter.

    Attributes:
        path: of its module: "stack.layers.block_0.mixer.q".
        stacked: the letters of its stacked dimensions: "", "L" or "LE".
        inputs, outputs: letters, as it maps.
        shape: of each of these letters, in this order.
    """

    path: str
    stacked: Letters
    inputs: Letters
    outputs: Letters
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """What a target names it by."""
        return self.path.rpartition(".")[2]

    @property
    def fan_in(self) -> int:
        """The number of its inputs; one for an embedding, whose input is one of V."""
        first = len(self.stacked)
        sizes = self.shape[first : first + len(self.inputs)]
        return 1 if self.path == "embed" else math.prod(sizes)

    def describe(self, rank: int) -> dict[str, tuple[tuple[int, ...], Letters]]:
        """Return the shapes and letters of the two factors."""
        stacked, inputs = len(self.stacked), len(self.stacked) + len(self.inputs)
        return {
            "a": ((*self.shape[:inputs], rank), f"{self.stacked}{self.inputs}>R"),
            "b": (
                (*self.shape[:stacked], rank, *self.shape[inputs:]),
                f"{self.stacked}R>{self.outputs}",
            ),
        }


def list_maps(cfg: ModelConfig) -> list[Map]:
    """Return all maps of a model that can have an adapter; a tied head is one of them."""
    shapes, letters = (flatten_dict(x, sep=".") for x in abstract_params(cfg))
    found = []
    for path, dims in letters.items():
        module, _, leaf = path.rpartition(".")
        inputs, _, outputs = dims.partition(">")
        stacked = inputs[: len(inputs) - len(inputs.lstrip("LE"))]
        name = module.rpartition(".")[2]
        if leaf == "w" and name not in _NO_LINEAR:
            inner = inputs.removeprefix(stacked)
            found.append(Map(module, stacked, inner, outputs, shapes[path].shape))
        elif module == "embed":
            V, D = shapes[path].shape
            found += [Map("embed", "", "V", "D", (V, D)), Map("head", "", "D", "V", (D, V))]
    return found


def select_maps(cfg: ModelConfig, targets: Sequence[str]) -> list[Map]:
    """Return the maps that `lora.targets` names: by name, or by path with wildcards.

    Raises:
        ConfigError: a target matches nothing; the message has the nearest names.
    """
    maps = list_maps(cfg)
    if not targets:
        return [x for x in maps if x.stacked]
    chosen: set[str] = set()
    for target in targets:
        matched = {x.path for x in maps if x.name == target or fnmatch.fnmatch(x.path, target)}
        if not matched:
            names = list(dict.fromkeys(x.name for x in maps))
            near = find_nearest(target, [*names, *(x.path for x in maps)], 3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(
                f"lora.targets={target!r} matches no map of this model.{hint} There are: "
                f"{', '.join(names)}; or paths, such as {maps[-1].path}."
            )
        chosen |= matched
    return [x for x in maps if x.path in chosen]


def check_lora(cfg: Config):
    """Check the targets of a config against its model.

    Raises:
        ConfigError: a target matches nothing, adapters of experts would have dropout, or there
            are none and another setting is of them.
    """
    if not cfg.lora.rank:
        defaults = LoraConfig()
        for name, value in dataclasses.asdict(cfg.lora).items():
            if value != getattr(defaults, name):
                raise ConfigError(
                    f"lora.{name}={value!r} with lora.rank=0, which trains no adapters: set "
                    "lora.rank, such as 8, or leave it out."
                )
        return
    experts = [x for x in select_maps(cfg.model, cfg.lora.targets) if "E" in x.stacked]
    if experts and cfg.lora.dropout:
        raise ConfigError(
            f"lora.dropout={cfg.lora.dropout:g} with adapters of experts ({experts[0].path}), "
            "which have none: use lora.dropout=0, or lora.targets without them, such as q,k,v,o."
        )


# --- trees -----------------------------------------------------------------------------------


def describe_adapters(cfg: ModelConfig, lora: LoraConfig) -> tuple[Tree, Tree]:
    """Return the shapes and the letters of adapters."""
    shapes, letters = {}, {}
    for x in select_maps(cfg, lora.targets):
        for name, (shape, dims) in x.describe(lora.rank).items():
            path = f"{x.path}.{KEY}.{name}"
            shapes[path], letters[path] = jax.ShapeDtypeStruct(shape, jnp.float32), dims
    return unflatten_dict(shapes, sep="."), unflatten_dict(letters, sep=".")


def init_adapters(cfg: ModelConfig, lora: LoraConfig, key: jax.Array) -> Tree:
    """Initialize adapters: a is uniform in ±1/√inputs, and b is 0, so that nothing changes yet.

    Source: Hu et al. 2021, section 4.1; the bounds are those of peft.
    """
    out = {}
    for x in select_maps(cfg, lora.targets):
        found = x.describe(lora.rank)
        own = jax.random.fold_in(key, zlib.crc32(x.path.encode()))
        limit = x.fan_in**-0.5
        a = jax.random.uniform(own, found["a"][0], jnp.float32, -limit, limit)
        out[f"{x.path}.{KEY}"] = {"a": a, "b": jnp.zeros(found["b"][0], jnp.float32)}
    return unflatten_dict(out, sep=".")


def describe_trained(cfg: Config) -> tuple[Tree, Tree]:
    """Return the shapes and the letters of the parameters in the state of a run.

    Those are all of the model or, with adapters, these and what `optimizer.train` names.
    """
    shapes, letters = abstract_params(cfg.model)
    if not cfg.lora.rank:
        return shapes, letters
    adapters = describe_adapters(cfg.model, cfg.lora)
    return (
        attach(select_full(cfg, shapes), adapters[0]),
        attach(select_full(cfg, letters), adapters[1]),
    )


def select_full(cfg: Config, tree: Tree) -> Tree:
    """Return the leaves of `tree`, like the parameters, that are trained beside the adapters."""
    _, letters = abstract_params(cfg.model)
    return select(tree, select_letters(letters, cfg.optimizer.train)) if cfg.optimizer.train else {}


def describe_frozen(cfg: Config) -> tuple[Tree, Tree]:
    """Return the shapes and the letters of the frozen base of a run with adapters."""
    shapes, letters = abstract_params(cfg.model)
    return select_frozen(cfg, shapes), select_frozen(cfg, letters)


def select_frozen(cfg: Config, tree: Tree) -> Tree:
    """Return the leaves of `tree`, like the parameters, that are frozen."""
    trained = flatten_dict(select_full(cfg, abstract_params(cfg.model)[1]), sep=".")
    flat = flatten_dict(tree, sep=".")
    return unflatten_dict({path: x for path, x in flat.items() if path not in trained}, sep=".")


def to_nodes(trained: Tree, scale: float, dropout: float = 0.0) -> Tree:
    """Return the tree for `attach`: each pair of factors as a `LowRank`, with its scale in b."""
    if not isinstance(trained, Mapping):
        return trained
    return {
        key: LowRank(value["a"], value["b"] * scale, dropout=dropout)
        if key == KEY
        else to_nodes(value, scale, dropout)
        for key, value in trained.items()
    }


def walk_nodes(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, LowRank]]:
    """Yield the path of the module and the node of every adapter."""
    for key, value in tree.items():
        if isinstance(value, LowRank):
            yield ".".join(path), value
        elif isinstance(value, Mapping):
            yield from walk_nodes(value, (*path, key))


def has_adapters(params: Tree) -> bool:
    """Return whether any adapter is attached to parameters."""
    return next(walk_nodes(params), None) is not None


def store_base(cfg: Config, params: Tree) -> Tree:
    """Return a frozen base, given in float32, in the format of `lora.base`."""
    if cfg.lora.base in KINDS:
        return quantize_params(cfg.model, params, cfg.lora.base)
    return jax.tree.map(lambda x: x.astype(DTYPES[cfg.lora.base]), params)


# --- merging ---------------------------------------------------------------------------------


class Merged(NamedTuple):
    """Parameters whose adapters are merged into the weights.

    Attributes:
        config: of the model; a tied head is untied if only one of both was adapted.
        params: without adapters.
        rounding: the largest change by the cast of a merged weight to its dtype.
        change: the largest change of a weight by its adapter.
        maps: the number of adapters.
    """

    config: ModelConfig
    params: Tree
    rounding: float
    change: float
    maps: int


def merge_params(cfg: ModelConfig, params: Tree, dtype: str | None = None) -> Merged:
    """Merge adapters into the weights: in float32, then cast to the dtype of the weight.

    Args:
        params: with adapters attached, of one model (not one a row).
        dtype: of the result; None = as the parameters are.
    """
    nodes = dict(walk_nodes(params))
    out = flatten_dict(dequantize_params(detach(params)), sep=".")
    if cfg.tie and any(name in nodes for name in TABLES):
        out["head.table"] = out["embed.table"]
        cfg = dataclasses.replace(cfg, tie=False)
    sizes = []
    for path, node in nodes.items():
        name = f"{path}.table" if path in TABLES else f"{path}.w"
        out[name], *found = _merge_weight(
            out[name], node.a, node.b, is_transposed=path == "head", dtype=dtype
        )
        sizes.append(found)
    rounding, change = (max((float(x[i]) for x in sizes), default=0.0) for i in range(2))
    if dtype is not None:
        out = {path: x.astype(DTYPES[dtype]) for path, x in out.items()}
    return Merged(cfg, unflatten_dict(out, sep="."), rounding, change, len(nodes))


def _compute_merged(w, a, b, is_transposed: bool, dtype: str | None):
    stacked = a.ndim + b.ndim - 2 - w.ndim
    lead, rank = a.shape[:stacked], a.shape[-1]
    a = a.astype(jnp.float32).reshape(*lead, -1, rank)
    b = b.astype(jnp.float32).reshape(*lead, rank, -1)
    change = jnp.matmul(a, b, precision="highest")
    change = change.swapaxes(-1, -2) if is_transposed else change
    exact = w.astype(jnp.float32) + change.reshape(w.shape)
    merged = exact.astype(DTYPES[dtype] if dtype else w.dtype)
    return merged, jnp.max(jnp.abs(merged - exact)), jnp.max(jnp.abs(change))


_merge_weight = jax.jit(_compute_merged, static_argnames=("is_transposed", "dtype"))


# --- several adapters ------------------------------------------------------------------------


def combine(parts: Sequence[tuple[float, Tree]]) -> Tree:
    """Return one tree of nodes for the weighted sum of several adapters, exactly.

    Σ wᵢ Aᵢ Bᵢ is the product of the factors side by side, of the sum of the ranks.

    Args:
        parts: (weight, tree of nodes) each.

    Raises:
        ConfigError: one has parameters that are trained in full, which cannot be added.
    """
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    for _, tree in parts:
        refuse_full(tree, "added to others, or weighted")
    found: dict[str, list[LowRank]] = {}
    for weight, tree in parts:
        for path, node in walk_nodes(tree):
            found.setdefault(path, []).append(node.replace(b=node.b * weight))
    stacks = {path: _count_stacked(path) for path in found}
    return _nest({
        path: LowRank(
            jnp.concatenate([x.a for x in nodes], axis=-1),
            jnp.concatenate([x.b for x in nodes], axis=stacks[path]),
        )
        for path, nodes in found.items()
    })  # fmt: skip


def stack_rows(trees: Sequence[Tree], rows: jax.Array) -> Tree:
    """Return one tree of nodes for a batch with an adapter of its own in each row.

    Every row gathers its factors, so that one batch costs one pass over the base.

    Args:
        trees: of nodes; {} for the base alone.
        rows: int32 [B], the number of the tree of each row.

    Raises:
        ConfigError: an adapter has parameters trained in full, or adapts experts.
    """
    for tree in trees:
        refuse_full(tree, "used in a batch with others")
    found = [dict(walk_nodes(tree)) for tree in trees]
    first = {path: node for nodes in reversed(found) for path, node in nodes.items()}
    out = {}
    for path, like in first.items():
        if ".experts." in f"{path}.":
            raise ConfigError(
                f"adapters of experts ({path}) cannot be chosen by row: tokens of all rows share "
                "an expert. Generate with each adapter in a call of its own."
            )
        nodes = [nodes.get(path) for nodes in found]
        rank = max(node.a.shape[-1] for node in nodes if node is not None)
        stacked = _count_stacked(path)
        padded = [_pad(node, like, rank, stacked) for node in nodes]
        a, b = (jnp.stack(factors, axis=stacked) for factors in zip(*padded, strict=True))
        number = jnp.broadcast_to(rows, (*like.a.shape[:stacked], len(rows)))
        out[path] = LowRank(a, b, number)
    return _nest(out)


def _pad(node: LowRank | None, like: LowRank, rank: int, stacked: int) -> tuple[Any, Any]:
    """Return the factors of a node, or of none, padded to a rank by zeros."""
    if node is None:
        node = LowRank(jnp.zeros_like(like.a), jnp.zeros_like(like.b))
    missing = rank - node.a.shape[-1]
    widths = [(0, 0)] * node.b.ndim
    widths[stacked] = (0, missing)
    a_widths = [*[(0, 0)] * (node.a.ndim - 1), (0, missing)]
    return jnp.pad(node.a, a_widths), jnp.pad(node.b, widths)


def _count_stacked(path: str) -> int:
    """Return the number of stacked dimensions of an adapter, by its path."""
    keys = path.split(".")
    return ("layers" in keys or "tail" in keys) + ("experts" in keys)


def _nest(nodes: Mapping[str, LowRank]) -> Tree:
    return unflatten_dict({f"{path}.{KEY}": node for path, node in nodes.items()}, sep=".")


def list_full(tree: Tree) -> list[str]:
    """Return the paths of the parameters in a tree that are trained in full."""
    return [path for path, x in flatten_dict(tree, sep=".").items()
            if not isinstance(x, LowRank) and f".{KEY}." not in path]  # fmt: skip


def refuse_full(tree: Tree, use: str):
    """Raise ConfigError if a tree has parameters that are trained in full."""
    if full := list_full(tree):
        raise ConfigError(
            f"an adapter with parameters trained in full ({', '.join(full[:3])}) cannot be {use}: "
            "use it alone."
        )
