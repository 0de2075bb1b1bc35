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
# # 1. The mathematics of a language model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/01_mathematics.ipynb)
#
# A language model is a function that turns the tokens so far into a probability for each token that
# may come next. Everything it knows is in its weights, and the weights were found by going downhill
# on one number, the loss. This notebook is about that sentence: the arrays that flow through the
# model, the probabilities that come out, the number that measures them, and the ways downhill.
#
# Nothing here needs more than school mathematics and NumPy. Each idea is written out in a few lines,
# and then held against the function of the library that does the same: where you see an `assert`, the
# two are equal.

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
import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import inspect, measure, objectives, optimizer
from jaxgpt.config import OptimizerConfig
from jaxgpt.model.heads import Head

# %% [markdown] key="tensors" tags=["concept"]
# ## Tensors, and letters for their axes
#
# A *tensor* is an array of numbers with any number of axes: a vector has one, a matrix two. In a
# Transformer each axis has a meaning, and this library gives each meaning one letter everywhere: B
# for the texts of a batch, T for the tokens of a text, D for the width of the vectors, V for the
# vocabulary. A batch of 2 texts of 5 tokens, as vectors of 8 numbers, is an array [B T D] of shape
# (2, 5, 8).
#
# Nearly all the work of a model is one operation: multiply along a shared axis and sum over it.
# `einsum` writes it with the letters: `"BTD,DV->BTV"` takes each token's vector (D) to scores over
# the vocabulary (V), and leaves batch and tokens alone.

# %%
rng = np.random.default_rng(0)
B, T, D, V = 2, 5, 8, 11
x = rng.normal(size=(B, T, D))
table = rng.normal(size=(D, V))
scores = np.einsum("BTD,DV->BTV", x, table)
print(scores.shape)

by_hand = np.zeros((B, T, V))
for b in range(B):
    for t in range(T):
        for v in range(V):
            by_hand[b, t, v] = sum(x[b, t, d] * table[d, v] for d in range(D))
assert np.allclose(scores, by_hand) and np.allclose(scores, x @ table)

# %% [markdown] key="norms" tags=["concept"]
# ## Norms: how large is a vector?
#
# Three answers are in use. The 2-norm is the length of Pythagoras, the 1-norm sums the absolute values,
# and the ∞-norm takes the largest of them. Clipping of gradients looks at the 2-norm of all gradients
# together; weight decay pulls on the 2-norm of the weights.

# %%
v = np.array([3.0, -4.0, 12.0])
assert measure.norm(v) == np.sqrt((v**2).sum()) == 13
assert measure.norm(v, 1) == np.abs(v).sum() == 19
assert measure.norm(v, math.inf) == np.abs(v).max() == 12
print("2-norm 13, 1-norm 19, ∞-norm 12")

# %% [markdown] key="similarity" tags=["concept"]
# ## Similarity: do two vectors point the same way?
#
# Attention, nearest neighbors and retrieval all rest on the *dot product* x·y = Σ xᵢyᵢ. It grows with
# the angle's cosine and with both lengths. Divided by the lengths it is the *cosine similarity*,
# between -1 and 1, which asks for the direction only. The *Euclidean distance* |x - y| asks how far
# apart the tips are; of vectors of length 1 it orders pairs as the cosine does, since |x - y|² = 2 -
# 2 cos.


# %%
def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


x, y = rng.normal(size=(2, 16))
assert np.isclose(cosine(x, y), measure.cosine_similarity(x, y))
assert np.isclose(measure.euclidean_distance(x, y), np.sqrt(((x - y) ** 2).sum()))
x, y = x / measure.norm(x), y / measure.norm(y)
assert np.isclose(measure.euclidean_distance(x, y) ** 2, 2 - 2 * cosine(x, y))
print(f"cosine {cosine(x, y):.3f}")

# %% [markdown] key="word-vectors" tags=["example"]
# ### Example: words by the company they keep
#
# Before there were learned embeddings, there was counting. Take a text, here the language reference
# that comes with every Python, and count for each word which words stand within four places of it.
# Each count becomes the logarithm of how much more often the pair occurs than by chance (negative
# values become 0). The row of a word is its vector, and words that are used alike get similar rows,
# although nobody said what any of them means.

# %%
from pydoc_data.topics import topics

