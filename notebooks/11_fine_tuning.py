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
# # 11. Fine-tuning, LoRA and quantization
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/11_fine_tuning.ipynb)
#
# A model that knows a language can learn a new task from little text, because most of what the task
# needs is there. This notebook takes a model that was trained on one kind of sentence and adapts it
# to another, in three ways: all weights, a few of them, or two thin matrices beside each (LoRA).
# Then it asks how few bits a weight needs, and at last does both at once, as one does with large
# models on small machines.

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
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt import lora
from jaxgpt.config import LoraConfig, ModelConfig
from jaxgpt.model import Coords, build, compute_logits, init_params
from jaxgpt.model.lowrank import attach
from jaxgpt.quantized_array import quantize_array
from jaxgpt.selection import merge, select, select_letters
from jaxgpt.tokenizer import train as train_tokenizer

# %% [markdown] key="task" tags=["concept"]
# ## What is known, and what is new
#
# The model first learns French sentences in the present tense (*le chat noir suit la souris*). The
# new task is the imperfect: *le chat noir suivait la souris*. Articles, genders, the places of
# adjectives stay as they are; only the verbs are new, and they occur in the tokenizer, but the
# model has never seen them. There are plenty of old sentences and two hundred new ones.

# %%
NOUNS = [("chat", 0), ("chien", 0), ("loup", 0), ("renard", 0), ("lapin", 0), ("souris", 1),
         ("vache", 1), ("poule", 1), ("chèvre", 1), ("tortue", 1)]  # fmt: skip
VERBS = {
    "mange": "mangeait",
    "voit": "voyait",
    "suit": "suivait",
    "aime": "aimait",
    "mord": "mordait",
}
BEFORE = [("petit", "petite"), ("grand", "grande"), ("vieux", "vieille")]
AFTER = [("noir", "noire"), ("blanc", "blanche"), ("gris", "grise")]


def make_noun(rng):
    """Return a noun with its article and perhaps an adjective."""
    noun, gender = NOUNS[rng.integers(len(NOUNS))]
    before = [BEFORE[rng.integers(3)][gender]] if rng.random() < 0.3 else []
    after = [AFTER[rng.integers(3)][gender]] if rng.random() < 0.3 else []
    return " ".join([("le", "la")[gender], *before, noun, *after])


def make_text(rng, count, is_past):
    """Return so many sentences."""
    verbs = list(VERBS.values() if is_past else VERBS)
    return "".join(
        f"{make_noun(rng)} {verbs[rng.integers(len(verbs))]} {make_noun(rng)}.\n".capitalize()
        for _ in range(count)
    )


rng = np.random.default_rng(0)
old_text, new_text = make_text(rng, 4000, False), make_text(rng, 200, True)
tokenizer = train_tokenizer([old_text, new_text * 20], 400)
T, B = 32, 32
cfg = ModelConfig(vocab=tokenizer.vocab_size, context=T, width=96, layers=2, heads=4, ffn=192)
model = build(cfg)
ids = {name: tokenizer.encode(text) for name, text in (("old", old_text), ("new", new_text))}
held_out = {
    name: tokenizer.encode(make_text(np.random.default_rng(9), 400, name == "new")) for name in ids
}
print(*new_text.splitlines()[:3], {name: len(found) for name, found in ids.items()}, sep="\n")


def cut(ids, count, rng):
    """Return rows [count T+1] cut out of a stream of tokens."""
    starts = rng.integers(0, len(ids) - T - 1, count)
    return np.asarray(ids)[starts[:, None] + np.arange(T + 1)]


@jax.jit
def compute_loss(params, rows):
    """Return the mean loss of rows [B T+1], nats per token."""
    tokens = rows[:, :-1]
    at = Coords(jnp.broadcast_to(jnp.arange(T), tokens.shape), jnp.ones_like(tokens))
    hidden, _ = model.apply({"params": params}, tokens, at)
    logp = jax.nn.log_softmax(compute_logits(cfg, params, hidden))
    return -jnp.take_along_axis(logp, rows[:, 1:, None], -1).mean()


