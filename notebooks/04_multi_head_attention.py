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
# # 4. Multi-head attention
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/04_multi_head_attention.ipynb)
#
# One head has one softmax, and softmax strikes one balance: to look hard at one token is to look away
# from all others. A Transformer gives every layer several heads, each with its own small queries,
# keys and values, and adds up what they find. This notebook shows why one is not enough, what trained
# heads specialize in, and counts what they cost, down to the last parameter of GPT-2.

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

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import inspect, visualize
from jaxgpt.config import ModelConfig
from jaxgpt.model import Coords, count_params, init_params
from jaxgpt.model.kernels import KERNELS, ScoreMod
from jaxgpt.model.masks import Causal, OneSegment

# %% [markdown] key="heads" tags=["concept"]
# ## Several heads
#
# The vector of a token, of width D, is projected to H heads of width K = D / H. Each head runs
# attention on its own K numbers, with weights of its own. Then the last matrix, W_o, takes each
# head's result back to the width D, and the results are added:
#
# ```text
# output = Σₕ attention(x W_qʰ, x W_kʰ, x W_vʰ) W_oʰ
# ```
#
# H heads of width D / H cost no more than one head of width D. Reading the formula as a *sum* (Elhage
# et al. 2021) is worth more than reading it as a concatenation: every head adds its own term to the
# token's vector, independently of the others.


# %%
def softmax(z):
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


rng = np.random.default_rng(0)
T, D, H = 6, 16, 4
K = D // H
x = rng.normal(size=(T, D))
w_q, w_k, w_v = rng.normal(size=(3, D, H, K)) / np.sqrt(D)
w_o = rng.normal(size=(H, K, D)) / np.sqrt(D)

total = np.zeros((T, D))
for h in range(H):  # head by head
    q, k, v = x @ w_q[:, h], x @ w_k[:, h], x @ w_v[:, h]
    scores = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(K), -1e30)
    total += softmax(scores) @ v @ w_o[h]

q, k, v = (np.einsum("TD,DHK->THK", x, w) for w in (w_q, w_k, w_v))  # all heads at once
scores = np.einsum("THK,SHK->HTS", q, k) / np.sqrt(K)
weights = softmax(np.where(np.tri(T, dtype=bool), scores, -1e30))
z = np.einsum("HTS,SHK->THK", weights, v)
assert np.allclose(total, np.einsum("THK,HKD->TD", z, w_o))

coords = Coords(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))


def attend(q, k, v):
    """Run the library's kernel on arrays [T H K]."""
    arrays = [jnp.asarray(a, jnp.float32)[None] for a in (q, k, v)]
    score_mod = ScoreMod(OneSegment() & Causal())
    return np.asarray(KERNELS["dense"](*arrays, coords, coords, score_mod))[0]


assert np.allclose(z, attend(q, k, v), atol=1e-5)
print("head by head, all at once, and the library: the same")

# %% [markdown] key="layer" tags=["example"]
# ### Example: a layer of a real model, head by head
#
# In the library the four matrices of a layer are called q, k, v and o. We take a model, capture what
# goes into its attention and what comes out, and rebuild the output as a sum over the heads.

# %%
cfg = ModelConfig(vocab=260, context=16, width=32, layers=1, heads=4, ffn=64, position="none")
params, letters = init_params(cfg, jax.random.key(0))
print({name: letters["stack"]["layers"]["block_0"]["mixer"][name]["w"] for name in "qkvo"})
mixer = {name: np.asarray(w["w"][0])
         for name, w in params["stack"]["layers"]["block_0"]["mixer"].items()}  # fmt: skip
tokens = jnp.asarray(rng.integers(260, size=(1, T)))
from jaxgpt.model.capture import capture

_, found = capture(cfg, params, tokens, coords, ["layers.0.mixer.in", "layers.0.mixer.out"])
inputs, outputs = (np.asarray(found[f"layers.0.mixer.{end}"][0]) for end in ("in", "out"))
terms = []
for h in range(4):
    q, k, v = (inputs @ mixer[name][:, h] for name in "qkv")
    scores = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(8), -1e30)
    terms.append(softmax(scores) @ v @ mixer["o"][h])
assert np.allclose(sum(terms), outputs, atol=1e-5)
print("share of each head in the output:", [round(float(np.square(t).sum()), 3) for t in terms])

