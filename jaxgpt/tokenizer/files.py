"""Loading of tokenizers, from every form of file that models come with.

A tokenizer.json holds the tokenizer; `companions` has what the files beside it state, and
`convert.FORMS` the files that make one where there is none.
"""

import json
import os
import pathlib

from jaxgpt.settings import ConfigError, choose
from jaxgpt.tokenizer import convert
from jaxgpt.tokenizer.companions import Stated, read_bytes, read_stated
from jaxgpt.tokenizer.core import Tokenizer
from jaxgpt.tokenizer.placeholder import NoTokenizer
from jaxgpt.tokenizer.roles import read_token_setting
from jaxgpt.tokenizer.spec import USAGE_HINT, is_integer, make_error

# By the key "kind" in a tokenizer.json, which files of the tokenizers library do not have. Another
# kind is a subclass of `Tokenizer` that defines `parse`, `encode_batch` and `make`.
TOKENIZER_KINDS: dict[str, type[Tokenizer]] = {"bpe": Tokenizer, "none": NoTokenizer}


def load(path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer from disk.

    What a tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json in
    the same folder states is read too: which tokens begin and end a text, and the chat template.

    GPT-2's only special token, <|endoftext|>, serves as pad, unk, bos and eos.

    Args:
        path: a tokenizer.json, a tokenizer.model, or a folder with one of them, with vocab.json and
            merges.txt, encoder.json and vocab.bpe, or vocab.txt.

    Returns:
        The tokenizer, with the ids of the file.

    Raises:
        ConfigError: there is no such file, or it is no tokenizer that can be used.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        forms = [(form, [path / name for name in form.files]) for form in convert.FORMS]
        form, files = next(
            ((form, files) for form, files in forms if all(map(pathlib.Path.is_file, files))),
            (None, []),
        )
    else:
        form = convert.find_form(path.name)
        files = [path] if path.is_file() else []
    if form is None or not files:
        raise ConfigError(f"data.tokenizer={str(path)!r}: there is no such tokenizer. {USAGE_HINT}")
    name = str(files[0]) if len(form.files) == 1 else str(path)
    if len(files) != len(form.files):
        others = " and ".join(form.files)
        raise make_error(name, f"{others} belong together: give their folder")
    stated = read_stated(files[0], {name for form in convert.FORMS for name in form.files})
    contents = [read_bytes(file) for file in files]
    with convert.name_errors(name):
        content = form.convert(contents, stated.config, stated.added, name)
    return _make(content, name, stated)


def _make(content: str, name: str, stated: Stated) -> Tokenizer:
    kind = TOKENIZER_KINDS[_read_kind(content, name)]
    settings = {key: value for key, value in stated.config.items()
                if key.endswith("_token") or key == "chat_template"}  # fmt: skip
    if stated.is_foreign:
        settings.setdefault("bos_token", None)  # the files decide whether texts begin with bos
    if not stated.ends:
        return kind(content, name, settings=settings)
    bare = kind(content, name, settings=settings)
    ids = bare.special_ids
    known = range(bare.vocab_size)
    eos = read_token_setting(settings.get("eos_token"))
    first = [bare.eos] if eos is not None else []
    found = [ids.get(end, -1) if isinstance(end, str) else end for end in stated.ends]
    ends = [index for index in (*first, *found) if is_integer(index) and index in known]
    return kind(content, name, dict.fromkeys(ends) or None, settings=settings)


def _read_kind(content: str, name: str) -> str:
    """Return the kind of tokenizer that a tokenizer.json describes."""
    try:
        kind = json.loads(content).get("kind", "bpe")
    except (ValueError, AttributeError, RecursionError):
        return "bpe"  # which reports what is wrong
    choose(TOKENIZER_KINDS, kind, f"{name}: kind")
    return kind
