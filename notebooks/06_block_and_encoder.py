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
# # 6. The Transformer block and the encoder
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/06_block_and_encoder.ipynb)
#
# Attention moves information between tokens. To make a Transformer of it we need four more things: a
# layer that thinks about each token by itself, norms that keep the numbers in bounds, residual
# connections that let the gradient through, and a decision where to put them. They make a *block*,
# and a stack of blocks is the model. At the end of this notebook an encoder of our own tells good
# reviews from bad ones.

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
import dataclasses
import math
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgpt
from jaxgpt import config as configs
from jaxgpt.config import ModelConfig
from jaxgpt.model import Coords, build, compute_logits, count_params, init_params
from jaxgpt.model.capture import capture
from jaxgpt.model.feedforward import ACTIVATIONS
from jaxgpt.model.norms import apply_layer_norm, apply_rms_norm

# %% [markdown] key="norms" tags=["concept"]
# ## Norms: LayerNorm and RMSNorm
#
# A deep stack multiplies many matrices, and the size of what comes out drifts. A norm brings each
# token's vector back to a known size. *LayerNorm* subtracts the mean of the vector's entries and
# divides by their standard deviation; then each channel has a learned scale and bias. *RMSNorm*
# leaves out the mean and the bias, is faster, and works as well. It looks at one token at a time:
# neither the other tokens nor the other texts of the batch matter.


# %%
def layer_norm(x, scale, bias, eps=1e-5):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * scale + bias


rng = np.random.default_rng(0)
x = rng.normal(3, 10, size=(4, 32))
scale_, bias = rng.normal(size=(2, 32))
library = apply_layer_norm(*map(jnp.float32, (x, scale_, bias)), 1e-5)
assert np.allclose(layer_norm(x, scale_, bias), library, atol=1e-4)
normed = layer_norm(x, 1.0, 0.0)
assert np.allclose(normed.mean(-1), 0)
assert np.allclose(normed.std(-1), 1, atol=1e-3)
assert np.allclose(layer_norm(7 * x, 1.0, 0.0), normed, atol=1e-5)  # the size of x is forgotten
print(f"before: std {x.std():.1f}; after: mean {normed.mean():.1f}, std {normed.std():.2f}")

# %% [markdown] key="rms" tags=["exercise"]
# ### Exercise: RMSNorm
#
# Write `rms_norm(x, scale, eps)`: x divided by the root of the mean of its squares (eps is added to the
# mean), times the scale.

# %% tags=["reader"]
rms_norm = None  # replace None by your function: def rms_norm(x, scale, eps): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


rms_norm = rms_norm or solution

# %% tags=["check"]
library = apply_rms_norm(jnp.float32(x), jnp.float32(scale_), 1e-5)
assert np.allclose(rms_norm(x, scale_, 1e-5), library, atol=1e-4)
print("right")

# %% [markdown] key="feedforward" tags=["concept"]
# ## The feed-forward layer
#
# After the tokens have talked, each thinks for itself: its vector is taken to a wider space (usually
# four times), bent by an activation function, and brought back. Without the bend, the two matrices
# would be one. Two thirds of the parameters of a Transformer are here, and much of what it knows of
# the world.
#
# ```text
# plain:  down(act(up(x)))        gated:  down(act(gate(x)) · up(x))
# ```
#
# The gated form (SwiGLU, if the activation is SiLU) has three matrices, and is made narrower to match,
# 8/3 in place of 4.

# %% [markdown] key="activations-picture" tags=["picture"]
# #### Figure: activation functions
#
# ReLU cuts off what is negative, and where it does, its gradient is 0. GELU and SiLU bend softly, dip
# below zero, and let a little gradient through. The tanh formula of GELU that GPT-2 uses differs from
# the exact one by less than a thousandth.

# %%
z = np.linspace(-4, 4, 401)
figure, axis = plt.subplots(figsize=(6, 3))
for name in ("relu", "gelu", "silu", "relu2"):
    axis.plot(z, ACTIVATIONS[name](jnp.float32(z)), label=name)
axis.set_ylim(-0.5, 4)
axis.legend()
plt.show()

