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
# # 8. Three families: BERT, GPT and T5
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/08_families.ipynb)
#
# The block of notebook 6 is the same in all of them. What differs is which tokens a token may look
# at, and what the model is asked to predict. From these two choices come the three families of
# Transformers: encoders that understand a text (BERT), decoders that continue one (GPT), and
# encoder-decoders that turn one text into another (T5).
#
# Here one small language, English and French sentences about animals, trains one model of each
# family on two cores, each in seconds, on the task that it was made for.

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
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import jaxgpt
from jaxgpt import data, inspect, measure, visualize
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.model import Coords, EncoderInput, build, compute_logits
from jaxgpt.model.masks import make_layer_mask
from jaxgpt.objectives import OBJECTIVES

# %% [markdown] key="families" tags=["concept"]
# ## Who may look at whom, and what is predicted
#
# | family | a token looks at | trained to predict | made for |
# |---|---|---|---|
# | encoder (BERT) | all tokens, before and after | some tokens that were hidden | classification, search, filling gaps |
# | decoder (GPT) | itself and what is before | the next token, everywhere | generation, dialogue |
# | encoder-decoder (T5) | encoder: the whole source; decoder: the source and what it has written | the target, token by token | translation, summaries |
#
# The words of a sentence have a meaning that depends on both sides: *bank* in "the bank of the
# river" is only clear at the end. An encoder uses that. A decoder cannot, because at the time it
# writes a word the rest does not exist. An encoder-decoder reads with the one and writes with the
# other.

# %% [markdown] key="masks" tags=["picture"]
# ### Figure: three masks
#
# The mask of an encoder allows everything; that of a decoder is the lower triangle, which NumPy
# calls `tril`; and the decoder of T5 has a triangle for its own tokens and a full rectangle for the
# source.


