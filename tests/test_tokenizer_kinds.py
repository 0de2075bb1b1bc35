"""Every kind of tokenizer against the `tokenizers` library, SentencePiece and transformers."""

import doctest
import functools
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizer_kinds import (
    LOSSLESS,
    MAKERS,
    NEARLY_LOSSLESS,
    SPECIALS,
    TEXTS,
    make_content,
    make_texts,
    train_sentencepiece,
)

from jaxgpt import text as text_module
from jaxgpt.tokenizer import StreamDecoder, Tokenizer, chat, core, load, streaming

COUNT = 10_000
UNIGRAMS = ("t5", "unigram", "unigram_bytes")  # the library finds specials in them as pieces


@functools.cache
def make(kind: str) -> Tokenizer:
    return Tokenizer(make_content(kind), kind)


@functools.cache
def make_reference(kind: str) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_str(make_content(kind))
    library.encode_special_tokens = True
    return library


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_are_those_of_the_library(kind):
    texts = make_texts(COUNT, specials=kind not in UNIGRAMS)
    expected = make_reference(kind).encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, other in zip(texts, make(kind).encode_batch(texts), expected, strict=True):
        assert ids.tolist() == other.ids, text


@pytest.mark.parametrize("kind", MAKERS)
def test_streamed_text_is_the_text_of_all_ids_and_halves_of_characters_do_not_leak(kind):
    tokenizer, rng = make(kind), random.Random(1)
    for text in make_texts(500, seed=1):
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer)
        parts = [stream.push(index) for index in ids] + [stream.flush()]
        assert "".join(parts) == tokenizer.decode(ids)
        assert all("\ufffd" not in part for part in parts)
        # Any ids, as a model may draw them.
        ids = rng.choices(range(tokenizer.vocab_size), k=20)
        stream = StreamDecoder(tokenizer)
        parts = [stream.push(index) for index in ids] + [stream.flush()]
        assert "".join(parts) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", MAKERS)
def test_text_comes_back_as_the_kind_promises(kind):
    tokenizer = make(kind)
    assert tokenizer.is_lossless == (kind in LOSSLESS)
    changed = 0
    for text in make_texts(2000, seed=2):
        found = tokenizer.decode(tokenizer.encode(text))
        changed += found != text
        if kind in LOSSLESS or (kind in NEARLY_LOSSLESS and "▁" not in text):
            assert found == text
    assert kind in LOSSLESS or changed


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in UNIGRAMS])
def test_decoding_is_that_of_the_library_for_texts_that_begin_with_a_letter(kind):
    # The library drops all spaces of a first token that has several.
    library = make_reference(kind)
    for text in make_texts(1000, seed=3):
        text = f"a{text}"
        ids = make(kind).encode(text).tolist()
        assert make(kind).decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_text_that_spells_special_tokens_is_never_encoded_to_them(kind):
    tokenizer = make(kind)
    specials = [*tokenizer.special_ids]
    forbidden = {*tokenizer.special_ids.values()} - {tokenizer.unk}
    for token in specials:
        for text in (token, f"a{token}b", f" {token} ", token * 3, f"x {token}\n{token}"):
            assert not forbidden & {*tokenizer.encode(text).tolist()}
            if kind in (*LOSSLESS, *NEARLY_LOSSLESS):
                assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.special_ids[token] for token in specials]) == ""


@pytest.mark.parametrize("kind", MAKERS)
def test_bytes_that_are_not_utf8_have_byte_tokens_or_are_replaced(kind):
    tokenizer, data = make(kind), b"ab \xff\xc3 c\xe2\x82"
    found = tokenizer.decode_bytes(tokenizer.encode(data))
    if kind in (*LOSSLESS, *NEARLY_LOSSLESS):
        assert found == data
    else:
        replaced = tokenizer.encode(data.decode("utf-8", "replace"))
        is_split = tokenizer._byte_ids is not None
        assert is_split or tokenizer.encode(data).tolist() == replaced.tolist()
    np.testing.assert_array_equal(tokenizer.encode("a \udcff"), tokenizer.encode(b"a \xff"))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_continuation_has_no_space_of_its_own(kind):
    """The ids of a text and of what follows it decode to both."""
    tokenizer = make(kind)
    before, after = tokenizer.encode("the word"), tokenizer.encode(" of", "inside")
    assert tokenizer.decode([*before, *after]).lstrip() == "the word of"
    stream = StreamDecoder(tokenizer, is_start=False)
    assert stream.push(after) == " of"
    if not kind.startswith("wordpiece"):
        joined = tokenizer.encode("s", "inside")
        assert tokenizer.decode([*before, *joined]).lstrip() == "the words"


