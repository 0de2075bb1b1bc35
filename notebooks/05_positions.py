# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] key="title"
# # 5. Positions
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/05_positions.ipynb)
#
# Attention treats a text as a set: shuffle the tokens, and each gets the same answer as before. But
# "the dog bites the man" is news of another kind than "the man bites the dog". The order has to be
# put in, and there are three places for it: added to the vectors at the entrance, turned into the
# queries and keys, or added to the scores. This notebook builds one of each, and then measures what
# happens to them when a text is longer than any that the model was trained on.

# %% tags=["setup"]
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("jaxgpt") is None:  # in Colab
    source = "jaxgpt[inspect,measure] @ git+https://github.com/jaxgpt/jaxgpt"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

import matplotlib.pyplot as plt

scale = float(os.environ.get("COURSE_SCALE", "1"))  # below 1, long cells do less
plt.rcParams.update({"figure.figsize": (7, 3), "figure.dpi": 110, "axes.grid": True})
plt.rcParams.update({"grid.alpha": 0.3, "font.size": 9, "axes.axisbelow": True})


# %%
import dataclasses
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import inspect, visualize
from jaxgpt.config import ConfigError, ModelConfig
from jaxgpt.model import Coords, build, compute_logits, init_params
from jaxgpt.model.positions import (
    apply_rope,
    assign_bucket,
    compute_alibi_bias,
    compute_alibi_slopes,
    compute_sin_cos,
    encode_sinusoidal,
)

# %% [markdown] key="sinusoids" tags=["concept"]
# ## Sinusoids: a clock with many hands
#
# The first Transformer added to each token's vector a vector of its position p, made of sines and
# cosines whose frequencies fall from 1 to about 1/10000:
#
# ```text
# PE(p, 2i) = sin(p · fᵢ)     PE(p, 2i + 1) = cos(p · fᵢ)     fᵢ = 10000^(-2i / D)
# ```
#
# It is a clock. The fast hands tell neighbors apart, the slow hands tell the beginning from the end,
# and together no two positions look alike.


# %%
def sinusoids(T, D):
    frequencies = 10_000.0 ** (-np.arange(0, D, 2) / D)
    angles = np.arange(T)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(T, D)


T, D = 64, 128
table = sinusoids(T, D)
assert np.allclose(table, encode_sinusoidal(jnp.arange(T)[None], D)[0], atol=1e-5)
print(table[1, :6].round(3))

# %% [markdown] key="sinusoids-waves" tags=["picture"]
# #### Figure: five hands of the clock
#
# The sines of five channels against the position: from fast to slow.

# %%
figure, axes = plt.subplots(5, 1, figsize=(7, 3.4), sharex=True)
for axis, channel in zip(axes, (0, 16, 32, 48, 64), strict=True):
    axis.plot(table[:, channel])
    axis.set_ylim(-1.2, 1.2)
    axis.set_ylabel(channel, rotation=0, labelpad=12)
axes[-1].set_xlabel("position")
axes[0].set_title("channels of the position vector")
plt.show()

# %% [markdown] key="sinusoids-dot" tags=["concept"]
# ### Their dot products know the distance only
#
# sin a sin b + cos a cos b = cos(a - b). So the dot product of two positions is Σ cos((p - q) fᵢ): it
# depends on their distance and not on where they are. And going k places on is a rotation of each
# pair of channels by k · fᵢ, the same for every p, so a matrix can learn "k places back".

# %%
products = table @ table.T
frequencies = 10_000.0 ** (-np.arange(0, D, 2) / D)
distances = np.arange(T)
by_distance = np.cos(distances[:, None] * frequencies).sum(-1)
assert np.allclose(products, by_distance[np.abs(distances[:, None] - distances)], atol=1e-8)

# %% [markdown] key="sinusoids-picture" tags=["picture"]
# #### Figure: the table, and how alike positions are
#
# On the command line: `jaxgpt positions sinusoidal --out pe.png`.

# %%
cfg = ModelConfig(width=128, heads=4)
figure = visualize.draw_positions(inspect.describe_positions("sinusoidal", 64, cfg))
figure.set_dpi(75)
figure

# %% [markdown] key="learned" tags=["concept"]
# ## Learned positions
#
# GPT-2 and BERT let the model find the vectors itself: a table with a row for each position, trained
# like the embedding. It works as well as sinusoids, and it has an end. There is no row 1025, and a
# row that training never used holds random numbers. The library refuses a position beyond the table.

# %%
learned = dataclasses.replace(cfg, position="learned", context=32)
print(inspect.describe_positions("learned", 32, learned).matrix.shape)
try:
    inspect.describe_positions("learned", 33, learned)
    raise AssertionError("there is no row 33")
except ConfigError as error:
    print(error)