# %% [markdown] key="one-head-lab" tags=["lab"]
# ## Lab: a task that one head cannot do
#
# Each token is a random vector x. At each place, the layer has to return two of them side by side: *the
# one before*, and *the one three before*. One head has one set of weights, so all that it can hand over
# is one mixture m = a x₁ + b x₃. Whatever matrix is applied to m afterwards, it explains a² / (a² + b²)
# of the first vector and b² / (a² + b²) of the second: together one of the two. **Its error cannot fall
# below one half**, with any amount of training. Two heads hand over two mixtures, and that is enough.
#
# To see it, we train a layer whose scores depend on the distance only, with 1, 2 and 4 heads. The
# matrices have the same number of parameters in all three.

# %%
T, WIDTH = 16, 8


def mix(params, x):
    """One layer of heads whose scores depend on the distance only: x [B T D] -> [B T 2D]."""
    distance = np.arange(T)[:, None] - np.arange(T)
    scores = jnp.where(distance >= 0, params["bias"][:, np.abs(distance)], -1e30)  # [H T S]
    values = jnp.einsum("BSD,HDK->BSHK", x, params["v"])
    mixed = jnp.einsum("HTS,BSHK->BTHK", jax.nn.softmax(scores), values)
    return jnp.einsum("BTHK,HKE->BTE", mixed, params["o"])


def train_heads(heads, steps=400):
    rng = np.random.default_rng(0)
    K = 2 * WIDTH // heads
    shapes = {"bias": (heads, T), "v": (heads, WIDTH, K), "o": (heads, K, 2 * WIDTH)}
    params = {name: jnp.float32(0.3 * rng.normal(size=shape)) for name, shape in shapes.items()}
    rule = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    state = rule.init(params)

    def loss_fn(params, x):
        wanted = jnp.concatenate([x[:, 2:-1], x[:, :-3]], -1)
        return jnp.mean((mix(params, x)[:, 3:] - wanted) ** 2)

    @jax.jit
    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = rule.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(steps):
        x = jnp.float32(rng.normal(size=(64, T, WIDTH)))
        params, state, loss = step(params, state, x)
        losses.append(float(loss))
    return np.array(losses), np.asarray(jax.nn.softmax(params["bias"]))


curves, distances = {}, {}
for heads in (1, 2, 4):
    curves[heads], distances[heads] = train_heads(heads)
    print(f"{heads} head{'s' * (heads > 1)}: error {curves[heads][-20:].mean():.3f}")
assert abs(curves[1][-20:].mean() - 0.5) < 0.03
assert curves[2][-20:].mean() < 0.02

# %% [markdown] key="one-head-picture" tags=["picture"]
# #### Figure: the error, and the weights of the two heads by distance
#
# Right, what two heads have learned. They need not divide the work neatly: two *different* mixtures are
# enough, since the output matrix can take them apart again. Heads that each have one clean job are a
# pleasant find, not a law.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.9))
for heads, curve in curves.items():
    left.plot(curve, label=f"{heads} head" + "s" * (heads > 1))
left.axhline(0.5, color="gray", linestyle="--")
left.set_xlabel("step")
left.set_ylabel("mean squared error")
left.legend()
for head, row in enumerate(distances[2]):
    right.bar(np.arange(6) + 0.35 * head - 0.175, row[:6], 0.35, label=f"head {head}")
right.set_xlabel("distance")
right.set_ylabel("attention weight")
right.legend()
figure.tight_layout()
plt.show()

# %% [markdown] key="heads-question" tags=["question"]
# ### Question: then why not 64 heads?
#
# With a width of 64, why not 64 heads of width 1?
#
# <details><summary>Answer</summary>
#
# A key of one number can say very little: its score is a product of two numbers, so the keys can only
# be ordered along a line, and each query picks one end of it or the other. A head needs enough
# dimensions to tell apart what it looks for. In practice head widths from 64 to 128 are used at every
# size, and larger models have more heads, not wider ones.
#
# </details>

# %% [markdown] key="specialize-lab" tags=["lab"]
# ## Lab: what do heads specialize in?
#
# We train three layers with four heads each on Python's language reference, then ask each head two
# questions by score. *Previous token*: how much weight goes to the token just before, on average?
# *Induction*: on random tokens that are repeated, how much weight goes to the token that followed the
# last time? Random tokens have no meaning to go by, so only the pattern counts.

# %%
folder = tempfile.mkdtemp()
with open(f"{folder}/reference.txt", "w", encoding="utf-8") as file:
    file.write("\n".join(topics.values()))
config = configs.override(
    configs.load("stdlib"),
    f"name=heads folder={folder} data.source={folder}/reference.txt data.cache={folder}/tokens "
    "model.width=64 model.heads=4 model.layers=3 model.ffn=172 model.context=64 model.vocab=1024 "
    f"train.steps={max(150, round(900 * scale))} train.eval_every=1000 train.save_every=1000 "
    "train.sample_every=0".split(),
)
progress = jaxgpt.train(config, is_quiet=True)
model = jaxgpt.load(config.run_folder)
print(model, f"held-out loss {progress.best_loss:.2f}")

