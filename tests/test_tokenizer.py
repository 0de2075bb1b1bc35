"""Test the tokenizer against slow references in plain Python, transformers, and hard text."""

import collections
import doctest
import functools
import itertools
import json
import os
import pathlib
import pickle
import pydoc_data.topics
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxgpt import text as text_module
from jaxgpt import tokenizer as module
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import (
    BYTE_CHARACTERS,
    SPECIALS,
    StreamDecoder,
    Tokenizer,
    load,
    make_byte_tokenizer,
    measure_compression,
    train,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
GPT2 = ROOT.parent / "shared" / "data" / "gpt2_bpe"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason=f"{GPT2} is not here")

TOPICS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
UNICODE = (
    "Καλημέρα κόσμε, 北京 \U0001f642\U0001f3fd e\u0301 \u200d\ufeff\x00 naïve\r\n\t\u2028 ﬁ ½ Ġ Ċ"
)
SPELLED_SPECIALS = "<eos> <pad><bos>text</s><unk><|endoftext|><eos>"

# Single characters of the classes that the pattern distinguishes, then any UTF-8 character;
# `any_text` adds the lone surrogates, which UTF-8 lacks.
characters = st.one_of(
    st.sampled_from("ab 1.\n\t'é北\U0001f642\x00\u3000\x85"), st.characters(codec="utf-8")
)
any_text = st.text(characters | st.characters(categories=["Cs"]), max_size=60)
# Bytes that are nearly UTF-8 are the hard case: parts of it, in any order.
fragments = st.sampled_from(
    [b"hello ", b"\n", "é".encode(), b"\xc3", b"\x80", b"\xe2\x82", b"\xf0\x9f", b"\xff", b"\0"]
)
any_bytes = st.one_of(st.binary(max_size=60), st.lists(fragments, max_size=12).map(b"".join))
# Few letters and short words: nearly every choice is a tie.
tiny_corpora = st.lists(st.text("aab bc\n", max_size=24), min_size=1, max_size=6)


@functools.cache
def train_on_topics() -> Tokenizer:
    return train(TOPICS, 1000)


@functools.cache
def load_gpt2() -> Tokenizer:
    return load(GPT2)


def read_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.content)["model"]["merges"]]


def split_words(text: str) -> list[tuple[str, ...]]:
    pattern = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [tuple(word) for word, _ in pattern.pre_tokenize_str(text)]


def apply_merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged, place = [], 0
    while place < len(word):
        if word[place : place + 2] == pair:
            merged.append("".join(pair))
            place += 2
        else:
            merged.append(word[place])
            place += 1
    return tuple(merged)


def train_reference(documents: list[str], vocab: int) -> list[tuple[str, str]]:
    """BPE by definition: count all pairs, apply_merge the best, begin again."""
    words = collections.Counter(word for text in documents for word in split_words(text))
    ids = {token: index for index, token in enumerate([*SPECIALS, *BYTE_CHARACTERS])}
    merges: list[tuple[str, str]] = []
    while len(ids) < vocab:
        counts: collections.Counter = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        assert "".join(best) not in ids, "two merges made the same bytes"
        ids["".join(best)] = len(ids)
        merges.append(best)
        merged: collections.Counter = collections.Counter()
        for word, count in words.items():
            merged[apply_merge(word, best)] += count
        words = merged
    return merges


def encode_reference(tokenizer: Tokenizer, text: str) -> list[int]:
    """Apply the merges in the order learned, each everywhere."""
    ids = json.loads(tokenizer.content)["model"]["vocab"]
    encoded = []
    for word in split_words(text):
        for pair in read_merges(tokenizer):
            word = apply_merge(word, pair)
        encoded += [ids[token] for token in word]
    return encoded


# --- training ---


def test_training_on_real_text_learns_the_merges_of_the_reference():
    documents = [text for text in TOPICS if len(text) < 4000][:25]
    assert read_merges(train(documents, 420)) == train_reference(documents, 420)


