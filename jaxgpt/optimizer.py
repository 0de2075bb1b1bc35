"""How parameters move: learning-rate schedules and update rules, each one function by name.

A rule turns gradients into a direction; what follows is the same for all of them:

    p <- p - lr(s) * (direction(g) + weight_decay * p)        decay only where p is a matrix

Rules read the letters of a parameter, never its name: ">" makes it a matrix, a leading "L" puts
it inside the stack of blocks, and what is stacked (L, E) is one independent parameter per index.
So a rule does the same to scanned layers as it would do to each of them alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxgpt.config import OptimizerConfig, choose
from jaxgpt.moments import keep

Letters = Any  # a pytree of strings, of the same structure as the parameters


def build(
    cfg: OptimizerConfig, steps: int, letters: Letters
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run: clip by global norm, then the rule at its scheduled rate.

    Args:
        cfg: names the rule and the schedule, and sets their numbers.
        steps: optimizer steps in the whole run; the schedule ends there.
        letters: the letters of every parameter, such as {"table": "V>D", "scale": "D"}.

    Returns:
        The optax transformation, and the schedule: 0-based step -> learning rate, for logging.

    Raises:
        ConfigError: the rule or the schedule is unknown.

    >>> optimizer, schedule = build(OptimizerConfig(lr=1.0, warmup=4), 100, {"w": "D>F"})
    >>> [float(schedule(step)) for step in range(4)]
    [0.25, 0.5, 0.75, 1.0]
    """
    schedule = choose(SCHEDULES, cfg.schedule, "optimizer.schedule")(cfg, steps)
    rule = choose(OPTIMIZERS, cfg.name, "optimizer.name")(cfg, schedule, letters)
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
    return optax.chain(clip, rule), schedule


def state_letters(optimizer: optax.GradientTransformation, state, letters: Letters):
    """The letters of every array of the optimizer's state, so that it shards like its parameter.

    Args:
        optimizer: what `build` returned.
        state: its state, or the shapes of it: `jax.eval_shape(optimizer.init, params)`.
        letters: the letters of every parameter.

    Returns:
        A pytree like `state` with a string per array, one letter per dimension. A dimension of
        the state that no parameter has (or that Adafactor averaged away) is a ".".
    """

    def follow(leaf, letters):
        if _is_masked(leaf):  # the rule keeps nothing here for this parameter
            return leaf
        dims = zip(leaf.shape, letters.replace(">", ""), strict=True)
        return "".join("." if size == 1 else letter for size, letter in dims)

    return optax.tree.map_params(
        optimizer,
        follow,
        state,
        letters,
        transform_non_params=lambda leaf: "." * leaf.ndim,
        is_leaf=_is_masked,
    )


# --- schedules ---
#
# Papers count steps from 1 and optax from 0. With t = s + 1 the first step already moves (at
# lr = peak / warmup), step s = warmup - 1 has the peak, and the last step, t = steps, the floor.


