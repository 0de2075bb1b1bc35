"""Small tokenizers of every kind, trained with the `tokenizers` library, and hard texts."""

import base64
import functools
import io
import json
import pydoc_data.topics
import random

import sentencepiece
import tokenizers
from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxgpt.tokenizer.convert import QWEN2_PATTERN

FOREIGN = "日本語 テキスト 北京 🙂 café naïve Ünïcode ½ ﬁ 한국어 привет"
TEXTS = [*[*pydoc_data.topics.topics.values()][:40], *[FOREIGN] * 9]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}| ?", r"|\p{N}{1,3}| ?")

PIECES = [*"ab cd.,'0123é北京日🙂\U0001f3fd\n\t\r\0\u3000\u0301ﬁ▁ＡＢ½ <>s/|Ġß한\u200d\ufeff",
          "  ", "   ", "\r\n", "the ", " of", "'re", "▁the", "日本語", "e\u0301", "##a", "[UNK]",
          "\u0345", "\U000e0001", "<0x0A", " \n", "123456"]  # fmt: skip


def make_text(rng: random.Random, pieces=tuple(PIECES)) -> str:
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))


def make_texts(count: int, seed: int = 0, specials: bool = True) -> list[str]:
    rng = random.Random(seed)
    pieces = tuple(PIECES + ([*SPECIALS, "[CLS]", "[SEP]"] if specials else []))
    return [make_text(rng, pieces) for _ in range(count)]


def add_bos(library, *before):
    """Add <s>, or these tokens, before every text."""
    before = before or ("<s>",)
    library.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A"]),
        special_tokens=[(token, library.token_to_id(token)) for token in before],
    )


def make_byte_level(pre_tokenizer, normalizer=None, **model):
    library = tokenizers.Tokenizer(models.BPE())
    if normalizer:
        library.normalizer = normalizer
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(TEXTS, trainer)
    return library


def split_by(*patterns):
    steps = [p if not isinstance(p, str) else pre_tokenizers.Split(Regex(p), "isolated")
             for p in patterns]  # fmt: skip
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, level])


def make_llama3():
    library = make_byte_level(split_by(LLAMA3_PATTERN))
    tree = json.loads(library.to_str())
    tree["model"]["ignore_merges"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def make_sentencepiece_bpe(normalizer, pre_tokenizer, decoder):
    """A BPE with the 256 byte tokens, trained on words that begin with ▁."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*SPECIALS, *names], show_progress=False,
        initial_alphabet=["▁"], limit_alphabet=80,
    )  # fmt: skip
    trained.train_from_iterator(TEXTS, trainer)
    tree = json.loads(trained.to_str())
    tree["added_tokens"] = [row for row in tree["added_tokens"] if row["content"] in SPECIALS]
    tree["model"] |= {"byte_fallback": True, "fuse_unk": True}
    library = tokenizers.Tokenizer.from_str(json.dumps(tree))
    library.decoder = decoder
    library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizer
    add_bos(library)
    return library


REPLACE = normalizers.Replace(" ", "▁")
PLAIN_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
LLAMA2_DECODER = decoders.Sequence([*PLAIN_STEPS, decoders.Strip(" ", 1, 0)])


def make_llama2():
    steps = normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])
    return make_sentencepiece_bpe(steps, None, LLAMA2_DECODER)


def make_mistral():
    words = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return make_sentencepiece_bpe(None, words, LLAMA2_DECODER)


def make_gemma():
    words = pre_tokenizers.Split(" ", "merged_with_previous")
    return make_sentencepiece_bpe(REPLACE, words, decoders.Sequence(PLAIN_STEPS))


@functools.cache
def train_sentencepiece(**settings) -> bytes:
    """Train a tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines() if line),
        model_writer=model, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        **{"vocab_size": 500, **settings},
    )  # fmt: skip
    return model.getvalue()


@functools.cache
def find_charsmap() -> bytes:
    """Return SentencePiece's table of characters for nmt_nfkc."""
    from jaxgpt.tokenizer.sentencepiece_model import read_fields

    fields = dict(read_fields(train_sentencepiece(normalization_rule_name="nmt_nfkc")))
    return dict(read_fields(fields[3]))[2]


def make_unigram(has_bytes: bool, normalizer: str = ""):
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    tree = json.loads(trained.to_str())
    if has_bytes:
        tree["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        tree["model"]["byte_fallback"] = True
        tree["decoder"] = json.loads(decoders.Sequence([
            decoders.ByteFallback(), decoders.Metaspace()]).__getstate__())  # fmt: skip
    else:
        tree["decoder"] = json.loads(decoders.Metaspace().__getstate__())
    if normalizer == "t5":
        encoded = base64.b64encode(find_charsmap()).decode()
        tree["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": encoded},
            {"type": "Strip", "strip_left": False, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]}  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def make_wordpiece(lowercase: bool = True):
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=800, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )  # fmt: skip
    library.train_from_iterator(TEXTS, trainer)
    library.decoder = decoders.WordPiece()
    add_bos(library, "[CLS]")
    return library


def byte_level(**settings):
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | settings))


DEEPSEEK = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+",
            pre_tokenizers.Digits(individual_digits=True))  # fmt: skip

MAKERS = {
    "gpt2": lambda: make_byte_level(byte_level()),
    "prefix_space": lambda: make_byte_level(byte_level(add_prefix_space=True)),
    "llama3": make_llama3,
    "qwen2": lambda: make_byte_level(split_by(QWEN2_PATTERN), normalizers.NFC()),
    "smollm": lambda: make_byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    ),
    "neox": lambda: make_byte_level(byte_level(), normalizers.NFC()),
    "deepseek": lambda: make_byte_level(split_by(*DEEPSEEK)),
    "llama2": make_llama2,
    "mistral": make_mistral,
    "gemma": make_gemma,
    "t5": lambda: make_unigram(False, "t5"),
    "unigram": lambda: make_unigram(False),
    "unigram_bytes": lambda: make_unigram(True),
    "wordpiece": make_wordpiece,
    "wordpiece_cased": lambda: make_wordpiece(lowercase=False),
}
LOSSLESS = ("gpt2", "llama3", "smollm", "deepseek")  # for every text
# Of these all texts come back that have no ▁, and, in the second, do not begin with a space.
NEARLY_LOSSLESS = ("llama2", "gemma")


@functools.cache
def make_content(kind: str) -> str:
    """Return a tokenizer.json."""
    return MAKERS[kind]().to_str()
