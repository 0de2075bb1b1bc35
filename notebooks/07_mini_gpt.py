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
# # 7. The mini-GPT
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/07_mini_gpt.ipynb)
#
# All parts are there: tokens, attention, positions, blocks. Here they become a GPT. We count its
# parameters, all 13,767,552 of them, by hand and by the library; train a smaller sister on Python's
# own source until it writes code that looks like code; and choose, token by token, how to draw from
# what it predicts: greedy, with a temperature, top-k, top-p, min-p.

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
import json
import math
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import data, inspect, measure, sampling
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords, build, compute_logits, count_params, init_params

# %% [markdown] key="count" tags=["concept"]
# ## Counting parameters
#
# The config `gpt_mini`: vocabulary V = 8192, width D = 384, L = 6 layers, F = 1024 in the
# feed-forward. No biases; RMSNorm has one number for each channel; RoPE has none; and the output
# head is the embedding itself (tied).
#
# | part | formula | number |
# |---|---|---|
# | embedding, also the head | V · D | 3,145,728 |
# | attention: q, k, v, o | L · 4 · D² | 3,538,944 |
# | feed-forward: gate, up, down | L · 3 · D · F | 7,077,888 |
# | norms: two a layer, one at the end | (2 L + 1) · D | 4,992 |
# | together | | **13,767,552** |
#
# The number of heads does not occur: heads divide the width among them. Nor does the context.

# %%
V, D, L, F = 8192, 384, 6, 1024
by_hand = {
    "embedding": V * D,
    "attention": L * 4 * D**2,
    "feedforward": L * 3 * D * F,
    "norms": (2 * L + 1) * D,
}
mini = configs.load("gpt_mini").model
by_library = count_params(mini)
assert all(by_library[part] == count for part, count in by_hand.items())
assert sum(by_hand.values()) == by_library["total"] == 13_767_552

params, _ = init_params(mini, jax.random.key(0))  # and counted once more, in memory
assert sum(x.size for x in jax.tree.leaves(params)) == 13_767_552
print({part: f"{count:,}" for part, count in by_hand.items()})

# %% [markdown] key="famous" tags=["example"]
# ### Example: GPT-2, and a decoder from the textbooks
#
# GPT-2 small is often said to have 117 million parameters; the released model has **124,439,808**
# (the paper's first table was wrong, and its authors corrected it). And the decoder that is given
# as an example with vocabulary 50,000, width 512, 6 layers and F = 2048 has not "about 80 million"
# parameters but **44.5 million**, 25.6 of them in the embedding. 80 is not even what one gets with
# a head of its own: that is 70.1.

# %%
assert count_params(configs.load("gpt2_124m").model)["total"] == 124_439_808

textbook = ModelConfig(
    vocab=50_000,
    width=512,
    layers=6,
    heads=8,
    ffn=2048,
    feedforward="plain",
    norm="layer",
    bias=True,
)
untied = dataclasses.replace(textbook, tie=False)
for cfg in (textbook, untied):
    print(f"tie={cfg.tie}: {count_params(cfg)['total']:,} parameters")
assert round(count_params(textbook)["total"] / 1e6, 1) == 44.5
assert round(count_params(untied)["total"] / 1e6, 1) == 70.1

# %% [markdown] key="flops" tags=["exercise"]
# ### Exercise: what does one step of training cost?
#
# About 6 floating-point operations for each parameter and token: two forward, four backward. Write
# `step_flops(batch, context)` for the mini-GPT. (The product with the head counts, the look-up in
# the embedding does not: as the two are one matrix, all parameters count once.)

# %% tags=["reader"]
step_flops = None  # replace None by your function: def step_flops(batch, context): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(batch, context):
    return 6 * 13_767_552 * batch * context


step_flops = step_flops or solution

# %% tags=["check"]
assert np.isclose(step_flops(16, 256), 3.38e11, rtol=0.01)
print(f"right: {step_flops(16, 256):.2e}, some seconds on two cores")

