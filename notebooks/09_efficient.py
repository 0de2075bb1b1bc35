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
# # 9. Efficient attention, and what was there before
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/09_efficient.ipynb)
#
# Every token looks at every other: for T tokens that is T² pairs. At 1,000 tokens nobody minds, at
# a hundred thousand it is ten billion pairs in every head of every layer. This notebook goes
# through the ways out: the same attention with less memory (flash), attention to fewer tokens
# (windows, strides, BigBird), and mixers that do without pairs (linear attention, Mamba, and the
# recurrent networks of before 2017). Each is written in a few lines and held against the library's;
# then time and memory are measured.

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
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import inspect
from jaxgpt.config import Config, ModelConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords, build, init_params
from jaxgpt.model.kernels import KERNELS, ScoreMod
from jaxgpt.model.masks import make_layer_mask
from jaxgpt.model.mixers.mamba import selective_scan
from jaxgpt.model.mixers.performer import compute_log_features, draw_feature_projections
from jaxgpt.sections import SparseConfig
from jaxgpt.tokenizer import make_byte_tokenizer

# %% [markdown] key="online" tags=["concept"]
# ## Flash attention: a softmax in one pass
#
# Softmax seems to need all logits of a row at once: for the maximum, and for the sum. It does not.
# Read the keys block by block, and keep three things for each query: the largest logit so far *m*,
# the sum of exponentials *s*, and the weighted sum of values *o*. If a block brings a larger
# maximum, what was summed is rescaled:
#
# ```text
# m' = max(m, max of block)      s' = s·exp(m − m') + Σ exp(logits − m')      o' = o·exp(m − m') + exp(logits − m')·V
# ```
#
# At the end o / s is the attention, exactly, and no matrix [T T] was ever in memory (Milakov and
# Gimelshein 2018; Dao et al. 2022). It is not an approximation.


# %%
def flash(q, k, v, block):
    """Return causal attention of q, k, v [T K], with keys read in blocks."""
    T, K = q.shape
    m, s, o = np.full(T, -np.inf), np.zeros(T), np.zeros((T, K))
    for start in range(0, T, block):
        logits = q @ k[start : start + block].T / np.sqrt(K)  # [T block]
        logits[np.arange(T)[:, None] < np.arange(start, min(start + block, T))] = -np.inf
        new = np.maximum(m, logits.max(1))
        weights = np.exp(logits - new[:, None])
        s = s * np.exp(m - new) + weights.sum(1)
        o = o * np.exp(m - new)[:, None] + weights @ v[start : start + block]
        m = new
    return o / s[:, None]