words = re.findall(r"[a-z]+", " ".join(topics.values()).lower())
common = [word for word, _ in collections.Counter(words).most_common(1500)]
index = {word: i for i, word in enumerate(common)}
ids = np.array([index.get(word, -1) for word in words])
counts = np.zeros((len(common), len(common)))
for distance in range(1, 5):
    left, right = ids[:-distance], ids[distance:]
    both = (left >= 0) & (right >= 0)
    np.add.at(counts, (left[both], right[both]), 1)
counts += counts.T
expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
vectors = np.log(np.maximum(counts / np.maximum(expected, 1e-9), 1))
print(f"{len(words):,} words; a vector for each of the {len(common):,} most common")


def nearest(word, count=4):
    similar = measure.cosine_similarity(vectors[index[word]], vectors)
    return [common[i] for i in np.argsort(-similar)[1 : count + 1]]


for word in ["integer", "raised", "class", "bytes"]:
    print(f"{word:10}", ", ".join(nearest(word)))

# %% [markdown] key="similarity-picture" tags=["picture"]
# #### Figure: a matrix of similarities
#
# `inspect.similarity_matrix` computes the cosine of every pair at once. Blocks along the diagonal are
# groups of words that are used alike.

# %%
shown = ["integer", "floating", "complex", "list", "tuple", "set", "class", "method", "attribute"]
shown += ["raised", "exception", "except"]
rows = vectors[[index[word] for word in shown]]
matrix = inspect.similarity_matrix(rows)
assert np.allclose(matrix, [[cosine(a, b) for b in rows] for a in rows], atol=1e-6)
figure, axis = plt.subplots(figsize=(5.5, 4.2))
image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=0.5)
axis.set_xticks(range(len(shown)), shown, rotation=90)
axis.set_yticks(range(len(shown)), shown)
axis.grid(False)
figure.colorbar(image, label="cosine similarity")
plt.show()

# %% [markdown] key="similarity-question" tags=["question"]
# ### Question: dot product or cosine?
#
# Attention scores a key by the dot product with the query, not by the cosine. What can a key do with
# its length that it could not do under the cosine?
#
# <details><summary>Answer</summary>
#
# It can ask for more attention from every query that points its way, or, if it is short, for little
# attention either way. Under the cosine only the direction would count and every key would be equally
# loud. (Some models normalize queries and keys all the same, *QK-norm*, because lengths that grow
# without limit make training unstable.)
#
# </details>

# %% [markdown] key="softmax" tags=["concept"]
# ## Softmax: from scores to probabilities
#
# The last layer of a model gives one real number for each token of the vocabulary, its *logit*. Logits
# may be negative and sum to anything. Softmax makes probabilities of them:
#
# ```text
# softmax(z)ᵢ = exp(zᵢ) / Σⱼ exp(zⱼ)
# ```
#
# The exponential makes every number positive, the division makes them sum to 1, and the order is kept.
# What counts is differences only: adding the same constant to all logits multiplies numerator and
# denominator by the same factor. So we may subtract the largest logit first, and then no exponential
# can overflow.


# %%
def softmax(z):
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# %% [markdown] key="cat" tags=["example"]
# ### Example: what comes after "the cat"
#
# A tiny model knows three continuations and gives them the logits 0.2, 0.8 and 0.5. By hand:
# exp(0.2) = 1.221, exp(0.8) = 2.226, exp(0.5) = 1.649, together 5.096, and so the probabilities are
# .240, .437 and .324.

# %%
logits = np.array([0.2, 0.8, 0.5])  # sleeps, eats, runs
probabilities = softmax(logits)
print(dict(zip(["sleeps", "eats", "runs"], probabilities.round(3).tolist(), strict=True)))
assert np.allclose(probabilities, [0.240, 0.437, 0.324], atol=5e-4)
assert np.allclose(probabilities, measure.softmax(logits))
assert np.allclose(probabilities, softmax(logits + 1000))  # no overflow, and nothing changes

# %% [markdown] key="temperature-picture" tags=["picture"]
# #### Figure: temperature
#
# Dividing the logits by a temperature before the softmax sharpens the distribution (below 1) or
# flattens it (above 1). Near 0 only the largest logit is left; at infinity all tokens are equally
# likely.

# %%
temperatures = [0.1, 0.3, 1.0, 3.0, 100.0]
figure, axis = plt.subplots()
for k, temperature in enumerate(temperatures):
    axis.bar(
        np.arange(3) + 0.16 * (k - 2),
        measure.softmax(logits, temperature),
        0.15,
        label=f"T = {temperature:g}",
    )
