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
# # 2. Tokenization
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/02_tokenization.ipynb)
#
# A model reads numbers, not letters. The *tokenizer* cuts a text into pieces, the tokens, and gives
# each its number; after the model has answered in numbers, it turns them back into text. It is
# trained before the model, on its own, and everything the model ever sees has gone through it. Many
# an odd weakness of language models, such as spelling a word backwards or adding long numbers, begins
# here.

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
import itertools
import math
from pydoc_data.topics import topics

import numpy as np

from jaxgpt import inspect, tokenizer
from jaxgpt.inspect.tokens import split_words

# The language reference that comes with every Python: English prose with code in it.
pages = [text for _, text in sorted(topics.items())]
training, held_out = pages[::2], pages[1::2]
print(f"{sum(map(len, training)):,} characters to train on, {sum(map(len, held_out)):,} held out")

# %% [markdown] key="bytes" tags=["concept"]
# ## Bytes: an alphabet that covers everything
#
# Which are the smallest pieces? Characters would be natural, but Unicode has more than 150,000 of
# them, and new ones every year. UTF-8 writes every character as one to four *bytes*, and there are
# only 256 of these. A tokenizer that begins with the 256 bytes can encode any text there ever will
# be; nothing is *unknown* to it. The price is paid in length: an accented letter is two bytes, a
# Chinese character three.

# %%
for text in ["cat", "été", "日本", "a – b"]:
    print(f"{text!r:8} {len(text)} characters, {len(text.encode())} bytes: {list(text.encode())}")

plain = tokenizer.make_byte_tokenizer()
ids = plain.encode("été")
assert ids.tolist() == [4 + byte for byte in "été".encode()]  # 0 to 3 are special tokens
assert plain.decode(ids) == "été"
print(tokenizer.SPECIALS, plain.vocab_size)

# %% [markdown] key="bpe" tags=["concept"]
# ## Byte-pair encoding
#
# Bytes make sequences long, and a model's cost grows with the length. *Byte-pair encoding* (BPE)
# trades vocabulary for length. Begin with single bytes. Count every pair of neighbors, make a new
# token of the most frequent pair, replace the pair everywhere by it, and begin again, until the
# vocabulary is as large as one wants. The list of merges, in order, is the tokenizer. To encode a new
# text, replay the merges in that order.

# %% [markdown] key="abab" tags=["example"]
# ### Example: "abab abab" goes from 9 tokens to 5 to 3
#
# The text has 9 bytes. The most frequent pair is a b, four times; merged, there are 5 tokens left:
# ab ab ␣ ab ab. Now ab ab is the most frequent pair, twice; merged, there are 3: abab ␣ abab.


# %%
def merge(pieces, pair):
    """Replace each occurrence of a pair of neighbors by one piece, from left to right."""
    merged, i = [], 0
    while i < len(pieces):
        is_pair = tuple(pieces[i : i + 2]) == pair
        merged.append(pieces[i] + pieces[i + 1] if is_pair else pieces[i])
        i += 1 + is_pair
    return merged


pieces = [bytes([byte]) for byte in b"abab abab"]
lengths = [len(pieces)]
for _ in range(2):
    pairs = collections.Counter(itertools.pairwise(pieces))
    pair, count = pairs.most_common(1)[0]
    pieces = merge(pieces, pair)
    lengths.append(len(pieces))
    print(f"{pair} occurs {count} times -> {pieces}")
assert lengths == [9, 5, 3]

for merges, length in enumerate(lengths):  # the library's tokenizer with 0, 1 and 2 merges
    trained = tokenizer.train(["abab abab"], tokenizer.MIN_VOCAB + merges)
    assert len(trained.encode("abab abab")) == length

# %% [markdown] key="merge-exercise" tags=["exercise"]
# ### Exercise: encode by replaying merges
#
# Write `apply_merges(word, merges)`: begin with the single bytes of `word`, then for each pair in
# `merges`, in order, call `merge`. Return the list of pieces.

# %% tags=["reader"]
apply_merges = None  # replace None by your function: def apply_merges(word, merges): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(word, merges):
    pieces = [bytes([byte]) for byte in word]
    for pair in merges:
        pieces = merge(pieces, pair)
    return pieces


apply_merges = apply_merges or solution

# %% tags=["check"]
assert apply_merges(b"abba", [(b"a", b"b"), (b"b", b"a")]) == [b"ab", b"ba"]
assert apply_merges(b"ababab", [(b"a", b"b"), (b"ab", b"ab")]) == [b"abab", b"ab"]
assert apply_merges(b"", [(b"a", b"b")]) == []
print("right")

# %% [markdown] key="words" tags=["concept"]
# ## Words first
#
# Counted over raw text, frequent pairs soon run across spaces: "of the" would become one token, and
# so would "dog.", "dog!" and "dog,". So the text is cut into words first, and no merge crosses a
# border. The pattern of GPT-2 keeps a space with the word that follows it: " the" is a token, and
# begins a word.