def make_qkv(T, K=32, seed=0):
    """Return random q, k, v, float32 [1 T 1 K], their coordinates and the causal score."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, 1, K)), jnp.float32) for _ in range(3))
    positions = jnp.arange(T)[None]
    at = Coords(positions, jnp.ones_like(positions))
    return q, k, v, at, ScoreMod(make_layer_mask(ModelConfig(), "full", "causal"))


q, k, v, at, score = make_qkv(96)
dense = KERNELS["dense"](q, k, v, at, at, score)[0, :, 0]
assert np.allclose(flash(*(np.asarray(x[0, :, 0], float) for x in (q, k, v)), 32), dense, atol=1e-5)
assert np.allclose(KERNELS["blockwise"](q, k, v, at, at, score)[0, :, 0], dense, atol=1e-5)

# %% [markdown] key="memory-picture" tags=["picture"]
# ### Figure: memory, as the compiler has it
#
# The compiler states how much memory a program needs for its intermediate results. With the dense
# kernel that is at least one matrix of 4 T² bytes, four times as many when the text doubles;
# blockwise it grows with the text.

# %%
LENGTHS = (512, 1024, 2048, 4096)
memory = {"dense": [], "blockwise": []}
for name, sizes in memory.items():
    for T in LENGTHS:
        q, k, v, at, score = make_qkv(T)
        compute = jax.jit(
            lambda q, k, v, at, name=name, score=score: KERNELS[name](q, k, v, at, at, score)
        )
        sizes.append(compute.lower(q, k, v, at).compile().memory_analysis().temp_size_in_bytes)
figure, axis = plt.subplots()
for name, sizes in memory.items():
    axis.loglog(LENGTHS, np.array(sizes) / 1e6, marker="o", label=name)
axis.set_xticks(LENGTHS, LENGTHS)
axis.minorticks_off()
axis.set_xlabel("tokens")
axis.set_ylabel("intermediate results, MB")
axis.legend()
plt.show()
assert all(size >= 4 * T**2 for size, T in zip(memory["dense"], LENGTHS, strict=True))
assert memory["blockwise"][-1] < 8 * memory["blockwise"][-3]
assert memory["blockwise"][-1] < memory["dense"][-1] / 5

# %% [markdown] key="backward" tags=["question"]
# ### Question: what about the backward pass?
#
# The gradient of attention needs the weights again. Does it not need the whole matrix after all?
#
# <details><summary>Answer</summary>
#
# No. The forward pass keeps one number for each query, m + log s. From it, each block of weights
# can be computed again when it is needed: exp(logits − (m + log s)). That costs one more matrix
# product and saves the memory of T² numbers; and since memory traffic, not arithmetic, is what
# limits attention, it is even faster.
#
# </details>

# %% [markdown] key="patterns" tags=["concept"]
# ## Looking at fewer tokens
#
# Flash saves memory, not work. To save work, some pairs must be left out. Three patterns, each with
# its reason:
#
# - a **window**: what matters is mostly near (Longformer, Mistral);
# - **strided**: the last few tokens, and every 16th before, so that two steps reach anything
# (Sparse Transformer);
# - **BigBird**: a window, a few global tokens that see and are seen by all, and some random pairs.
# Random graphs have short paths: any two tokens are a few layers apart.
#
# In the library each is a mask: a rule on positions. NumPy says the same of the window in one line.

# %%
T = 128
sparse = SparseConfig(window=16, stride=16, block=8, near=3, anchors=1, random=2)
cfg = ModelConfig(sparse=sparse, pattern=("window", "strided", "blocks"), context=T)
row = jnp.arange(T)[None]
at = Coords(row, jnp.ones_like(row))
masks = {
    name: np.asarray(make_layer_mask(cfg, name, "causal")(at, at)[0])
    for name in ("full", "window", "strided", "blocks")
}
back = np.arange(T)[:, None] - np.arange(T)[None]  # by how much the key is earlier
assert (masks["window"] == ((back >= 0) & (back < 16))).all()
assert (masks["strided"] == ((back >= 0) & ((back < 16) | (back % 16 == 0)))).all()

# %% [markdown] key="patterns-picture" tags=["picture"]
# ### Figure: four patterns
#
# The number is the share of all pairs before the diagonal that is computed.

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
shares = {name: mask.sum() / masks["full"].sum() for name, mask in masks.items()}
for axis, (name, mask) in zip(axes, masks.items(), strict=True):
    axis.imshow(mask, cmap="Blues", interpolation="nearest")
    axis.set_title(f"{'BigBird' if name == 'blocks' else name}: {shares[name]:.0%}", fontsize=9)
    axis.grid(False)
figure.tight_layout()
plt.show()
assert shares["window"] < shares["strided"] < 1

# %% [markdown] key="reach" tags=["exercise"]
# ### Exercise: how far does a window see?
#
# A layer with a window of W tokens (the token itself and W − 1 before it) passes information on.
# Write `reach(window, layers)`: how many tokens back can reach a token through so many layers? The
# check multiplies the masks.

# %% tags=["reader"]
reach = None  # replace None by your function: def reach(window, layers): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(window, layers):
    return layers * (window - 1)


reach = reach or solution

# %% tags=["check"]
path = np.eye(T, dtype=int)
for layers in range(1, 5):
    path = np.minimum(masks["window"].astype(int) @ path, 1)
    assert T - 1 - path[-1].argmax() == reach(16, layers)
print("right: four layers of 16 see", reach(16, 4), "tokens back")

# %% [markdown] key="linear" tags=["concept"]
# ## Linear attention: change the brackets
#
# Attention without its softmax is (Q Kᵀ) V. A product of three matrices may be bracketed the other
# way: Q (Kᵀ V). Kᵀ V is a matrix [K K], whatever the length of the text: the T² is gone. With a
# positive feature map φ in place of the softmax,
#
# ```text
# yₜ = φ(qₜ) · Σₛ φ(kₛ) vₛᵀ / (φ(qₜ) · Σₛ φ(kₛ))          sums over s ≤ t: a state that is updated token by token
# ```
#
# The Performer chooses random φ whose products are, on average, exp(q·k): it approximates softmax
# attention. First the brackets, then the approximation.

# %%
rng = np.random.default_rng(0)
q, k, v = rng.normal(size=(3, 64, 16)) * 0.7


def features(x):
    return np.maximum(x, 0) + 0.1


weights = np.tril(features(q) @ features(k).T)  # with all pairs
with_pairs = weights / weights.sum(1, keepdims=True) @ v

state, total, one_by_one = np.zeros((16, 16)), np.zeros(16), []
for q_t, k_t, v_t in zip(q, k, v, strict=True):  # with a state of fixed size
    state += np.outer(features(k_t), v_t)
    total += features(k_t)
    one_by_one.append(features(q_t) @ state / (features(q_t) @ total))
assert np.allclose(with_pairs, one_by_one)


def approximate(count):
    """Return the error of exp(q·k), relative, by so many random features of the library."""
    w = draw_feature_projections(count, 16)
    products = [np.exp(np.asarray(compute_log_features(jnp.asarray(x / 2), w))) for x in (q, k)]
    estimate, exact = products[0] @ products[1].T / count, np.exp(q @ k.T / 4)
    return np.linalg.norm(estimate - exact) / np.linalg.norm(exact)


errors = {count: approximate(count) for count in (16, 64, 256, 1024)}
print({count: f"{error:.0%}" for count, error in errors.items()})
assert errors[1024] < errors[16] / 3

# %% [markdown] key="mamba" tags=["concept"]
# ## Mamba: a state that chooses what to keep
#
# Linear attention adds everything to its state and forgets nothing. A state-space model forgets: h'
# = decay · h + update. In S4 the decay is fixed; in **Mamba** it depends on the token, through a
# step size Δ: a large step means "forget what was, write this down", a step of 0 means "nothing
# happened".
#
# ```text
# hₜ = exp(Δₜ A) hₜ₋₁ + Δₜ Bₜ uₜ          yₜ = Cₜ · hₜ
# ```
#
# As a loop this is slow on a parallel machine. But two such steps composed are a step of the same
# form, and what can be composed can be done in a tree, in log T rounds (an associative scan): that
# is the library's `selective_scan`.

# %%
T, I, Z = 40, 6, 4  # tokens, channels, numbers of state for each
rng = np.random.default_rng(1)
A = -np.exp(rng.normal(size=(I, Z)))
u, step = rng.normal(size=(T, I)), np.abs(rng.normal(size=(T, I)))
into, out = rng.normal(size=(2, T, Z))

h, by_loop = np.zeros((I, Z)), []
for t in range(T):
    h = np.exp(step[t][:, None] * A) * h + (step[t] * u[t])[:, None] * into[t]
    by_loop.append(h @ out[t])

arrays = [jnp.asarray(x, jnp.float32)[None] for x in (u, step, into, out)]
first = jnp.zeros((1, T), bool)
_, by_scan = selective_scan(jnp.asarray(A, jnp.float32), jnp.zeros((1, I, Z)), *arrays, first)
assert np.allclose(by_loop, by_scan[0], atol=1e-4)

# %% [markdown] key="cost" tags=["lab"]
# ## What it costs, measured
#
# One layer of each kind, the same width, a forward pass over longer and longer texts. These are
# times of this machine, which was busy with other things; only the slopes matter. In a picture with
# two logarithmic axes a cost of T² has slope 2, one of T slope 1.

# %%
KINDS = {
    "full, dense": dict(kernel="dense"),
    "full, blockwise": dict(kernel="blockwise"),
    "window of 64, blockwise": dict(
        pattern=("window",), sparse=SparseConfig(window=64), kernel="blockwise"
    ),
    "linear (Performer)": dict(mixers=("performer",)),
    "Mamba": dict(mixers=("mamba",), position="none"),
    "LSTM": dict(mixers=("lstm",), position="none"),
}


def measure_seconds(settings, T):
    """Return the shortest of eight passes over T tokens, in seconds."""
    cfg = ModelConfig(vocab=64, context=T, width=64, layers=1, heads=4, ffn=64, **settings)
    params, _ = init_params(cfg, jax.random.key(0))
    tokens = jnp.zeros((1, T), int)
    at = Coords(jnp.arange(T)[None], jnp.ones((1, T), int))
    run = jax.jit(lambda params: build(cfg).apply({"params": params}, tokens, at)[0])
    run(params).block_until_ready()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        run(params).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


lengths = (512, 1024, 2048, 4096)
seconds = {name: [measure_seconds(s, T) for T in lengths] for name, s in KINDS.items()}

# %% [markdown] key="cost-picture" tags=["picture"]
# ### Figure: cost against length
#
# Dense attention may rise even faster than its slope of 2, where its matrix no longer fits the
# processor's cache.

# %%
figure, axis = plt.subplots(figsize=(7, 3.6))
for name, values in seconds.items():
    slope = np.log2(values[-1] / values[-3]) / 2  # of the last two doublings
    axis.loglog(lengths, 1000 * np.array(values), marker="o", label=f"{name}: slope {slope:.1f}")
axis.set_xticks(lengths, lengths)
axis.minorticks_off()
axis.set_xlabel("tokens")
axis.set_ylabel("milliseconds")
axis.legend(fontsize=7)
plt.show()

# %% [markdown] key="cost-question" tags=["question"]
# ### Question: why has linear attention not won?
#
# It is cheaper for long texts. Why do most large models still use softmax attention?
#
# <details><summary>Answer</summary>
#
# A state of fixed size cannot hold a long text: what was not foreseen to matter is lost. Softmax
# attention keeps every key and value and can look up any of them exactly, as the induction heads of
# notebook 13 do. Besides, up to some thousand tokens the feed-forward layers cost more than
# attention anyway. What is used are mixtures: most layers with a window or Mamba, a few with full
# attention (`model.mixers=mamba,attention`).
#
# </details>

# %% [markdown] key="rnn" tags=["concept"]
# ## The baseline: recurrent networks, and the gradient that vanishes
#
# Before 2017 a text was read by one state that was updated at each token: h' = tanh(W h + U x). To
# learn that the first word matters for the last, the gradient has to come back through every step,
# and each step multiplies it by the same kind of matrix, tanh'·W. If that shrinks a vector to 0.8
# of its length, then 50 steps leave 0.8⁵⁰ = 0.00001 (Hochreiter 1991, Bengio et al. 1994). The loop
# below carries the gradient back by hand; `jax.grad` agrees.

# %%
assert round(0.8**50, 5) == 0.00001
D, T = 16, 50
rng = np.random.default_rng(0)
W = 0.8 * np.linalg.qr(rng.normal(size=(D, D)))[0]  # every vector shrinks to 0.8 of its length
x = 0.5 * rng.normal(size=(T, D))

states = [np.zeros(D)]
for t in range(T):
    states.append(np.tanh(W @ states[-1] + x[t]))
gradient, by_hand = np.ones(D), []  # of the sum of the last state
for t in reversed(range(T)):
    gradient = (1 - states[t + 1] ** 2) * gradient  # through tanh: by x[t]
    by_hand.insert(0, np.linalg.norm(gradient))
    gradient = W.T @ gradient


def last_state(x):
    return jax.lax.scan(lambda h, x: (jnp.tanh(jnp.asarray(W) @ h + x), None), jnp.zeros(D), x)[
        0
    ].sum()


by_jax = jnp.linalg.norm(jax.grad(last_state)(jnp.asarray(x)), axis=-1)
assert np.allclose(by_hand, by_jax, rtol=1e-3, atol=1e-9)
assert by_hand[0] < 1e-4 * by_hand[-1]

# %% [markdown] key="gates" tags=["concept"]
# ## Gates, and attention
#
# The LSTM's answer is a second state that is *added to*: c' = f c + i g. Where the forget gate f is
# 1, the gradient passes unchanged; at 0.7 it is soon gone. That is a residual connection through
# time, with a tap. Attention's answer is to do without the way back: every token is one step from
# every other. `inspect.gradient_by_position` measures it in any model: how strongly does the loss
# of the last token depend on the input at each place?


# %%
def measure_gradient(mixer, T=64):
    """Return the gradient norms by position of a new model of one layer, over its last but one."""
    position = "none" if mixer != "attention" else "rope"
    tokenizer = make_byte_tokenizer()
    cfg = ModelConfig(
        vocab=tokenizer.vocab_size, context=T, width=64, layers=1, heads=4, ffn=64,
        mixers=(mixer,), position=position,
    )  # fmt: skip
    params, _ = init_params(cfg, jax.random.key(0))
    model = LanguageModel(dataclasses.replace(Config(), model=cfg), params, tokenizer)
    text = "the state remembers what it read, but the gradient does not"
    norms = inspect.gradient_by_position(model, text)
    return norms[:-1] / norms[-2]  # the last token is what is predicted


gradients = {mixer: measure_gradient(mixer) for mixer in ("lstm", "gru", "mamba", "attention")}
for mixer, norms in gradients.items():
    print(f"{mixer:9}  first {norms[1]:.1e}  ten back {norms[-11]:.1e}  one back {norms[-2]:.1e}")

# %% [markdown] key="vanishing" tags=["picture"]
# ### Figure: how far back a loss reaches
#
# Relative to the last place that is read. A new LSTM forgets by a constant factor per token, a
# straight line in logarithms. A new attention layer looks at all tokens alike: the line is flat.
# Mamba sees four tokens through its convolution, and behind them a small state that hardly forgets.

# %%
figure, axis = plt.subplots()
for mixer, norms in gradients.items():
    axis.semilogy(np.arange(len(norms)) - len(norms) + 1, norms, label=mixer)
rnn = np.array(by_hand) / by_hand[-1]
axis.semilogy(
    np.arange(len(rnn)) - len(rnn) + 1, rnn, "--", color="gray", label="plain RNN, by hand"
)
axis.set_xlabel("position, from the last one that is read")
axis.set_ylabel("gradient norm, relative")
axis.legend(fontsize=7)
plt.show()
distance = {mixer: norms[1] / norms[-11] for mixer, norms in gradients.items()}
assert distance["lstm"] < 1e-3
assert distance["gru"] < 1e-3
assert distance["attention"] > 0.1

# %% [markdown] key="forget" tags=["exercise"]
# ### Exercise: a better forget gate
#
# The forget gate of a new LSTM is σ(1) = 0.73, from a bias of 1. Which bias `b` lets half of the
# gradient of the cell pass through 100 tokens? (σ(b)¹⁰⁰ = 0.5)

# %% tags=["reader"]
b = None  # replace None by a number


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution():
    gate = 0.5 ** (1 / 100)
    return np.log(gate / (1 - gate))


b = b or solution()

# %% tags=["check"]
assert np.isclose((1 / (1 + np.exp(-b))) ** 100, 0.5, atol=0.01)
print(f"right: b = {b:.2f}")