text = "The method is called with the instance as the first argument, and the result is returned."
weights = inspect.attention(model, text)
previous = inspect.previous_token_scores(weights)
by_hand = np.array([[np.diagonal(head, -1).mean() for head in layer] for layer in weights])
assert np.allclose(previous, by_hand, atol=1e-6)
induction = inspect.induction_scores(model, length=20)
print("previous token:", previous.max().round(2), " induction:", induction.max().round(2))

# %% [markdown] key="scores-picture" tags=["picture"]
# #### Figure: the previous-token score of every head
#
# The title has the score of a head that spreads its weight evenly. Some do far better, and nobody asked
# them to.

# %%
even = np.mean([1 / (t + 1) for t in range(1, weights.shape[-1])])
assert previous.max() > 1.5 * even
figure = visualize.draw_heads(previous, f"weight on the token before (even: {even:.2f})")
figure.set_dpi(90)
figure

# %% [markdown] key="heads-picture" tags=["picture"]
# #### Figure: the four heads of the layer with the highest score

# %%
layer = int(previous.max(-1).argmax())
pieces = inspect.encode(model, text).pieces
figure = visualize.draw_attention(weights[layer], pieces, title=f"layer {layer}")
figure.set_dpi(70)
figure

# %% [markdown] key="ablation" tags=["example"]
# ### Example: switch a head off
#
# A score describes; an *ablation* tests. We replace what a head returns by its mean over the tokens, so
# that it says the same everywhere, and look at the loss of the text.


# %%
def loss_without(heads):
    changes = inspect.ablate_heads(heads)
    logits = inspect.patch(model, text, changes).logits
    targets = np.asarray(inspect.encode(model, text).tokens)[1:]
    log_p = np.asarray(jax.nn.log_softmax(logits))[: len(targets)]
    return -log_p[np.arange(len(targets)), targets].mean()


whole = np.nanmean(inspect.token_losses(model, text))
assert np.isclose(loss_without([]), whole, atol=1e-4)
effect = np.array(
    [[loss_without([(layer, head)]) - whole for head in range(4)] for layer in range(3)]
)
print(f"loss {whole:.3f}; without one head it changes by")
print(effect.round(3))

# %% [markdown] key="counting" tags=["concept"]
# ## Counting parameters
#
# Attention has four matrices of D × D, with or without biases. The feed-forward layer has two of
# D × F, or three if it is gated. Norms have a vector or two of D. The embedding has a row of D for each
# token, and the output uses the same table if it is *tied*. That is all; everything else is
# multiplication.


# %%
def count(V, C, D, L, F, tied=True, positions=True, final_norm=True):
    """Parameters of a decoder of the GPT-2 kind: biases, LayerNorm, plain feed-forward."""
    attention = 4 * D * D + 4 * D
    feedforward = 2 * D * F + F + D
    norms = 2 * 2 * D
    embedding = V * D * (1 if tied else 2) + (C * D if positions else 0)
    return embedding + L * (attention + feedforward + norms) + (2 * D if final_norm else 0)


gpt2 = configs.load("gpt2_124m").model
assert count(50257, 1024, 768, 12, 3072) == 124_439_808
assert count_params(gpt2)["total"] == 124_439_808
for component, number in count_params(gpt2).items():
    print(f"{component:12} {number:12,}")

# %% [markdown] key="printed-wrong" tags=["example"]
# ### Example: two numbers that are often printed wrongly
#
# *GPT-2 small has 117M parameters.* It has 124,439,808. The number 117M is of the paper of 2019, and
# the authors corrected it later in their code; it still stands in many texts.
#
# *A decoder with a vocabulary of 50,000, a width of 512, 6 layers and feed-forwards of 2048 has about
# 80M.* It has 44.5M: 25.6M in the embedding and 18.9M in the layers. Even with an output matrix of
# its own it would have 70.1M.

# %%
example = ModelConfig(
    vocab=50_000, width=512, heads=8, layers=6, ffn=2048, position="sinusoidal",
    norm="layer", feedforward="plain", activation="relu", bias="all", wiring="post",
)  # fmt: skip
total = count_params(example)["total"]
assert total == count(50_000, 0, 512, 6, 2048, positions=False, final_norm=False)
assert round(total / 1e6, 1) == 44.5
untied = count(50_000, 0, 512, 6, 2048, tied=False, positions=False, final_norm=False)
assert round(untied / 1e6, 1) == 70.1
print(f"{total:,} parameters; {untied:,} with a separate output matrix")