axis.set_xticks(range(3), ["sleeps", "eats", "runs"])
axis.set_ylabel("probability")
axis.legend(ncol=5, fontsize=8, loc="upper center")
axis.set_ylim(0, 1.15)
plt.show()

# %% [markdown] key="log-softmax" tags=["exercise"]
# ### Exercise: the logarithm of the softmax
#
# Training needs log-probabilities. `np.log(softmax(z))` is -inf as soon as a probability underflows to
# 0. Write `log_softmax(z)` so that it is right for logits such as 0 and -2000.

# %% tags=["reader"]
log_softmax = None  # replace None by your function: def log_softmax(z): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(z):
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


log_softmax = log_softmax or solution

# %% tags=["check"]
assert np.allclose(log_softmax(logits), np.log(probabilities))
assert np.allclose(log_softmax(np.array([0.0, -2000.0])), [0, -2000])
print("right")

# %% [markdown] key="softmax-question" tags=["question"]
# ### Question: what does a logit of zero mean?
#
# A model gives a token the logit 0. How likely is the token?
#
# <details><summary>Answer</summary>
#
# That cannot be said. Only differences of logits have a meaning: 0 is likely where all others are
# -5, and unlikely where another is 5. What can be said is the *ratio* of two probabilities, which is
# the exponential of the difference of their logits.
#
# </details>

# %% [markdown] key="entropy" tags=["concept"]
# ## Entropy: how uncertain is a distribution?
#
# An event of probability p carries -log p of surprise: none if it was certain, much if it was rare. The
# *entropy* is the surprise that is to be expected:
#
# ```text
# H(p) = - Σ pᵢ log pᵢ
# ```
#
# With the logarithm to base 2 it counts bits, that is, yes-or-no questions; with the natural logarithm
# *nats*, which training uses. It is largest when all outcomes are equally likely, and then it is the
# logarithm of their number.


# %%
def entropy(p):
    p = p[p > 0]  # 0 log 0 is 0
    return -(p * np.log2(p)).sum()


uniform = np.full(1000, 1 / 1000)
peaked = np.array([0.9, 0.05, 0.05])
assert np.isclose(entropy(uniform), 9.9658, atol=5e-5)
assert np.isclose(entropy(peaked), 0.5690, atol=5e-5)
for p in (uniform, peaked):
    assert np.isclose(entropy(p), measure.entropy(p, base=2))
print(f"1000 equally likely words: {entropy(uniform):.4f} bits; one of 90%: {entropy(peaked):.4f}")

# %% [markdown] key="entropy-picture" tags=["picture"]
# #### Figure: the entropy of a coin
#
# A coin that falls heads with probability p has at most one bit, at p = 1/2. A coin that always falls
# the same way tells nothing new.

# %%
p = np.linspace(0, 1, 201)
figure, axis = plt.subplots(figsize=(6, 2.6))
axis.plot(p, measure.entropy(np.stack([p, 1 - p], -1), base=2))
axis.set_xlabel("probability of heads")
axis.set_ylabel("entropy, bits")
plt.show()

# %% [markdown] key="cross-entropy" tags=["concept"]
# ## Cross-entropy and KL divergence
#
# Texts come from a distribution p that nobody knows; the model has its own, q. The surprise of the
# model, averaged over what really happens, is the *cross-entropy*:
#
# ```text
# H(p, q) = - Σ pᵢ log qᵢ = H(p) + KL(p ‖ q)
# ```
#
# The first part is the uncertainty of language itself, which no model removes. The second, the
# *Kullback-Leibler divergence*, is what the model loses by not being p. It is never negative and is 0
# only if q = p, so a model that minimizes the cross-entropy is driven towards the truth. It is no
# distance: it has a direction, and is infinite where q excludes what p allows.

# %%
p = np.array([0.7, 0.2, 0.1])  # what really follows
q = np.array([0.5, 0.3, 0.2])  # what the model expects
crossed = -(p * np.log(q)).sum()
assert np.isclose(crossed, measure.cross_entropy(p, q))
assert np.isclose(crossed, measure.entropy(p) + measure.kl_divergence(p, q))
assert measure.kl_divergence(p, q) != measure.kl_divergence(q, p)
assert measure.kl_divergence([0.5, 0.5], [1.0, 0.0]) == math.inf
print(
    f"H(p, q) {crossed:.4f} = H(p) {measure.entropy(p):.4f} + KL {measure.kl_divergence(p, q):.4f}"
)