erf = np.array([math.erf(value / np.sqrt(2)) for value in z])
assert np.allclose(z * (1 + erf) / 2, ACTIVATIONS["gelu"](jnp.float32(z)), atol=1e-5)
assert np.allclose(z / (1 + np.exp(-z)), ACTIVATIONS["silu"](jnp.float32(z)), atol=1e-5)
error = np.abs(ACTIVATIONS["gelu"](z) - ACTIVATIONS["gelu_tanh"](z)).max()
assert error < 1e-3
print(f"GELU by tanh is off by at most {error:.1e}")

# %% [markdown] key="block" tags=["example"]
# ## A block, by hand
#
# Now all of it in one place. With *pre-norm*, as in GPT-2 and Llama, a block is two lines:
#
# ```text
# x ← x + attention(norm(x))
# x ← x + feedforward(norm(x))
# ```
#
# We write the block in NumPy, with the parameters of a random model of one layer, and hold what comes
# out against the model's own.


# %%
def softmax(z):
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


T, D, H = 7, 32, 4
cfg = ModelConfig(
    vocab=100, context=16, width=D, layers=1, heads=H, ffn=128, position="none",
    norm="layer", feedforward="plain", activation="relu", bias="all",
)  # fmt: skip
params, letters = init_params(cfg, jax.random.key(1))
noise = np.random.default_rng(1)  # so that scales and biases are not all 1 and 0
params = jax.tree.map(lambda p: p + 0.1 * noise.normal(size=p.shape).astype(np.float32), params)
tokens = noise.integers(100, size=T)
p = jax.tree.map(lambda a: np.asarray(a[0], np.float64), params["stack"]["layers"]["block_0"])


def block(x):
    y = layer_norm(x, p["mixer_norm_in"]["scale"], p["mixer_norm_in"]["bias"])
    q, k, v = (np.einsum("TD,DHK->THK", y, p["mixer"][n]["w"]) + p["mixer"][n]["b"] for n in "qkv")
    scores = np.einsum("THK,SHK->HTS", q, k) / np.sqrt(D / H)
    weights = softmax(np.where(np.tri(len(x), dtype=bool), scores, -1e30))
    z = np.einsum("HTS,SHK->THK", weights, v)
    x = x + np.einsum("THK,HKD->TD", z, p["mixer"]["o"]["w"]) + p["mixer"]["o"]["b"]
    y = layer_norm(x, p["ffn_norm_in"]["scale"], p["ffn_norm_in"]["bias"])
    hidden = np.maximum(y @ p["ffn"]["up"]["w"] + p["ffn"]["up"]["b"], 0)
    return x + hidden @ p["ffn"]["down"]["w"] + p["ffn"]["down"]["b"]


