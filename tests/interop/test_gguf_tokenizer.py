"""Tokenizers through GGUF files: the ids of the library tokenizers, of llama.cpp, and back."""

import functools
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from interop.llama_cpp import LlamaCpp
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxgpt.interop import (
    gguf_files,
    gguf_format,
    gguf_pretokenizers,
    gguf_tokenizer,
    gguf_tokenizer_write,
)
from jaxgpt.interop.archive import Archive, store
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer, make_byte_tokenizer

TEXTS = [
    "The quick brown fox's 12345 jumps; don't we'LL I'VE stop?", "  leading and  trailing  ",
    "def f(x):\n\treturn x**2 // 3\n\n\n", "naïve café Ünïcödé ẞ ǅ", "你好，世界 1 22 333 ٣٤٥٦",
    "😀🚀🌫️ ‍ x", "CamelCaseWords HTTPServer getURLFor", "https://example.com/a?b=c&d=é",
    "हिन्दी ไทย العربية", "x\r\ny\r\n", "a1b22c333", "    ", "", " ", "\n \n\n \n\n\n",
]  # fmt: skip
CORPUS = [*TEXTS, *pathlib.Path(__file__).read_text().splitlines()]
SPECIALS = ["<unk>", "<s>", "</s>"]
TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


def train(model, trainer, **parts) -> dict:
    """Train a tokenizer of the library, and return its JSON."""
    library = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(library, name, part)
    library.train_from_iterator(CORPUS, trainer)
    return json.loads(library.to_str())


@functools.cache
def make_byte_level(name: str) -> str:
    splitter = gguf_pretokenizers.SPLITTERS[name]
    spec = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(splitter.steps)}
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(CORPUS, trainer)
    spec = json.loads(library.to_str())
    spec["model"]["ignore_merges"] = splitter.ignores_merges
    return json.dumps(spec)


@functools.cache
def make_sentencepiece(has_prefix: bool) -> str:
    steps = [normalizers.Prepend("▁")] * has_prefix + [normalizers.Replace(" ", "▁")]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    spec = train(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(
            vocab_size=800, special_tokens=SPECIALS + byte_tokens, show_progress=False
        ),
        normalizer=normalizers.Sequence(steps),
        pre_tokenizer=pre_tokenizers.Split(tokenizers.Regex("▁+[^▁]*|[^▁]+"), "isolated"),
    )
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    decode += [decoders.Strip(" ", 1, 0)] * has_prefix
    library = tokenizers.Tokenizer(models.BPE())
    library.decoder = decoders.Sequence(decode)
    spec["decoder"] = json.loads(library.to_str())["decoder"]
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = [x for x in spec["added_tokens"] if x["content"] in SPECIALS]
    return json.dumps(spec)


@functools.cache
def make_unigram() -> str:
    spec = train(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        ),
        decoder=decoders.Metaspace(),
    )  # fmt: skip
    return json.dumps(spec)


@functools.cache
def make_wordpiece() -> str:
    spec = train(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            show_progress=False,
        ),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
        decoder=decoders.WordPiece(),
    )  # fmt: skip
    return json.dumps(spec)


def find_first_names() -> list[str]:
    """Return one name for every way to split text."""
    found: dict[str, str] = {}
    for name, splitter in gguf_pretokenizers.SPLITTERS.items():
        found.setdefault(str(splitter), name)
    return list(found.values())


KINDS = {name: functools.partial(make_byte_level, name) for name in find_first_names()} | {
    "SentencePiece": lambda: make_sentencepiece(True),
    "SentencePiece without a first space": lambda: make_sentencepiece(False),
    "Unigram": make_unigram, "WordPiece": make_wordpiece,
}  # fmt: skip
# What llama.cpp does otherwise than the models' own tokenizers: tabs and line ends are spaces to
# T5's only by its table of characters; of accents it strips more than BERT's.
OTHERWISE = {
    "Unigram": {text for text in TEXTS if set(text) & set("\t\n\r")},
    "WordPiece": {"हिन्दी ไทย العربية"},
}  # fmt: skip