# %% [markdown] key="perplexity" tags=["concept"]
# ## Perplexity
#
# Perplexity is the exponential of the cross-entropy per token: the number of equally likely tokens
# among which one would be as unsure as the model is. A loss of 3.33 nats is a perplexity of 28. It
# depends on what a token is: never compare the perplexities of two models with different tokenizers.
# Bits per byte can be compared, since a byte is the same for all.

# %%
assert np.isclose(measure.perplexity(measure.entropy(uniform)), 1000)
assert np.isclose(measure.perplexity(3.33), math.exp(3.33))
print(f"exp(3.33) = {measure.perplexity(3.33):.1f}")

# %% [markdown] key="kl-exercise" tags=["exercise"]
# ### Exercise: KL divergence
#
# Write `kl(p, q)` in nats for two arrays of probabilities. Where p is 0 the term counts nothing,
# whatever q is there.

# %% tags=["reader"]
kl = None  # replace None by your function: def kl(p, q): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(p, q):
    p, q = np.asarray(p), np.asarray(q)
    some = p > 0
    return (p[some] * np.log(p[some] / q[some])).sum()


kl = kl or solution

# %% tags=["check"]
for a, b in [(p, q), (q, p), (p, p), ([0, 1], [0.5, 0.5]), ([0, 0.4, 0.6], [0, 0.5, 0.5])]:
    assert np.isclose(kl(np.array(a), np.array(b)), measure.kl_divergence(a, b))
print("right")

# %% [markdown] key="entropy-question" tags=["question"]
# ### Question: can the loss reach zero?
#
# A language model of perfect text understanding is trained on an endless stream of new text. Which
# value does its loss approach?
#
# <details><summary>Answer</summary>
#
# The entropy of the text per token, which is above zero: many sentences can go on in more than one way.
# A loss that falls towards 0 on the training text means that the model has learned that text by heart;
# the loss on held-out text tells.
#
# </details>

# %% [markdown] key="loss-lab" tags=["lab"]
# ## Lab: the loss of a language model, against references
#
# The target of a token is a single next token, so p is 1 there and 0 elsewhere, and the cross-entropy
# is -log q(target), averaged over the tokens. In the lab we write it in NumPy, with its gradient by
# the logits, and hold it against two others: optax's function, and the library's `vocabulary_loss`,
# which never has the scores of all tokens in memory at once.
#
# The gradient is the nicest formula of this field: *probabilities minus truth*, softmax(z) - y.

# %%
N, V = 32, 50
logits = rng.normal(size=(N, V)) * 3
targets = rng.integers(V, size=N)
one_hot = np.eye(V)[targets]

log_q = log_softmax(logits)
loss = -(one_hot * log_q).sum(-1).mean()
gradient = (softmax(logits) - one_hot) / N


def reference(z):
    return optax.softmax_cross_entropy_with_integer_labels(z, jnp.asarray(targets)).mean()


def library(z, smoothing=0.0):
    """The hidden states are the logits and the output matrix is the identity: scores are z."""
    hidden, head = z[None], Head(jnp.eye(V))
    rows = jnp.asarray(targets)[None], jnp.ones((1, N))
    return objectives.vocabulary_loss(hidden, head, *rows, smoothing=smoothing)[0] / N


for function in (reference, library):
    value, by_autodiff = jax.value_and_grad(function)(jnp.asarray(logits, jnp.float32))
    assert np.isclose(value, loss, rtol=1e-5)
    assert np.allclose(by_autodiff, gradient, atol=1e-6)
print(f"loss {loss:.4f}; largest entry of the gradient {np.abs(gradient).max():.4f}")

# %% [markdown] key="smoothing" tags=["concept"]
# ## Label smoothing
#
# A target of exactly 1 asks for a logit that is infinitely larger than all others. *Label smoothing*
# asks for less: the truth gets a little under 1 and the rest is spread. Two formulas are in use, and
# texts mix them up. With K = 4 classes and ε = 0.1:
#
# | formula | the truth | each other |
# |---|---|---|
# | 1 - ε, and ε / (K - 1) for the others | .9 | .0333 |
# | (1 - ε) y + ε / K for all (Szegedy et al. 2016; the library, PyTorch) | .925 | .025 |
#
# A text that prints the first formula must give .9 and .0333. They are the same family: the first with
# ε is the second with ε K / (K - 1).