@given(tiny_corpora.filter(lambda texts: any(texts)), st.integers(260, 300))
@settings(max_examples=200, deadline=None)
def test_training_breaks_ties_as_documented(documents, vocab):
    tokenizer = train(documents, vocab)
    assert read_merges(tokenizer) == train_reference(documents, vocab)


def test_a_tie_goes_to_the_smaller_left_token_and_then_to_the_smaller_right_token():
    assert read_merges(train(["bc", "ad"], 262)) == [("a", "d"), ("b", "c")]
    assert read_merges(train(["ac", "ab"], 261)) == [("a", "b")]
    # Bytes are ordered as bytes: a space before letters, though its character Ġ comes after them.
    assert read_merges(train(["ab c"], 262)) == [("Ġ", "c"), ("a", "b")]
    # A byte comes before any apply_merge, and an earlier apply_merge before a later one.
    assert read_merges(train(["xab", "xab", "abz", "zq"], 262))[1] == ("x", "ab")


def test_ids_are_specials_then_bytes_then_merges_in_the_order_learnt():
    tokenizer = train_on_topics()
    assert (tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2, 3)
    assert tokenizer.token_bytes[:4] == [b""] * 4
    assert tokenizer.token_bytes[4:260] == [bytes([byte]) for byte in range(256)]
    joined = ["".join(pair) for pair in read_merges(tokenizer)]
    learned = [bytes(module.CHARACTER_BYTES[character] for character in token) for token in joined]
    assert tokenizer.token_bytes[260:] == learned
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 1000
    assert tokenizer.lengths.dtype == np.int32
    assert tokenizer.lengths.tolist() == [len(token) for token in tokenizer.token_bytes]


def test_training_does_not_depend_on_document_order_or_on_getting_a_list():
    assert train(iter(TOPICS[::-1]), 1000).fingerprint == train_on_topics().fingerprint


def test_training_does_not_depend_on_where_long_documents_are_cut(monkeypatch):
    whole = "\n".join(TOPICS)
    monkeypatch.setattr(text_module, "MIN_PIECE_CHARACTERS", 10**9)
    uncut = train([whole], 1000)
    for size in (1, 1000):
        monkeypatch.setattr(text_module, "MIN_PIECE_CHARACTERS", size)
        assert train([whole], 1000).fingerprint == uncut.fingerprint


