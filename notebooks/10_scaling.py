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
# # 10. Scaling laws
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/10_scaling.ipynb)
#
# Large models cost millions, and nobody trains one to see what happens. One trains small ones,
# finds the law that their losses follow, and reads off what a large one would reach. This notebook
# does that from one end to the other: the published law by hand, a law of our own from models that
# we train here, a prediction of a run before it takes place, and the check. At the end: why
# abilities seem to *emerge* all of a sudden in a curve that is perfectly smooth.

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
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import optimizer, scaling
from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.model import Coords, build, compute_logits, count_params, init_params
from jaxgpt.scaling import Law, Run

# %% [markdown] key="law" tags=["concept"]
# ## The law
#
# The loss of a language model falls with its number of parameters N and with its number of training
# tokens D, each as a power:
#
# ```text
# L(N, D) = E + A / N^α + B / D^β
# ```
#
# *E* is what no model can predict, the entropy of the text itself. The second term is the price of
# a model that is too small, the third of a text that is too short. A power law is a straight line
# in logarithms: to halve a term takes the same *factor* every time, never the same amount. With α =
# 0.34 that factor is 2^(1/0.34) = 7.7.

# %%
assert round(2 ** (1 / 0.34), 1) == 7.7

# %% [markdown] key="hoffmann" tags=["example"]
# ### Example: a billion parameters, twenty billion tokens
#
# With the constants of Hoffmann et al. (2022, the *Chinchilla* paper): E = 1.69, A = 406.4, B =
# 410.7, α = 0.34, β = 0.28. These five numbers are often shown under the name of Kaplan, whose law
# has another form and other constants, and with a result that they do not give. By hand: 406.4 /
# 1148 = 0.354 and 410.7 / 766 = 0.536, so that the loss is 1.69 + 0.354 + 0.536 = **2.580** nats
# per token, a perplexity of 13.2.


# %%
def predict_loss(N, D, E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28):
    return E + A / N**alpha + B / D**beta


assert round(predict_loss(1e9, 20e9), 3) == 2.580
assert np.isclose(predict_loss(1e9, 20e9), scaling.predict_loss(1e9, 20e9))
assert round(float(np.exp(predict_loss(1e9, 20e9))), 1) == 13.2
print(f"E 1.690 + size {406.4 / 1e9**0.34:.3f} + data {410.7 / 20e9**0.28:.3f} = "
      f"{predict_loss(1e9, 20e9):.3f}")  # fmt: skip

# %% [markdown] key="law-picture" tags=["picture"]
# ### Figure: the two terms
#
# Left: with endless data only the size counts, and the reducible loss L − E is a straight line.
# Right: with a fixed amount of data the curve bends. From there on more parameters are wasted,
# because the text is what is missing.

# %%
sizes = np.geomspace(1e7, 1e12, 60)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
left.loglog(sizes, predict_loss(sizes, 1e30) - 1.69, color="black")
left.set_ylabel("L − E, nats")
for D in (1e9, 1e10, 1e11, 1e12):
    right.semilogx(sizes, predict_loss(sizes, D), label=f"D = {D:.0e}")
right.set_ylabel("L, nats")
right.legend()
for axis in (left, right):
    axis.set_xlabel("parameters N")
figure.tight_layout()
plt.show()

# %% [markdown] key="optimum" tags=["concept"]
# ## How to spend a budget
#
# Training costs about C = 6 N D floating-point operations: two for each parameter and token
# forward, four backward. So a budget C is a choice: a large model on little text, or a small one on
# much. For each C there is one best N. By calculus (set the derivative along 6 N D = C to 0) N
# grows as C^(β/(α+β)) and D as C^(α/(α+β)): about the square root, both. We search it by brute
# force beside `Law.optimum`.


# %%
def search_optimum(law, flops):
    """Return the best N and D of a budget, by trying a hundred thousand sizes."""
    N = np.geomspace(1e6, 1e13, 100_000)
    best = law.predict(N, flops / 6 / N).argmin()
    return N[best], flops / 6 / N[best]