# %%
K, eps = 4, 0.1
own = np.where(np.eye(K)[0] == 1, 1 - eps, eps / (K - 1))
szegedy = (1 - eps) * np.eye(K)[0] + eps / K
assert np.allclose(own, [0.9, 0.0333, 0.0333, 0.0333], atol=5e-5)
assert np.allclose(szegedy, [0.925, 0.025, 0.025, 0.025])
wider = eps * K / (K - 1)
assert np.allclose(own, (1 - wider) * np.eye(K)[0] + wider / K)

smooth = (1 - eps) * one_hot + eps / V  # the lab's targets
assert np.isclose(library(jnp.asarray(logits, jnp.float32), eps), -(smooth * log_q).sum(-1).mean())
print(own.round(4), szegedy)

# %% [markdown] key="landscape" tags=["concept"]
# ## The loss landscape
#
# For each setting of the weights there is a loss: a landscape over as many dimensions as there are
# weights. The gradient points uphill; training walks the other way. A network of two weights,
# f(x) = w₂ tanh(w₁ x), can be drawn. Its landscape is not a bowl: there are two equally good valleys,
# since flipping both signs changes nothing, with a *saddle* between them at the origin, where the
# gradient is 0 and the loss is not the smallest. Networks have such symmetries in abundance, which is
# why their weights begin at random numbers and never at zeros.

# %% [markdown] key="landscape-picture" tags=["picture"]
# #### Figure: two valleys and a saddle
#
# Gradient descent from four starting points ends in one valley or the other.

# %%
inputs = np.linspace(-2, 2, 41)
wanted = 1.5 * np.tanh(1.2 * inputs)


def two_weights(w):
    return jnp.mean((w[1] * jnp.tanh(w[0] * inputs) - wanted) ** 2) / 2


grid = np.linspace(-3, 3, 121)
first, second = np.meshgrid(grid, grid)
height = jax.vmap(two_weights)(jnp.stack([first.ravel(), second.ravel()], -1)).reshape(121, 121)
slope = jax.jit(jax.grad(two_weights))
figure, axis = plt.subplots(figsize=(5.5, 4.2))
levels = np.quantile(np.asarray(height), np.linspace(0, 1, 25))
image = axis.contourf(first, second, height, np.unique(levels), cmap="viridis_r")
ends = []
for start in [(0.3, -0.2), (-0.2, 0.1), (2.5, -2.0), (-2.5, 1.5)]:
    path = [np.array(start)]
    for _ in range(1000):
        path.append(path[-1] - 0.3 * np.asarray(slope(path[-1])))
    ends.append(path[-1])
    axis.plot(*np.transpose(path), color="white", linewidth=1.2)
    axis.plot(*start, "o", color="black", markersize=4)
    axis.plot(*path[-1], "*", color="tab:red", markersize=11)
axis.set_xlabel("w₁")
axis.set_ylabel("w₂")
figure.colorbar(image, label="loss", format="%.2f")
plt.show()
assert all(two_weights(end) < 0.01 and end[0] * end[1] > 0 for end in ends)  # the valleys
assert np.allclose(slope(np.zeros(2)), 0)  # the saddle
assert two_weights(np.zeros(2)) > 0.5

# %% [markdown] key="optimizers" tags=["concept"]
# ## Five ways downhill
#
# All rules take the gradient g of the loss and move against some version of it.
#
# | rule | what it remembers | step |
# |---|---|---|
# | SGD | nothing | - lr · g |
# | momentum | m ← β₁ m + g | - lr · m |
# | RMSprop | v ← β₂ v + (1 - β₂) g² | - lr · g / (√v + ε) |
# | Adam | m and v, both averages, corrected for starting at 0 | - lr · m̂ / (√v̂ + ε) |
# | AdamW | as Adam | - lr · (m̂ / (√v̂ + ε) + λ w) |
#
# Momentum averages out the zigzag across a narrow valley. RMSprop and Adam give each weight its own
# step size, so that a weight with small gradients moves as fast as one with large ones. AdamW pulls
# the weights towards 0 beside the gradient's direction and not through it, where v would divide the
# pull away.


# %%
def sgd(w, g, s, c):
    return w - c.lr * g, s