coords = Coords(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
_, found = capture(cfg, params, jnp.asarray(tokens)[None], coords, ["layers.0.residual_post"])
ours = block(np.asarray(params["embed"]["table"], np.float64)[tokens])
assert np.allclose(ours, found["layers.0.residual_post"][0], atol=1e-4)
print("the block in NumPy and the library's: the same")

# %% [markdown] key="residual" tags=["concept"]
# ## Residual connections
#
# x ← x + f(x): each layer adds a correction to what is there, and does not replace it. One reason is
# the gradient. Through f alone, it is multiplied by the Jacobian of every layer; if that makes
# vectors a little smaller, forty times over there is nothing left. Through x + f(x) it has the
# Jacobian 1 + f′, and the 1 carries it from the loss down to the first layer whatever the f do. The
# vector that runs through the whole model, to which all layers add, is called the *residual stream*.

# %%
layers = 40
factors = np.random.default_rng(0).normal(0, 0.3, size=layers)  # f'(x) of each layer, one channel
assert abs(np.prod(factors)) < 1e-20
assert abs(np.prod(1 + factors)) > 1e-3
print(f"gradient through {layers} layers: {abs(np.prod(factors)):.0e} without, "
      f"{abs(np.prod(1 + factors)):.2f} with")  # fmt: skip

# %% [markdown] key="gradient-lab" tags=["lab"]
# ### Lab: the gradient that reaches each layer
#
# We build one model of eight layers four times, with four wirings, and compute the gradient of the loss,
# on random tokens, by the vectors that each layer reads: `pre` norm, `post` norm (the original
# Transformer and BERT: x ← norm(x + f(x))), `sandwich`, a norm on both ends, as in Gemma 2, and
# `no_residual`, which the library has for no other purpose than to show this. To get the gradient at an
# inner place, we add a shift of zero there (a *patch*) and take the derivative by the shift.

# %%
L = 8
deep = ModelConfig(vocab=100, context=32, width=64, layers=L, heads=4, ffn=256, unroll=1,
                   norm="layer", feedforward="plain", activation="gelu")  # fmt: skip
batch = jnp.asarray(rng.integers(100, size=(8, 33)))
coords = Coords(jnp.tile(jnp.arange(32), (8, 1)), jnp.ones((8, 32), jnp.int32))


def measure_gradients(cfg):
    """Return the norm of the gradient by what each layer reads: [L]."""
    params = init_params(cfg, jax.random.key(0))[0]

    def loss_fn(shifts):
        patches = {f"layers.{n}.residual_pre": lambda x, n=n: x + shifts[n] for n in range(L)}
        hidden, _ = capture(cfg, params, batch[:, :-1], coords, [], patches=patches)
        scores = compute_logits(cfg, params, hidden)
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch[:, 1:]).mean()

    gradient = jax.grad(loss_fn)(jnp.zeros((L, 8, 32, cfg.width)))
    return np.linalg.norm(np.asarray(gradient, np.float64).reshape(L, -1), axis=-1)


gradient_norms = {}
for wiring in ("pre", "post", "sandwich", "no_residual"):
    gradient_norms[wiring] = measure_gradients(dataclasses.replace(deep, wiring=wiring))
    first, last = gradient_norms[wiring][[0, -1]]
    print(f"{wiring:12} first layer {first:.1e}, last layer {last:.1e}")
ratios = {name: norms[0] / norms[-1] for name, norms in gradient_norms.items()}
assert ratios["no_residual"] < 1e-6
assert ratios["pre"] > 0.3

# %% [markdown] key="gradient-picture" tags=["picture"]
# #### Figure: the size of the gradient by layer
#
# Read it from right to left, as the gradient goes. Without residuals each layer takes a factor away, and
# the first layers get nothing: they cannot learn. With residuals the gradient arrives everywhere.

# %%
figure, axis = plt.subplots()
for name, norms in gradient_norms.items():
    axis.semilogy(norms, "o-", markersize=3, label=name)
axis.set_xlabel("layer")
axis.set_ylabel("norm of the gradient")
axis.legend()
plt.show()

# %% [markdown] key="training-lab" tags=["lab"]
# ### Lab: and so, do they learn?
#
# The task is to repeat: rows of random digits, of which the second half is the first half once more.
# The loss counts the second half only. We train the four wirings with six layers.

# %%
HALF, VOCAB = 8, 16
small = ModelConfig(vocab=VOCAB, context=16, width=48, layers=6, heads=4, ffn=96, unroll=1,
                    position="learned", norm="layer", feedforward="plain",
                    activation="gelu")  # fmt: skip


def train_to_repeat(wiring, steps, lr=2e-3):
    cfg = dataclasses.replace(small, wiring=wiring)
    params, rng = init_params(cfg, jax.random.key(0))[0], np.random.default_rng(0)
    rule = optax.adam(lr)
    state = rule.init(params)
    coords = Coords(jnp.tile(jnp.arange(2 * HALF - 1), (64, 1)), jnp.ones((64, 15), jnp.int32))

    def loss_fn(params, rows):
        hidden, _ = build(cfg).apply({"params": params}, rows[:, :-1], coords)
        scores = compute_logits(cfg, params, hidden)[:, HALF - 1 :]
        return optax.softmax_cross_entropy_with_integer_labels(scores, rows[:, HALF:]).mean()

    @jax.jit
    def step(params, state, rows):
        loss, grads = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = rule.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(steps):
        row = rng.integers(VOCAB, size=(64, HALF))
        params, state, loss = step(params, state, jnp.asarray(np.concatenate([row, row], 1)))
        losses.append(float(loss))
    return np.array(losses)