chinchilla = scaling.PUBLISHED["besiroglu"]  # the corrected fit of the same runs
for flops in (1e20, 5.76e23, 1e26):
    N, D = chinchilla.optimum(flops)
    assert np.allclose(search_optimum(chinchilla, flops), (N, D), rtol=1e-3)
    print(f"{flops:.2e} FLOPs: {N:.2e} parameters, {D:.2e} tokens, {D / N:4.1f} tokens each")

# %% [markdown] key="isoflop" tags=["picture"]
# ### Figure: valleys
#
# Each curve has the same cost everywhere. On the left the model is too small, on the right there is
# not enough text left for it. The minima lie on a line. GPT-3 (175 billion parameters, 300 billion
# tokens) was far to the right of its minimum; Chinchilla, four times smaller than its predecessor
# Gopher at the same cost, was better.

# %%
figure, axis = plt.subplots()
for flops in (1e19, 1e20, 1e21, 1e22, 1e23, 1e24):
    best, _ = chinchilla.optimum(flops)
    N = best * np.geomspace(0.05, 20, 60)
    (line,) = axis.semilogx(N, chinchilla.predict(N, flops / 6 / N), label=f"{flops:.0e}")
    axis.plot(best, chinchilla.predict(*chinchilla.optimum(flops)), "o", color=line.get_color())
axis.plot(175e9, chinchilla.predict(175e9, 300e9), "*", color="black", markersize=10)
axis.annotate("GPT-3", (175e9, chinchilla.predict(175e9, 300e9)), xytext=(5, 5),
              textcoords="offset points")  # fmt: skip
axis.set_xlabel("parameters N")
axis.set_ylabel("loss, nats")
axis.legend(title="FLOPs", fontsize=7, ncol=2)
plt.show()

# %% [markdown] key="gpt3" tags=["exercise"]
# ### Exercise: what GPT-3 should have been
#
# Compute the FLOPs of GPT-3 with C = 6 N D, and the size `better` (number of parameters) that would
# have been the best for this budget by the law `chinchilla`.

# %% tags=["reader"]
better = None  # replace None by a number


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution():
    parameters, _ = chinchilla.optimum(6 * 175e9 * 300e9)
    return parameters


better = better or solution()

# %% tags=["check"]
assert np.isclose(better, search_optimum(chinchilla, 3.15e23)[0], rtol=1e-2)
assert better < 175e9 / 2
print(
    f"right: {better / 1e9:.0f} billion parameters, on {3.15e23 / 6 / better / 1e9:.0f} billion tokens"
)

# %% [markdown] key="sweep" tags=["lab"]
# ## A law of our own
#
# Now with models that we train: Python source, byte by byte, in four sizes. The learning rate is
# constant, so that a run of 800 steps contains the shorter ones, and one training gives a point at
# each of four budgets of text. The loss is measured on text that is not trained on.

# %%
library = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:80]
text = np.frombuffer(b"".join(path.read_bytes() for path in library), np.uint8)
is_held_out = np.arange(len(text)) // 4096 % 8 == 0  # every eighth page
train_text, test_text = (text[is_held_out == flag].astype(np.int32) for flag in (False, True))
T, B = 64, 16
BUDGETS = (100, 200, 400, 800)  # steps