# %%
sample = "The tokens of 1234 don't cross words."
trained = tokenizer.train(training, 2048)
print(split_words(trained, sample))
print([token.piece for token in inspect.tokenize(trained, sample)])

# %% [markdown] key="train-lab" tags=["lab"]
# ## Lab: train a tokenizer, merge by merge
#
# With the words cut, training is the loop from above over a table of different words and how often each
# occurs. Twenty lines do it. The library's trainer, written in Rust for gigabytes, must learn the same
# merges in the same order. Where two pairs are equally frequent, both take the one whose left token has
# the smaller id, and then the right.


# %%
def train_bpe(texts, merges):
    counts = collections.Counter(word for text in texts for word in split_words(plain, text))
    words = {word: [bytes([byte]) for byte in word.encode()] for word in counts}
    ids = {bytes([byte]): 4 + byte for byte in range(256)}
    learned = []
    for _ in range(merges):
        pairs = collections.Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        ids[best[0] + best[1]] = len(ids) + 4
        learned.append(best)
        for word, pieces in words.items():
            if len(pieces) > 1:
                words[word] = merge(pieces, best)
    return learned


some = training[:40]
learned = train_bpe(some, 40)
library = tokenizer.train(some, tokenizer.MIN_VOCAB + 40)
assert [a + b for a, b in learned] == library.token_bytes[tokenizer.MIN_VOCAB :]
word = " indentation"
assert apply_merges(word.encode(), learned) == [t.bytes for t in inspect.tokenize(library, word)]
print(" ".join((a + b).decode().replace(" ", "␣") for a, b in learned))

# %% [markdown] key="merge-steps" tags=["example"]
# ### Example: a word, step by step
#
# `inspect.merge_steps` shows how the trained tokenizer with 2048 tokens builds a word. The number is
# the place of the merge in the list: early merges are the frequent ones. On the command line it is
# `jaxgpt tokenize RUN "text" --merges`.

# %%
for step in inspect.merge_steps(trained, " expression"):
    print(f"{step.rank:5}  {' '.join(piece.replace(' ', '␣') for piece in step.pieces)}")

# %% [markdown] key="zipf-picture" tags=["picture"]
# #### Figure: few tokens do most of the work
#
# Sorted by frequency, tokens follow Zipf's law: the frequency falls about as one over the rank,
# nearly a straight line in logarithms. Most of the vocabulary is rare, and a model sees some tokens
# only a few times in its whole training.

# %%
ids = np.concatenate(trained.encode_batch(training))
counts = np.sort(np.bincount(ids, minlength=trained.vocab_size))[::-1]
seen = counts[counts > 0]
share = seen[:100].sum() / seen.sum()
figure, axis = plt.subplots()
axis.loglog(np.arange(1, len(seen) + 1), seen, label="tokens of the training text")
axis.loglog([1, 1000], [seen[0], seen[0] / 1000], "--", color="gray", label="1 / rank")
axis.set_xlabel("rank")
axis.set_ylabel("occurrences")
axis.legend()
plt.show()
print(f"the 100 most frequent tokens are {share:.0%} of the text")
assert share > 0.4

# %% [markdown] key="compression-lab" tags=["lab"]
# ## Lab: compression against the size of the vocabulary
#
# How long a text becomes is measured in bytes per token, on text that the tokenizer was not trained
# on. A larger vocabulary compresses better, with less and less return. And it costs: the embedding
# table has a row for each token, and the softmax a score.

# %%
sizes = [260, 512, 1024, 2048, 4096, 8192]
tokenizers = {size: tokenizer.train(training, size) for size in sizes}
compression = [tokenizer.measure_compression(tokenizers[size], held_out) for size in sizes]
for size, ratio in zip(sizes, compression, strict=True):
    print(f"{size:5} tokens: {ratio:.2f} bytes per token; a table of width 384 has {size * 384:,}")
assert compression[0] == 1 and (np.diff(compression) > 0).all()
gains = np.diff(compression)
assert gains[-1] < gains[0]

# %% [markdown] key="compression-picture" tags=["picture"]
# #### Figure: what each doubling brings

# %%
figure, axis = plt.subplots()
axis.semilogx(sizes, compression, "o-", base=2)
axis.set_xticks(sizes, sizes)
axis.set_xlabel("size of the vocabulary")
axis.set_ylabel("bytes per token, held out")
plt.show()

# %% [markdown] key="vocabulary-question" tags=["question"]
# ### Question: why not a vocabulary of a million?
#
# Compression still grows with the vocabulary, and shorter sequences are cheaper. What speaks against a
# million tokens?
#
# <details><summary>Answer</summary>
#
# The table of embeddings and the output matrix grow in proportion, and at a width of 4096 a million
# rows are four billion parameters. Rare tokens are hardly ever trained, so their rows stay near their
# random beginning. The softmax over a million scores costs more than the rest of a small model. And
# similar words lose what they share: "run" and "running" as two unrelated tokens have to be learned
# twice.
#
# </details>

