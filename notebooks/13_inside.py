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
# # 13. Inside a trained model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/13_inside.ipynb)
#
# A trained Transformer is a list of matrices that nobody wrote. What do they do? This notebook
# trains a model that is small enough to be understood, in less than a minute on two cores, and
# takes it apart: what it would answer after each layer, which part made it answer so, and what
# happens if a part is removed.
#
# At the end stands a discovery that was made in large models first (Olsson et al. 2022): a pair of
# heads that reads a text, remembers what followed last time, and repeats it. They are called
# *induction heads*. You will see them being born, see their pattern, and see that the model cannot
# do without them.

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
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import inspect, optimizer, visualize
from jaxgpt.config import Config, ModelConfig, OptimizerConfig
from jaxgpt.inspect import EncodedText
from jaxgpt.inspect.attention import make_repeated_tokens
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords, build, compute_logits, init_params
from jaxgpt.tokenizer import make_byte_tokenizer

# %% [markdown] key="stream" tags=["concept"]
# ## The residual stream
#
# Every block *adds* to its input (notebook 6). So there is one stream of vectors that runs from the
# embedding to the output, and every head and every feed-forward reads from it and writes into it:
#
# ```text
# x₀ = embedding        x₁ = x₀ + heads of layer 0        x₂ = x₁ + heads of layer 1        logits = U · norm(x₂)
# ```
#
# Nothing is ever overwritten; the output is a sum of what all parts have written. That is why such
# a model can be taken apart at all. Ours has two layers of four heads and no feed-forward layers:
# what it can do, it does with attention.

# %%
tokenizer = make_byte_tokenizer()
cfg = ModelConfig(
    vocab=tokenizer.vocab_size, context=64, width=128, layers=2, heads=4,
    feedforward="none", position="t5", tie=False,
)  # fmt: skip
T, B = cfg.context, 32
BYTES = np.flatnonzero(tokenizer.lengths)  # the ids of the 256 bytes
assert (BYTES[list(b"cat")] == tokenizer.encode("cat")).all()

library = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:40]  # Python's own modules
text = BYTES[np.frombuffer(b"".join(path.read_bytes() for path in library), np.uint8)]
print(f"{len(text):,} bytes of text; {cfg.vocab} tokens")

# %% [markdown] key="two-diets" tags=["concept"]
# ## Half text, half repetition
#
# Half of each batch is Python source, byte by byte. The other half is noise: random bytes,
# repeated. Noise cannot be learned: the first copy costs ln 256 = 5.55 nats a byte or more,
# whatever the model does. But the second copy is free for a model that looks up what came before.
# Repetition is what real text is full of: names, rhymes, code; here it stands alone, so that we can
# measure it.


