"""Named points in the model where `capture` reads and replaces activations.

A module calls `x = tap(self, "name", x)`. Outside of `capture` this returns x and adds nothing to
the program. The full name of an activation is the path of its module, with the number of the layer
in its stack: "layers.3.mixer.q", "encoder.layers.0.residual_pre", "final_norm".

Layers are scanned, so that one `tap` stands for all repeats of a layer cycle: what it stores comes
out stacked along L, and which repeat is running is a traced index.
"""

import contextlib
import contextvars
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

CAPTURED = "captured"  # the collection of stored activations
LAYER_INDEX = "layer_index"  # the collection with the number of the running repeat, "index"

Patch = Callable[[jax.Array], jax.Array]


class Group(NamedTuple):
    """Layers first, first + 1, ... of a stack, applied by one module, scanned over repeats."""

    first: int
    size: int  # layers per repeat
    repeats: int  # the leading axis of its parameters, and of what it stores


@dataclass(frozen=True)
class Request:
    """What to capture and to replace.

    Args:
        names: patterns of full names, as in a shell: "layers.*.mixer.q".
        patches: pairs of a pattern and a function, applied in order.
        groups: of layers, by the first two keys of a module path: ("stack", "layers").
        seen: full names of all activations that were reached; filled while tracing.
    """

    names: tuple[str, ...]
    patches: tuple[tuple[str, Patch], ...]
    groups: Mapping[tuple[str, str], Group]
    seen: list[str] = field(default_factory=list)

    def expand(self, path: tuple[str, ...], name: str) -> list[str]:
        """Return the full names of an activation of the module at `path`, one per repeat."""
        stack, *inner = path
        prefix = [] if stack == "stack" else [stack]
        if not inner:
            return [".".join([*prefix, name])]
        group, block, *module = inner
        first, size, repeats = self.groups[stack, group]
        first += int(block.removeprefix("block_"))
        numbers = range(first, first + repeats * size, size)
        return [".".join([*prefix, "layers", str(n), *module, name]) for n in numbers]

    def wants(self, name: str) -> bool:
        """Return whether an activation is requested, by its full name."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)


_request: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)


@contextlib.contextmanager
def serve(request: Request) -> Iterator[None]:
    """Let `tap` act on a request."""
    before = _request.set(request)
    try:
        yield
    finally:
        _request.reset(before)


def is_capturing() -> bool:
    """Return whether a request is being served."""
    return _request.get() is not None


def _find_request(module: nn.Module) -> Request | None:
    """Return the request if the module can store activations."""
    can_store = module.is_mutable_collection(CAPTURED) and not module.is_initializing()
    return _request.get() if can_store else None


def is_tapped(module: nn.Module, *names: str) -> bool:
    """Return whether any of these activations of the module is captured or replaced."""
    request = _find_request(module)
    if request is None:
        return False
    found = [full for name in names for full in request.expand(module.path, name)]
    request.seen.extend(found)
    return any(map(request.wants, found)) or is_patched(module, *names)


def is_patched(module: nn.Module, *names: str) -> bool:
    """Return whether any of these activations of the module is replaced."""
    request = _find_request(module)
    if request is None:
        return False
    found = [full for name in names for full in request.expand(module.path, name)]
    return any(fnmatch.filter(found, pattern) for pattern, _ in request.patches)


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Return x, or what `capture` replaces it by, and store it if it is requested."""
    request = _find_request(module)
    if request is None:
        return x
    names = request.expand(module.path, name)
    request.seen.extend(names)
    for pattern, patch in request.patches:
        is_hit = [fnmatch.fnmatchcase(full, pattern) for full in names]
        if any(is_hit):
            x = _apply_patch(module, pattern, patch, is_hit, x)
    if any(map(request.wants, names)):
        # Not `module.sow`: an activation may have the name of a submodule.
        scope: Any = module.scope
        scope.put_variable(CAPTURED, name, x)
    return x


def store(module: nn.Module, name: str, x: jax.Array) -> None:
    """Store x if it is requested, an activation that no later computation reads.

    Raises:
        ValueError: it is to be replaced, which would have no effect.
    """
    if is_patched(module, name):
        raise ValueError(f"{name!r} of {'.'.join(module.path)} can be captured, but not replaced.")
    tap(module, name, x)


def _apply_patch(module, pattern: str, patch: Patch, is_hit: list[bool], x: jax.Array) -> jax.Array:
    new = jnp.asarray(patch(x))
    chex.assert_shape(
        new, x.shape, custom_message=f"the patch of {pattern!r} must keep the shape of its input"
    )
    new = new.astype(x.dtype)
    if all(is_hit):
        return new
    return jnp.where(jnp.array(is_hit)[_get_layer_index(module)], new, x)


def _get_layer_index(module: nn.Module) -> jax.Array:
    scope: Any = module.scope
    while not scope.has_variable(LAYER_INDEX, "index"):
        scope = scope.parent
    return scope.get_variable(LAYER_INDEX, "index")


def tap_input(module: nn.Module, name: str, input_fn: Callable, *inputs: jax.Array):
    """Tap input_fn(*inputs), which `Linear` otherwise recomputes in the backward pass.

    Returns:
        (function, inputs) to pass to `Linear`: as given unless the activation is requested.
    """
    if not is_tapped(module, name):
        return input_fn, inputs
    return (lambda x: x), (tap(module, name, input_fn(*inputs)),)
