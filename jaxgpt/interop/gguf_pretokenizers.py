"""How the byte-level tokenizers of GGUF files split text: `tokenizer.ggml.pre` names one of these.

A splitter is steps of the library tokenizers, in its own JSON. Names that split alike differ in
llama.cpp in how it decodes, or in nothing; the first name is the one to write. An unknown name is
refused: with another splitter the model would read other tokens than it was trained on.

Source: the patterns are those of the models' tokenizer.json files.
"""

from typing import Any, NamedTuple

from jaxgpt.settings import ConfigError, find_nearest

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = "[一-龥ࠀ-一가-퟿]+"


def _cased_words(ending: str) -> str:
    """Return a pattern of words that ends one where lower case turns into upper case."""
    return rf"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{ending}|{_BEFORE_WORD}{_UPPER}+{_LOWER}*{ending}"


LLAMA3 = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_REST}"
QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{_cased_words('')}|\p{{N}}|{_REST_WITH_SLASH}"
GPT4O = rf"{_cased_words(_ENDINGS + '?')}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
        "use_regex": use_regex,
    }  # fmt: skip


_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT2 = (_bytes(True),)


class Splitter(NamedTuple):
    """How a tokenizer splits text.

    Attributes:
        steps: pre-tokenizers of the library tokenizers.
        ignores_merges: whether a word that is a token is never built from merges.
        adds_bos: whether texts begin with bos, if the file does not set it.
    """

    steps: tuple[dict[str, Any], ...]
    ignores_merges: bool = False
    adds_bos: bool = False


def _by_patterns(*patterns: str | dict, **changes: bool) -> Splitter:
    steps = [_split(x) if isinstance(x, str) else x for x in patterns]
    return Splitter((*steps, _bytes(False)), **changes)


_LLAMA3 = _by_patterns(LLAMA3, ignores_merges=True, adds_bos=True)
_DIGITS_THEN_GPT2 = Splitter((_DIGITS, *_GPT2))
_DEEPSEEK3 = _by_patterns(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3)
SPLITTERS: dict[str, Splitter] = {
    "gpt-2": Splitter(_GPT2),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion"), Splitter(_GPT2)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"),
        _DIGITS_THEN_GPT2,
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _by_patterns(LLAMA3)),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _by_patterns(QWEN2)
    ),
    "qwen35": _by_patterns(QWEN35),
    "tekken": _by_patterns(TEKKEN, ignores_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _by_patterns(GPT4O)),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _by_patterns(BLOOM)),
    "deepseek-coder": _by_patterns("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGITS),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
}


def find(name: str, path: str) -> Splitter:
    """Return the splitter of a name.

    Raises:
        ConfigError: the name is unknown, or the file has none.
    """
    if name in SPLITTERS:
        return SPLITTERS[name]
    near = find_nearest(name, SPLITTERS)
    hint = f" Nearest: {near[0]!r}." if near else ""
    raise ConfigError(
        f"{path}: tokenizer.ggml.pre={name!r} names no known way to split text, and a wrong one "
        f"would give the model other tokens than it knows.{hint} Known: "
        f"{', '.join(sorted(SPLITTERS))}."
    )


def find_name(pre_tokenizer: dict[str, Any] | None, ignores_merges: bool) -> str:
    """Return the name of the splitter that a tokenizer.json describes.

    Raises:
        ConfigError: llama.cpp has none that splits so.
    """
    steps = _normalize(pre_tokenizer)
    for name, splitter in SPLITTERS.items():
        if _normalize(*splitter.steps) == steps and splitter.ignores_merges == ignores_merges:
            return name
    shown = f"{[step[:2] for step in steps]}, ignore_merges={ignores_merges}"
    raise ConfigError(f"the tokenizer splits text as no tokenizer of llama.cpp does: {shown:.300}.")


def _normalize(*steps: dict[str, Any] | None) -> list[tuple]:
    """Return what matters of pre-tokenizers, so that equal ones compare equal."""
    found: list[tuple] = []
    for step in steps:
        kind = (step or {}).get("type")
        if step is None:
            continue
        if kind == "Sequence":
            found += _normalize(*step["pretokenizers"])
        elif kind == "ByteLevel":
            found.append((kind, step.get("use_regex", True), step.get("add_prefix_space", True)))
        elif kind == "Split" and "Regex" in step["pattern"]:
            behavior, is_inverted = step["behavior"], step.get("invert", False)
            if (behavior, is_inverted) == ("Removed", True):  # of text that the pattern covers
                behavior, is_inverted = "Isolated", False
            found.append((kind, step["pattern"]["Regex"], behavior, is_inverted))
        elif kind == "Digits":
            found.append((kind, step.get("individual_digits", False)))
        else:
            found.append((kind, str(sorted(step.items()))))
    return found
