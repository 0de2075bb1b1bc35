"""Optimizers: learning-rate schedules and update rules, each one function by name.

A rule turns gradients into a direction; the update is the same for all of them:

    p <- p - lr(s) * (direction(g) + weight_decay * p)        weight decay of matrices only

Rules depend on the letters of a parameter, never on its name: ">" makes it a matrix, a leading "L"
puts it inside the stack of blocks, and each index of a stacked axis (L, E) is an independent
parameter. So a rule updates scanned layers exactly as it would update separate ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxgpt.config import OptimizerConfig, choose
from jaxgpt.moments import quantize_moments
from jaxgpt.selection import select, select_letters

Letters = Any  # a pytree of strings, of the same structure as the parameters


def build(
    cfg: OptimizerConfig, steps: int, letters: Letters
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build the optimizer of a run: clip by global norm, then apply the rule at its scheduled rate.

    Args:
        cfg: the rule, the schedule and their hyperparameters.
        steps: optimizer steps in the whole run; the schedule ends there.
        letters: the letters of every parameter, such as {"table": "V>D", "scale": "D"}.

    Returns:
        The optax transformation, and the schedule: 0-based step -> learning rate, for logging.
        With `cfg.train` the transformation updates, and has state for, the selected parameters
        only: those of `jaxgpt.selection.select`.

    Raises:
        ConfigError: the rule or the schedule is unknown, or `cfg.train` matches no parameter.

    Examples:
        >>> optimizer, schedule = build(OptimizerConfig(lr=1.0, warmup=4), 100, {"w": "D>F"})
        >>> [float(schedule(step)) for step in range(4)]
        [0.25, 0.5, 0.75, 1.0]
    """
    schedule = choose(SCHEDULES, cfg.schedule, "optimizer.schedule")(cfg, steps)
    selection = select_letters(letters, cfg.train)
    rule = choose(OPTIMIZERS, cfg.name, "optimizer.name")(cfg, schedule, selection)
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
    rule = _scale_logit_updates(optax.chain(clip, rule), cfg.logit_lr, selection)
    return _restrict(rule, selection) if cfg.train else rule, schedule


def _restrict(rule: optax.GradientTransformation, selection) -> optax.GradientTransformation:
    """Restrict a rule to the selected ones of the parameters and gradients that it is given."""

    def update(grads, state, params=None):
        return rule.update(select(grads, selection), state, select(params, selection))

    return optax.GradientTransformation(lambda p: rule.init(select(p, selection)), update)


def _scale_logit_updates(rule: optax.GradientTransformation, factor: float, letters: Letters):
    """Multiply the updates of tables of attention logits, if there are any, by `factor`.

    An entry of such a table moves by lr per step. The products of weights with their inputs, which
    other logits are made of, move by lr times about the number of channels.
    """
    if factor == 1 or not any(map(_is_logit_table, jax.tree.leaves(letters))):
        return rule

    def update(grads, state, params=None):
        updates, state = rule.update(grads, state, params)

        def scale(update, letters: str):
            return factor * update if _is_logit_table(letters) else update

        return jax.tree.map(scale, updates, letters), state

    return optax.GradientTransformation(rule.init, update)


def get_state_letters(optimizer: optax.GradientTransformation, state, letters: Letters):
    """Return the letters of every array of the optimizer state, to shard it like its parameter.

    Args:
        optimizer: what `build` returned.
        state: its state, or the shapes of it: `jax.eval_shape(optimizer.init, params)`.
        letters: the letters of every parameter that is trained.

    Returns:
        A pytree like `state` with a string per array, one letter per dimension. A dimension of
        the state that no parameter has (or that Adafactor averaged away) is a ".".
    """

    def map_letters(leaf, letters):
        if _is_masked(leaf):  # the rule has no state here for this parameter
            return leaf
        dims = zip(leaf.shape, letters.replace(">", ""), strict=True)
        return "".join("." if size == 1 else letter for size, letter in dims)

    return optax.tree.map_params(
        optimizer,
        map_letters,
        state,
        letters,
        transform_non_params=lambda leaf: "." * leaf.ndim,
        is_leaf=_is_masked,
    )


# --- schedules ---
#
# Papers count steps from 1 and optax from 0. With t = s + 1 the first step has lr = peak / warmup
# rather than 0, step s = warmup - 1 the peak, and the last step, t = steps, the floor.