def momentum(w, g, s, c):
    s["m"] = c.b1 * s.get("m", 0) + g
    return w - c.lr * s["m"], s


def rmsprop(w, g, s, c):
    s["v"] = c.b2 * s.get("v", 0) + (1 - c.b2) * g**2
    return w - c.lr * g / (np.sqrt(s["v"]) + c.eps), s


def adam(w, g, s, c, decay=0.0):
    s["t"] = s.get("t", 0) + 1
    s["m"] = c.b1 * s.get("m", 0) + (1 - c.b1) * g
    s["v"] = c.b2 * s.get("v", 0) + (1 - c.b2) * g**2
    m, v = s["m"] / (1 - c.b1 ** s["t"]), s["v"] / (1 - c.b2 ** s["t"])
    return w - c.lr * (m / (np.sqrt(v) + c.eps) + decay * w), s


def adamw(w, g, s, c):
    return adam(w, g, s, c, c.weight_decay)


# %% [markdown] key="optimizers-lab" tags=["lab"]
# ### Lab: the five rules in the same valley
#
# Least squares with two inputs of which one is eight times as large as the other: the valley is steep
# across and nearly flat along. We walk it with our five rules and with those of `jaxgpt.optimizer`, and
# the two paths must be the same.

# %%
data = rng.normal(size=(200, 2)) * [1, 8] @ np.array([[1, 0.3], [0, 1]])
answers = data @ np.array([1.5, -0.5]) + 0.1 * rng.normal(size=200)


def valley(w):
    return jnp.mean((jnp.asarray(data) @ w - jnp.asarray(answers)) ** 2) / 2


valley_slope = jax.jit(jax.grad(valley))
rules = {  # the rule in NumPy, and its settings
    "sgd": (sgd, dict(lr=0.025)),
    "momentum": (momentum, dict(lr=0.004)),
    "rmsprop": (rmsprop, dict(lr=0.05, b2=0.9)),
    "adam": (adam, dict(lr=0.1)),
    "adamw": (adamw, dict(lr=0.1, weight_decay=0.3)),
}
steps, start = 120, np.array([[-2.0], [2.0]])  # a matrix of one column: only matrices decay
paths = {}
for name, (rule, settings) in rules.items():
    plain = dict(schedule="warmup_constant", warmup=0, clip=0.0)
    config = OptimizerConfig(name=name, **{"weight_decay": 0.0, **plain, **settings})
    ours, state = start.copy(), {}
    library_rule, _ = optimizer.build(config, steps, {"w": "D>F"})
    theirs = {"w": jnp.asarray(start)}
    their_state = library_rule.init(theirs)
    update = jax.jit(library_rule.update)
    path, their_path = [ours[:, 0]], [ours[:, 0]]
    for _ in range(steps):
        ours, state = rule(ours, np.asarray(valley_slope(ours[:, 0]))[:, None], state, config)
        grads = {"w": valley_slope(theirs["w"][:, 0])[:, None]}
        updates, their_state = update(grads, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        path.append(ours[:, 0])
        their_path.append(theirs["w"][:, 0])
    assert np.allclose(path[:60], their_path[:60], atol=2e-3), name
    paths[name] = np.array(path)
    print(f"{name:9} ends at {path[-1].round(3)}, loss {valley(path[-1]):.4f}")

# %% [markdown] key="optimizers-picture" tags=["picture"]
# #### Figure: the paths, and the loss by step
#
# SGD bounces across and creeps along; momentum overshoots and swings back; RMSprop and Adam go for both
# weights at once. AdamW is held back a little on the side of 0 by its decay.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
first, second = np.meshgrid(np.linspace(-2.5, 2.5, 80), np.linspace(-2.5, 2.5, 80))
height = jax.vmap(valley)(jnp.stack([first.ravel(), second.ravel()], -1)).reshape(80, 80)
left.contour(first, second, np.log(height), 18, cmap="Greys", linewidths=0.7)
for name, path in paths.items():
    left.plot(*path.T, marker=".", markersize=3, linewidth=1, label=name)
    right.plot(jax.vmap(valley)(jnp.asarray(path)), label=name)
left.plot(1.5, -0.5, "*", color="black", markersize=10)
left.set_xlabel("w₁")
left.set_ylabel("w₂")
right.set_yscale("log")
right.set_xlabel("step")
right.set_ylabel("loss")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown] key="rate-exercise" tags=["exercise"]
# ### Exercise: the largest learning rate
#
# On a quadratic loss, SGD multiplies the error along each eigenvector of the Hessian by 1 - lr · λ. It
# converges while all these factors are between -1 and 1. The Hessian of the valley is XᵀX / N, with X
# the array `data` [N 2]. Compute the largest learning rate, `largest_rate`, below which SGD converges.

