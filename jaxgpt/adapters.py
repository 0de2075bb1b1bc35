"""Adapters as values: what they were trained on, and how several are chosen from.

    runs/x/base.json    {"path": "/models/smollm", "relative": "../smollm", "fingerprint": "9c..."}

A run with adapters saves them alone; base.json has the place of its base, and the fingerprint of
its numbers. It is one of the values in float32, not of a file: a base that is converted to another
format keeps it, and one that was trained further does not.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import xxhash
from flax.traverse_util import flatten_dict

from jaxgpt.config import LoraConfig
from jaxgpt.hosts import fetch
from jaxgpt.lora import combine, to_nodes
from jaxgpt.settings import ConfigError, choose
from jaxgpt.sharding import use_mesh_of

BASE_FILE = "base.json"


class Base(NamedTuple):
    """The model that adapters were trained on.

    Attributes:
        paths: where it may be, the likeliest first; none for the initial parameters of the seed.
        fingerprint: see `compute_fingerprint`; "" if it is not known.
    """

    paths: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def path(self) -> str:
        """The likeliest path, or ""."""
        return next(iter(self.paths), "")


NO_BASE = Base()


@dataclass(frozen=True, eq=False)
class Adapter:
    """Adapters of one model, and what is trained in full beside them.

    Attributes:
        trained: nested dicts with {"lora": {"a": ..., "b": ...}} on the paths of the maps.
        config: their settings, of which the scale follows.
        base: what they were trained on.
        origin: where they were read from.
    """

    trained: Any
    config: LoraConfig
    base: Base = NO_BASE
    origin: str = ""

    @property
    def nodes(self) -> Any:
        """The tree that `model.lowrank.attach` takes."""
        return to_nodes(self.trained, self.config.scale)


def parse_choice(choice: str, adapters: Mapping[str, Adapter]) -> list[tuple[float, str]]:
    """Return the weights and names of a choice of adapters.

    Raises:
        ConfigError: there is no such adapter.

    >>> parse_choice("0.5 * a + b", {"a": None, "b": None}), parse_choice("", {})
    ([(0.5, 'a'), (1.0, 'b')], [])
    """
    parts = []
    for text in choice.split("+") if choice.strip() else []:
        found = re.fullmatch(r"\s*(?:([-+.\deE]+)\s*\*)?\s*(.*?)\s*", text)
        weight, name = found.groups() if found else (None, text)
        choose(dict(adapters), name, "adapter")
        try:
            parts.append((1.0 if weight is None else float(weight), name))
        except ValueError:
            raise ConfigError(f"adapter={choice!r}: {weight!r} is no weight.") from None
    return parts


def make_nodes(choice: str, adapters: Mapping[str, Adapter]) -> Any:
    """Return the nodes of a choice such as "a" or "0.5 * a + b"; {} for "", the base alone."""
    parts = parse_choice(choice, adapters)
    return combine([(weight, adapters[name].nodes) for weight, name in parts]) if parts else {}


# --- the base --------------------------------------------------------------------------------


def compute_fingerprint(params: Any) -> str:
    """Return a fingerprint of the values of parameters, the same in any layout over devices.

    Args:
        params: nested dicts of arrays; those of bfloat16 count as the same values in float32.
    """
    flat = flatten_dict(params, sep=".")
    with use_mesh_of(params):
        sums = fetch(_sum_bits(flat))
    table = {path: [list(x.shape), *map(int, sums[path])] for path, x in sorted(flat.items())}
    return xxhash.xxh3_64_hexdigest(json.dumps(table).encode())


@jax.jit
def _sum_bits(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return two sums modulo 2³² of the bits of each array, each weighted by its position."""

    def add_up(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        sums = []
        for factor in (0x9E3779B1, 0x85EBCA77):
            weight = index * jnp.uint32(factor) | jnp.uint32(1)
            mixed = (bits ^ (bits >> 15)) * weight
            sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
        return jnp.stack(sums)

    return {path: add_up(x) for path, x in flat.items()}


def check_base(base: Base, params: Any, path: str, where: str):
    """Check that parameters are those that adapters were trained on.

    Args:
        path: of the model that they are of.
        where: the path of the adapters.

    Raises:
        ConfigError: they are of another model.
    """
    found = compute_fingerprint(params)
    if base.fingerprint and found != base.fingerprint:
        raise ConfigError(
            f"{path or 'the initial model'} is not the base of {where}: its fingerprint is {found},"
            f" and the adapters were trained on {base.fingerprint}. Name their base in "
            f"{os.path.join(where, BASE_FILE)}."
        )


def format_base(base: Base, run_folder: str) -> str:
    """Return the text of base.json for a run folder."""
    path = base.path
    values = {"path": path, "fingerprint": base.fingerprint}
    if path and os.path.exists(path):
        values["path"] = os.path.abspath(path)
        values["relative"] = os.path.relpath(path, run_folder)
    return json.dumps(values, indent=2) + "\n"


def read_base(run_folder: str, others: Sequence[str] = ()) -> Base:
    """Read base.json of a run folder.

    Args:
        others: paths where the base may be too, such as `train.start`.

    Raises:
        ConfigError: it cannot be read.
    """
    path = os.path.join(run_folder, BASE_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        found = [str(values["path"]), str(values.get("relative", ""))]
        fingerprint = str(values["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path} cannot be read ({reason}): it names the base of the adapters, by path and "
            "fingerprint."
        ) from error
    if found[1]:
        found[1] = os.path.join(run_folder, found[1])
    return Base(tuple(dict.fromkeys(filter(None, [*found, *others]))), fingerprint)


def choose_path(base: Base, where: str) -> str:
    """Return the first path of a base that exists, or a name of a hub.

    Raises:
        ConfigError: there is none.
    """
    for path in base.paths:
        if os.path.exists(os.path.expanduser(path)):
            return path
    named = [path for path in base.paths if not os.path.isabs(path) and path.count("/") == 1]
    if named:
        return named[-1]
    raise ConfigError(
        f"the base of {where} is at none of {', '.join(base.paths)}: put it back, or name its new "
        f"path in {os.path.join(where, BASE_FILE)}. Its fingerprint is {base.fingerprint}."
    )