def warmup_cosine(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """After the warmup, half a cosine from the peak to the floor.

    lr = peak (floor + (1 - floor) (1 + cos(pi p)) / 2),  p = (t - warmup) / (steps - warmup)

    Source: Loshchilov & Hutter 2017 (SGDR), eq. 5, one period; floor 0.1 as in Hoffmann et al.
    2022 (Chinchilla), section 3.1.
    """

    def fall(t):
        return _above_floor(cfg, (1 + jnp.cos(jnp.pi * _share(t, cfg.warmup, steps))) / 2)

    return _warmup(cfg, fall)


def warmup_linear(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """After the warmup, a straight line from the peak to the floor.

    lr = peak (floor + (1 - floor) (1 - p)),  p = (t - warmup) / (steps - warmup)

    Source: Devlin et al. 2019 (BERT), appendix A.2.
    """
    return _warmup(cfg, lambda t: _above_floor(cfg, 1 - _share(t, cfg.warmup, steps)))


def warmup_constant(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """After the warmup, the peak to the end; the floor has nothing to do.

    lr = peak

    Source: Goyal et al. 2017 (ImageNet in 1 hour), section 2.2, for the gradual warmup.
    """
    return _warmup(cfg, jnp.ones_like)


def warmup_stable_decay(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """WSD: the peak until the last `decay_share` of the run, then a straight line to the floor.

    lr = peak (floor + (1 - floor) (1 - q)),  q = max(0, (t - start) / (steps - start)),
    start = max(warmup, steps - round(decay_share steps)), but at least one step decays

    Source: Hu et al. 2024 (MiniCPM), section 4.2; the linear decay of Hägele et al. 2024,
    section 3.
    """
    start = max(cfg.warmup, steps - max(1, round(cfg.decay_share * steps)))
    return _warmup(cfg, lambda t: _above_floor(cfg, 1 - _share(t, start, steps)))


def inverse_sqrt(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Noam: after the warmup, falling as 1 / sqrt(t), but not below the floor.

    lr = peak max(floor, sqrt(warmup / t))

    Source: Vaswani et al. 2017, section 5.3, eq. 3, with peak = (width * warmup)^-1/2.
    """
    return _warmup(cfg, lambda t: jnp.maximum(cfg.floor, jnp.sqrt(max(cfg.warmup, 1) / t)))


def _warmup(cfg: OptimizerConfig, after: Callable[[jax.Array], jax.Array]) -> optax.Schedule:
    """Step s -> peak * (t / warmup while t < warmup, then after(t)), with t = s + 1."""

    def schedule(step):
        t = jnp.asarray(step, jnp.float32) + 1
        return cfg.lr * jnp.where(t < cfg.warmup, t / max(cfg.warmup, 1), after(t))

    return schedule


def _share(t, start: int, end: int) -> jax.Array:
    """How much of the way from `start` to `end` lies behind step t, in [0, 1]."""
    return jnp.clip((t - start) / max(end - start, 1), 0, 1)


def _above_floor(cfg: OptimizerConfig, height) -> jax.Array:
    """From 1 to the floor as `height` goes from 1 to 0."""
    return cfg.floor + (1 - cfg.floor) * height


# --- letters ---


def _is_matrix(letters: str) -> bool:
    return ">" in letters


def _is_block_matrix(letters: str) -> bool:
    """Embeddings, position tables and heads are matrices too, but outside the stack of blocks."""
    return _is_matrix(letters) and letters.startswith("L")


def _is_masked(leaf) -> bool:
    return isinstance(leaf, optax.MaskedNode)


INPUTS, OUTPUTS = 0, 1  # of what _axes returns


def _axes(letters: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a parameter's inputs and of its outputs; what is stacked is in neither.

    >>> _axes("LD>HK"), _axes("LED>F"), _axes("LD")
    (((1,), (2, 3)), ((2,), (3,)), ((1,), ()))
    """
    inputs, _, outputs = letters.partition(">")
    stacked = len(inputs) - len(inputs.lstrip("LE"))
    split, end = len(inputs), len(inputs) + len(outputs)
    return tuple(range(stacked, split)), tuple(range(split, end))


# --- update rules ---


def adamw(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """Adam with decoupled decay. Reads b1, b2, eps, weight_decay.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
    direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    return _descend(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), cfg, lr, letters)


def adam(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """AdamW without decay: the one rule that leaves weight_decay alone. Reads b1, b2, eps.

    Source: Kingma & Ba 2015, algorithm 1.
    """
    direction = keep(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), cfg.moments, letters)
    return optax.chain(direction, optax.scale_by_learning_rate(lr))


def sgd(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """Gradient descent: direction = g. Reads weight_decay.

    Source: Robbins & Monro 1951.
    """
    return _descend(optax.identity(), cfg, lr, letters)


def momentum(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """The heavy ball: m <- b1 m + g, direction = m. Reads b1, weight_decay.

    The sum is not an average: a steady gradient moves 1 / (1 - b1) times as far as with sgd.

    Source: Polyak 1964; lr stands outside the sum, as in PyTorch.
    """
    return _descend(optax.trace(cfg.b1), cfg, lr, letters)


def rmsprop(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """v <- b2 v + (1 - b2) g^2, direction = g / (sqrt(v) + eps). Reads b2, eps, weight_decay.

    Source: Tieleman & Hinton 2012, lecture 6.5; eps stands outside the root, as in PyTorch.
    """
    rms = optax.scale_by_rms(cfg.b2, cfg.eps, eps_in_sqrt=False)
    return _descend(rms, cfg, lr, letters)


def lion(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """direction = sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g. Reads b1, b2, weight_decay.

    Every weight moves by lr: take lr 3 to 10 times smaller than AdamW's, weight_decay as much
    larger.

    Source: Chen et al. 2023, algorithm 2; section 5 for the advice.
    """
    return _descend(optax.scale_by_lion(cfg.b1, cfg.b2), cfg, lr, letters)


def adafactor(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """RMSProp with the memory of a row and a column per matrix. Reads weight_decay.

    Its b2 grows by itself as 1 - t^-0.8; lr is absolute, as in every other rule here, not
    relative to the size of the parameter.

    Source: Shazeer & Stern 2018, algorithms 4 and 5 without the relative step size.
    """
    return _descend(_scale_by_adafactor(letters), cfg, lr, letters)


def muon(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """The nearest orthogonal matrix to the momentum, for matrices in blocks; AdamW for the rest.

    M <- b1 M + (1 - b1) G; by five Newton-Schulz steps U S V^T = M gives about U V^T, for the
    map from all inputs to all outputs ([D, H, K] counts as [D, H * K]);
    direction = 0.2 sqrt(max(inputs, outputs)) U V^T, at the rate matrix_lr (none: lr). The
    factor gives the update the size that AdamW's has, so lr and weight_decay mean the same to
    both. Reads b1, b2, eps, weight_decay, matrix_lr.

    Source: Jordan et al. 2024 (Muon); the factor: Liu et al. 2025 (Moonlight), section 2.2, eq. 4.
    """
    in_blocks = jax.tree.map(_is_block_matrix, letters)
    elsewhere = jax.tree.map(lambda d: not _is_block_matrix(d), letters)
    # optax has MaskedNode in place of the parameters that are not a rule's
    muons, adams = (
        jax.tree.map(lambda d, is_in: d if is_in else optax.MaskedNode(), letters, mask)
        for mask in (in_blocks, elsewhere)
    )
    numbers = jax.tree.map(lambda d: MuonDimensionNumbers(*_axes(d)), muons)
    matrices = scale_by_muon(beta=cfg.b1, weight_dimension_numbers=numbers)
    others = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    ratio = (cfg.matrix_lr or cfg.lr) / cfg.lr

    def size(update, letters: str):
        """An orthogonal matrix has RMS 1 / sqrt(its longer side); AdamW's update about 0.2."""
        sides = [math.prod(update.shape[a] for a in axes) for axes in _axes(letters)]
        return update * 0.2 * math.sqrt(max(sides)) if _is_block_matrix(letters) else update

    return optax.chain(
        optax.masked(keep(matrices, cfg.moments, muons), in_blocks),
        optax.stateless(lambda updates, _: jax.tree.map(size, updates, letters)),
        optax.masked(keep(others, cfg.moments, adams), elsewhere),
        _decay(cfg, letters),
        optax.masked(optax.scale(ratio), in_blocks),
        optax.scale_by_learning_rate(lr),
    )


def _descend(direction, cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """p <- p - lr (direction + weight_decay p), decaying matrices only."""
    direction = keep(direction, cfg.moments, letters)
    return optax.chain(direction, _decay(cfg, letters), optax.scale_by_learning_rate(lr))


def _decay(cfg: OptimizerConfig, letters: Letters):
    # A decayed norm scale or bias shrinks what the layer can say, without making it simpler.
    return optax.add_decayed_weights(cfg.weight_decay, mask=jax.tree.map(_is_matrix, letters))


class AdafactorState(NamedTuple):
    """Trees like the parameters, with size 1 where an axis was averaged away."""

    step: jax.Array  # []
    rows: optax.Params  # mean of g^2 over the outputs
    columns: optax.Params  # mean of g^2 over the inputs


def _scale_by_adafactor(letters: Letters) -> optax.GradientTransformation:
    """v = rows columns / mean(rows); direction = g / sqrt(v), its RMS clipped to 1.

    optax's own factors the two largest axes, if both have 128 entries: not [L, D, H, K] with
    K = 64, and across layers where L is large. Here the letters say what a matrix is. A vector
    has inputs only, so nothing is averaged in `rows`, and columns / mean(rows) is 1.
    """

    def average(x, letters: str, over: int):
        return jnp.mean(x, _axes(letters)[over], keepdims=True)

    def init(params):
        # Not jax.tree.map: optax.tree.map_params calls this with a placeholder without leaves, to
        # learn which parts of the state are like the parameters.
        leaves, structure = jax.tree.flatten(params)
        pairs = list(zip(leaves, jax.tree.leaves(letters), strict=bool(leaves)))
        rows, columns = (
            structure.unflatten([average(jnp.zeros_like(p), d, over) for p, d in pairs])
            for over in (OUTPUTS, INPUTS)
        )
        return AdafactorState(jnp.zeros((), jnp.int32), rows, columns)

    def direction(g, letters: str, rows, columns):
        inputs, outputs = _axes(letters)
        # two roots, because the product of two tiny means would underflow
        ratio = rows / jnp.mean(rows, inputs, keepdims=True)
        step = g * jax.lax.rsqrt(ratio) * jax.lax.rsqrt(columns)
        return step / jnp.maximum(1, jnp.sqrt(jnp.mean(step**2, inputs + outputs, keepdims=True)))

    def update(grads, state, params=None):
        t = state.step + 1
        b2 = 1 - t.astype(jnp.float32) ** -0.8

        def track(over: int, old):
            return jax.tree.map(
                lambda g, d, old: b2 * old + (1 - b2) * average(g**2 + 1e-30, d, over),
                grads,
                letters,
                old,
            )

        rows, columns = track(OUTPUTS, state.rows), track(INPUTS, state.columns)
        updates = jax.tree.map(direction, grads, letters, rows, columns)
        return updates, AdafactorState(t, rows, columns)

    return optax.GradientTransformation(init, update)


# --- by name ---

SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "warmup_cosine": warmup_cosine,
    "warmup_linear": warmup_linear,
    "warmup_constant": warmup_constant,
    "warmup_stable_decay": warmup_stable_decay,
    "inverse_sqrt": inverse_sqrt,
}

# Every rule decays matrices by lr * weight_decay per step, except adam, which decays nothing.
OPTIMIZERS: dict[
    str, Callable[[OptimizerConfig, optax.Schedule, Letters], optax.GradientTransformation]
] = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "momentum": momentum,
    "rmsprop": rmsprop,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}

WITHOUT_MOMENTS = ("sgd", "adafactor")  # the second has means of rows and columns, which are small
