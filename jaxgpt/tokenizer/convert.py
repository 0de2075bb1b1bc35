"""Other files of tokenizers, as the text of a tokenizer.json."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import sentencepiece_model
from jaxgpt.tokenizer.roles import read_token_setting
from jaxgpt.tokenizer.spec import make_error

# Splits a text into words. The first is GPT-2's, which the step ByteLevel has built in.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def make_split_steps(pattern: str) -> dict[str, Any]:
    """Return the pre_tokenizer that splits text by a pattern and writes it in byte characters."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    level = _PLAIN | {"use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


class ByteLevelClass(NamedTuple):
    """What a tokenizer class of transformers fixes, beside its vocabulary."""

    pre_tokenizer: dict[str, Any] = _PLAIN
    normalizer: dict[str, Any] | None = None
    template: tuple[str, ...] = ("A",)


BYTE_LEVEL_CLASSES: dict[str, ByteLevelClass] = {
    "GPT2Tokenizer": ByteLevelClass(),
    "RobertaTokenizer": ByteLevelClass(template=("<s>", "A", "</s>")),
    "BartTokenizer": ByteLevelClass(template=("<s>", "A", "</s>")),
    "Qwen2Tokenizer": ByteLevelClass(make_split_steps(QWEN2_PATTERN), {"type": "NFC"}),
}
ADDED_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@contextlib.contextmanager
def name_errors(name: str) -> Iterator[None]:
    """Raise a ConfigError for whatever a damaged file raises."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise make_error(name, f"{type(error).__name__}: {error}") from error


def read_json(contents: list[bytes], config: dict[str, Any], added: dict[str, int], name: str):
    """Return a tokenizer.json as it is."""
    return contents[0].decode("utf-8")


def convert_byte_level(
    contents: list[bytes], config: dict[str, Any], added: dict[str, int], name: str
) -> str:
    """Convert vocab.json and merges.txt, or encoder.json and vocab.bpe."""
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in BYTE_LEVEL_CLASSES:
        known = ", ".join(BYTE_LEVEL_CLASSES)
        raise make_error(name, f"vocab.json and merges.txt do not hold the pattern of words of its "
                         f"class {kind} (known are {known}): its tokenizer.json does")  # fmt: skip
    vocab = json.loads(contents[0].decode("utf-8"))
    lines = contents[1].decode("utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if wrong := [pair for pair in merges if len(pair) != 2]:
        raise ValueError(f"a merge is {wrong[0]}, not two tokens")
    row = BYTE_LEVEL_CLASSES[kind]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": vocab, "merges": merges}  # fmt: skip
    names = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>")
    if config.get("add_prefix_space"):
        row = row._replace(pre_tokenizer=row.pre_tokenizer | {"add_prefix_space": True})
    tokens = list_added(vocab, config, added, names)
    return write_tree(model, tokens, row.normalizer, row.pre_tokenizer,
                      {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                       "use_regex": True}, row.template)  # fmt: skip


def convert_wordpiece(
    contents: list[bytes], config: dict[str, Any], added: dict[str, int], name: str
) -> str:
    """Convert vocab.txt: one token a line."""
    tokens = contents[0].decode("utf-8").removesuffix("\n").split("\n")
    tokens = [token.removesuffix("\r") for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ValueError(f"the token {twice!r} is there twice")
    unknown = read_token_setting(config.get("unk_token")) or "[UNK]"
    if unknown not in vocab:
        raise ValueError(f"there is no token {unknown}")
    model = {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": vocab}  # fmt: skip
    normalizer = {"type": "BertNormalizer", "clean_text": True,
                  "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
                  "strip_accents": config.get("strip_accents"),
                  "lowercase": config.get("do_lower_case", True)}  # fmt: skip
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    template = ("[CLS]", "A", "[SEP]") if {"[CLS]", "[SEP]"} <= vocab.keys() else ("A",)
    return write_tree(model, list_added(vocab, config, added, _WORDPIECE_SPECIALS), normalizer,
                      {"type": "BertPreTokenizer"}, decoder, template)  # fmt: skip


def convert_sentencepiece(
    contents: list[bytes], config: dict[str, Any], added: dict[str, int], name: str
) -> str:
    """Convert a tokenizer.model of SentencePiece."""
    found = sentencepiece_model.convert(contents[0], name)
    names = [*found.specials, *found.user_defined]
    tokens = list_added(found.vocab, config, added, names)
    for token in tokens:
        token["special"] = token["special"] and token["content"] not in found.user_defined
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind == "T5Tokenizer" and not any(token.startswith("<extra_id_") for token in found.vocab):
        count = int(config.get("extra_ids", 100))
        sentinels = {f"<extra_id_{count - 1 - n}>": len(found.vocab) + n for n in range(count)}
        known = {row["content"] for row in tokens}
        tokens += [ADDED_FLAGS | {"id": index, "content": token, "special": True}
                   for token, index in sentinels.items() if token not in known]  # fmt: skip
        tokens.sort(key=lambda row: row["id"])
    begin = (found.bos,) if found.bos and kind != "T5Tokenizer" else ()
    end = (found.eos,) if found.eos and kind == "T5Tokenizer" else ()
    if isinstance(config.get("add_bos_token"), bool) and found.bos:
        begin = (found.bos,) if config["add_bos_token"] else ()
    return write_tree(found.model, tokens, found.normalizer, found.pre_tokenizer, found.decoder,
                      (*begin, "A", *end))  # fmt: skip


def list_added(
    vocab: dict[str, int], config: dict[str, Any], added: dict[str, int], names: Any
) -> list[dict[str, Any]]:
    """Return the added tokens in the order of their ids.

    They are those of `added` (added_tokens.json), of `added_tokens_decoder` in the config, those
    with a role there, and of `names`, as far as they are in the vocabulary.
    """
    rows: dict[str, dict[str, Any]] = {}
    for index, row in (config.get("added_tokens_decoder") or {}).items():
        rows[row["content"]] = ADDED_FLAGS | {"special": False} | row | {"id": int(index)}
    roles = [read_token_setting(value) for key, value in config.items() if key.endswith("_token")]
    extra = [read_token_setting(value) for key in ("additional_special_tokens",
             "extra_special_tokens") for value in _list(config.get(key))]  # fmt: skip
    specials = {*filter(None, (*roles, *extra)), *names}
    for token, index in added.items():
        rows.setdefault(token, ADDED_FLAGS | {"special": token in specials, "id": index})
    for token in specials & vocab.keys():
        rows.setdefault(token, ADDED_FLAGS | {"special": True, "id": vocab[token]})
    found = [{"id": row["id"], "content": token, **{key: row[key] for key in ADDED_FLAGS},
              "special": row["special"]} for token, row in rows.items()]  # fmt: skip
    return sorted(found, key=lambda row: row["id"])


def _list(value: Any) -> list[Any]:
    return [*value.values()] if isinstance(value, dict) else list(value or ())


def write_tree(model, added, normalizer, pre_tokenizer, decoder, template) -> str:
    """Return the text of a tokenizer.json, with the template of one text: tokens and "A"."""
    ids = {row["content"]: row["id"] for row in added}
    parts: list[dict[str, Any]] = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "A" else
        {"SpecialToken": {"id": part, "type_id": 0}}
        for part in template if part == "A" or part in ids
    ]  # fmt: skip
    processor = {
        "type": "TemplateProcessing", "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {part: {"id": part, "ids": [ids[part]], "tokens": [part]}
                           for part in template if part in ids},
    }  # fmt: skip
    tree = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": processor if len(parts) > 1 else None, "decoder": decoder,
            "model": model}  # fmt: skip
    return json.dumps(tree, ensure_ascii=False)


class Form(NamedTuple):
    """Files that a tokenizer is made of."""

    files: tuple[str, ...]
    convert: Callable[[list[bytes], dict[str, Any], dict[str, int], str], str]


FORMS = (
    Form(("tokenizer.json",), read_json),
    Form(("vocab.json", "merges.txt"), convert_byte_level),
    Form(("encoder.json", "vocab.bpe"), convert_byte_level),
    Form(("tokenizer.model",), convert_sentencepiece),
    Form(("spiece.model",), convert_sentencepiece),
    Form(("vocab.txt",), convert_wordpiece),
)


def find_form(name: str) -> Form:
    """Return the form of a file by its name; of an unusual one, by its ending."""
    usual = [form for form in FORMS if name in form.files]
    endings = {".model": FORMS[3], ".txt": FORMS[5]}
    return usual[0] if usual else endings.get(name[name.rfind(".") :], FORMS[0])