@pytest.mark.parametrize("kind", MAKERS)
def test_a_long_text_that_is_cut_has_the_ids_of_the_whole(kind, monkeypatch):
    pieces = [
        "the of. ",
        " a",
        "b c",
        "\n",
        "  ",
        "word, ",
        "日本。",
        "é",
        "e\u0301 ",
        "</s>",
        "1 2",
    ]
    rng = random.Random(0)
    text = "".join(rng.choice(pieces) for _ in range(4000))
    tokenizer = make(kind)
    expected = tokenizer.encode(text).tolist()
    monkeypatch.setattr(text_module, "_MIN_OTHER_PIECE_CHARACTERS", 300)
    monkeypatch.setattr(text_module, "MIN_PIECE_CHARACTERS", 300)
    tokenizer = Tokenizer(make_content(kind), kind)
    cut = len([*tokenizer._cut_text(text)])
    assert cut > 5 or kind in ("unigram", "unigram_bytes", "t5")
    assert tokenizer.encode(text).tolist() == expected
    assert sum(ids.size for _, ids in tokenizer.encode_pieces([text, text])) == 2 * len(expected)


def test_a_sentencepiece_text_is_not_cut_where_a_token_crosses_the_space(monkeypatch):
    tree = json.loads(make_content("llama2"))
    vocab, merges = tree["model"]["vocab"], tree["model"]["merges"]
    vocab["d▁"] = max(vocab.values()) + 1
    merges.insert(0, ["d", "▁"])
    monkeypatch.setattr(text_module, "_MIN_OTHER_PIECE_CHARACTERS", 50)
    tokenizer = Tokenizer(json.dumps(tree))
    text = "d d d c a d " * 40
    pieces = [*tokenizer._cut_text(text)]
    assert len(pieces) > 1
    assert not any(piece.endswith("d") for piece in pieces[:-1])
    expected = tokenizers.Tokenizer.from_str(json.dumps(tree)).encode(
        text, add_special_tokens=False
    )
    assert tokenizer.encode(text).tolist() == expected.ids


# --- SentencePiece's own files ---

SETTINGS = {
    "bpe": dict(model_type="bpe", byte_fallback=True, vocab_size=800),
    "bpe_unk": dict(model_type="bpe"),
    "bpe_no_prefix": dict(
        model_type="bpe", byte_fallback=True, vocab_size=800, add_dummy_prefix=False
    ),
    "unigram": dict(model_type="unigram"),
    "unigram_bytes": dict(model_type="unigram", byte_fallback=True, vocab_size=800),
}
PLAIN = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.mark.parametrize("extra", [PLAIN, {}], ids=["identity", "nmt_nfkc"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_tokenizer_model_gives_the_ids_of_sentencepiece(name, extra, tmp_path):
    data = train_sentencepiece(**SETTINGS[name], **extra)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer, theirs = load(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=data)
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.ends) == (0, 1, 2, (2,))
    assert tokenizer.vocab_size == theirs.vocab_size()
    # SentencePiece does not find its byte tokens in a text that spells them; the library does.
    texts = [text for text in make_texts(3000, seed=4) if "<0x0A>" not in text]
    if not extra:  # the library looks at whole clusters of marks, and loses some
        texts = [text for text in texts if text.isascii() and "\r" not in text]
    assert len(texts) > 300 or not extra
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text), text
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(ids) == theirs.decode(ids.tolist()).replace(" \u2047 ", "")


# --- roles ---


@pytest.mark.parametrize("kind", MAKERS)
def test_bos_is_added_as_the_file_says(kind):
    """A file of transformers without a template adds none; our own files always do."""
    tokenizer = Tokenizer(make_content(kind), settings={"bos_token": None})
    library = tokenizers.Tokenizer.from_str(make_content(kind))
    first = library.encode("the").ids[0]
    assert tokenizer.adds_bos == (first == tokenizer.bos)
    assert tokenizer.prefix == ([tokenizer.bos] if tokenizer.adds_bos else [])
    stated = Tokenizer(make_content(kind), settings={"add_bos_token": not tokenizer.adds_bos})
    assert stated.adds_bos != tokenizer.adds_bos
    assert stated.fingerprint != tokenizer.fingerprint


def test_the_ids_that_end_a_text_are_special_even_if_the_file_does_not_flag_them():
    tree = json.loads(make_content("gpt2"))
    end = SPECIALS.index("<|im_end|>")
    tree["added_tokens"][end]["special"] = False
    tokenizer = Tokenizer(json.dumps(tree), ends=[end, 2])
    assert (tokenizer.eos, tokenizer.ends) == (end, (end, 2))
    assert end not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode([end, 2]) == ""
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a<|im_end|>"


def test_the_examples_of_the_package_are_correct():
    for module in (core, streaming, chat, text_module):
        assert doctest.testmod(module).failed == 0