steps = max(200, round(250 * scale))
repeated = {wiring: train_to_repeat(wiring, steps) for wiring in gradient_norms}
for wiring, losses in repeated.items():
    print(f"{wiring:12} loss {losses[-20:].mean():.3f}")
assert repeated["no_residual"][-20:].mean() > 0.95 * np.log(VOCAB)  # has learned nothing
assert repeated["pre"][-20:].mean() < 0.8 * np.log(VOCAB)

# %% [markdown] key="training-picture" tags=["picture"]
# #### Figure: the loss of the four wirings
#
# The dashed line is guessing, ln 16. With residuals all three learn; between pre and post the difference
# shows in deeper models and with larger steps.

# %%
figure, axis = plt.subplots()
for wiring, losses in repeated.items():
    axis.plot(np.convolve(losses, np.full(15, 1 / 15), "valid"), label=wiring)
axis.axhline(np.log(VOCAB), color="gray", linestyle="--")
axis.set_xlabel("step")
axis.set_ylabel("loss, nats")
axis.legend()
plt.show()

# %% [markdown] key="pre-post" tags=["question"]
# ### Question: pre-norm or post-norm?
#
# The original Transformer was post-norm and needed a warmup; nearly all models since GPT-2 are
# pre-norm. What is the difference for the gradient, and what does pre-norm give up?
#
# <details><summary>Answer</summary>
#
# In pre-norm the residual stream is never normalized on its way, so the gradient reaches every layer
# undamped. In post-norm each norm sits *on* the stream and rescales the gradient as it passes; at the
# beginning the last layers get large gradients, and without a warmup the first steps may be ruinous.
# What pre-norm gives up: the stream grows from layer to layer, so that late layers, which read it
# normalized, change it less and less.
#
# </details>

# %% [markdown] key="encoder" tags=["concept"]
# ## The encoder
#
# A decoder writes, so a token may see only its past. An *encoder* reads: the text is all there, and
# every token may see every other. The block is the same, without the causal mask. What comes out is a
# vector for each token that knows both sides of it; for a decision on the whole text, a small head
# reads the vector of the first token (BERT's way: a dense layer, tanh, and a dense layer to the
# classes).

# %%
tokens = jnp.asarray(rng.integers(100, size=(1, 6)))
changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % 100)
coords = Coords(jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))
for family in ("decoder", "encoder"):
    cfg = ModelConfig(family=family, vocab=100, context=16, width=32, layers=2, heads=4, ffn=64)
    params = init_params(cfg, jax.random.key(0))[0]
    states = [
        np.asarray(
            capture(cfg, params, t, coords, ["layers.1.residual_post"])[1]["layers.1.residual_post"]
        )
        for t in (tokens, changed)
    ]
    sees_future = not np.allclose(states[0][0, 0], states[1][0, 0], atol=1e-6)
    print(f"{family}: does the first token notice a change of the last? {sees_future}")
    assert sees_future == (family == "encoder")

# %% [markdown] key="minillm" tags=["example"]
# ### Example: counting an encoder classifier
#
# The course's `MiniLLM(10000, 512, 8, 2048, 6, 3)` has a vocabulary of 10,000, a width of 512, 8 heads,
# feed-forwards of 2048, 6 layers and 3 classes. Read as an encoder classifier with sinusoidal positions
# (no parameters), post-norm (no norm at the end) and BERT's head, it has 24,298,499 parameters:
#
# | part | parameters |
# |---|---|
# | embedding, 10,000 × 512 | 5,120,000 |
# | 6 × attention, 4 × (512 × 512 + 512) | 6,303,744 |
# | 6 × feed-forward, 2 × 512 × 2048 + 2048 + 512 | 12,598,272 |
# | 6 × two norms, 2 × 2 × 512 | 12,288 |
# | head, 512 × 512 + 512 + 512 × 3 + 3 | 264,195 |

