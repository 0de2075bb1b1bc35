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
# # 3. Self-attention
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/03_self_attention.ipynb)
#
# A token alone means little: "it" is whoever was named before, "bank" is by a river or full of money.
# *Self-attention* is how the vectors of a text learn from each other. Every token asks a question of
# all the others, weighs them by how well they answer, and takes in a mixture of what they have to
# say. It is one formula, and this notebook builds it from three tokens of two numbers up to a trained
# model that reads a real sentence.

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
import tempfile
from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np

import jaxgpt
from jaxgpt import inspect, measure, visualize
from jaxgpt import config as configs
from jaxgpt.model import Coords
from jaxgpt.model.kernels import KERNELS, ScoreMod
from jaxgpt.model.masks import Causal, OneSegment

# %% [markdown] key="qkv" tags=["concept"]
# ## Queries, keys and values
#
# Each token's vector x is multiplied by three matrices, and so plays three parts:
#
# - the **query** q = x W_q, what it is looking for;
# - the **key** k = x W_k, what it offers to be found by;
# - the **value** v = x W_v, what it hands over when it is found.
#
# The score of a key for a query is their dot product. Softmax makes weights of the scores of one query,
# positive and with the sum 1, and the output is the weighted mean of the values:
#
# ```text
# attention(Q, K, V) = softmax(Q Kᵀ / √K) V
# ```
#
# It is a dictionary that answers softly: instead of the one entry whose key is equal, it returns a
# blend of all entries, the more of each the better its key fits.

# %% [markdown] key="by-hand" tags=["example"]
# ### Example: three tokens by hand
#
# The three tokens are (1, 0), (0, 1) and (1, 1), and the three matrices the identity, so that q, k
# and v are the tokens themselves. The first query has the scores 1, 0, 1 with the three keys. Divided
# by √2 they are .707, 0, .707; the exponentials are 2.028, 1, 2.028, with the sum 5.056; so the
# weights are .401, .198 and .401. The third query has the scores 1, 1, 2 and the weights .248, .248
# and .503.


# %%
def softmax(z):
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
q, k, v = x @ np.eye(2), x @ np.eye(2), x @ np.eye(2)
weights = softmax(q @ k.T / np.sqrt(2))
output = weights @ v
assert np.allclose(weights[0], [0.401, 0.198, 0.401], atol=5e-4)
assert np.allclose(weights[2], [0.248, 0.248, 0.503], atol=5e-4)
print(weights.round(3))
print(output.round(3))

# %% [markdown] key="library" tags=["example"]
# ### The same with the library
#
# The library's kernels take arrays [B T H K]: texts, tokens, heads and the width of a head. Here
# there is one text and one head. `Coords` has each token's position and the text that it belongs to,
# and a *mask* says which keys a query may see: `OneSegment` means all. Every kernel of the library
# computes this same formula; `dense` is the one that is written as above, and the others are held
# against it.