# %%
def make_batch(rng):
    """Return rows [B T+1]: half of them text, half noise of a random period, repeated."""
    rows = np.empty((B, T + 1), np.int32)
    rows[:, 0] = tokenizer.bos
    for row in rows[: B // 2]:
        start = rng.integers(len(text) - T)
        row[1:] = text[start : start + T]
    for row in rows[B // 2 :]:
        row[1:] = np.resize(rng.choice(BYTES, rng.integers(5, T // 2)), T)
    return rows


STEPS = 700
model = build(cfg)
params, letters = init_params(cfg, jax.random.key(0))
rule = OptimizerConfig(name="adamw", lr=3e-3, warmup=50, weight_decay=0.01)
update_rule, _ = optimizer.build(rule, STEPS, letters)


@jax.jit
def train_step(params, state, rows):
    tokens, targets = rows[:, :-1], rows[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)

    def compute_loss(params):
        at = Coords(positions, jnp.ones_like(tokens))
        hidden, _ = model.apply({"params": params}, tokens, at)
        logp = jax.nn.log_softmax(compute_logits(cfg, params, hidden))
        losses = -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
        return losses.mean(), losses[B // 2 :, T // 2 :].mean()

    (_, repeated), gradient = jax.value_and_grad(compute_loss, has_aux=True)(params)
    updates, state = update_rule.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, repeated


def as_model(params):
    """Return what `jaxgpt.inspect` takes: config, parameters and tokenizer."""
    return LanguageModel(dataclasses.replace(Config(), model=cfg), params, tokenizer)


rng = np.random.default_rng(0)
state, repeated_losses, births = update_rule.init(params), [], {}
for step in range(STEPS + 1):
    if step % 50 == 0:
        births[step] = inspect.induction_scores(as_model(params))
    params, state, loss = train_step(params, state, make_batch(rng))
    repeated_losses.append(float(loss))
trained = as_model(params)
print(f"loss on the second half of repeated noise: {np.mean(repeated_losses[-20:]):.2f} nats")
plt.plot(repeated_losses, color="black", linewidth=1)
plt.xlabel("step")
plt.ylabel("loss on repeated noise, nats")
plt.show()

# %% [markdown] key="induction" tags=["concept"]
# ## What an induction head does
#
# *... A B ... A* : what comes next? If the text repeats itself, *B*. To find it, a head at the
# second *A* has to look at the token *after* the first *A*. One layer cannot do that: the key of a
# token is made from the token alone, and *B* does not know that *A* stood before it. It takes two:
#
# 1. in layer 0 a **previous-token head** writes into the stream at *B*: "before me stood *A*";
# 2. in layer 1 the **induction head** at the second *A* asks: "where is someone who had *A*
# before?", finds *B*, and copies it to the output.
#
# The score of a head is the weight that it puts, on average, on that token: 1 is perfect, and with
# 26 to 50 tokens to look at chance is about 0.03. Ten lines count it, and
# `inspect.induction_scores` does the same.

# %%
LENGTH = 25
rows = make_repeated_tokens(trained, LENGTH)  # bos, 25 random bytes, the same 25 again
scores = np.zeros((cfg.layers, cfg.heads))
for row in rows:
    weights = inspect.attention(trained, EncodedText(row, inspect.spell_tokens(trained, row)))
    for t in range(LENGTH + 1, 2 * LENGTH + 1):
        earlier = t - LENGTH  # the same byte, the first time
        scores += weights[:, :, t, earlier + 1] / LENGTH / len(rows)

assert np.allclose(scores, inspect.induction_scores(trained, LENGTH), atol=1e-5)
print(scores.round(2))

# %% [markdown] key="scores" tags=["picture"]
# ### Figure: the score of every head
#
# All in layer 1, as it must be; nobody told the heads which of them should do it.

# %%
induction = [(1, h) for h in range(cfg.heads) if scores[1, h] > 0.4]
others = [(1, h) for h in range(cfg.heads) if scores[1, h] < 0.2]
print("induction heads:", induction, " other heads of the layer:", others)
assert induction
assert others
assert scores[1].max() > 0.6
assert scores[0].max() < 0.25
visualize.draw_heads(scores, "Induction score")

# %% [markdown] key="pattern" tags=["picture"]
# ### Figure: the pattern
#
# Twelve random bytes, and the same twelve again; a letter stands for each. In the lower half each
# row looks at one place: a stripe that is parallel to the diagonal, one step to the right of the
# earlier copy of the same letter.

# %%
NAMES = "ABCDEFGHIJKLM"
noise = np.random.default_rng(7).choice(BYTES, len(NAMES), replace=False)
names = dict(zip(noise.tolist(), NAMES, strict=True))


def write(letters):
    """Return the text in which each letter is a random byte."""
    tokens = [tokenizer.bos, *(noise[NAMES.index(letter)] for letter in letters)]
    return EncodedText(np.array(tokens, np.int32), ("<bos>", *letters))


half = "ABCDEFGHIJKL"
found = write(half + half)
best = int(scores[1].argmax())
weights = inspect.attention(trained, found)
visualize.draw_attention(weights[1, best], found.pieces, title=f"Layer 1, head {best}")

# %% [markdown] key="stripe" tags=["exercise"]
# ### Exercise: read the stripe
#
# Write `predict(weights, pieces)`: with the weights [T S] of the induction head, return the piece
# that the head points to from the last token, that is the token it looks at most.

# %% tags=["reader"]
predict = None  # replace None by your function: def predict(weights, pieces): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(weights, pieces):
    return pieces[int(weights[-1].argmax())]


predict = predict or solution

# %% tags=["check"]
head = weights[1, best]  # causal: it has the rows of every beginning of the text
ends = [len(half) + 1 + cut for cut in range(3, 11)]
pointed = [predict(head[:end, :end], found.pieces[:end]) for end in ends]
said = [
    names.get(int(token), "?") for token in inspect.capture(trained, found, []).logits.argmax(-1)
]
print("right letters ", *half[3:11])
print("the head      ", *pointed)
print("the model says", *[said[end - 1] for end in ends])
assert np.mean([a == b for a, b in zip(pointed, half[3:11], strict=True)]) > 0.7

# %% [markdown] key="ablation" tags=["lab"]
# ## Is it the cause? Remove it
#
# A pattern is only a correlation: the head looks there, but does the model use what it sees? The
# experiment is to take the head away. We replace its output by its mean over all tokens, so that it
# can tell nothing about any of them, and measure the loss on noise that is repeated. For comparison
# we take away the other heads of the same layer.

# %%
losses = {
    "whole model": inspect.induction_loss(trained),
    f"without the others {[h for _, h in others]}": inspect.induction_loss(trained, others),
    f"without induction {[h for _, h in induction]}": inspect.induction_loss(trained, induction),
}
for name, (first, second) in losses.items():
    print(f"{name:28} first copy {first:.2f}, second copy {second:.2f} nats")
whole, without_others, without_induction = (second for _, second in losses.values())
assert whole < 0.6
assert without_others < whole + 1
assert without_induction > whole + 3

# %% [markdown] key="ablation-picture" tags=["picture"]
# ### Figure: what the second copy costs
#
# Without the induction heads the second copy is as expensive as noise that has never been seen (the
# line at ln 256). Without the other heads of the layer, nothing of the kind happens. So the heads
# that have the pattern are the cause of what the model can do.

# %%
figure, axis = plt.subplots()
axis.barh(
    list(losses), [second for _, second in losses.values()], color=["gray", "tab:blue", "tab:red"]
)
axis.axvline(np.log(256), color="black", linestyle="--", label="ln 256: noise never seen")
axis.invert_yaxis()
axis.set_xlabel("loss on the second copy, nats per byte")
axis.legend(loc="center right")
plt.show()

# %% [markdown] key="previous" tags=["lab"]
# ## The partner in layer 0
#
# If the story is right, layer 0 has heads that look at the previous token, and the induction heads
# are lost without them. We remove each head of layer 0 in turn.

# %%
sample = EncodedText(rows[0], inspect.spell_tokens(trained, rows[0]))
previous = inspect.previous_token_scores(inspect.attention(trained, sample))[0]
by_hand = np.mean([inspect.attention(trained, sample)[0, :, t, t - 1] for t in range(1, 51)], 0)
assert np.allclose(previous, by_hand, atol=1e-6)
damage = [inspect.induction_loss(trained, [(0, h)])[1] - whole for h in range(cfg.heads)]
for h in range(cfg.heads):
    print(
        f"head {h}: looks at the previous token {previous[h]:.2f}; removed: {damage[h]:+.2f} nats"
    )
assert previous.max() > 0.4
assert max(damage) > 1

# %% [markdown] key="birth" tags=["picture"]
# ### Figure: the birth of a head
#
# For a while nothing happens: a previous-token head is of no use without an induction head, and the
# other way round. Then both form together, within a hundred steps or two, and the loss on
# repetition falls off a cliff. Large models show the same cliff early in training, and it is there
# that they begin to learn from their context.

# %%
figure, axis = plt.subplots()
smooth = np.convolve(repeated_losses, np.ones(20) / 20, "valid")
axis.plot(np.arange(len(smooth)) + 10, smooth, color="black", label="loss on repeated noise")
axis.set_xlabel("step")
axis.set_ylabel("nats per byte")
right = axis.twinx()
history = np.array(list(births.values()))[:, 1]  # [records, heads] of layer 1
for h in range(cfg.heads):
    right.plot(list(births), history[:, h], marker="o", markersize=3, alpha=0.8)
right.set_ylabel("induction score of the heads of layer 1")
right.grid(False)
axis.legend(loc="center left")
plt.show()
assert history[0].max() < 0.15

# %% [markdown] key="lens" tags=["concept"]
# ## The logit lens
#
# The output head turns the last vector of the stream into logits. Nothing forbids to apply it
# earlier: then it shows what the model would answer if it ended there (nostalgebraist 2020). By
# hand it is the final norm and one matrix product; the lens of the last layer has to be the output
# itself.

# %%
lens = inspect.logit_lens(trained, found, count=3)
run = inspect.capture(trained, found, ["embedding", "layers.*.residual_post"])
norm_scale = np.asarray(params["stack"]["norm"]["scale"])
unembedding = np.asarray(params["head"]["table"])  # [V D]


def look(stream):
    """Return the logits [T V] of a stream [T D], as if it were the last one."""
    size = np.sqrt((stream**2).mean(-1, keepdims=True) + cfg.norm_eps)
    return (stream / size * norm_scale) @ unembedding.T


streams = [run["embedding"], run["layers.0.residual_post"], run["layers.1.residual_post"]]
for stream, top in zip(streams, lens.top, strict=True):
    assert (look(stream).argmax(-1) == top[:, 0]).mean() > 0.95  # ties may be broken otherwise
assert np.allclose(look(streams[-1]), run.logits, atol=1e-3)

# %% [markdown] key="lens-picture" tags=["picture"]
# ### Figure: what it would say after each layer
#
# The colour is the probability of the likeliest byte. The embedding and layer 0 know nothing of the
# second copy; in layer 1, after the second *A*, the right letters appear, one to the left of where
# they stand.

# %%
knows = lens.target_logprobs[:, len(half) + 1 :]  # of the right letter, in the second copy
print("probability of the right letter, by layer:", np.exp(knows).mean(1).round(3))
assert np.exp(knows[-1]).mean() > 0.4
assert np.exp(knows[:2]).mean() < 0.15
pieces = [[[names.get(int(t), "?") for t in place] for place in layer] for layer in lens.top]
visualize.draw_lens(dataclasses.replace(lens, top_pieces=pieces))

# %% [markdown] key="attribution" tags=["concept"]
# ## Direct logit attribution
#
# Since the stream is a sum, so is every logit: *U · norm(a + b + c)* is *U · norm(a)* plus *U ·
# norm(b)* plus *U · norm(c)*, if we keep the size by which the norm divides. So each head has its
# share in an answer, in logits, and the shares sum to the logit exactly. By hand for one head: its
# output *z*, through its rows of the output projection, through the norm, times the row of *U* of
# the token.

# %%
prompt = write(half + half[:6])
answer = inspect.next_tokens(trained, prompt, 1)[0].token
parts = inspect.attribute_logit(trained, prompt, answer)
run = inspect.capture(trained, prompt, ["layers.1.mixer.z", "layers.1.residual_post"])
assert abs(parts.values.sum() - run.logits[-1, answer]) < 1e-3

output = np.asarray(params["stack"]["layers"]["block_0"]["mixer"]["o"]["w"])[1, best]  # [K D]
size = np.sqrt((run["layers.1.residual_post"][-1] ** 2).mean() + cfg.norm_eps)
share = run["layers.1.mixer.z"][-1, best] @ output / size * norm_scale @ unembedding[answer]
assert abs(share - parts.by_head()[1, best]) < 1e-3
print(f"head {best} of layer 1 adds {share:.1f} to a logit of {parts.logit:.1f}")

# %% [markdown] key="attribution-picture" tags=["picture"]
# ### Figure: who has made the answer
#
# Blue adds to the logit of the right letter, red takes away. The induction heads speak for it
# directly. The previous-token head of layer 0 does not appear, though nothing works without it: it
# speaks to the heads of layer 1, not to the output. Attribution shows who says it, ablation who is
# needed.

# %%
assert parts.by_head()[1].max() > parts.by_head()[0].max()
visualize.draw_attribution(parts)

# %% [markdown] key="patching" tags=["lab"]
# ## Activation patching
#
# Two prompts that differ in one letter: in *clean*, *C* is followed by *D*; in *corrupt* by *M*. At
# the end both have *C* again. Run *corrupt*, but put one activation of *clean* in its place, and
# see how much of the answer *D* comes back: 0 nothing, 1 all of it. A patch with the model's own
# value must change nothing.

# %%
clean, corrupt = write(half + half[:3]), write(half.replace("D", "M") + half[:3])
for each in (clean, corrupt):
    print(
        *each.pieces[1:],
        "->",
        [names.get(t.token, "?") for t in inspect.next_tokens(trained, each, 2)],
    )
right, wrong = (int(noise[NAMES.index(letter)]) for letter in "DM")

own = inspect.capture(trained, clean, ["layers.1.residual_pre"])
same = inspect.patch(trained, clean, {"layers.1.residual_pre": own["layers.1.residual_pre"]})
assert np.allclose(same.logits, own.logits, atol=1e-4)

stream = inspect.activation_patching(trained, clean, corrupt, right, wrong)
written = inspect.activation_patching(trained, clean, corrupt, right, wrong, site="mixer.out")

# %% [markdown] key="patching-picture" tags=["picture"]
# ### Figure: the way of a piece of information
#
# Left: the stream before each layer. All the information sits at the place of the letter that was
# changed. Right: what the layers write. In layer 1 it is written at the last token: the induction
# head has fetched it.

# %%
pieces = clean.pieces
figure, axes = plt.subplots(1, 2, figsize=(10, 2.4))
for axis, found, title in zip(
    axes, (stream, written), ("stream", "written by attention"), strict=True
):
    image = axis.imshow(found, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axis.set_xticks(range(len(pieces)), pieces, fontsize=7)
    axis.set_yticks([0, 1], ["layer 0", "layer 1"])
    axis.set_title(title)
    axis.grid(False)
figure.colorbar(image, ax=axes, label="restored")
plt.show()
place = pieces.index("D")
assert np.isclose(stream[0, place], 1, atol=1e-3)
assert stream[0].argmax() == place
assert written[1].argmax() == len(pieces) - 1
assert written[1, -1] > 0.5

# %% [markdown] key="swap" tags=["exercise"]
# ### Exercise: which head carries it?
#
# Use `inspect.activation_patching` with `site="mixer.z"` and `over="heads"` and return, as
# `carrier`, the pair (layer, head) that restores the most.

# %% tags=["reader"]
carrier = None  # replace None by your pair


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution():
    restored = inspect.activation_patching(
        trained, clean, corrupt, right, wrong, site="mixer.z", over="heads"
    )
    return tuple(int(i) for i in np.unravel_index(restored.argmax(), restored.shape))


carrier = carrier or solution()

# %% tags=["check"]
assert carrier in induction
print("right: layer {}, head {}".format(*carrier))

# %% [markdown] key="two-layers" tags=["question"]
# ### Question: why do models with one layer have no induction heads?
#
# <details><summary>Answer</summary>
#
# In one layer the key of a token is made from its own embedding and position. To be found by the
# second *A*, the token *B* would have to carry the information that *A* stood before it, and before
# the first layer no token knows anything of its neighbours. Somebody has to write it there first:
# another layer. (A one-layer model can still learn bigrams, and copy tokens that it has seen
# anywhere.)
#
# </details>

# %% [markdown] key="proof" tags=["question"]
# ### Question: what would be a weaker proof?
#
# We have shown a score, a picture, an ablation and a patch. Which of these would not be enough on
# its own?
#
# <details><summary>Answer</summary>
#
# Score and picture show where a head looks, not that anything depends on it: a head may look at a
# token and write nothing of use. The ablation shows that the heads are needed, but not what they
# transport; it could also harm the model in some general way, which is why the other heads were
# removed for comparison. The patch shows that exactly this piece of information passes through
# exactly this head.
#
# </details>

# %% [markdown] key="page"
# ## Your own model
#
# `jaxgpt look RUN --text "..." --out page.html` writes all of this into one page that opens
# offline: the tokens by surprisal, every head, the lens, the attribution. In Python it is
# `visualize.look`, and a notebook shows the page as it is.

# %%
page = visualize.look(trained, "import os\nimport sys\nimport os\n")
page.save(pathlib.Path(tempfile.mkdtemp(), "page.html"))
print(f"{len(page._repr_html_()) / 1000:.0f} kB")