# %%
mini = ModelConfig(
    family="encoder", classes=3, vocab=10_000, width=512, heads=8, ffn=2048, layers=6,
    position="sinusoidal", norm="layer", wiring="post", feedforward="plain", activation="relu",
    bias="all",
)  # fmt: skip
parts = [5_120_000, 6_303_744, 12_598_272, 12_288, 264_195]
assert sum(parts) == 24_298_499
assert count_params(mini)["total"] == 24_298_499
print(count_params(mini))

# %% [markdown] key="count-exercise" tags=["exercise"]
# ### Exercise: one more layer
#
# By how many parameters does that model grow if it has 7 layers, and by how many if its width is 1024
# in place of 512, with 6 layers? Set `layer_more` and `width_more`.

# %% tags=["reader"]
layer_more = None  # replace None by your numbers
width_more = None


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(D, L, V=10_000, F=2048, A=3):
    layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
    return V * D + L * layer + D * D + D + D * A + A


layer_more = layer_more or solution(512, 7) - solution(512, 6)
width_more = width_more or solution(1024, 6) - solution(512, 6)

# %% tags=["check"]
grown = [dataclasses.replace(mini, layers=7), dataclasses.replace(mini, width=1024)]
more = [count_params(cfg)["total"] - 24_298_499 for cfg in grown]
assert [layer_more, width_more] == more
print(f"one layer more: {layer_more:,}; twice as wide: {width_more:,}")

# %% [markdown] key="reviews" tags=["concept"]
# ## A classifier: the data
#
# We write our own reviews, from a small grammar: a thing, a verdict, sometimes a turn. Single words
# do not decide: "not good" is bad, "never dull" is good, and in "the plot is weak, but the ending is
# superb" the last word counts. What is held out are *combinations* that training has not seen.

# %%
good = "good superb moving brilliant charming clever warm gripping delightful honest".split()
bad = "bad weak dull clumsy tedious hollow lifeless silly dreadful bland".split()
things = "plot ending acting music film script dialogue pacing camera story".split()
boosts = ["", "very ", "truly ", "rather "]


def say(rng, is_good):
    """Return a verdict on one thing, plainly or by the negation of its opposite."""
    thing, boost = rng.choice(things), rng.choice(boosts)
    if rng.random() < 0.3:
        verdict = f"{rng.choice(['not', 'never'])} {rng.choice(bad if is_good else good)}"
    else:
        verdict = boost + rng.choice(good if is_good else bad)
    return f"the {thing} is {verdict}"


def write_review(rng):
    is_good = bool(rng.integers(2))
    text = say(rng, is_good)
    if rng.random() < 0.5:
        text = f"{say(rng, not is_good)} , but {text}"
    return text, is_good


rng = np.random.default_rng(0)
reviews = dict(write_review(rng) for _ in range(6000))  # each text once
reviews = list(reviews.items())
held_out, training = reviews[:500], reviews[500:]
print(len(training), "reviews, for example:")
for text, is_good in training[:4]:
    print("  ", "good" if is_good else "bad ", "|", text)

# %% [markdown] key="bag-of-words" tags=["example"]
# ### First a baseline
#
# A model that adds up a score for each word, without order, is the fair thing to beat: logistic
# regression on which words occur.

# %%
words = sorted({word for text, _ in training for word in text.split()})
column = {word: i for i, word in enumerate(words)}


def bag(reviews):
    table = np.zeros((len(reviews), len(words)))
    for row, (text, _) in enumerate(reviews):
        for word, times in collections.Counter(text.split()).items():
            table[row, column[word]] = times
    return table, np.array([is_good for _, is_good in reviews], float)


x, y = bag(training)
weights, offset = np.zeros(len(words)), 0.0
for _ in range(500):
    error = 1 / (1 + np.exp(-(x @ weights + offset))) - y
    weights -= 0.5 * x.T @ error / len(y)
    offset -= 0.5 * error.mean()
held_x, held_y = bag(held_out)
baseline = ((held_x @ weights + offset > 0) == held_y).mean()
print(f"bag of words: {baseline:.1%} of the held-out reviews right")