# %% [markdown] key="count-exercise" tags=["exercise"]
# ### Exercise: GPT-2 XL
#
# The largest GPT-2 has a width of 1600, 48 layers, 25 heads, feed-forwards of 6400, and the
# vocabulary and context of the small one. How many parameters does it have? Set `xl` to the number.

# %% tags=["reader"]
xl = None  # replace None by your number

# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
solution = count(50257, 1024, 1600, 48, 6400)
xl = xl or solution

# %% tags=["check"]
assert xl == count_params(configs.load("gpt2_1558m").model)["total"]
print(f"{xl:,}")

# %% [markdown] key="gqa" tags=["concept"]
# ## Sharing keys and values: MQA and GQA
#
# When a model writes, it keeps the keys and values of all tokens so far, the *KV cache*, and reads
# all of it for each new token. With H heads it is as large as H sets of keys. *Multi-query attention*
# (MQA) has one set for all heads. *Grouped-query attention* (GQA) has G sets, each for H / G heads; G
# = H is the ordinary case. The queries, and so the patterns, remain H. In the library it is
# `model.kv_heads`.

# %%
T, H, G, K = 6, 4, 2, 8
q = rng.normal(size=(T, H, K))
k, v = rng.normal(size=(2, T, G, K))
repeated = [np.repeat(a, H // G, axis=1) for a in (k, v)]  # each key serves two heads
assert np.allclose(attend(q, k, v), attend(q, *repeated), atol=1e-5)

cases = {"MHA": 32, "GQA": 8, "MQA": 1}
for name, kv_heads in cases.items():
    cfg = ModelConfig(vocab=128_256, width=4096, heads=32, kv_heads=kv_heads, layers=32, ffn=14_336)
    cache = 2 * 32 * 8192 * kv_heads * 128 * 2  # k and v, layers, tokens, heads, width, bytes
    attention = count_params(cfg)["attention"]
    print(f"{name}: {attention / 1e9:.2f}G parameters in attention, "
          f"{cache / 2**30:.2f} GiB of cache for 8192 tokens")  # fmt: skip
cache_of_mha, cache_of_gqa = (2 * 32 * 8192 * cases[n] * 128 * 2 / 2**30 for n in ("MHA", "GQA"))
assert (cache_of_mha, cache_of_gqa) == (4, 1)

# %% [markdown] key="flops" tags=["concept"]
# ## Counting operations
#
# Each weight of a matrix is used once for each token, for one multiplication and one addition: a
# forward pass costs 2 N operations a token, with N the parameters of all matrices. The backward pass
# costs twice that. So training costs about **6 N for each token**, plus attention's share for the
# pairs, 12 · L · T · D for each token. (A causal mask halves this last term, if the kernel makes use
# of it.)


# %%
def training_flops_per_token(N, L, T, D):
    return 6 * N + 12 * L * T * D


N = count_params(gpt2)["total"] - 1024 * 768  # positions are looked up, not multiplied
per_token = training_flops_per_token(N, 12, 1024, 768)
share = 12 * 12 * 1024 * 768 / per_token
print(f"GPT-2 small: {per_token / 1e9:.2f} GFLOP for each token, {share:.0%} of it for the pairs")
assert 0.8e9 < per_token < 0.9e9

# %% [markdown] key="flops-picture" tags=["picture"]
# #### Figure: where the operations go
#
# The longer the context, the more of the work is pairs.

# %%
lengths = 2 ** np.arange(8, 16)
pairs = 12 * 12 * lengths * 768
figure, axis = plt.subplots()
axis.stackplot(lengths, np.full(len(lengths), 6 * N) / 1e9, pairs / 1e9,
               labels=["matrices, 6 N", "pairs, 12 L T D"])  # fmt: skip
axis.set_xscale("log", base=2)
axis.set_xlabel("context, tokens")
axis.set_ylabel("GFLOP for each token")
axis.legend(loc="upper left")
plt.show()

# %% [markdown] key="memory-question" tags=["question"]
# ### Question: how much memory does training take?
#
# GPT-2 small has 124M parameters. How many bytes do parameters, gradients and AdamW's state take in
# float32?
#
# <details><summary>Answer</summary>
#
# Four arrays as large as the parameters: the weights, the gradients and two moments. At 4 bytes each
# that is 16 bytes a parameter, 2.0 GB. The activations come on top, and are often more; they grow
# with the batch. `jaxgpt plan` tells before the run.
#
# </details>

# %% [markdown] key="end"
# ## Where to go from here
#
# Everything so far was blind to the order of the tokens, but for the mask. The next notebook brings
# it in: [positions](05_positions.ipynb).