# %% tags=["reader"]
largest_rate = None  # replace None by your number

# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
solution = 2 / np.linalg.eigvalsh(data.T @ data / len(data)).max()
largest_rate = largest_rate or solution


# %% tags=["check"]
def descend(rate, steps=2000):
    w = np.array([-2.0, 2.0])
    for _ in range(steps):
        w = w - rate * data.T @ (data @ w - answers) / len(data)
    return np.abs(w).max()


assert descend(0.99 * largest_rate) < 3 and descend(1.01 * largest_rate) > 1000
print(f"largest rate {largest_rate:.4f}")

# %% [markdown] key="schedule" tags=["concept"]
# ## Warmup and cosine
#
# The learning rate is not held constant. It rises linearly for a few steps, the *warmup*, because the
# first gradients are large and Adam's averages are still unreliable. Then it falls along half a
# cosine to a tenth of its peak: wide steps to get far, small steps to settle.


# %%
def warmup_cosine(step, peak, warmup, steps, floor=0.1):
    t = step + 1  # papers count from 1
    if t < warmup:
        return peak * t / warmup
    progress = (t - warmup) / (steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


config = OptimizerConfig(lr=1e-3, warmup=100)
schedule = optimizer.warmup_cosine(config, 2000)
ours = [warmup_cosine(step, 1e-3, 100, 2000) for step in range(2000)]
assert np.allclose(jax.vmap(schedule)(jnp.arange(2000)), ours, rtol=1e-4)

# %% [markdown] key="schedule-picture" tags=["picture"]
# #### Figure: four schedules
#
# All are in `optimizer.SCHEDULES`, by name.

# %%
figure, axis = plt.subplots()
for name in ["warmup_cosine", "warmup_linear", "warmup_stable_decay", "inverse_sqrt"]:
    axis.plot(jax.vmap(optimizer.SCHEDULES[name](config, 2000))(jnp.arange(2000)), label=name)
axis.set_xlabel("step")
axis.set_ylabel("learning rate")
axis.legend()
plt.show()

# %% [markdown] key="schedule-question" tags=["question"]
# ### Question: half of a run
#
# A run with a cosine over 2000 steps is stopped after 1000. Why is its loss worse than that of a run
# that was planned for 1000 steps?
#
# <details><summary>Answer</summary>
#
# At step 1000 of 2000 the learning rate is still about 57% of its peak: the weights jump about in the
# valley and have not settled. The run planned for 1000 steps has just ended its descent to a tenth.
# This is why the intermediate points of one long cosine run must not be used to fit scaling laws, and
# it is what `warmup_stable_decay` is good for: its last stretch can begin at any time.
#
# </details>

# %% [markdown] key="bias-variance" tags=["concept"]
# ## Bias and variance
#
# A model may fail on new data in two ways. If it is too stiff, it misses the truth on average,
# however much data it sees: *bias*. If it is too loose, it follows the noise, and another sample
# would have given another model: *variance*. For squared errors the two add up exactly, with the
# noise that nobody can predict:
#
# ```text
# E[(y - f̂(x))²] = noise² + (E[f̂(x)] - f(x))² + Var[f̂(x)]
# ```

# %% [markdown] key="bias-variance-lab" tags=["lab"]
# ### Lab: measure both
#
# We fit polynomials of degree 0 to 9 to 25 points of a sine, many times with new noise, and look at the
# mean and the spread of the fits.


# %%
def truth(x):
    return np.sin(2 * np.pi * x)


noise, repeats = 0.3, max(100, round(400 * scale))
x, at = np.linspace(0, 1, 25), np.linspace(0, 1, 101)
bias2, variance, error = [], [], []
for degree in range(10):
    fits = []
    for _ in range(repeats):
        y = truth(x) + noise * rng.normal(size=25)
        fits.append(np.polynomial.Polynomial.fit(x, y, degree, domain=[0, 1])(at))
    fits = np.array(fits)
    bias2.append(((fits.mean(0) - truth(at)) ** 2).mean())
    variance.append(fits.var(0).mean())
    error.append(((fits - truth(at)) ** 2).mean())
assert np.allclose(error, np.add(bias2, variance))  # the decomposition is exact
best = int(np.argmin(error))
assert bias2[0] > 10 * bias2[5] and variance[9] > 1.6 * variance[3] and 3 <= best <= 6
print(f"the best degree is {best}")

# %% [markdown] key="bias-variance-picture" tags=["picture"]
# #### Figure: the two errors against the degree
#
# The bias falls, the variance rises, and their sum has its lowest point between. Large networks are
# beyond this picture in an interesting way: far past the point where they can fit all noise, the error
# often falls a second time (*double descent*).

# %%
figure, axis = plt.subplots()
axis.plot(bias2, "o-", label="bias²")
axis.plot(variance, "o-", label="variance")
axis.plot(error, "o-", color="black", label="sum")
axis.set_yscale("log")
axis.set_xlabel("degree of the polynomial")
axis.legend()
plt.show()

# %% [markdown] key="early-stopping" tags=["concept"]
# ## Early stopping
#
# A large model passes through the good fits on its way to the bad ones: gradient descent finds the
# broad shape first and the noise last. So one measures the loss on held-out data now and then, keeps
# the best weights, and stops when there was no improvement for some number of measurements, the
# *patience*. In the library it is `train.patience`, and the best checkpoint is always kept.


# %%
def features(x):  # slow waves are large, fast ones small: the slow ones are learned first
    k = np.arange(40)
    return np.cos(np.pi * k * x[:, None]) / (k + 1)


rng = np.random.default_rng(3)
x, held_x = rng.uniform(size=30), rng.uniform(size=200)
y, held_y = (truth(a) + 0.5 * rng.normal(size=len(a)) for a in (x, held_x))
rows, held_rows, w = features(x), features(held_x), np.zeros(40)
rate = 1 / np.linalg.eigvalsh(rows.T @ rows / len(x)).max()
marks, history = set(np.geomspace(1, 30_000, 60).astype(int)), []
for step in range(30_001):
    residual = rows @ w - y
    if step in marks:
        history.append((step, (residual**2).mean(), ((held_rows @ w - held_y) ** 2).mean()))
    w -= rate * rows.T @ residual / len(x)
at_step, train_loss, held_loss = map(np.array, zip(*history, strict=True))
best = held_loss.argmin()
assert train_loss[-1] < train_loss[best] and held_loss[-1] > 1.05 * held_loss[best]
print(f"best held-out loss {held_loss[best]:.3f} at step {at_step[best]}, last {held_loss[-1]:.3f}")

# %% [markdown] key="early-stopping-picture" tags=["picture"]
# #### Figure: the moment to stop
#
# The training loss falls as long as one likes. The held-out loss turns.

# %%
figure, axis = plt.subplots()
axis.plot(at_step, train_loss, label="training")
axis.plot(at_step, held_loss, label="held out")
axis.axvline(at_step[best], color="gray", linestyle="--", label="best")
axis.set_xscale("log")
axis.set_xlabel("step")
axis.set_ylabel("mean squared error")
axis.legend()
plt.show()

# %% [markdown] key="patience" tags=["exercise"]
# ### Exercise: patience
#
# Write `stop(losses, patience)`: the losses come one after the other; return the index of the
# measurement after which training stops because the last `patience` of them brought no new best, or
# the last index if that never happens.

# %% tags=["reader"]
stop = None  # replace None by your function: def stop(losses, patience): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(losses, patience):
    best, since = math.inf, 0
    for n, loss in enumerate(losses):
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == patience:
            return n
    return len(losses) - 1


stop = stop or solution

# %% tags=["check"]
assert stop([3, 2, 1, 1.5, 1.2, 0.5], 2) == 4
assert stop([3, 2, 1, 1.5, 0.9, 1.0], 2) == 5
assert stop([3, 2, 1], 1) == 2
print(f"with a patience of 5 the run stops at step {at_step[stop(held_loss, 5)]}")

# %% [markdown] key="end"
# ## Where to go from here
#
# You have the whole of training in hand: logits, softmax, cross-entropy, its gradient, a rule to follow
# it, and a sign when to stop. What is missing is the function in between, and what it reads. The next
# notebook is about what it reads: [tokens](02_tokenization.ipynb).