# %%
def attend(kernel, q, k, v, mask):
    """Run a kernel on arrays [T K] of a single head."""
    T = len(q)
    coords = Coords(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
    arrays = [jnp.asarray(a, jnp.float32)[None, :, None] for a in (q, k, v)]
    return np.asarray(KERNELS[kernel](*arrays, coords, coords, ScoreMod(mask)))[0, :, 0]


for kernel in ("dense", "blockwise"):
    assert np.allclose(attend(kernel, q, k, v, OneSegment()), output, atol=1e-6)
print("dense and blockwise agree with NumPy")

# %% [markdown] key="weights-exercise" tags=["exercise"]
# ### Exercise: attention in a loop
#
# Write `attention(q, k, v)` without matrix products over tokens: for each query a loop over the keys.
# It must return the outputs [T K]. This is what the formula means, and it is worth having written
# once.

# %% tags=["reader"]
attention = None  # replace None by your function: def attention(q, k, v): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(q, k, v):
    outputs = []
    for query in q:
        scores = np.array([query @ key / np.sqrt(len(query)) for key in k])
        outputs.append(sum(w * value for w, value in zip(softmax(scores), v, strict=True)))
    return np.array(outputs)


attention = attention or solution

# %% tags=["check"]
rng = np.random.default_rng(0)
assert np.allclose(attention(q, k, v), output)
more = rng.normal(size=(3, 7, 4))
assert np.allclose(attention(*more), attend("dense", *more, OneSegment()), atol=1e-5)
print("right")

# %% [markdown] key="scaling" tags=["concept"]
# ## Why divide by √K?
#
# The dot product of two vectors of K random numbers of variance 1 has the variance K: its typical
# size is √K. At a width of 64 the scores would be around ±8, and softmax of such scores is nearly
# one-hot: a query would begin its life listening to one token only, chosen by chance. Where softmax
# is saturated its gradient is nearly 0, so it would not learn otherwise. Divided by √K, scores have
# size 1 at any width.

# %%
for K in (4, 64, 1024):
    scores = (rng.normal(size=(20_000, K)) * rng.normal(size=(20_000, K))).sum(-1)
    print(
        f"K = {K:4}: the scores have a standard deviation of {scores.std():.2f}, √K = {K**0.5:.2f}"
    )
    assert np.isclose(scores.std(), K**0.5, rtol=0.05)

# %% [markdown] key="scaling-picture" tags=["picture"]
# #### Figure: with and without the scale
#
# Left, the largest of 32 weights, on average over random queries; right, the size of softmax's
# gradient. Without the division both drift with the width.

# %%
widths, largest, slopes = [2**i for i in range(1, 11)], {}, {}
for name, power in (("scores / √K", 0.5), ("scores", 0.0)):
    largest[name], slopes[name] = [], []
    for K in widths:
        queries, keys = rng.normal(size=(300, K)), rng.normal(size=(300, 32, K))
        w = softmax(np.einsum("BK,BSK->BS", queries, keys) / K**power)
        largest[name].append(w.max(-1).mean())
        slopes[name].append((w * (1 - w)).sum(-1).mean())  # trace of the softmax's Jacobian
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
for name in largest:
    left.semilogx(widths, largest[name], "o-", base=2, label=name)
    right.semilogx(widths, slopes[name], "o-", base=2, label=name)
left.set_ylabel("largest weight")
right.set_ylabel("slope of the softmax")
for axis in (left, right):
    axis.set_xlabel("head width K")
    axis.legend(fontsize=8)
figure.tight_layout()
plt.show()
assert largest["scores"][-1] > 0.85 and largest["scores / √K"][-1] < 0.4

# %% [markdown] key="scaling-question" tags=["question"]
# ### Question: what if the scale were larger?
#
# A temperature may be put into attention too: divide by √K · t. What does attention do when t becomes
# very large, and very small?
#
# <details><summary>Answer</summary>
#
# For large t all scores approach 0 and every token takes the plain mean of all values: the text as a
# bag of words. For small t each query takes the value of its one best key: a lookup. A trained head
# can choose its own place between the two, since the scale of W_q and W_k does the same as t.
#
# </details>

# %% [markdown] key="causal" tags=["concept"]
# ## The causal mask
#
# A model that predicts the next token must not see it. So a query may attend to itself and to what
# came before it: the scores of later keys are set to -∞ (in practice -10³⁰) before the softmax, and
# their weights become exactly 0. This one triangle lets a text of T tokens be T training examples at
# once, each token predicting the next from its own past, in a single pass.

# %%
T = 6
q, k, v = rng.normal(size=(3, T, 8))
scores = q @ k.T / np.sqrt(8)
masked = np.where(np.tri(T, dtype=bool), scores, -1e30)
weights = softmax(masked)
assert np.allclose(weights @ v, attend("dense", q, k, v, OneSegment() & Causal()), atol=1e-5)
assert (np.triu(weights, 1) == 0).all() and np.allclose(weights.sum(-1), 1)

changed = v.copy()
changed[4] += 100  # what stands at position 4 ...
before, after = weights @ v, weights @ changed
assert np.allclose(before[:4], after[:4])  # ... is unknown to the positions before it
assert not np.allclose(before[4:], after[4:])

# %% [markdown] key="causal-picture" tags=["picture"]
# #### Figure: scores, mask, weights
#
# The first query sees only itself, so its weight is 1 whatever the scores are.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8))
pictures = [(scores, "scores"), (np.tri(T), "who may see whom"), (weights, "weights")]
for axis, (matrix, title) in zip(axes, pictures, strict=True):
    image = axis.imshow(matrix, cmap="RdBu_r" if title == "scores" else "Blues")
    axis.set_title(title)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    axis.grid(False)
    figure.colorbar(image, ax=axis, shrink=0.8)
figure.tight_layout()
plt.show()

# %% [markdown] key="causal-question" tags=["question"]
# ### Question: mask after the softmax?
#
# Why not compute all weights and set the forbidden ones to 0 afterwards?
#
# <details><summary>Answer</summary>
#
# The weights that are left would not sum to 1: the early tokens would get short vectors. Dividing by
# the sum again would repair that, but there is a subtler harm: if a forbidden score is very large, the
# softmax has rounded all allowed weights to 0 before they are divided. Masking the scores avoids both.
#
# </details>

# %% [markdown] key="permutation" tags=["concept"]
# ## Attention does not know the order
#
# Without a mask, shuffling the tokens shuffles the outputs and changes nothing else: attention treats
# a text as a set. "Dog bites man" and "man bites dog" would be the same. The order has to be brought
# in, and notebook 5 is about how.

# %%
order = rng.permutation(T)
outputs = attend("dense", q, k, v, OneSegment())
shuffled = attend("dense", q[order], k[order], v[order], OneSegment())
assert np.allclose(shuffled, outputs[order], atol=1e-5)
causal = attend("dense", q[order], k[order], v[order], OneSegment() & Causal())
assert not np.allclose(causal, attend("dense", q, k, v, OneSegment() & Causal())[order], atol=1e-2)
print("shuffled in, shuffled out; with a causal mask the order counts a little")

# %% [markdown] key="cost" tags=["concept"]
# ## The price: every pair
#
# T tokens have T² pairs. Twice the context is four times the scores, and as much memory if the whole
# matrix is kept. The products with W_q, W_k and W_v grow with T only. For a width of 768 the two are
# equal at about 1500 tokens; beyond, attention is the larger part. Notebook 9 is about ways out.


# %%
def count_products(T, D):
    """Multiplications of the four projections, and of scores and mixture, of one layer."""
    return 4 * T * D * D, 2 * T * T * D


projections, pairs = count_products(1536, 768)
assert projections == pairs
print(f"at 1536 tokens both are {pairs / 1e9:.2f} billion multiplications in each layer")

# %% [markdown] key="train-lab" tags=["lab"]
# ## Lab: a trained model reads a sentence
#
# Random weights attend to nothing in particular. So we train: two layers with two heads each, on the
# language reference that comes with every Python. It takes about twenty seconds. The model will be
# poor, and its heads will already have found something to do.

# %%
folder = tempfile.mkdtemp()
with open(f"{folder}/reference.txt", "w", encoding="utf-8") as file:
    file.write("\n".join(topics.values()))
config = configs.override(
    configs.load("stdlib"),
    f"name=two_layers folder={folder} data.source={folder}/reference.txt data.cache={folder}/tokens "
    "model.width=64 model.layers=2 model.ffn=172 model.context=64 model.vocab=1024 "
    f"train.steps={max(100, round(500 * scale))} train.eval_every=1000 train.save_every=1000 "
    "train.sample_every=0".split(),
)
progress = jaxgpt.train(config, is_quiet=True)
model = jaxgpt.load(config.run_folder)
print(model, f"held-out loss {progress.best_loss:.2f}")
assert progress.best_loss < 6.3  # ln 1024 = 6.93 is the loss of guessing

# %% [markdown] key="heatmap-picture" tags=["picture"]
# #### Figure: heat maps of a real sentence
#
# `inspect.attention` returns the weights of all layers and heads, [L H T S], whatever kernel the
# model was trained with. Each row is a token and shows what it reads. The first token has nothing but
# itself.

# %%
text = "If the object is a class instance, the method is called."
found = inspect.encode(model, text)
weights = inspect.attention(model, text)
assert np.allclose(weights.sum(-1), 1, atol=1e-5)
print(weights.shape)
figure = visualize.draw_attention(weights.reshape(-1, *weights.shape[2:]), found.pieces)
figure.suptitle("layer 0: heads 0 and 1; layer 1: heads 2 and 3")
figure.set_dpi(75)
figure

# %% [markdown] key="rebuild" tags=["example"]
# ### The picture is the computation
#
# A heat map would be worth little if it were not what the model does. From the captured queries and
# keys we compute the weights ourselves, and from weights and values the output of each head. They are
# the model's own.

# %%
sites = [f"layers.0.mixer.{name}" for name in ("q", "k", "v", "weights", "z")]
captured = inspect.capture(model, text, sites)
q, k, v = (captured[f"layers.0.mixer.{name}"] for name in ("q", "k", "v"))  # [T H K], q, k rotated
T, H, K = q.shape
scores = np.einsum("THK,SHK->HTS", q, k) / np.sqrt(K)
weights = softmax(np.where(np.tri(T, dtype=bool), scores, -1e30))
assert np.allclose(weights, captured["layers.0.mixer.weights"], atol=1e-5)
mixed = np.einsum("HTS,SHK->THK", weights, v)
assert np.allclose(mixed, captured["layers.0.mixer.z"], atol=1e-5)
print(f"{H} heads of width {K}: weights and outputs rebuilt")

# %% [markdown] key="entropy-exercise" tags=["exercise"]
# ### Exercise: how widely does a head look?
#
# The entropy of a row of weights tells how many tokens it draws on: exp(entropy) is 1 for a single
# token and T for an even mixture. Compute `reach`, an array [L H]: the mean over the rows of
# exp(entropy), from `all_weights` [L H T T].

# %% tags=["reader"]
all_weights = inspect.attention(model, text)
reach = None  # replace None by your array

# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
solution = np.exp(measure.entropy(all_weights)).mean(-1)
reach = solution if reach is None else reach

# %% tags=["check"]
logs = np.log(np.maximum(all_weights, 1e-30))
assert np.shape(reach) == all_weights.shape[:2]
assert np.allclose(reach, np.exp(-(all_weights * logs).sum(-1)).mean(-1), rtol=1e-3)
print(np.round(reach, 1))

# %% [markdown] key="not-explanation" tags=["question"]
# ### Question: do the weights explain the answer?
#
# A head gives the token "class" a weight of .8. May one say that the model answered as it did because
# of this token?
#
# <details><summary>Answer</summary>
#
# Not from the picture alone. What is handed over is the value, and it may be small or point where
# nobody reads it; the residual stream carries the token past the head; and vectors in later layers
# hold mixtures of many tokens, so "the token at that place" is no longer the word that is written
# there. To claim a cause, change it and see: `inspect.patch` and notebook 13.
#
# </details>

# %% [markdown] key="end"
# ## Where to go from here
#
# One head has one softmax: it must strike one balance among all that it looks at. The next notebook
# gives a layer several, and looks at what they do with it: [multi-head
# attention](04_multi_head_attention.ipynb).