# %% [markdown] key="start" tags=["concept"]
# ## Before the first step
#
# A new model knows nothing, so that its loss must be that of a uniform guess: ln 8192 = 9.01 nats.
# If it is far from that, something is wrong, and it can be seen before a single step. This is the
# cheapest test there is.

# %%
tokens = jax.random.randint(jax.random.key(1), (2, 65), 0, V)
at = Coords(jnp.broadcast_to(jnp.arange(64), (2, 64)), jnp.ones((2, 64), int))
hidden, _ = build(mini).apply({"params": params}, tokens[:, :-1], at)
logp = jax.nn.log_softmax(compute_logits(mini, params, hidden))
first_loss = float(-jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean())
print(f"loss of the new model {first_loss:.3f}, ln V {math.log(V):.3f}")
assert abs(first_loss - math.log(V)) < 0.2

# %% [markdown] key="train" tags=["lab"]
# ## Training
#
# Two cores would need hours for the mini-GPT. Its smaller sister has the same parts, 4 layers of
# width 128 and a vocabulary of 1024, and reads some of the modules that come with Python.
# `jaxgpt.train` does the rest: it trains the tokenizer, packs the text into rows, holds a part of
# it out, saves checkpoints.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
modules = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:60]
(folder / "text").mkdir()
for path in modules:
    (folder / "text" / path.name).write_bytes(path.read_bytes())

STEPS = max(100, round(400 * scale))
config = Config(
    name="sister",
    folder=str(folder),
    model=ModelConfig(vocab=1024, context=128, width=128, layers=4, heads=4, ffn=344),
    data=DataConfig(source=str(folder / "text"), cache=str(folder / "tokens")),
    optimizer=OptimizerConfig(name="muon", lr=5e-3, matrix_lr=2e-2, warmup=20),
    train=TrainConfig(
        steps=STEPS,
        batch=8,
        eval_every=STEPS // 5,
        eval_batches=8,
        save_every=STEPS,
        sample_every=0,
    ),
)
progress = jaxgpt.train(config, is_quiet=True)
model = jaxgpt.load(config.run_folder)
print(model, f"held-out loss {progress.best_loss:.3f}")

# %% [markdown] key="baselines" tags=["concept"]
# ## Is that good? Baselines
#
# A loss alone says nothing. Two baselines that one can count: the *unigram* knows how frequent each
# token is, and the *bigram* how frequent each token is after each other one. A Transformer that
# does not beat the unigram has learned nothing; to beat the bigram it has to look further back than
# one token.

# %%
corpus = data.prepare(config.data, config.tokenizer_vocab)
train_ids, test_ids = (np.asarray(part.ids[:]) for part in (corpus.train, corpus.held_out))
V = config.model.vocab
unigram = np.bincount(train_ids, minlength=V) + 0.1
unigram = unigram / unigram.sum()
pairs = np.zeros((V, V))
np.add.at(pairs, (train_ids[:-1], train_ids[1:]), 1)
bigram = pairs + 5 * unigram  # what was not seen after a token is as likely as elsewhere
bigram = bigram / bigram.sum(1, keepdims=True)
losses = {
    "uniform": math.log(V),
    "unigram": float(-np.log(unigram[test_ids]).mean()),
    "bigram": float(-np.log(bigram[test_ids[:-1], test_ids[1:]]).mean()),
    "Transformer": progress.best_loss,
}
for name, loss in losses.items():
    print(f"{name:12} {loss:.2f} nats, perplexity {measure.perplexity(loss):6.1f}")
assert losses["Transformer"] < losses["unigram"] - 0.5

# %% [markdown] key="curve" tags=["picture"]
# ### Figure: the curve
#
# Within the first steps the model learns which tokens are frequent, then which follow each other,
# then what lies further back: the curve crosses the lines in this order.

# %%
lines = (pathlib.Path(config.run_folder) / "metrics.jsonl").read_text().splitlines()
records = [json.loads(line) for line in lines]
steps, values = zip(
    *[(r["step"], r["loss"]) for r in records if r.get("kind") == "train"], strict=True
)
figure, axis = plt.subplots()
axis.plot(steps, values, color="black", label="training loss")
for (name, loss), style in zip(list(losses.items())[:3], (":", "--", "-."), strict=True):
    axis.axhline(loss, linestyle=style, color="tab:red", label=name)