def warmup_cosine(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Decay along half a cosine from the peak to the floor after the warmup.

    lr = peak (floor + (1 - floor) (1 + cos(pi p)) / 2),  p = (t - warmup) / (steps - warmup)

    Source: Loshchilov & Hutter 2017 (SGDR), eq. 5, one period; floor 0.1 as in Hoffmann et al.
    2022 (Chinchilla), section 3.1.
    """

    def decay(t):
        return _interpolate_to_floor(
            cfg, (1 + jnp.cos(jnp.pi * _get_fraction_done(t, cfg.count_warmup(steps), steps))) / 2
        )

    return _add_warmup(cfg, steps, decay)


def warmup_linear(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Decay linearly from the peak to the floor after the warmup.

    lr = peak (floor + (1 - floor) (1 - p)),  p = (t - warmup) / (steps - warmup)

    Source: Devlin et al. 2019 (BERT), appendix A.2.
    """
    warmup = cfg.count_warmup(steps)
    return _add_warmup(
        cfg, steps, lambda t: _interpolate_to_floor(cfg, 1 - _get_fraction_done(t, warmup, steps))
    )


def warmup_constant(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Hold the peak after the warmup; the floor is not used.

    lr = peak

    Source: Goyal et al. 2017 (ImageNet in 1 hour), section 2.2, for the gradual warmup.
    """
    return _add_warmup(cfg, steps, jnp.ones_like)


def warmup_stable_decay(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """WSD: hold the peak until the last `decay_share` of the run, then decay linearly to the floor.

    lr = peak (floor + (1 - floor) (1 - q)),  q = max(0, (t - start) / (steps - start)),
    start = max(warmup, steps - max(1, round(decay_share steps)))

    Source: Hu et al. 2024 (MiniCPM), section 4.2; the linear decay of Hägele et al. 2024,
    section 3.
    """
    start = max(cfg.count_warmup(steps), steps - max(1, round(cfg.decay_share * steps)))
    return _add_warmup(
        cfg, steps, lambda t: _interpolate_to_floor(cfg, 1 - _get_fraction_done(t, start, steps))
    )


def inverse_sqrt(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Noam: decay as 1 / sqrt(t) after the warmup, but not below the floor.

    lr = peak max(floor, sqrt(warmup / t))

    Source: Vaswani et al. 2017, section 5.3, eq. 3, with peak = (width * warmup)^-1/2.
    """
    warmup = max(cfg.count_warmup(steps), 1)
    return _add_warmup(cfg, steps, lambda t: jnp.maximum(cfg.floor, jnp.sqrt(warmup / t)))


def _add_warmup(
    cfg: OptimizerConfig, steps: int, decay: Callable[[jax.Array], jax.Array]
) -> optax.Schedule:
    """Return the schedule s -> peak * (t / warmup while t < warmup, then decay(t)), t = s + 1."""
    warmup = cfg.count_warmup(steps)

    def schedule(step):
        t = jnp.asarray(step, jnp.float32) + 1
        return cfg.lr * jnp.where(t < warmup, t / max(warmup, 1), decay(t))

    return schedule


def _get_fraction_done(t, start: int, end: int) -> jax.Array:
    """Return the fraction of the steps from `start` to `end` that is done at t, in [0, 1]."""
    return jnp.clip((t - start) / max(end - start, 1), 0, 1)


def _interpolate_to_floor(cfg: OptimizerConfig, height) -> jax.Array:
    """Map `height` in [0, 1] linearly to [floor, 1]."""
    return cfg.floor + (1 - cfg.floor) * height


# --- letters ---


def _is_matrix(letters: str) -> bool:
    return ">" in letters


def _is_block_matrix(letters: str) -> bool:
    """Return whether it is a matrix inside the stack of blocks, unlike embeddings and heads."""
    return _is_matrix(letters) and letters.startswith("L")


def _is_logit_table(letters: str) -> bool:
    """Return whether it holds attention logits, per bucket and head or pair of positions."""
    return letters.lstrip("L") in ("U>H", "HC>C")


def _is_masked(leaf) -> bool:
    return isinstance(leaf, optax.MaskedNode)


INPUTS, OUTPUTS = 0, 1  # indices into the result of _split_axes


def _split_axes(letters: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes of a parameter's inputs and of its outputs, without stacked axes.

    >>> _split_axes("LD>HK"), _split_axes("LED>F"), _split_axes("LD")
    (((1,), (2, 3)), ((2,), (3,)), ((1,), ()))
    """
    inputs, _, outputs = letters.partition(">")
    stacked = len(inputs) - len(inputs.lstrip("LE"))
    split, end = len(inputs), len(inputs) + len(outputs)
    return tuple(range(stacked, split)), tuple(range(split, end))


# --- update rules ---


def adamw(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """Adam with decoupled decay. Uses b1, b2, eps, weight_decay.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
    direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    return _add_decay_and_rate(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), cfg, lr, letters)


def adam(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """AdamW without decay: the one rule that ignores weight_decay. Uses b1, b2, eps.

    Source: Kingma & Ba 2015, algorithm 1.
    """
    direction = quantize_moments(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), cfg.moments, letters)
    return optax.chain(direction, optax.scale_by_learning_rate(lr))


def sgd(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """Gradient descent: direction = g. Uses weight_decay.

    Source: Robbins & Monro 1951.
    """
    return _add_decay_and_rate(optax.identity(), cfg, lr, letters)


def momentum(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """Heavy-ball momentum: m <- b1 m + g, direction = m. Uses b1, weight_decay.

    The sum is not an average: a constant gradient gives steps 1 / (1 - b1) times those of sgd.

    Source: Polyak 1964; lr is outside the sum, as in PyTorch.
    """
    return _add_decay_and_rate(optax.trace(cfg.b1), cfg, lr, letters)


def rmsprop(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """v <- b2 v + (1 - b2) g^2, direction = g / (sqrt(v) + eps). Uses b2, eps, weight_decay.

    Source: Tieleman & Hinton 2012, lecture 6.5; eps is outside the root, as in PyTorch.
    """
    rms = optax.scale_by_rms(cfg.b2, cfg.eps, eps_in_sqrt=False)
    return _add_decay_and_rate(rms, cfg, lr, letters)


def lion(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """direction = sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g. Uses b1, b2, weight_decay.

    Every weight changes by lr: use an lr 3 to 10 times smaller than AdamW's, and a weight_decay
    larger by the same factor.

    Source: Chen et al. 2023, algorithm 2; section 5 for the advice.
    """
    return _add_decay_and_rate(optax.scale_by_lion(cfg.b1, cfg.b2), cfg, lr, letters)


def adafactor(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """RMSProp with second moments factored into rows and columns. Uses weight_decay.

    Its b2 follows 1 - t^-0.8. lr is absolute, as in every other rule here; with relative_lr it is
    relative to the scale of the parameter, max(10^-3, RMS(p)), as in the paper and for T5.

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5; the relative step size:
    section 8. Raffel et al. 2020, section 3.1.2, for T5.
    """
    rule = _scale_by_adafactor(letters)
    if cfg.relative_lr:
        rule = optax.chain(rule, _scale_by_parameter(letters))
    return _add_decay_and_rate(rule, cfg, lr, letters)


MIN_PARAMETER_SCALE = 1e-3  # epsilon_2 of Adafactor: a parameter of zeros could not begin to move


def _scale_by_parameter(letters: Letters) -> optax.GradientTransformation:
    """Multiply the update of each matrix or vector, in each layer, by the RMS of its parameter."""

    def scale(update, p, letters: str):
        axes = sum(_split_axes(letters), ())
        rms = jnp.sqrt(jnp.mean(p**2, axes, keepdims=True))
        return update * jnp.maximum(rms, MIN_PARAMETER_SCALE)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params, letters))


def muon(cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """Orthogonalize the momentum of matrices in blocks; use AdamW for all other parameters.

    M <- b1 M + (1 - b1) G; five Newton-Schulz steps take M = U S V^T to about U V^T, where M maps
    all inputs to all outputs ([D, H, K] is [D, H * K]);
    direction = 0.2 sqrt(max(inputs, outputs)) U V^T, at the rate matrix_lr (none: lr). The
    factor matches the RMS of AdamW's updates, so lr and weight_decay mean the same for both.
    Uses b1, b2, eps, weight_decay, matrix_lr.

    Source: Jordan et al. 2024 (Muon); the factor: Liu et al. 2025 (Moonlight), section 2.2, eq. 4.
    """
    in_blocks = jax.tree.map(_is_block_matrix, letters)
    outside_blocks = jax.tree.map(lambda d: not _is_block_matrix(d), letters)
    # optax puts a MaskedNode in place of the parameters that a rule does not update.
    muon_letters, adam_letters = (
        jax.tree.map(lambda d, is_selected: d if is_selected else optax.MaskedNode(), letters, mask)
        for mask in (in_blocks, outside_blocks)
    )
    numbers = jax.tree.map(lambda d: MuonDimensionNumbers(*_split_axes(d)), muon_letters)
    muon_rule = scale_by_muon(beta=cfg.b1, weight_dimension_numbers=numbers)
    adam_rule = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    ratio = (cfg.matrix_lr or cfg.lr) / cfg.lr

    def scale_update(update, letters: str):
        """Scale to RMS 0.2, about AdamW's; an orthogonal matrix has 1 / sqrt(its longer side)."""
        sides = [math.prod(update.shape[a] for a in axes) for axes in _split_axes(letters)]
        return update * 0.2 * math.sqrt(max(sides)) if _is_block_matrix(letters) else update

    return optax.chain(
        optax.masked(quantize_moments(muon_rule, cfg.moments, muon_letters), in_blocks),
        optax.stateless(lambda updates, _: jax.tree.map(scale_update, updates, letters)),
        optax.masked(quantize_moments(adam_rule, cfg.moments, adam_letters), outside_blocks),
        _decay_matrices(cfg, letters),
        optax.masked(optax.scale(ratio), in_blocks),
        optax.scale_by_learning_rate(lr),
    )


def _add_decay_and_rate(direction, cfg: OptimizerConfig, lr: optax.Schedule, letters: Letters):
    """Chain a rule with p <- p - lr (direction + weight_decay p), decaying matrices only."""
    direction = quantize_moments(direction, cfg.moments, letters)
    return optax.chain(direction, _decay_matrices(cfg, letters), optax.scale_by_learning_rate(lr))


def _decay_matrices(cfg: OptimizerConfig, letters: Letters):
    # Decaying a norm scale or a bias limits the layer's outputs without regularizing it.
    return optax.add_decayed_weights(cfg.weight_decay, mask=jax.tree.map(_is_matrix, letters))


class AdafactorState(NamedTuple):
    """Factored second moments: trees like the parameters, of size 1 along the averaged axes."""

    step: jax.Array  # []
    rows: optax.Params  # mean of g^2 over the outputs
    columns: optax.Params  # mean of g^2 over the inputs


def _scale_by_adafactor(letters: Letters) -> optax.GradientTransformation:
    """Scale by v = rows columns / mean(rows): direction = g / sqrt(v), its RMS clipped to 1.

    optax's own factors the two largest axes if both have 128 entries: not those of [L, D, H, K]
    with K = 64, and those across layers if L is large. Here the letters define the matrix. A vector
    has inputs only, so `rows` averages over nothing, and columns / mean(rows) is 1.
    """

    def average(x, letters: str, over: int):
        return jnp.mean(x, _split_axes(letters)[over], keepdims=True)

    def init(params):
        # Not jax.tree.map: optax.tree.map_params calls this with a placeholder without leaves, to
        # find which parts of the state have the structure of the parameters.
        leaves, structure = jax.tree.flatten(params)
        pairs = list(zip(leaves, jax.tree.leaves(letters), strict=bool(leaves)))
        rows, columns = (
            structure.unflatten([average(jnp.zeros_like(p), d, over) for p, d in pairs])
            for over in (OUTPUTS, INPUTS)
        )
        return AdafactorState(jnp.zeros((), jnp.int32), rows, columns)

    def direction(g, letters: str, rows, columns):
        inputs, outputs = _split_axes(letters)
        # Two roots, because the product of two tiny means would underflow.
        ratio = rows / jnp.mean(rows, inputs, keepdims=True)
        step = g * jax.lax.rsqrt(ratio) * jax.lax.rsqrt(columns)
        return step / jnp.maximum(1, jnp.sqrt(jnp.mean(step**2, inputs + outputs, keepdims=True)))

    def update(grads, state, params=None):
        t = state.step + 1
        b2 = 1 - t.astype(jnp.float32) ** -0.8

        def update_average(over: int, old):
            return jax.tree.map(
                lambda g, d, old: b2 * old + (1 - b2) * average(g**2 + 1e-30, d, over),
                grads,
                letters,
                old,
            )

        rows = update_average(OUTPUTS, state.rows)
        columns = update_average(INPUTS, state.columns)
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

OPTIMIZERS_WITHOUT_MOMENTS = (
    "sgd",
    "adafactor",
)  # adafactor has only means of rows and columns, which are small