@pytest.mark.parametrize(
    "environment",
    [{"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "2"}],
    ids=str,
)
def test_training_does_not_depend_on_the_number_of_threads(environment):
    script = (
        "import pydoc_data.topics; from jaxgpt.tokenizer import train;"
        "print(train(pydoc_data.topics.topics.values(), 1000).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == train_on_topics().fingerprint


def test_text_and_its_bytes_train_the_same_and_bytes_that_are_not_utf8_are_left_out():
    texts = [text.encode() + b"\xff" for text in TOPICS]
    assert train(texts, 1000).fingerprint == train_on_topics().fingerprint


def test_each_part_of_a_long_word_counts_as_a_word():
    word, size = "acgtt" * 400, module.MAX_TRAINED_WORD_BYTES
    parts = [word[start : start + size] for start in range(0, len(word), size)]
    assert train([word], 300).fingerprint == train(parts, 300).fingerprint
    # So the time is not quadratic in the size of a word; without the parts this has no end.
    letters = np.random.default_rng(0).choice(list("ACGT"), 500_000)
    assert train(["".join(letters)], 2000).vocab_size == 2000


def test_a_corpus_with_too_few_pairs_gives_a_smaller_tokenizer():
    assert train(["abc"], 8192).vocab_size == 262
    assert train(["a"], 8192).vocab_size == 260


def test_specials_spelled_in_the_training_text_are_learnt_from_as_text():
    tokenizer = train([SPELLED_SPECIALS * 50], 400)
    assert tokenizer.token_bytes.count(b"<eos>") == 0
    assert b"eos" in tokenizer.token_bytes
    assert tokenizer.encode("<eos>").min() >= 4


# --- encoding and decoding ---


@given(any_bytes)
@settings(max_examples=300, deadline=None)
def test_any_bytes_come_back_exactly(data):
    for tokenizer in (train_on_topics(), make_byte_tokenizer()):
        ids = tokenizer.encode(data)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
        assert not ids.size or ids.min() >= 4
        assert tokenizer.lengths[ids].sum() == len(data)


@given(any_text)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_exactly(text):
    ids = train_on_topics().encode(text)
    assert train_on_topics().decode_bytes(ids) == text_module.encode_utf8(text)
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert train_on_topics().decode(ids) == text


@pytest.mark.parametrize(
    "text", [UNICODE, SPELLED_SPECIALS, "", "\ud83d", "\ud83d\ude42", "\udcff x"]
)
def test_text_and_its_bytes_encode_the_same(text):
    data = text_module.encode_utf8(text)
    np.testing.assert_array_equal(train_on_topics().encode(text), train_on_topics().encode(data))


@given(any_bytes)
@settings(max_examples=300, deadline=None)
def test_bytes_in_an_argument_encode_as_those_in_a_document(data):
    argument = data.decode("utf-8", "surrogateescape")  # as Python reads sys.argv
    assert text_module.encode_utf8(argument) == data
    np.testing.assert_array_equal(
        train_on_topics().encode(argument), train_on_topics().encode(data)
    )


def test_a_surrogate_that_stands_for_no_byte_has_its_three_bytes():
    assert text_module.encode_utf8("a\ud800\udcffb\udc7f") == b"a\xed\xa0\x80\xffb\xed\xb1\xbf"


def test_bytes_that_are_not_utf8_become_byte_tokens_and_do_not_change_adjacent_text():
    tokenizer = train_on_topics()
    left, right = tokenizer.encode("the function"), tokenizer.encode(" is called")
    ids = tokenizer.encode(b"the function\xff\xc3 is called")
    np.testing.assert_array_equal(ids, [*left, 4 + 0xFF, 4 + 0xC3, *right])


@given(st.one_of(st.text(characters, max_size=60), st.text("abc eth.\n ", max_size=60)))
@settings(max_examples=100, deadline=None)
def test_encoding_applies_the_merges_by_rank(text):
    assert train_on_topics().encode(text).tolist() == encode_reference(train_on_topics(), text)


def test_encoding_real_text_applies_the_merges_by_rank():
    text = TOPICS[3][:3000]
    assert train_on_topics().encode(text).tolist() == encode_reference(train_on_topics(), text)


awkward_text = st.text("ab1.,é北 \n\t\r'sre\u3000\x85\x1c\u180e", max_size=80)


@given(awkward_text, st.integers(1, 5), st.integers(3, 12))
@settings(max_examples=500, deadline=None)
def test_a_cut_is_always_between_two_words_or_in_a_gigantic_one(text, size, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "MIN_PIECE_CHARACTERS", size)
        patch.setattr(text_module, "MAX_WORD_CHARACTERS", longest)
        pieces = list(text_module.cut_long_text(text))
    assert "".join(pieces) == text
    expected, longest = {len(text)}, max(size, longest)
    for _, (begin, end) in module.PRE_TOKENIZER.pre_tokenize_str(text):
        expected |= {begin, *range(begin + longest, end, longest)}
    cuts = set(itertools.accumulate(map(len, pieces)))
    assert cuts <= expected
    assert max(map(len, pieces), default=0) <= max(longest, size)


@pytest.mark.parametrize(
    "text",
    [
        "北京是中华人民共和国的首都，位于华北平原。" * 2000,
        "ภาษาไทยเป็นภาษาที่มีระดับเสียง" * 2000,
        "SGVsbG8gd29ybGQh4oCmL0+x" * 2000,
        "var a=b(c,function(){return'd're've}),e=[1,2];" * 800,
        "北京 是\n" * 8000,
        "x" + " \n" * 15_000 + "y",
    ],
    ids=["Chinese", "Thai", "base64", "minified", "lines", "whitespace"],
)
def test_a_long_text_has_the_tokens_of_the_library(text):
    tokenizer = train_on_topics()
    expected = tokenizer._libraries["start"].encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).tolist() == expected
    if "\n" not in text:
        assert len(list(text_module.cut_long_text(text))) > 1


def test_each_part_of_a_gigantic_word_is_a_word():
    word = "acgt" * 10_000
    size = text_module.MAX_WORD_CHARACTERS
    parts = [train_on_topics().encode(part) for part in ("x. ", word[:size], word[size:], "!")]
    ids = train_on_topics().encode(f"x.{word}!")
    np.testing.assert_array_equal(ids, np.concatenate([train_on_topics().encode("x."), *parts[1:]]))


def test_encode_batch_equals_encoding_each_document():
    documents = [
        *TOPICS[:20],
        "\n".join(TOPICS),
        UNICODE,
        SPELLED_SPECIALS,
        "",
        b"",
        b"a\xffb",
        b"\xff",
    ]
    for ids, document in zip(train_on_topics().encode_batch(documents), documents, strict=True):
        np.testing.assert_array_equal(ids, train_on_topics().encode(document))
    assert train_on_topics().encode_batch([]) == []


def test_another_kind_of_tokenizer_encodes_pieces_by_its_own_encode_batch():
    class Kind(Tokenizer):
        def encode_batch(self, documents):
            calls.append(list(documents))
            return super().encode_batch(documents)

    calls: list = []
    tokenizer = Kind(train_on_topics().content)
    (number, ids), (_, other) = tokenizer.encode_pieces(["the text", "x"])
    assert calls[-1] == ["the text", "x"]
    assert (number, other.size) == (0, 1)
    assert ids.tolist() == train_on_topics().encode("the text").tolist()


@pytest.mark.parametrize("copy", ["trained", "saved", "pickled", "bytes"])
def test_spelled_specials_are_ordinary_text(copy, tmp_path):
    tokenizer = make_byte_tokenizer() if copy == "bytes" else train_on_topics()
    if copy == "saved":
        tokenizer.save(tmp_path / "tokenizer.json")
        tokenizer = load(tmp_path)
    elif copy == "pickled":
        tokenizer = pickle.loads(pickle.dumps(tokenizer))
    for ids in (
        tokenizer.encode(SPELLED_SPECIALS),
        *tokenizer.encode_batch([SPELLED_SPECIALS, "x" + SPELLED_SPECIALS]),
    ):
        assert ids.min() >= 4
    assert tokenizer.decode(tokenizer.encode(SPELLED_SPECIALS)) == SPELLED_SPECIALS


def test_specials_decode_to_nothing():
    ids = [
        train_on_topics().bos,
        *train_on_topics().encode("text"),
        train_on_topics().eos,
        train_on_topics().pad,
        train_on_topics().unk,
    ]
    assert train_on_topics().decode(ids) == "text"
    assert train_on_topics().decode([]) == ""
    assert train_on_topics().decode_bytes(np.array(ids)) == b"text"


@pytest.mark.parametrize("index", [-1, 1000, 10**30, 2**63, -(2**40)])
def test_an_id_outside_the_vocabulary_is_rejected(index):
    with pytest.raises(ValueError, match=rf"token id {index} .* ids go from 0 to 999"):
        train_on_topics().decode([5, index])


@pytest.mark.parametrize("ids", [[5.0], [5.5], np.array([np.nan]), ["5"], [None], [True]])
def test_ids_that_are_not_integers_are_rejected(ids):
    with pytest.raises(ValueError, match="token ids must be integers"):
        train_on_topics().decode(ids)


def test_without_merges_a_byte_is_a_token():
    tokenizer = make_byte_tokenizer()
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(4, 260))
    assert measure_compression(tokenizer, TOPICS[:3]) == 1.0


def test_compression_is_bytes_per_token():
    documents = [*TOPICS[:5], UNICODE, b"\xff"]
    size = len("".join(TOPICS[:5]).encode()) + len(UNICODE.encode()) + 1
    tokens = sum(train_on_topics().encode(document).size for document in documents)
    assert measure_compression(train_on_topics(), iter(documents)) == size / tokens


@given(any_bytes, st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=200, deadline=None)
def test_streamed_text_is_the_decoded_text_whatever_the_cuts(data, cuts):
    ids = train_on_topics().encode(data)
    stream = StreamDecoder(train_on_topics())
    parts = [stream.push(part) for part in np.split(ids, sorted(cuts))] + [stream.flush()]
    assert "".join(parts) == train_on_topics().decode(ids)
    if data.decode("utf-8", "ignore").encode() == data:
        assert "\ufffd" not in "".join(parts).replace(data.decode(), "")


def test_a_stream_holds_back_an_incomplete_character():
    stream = StreamDecoder(make_byte_tokenizer())
    assert [stream.push(4 + byte) for byte in "🙂!".encode()] == ["", "", "", "🙂", "!"]
    assert stream.flush() == ""
    assert (stream.push([4 + 0xE2]), stream.flush(), stream.push([4 + 33])) == ("", "\ufffd", "!")


# --- files ---


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path):
    train_on_topics().save(tmp_path / "tokenizer.json")
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = load(path)
        assert loaded.fingerprint == train_on_topics().fingerprint
        assert loaded.token_bytes == train_on_topics().token_bytes
        np.testing.assert_array_equal(loaded.encode(TOPICS[0]), train_on_topics().encode(TOPICS[0]))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_different_tokenizers_have_different_fingerprints():
    assert (
        len(
            {
                make_byte_tokenizer().fingerprint,
                train_on_topics().fingerprint,
                train(["abc"], 300).fingerprint,
            }
        )
        == 3
    )
    assert make_byte_tokenizer().fingerprint == make_byte_tokenizer().fingerprint