def measure_losses(params):
    """Return the held-out losses on old and new sentences."""
    rng = np.random.default_rng(5)
    return {
        name: float(compute_loss(params, cut(found, 128, rng))) for name, found in held_out.items()
    }


def fit(trained, put_in, ids, steps, lr):
    """Train `trained`, any tree: `put_in(trained)` makes the parameters of the model of it.

    Returns the trained tree, and the losses by step.
    """
    rule = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(lr, steps))
    )

    @jax.jit
    def step(trained, state, rows):
        loss, gradient = jax.value_and_grad(lambda t: compute_loss(put_in(t), rows))(trained)
        updates, state = rule.update(gradient, state)
        return optax.apply_updates(trained, updates), state, loss

    rng, state, losses = np.random.default_rng(1), rule.init(trained), []
    for _ in range(steps):
        trained, state, loss = step(trained, state, cut(ids, B, rng))
        losses.append(loss)
    return trained, np.array(losses)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def as_is(params):
    return params


start, letters = init_params(cfg, jax.random.key(0))
base, _ = fit(start, as_is, ids["old"], 300, 3e-3)
results = {"base": measure_losses(base)}
print(f"{count(base):,} parameters", {name: round(x, 2) for name, x in results["base"].items()})

# %% [markdown] key="full" tags=["lab"]
# ## All weights
#
# The plainest way: go on training, on the new text. Beside it the same number of steps from a
# random start, to see what the base was good for. In the library this is `train.start=runs/base`.

# %%
STEPS = 60
full, full_curve = fit(base, as_is, ids["new"], STEPS, 1e-3)
scratch, scratch_curve = fit(start, as_is, ids["new"], STEPS, 1e-3)
results |= {"from scratch": measure_losses(scratch), "all weights": measure_losses(full)}
for name, losses in results.items():
    print(f"{name:14} old {losses['old']:.2f}  new {losses['new']:.2f}")
assert results["all weights"]["new"] < results["base"]["new"] - 1
assert results["all weights"]["new"] < results["from scratch"]["new"] - 0.5
assert results["all weights"]["old"] > results["base"]["old"] + 0.1  # it forgets

# %% [markdown] key="partial" tags=["concept"]
# ## A few of them
#
# One may freeze most weights. `optimizer.train` chooses parameters by patterns of their names, and
# there is optimizer state for these only. Which are enough depends on the task. Here are the norms
# alone, and the embedding alone. `select` takes them out of the tree, `merge` puts them back.

# %%
for name, patterns in (("norms", ("*norm*",)), ("embedding", ("embed*",))):
    selection = select_letters(letters, patterns)
    chosen = select(base, selection)
    back = merge(chosen, base)  # what was selected, put back, changes nothing
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, back, base)))
    trained, _ = fit(chosen, lambda t: merge(t, base), ids["new"], STEPS, 3e-3)
    results[name] = measure_losses(merge(trained, base))
    print(
        f"{name:10} {count(chosen):7,} numbers trained: old {results[name]['old']:.2f}, new {results[name]['new']:.2f}"
    )
assert results["embedding"]["new"] < results["base"]["new"]

# %% [markdown] key="lora" tags=["concept"]
# ## LoRA: two thin matrices
#
# The change that fine-tuning makes to a weight W [in, out] is of low rank, more or less. So write
# it as a product from the start (Hu et al. 2021):
#
# ```text
# W' = W + (α / r) · A B        A [in, r], random        B [r, out], zero        r = 4, say
# ```
#
# Only A and B are trained. At the beginning B is 0, and the model is exactly the base. At the end,
# one may keep A and B as a small file beside the base, one for each task, or add the product to W
# once and for all: then it costs nothing at generation. Here it is for all linear maps of the
# model. The letters of a parameter tell which of its dimensions are inputs and which outputs.

# %%
ALPHA = 8
flat_letters = flatten_dict(letters)
MAPS = [path for path, name in flat_letters.items() if ">" in name and path[0] == "stack"]


def get_matrix_shape(path):
    """Return the sizes (layers, inputs, outputs) of a stacked linear map such as "LD>HK"."""
    inputs = len(flat_letters[path].split(">")[0])
    shape = flatten_dict(base)[path].shape
    return shape[0], int(np.prod(shape[1:inputs])), int(np.prod(shape[inputs:]))


