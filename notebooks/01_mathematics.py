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

from jaxgpt import inspect, measure, objectives, optimizer, visualize
from jaxgpt.config import OptimizerConfig
from jaxgpt.model.heads import Head

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