axis.set_xlabel("step")
axis.set_ylabel("nats per token")
axis.legend()
plt.show()

# %% [markdown] key="before-after" tags=["example"]
# ### Example: before and after
#
# The same prompt, the same random seed; the only difference is the training.

# %%
new, _ = init_params(config.model, jax.random.key(0))
untrained = LanguageModel(model.config, new, model.tokenizer)
prompt = "    def __init__(self"
for name, each in (("before", untrained), ("after", model)):
    text = each.generate([prompt], temperature=0.7, tokens=40, seed=1)[0].text
    print(f"--- {name}\n{prompt}{text}\n")
scores = {
    name: each.score([prompt])[0].mean for name, each in (("before", untrained), ("after", model))
}
assert scores["after"] > scores["before"] + 1

# %% [markdown] key="sampling" tags=["concept"]
# ## Drawing a token
#
# The model gives probabilities; which token comes is our choice.
#
# - **greedy**: the likeliest, always. The same answer every time, and soon a loop.
# - **temperature** τ: p ∝ exp(logit / τ). Below 1 sharper, above 1 flatter.
# - **top-k**: only the k likeliest. k is the same where one token is sure and where a hundred are
# possible.
# - **top-p** (nucleus): the fewest tokens that have the probability p together. Adapts to how sure
# the model is.
# - **min-p**: the tokens that are at least min-p times as likely as the likeliest. Adapts too, and
# needs no sum.
#
# Each is a few lines. The library has them as thresholds on sorted scores, so that each row of a
# batch may have its own.


# %%
def keep_top_k(p, k):
    return p >= np.sort(p)[-k]


def keep_top_p(p, total):
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]  # of the likelier ones
    kept = np.zeros(len(p), bool)
    kept[order[before < total]] = True
    return kept


def keep_min_p(p, share):
    return p >= share * p.max()


logits = inspect.capture(model, "import ", []).logits[-1].astype(np.float64)
p = measure.softmax(logits)
ranked = jnp.sort(jnp.asarray(logits, jnp.float32), descending=True)[None]
for name, rule, value in (
    ("top_k", keep_top_k, 20),
    ("top_p", keep_top_p, 0.9),
    ("min_p", keep_min_p, 0.1),
):
    threshold = sampling.SAMPLERS[name](ranked, jnp.array([[value]]))
    by_library = np.float32(logits) >= float(threshold[0, 0])
    assert (by_library == rule(p, value)).all(), name
    print(f"{name} = {value}: {by_library.sum()} tokens of {len(p)} are left")

# %% [markdown] key="sure" tags=["picture"]
# ### Figure: the same rules where the model is sure and where it is not
#
# After `import ` many modules are possible, after `**kw` hardly anything but `args`. Top-k keeps
# the same number in both; top-p and min-p keep as many as there are candidates.

