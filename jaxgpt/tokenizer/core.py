"""Tokenizers: encode text as integers and back.

A token is a string of bytes. Decoding is a table lookup of bytes by id, for every kind, so text can
be decoded as its tokens arrive; what a kind does with spaces is in the bytes, and in one rule about
the first space of a text. Encoding runs in the `tokenizers` library (Rust, all cores); files are
its tokenizer.json.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from jaxgpt.settings import ConfigError, resolve_table
from jaxgpt.text import (
    cut_long_text,
    cut_very_long_text,
    encode_utf8,
    group_by_size,
    split_non_utf8,
)
from jaxgpt.tokenizer import chat, companions, library
from jaxgpt.tokenizer.byte_level import BYTE_LEVEL, has_gpt2_words
from jaxgpt.tokenizer.kind import Kind
from jaxgpt.tokenizer.metaspace import METASPACE
from jaxgpt.tokenizer.roles import find_roles, find_unknown_token, read_token_setting
from jaxgpt.tokenizer.spec import Spec, is_integer, make_error, read_spec
from jaxgpt.tokenizer.wordpiece import WORDPIECE

# The kinds of tokenizer.json that the library writes: the first one that a file fits.
KINDS: tuple[Kind, ...] = (BYTE_LEVEL, METASPACE, WORDPIECE)

# Where a text stands that is encoded: at the beginning, after a special token, or inside of a text.
PLACES = ("start", "section", "inside")

_PIECES_PER_CALL = 512  # of the library, whose results take about 100 bytes per token
_BYTES_PER_CALL = 1 << 20  # of text, at least one piece: at most so many tokens
_PROBE = "A  b\r\n\t c'd 1234 é e\u0301 ﬁ ▁ 北京 \U0001f642 <eos>  ".encode()


class Tokenizer:
    """Converts text to token ids and back. Made by `train`, `load` or `make_byte_tokenizer`.

    Examples:
        >>> from jaxgpt.tokenizer import make_byte_tokenizer
        >>> tokenizer = make_byte_tokenizer()
        >>> tokenizer.encode("hi")
        array([108, 109], dtype=int32)
        >>> tokenizer.decode([2, 108, 109, 3])
        'hi'

    Args:
        content: the text of a tokenizer.json.
        name: its name in error messages.
        ends: ids that end a text, the first of which ends documents; None: what the settings or the
            names of the special tokens give.
        chat_template: Jinja source, or several by name; None: none, or what the settings have.
        settings: what tokenizer_config.json of transformers states: bos_token, eos_token,
            pad_token, unk_token, add_bos_token, chat_template.

    Attributes:
        content: the text of the tokenizer.json.
        kind: "byte-level BPE", "SentencePiece", "WordPiece", or that of a plugin.
        vocab_size: V, one more than the largest id.
        pad, unk, bos, eos: ids of the special tokens. Text is never encoded to a special token
            because it spells it.
        ends: ids that end a text; eos is the first.
        adds_bos: whether texts begin with bos; see `prefix`.
        is_lossless: whether every text comes back exactly.
        drops_first_space: whether decoding drops a space at the beginning of a text.
        chat_template: Jinja source of the conversations that the model was trained on, or "".
        chat_templates: all of them by name; "default" is `chat_template`.
        special_ids: the ids of the special tokens by their text.
        token_bytes: the bytes of each id, [V]; b"" for specials.
        lengths: bytes per token, int32 [V]; 0 for specials.

    Raises:
        ConfigError: the content is not a tokenizer that can be used.
    """

    kind = ""
    adds_bos = True
    is_lossless = True
    drops_first_space = False
    special_ids: Mapping[str, int] = {}

    def __init__(
        self,
        content: str,
        name: str = "tokenizer.json",
        ends: Iterable[int] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.content, self._name, self.settings = content, name, dict(settings or {})
        self._given_ends = None if ends is None else tuple(ends)
        stated = self.settings.pop("chat_template", None)
        template = stated if chat_template is None else chat_template
        self.chat_templates = chat.read_templates(template, name)
        self.pad = self.unk = self.bos = self.eos = 0
        self.ends: tuple[int, ...] = ()
        self.token_bytes: list[bytes] = []
        self.parse(content, name)
        self.ends = self.ends or self._given_ends or (self.eos,)

    def parse(self, content: str, name: str) -> None:
        """Set `token_bytes`, `pad`, `unk`, `bos` and `eos` from the text of a tokenizer.json."""
        spec = read_spec(content, name)
        with library.catch_library_errors(name):
            self._read(spec)
            probe = b" \t ".join([_PROBE, *(t.encode() for t in self._added), b"\xff\0"])
            self.is_lossless = all(
                self.decode_bytes(self.encode(text)) == text for text in (probe, b" " + probe, b"a")
            )

    def _read(self, spec: Spec):
        kind = next((kind for kind in KINDS if kind.is_for(spec)), None)
        if kind is None:
            words = " + ".join(spec.list_types("pre_tokenizer")) or "none"
            kinds = ", ".join(kind.name for kind in KINDS)
            raise make_error(spec.name, f"it is {spec.model_type} with the pre-tokenizer {words}, "
                             f"and the kinds known here are {kinds}")  # fmt: skip
        self.kind = kind.name
        self.drops_first_space = kind.drops_first_space(spec)
        added = {token["content"]: token["id"] for token in spec.added}
        names = spec.vocab | added
        flagged = {token["content"]: token["id"] for token in spec.added if token["special"]}
        roles = find_roles(spec, names, flagged, self.settings, self._given_ends)
        self.bos, self.eos, self.pad, self.unk, self.ends, self.adds_bos = roles
        self.special_ids = flagged | self._find_unflagged(spec, names)
        self._added = [token for token in added if token not in self.special_ids]
        self.token_bytes = [b""] * (max(names.values()) + 1)
        for token, index in names.items():
            read = kind.read_added if token in added else kind.read_token
            if token not in self.special_ids:
                try:
                    self.token_bytes[index] = read(spec, token)
                except ValueError as error:
                    raise make_error(spec.name, str(error)) from error
        self._byte_ids = _find_byte_ids(kind, spec, names)
        self._libraries = self._make_libraries(kind, spec)
        self._cut_text = self._choose_cutter(kind, spec)

    def _find_unflagged(self, spec: Spec, names: Mapping[str, int]) -> dict[str, int]:
        """Return the tokens that are special although the file does not flag them so."""
        roles = {*self.ends}
        stated = [read_token_setting(self.settings.get(key)) for key in ("bos_token", "pad_token")]
        unknown = find_unknown_token(spec)
        return {
            token: index for token, index in names.items()
            if index in roles or token in stated or token == unknown
        }  # fmt: skip

    def _make_libraries(self, kind: Kind, spec: Spec) -> dict[str, tokenizers.Tokenizer]:
        """Return the library's tokenizer for text at each of PLACES; often it is one."""
        inside = kind.continue_steps(spec.steps)
        first = [step for step in spec.steps["pre_tokenizer"]
                 if step.get("prepend_scheme") == "first"]  # fmt: skip
        steps = {"start": spec.steps, "section": inside if first else spec.steps, "inside": inside}
        made: dict[str, tokenizers.Tokenizer] = {}
        for place in PLACES:
            same = next((other for other in made if steps[other] == steps[place]), None)
            made[place] = made[same] if same else library.make_encoder(
                spec, steps[place], self.special_ids.keys()
            )  # fmt: skip
        return made

    def _choose_cutter(self, kind: Kind, spec: Spec):
        """Return the function that cuts a long text without changing its tokens."""
        if kind is BYTE_LEVEL and has_gpt2_words(spec) and not self._added:
            return cut_long_text
        # Words of other patterns, and added tokens, may cross a space.
        is_border = kind.make_is_border(spec, self._libraries["inside"])
        return functools.partial(
            cut_very_long_text, is_border, tuple(self._added), kind is BYTE_LEVEL
        )

    def __reduce__(self):
        # The library's own pickle loses `encode_special_tokens`.
        arguments = (self.content, self._name, self._given_ends, self.chat_templates, self.settings)
        return type(self), arguments

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self.token_bytes)

    @property
    def has_given_ends(self) -> bool:
        """Return whether the ends of a text were given, not found by name."""
        return self._given_ends is not None

    @property
    def chat_template(self) -> str:
        """Return the Jinja source of the model's conversations, or ""."""
        return self.chat_templates.get("default", "")

    @property
    def prefix(self) -> list[int]:
        """Return the ids that a text begins with: [bos], or none."""
        return [self.bos] if self.adds_bos else []

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Return the number of bytes of each token, int32 [V]."""
        return np.array([len(token) for token in self.token_bytes], np.int32)

    @staticmethod
    def make(argument: str) -> "Tokenizer":
        """Return the tokenizer of this kind that data.tokenizer=KIND:argument names."""
        load: Any = resolve_table("jaxgpt.tokenizer.files:load")
        return load(argument)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hex digest, equal for two tokenizers if and only if the same text has the same ids.

        It is of the content of the file, and of what is stated beside it if that changes ids.
        """
        canonical = json.dumps(json.loads(self.content), sort_keys=True)
        if self.settings or self._given_ends:
            roles = [self.bos, self.eos, self.pad, self.adds_bos]
            bare = type(self)(self.content, self._name)
            if roles != [bare.bos, bare.eos, bare.pad, bare.adds_bos]:
                canonical += json.dumps(roles)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def check_fingerprint(self, expected: str, run_folder: str) -> None:
        """Check that this is the tokenizer that a run was trained with.

        Args:
            expected: its fingerprint, saved with the run; "" if the run is older than that.
            run_folder: names the run in the error.

        Raises:
            ConfigError: it is another one, whose ids would mean other text.
        """
        if expected and expected != self.fingerprint:
            raise ConfigError(
                f"{self._name} is not the tokenizer that {run_folder} was trained with: its "
                f"fingerprint is {self.fingerprint[:12]}, and that of the run {expected[:12]}. The "
                "same text would have other ids: put the run's own tokenizer.json back."
            )

    def encode(self, text: str | bytes, place: str = "start") -> np.ndarray:
        """Return the ids of a text, without bos or eos.

        Args:
            text: any str or bytes. Bytes that are not UTF-8 become single-byte tokens, or U+FFFD if
                the tokenizer has none; for lone surrogates in a str see `text.encode_utf8`. Of a
                word of more than 32,768 characters (no language has one), each 32,768 are a word.
            place: where the text stands, one of PLACES. SentencePiece adds a space at the "start",
                and not "inside" of a text.

        Returns:
            int32 [N]; `decode_bytes` maps them back to exactly the bytes of the text, if the
            tokenizer `is_lossless`.
        """
        if place == "start" or type(self).encode_batch is not Tokenizer.encode_batch:
            return self.encode_batch([text])[0]
        return np.concatenate([ids for _, ids in self._encode_parts([text], place)])

    def encode_with_offsets(
        self, text: str, place: str = "start"
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return the ids of a text, int32 [N], and the characters that each token stands for."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = encode_utf8(text).decode("utf-8", "replace")  # lone surrogates
        if type(self).encode_batch is not Tokenizer.encode_batch:
            ids = self.encode(text)
            return ids, [(0, len(text))] * len(ids)
        with library.catch_library_errors(self._name):
            found = self._libraries[place].encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32), found.offsets

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Return the pattern of the special tokens, with the whitespace that some take."""
        rows = {row["content"]: row for row in json.loads(self.content).get("added_tokens", ())}
        longest = sorted(filter(None, self.special_ids), key=len, reverse=True)
        words = [
            (r"\s*" if rows.get(token, {}).get("lstrip") else "")
            + re.escape(token)
            + (r"\s*" if rows.get(token, {}).get("rstrip") else "")
            for token in longest
        ]
        return re.compile("|".join(words)) if words else None

    def list_template_tokens(self) -> dict[str, str]:
        """Return the special tokens by their role, as chat templates name them: bos_token, ..."""
        stated = {key: read_token_setting(value) for key, value in self.settings.items()}
        by_id = {index: token for token, index in self.special_ids.items()}
        roles = {"bos_token": self.bos, "eos_token": self.eos}
        found = {key: by_id.get(index, "") for key, index in roles.items() if key not in stated}
        return found | {key: token for key, token in stated.items() if token}

    def encode_batch(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        """Return the ids of many texts, computed on all cores.

        Args:
            documents: as for `encode`.

        Returns:
            One int32 [N] per document: the same as `encode` returns.
        """
        ids: list[list[np.ndarray]] = [[] for _ in documents]
        for number, piece in self._encode_parts(documents):
            ids[number].append(piece)
        return [pieces[0] if len(pieces) == 1 else np.concatenate(pieces) for pieces in ids]

    def encode_pieces(self, documents: Sequence[str | bytes]) -> Iterator[tuple[int, np.ndarray]]:
        """Return the ids of many texts in pieces, computed on all cores in bounded memory.

        Args:
            documents: as for `encode`.

        Returns:
            Pairs of the index of a document and the next of its ids, int32 [N], in order; at least
            one per document.
        """
        if type(self).encode_batch is Tokenizer.encode_batch:
            return self._encode_parts(documents)
        return enumerate(self.encode_batch(documents))  # of another kind of tokenizer

    def _encode_parts(
        self, documents: Sequence[str | bytes], place: str = "start"
    ) -> Iterator[tuple[int, np.ndarray]]:
        parts = (
            (number, part)
            for number, document in enumerate(documents)
            for part in self._split(document)
        )
        last = -1  # the document of the part before
        is_different = self._libraries["inside"] is not self._libraries[place]
        for group in group_by_size(parts, _PIECES_PER_CALL, _BYTES_PER_CALL):
            texts: dict[str, list[str]] = {place: [], "inside": []}
            order: list[tuple[int, str | bytes]] = []
            for number, part in group:
                where = "inside" if number == last and is_different else place
                last = number
                if isinstance(part, str):
                    texts[where].append(part)
                order.append((number, where if isinstance(part, str) else part))
            encodings = {where: iter(self._call(where, group)) for where, group in texts.items()}
            for number, found in order:
                if isinstance(found, bytes):
                    assert self._byte_ids is not None
                    yield number, self._byte_ids[np.frombuffer(found, np.uint8)]
                else:
                    yield number, np.array(next(encodings[found]).ids, np.int32)

    def _call(self, place: str, texts: list[str]) -> list[tokenizers.Encoding]:
        with library.catch_library_errors(self._name):
            return self._libraries[place].encode_batch_fast(texts, add_special_tokens=False)

    def _split(self, document: str | bytes) -> Iterator[str | bytes]:
        """Split a document into pieces of text and of bytes that have tokens of their own."""
        if self._byte_ids is not None:
            return split_non_utf8(document, self._cut_text)
        data = encode_utf8(document) if isinstance(document, str) else document
        return self._cut_text(bytes(data).decode("utf-8", "replace"))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of these ids; special tokens have none.

        Args:
            ids: integers of any shape, read in order; the beginning of a text.

        Raises:
            ValueError: an id is outside the vocabulary, or not an integer.
        """
        found = self.join_bytes(ids)
        return found[1:] if self.drops_first_space and found[:1] == b" " else found

    def join_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of ids in the middle of a text: none is dropped."""
        flat = np.asarray(ids).reshape(-1)  # [N]
        if flat.dtype.kind not in "iu":  # a list of floats, none, or with integers of over 64 bits
            flat = np.asarray(ids, object).reshape(-1)
            if wrong := [index for index in flat if not is_integer(index)][:1]:
                raise ValueError(f"token ids must be integers, and {wrong[0]!r} is not.")
        outside = flat[(flat < 0) | (flat >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is not in the vocabulary: "
                f"ids go from 0 to {self.vocab_size - 1}."
            )
        return b"".join([self.token_bytes[index] for index in flat.tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> np.ndarray:
        """Return the ids of a conversation, int32 [N]; see `chat.encode_chat`.

        Special tokens that a message spells are text, and no bos is added to what the template
        writes.

        Args:
            messages: dicts with `role` and `content`.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end with the beginning of the assistant's turn.
            template: Jinja source or the name of a built-in template; None: the tokenizer's own.

        Raises:
            ConfigError: there is no template, it is invalid, or it refuses the conversation.
        """
        return chat.encode_chat(self, messages, tools, add_generation_prompt, template).ids

    def with_chat_template(self, template: str | Mapping[str, str]) -> "Tokenizer":
        """Return the tokenizer with another chat template: Jinja source, or the name of one."""
        found = template
        if isinstance(template, str):
            chat.check_template(template, self.special_ids, self._name)
            found = chat.find_template(template)
        return type(self)(self.content, self._name, self._given_ends, found, self.settings)

    def with_ends(self, ends: Iterable[int]) -> "Tokenizer":
        """Return the tokenizer with other ids that end a text, the first of which is `eos`."""
        templates = self.chat_templates or None
        return type(self)(self.content, self._name, ends, templates, self.settings)

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json, which `load` and transformers read, atomically.

        What is known beside its content (ends, settings, chat template) goes into
        tokenizer_config.json in the same folder.
        """
        companions.save(self, path)


def _find_byte_ids(kind: Kind, spec: Spec, names: Mapping[str, int]) -> np.ndarray | None:
    """Return the id of the token of each single byte, int32 [256]; None if there are none."""
    if kind.name_byte is None:
        return None
    tokens = [kind.name_byte(spec, byte) for byte in range(256)]
    if any(token not in names for token in tokens):
        return None  # as in SmolLM 2, which lacks bytes that no text of its training had
    return np.array([names[token] for token in tokens], np.int32)