# %% [markdown] key="classifier-lab" tags=["lab"]
# ## Lab: train, save, reuse
#
# The source `classes:FOLDER` has one text per line in files whose extensions are the classes. The
# config is the one that ships as `sentiment`, made smaller; training takes some twenty seconds. On
# the 10,662 real review sentences of Pang and Lee, the config as it is reaches 74.9%.

# %%
folder = tempfile.mkdtemp()
os.mkdir(f"{folder}/reviews")
for extension, wanted in (("good", True), ("bad", False)):
    with open(f"{folder}/reviews/reviews.{extension}", "w", encoding="utf-8") as file:
        file.writelines(f"{text}\n" for text, is_good in training if is_good == wanted)

config = configs.override(
    configs.load("sentiment"),
    f"name=verdicts folder={folder} data.source=classes:{folder}/reviews data.cache={folder}/tokens "
    "model.vocab=400 model.width=64 model.layers=2 model.ffn=128 model.context=32 model.dropout=0.1 "
    f"train.steps={max(200, round(400 * scale))} train.eval_every=50 train.save_every=200 "
    "train.sample_every=0 optimizer.lr=2e-3 optimizer.weight_decay=0.1".split(),
)
progress = jaxgpt.train(config, is_quiet=True)
model = jaxgpt.load(config.run_folder)  # as any other program would, tomorrow
print(model, model.labels)

# %%
texts = [text for text, _ in held_out]
answers = ["good" if is_good else "bad" for _, is_good in held_out]
predictions = model.classify(texts)
right = np.mean([p.label == a for p, a in zip(predictions, answers, strict=True)])
print(f"the encoder: {right:.1%} right; the bag of words had {baseline:.1%}")
assert right > baseline + 0.05

jaxgpt.save(model, f"{folder}/saved")
again = jaxgpt.load(f"{folder}/saved").classify(texts[:20])
for one, other in zip(predictions, again, strict=False):
    assert one.label == other.label
    assert np.isclose(one.probabilities["good"], other.probabilities["good"], atol=1e-5)
print("saved, loaded, and the same answers")

# %% [markdown] key="confusion-picture" tags=["picture"]
# #### Figure: where it is wrong

# %%
confusion = np.zeros((2, 2), int)
for prediction, answer in zip(predictions, answers, strict=True):
    confusion[model.labels.index(answer), model.labels.index(prediction.label)] += 1
figure, axis = plt.subplots(figsize=(3.6, 3))
axis.imshow(confusion, cmap="Blues")
axis.grid(False)
for (row, col), number in np.ndenumerate(confusion):
    color = "white" if number > confusion.max() / 2 else "black"
    axis.text(col, row, number, ha="center", va="center", color=color)
axis.set_xticks(range(2), model.labels)
axis.set_yticks(range(2), model.labels)
axis.set_xlabel("the model")
axis.set_ylabel("the truth")
plt.show()

# %% [markdown] key="own-reviews" tags=["example"]
# ### Example: your own sentences
#
# The model knows our little grammar and nothing else. Try what it does with words it has never seen.

# %%
for text in [
    "the film is never dull",
    "the film is not charming",
    "the music is superb , but the script is hollow",
    "the script is hollow , but the music is superb",
]:
    (found,) = model.classify([text])
    print(f"{found.label:5} {found.probabilities[found.label]:.0%}  {text}")

# %% [markdown] key="accuracy-question" tags=["question"]
# ### Question: 99% accurate?
#
# A classifier for a rare disease is right in 99% of all cases. Is it good?
#
# <details><summary>Answer</summary>
#
# If one person in a hundred has the disease, a classifier that always says "healthy" is right in 99% of
# all cases too. Accuracy must be read beside what the most frequent class alone would reach; the
# confusion matrix shows what is confused with what. Our two classes are about equally frequent, so
# guessing has 50%.
#
# </details>

# %% [markdown] key="end"
# ## Where to go from here
#
# You have an encoder that reads. Notebook 7 turns it around and lets the model write: the
# mini-GPT.