def make_model(tokenizer: Tokenizer | None, rows: int) -> Archive:
    """Return the smallest Llama with this tokenizer."""
    make = lambda *shape: store(np.zeros(shape, np.float32))  # noqa: E731
    layer = "model.layers.0."
    config = dict(
        model_type="llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=64,
        rms_norm_eps=1e-5, tie_word_embeddings=True, head_dim=32,
    )  # fmt: skip
    matrices = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    tensors = {
        "model.embed_tokens.weight": make(rows, 32), "model.norm.weight": make(32),
        layer + "input_layernorm.weight": make(32),
        layer + "post_attention_layernorm.weight": make(32),
    } | {f"{layer}{name}.weight": make(32, 32) for name in matrices}  # fmt: skip
    return Archive(config, tensors, tokenizer)


def write_and_read(tokenizer: Tokenizer, path, extra_rows: int = 3) -> Tokenizer:
    rows = tokenizer.vocab_size + extra_rows
    gguf_files.write_file(make_model(tokenizer, rows), path)
    found = gguf_files.open_file(path).tokenizer
    assert found is not None
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_comes_back_and_is_that_of_llama_cpp(name, tmp_path):
    content = KINDS[name]()
    original = Tokenizer(content, name, None, TEMPLATES)
    found = write_and_read(original, tmp_path / "x.gguf")
    for field in ("bos", "eos", "pad", "unk", "ends", "adds_bos", "vocab_size", "chat_templates"):
        assert getattr(found, field) == getattr(original, field), field
    assert found.special_ids == original.special_ids
    assert found.token_bytes == original.token_bytes
    library = tokenizers.Tokenizer.from_str(content)
    with LlamaCpp(tmp_path / "x.gguf") as llama:
        assert llama.chat_template() == TEMPLATES["default"]
        for text in TEXTS:
            ids = library.encode(text, add_special_tokens=False).ids
            assert found.encode(text).tolist() == original.encode(text).tolist() == ids
            assert found.decode(ids) == original.decode(ids)
            if text not in OTHERWISE.get(name, ()):
                assert llama.tokenize(text) == ids, text


@functools.cache
def read_back(name: str) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """Return the library's tokenizer, and ours from metadata."""
    content = KINDS[name]()
    original = Tokenizer(content, name)
    values = gguf_tokenizer_write.write(original, {}, {}, original.vocab_size)
    metadata = {
        key: np.array(x.value) if x.is_array and x.type != "string" else x.value
        for key, x in values.items()
    }
    read = gguf_tokenizer.read(metadata, original.vocab_size, name)
    assert read is not None
    return tokenizers.Tokenizer.from_str(content), read.make(name)


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "SentencePiece", "Unigram"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t'sdx1é▁<|>"))))
def test_ids_of_any_text_are_those_of_the_library(name, text):
    library, found = read_back(name)
    assert found.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_our_own_tokenizer_goes_to_llama_cpp(tmp_path):
    found = write_and_read(make_byte_tokenizer(), tmp_path / "x.gguf")
    assert found.adds_bos
    assert (found.pad, found.unk, found.bos, found.eos) == (0, 1, 2, 3)
    with LlamaCpp(tmp_path / "x.gguf") as llama:
        assert llama.tokenize("né\n") == make_byte_tokenizer().encode("né\n").tolist()
        assert llama.library.llama_vocab_eos(llama.vocab) == 3


def test_added_tokens_are_found_in_text(tmp_path):
    spec = json.loads(make_sentencepiece(False))
    for content, is_special in (("▁" * 5, False), ("<tool>", False), ("<|im_end|>", True)):
        index = len(spec["model"]["vocab"])
        assert content not in spec["model"]["vocab"]
        spec["model"]["vocab"][content] = index
        spec["added_tokens"].append(
            spec["added_tokens"][0]
            | dict(id=index, content=content, special=is_special, normalized="▁" in content)
        )
    original = Tokenizer(json.dumps(spec), "x", [2, spec["model"]["vocab"]["<|im_end|>"]])
    found = write_and_read(original, tmp_path / "x.gguf", 0)
    assert found.ends == original.ends
    with LlamaCpp(tmp_path / "x.gguf") as llama:
        assert all(llama.is_end(index) for index in found.ends)
        for text in ("a<tool>b", "a     b", "a <|im_end|> b", "      x"):
            assert found.encode(text).tolist() == original.encode(text).tolist()
            assert llama.tokenize(text) == original.encode(text).tolist(), text