def init_adapters(r, seed=0):
    rng = np.random.default_rng(seed)
    adapters = {}
    for path in MAPS:
        layers, inputs, outputs = get_matrix_shape(path)
        a = rng.normal(size=(layers, inputs, r)) / np.sqrt(inputs)
        adapters["/".join(path)] = {
            "a": jnp.asarray(a, jnp.float32),
            "b": jnp.zeros((layers, r, outputs)),
        }
    return adapters


def add_adapters(adapters, params, r):
    """Return the parameters with the products of the adapters added: W + α / r · A B."""
    flat = dict(flatten_dict(params))
    for name, adapter in adapters.items():
        path = tuple(name.split("/"))
        change = ALPHA / r * adapter["a"] @ adapter["b"]
        flat[path] = flat[path] + change.reshape(flat[path].shape)
    return unflatten_dict(flat)


R = 4
adapters = init_adapters(R)
same = add_adapters(adapters, base, R)
assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, same, base)))  # B is 0

adapters, lora_curve = fit(adapters, lambda a: add_adapters(a, base, R), ids["new"], STEPS, 1e-2)
merged = add_adapters(adapters, base, R)
results["LoRA, r = 4"] = measure_losses(merged)
print(
    f"{count(adapters):,} of {count(base):,} numbers trained ({count(adapters) / count(base):.0%})"
)
print({name: round(x, 2) for name, x in results["LoRA, r = 4"].items()})
assert results["LoRA, r = 4"]["new"] < results["base"]["new"] - 1

# %% [markdown] key="merge" tags=["example"]
# ### Example: beside the base, or merged
#
# x (W + A B) and x W + (x A) B are the same. The second form never makes the large product; it is
# how the library computes LoRA, with `train.start=runs/base lora.rank=4 lora.alpha=8`. Our
# adapters, put into its tree, give the same loss, and its merge gives the same weights.

# %%
path = MAPS[0]
_, inputs, outputs = get_matrix_shape(path)
a, b = (np.asarray(adapters["/".join(path)][name][0]) for name in "ab")
weight = np.asarray(flatten_dict(base)[path][0]).reshape(inputs, outputs)
x = np.random.default_rng(0).normal(size=(5, inputs))
beside = x @ weight + ALPHA / R * (x @ a) @ b
fused = x @ np.asarray(flatten_dict(merged)[path][0]).reshape(inputs, outputs)
assert np.allclose(beside, fused, atol=1e-4)
print("/".join(path), f"W {weight.size:,} numbers, A and B {a.size + b.size:,}")

tree = {}
for name, adapter in adapters.items():  # in the library the factors keep the dimensions of the map
    *module, _ = each = tuple(name.split("/"))
    shape, n = flatten_dict(base)[each].shape, len(flat_letters[each].split(">")[0])
    tree[*module, "lora", "a"] = adapter["a"].reshape(*shape[:n], R)
    tree[*module, "lora", "b"] = adapter["b"].reshape(shape[0], R, *shape[n:])
attached = attach(base, lora.to_nodes(unflatten_dict(tree), ALPHA / R))
rows = cut(held_out["new"], 16, np.random.default_rng(0))
assert np.isclose(compute_loss(attached, rows), compute_loss(merged, rows), atol=1e-4)
by_library = lora.merge_params(cfg, attached).params
assert all(
    jax.tree.leaves(jax.tree.map(lambda x, y: np.allclose(x, y, atol=1e-5), by_library, merged))
)
assert count(lora.init_adapters(cfg, LoraConfig(rank=R), jax.random.key(0))) == count(adapters)

# %% [markdown] key="results" tags=["picture"]
# ### Figure: learned and forgotten
#
# On the left what was to be learned, on the right what should not be lost. Whatever learns the past
# forgets some of the present, because nothing in the new text asks for it; the norms alone forget
# nothing and learn little. But with LoRA the base is still there, untouched: leave the adapters
# out, and every old number is as it was, bit for bit.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for axis, kind in zip(axes, ("new", "old"), strict=True):
    axis.barh(list(results), [losses[kind] for losses in results.values()],
              color="tab:green" if kind == "new" else "tab:gray")  # fmt: skip
    axis.set_xlabel(f"held-out loss on {kind} sentences, nats")