# %%
def make_coords(tokens):
    """Return the positions of rows that are one document each."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Coords(positions, jnp.ones_like(positions))


T, S = 6, 4
at = make_coords(jnp.zeros((1, T), int))
encoder_mask = np.array(make_layer_mask(ModelConfig(), "full", "both")(at, at)[0])
decoder_mask = np.array(make_layer_mask(ModelConfig(), "full", "causal")(at, at)[0])
assert encoder_mask.all()
assert (decoder_mask == np.tril(np.ones((T, T), bool))).all()

pictures = {
    "encoder: everything": encoder_mask,
    "decoder: the past": decoder_mask,
    "T5's decoder: source | its own past": np.hstack([np.ones((T, S), bool), decoder_mask]),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), width_ratios=[T, T, S + T])
for axis, (name, mask) in zip(axes, pictures.items(), strict=True):
    axis.imshow(mask, cmap="Blues", vmin=0, vmax=1.4)
    axis.set_title(name, fontsize=9)
    axis.set_xlabel("is looked at")
    axis.grid(False)
axes[0].set_ylabel("looks")
axes[2].axvline(S - 0.5, color="black")
plt.show()

# %% [markdown] key="language"
# ## A language of two hundred thousand sentences
#
# A grammar in a dozen lines: an animal does something to another. French agrees in gender (*le
# petit chat*, *la petite souris*) and puts its colours behind the noun (*le chat noir*): enough to
# tell a model that knows the language from one that counts words.

# %%
NOUNS = {  # English: French, gender
    "cat": ("chat", 0), "dog": ("chien", 0), "wolf": ("loup", 0), "fox": ("renard", 0),
    "rabbit": ("lapin", 0), "duck": ("canard", 0), "mouse": ("souris", 1), "cow": ("vache", 1),
    "hen": ("poule", 1), "goat": ("chèvre", 1), "turtle": ("tortue", 1), "frog": ("grenouille", 1),
}  # fmt: skip
VERBS = {"eats": "mange", "sees": "voit", "follows": "suit", "likes": "aime", "bites": "mord"}
BEFORE = {"small": ("petit", "petite"), "big": ("grand", "grande"), "old": ("vieux", "vieille")}
AFTER = {"black": ("noir", "noire"), "white": ("blanc", "blanche"), "grey": ("gris", "grise")}


def translate_noun(noun, adjective):
    """Return a noun with its article and adjective in French."""
    word, gender = NOUNS[noun]
    first = BEFORE[adjective][gender] + " " if adjective in BEFORE else ""
    last = " " + AFTER[adjective][gender] if adjective in AFTER else ""
    return f"{('le', 'la')[gender]} {first}{word}{last}"


def make_pair(rng):
    """Return a sentence in English and in French."""
    who, whom = rng.choice(list(NOUNS), 2, replace=False)
    verb = rng.choice(list(VERBS))
    first, second = rng.choice(["", "", *BEFORE, *AFTER], 2)
    english = " ".join(f"the {first} {who} {verb} the {second} {whom}.".split())
    french = f"{translate_noun(who, first)} {VERBS[verb]} {translate_noun(whom, second)}."
    return english.capitalize(), french.capitalize()


rng = np.random.default_rng(0)
pairs = sorted({make_pair(rng) for _ in range(6000)})
rng.shuffle(pairs)
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "french.txt").write_text("\n".join(f for _, f in pairs), encoding="utf-8")
records = [json.dumps({"english": e, "french": f}, ensure_ascii=False) for e, f in pairs]
(folder / "pairs.jsonl").write_text("\n".join(records), encoding="utf-8")
print(len(pairs), *map(tuple, pairs[:3]), sep="\n")

# %% [markdown] key="training"
# The three models have the same width, depth and number of heads, and the same trainer. Only the
# family and the objective differ. A tenth of the sentences is held out, and never trained on.


# %%
def make_config(name, family, objective, steps, source, **settings):
    """Return the config of a small model of a family."""
    model = ModelConfig(
        family=family, vocab=512, context=24, width=64, layers=2, heads=4, ffn=176, **settings
    )
    text = dict(text_key="english", target_key="french") if source == "pairs.jsonl" else {}
    return Config(
        name=name,
        folder=str(folder),
        model=model,
        data=DataConfig(
            source=str(folder / source), cache=str(folder / "tokens"), separator="\n",
            packing="documents" if objective != "pairs" else "stream", **text,
        ),
        optimizer=OptimizerConfig(name="muon", lr=3e-3, matrix_lr=1e-2, warmup=20),
        train=TrainConfig(
            objective=objective, steps=steps, batch=32, eval_every=50, eval_batches=4,
            save_every=steps, sample_every=0, mask_rate=0.15,
        ),
    )  # fmt: skip


def train(config):
    """Train a model, and return it with its held-out losses by step."""
    jaxgpt.train(config, is_quiet=True)
    lines = (pathlib.Path(config.run_folder) / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record.get("kind") == "eval"]
    curve = [record["step"] for record in found], [record["loss"] for record in found]
    return jaxgpt.load(config.run_folder), curve


curves = {}
gpt, curves["GPT: next token"] = train(make_config("gpt", "decoder", "causal", 150, "french.txt"))

# %% [markdown] key="next-token" tags=["lab"]
# ## GPT: what comes next
#
# A decoder gives a distribution over the next token after *every* prefix. On the command line
# `jaxgpt next RUN "Le chat mange la"` shows it; here is the same in Python. After *la* only
# feminine nouns are possible, or an adjective in the feminine; after *le* only masculine ones.

# %%
for prompt in ("Le chat mange la", "Le chat mange le"):
    found = inspect.next_tokens(gpt, prompt, 6)
    print(prompt, "...", ", ".join(f"{t.piece.strip()} {t.probability:.0%}" for t in found))

forms = [
    {word for word, gender in NOUNS.values() if gender == g}
    | {words[g] for words in (BEFORE | AFTER).values()}
    for g in (0, 1)
]
feminine = inspect.next_tokens(gpt, "Le chat mange la", 40)
share = sum(t.probability for t in feminine if t.piece.strip() in forms[1])
print(f"after 'la', {share:.1%} of the probability is on feminine words")
assert share > 0.9

# %% [markdown] key="teacher-forcing" tags=["concept"]
# ## Teacher forcing: all positions in one pass
#
# At generation a decoder reads its own words. In training it reads the *right* ones, whatever it
# would have said itself: that is teacher forcing. Since the mask hides the future, one pass over a
# sentence of T tokens gives T predictions at once, each as if the text had stopped there. The loop
# below stops the text at every token, and finds the same numbers with T passes.


# %%
@jax.jit
def compute_all(row):
    hidden, _ = build(gpt.config.model).apply({"params": gpt.params}, row, make_coords(row))
    return compute_logits(gpt.config.model, gpt.params, hidden)


def logits_of(tokens):
    """Return the logits [T V] of a row of tokens."""
    return np.asarray(compute_all(jnp.asarray(tokens)[None])[0])


sentence = "Le petit chat mange la souris noire."
in_one_pass = inspect.token_losses(gpt, sentence)[1:]

tokens = inspect.encode(gpt, sentence).tokens
pieces = inspect.encode(gpt, sentence).pieces
one_by_one = []
for t in range(1, len(tokens)):
    stopped = np.where(np.arange(len(tokens)) < t, tokens, 0)  # what follows is padding
    one_by_one.append(-np.log(measure.softmax(logits_of(stopped)[t - 1])[tokens[t]]))

assert np.allclose(in_one_pass, one_by_one, atol=1e-4)
for piece, loss in zip(pieces[1:], in_one_pass, strict=True):
    print(f"{piece:>10}  {loss:5.2f} nats  {'#' * round(10 * loss)}")

# %% [markdown] key="no-peeking" tags=["exercise"]
# ### Exercise: prove that the future is hidden
#
# Write `changed(tokens, t)`: it replaces token `t` by another one and returns the positions whose
# logits have changed, as a list. `logits_of(tokens)` gives the logits [T V] of a row of tokens. In
# a causal model no position before `t` may be in the list.

# %% tags=["reader"]
changed = None  # replace None by your function: def changed(tokens, t): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(tokens, t):
    other = np.array(tokens)
    other[t] = (other[t] + 1) % 300
    difference = np.abs(logits_of(tokens) - logits_of(other)).max(-1)
    return np.flatnonzero(difference > 1e-5).tolist()


changed = changed or solution

# %% tags=["check"]
assert changed(tokens, 5) == list(range(5, len(tokens)))
assert changed(tokens, 0) == list(range(len(tokens)))
print("right: a change at 5 is seen at", changed(tokens, 5))

# %% [markdown] key="generate-bert" tags=["question"]
# ### Question: why does BERT not write?
#
# BERT knows a language well. Why is it not used to write a text, token by token?
#
# <details><summary>Answer</summary>
#
# It was trained on texts in which nearly everything is visible, on both sides, and asked about a
# few gaps. At the end of an unfinished sentence the right side is missing: a situation it has never
# seen. And because every token looks at every other, each new token changes what the earlier ones
# mean: nothing that was computed can be kept, whereas a decoder keeps the keys and values of its
# past (the KV cache).
#
# </details>

# %% [markdown] key="bert" tags=["lab"]
# ## BERT: what was here
#
# For the encoder, 15% of the tokens are chosen to be predicted. Of these, 80% are replaced by a
# mask, 10% by a random token and 10% are left as they are, so that the model can never be sure that
# a visible token is right (Devlin et al. 2019). The loss counts the chosen tokens only. We look at
# a batch, then train.
#
# In a prompt, `<mask>` stands for a whole token, and the space before a word belongs to its token
# (notebook 2): so `mange<mask> souris`.

# %%
config = make_config("bert", "encoder", "masked", 250, "french.txt", position="learned", head="mlm")
corpus = data.prepare(config.data, config.tokenizer_vocab)
task = OBJECTIVES["masked"].task(config, corpus)
batches = [task.make_batch(step) for step in range(20)]
chosen = np.concatenate([b.weights.ravel() for b in batches]) > 0
shown = np.concatenate([b.tokens.ravel() for b in batches])
right = np.concatenate([b.targets.ravel() for b in batches])
is_text = right > 3  # 0 to 3 are pad, unk, bos and eos
is_mask = shown == config.model.first_mask
print(f"chosen {chosen[is_text].mean():.1%} of the tokens of the text; of these")
print(f"  masked {is_mask[chosen].mean():.1%}, unchanged {(shown == right)[chosen].mean():.1%}")
assert not chosen[~is_text].any()
assert abs(chosen[is_text].mean() - 0.15) < 0.01
assert abs(is_mask[chosen].mean() - 0.8) < 0.03
assert (shown == right)[~chosen].all()

bert, curves["BERT: masked tokens"] = train(config)

# %%
for text in (
    "<mask> chat mange la souris.",
    "Le chat mange<mask> souris.",
    "La vache<mask> suit le chien.",
):
    (mask,) = bert.fill([text], count=4)[0]
    print(text, "->", ", ".join(f"{c.text.strip()} {c.probability:.0%}" for c in mask.candidates))

(mask,) = bert.fill(["Le chat mange<mask> souris."], count=1)[0]
assert mask.candidates[0].text.strip() == "la"  # the noun behind the gap has the gender

# %% [markdown] key="both-sides" tags=["example"]
# ### Example: the right side decides
#
# In *Le chat mange ... souris*, the gap can only be filled by reading what comes after it: *souris*
# is feminine. The GPT cannot know that, and has to give *le* and *la* about the same probability.


# %%
def share_of(found, word):
    return sum(t.probability for t in found if t.piece.strip() == word)


after = inspect.next_tokens(gpt, "Le chat mange", 10)
guess = {word: share_of(after, word) for word in ("le", "la")}
candidates = bert.fill(["Le chat mange<mask> souris."], count=10)[0][0].candidates
known = {w: sum(c.probability for c in candidates if c.text.strip() == w) for w in ("le", "la")}
print("GPT, from the left: ", {k: f"{v:.0%}" for k, v in guess.items()})
print("BERT, on both sides:", {k: f"{v:.0%}" for k, v in known.items()})
assert 0.25 < guess["la"] < 0.75
assert known["la"] > 0.9

# %% [markdown] key="shifted" tags=["concept"]
# ## Shifted right
#
# T5's decoder is a GPT that also looks at an encoder. In training its input is the target *shifted
# right* by one: it begins with a start token, and at each place the token to be predicted is the
# one that the next place will read. Without the shift each token would simply see its own answer.
#
# ```text
# reads      <bos>  Le     chat   mange  la      souris
# predicts   Le     chat   mange  la     souris  .
# ```

# %%
config = make_config("t5", "encoder_decoder", "pairs", 200, "pairs.jsonl", position="t5")
corpus = data.prepare(config.data, config.tokenizer_vocab, is_paired=True)
batch = OBJECTIVES["pairs"].task(config, corpus).make_batch(0)


def shift_right(targets, start):
    """Return what the decoder reads: the targets [B T], one place to the right."""
    return np.concatenate([np.full((len(targets), 1), start), targets[:, :-1]], axis=1)


real = batch.segment_ids > 0
shifted = shift_right(batch.targets, corpus.tokenizer.bos)
assert (batch.tokens[real] == shifted[real]).all()
print("source  ", corpus.tokenizer.decode(batch.encoder_inputs.tokens[0]))
print("reads   ", corpus.tokenizer.decode(batch.tokens[0]))
print("predicts", corpus.tokenizer.decode(batch.targets[0]))

# %% [markdown] key="t5" tags=["lab"]
# ## T5: from English to French
#
# The encoder reads English with an attention that sees everything, and the decoder writes French.
# What a classical dictionary could not do, the model has to find out: the gender of each noun, and
# the place of the adjective.

# %%
t5, curves["T5: translation"] = train(config)
fresh = np.random.default_rng(99)
known_pairs = {tuple(pair) for pair in pairs}
test = [p for p in (make_pair(fresh) for _ in range(60)) if p not in known_pairs][:40]
answers = [g.text for g in t5.generate([e for e, _ in test], temperature=0, tokens=20)]
right = np.mean([answer == french for answer, (_, french) in zip(answers, test, strict=True)])
for (english, _), answer in list(zip(test, answers, strict=True))[:4]:
    print(f"{english:45} -> {answer}")
print(f"{right:.0%} of {len(test)} new sentences are translated without a mistake")
assert right > 0.6

# %% [markdown] key="alignment" tags=["picture"]
# ### Figure: cross-attention finds the words
#
# Each row is a French token that has been read, and looks for the English word that comes next: at
# *la*, where *souris* is to be written, it looks at *mouse*, and at *souris*, where *noire*
# follows, at *black*. The words cross over.

# %%
english, french = "The big cat eats the black mouse.", "Le grand chat mange la souris noire."
text = inspect.encode(t5, french, english)
weights = inspect.attention(t5, text, site="cross")[-1]  # [H T S]
seen = weights.mean(0)[text.pieces.index(" la")].argmax()
assert text.source_pieces[seen] == " mouse"
visualize.draw_attention(
    weights.mean(0), text.pieces, text.source_pieces, title="Each French token looks at English"
)

# %%
tokenizer = t5.tokenizer


@jax.jit
def run(source, target):
    model = build(t5.config.model)
    hidden, _ = model.apply(
        {"params": t5.params}, target, make_coords(target),
        source=EncoderInput(source, make_coords(source)),
    )  # fmt: skip
    return compute_logits(t5.config.model, t5.params, hidden)


def step(source, written):
    """Return the logits [V] of the token that follows `written`, two lists of ids."""
    padded = jnp.array([[*written, *[0] * (24 - len(written))]])  # one shape: compiled once
    return np.asarray(run(jnp.array([source]), padded)[0, len(written) - 1])


source_ids = inspect.encode(t5, french, english).source.tolist()

# %% [markdown] key="greedy" tags=["exercise"]
# ### Exercise: generate by hand
#
# Write `greedy(english)`: encode the source, begin with bos, and append the likeliest token again
# and again until eos. `step(source, written)` gives the logits of the next token. It has to give
# what `t5.generate` gives at temperature 0, which does the same with a KV cache.

# %% tags=["reader"]
greedy = None  # replace None by your function: def greedy(source_ids): ... return a text


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(source_ids):
    written = [tokenizer.bos]
    while len(written) < 24:
        best = int(step(source_ids, written)[: tokenizer.vocab_size].argmax())
        if best == tokenizer.eos:
            break
        written.append(best)
    return tokenizer.decode(written[1:])


greedy = greedy or solution

# %% tags=["check"]
assert greedy(source_ids) == t5.generate([english], temperature=0, tokens=20)[0].text
print("right:", greedy(source_ids))

# %% [markdown] key="curves" tags=["picture"]
# ### Figure: three losses that cannot be compared
#
# Each loss is in nats per predicted token, but the tokens are not of the same difficulty. GPT must
# guess a subject out of nothing; BERT sees both sides; T5 sees the whole answer in another
# language, so that hardly anything is left to be guessed. A lower curve does not mean a better
# model.

# %%
figure, axis = plt.subplots()
for name, (steps, losses) in curves.items():
    axis.plot(steps, losses, marker="o", markersize=3, label=name)
axis.set_xlabel("step")
axis.set_ylabel("held-out loss, nats per token")
axis.legend()
plt.show()
assert curves["T5: translation"][1][-1] < curves["GPT: next token"][1][-1]

# %% [markdown] key="exposure" tags=["question"]
# ### Question: the price of teacher forcing
#
# In training the decoder always reads a right past, at generation its own. What can go wrong?
#
# <details><summary>Answer</summary>
#
# One wrong token leads to a prefix that never occurred in training; what follows is then less
# reliable, and the errors pile up. This is called exposure bias. In practice large models suffer
# little from it: their training text is so varied that they have seen many unlikely prefixes.
# Scheduled sampling (Bengio et al. 2015) mixes own tokens into training, and reinforcement learning
# trains on what the model itself writes.
#
# </details>