def test_transformers_loads_a_saved_tokenizer_with_equal_results(tmp_path):
    transformers = pytest.importorskip("transformers")
    train_on_topics().save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in (*TOPICS[:10], UNICODE, "a b , c . it 's\n\n  x"):
        ids = train_on_topics().encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == train_on_topics().decode(ids) == text


@needs_gpt2
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    ],
)
def test_gpt2s_vocabulary_gives_the_published_ids(text, ids):
    assert load_gpt2().encode(text).tolist() == ids


@needs_gpt2
def test_gpt2s_only_special_token_serves_every_role():
    tokenizer = load_gpt2()
    assert tokenizer.vocab_size == 50257
    assert {tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos} == {50256}
    assert tokenizer.token_bytes[50256] == b""
    assert tokenizer.token_bytes[995] == b" world"


@needs_gpt2
def test_gpt2s_vocabulary_matches_transformers():
    transformers = pytest.importorskip("transformers")
    vocab = json.loads((GPT2 / "encoder.json").read_text("utf-8"))
    lines = (GPT2 / "vocab.bpe").read_text("utf-8").split("\n")[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    theirs = transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)
    for text in (*TOPICS[:10], UNICODE, "  two  spaces\n\n\nand lines  "):
        assert load_gpt2().encode(text).tolist() == theirs(text)["input_ids"]
        assert load_gpt2().decode(load_gpt2().encode(text)) == text