axes[0].invert_yaxis()
figure.tight_layout()
plt.show()
assert measure_losses(base) == results["base"]

# %% [markdown] key="rank" tags=["picture"]
# ### Figure: is the change of low rank?
#
# The singular values of what full fine-tuning has changed in one matrix, and of the matrix itself.
# The change is concentrated in fewer directions than the weights.

# %%
change = [
    (np.asarray(flatten_dict(tree)[path][0]) - offset).reshape(inputs, outputs)
    for tree, offset in ((full, np.asarray(flatten_dict(base)[path][0])), (base, 0.0))
]
figure, axis = plt.subplots()
for matrix, label in zip(change, ("change by fine-tuning", "weights"), strict=True):
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values**2 / (values**2).sum()
    effective = np.exp(-(share * np.log(share + 1e-12)).sum())
    axis.semilogy(values / values[0], label=f"{label}: effective rank {effective:.0f}")
    print(label, f"the first 4 directions hold {share[:4].sum():.0%}")
axis.set_xlabel("singular value, sorted")
axis.set_ylabel("relative to the largest")
axis.legend()
plt.show()

# %% [markdown] key="size" tags=["exercise"]
# ### Exercise: how small is an adapter?
#
# Llama 2 7B has 32 layers of width 4096, and q, k, v and o are matrices [4096, 4096] there. Write
# `adapter_numbers(rank)`: how many numbers has LoRA on q and v in all layers?

# %% tags=["reader"]
adapter_numbers = None  # replace None by your function: def adapter_numbers(rank): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(rank):
    return 32 * 2 * (4096 * rank + rank * 4096)


adapter_numbers = adapter_numbers or solution

# %% tags=["check"]
assert adapter_numbers(8) == 4_194_304
print(f"right: {adapter_numbers(8) / 6_738_415_616:.2%} of the model")

# %% [markdown] key="quantization" tags=["concept"]
# ## Quantization: a weight in 8 bits, or 4
#
# A weight in float32 takes 4 bytes. In *absmax* quantization a group of weights shares a scale, the
# largest absolute value over the largest integer, and each weight becomes the nearest multiple of
# it:
#
# ```text
# scale = max |w| / 127          q = round(w / scale), from −127 to 127          w ≈ q · scale
# ```
#
# The error is at most half a scale. So everything depends on the group: one outlier makes the scale
# large for all who share it. One scale for the whole matrix, one for each output, or one for each
# 32 weights: the last costs half a bit more for each weight, with a scale of 16 bits, and can be
# used down to 4 bits. In the library it is `model.quantize("int8")`, or `"int4"`.


# %%
def quantize(w, bits, group):
    """Return integers and scales of a matrix [in, out]; a scale for each `group` inputs of an output."""
    grouped = np.float32(w).reshape(-1, group, w.shape[1])  # [groups, group, out]
    top = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(grouped).max(1, keepdims=True), 1e-12) / top
    scales = np.float32(jnp.asarray(scales, jnp.bfloat16))  # as it is stored, in 16 bits
    return np.clip(np.round(grouped / scales), -top, top).astype(np.int8), scales


def dequantize(q, scales):
    return (q * scales).reshape(-1, q.shape[2])


rng = np.random.default_rng(0)
w = rng.normal(size=(256, 64))
w[17, 3] = 30  # an outlier
errors = {}
for group in (256, 32):
    q, scales = quantize(w, 8, group)
    error = np.abs(dequantize(q, scales) - w).reshape(-1, group, 64)
    assert (error <= scales / 2 + 1e-6).all()
    by_library = np.asarray(quantize_array(jnp.asarray(w, jnp.float32), 8, group, first=0, count=1))
    assert np.isclose(by_library, dequantize(q, scales), atol=1e-6).mean() > 0.999
    errors[group] = error.reshape(256, 64)[:, 3].mean()
    print(f"a scale for {group:3} weights: mean error beside the outlier {errors[group]:.4f}")