def train_size(width, layers):
    """Train a size, and return its runs: one for each budget."""
    cfg = ModelConfig(vocab=256, context=T, width=width, layers=layers, heads=2, ffn=2 * width)
    model = build(cfg)
    params, letters = init_params(cfg, jax.random.key(0))
    rule = OptimizerConfig(name="adamw", lr=0.16 / width, warmup=20, schedule="warmup_constant")
    update_rule, _ = optimizer.build(rule, max(BUDGETS), letters)

    def compute_loss(params, rows):
        tokens = rows[:, :-1]
        at = Coords(jnp.broadcast_to(jnp.arange(T), tokens.shape), jnp.ones_like(tokens))
        hidden, _ = model.apply({"params": params}, tokens, at)
        logp = jax.nn.log_softmax(compute_logits(cfg, params, hidden))
        return -jnp.take_along_axis(logp, rows[:, 1:, None], -1).mean()

    @jax.jit
    def train_step(params, state, rows):
        gradient = jax.grad(compute_loss)(params, rows)
        updates, state = update_rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def cut(text, count, rng):
        starts = rng.integers(0, len(text) - T - 1, count)
        return text[starts[:, None] + np.arange(T + 1)]

    rng, state, runs = np.random.default_rng(0), update_rule.init(params), []
    held_out = cut(test_text, 256, np.random.default_rng(1))
    measure_loss = jax.jit(compute_loss)
    size = count_params(cfg)["total"] - count_params(cfg)["embedding"]
    for step in range(1, max(BUDGETS) + 1):
        params, state = train_step(params, state, cut(train_text, B, rng))
        if step in BUDGETS:
            loss = float(measure_loss(params, held_out))
            runs.append(Run(size, step * B * T, loss, name=f"{width}x{layers} at {step}"))
    return runs


runs = [run for size in ((8, 2), (16, 2), (32, 2), (64, 2)) for run in train_size(*size)]
for run in runs[::2]:
    print(f"{run.name:12} N {run.parameters:7,.0f}  D {run.tokens:9,.0f}  loss {run.loss:.3f}")

# %% [markdown] key="fit" tags=["concept"]
# ## Fitting: least squares, and why in logarithms
#
# Given α and β the law is linear in E, A and B. So the shortest fit is a grid of exponents, and for
# each pair a linear least-squares problem: ten lines. `scaling.fit` does better in three ways. It
# minimizes the error of the *logarithm* of the loss, so that a high loss does not count more than a
# low one. It uses Huber's loss, which an odd run cannot pull far. And it resamples the runs (the
# bootstrap), so that each constant comes with its uncertainty. On data that follow a law exactly,
# both must find it.


# %%
def fit_by_hand(runs):
    """Return (error, E, A, B, alpha, beta) of the best pair on a grid of exponents."""
    N, D, L = np.array([[r.parameters, r.tokens, r.loss] for r in runs]).T
    best, exponents = (np.inf,), np.arange(0.02, 1.0, 0.02)
    for alpha in exponents:
        for beta in exponents:
            columns = np.stack([np.ones_like(N), N**-alpha, D**-beta], 1)
            constants = np.linalg.lstsq(columns / L[:, None], np.ones_like(L), rcond=None)[0]
            error = np.sum((columns @ constants / L - 1) ** 2)
            best = min(best, (error, *constants, alpha, beta))
    return best


true = Law(1.69, 406.4, 410.7, 0.34, 0.28)
exact = [
    Run(N, D, float(true.predict(N, D)))
    for N in np.geomspace(1e7, 1e10, 5)
    for D in np.geomspace(1e8, 1e11, 5)
]
assert np.allclose(fit_by_hand(exact)[1:], true.constants, rtol=1e-3)
assert np.allclose(scaling.fit(exact).constants, true.constants, rtol=1e-2)

# %% [markdown] key="check" tags=["lab"]
# ## Predict, then look
#
# The run with the largest model and the longest text is put aside. The law is fitted to the runs
# that cost less, and has to say what this one will reach, though it is beyond all of them.

# %%
held_out = runs[-1:]
law = scaling.fit(runs[:-1], bootstrap=40)
predicted = float(law.predict(held_out[0].parameters, held_out[0].tokens))
low, high = law.predict_interval(held_out[0].parameters, held_out[0].tokens)
print(f"alpha {law.alpha:.2f}, beta {law.beta:.2f}, E {law.E:.2f} ± {law.errors[0]:.2f}")
print(f"predicted {predicted:.3f} ({low:.2f} to {high:.2f}), measured {held_out[0].loss:.3f}")
assert abs(predicted / held_out[0].loss - 1) < 0.15
assert runs[-1].loss < min(run.loss for run in runs[:-1])