@needs_gpt2
@given(any_bytes)
@settings(max_examples=100, deadline=None)
def test_any_bytes_come_back_exactly_from_gpt2s_vocabulary(data):
    ids = load_gpt2().encode(data)
    assert load_gpt2().decode_bytes(ids) == data
    assert 50256 not in ids


def make_foreign_tokenizer(
    specials=("<|begin_of_text|>", "<|end_of_text|>"), **changes
) -> tokenizers.Tokenizer:
    """Return a tokenizer like those of other libraries: other specials, ids and steps."""
    vocab = {character: index for index, character in enumerate(reversed(BYTE_CHARACTERS))}
    vocab["ab"] = 256
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], dropout=0.5))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.enable_truncation(5)
    library.enable_padding(length=50)
    library.add_special_tokens(list(specials))
    for name, value in changes.items():
        setattr(library, name, value)
    return library


def read(library, tmp_path) -> Tokenizer:
    library.save(str(tmp_path / "tokenizer.json"))
    return load(tmp_path)


def test_the_specials_of_foreign_tokenizers_are_found_by_name(tmp_path):
    tokenizer = read(make_foreign_tokenizer(), tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == (257, 258, 258, 258)
    tokenizer = read(make_foreign_tokenizer(("<s>", "[PAD]", "</s>", "<unk>")), tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == (257, 259, 258, 260)


def test_padding_truncation_and_dropout_of_foreign_tokenizers_are_dropped(tmp_path):
    tokenizer = read(make_foreign_tokenizer(), tmp_path)
    ids = tokenizer.encode(UNICODE)
    assert tokenizer.decode(ids) == UNICODE
    assert ids.tolist() == [255 - byte for byte in UNICODE.encode()]
    assert tokenizer.encode("ab" * 100).tolist() == [256] * 100
    assert tokenizer.is_lossless


def test_a_normalizer_changes_the_text_and_makes_the_tokenizer_lossy(tmp_path):
    tokenizer = read(make_foreign_tokenizer(normalizer=normalizers.NFC()), tmp_path)
    ids = tokenizer.encode(UNICODE)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", UNICODE) != UNICODE
    assert not tokenizer.is_lossless
    lower = read(make_foreign_tokenizer(normalizer=normalizers.Lowercase()), tmp_path)
    assert lower.decode(lower.encode("Ab")) == "ab"
    assert not lower.is_lossless


def test_an_added_token_that_is_not_special_decodes_to_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(
        text_module, "MIN_PIECE_CHARACTERS", 1
    )  # even where a long text would be cut
    library = make_foreign_tokenizer()
    library.add_tokens(["<tool>", "y z"])
    tokenizer = read(library, tmp_path)
    text = "x y z <tool>é<|end_of_text|>"
    assert {259, 260} < set(tokenizer.encode(text).tolist())
    assert 258 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("strips", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
@pytest.mark.parametrize("is_special", [True, False])
def test_whitespace_beside_an_added_token_comes_back(strips, is_special, tmp_path):
    library = make_foreign_tokenizer()
    token = tokenizers.AddedToken("<tool>", special=is_special, normalized=False, **strips)
    (library.add_special_tokens if is_special else library.add_tokens)([token])
    tokenizer = read(library, tmp_path)
    for text in ("a  <tool>\n\n b", " <tool> ", "x<tool>y<tool>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        is_found = 259 in tokenizer.encode(text)
        assert not (is_special and is_found)
        assert is_special or is_found or ("single_word" in strips and "x<" in text)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_llama3(**changes) -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = make_foreign_tokenizer(
        pre_tokenizer=pre_tokenizers.Sequence([split, level]), **changes
    )
    library.no_truncation()
    library.no_padding()
    return library


@given(awkward_text)
@settings(max_examples=200, deadline=None)
def test_very_long_texts_of_other_patterns_have_the_tokens_of_the_library(text):
    library = make_llama3()
    library.add_tokens(["b a", ". x"])
    library.model.dropout = None
    text = (text + " x. x b a") * 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_MIN_OTHER_PIECE_CHARACTERS", 100)
        tokenizer = Tokenizer(library.to_str())
        pieces = list(tokenizer._cut_text(text))
        ids = tokenizer.encode(text).tolist()
    assert "".join(pieces) == text
    assert len(pieces) > 1 or len(text) <= 200
    assert ids == library.encode(text, add_special_tokens=False).ids


# --- errors ---


@pytest.mark.parametrize("index", [10**9, -1, 1.5, "7"])
@pytest.mark.parametrize("where", ["vocab", "added_tokens"])
def test_an_impossible_id_is_rejected_at_once(index, where, tmp_path):
    spec = json.loads(make_foreign_tokenizer().to_str())
    if where == "vocab":
        spec["model"]["vocab"]["ab"] = index
    else:
        spec["added_tokens"][0]["id"] = index
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=f"it has the token id {index!r}, not 0 to 16,777,215"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "BPE with the pre-tokenizer Whitespace"),
        ({"model": models.WordLevel({"[UNK]": 0}, "[UNK]")}, "it is WordLevel with"),
        ({"model": models.Unigram([("a", 0.0)])}, "it is Unigram with"),
        ({"specials": ("[MASK]",)}, "no token that ends a document"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tokenizer_that_cannot_encode_every_text_is_rejected(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        read(make_foreign_tokenizer(**changes), tmp_path)
    assert f"data.tokenizer='{tmp_path / 'tokenizer.json'}'" in str(caught.value)


def test_without_tokens_for_some_bytes_a_tokenizer_is_lossy_and_other_bytes_are_replaced(tmp_path):
    alphabet = [c for c in BYTE_CHARACTERS if ord(c) != 256 + 4 and c not in BYTE_CHARACTERS[240:]]
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = read(make_foreign_tokenizer(model=models.BPE(vocab, [])), tmp_path)
    assert not tokenizer.is_lossless
    assert tokenizer.decode(tokenizer.encode("a\x04b é")) == "ab é"
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"


def test_a_token_that_is_not_written_in_bytes_is_rejected(tmp_path):
    vocab = {character: index for index, character in enumerate([*BYTE_CHARACTERS, "▁the"])}
    with pytest.raises(ConfigError, match="token '▁the' is not written in its bytes"):
        read(make_foreign_tokenizer(model=models.BPE(vocab, [])), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b"{}", "KeyError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_rejected(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path)
    assert f"data.tokenizer='{tmp_path / 'tokenizer.json'}'" in str(caught.value)
    assert "encoder.json and vocab.bpe" in str(caught.value)


@pytest.mark.parametrize("bpe", ["#version\nĠ t x\n", "#version\nno such\n"])
def test_gpt2_files_that_do_not_fit_each_other_are_rejected(bpe, tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0, "<|endoftext|>": 1}', "utf-8")
    (tmp_path / "vocab.bpe").write_text(bpe, "utf-8")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.* cannot be used: "):
        load(tmp_path)


@pytest.mark.parametrize("name", ["", "missing", "missing.json"])
def test_the_error_for_a_missing_tokenizer_lists_the_valid_choices(name, tmp_path):
    with pytest.raises(
        ConfigError, match=r"there is no such tokenizer\. Use 'train', 'bytes'"
    ) as e:
        load(tmp_path / name)
    assert f"data.tokenizer='{tmp_path / name}'" in str(e.value)


def test_a_vocabulary_smaller_than_the_bytes_is_rejected():
    with pytest.raises(ConfigError, match=r"model\.vocab=259 has no room .* at least 260"):
        train(["text"], 259)
    assert train(["text"], 260).vocab_size == 260


@pytest.mark.parametrize("documents", [[], [""], ["", b""]])
def test_an_empty_corpus_is_rejected(documents):
    with pytest.raises(ConfigError, match=r"data\.tokenizer='train'.*no text.*data\.source"):
        train(documents, 300)
    with pytest.raises(ConfigError, match="no text"):
        measure_compression(make_byte_tokenizer(), documents)


def test_the_docstring_examples_are_correct():
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(text_module).failed == 0


# --- memory and time ---


def measure_peak(script: str) -> float:
    """Return the megabytes by which the script's second part raises a process's peak memory."""
    setup, work = script.split("---\n")
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"
    code = f"import resource\n{setup}\nbefore = {peak}\n{work}\nprint({peak} - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.parametrize(
    "text",
    [
        "'北京是中华人民共和国的首都，\\n' * 200_000",
        "'北京是首都，' * 450_000",
        "'acgt' * 2_000_000",
    ],
    ids=["lines", "no space", "one word"],
)
def test_the_memory_of_encoding_is_a_small_multiple_of_the_text(text):
    # Texts of 8 MB. Before they were cut, their tokens in the library took 1.2 GB and more.
    peak = measure_peak(f"""
from jaxgpt.tokenizer import make_byte_tokenizer
tokenizer = make_byte_tokenizer()
text = {text}
tokenizer.encode("warm" * 100)
---
count = sum(ids.size for _, ids in tokenizer.encode_pieces([text]))
assert count == len(text.encode()) > 7_900_000
""")
    assert peak < 300  # megabytes; 185 measured, most of them for the tokens of one call