assert errors[256] > 3 * errors[32]

# %% [markdown] key="bits" tags=["picture"]
# ### Figure: how many bits does this model need?
#
# All linear maps quantized, the loss on the old sentences. Down to 3 bits nothing happens to this
# little model, whose task is easy; with 2, which leave only −1, 0 and 1, small groups are worth
# their price. Large models need 4.


# %%
def quantize_params(params, bits, group):
    """Return the parameters with all linear maps rounded to so many bits."""
    flat = dict(flatten_dict(params))
    for path in MAPS:
        layers, inputs, outputs = get_matrix_shape(path)
        matrices = np.asarray(flat[path]).reshape(layers, inputs, outputs)
        size = inputs if group is None else group
        rounded = [dequantize(*quantize(matrix, bits, size)) for matrix in matrices]
        flat[path] = jnp.asarray(np.stack(rounded).reshape(flat[path].shape), jnp.float32)
    return unflatten_dict(flat)


BITS = (8, 6, 5, 4, 3, 2)
figure, axis = plt.subplots()
quantized = {}
for group, label in ((None, "a scale for each output"), (16, "a scale for each 16 weights")):
    quantized[group] = [measure_losses(quantize_params(base, bits, group))["old"] for bits in BITS]
    axis.plot(BITS, quantized[group], marker="o", label=label)
axis.axhline(results["base"]["old"], color="gray", linestyle="--", label="float32")
axis.invert_xaxis()
axis.set_xlabel("bits")
axis.set_ylabel("loss on old sentences, nats")
axis.legend()
plt.show()
assert abs(quantized[None][0] - results["base"]["old"]) < 0.01
assert quantized[16][-1] < quantized[None][-1]

# %% [markdown] key="qlora" tags=["lab"]
# ## Both at once
#
# QLoRA (Dettmers et al. 2023): keep the base in few bits, frozen, and train adapters in full
# precision on top. The adapters learn the task and, on the way, repair what rounding has broken.
# Here the base is rounded to 2 bits, with one scale for each output, and the adapters are trained
# on the *old* sentences, so that all they can do is repair.

# %%
rounded = quantize_params(base, 2, None)
repaired, _ = fit(init_adapters(R), lambda a: add_adapters(a, rounded, R), ids["old"], 100, 3e-3)
losses = {
    "float32": results["base"]["old"],
    "2 bits": measure_losses(rounded)["old"],
    "2 bits + LoRA": measure_losses(add_adapters(repaired, rounded, R))["old"],
}
print({name: round(loss, 3) for name, loss in losses.items()})
assert losses["2 bits + LoRA"] < (losses["float32"] + losses["2 bits"]) / 2

# %% [markdown] key="memory" tags=["exercise"]
# ### Exercise: does it fit?
#
# Write `gigabytes(parameters, bits, group)`: the memory of quantized weights with a scale of 16
# bits for each group, in 10⁹ bytes. Does a model of 7 billion parameters fit into 4 GB with 4 bits
# and groups of 32?

# %% tags=["reader"]
gigabytes = None  # replace None by your function: def gigabytes(parameters, bits, group): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(parameters, bits, group):
    return parameters * (bits + 16 / group) / 8 / 1e9


gigabytes = gigabytes or solution

# %% tags=["check"]
assert np.isclose(gigabytes(7e9, 4, 32), 3.9375)
print(f"right: {gigabytes(7e9, 4, 32):.2f} GB, but {gigabytes(7e9, 16, 1e9):.0f} GB in 16 bits")

# %% [markdown] key="choose" tags=["question"]
# ### Question: which way for which purpose?
#
# One model for a hundred customers, each with texts of their own: full fine-tuning or LoRA?
#
# <details><summary>Answer</summary>
#
# LoRA. One base stays in memory, and for each customer there is a file of some megabytes; requests
# of several customers can even be computed in one batch. Full fine-tuning would need a hundred
# copies of the model. It pays where the new text is large and far from the old one (another
# language, say), and where the change is not of low rank.
#
# </details>