# %% [markdown] key="fit-picture" tags=["picture"]
# ### Figure: the law and its runs
#
# The star was not fitted. Where a curve flattens, the model has become too small for its text, and
# a larger one takes over.

# %%
scaling.plot_law(law, runs[:-1], held_out, title="Python source, bytes")

# %% [markdown] key="extrapolate" tags=["question"]
# ### Question: how far can one extrapolate?
#
# Our law was fitted between one thousand and a hundred thousand parameters. Would you predict GPT-3
# with it?
#
# <details><summary>Answer</summary>
#
# No. The exponents are uncertain (look at the standard errors), and over six orders of magnitude a
# small error of an exponent becomes a large one of the loss. E is hardly determined at all: none of
# our models comes near it. Besides, the law holds for one kind of model, one data set, one
# tokenizer and well-chosen learning rates; and with constant text a second pass over it is worth
# less than fresh text. In practice one extrapolates by one or two orders of magnitude of compute,
# and checks on the way.
#
# </details>

# %% [markdown] key="emergence" tags=["concept"]
# ## Emergence: the curve jumps, the model does not
#
# A benchmark asks for an answer of k tokens and counts it only if all are right. If each token is
# right with probability p, independently, the answer is with p^k. Let p grow smoothly with size:
# for k = 1 the score grows smoothly too, for k = 20 it is 0 for a long time and then shoots up.
# Nothing has happened inside the model at that point: the metric has a threshold (Schaeffer et al.
# 2023). With a hundred questions it gets worse: scores below 1% cannot be seen at all.

# %%
sizes = np.geomspace(1e7, 1e12, 40)
p = np.exp(-400 / sizes**0.38)  # of one token: smooth in the size
exact_match = {k: p**k for k in (1, 5, 20)}
rng = np.random.default_rng(0)
seen = rng.binomial(100, exact_match[20]) / 100  # on a test of a hundred questions

good = np.searchsorted(p, 0.7)  # the first size at which seven tokens of ten are right
for at in (good, good + 10, -1):
    print(f"{sizes[at]:.0e} parameters: " + ", ".join(f"{y[at]:.1%}" for y in exact_match.values()))
assert exact_match[20][good] < 0.01
assert exact_match[20][-1] > 0.7

# %% [markdown] key="emergence-picture" tags=["picture"]
# ### Figure: one model family, three metrics
#
# The same models in all curves. The right picture has logarithms on its vertical axis: there even
# the "sudden" ability turns out to have grown all along.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3))
for k, values in exact_match.items():
    left.semilogx(sizes, values, label=f"{k} token{'s' * (k > 1)} right")
    right.loglog(sizes, values)
left.plot(sizes, seen, "k.", label="20 tokens, 100 questions")
right.set_ylim(1e-6, 2)
left.set_ylabel("exact match")
figure.legend(fontsize=7, ncol=4, loc="upper center")
for axis in (left, right):
    axis.set_xlabel("parameters N")
figure.tight_layout(rect=(0, 0, 1, 0.93))
plt.show()

# %% [markdown] key="smooth" tags=["exercise"]
# ### Exercise: a metric without a jump
#
# Give `smooth(p, k)`, a score in nats for the answer of k tokens that changes with p as gently for
# k = 20 as for k = 1, up to a factor of k.

# %% tags=["reader"]
smooth = None  # replace None by your function: def smooth(p, k): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(p, k):
    return k * np.log(p)  # the log-likelihood of the answer


smooth = smooth or solution

# %% tags=["check"]
assert np.allclose(smooth(p, 20), 20 * smooth(p, 1))
assert np.allclose(np.exp(smooth(p, 5)), exact_match[5])
print("right: the log-likelihood of the answer, as in notebook 12")