def test_rows_without_a_token_have_none(tmp_path):
    original = Tokenizer(make_byte_level("gpt-2"), "x")
    found = write_and_read(original, tmp_path / "x.gguf", 37)
    assert found.vocab_size == original.vocab_size
    metadata = gguf_format.read_header(str(tmp_path / "x.gguf")).metadata
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{original.vocab_size + 36}]"
    assert metadata["tokenizer.ggml.token_type"][-1] == gguf_tokenizer.UNUSED


def test_a_model_without_a_tokenizer_stays_without(tmp_path):
    gguf_files.write_file(make_model(None, 40), tmp_path / "x.gguf")
    assert gguf_files.open_file(tmp_path / "x.gguf").tokenizer is None


def test_the_table_of_characters_comes_along(tmp_path):
    charsmap = (4).to_bytes(4, "little") + bytes(4) + b"x\0"
    spec = json.loads(make_unigram())
    import base64

    spec["normalizer"] = {
        "type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    }  # fmt: skip
    tokens = gguf_tokenizer_write._Tokens(spec, 600)
    written = gguf_tokenizer_write._write_unigram(spec, tokens)
    assert bytes(written["precompiled_charsmap"].value) == charsmap
    metadata = {f"tokenizer.ggml.{key}": np.array(x.value) if x.is_array and x.type != "string"
                else x.value for key, x in written.items()}  # fmt: skip
    metadata["tokenizer.ggml.tokens"] = tokens.texts
    read = gguf_tokenizer.read(metadata, 600, "x")
    assert read is not None
    assert json.loads(read.text)["normalizer"] == spec["normalizer"]


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("tokenizer") / "x.gguf"
    write_and_read(Tokenizer(make_byte_level("smollm"), "x"), path)
    return gguf_format.read_header(str(path)).metadata


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "smolm", "pre='smolm' names no known way.*Nearest: 'smollm'. Known: bloom"),
        ("pre", "default", "pre='default' names no known way"),
        ("pre", "", "pre='' names no known way"),
        ("model", "rwkv", "model='rwkv' is not known"),
        ("tokens", 7, "tokens is missing, or no list"),
        ("tokens", [], "does not have one number for each token"),
        ("token_type", np.array([1, 2]), "token_type does not have one number for each token"),
        ("token_type", np.full(603, 9), "token_type has 9, not 0 to 6"),
        ("merges", ["no such"], "merges has 'no such', which are not two tokens"),
        ("merges", ["x"], "merges has 'x', which are not two tokens"),
        ("eos_token_id", 603, "eos_token_id=603 is not the id of a token"),
        ("bos_token_id", True, "bos_token_id=True is not the id of a token"),
        ("add_bos_token", 1, "add_bos_token is missing, or no bool"),
    ],
)
def test_damaged_metadata_is_refused_by_key(key, value, message, metadata):
    changed = metadata | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(ConfigError, match=message):
        gguf_tokenizer.read(changed, 603, "x.gguf")


def test_more_tokens_than_embeddings_are_refused(metadata):
    with pytest.raises(ConfigError, match="it has 603 tokens, and embeddings of 500"):
        gguf_tokenizer.read(metadata, 500, "x.gguf")
    with pytest.raises(ConfigError, match=r"the id 500, and the embeddings 500 rows"):
        gguf_tokenizer_write.write(Tokenizer(make_byte_level("smollm"), "x"), {}, {}, 500)


def test_a_token_twice_and_a_huge_one_are_refused(metadata):
    tokens = list(metadata["tokenizer.ggml.tokens"])
    twice = metadata | {"tokenizer.ggml.tokens": [*tokens[:50], tokens[49], *tokens[51:]]}
    with pytest.raises(ConfigError, match=r"tokens has .* twice"):
        gguf_tokenizer.read(twice, 603, "x.gguf")
    huge = metadata | {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [*tokens[:-1], "x" * 100_000],
        "tokenizer.ggml.token_type": np.ones(603, np.int32),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="100,000 characters has more than 1024"):
        gguf_tokenizer.read(huge, 603, "x.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True)),
            "no tok",
        ),
        (dict(normalizer=dict(type="Lowercase")), "normalizer 'Lowercase' has no counterpart"),
    ],
)
def test_what_llama_cpp_cannot_split_is_not_written(change, message):
    name = "smollm" if "pre_tokenizer" in change else "SentencePiece"
    spec = json.loads(KINDS[name]()) | change
    with pytest.raises(ConfigError, match=message):
        gguf_tokenizer_write.write(Tokenizer(json.dumps(spec), "x"), {}, {}, 900)