# %%
contexts = {"unsure": "import ", "sure": "def __init__(self, *args, **kw"}
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
counts = {}
for axis, (name, prompt) in zip(axes, contexts.items(), strict=True):
    p = measure.softmax(inspect.capture(model, prompt, []).logits[-1])
    rules = {
        "top-k 20": keep_top_k(p, 20),
        "top-p 0.9": keep_top_p(p, 0.9),
        "min-p 0.1": keep_min_p(p, 0.1),
    }
    counts[name] = {rule: int(kept.sum()) for rule, kept in rules.items()}
    axis.bar(range(40), np.sort(p)[::-1][:40], color="lightgray")
    for rule, color in zip(rules, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        axis.axvline(
            counts[name][rule] - 0.5, color=color, label=f"{rule}: {counts[name][rule]} tokens"
        )
    axis.set_title(f"{name}: {prompt!r}", fontsize=9)
    axis.set_xlim(-1, 40)
    axis.legend(fontsize=7)
axes[0].set_ylabel("probability, sorted")
figure.tight_layout()
plt.show()
assert counts["sure"]["top-p 0.9"] < counts["unsure"]["top-p 0.9"]

# %% [markdown] key="side-by-side" tags=["lab"]
# ## Side by side
#
# The same prompts under six rules. To measure what one sees, two numbers: how many of the
# three-token sequences are different from all others (low = a loop), and the mean log-probability
# that the model itself gives to what was written (high = what it finds likely).

# %%
RULES = {
    "greedy": dict(temperature=0.0, top_p=1.0),
    "temperature 0.5": dict(temperature=0.5, top_p=1.0),
    "temperature 1": dict(temperature=1.0, top_p=1.0),
    "top-k 20": dict(temperature=1.0, top_k=20, top_p=1.0),
    "top-p 0.9": dict(temperature=1.0, top_p=0.9),
    "min-p 0.1": dict(temperature=1.0, top_p=1.0, min_p=0.1),
    "greedy, penalty 1.3": dict(temperature=0.0, top_p=1.0, repetition_penalty=1.3),
}
prompts = ["import ", "def read(", "class ", "    return ", "    if self.", "# This "]
table = {}
for name, rule in RULES.items():
    found = model.generate(prompts, tokens=48, seed=3, **rule)
    triples = [t for g in found for t in zip(g.tokens, g.tokens[1:], g.tokens[2:], strict=False)]
    table[name] = (len(set(triples)) / len(triples), np.mean([np.mean(g.logprobs) for g in found]))
    print(
        f"{name:20} different {table[name][0]:4.0%}  log p {table[name][1]:5.2f}   {found[1].text[:50]!r}"
    )
assert table["greedy"][0] < table["temperature 1"][0]
assert table["greedy"][1] > table["temperature 1"][1]

# %% [markdown] key="trade" tags=["picture"]
# ### Figure: likely or varied
#
# Every rule is a compromise between the two.

# %%
figure, axis = plt.subplots()
for name, (different, logp) in table.items():
    axis.plot(different, logp, "o")
    axis.annotate(name, (different, logp), xytext=(4, 4), textcoords="offset points", fontsize=8)
axis.set_xlabel("share of different three-token sequences")
axis.set_ylabel("mean log-probability")
axis.margins(0.2)
plt.show()

# %% [markdown] key="loop" tags=["question"]
# ### Question: why does greedy decoding loop?
#
# <details><summary>Answer</summary>
#
# What has just been written makes its own repetition more likely: induction heads (notebook 13)
# copy what followed last time, and each round makes the next one surer. Real text has surprises
# again and again; the likeliest token at every step is not the likeliest text, and not a typical
# one either. Sampling brings the surprises back, and a penalty makes copies dearer.
#
# </details>

# %% [markdown] key="temperature" tags=["exercise"]
# ### Exercise: a temperature for an entropy
#
# Write `find_temperature(logits, nats)`: the temperature at which the distribution has the given
# entropy, by bisection between 0.01 and 100. `measure.softmax(logits, temperature)` and
# `measure.entropy(p)` are there.

# %% tags=["reader"]
find_temperature = None  # replace None by your function


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(logits, nats):
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        if measure.entropy(measure.softmax(logits, middle)) > nats:
            high = middle
        else:
            low = middle
    return low


find_temperature = find_temperature or solution

# %% tags=["check"]
for nats in (0.5, 2.0, 4.0):
    temperature = find_temperature(logits, nats)
    assert np.isclose(measure.entropy(measure.softmax(logits, temperature)), nats, atol=1e-3)
    print(f"{nats} nats at a temperature of {temperature:.2f}")

# %% [markdown] key="cache" tags=["question"]
# ### Question: what does the KV cache save?
#
# To write 1,000 tokens, how many tokens does a decoder process without and with a cache?
#
# <details><summary>Answer</summary>
#
# Without: 1 + 2 + ... + 1000 = 500,500, because each step reads everything again. With: 1,000,
# because the keys and values of the past are kept, and a new token needs only its own. The price is
# memory: 2 · L · G · K numbers for each token of the text, which is why there are MQA and GQA
# (notebook 4).
#
# </details>