# %% [markdown] key="rope" tags=["concept"]
# ## RoPE: rotate queries and keys
#
# Rotary position embedding adds nothing to the vectors. It takes the channels of a query or key in
# pairs, and rotates each pair by an angle that grows with the position, p · fᵢ. A rotation changes no
# length, and the dot product of two rotated vectors depends on the difference of their angles only:
# **the score of a query and a key depends on what they are and on how far apart they are**. Values
# are not rotated.


# %%
def rope(x, positions, theta=10_000.0):
    """Rotate x [T K]: channel i with channel i + K/2."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles = positions[:, None] * frequencies
    a, b = x[:, :half], x[:, half:]
    turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    return np.concatenate(turned, -1)


rng = np.random.default_rng(0)
K = 64
q, k = rng.normal(size=(2, 1, K))
frequencies = 10_000.0 ** (-np.arange(0, K, 2) / K)
sin, cos = compute_sin_cos(frequencies.astype(np.float32), 1.0, jnp.array([[17]]))
library = apply_rope(sin, cos, jnp.asarray(q, jnp.float32)[None, :, None])[0, :, 0]
assert np.allclose(rope(q, np.array([17])), library, atol=1e-5)


def score(q_at, k_at):
    return (rope(q, np.array([q_at])) @ rope(k, np.array([k_at])).T).item()


assert np.isclose(score(5, 2), score(105, 102))  # three apart, wherever they are
assert np.isclose(np.linalg.norm(rope(q, np.array([999]))), np.linalg.norm(q))
print(f"three apart: {score(5, 2):.4f}, {score(105, 102):.4f}; four apart: {score(6, 2):.4f}")

# %% [markdown] key="frequencies" tags=["example"]
# ### Example: the frequencies of a head of width 64
#
# There are 32 pairs. The first turns by 1 radian for each token, once around in 6.3 tokens. The
# second has the frequency 10000^(-2/64) = .7499, and the last 10000^(-62/64) = 1.33 · 10⁻⁴, once
# around in 47,000 tokens: within a usual text it hardly moves.

# %%
assert frequencies[0] == 1
assert np.isclose(frequencies[1], 0.7499, atol=5e-5)
assert np.isclose(frequencies[-1], 1.33e-4, atol=5e-7)
print("once around, in tokens:", (2 * np.pi / frequencies)[[0, 1, 8, 16, 31]].round(1).tolist())

# %% [markdown] key="rope-picture" tags=["picture"]
# #### Figure: what RoPE does to a vector of ones, and how scores fall with the distance
#
# For a query equal to its key, the score falls from its height at the same place, with waves. Far away
# there is no signal left in the fast pairs.

# %%
figure = visualize.draw_positions(inspect.describe_positions("rope", 64, cfg))
figure.set_dpi(75)
figure

# %% [markdown] key="decay-picture" tags=["picture"]
# #### Figure: the decay, for two bases
#
# Models for long contexts raise the base θ from 10,000 to 500,000 or more: slower hands, a wider reach.

# %%
distances = np.arange(512)
decay = inspect.rope_decay(distances, head_width=64)
assert np.allclose(decay, np.cos(distances[:, None] * frequencies).mean(-1))
figure, axis = plt.subplots()
axis.plot(distances, decay, label="θ = 10,000")
axis.plot(distances, inspect.rope_decay(distances, 64, 500_000.0), label="θ = 500,000")
axis.set_xlabel("distance, tokens")
axis.set_ylabel("mean cosine")
axis.legend()
plt.show()

# %% [markdown] key="complex" tags=["exercise"]
# ### Exercise: RoPE with complex numbers
#
# A pair of channels (a, b) is the complex number a + ib, and a rotation by φ is a product with exp(iφ).
# Write `rope_complex(x, positions)` for x [T K], with the same pairs as `rope`, in three lines.

# %% tags=["reader"]
rope_complex = None  # replace None by your function: def rope_complex(x, positions): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(x, positions):
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


rope_complex = rope_complex or solution

# %% tags=["check"]
x = rng.normal(size=(7, 16))
assert np.allclose(rope_complex(x, np.arange(7)), rope(x, np.arange(7)))
print("right")

# %% [markdown] key="alibi" tags=["concept"]
# ## ALiBi: a penalty for distance
#
# The simplest of all: subtract from each score a number proportional to the distance, with a slope of
# its own for each head, 1/2, 1/4, ... 1/256 for eight heads. Steep heads see the last few tokens,
# flat heads nearly all. Nothing is learned, and there is nothing that a longer text could break.

# %%
H = 8
slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)
assert np.allclose(slopes, compute_alibi_slopes(H))
assert (slopes[0], slopes[-1]) == (1 / 2, 1 / 256)
T = 10
distance = np.abs(np.arange(T)[:, None] - np.arange(T))
coords = Coords(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
bias = compute_alibi_bias(jnp.asarray(slopes), coords, coords)[0]
assert np.allclose(bias, -slopes[:, None, None] * distance)
print(np.asarray(bias[0, -1]))

# %% [markdown] key="t5" tags=["concept"]
# ## T5: a learned number for each bucket of distances
#
# T5 learns what ALiBi prescribes. Distances are sorted into buckets, exact ones for near tokens and
# wider and wider ones further out, and each head learns a number for each bucket, added to the score.
# All distances beyond 128 share the last bucket, so a longer text meets nothing new.


# %%
def bucket(distance, buckets=32, reach=128):
    exact = buckets // 2
    if distance < exact:
        return distance
    step = np.log(distance / exact) / np.log(reach / exact) * (buckets - exact)
    return min(exact + int(step), buckets - 1)


distances = np.arange(200)
ours = [int(bucket(distance)) for distance in distances]
assert (ours == np.asarray(assign_bucket(jnp.asarray(distances), 32, 128, True))).all()
print("distances 0, 15, 16, 30, 64, 127, 199 ->", [ours[d] for d in (0, 15, 16, 30, 64, 127, 199)])

# %% [markdown] key="bias-picture" tags=["picture"]
# #### Figure: what ALiBi and T5 add to the scores
#
# Left, the penalty of four of ALiBi's heads; right, the bucket of each distance.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
for h in (0, 2, 4, 6):
    left.plot(-slopes[h] * distances[:60], label=f"slope 1/{round(1 / slopes[h])}")
left.set_xlabel("distance")
left.set_ylabel("added to the score")
left.legend(fontsize=8)
right.step(distances, ours)
right.set_xlabel("distance")
right.set_ylabel("bucket of T5")
figure.tight_layout()
plt.show()

# %% [markdown] key="where-question" tags=["question"]
# ### Question: at the entrance, or in every layer?
#
# Sinusoids are added once, before the first layer. RoPE, ALiBi and T5 act in every layer. What is the
# advantage of each?
#
# <details><summary>Answer</summary>
#
# Added once, the position is part of the token's vector: any layer may use it, also for other purposes
# than attention, such as telling the first token from the others. But it shares the room with the
# meaning, and a distance has to be computed from two absolute positions. Acting in every layer, the
# distance is available where scores are made, without taking room, and values stay free of it.
#
# </details>

# %% [markdown] key="extrapolation-lab" tags=["lab"]
# ## Lab: longer than in training
#
# We train six small models on pieces of 64 bytes of Python's language reference, equal but for the
# position encoding, and then let each read pieces of 256 bytes. Within the first 64 one sees which
# encoding learns fastest in so short a training. Beyond, each meets distances or positions that it has
# never seen.

# %%
text = "\n".join(topics.values()).encode("ascii", "replace")
data = np.frombuffer(text, np.uint8).astype(np.int32)
training, held_out = data[: -len(data) // 8], data[-len(data) // 8 :]
SHORT, LONG, ROWS = 64, 256, 32
base = ModelConfig(vocab=256, context=LONG, width=64, layers=2, heads=4, ffn=172)


def cut(source, length, rows, rng):
    starts = rng.integers(len(source) - length - 1, size=rows)
    rows = np.stack([source[start : start + length + 1] for start in starts])
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])


def token_losses(cfg, params, inputs, targets):
    """Return the loss of each token [B T]."""
    B, T = inputs.shape
    coords = Coords(jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32))
    hidden, _ = build(cfg).apply({"params": params}, inputs, coords)
    scores = compute_logits(cfg, params, hidden)
    return optax.softmax_cross_entropy_with_integer_labels(scores, targets)


def train_with(cfg, steps):
    params = init_params(cfg, jax.random.key(0))[0]
    rule = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    state, rng = rule.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, inputs, targets):
        loss_fn = lambda p: token_losses(cfg, p, inputs, targets).mean()  # noqa: E731
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = rule.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, _ = step(params, state, *cut(training, SHORT, ROWS, rng))
    return params


def measure_by_position(cfg, params):
    """Return the mean held-out loss at each of the LONG positions."""
    inputs, targets = cut(held_out, LONG, 128, np.random.default_rng(1))
    evaluate = jax.jit(lambda p: token_losses(cfg, p, inputs, targets).mean(0))
    return np.asarray(evaluate(params))


steps = max(250, round(400 * scale))
schemes = ["sinusoidal", "learned", "rope", "alibi", "t5", "none"]
trained, curves = {}, {}
for scheme in schemes:
    cfg = dataclasses.replace(base, position=scheme)
    trained[scheme] = train_with(cfg, steps)
    curves[scheme] = measure_by_position(cfg, trained[scheme])
    inside, outside = curves[scheme][32:64].mean(), curves[scheme][128:].mean()
    print(f"{scheme:11} positions 32 to 63: {inside:.3f}   128 to 255: {outside:.3f} nats a byte")

# %% [markdown] key="extrapolation-picture" tags=["picture"]
# #### Figure: the loss by position
#
# The dashed line is the end of what training has seen.

# %%
figure, axis = plt.subplots(figsize=(7.5, 3.4))
for scheme, curve in curves.items():
    axis.plot(np.arange(8, LONG, 16), curve.reshape(-1, 16).mean(-1), label=scheme)
axis.axvline(SHORT, color="gray", linestyle="--")
axis.set_xlabel("position")
axis.set_ylabel("loss, nats a byte")
axis.legend(ncol=3, fontsize=8)
plt.show()

inside = {name: curve[32:64].mean() for name, curve in curves.items()}
outside = {name: curve[128:].mean() for name, curve in curves.items()}
assert outside["alibi"] < 1.1 * inside["alibi"]  # carries on
assert outside["alibi"] < min(outside[name] for name in ("sinusoidal", "learned", "rope"))
assert outside["rope"] > 1.1 * inside["rope"]  # meets angles that it has never seen
assert outside["learned"] > 1.02 * inside["learned"]  # meets rows that were never trained

# %% [markdown] key="extrapolation-question" tags=["question"]
# ### Question: how can it work without any encoding?
#
# The model "none" has no position encoding, and is hardly worse than the one with learned positions.
# From where does it get the order?
#
# <details><summary>Answer</summary>
#
# From the causal mask. The first token sees one token, the tenth sees ten: a head that spreads its
# weight evenly over all it sees returns something that shrinks as 1 / t for any token that occurs
# once, such as the first. From that, later layers can tell the position. In an encoder, which sees in
# both directions, this does not work.
#
# </details>

# %% [markdown] key="scaling" tags=["concept"]
# ## Stretching RoPE
#
# A trained RoPE model can be made to read longer texts without training. *Position interpolation*
# divides all positions by a factor, so that 256 places look like 64; then near tokens seem too near.
# *NTK* scaling raises the base, which slows the slow hands by the factor and leaves the fast ones
# alone. *YaRN* sorts the hands: those that went around during training stay, the others are slowed.
# In the library it is `model.rope.scaling`.

# %%
stretched = {"rope": curves["rope"]}
for scaling in ("linear", "ntk", "yarn"):
    rope_config = dataclasses.replace(
        base.rope, scaling=scaling, factor=LONG / SHORT, original=SHORT
    )
    cfg = dataclasses.replace(base, position="rope", rope=rope_config)
    stretched[scaling] = measure_by_position(cfg, trained["rope"])
for name, curve in stretched.items():
    print(f"{name:7} positions 128 to 255: {curve[128:].mean():.3f} nats a byte")
assert min(stretched["ntk"][128:].mean(), stretched["yarn"][128:].mean()) < outside["rope"]

# %% [markdown] key="scaling-picture" tags=["picture"]
# #### Figure: one trained model, four ways to count
#
# Without any further training, linear interpolation spoils near and far alike: all distances have
# become foreign to the model. NTK carries it some way, and YaRN all the way, at a small price close by.
# A short training with the scaling on makes up for that, also for the linear one.

# %%
figure, axis = plt.subplots()
for name, curve in stretched.items():
    axis.plot(np.arange(8, LONG, 16), curve.reshape(-1, 16).mean(-1), label=name)
axis.axvline(SHORT, color="gray", linestyle="--")
axis.set_xlabel("position")
axis.set_ylabel("loss, nats a byte")
axis.legend(ncol=4, fontsize=8)
plt.show()

# %% [markdown] key="window" tags=["exercise"]
# ### Exercise: how far does ALiBi see?
#
# A head with slope m subtracts m · d from the score at distance d. If all scores before the penalty are
# equal, the weights are proportional to exp(-m · d). Write `reach(m)`: the number of nearest tokens
# (the query's own included) that together have at least 90% of the weight, in an endless text.
# (The sum of a geometric series may help.)

# %% tags=["reader"]
reach = None  # replace None by your function: def reach(m): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(m):
    # The first n terms of the series are 1 - exp(-m n) of the whole.
    return int(np.ceil(np.log(10) / m))


reach = reach or solution

# %% tags=["check"]
for m in slopes:
    w = np.exp(-m * np.arange(20_000))
    assert reach(m) == np.argmax(np.cumsum(w) / w.sum() >= 0.9) + 1
print("tokens with 90% of the weight, by head:", [reach(m) for m in slopes])

# %% [markdown] key="end"
# ## Where to go from here
#
# Tokens, attention, positions: the parts are there. The next notebook puts them together:
# [the block and the encoder](06_block_and_encoder.ipynb).