# %% [markdown] key="bits-per-byte" tags=["concept"]
# ## Losses of different tokenizers
#
# A model with long tokens has fewer, harder decisions to make, so its loss per token is higher even
# if it knows just as much. What can be compared is the loss per byte:
#
# ```text
# bits per byte = loss in nats / ln 2 / bytes per token
# ```


# %%
def bits_per_byte(nats_per_token, bytes_per_token):
    return nats_per_token / math.log(2) / bytes_per_token


small, large = bits_per_byte(2.1, compression[1]), bits_per_byte(3.0, compression[3])
print(
    f"2.1 nats with 512 tokens: {small:.2f}; 3.0 nats with 2048 tokens: {large:.2f} bits per byte"
)
assert large < small  # the higher loss is the better model

# %% [markdown] key="languages" tags=["example"]
# ### Pitfall: the language that the tokenizer did not see
#
# A tokenizer compresses what it was trained on. The same sentence in French costs our English
# tokenizer many more tokens: more time, more money where tokens are billed, and less text within the
# context. Real tokenizers have the same bias, in milder form.

# %%
pair = {
    "English": "The function returns a new list that contains the elements in order.",
    "French": "La fonction renvoie une nouvelle liste qui contient les éléments dans l'ordre.",
}
costs = {}
for language, text in pair.items():
    tokens = inspect.tokenize(trained, text)
    costs[language] = len(text.encode()) / len(tokens)
    print(f"{language}: {len(tokens)} tokens, {costs[language]:.2f} bytes per token")
    print("   " + "|".join(token.piece for token in tokens))
assert costs["English"] > 1.4 * costs["French"]

# %% [markdown] key="pitfalls" tags=["example"]
# ### Pitfall: the same word, other tokens
#
# To the model, `Hello`, `hello`, ` hello` and `HELLO` are unrelated numbers until training teaches it
# otherwise. A prompt that ends with a space asks for a word *without* its space, which hardly occurs in
# the training text. Numbers are cut by what was frequent, not by place value, which is one reason why
# sums are hard. And a part of a character is not a character: one token may be half of an é.

# %%
for text in ["function", " function", "Function", "FUNCTION", "the function ", "1999", "2048 + 1"]:
    print(f"{text!r:15}", [token.piece for token in inspect.tokenize(trained, text)])
assert trained.encode("function").tolist() != trained.encode(" function").tolist()

halves = trained.encode("日")
print("日 is", len(halves), "tokens; the first alone decodes to", repr(trained.decode(halves[:1])))
stream = tokenizer.StreamDecoder(trained)  # waits until a character is complete
assert [stream.push(index) for index in halves] == ["", "", "日"][-len(halves) :]

# %% [markdown] key="specials" tags=["example"]
# ### Pitfall: special tokens in a text
#
# `<eos>` ends a document. If a user types these five characters they must stay text: a tokenizer that
# turned them into the special token would let anyone end a conversation, or forge a turn of it. The
# library never makes special tokens of text.

# %%
ids = trained.encode("a <eos> b")
assert trained.eos not in ids and trained.decode(ids) == "a <eos> b"
print([token.piece for token in inspect.tokenize(trained, "a <eos> b")])

# %% [markdown] key="roundtrip" tags=["exercise"]
# ### Exercise: nothing is lost
#
# A byte-level tokenizer is *lossless*: decoding what was encoded gives the same text, whatever it was.
# Find out whether it is also true the other way. Give `ids`, a list of token ids of `trained`, so that
# encoding what they decode to gives *other* ids. (Think of tokens that a tokenizer would never choose.)

# %% tags=["reader"]
ids = None  # replace None by your list

# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
# The single bytes of a word that has a token of its own.
solution = [4 + byte for byte in b" the"]
ids = ids or solution

# %% tags=["check"]
text = trained.decode(ids)
assert text.isprintable() and trained.encode(text).tolist() != list(ids)
print(repr(text), list(ids), "->", trained.encode(text).tolist())

# %% [markdown] key="spelling-question" tags=["question"]
# ### Question: how many r are in strawberry?
#
# Why is this hard for a model that can translate poetry?
#
# <details><summary>Answer</summary>
#
# It never sees the letters. The word reaches it as one, two or three numbers, and that the token 1234
# contains two r is a fact about this token which it has to pick up from texts about spelling. A model
# on bytes would simply count, and pay for it with sequences four times as long.
#
# </details>

# %% [markdown] key="end"
# ## Where to go from here
#
# A text is now a row of integers, and an embedding table makes a vector of each. The vectors know
# nothing of each other yet. How a token learns from the others is the subject of the next notebook:
# [self-attention](03_self_attention.ipynb).
