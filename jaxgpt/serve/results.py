"""The JSON of answers, whole and in chunks; pure functions of what the engine has generated."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jaxgpt
from jaxgpt.engine import Generation
from jaxgpt.serve.jobs import Job, Plan
from jaxgpt.tokenizer import Tokenizer

FINISH_REASONS = {"eos": "stop", "stop": "stop", "tokens": "length", "context": "length"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Place(NamedTuple):
    """A token, its place in the text, and the likeliest ones there."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    alternatives: Sequence[tuple[int, float]]
    start: int  # characters of the text before it, and with the one that it is a part of
    end: int


@dataclass
class Answer:
    """One text of an answer, as far as it is generated.

    Attributes:
        tokenizer: of the tokens.
        job: what was asked for; None for a text of no tokens.
        places: the tokens whose text is final.
        waiting: those whose text may still turn out to be a stop string.
    """

    tokenizer: Tokenizer
    job: Job | None = None
    text: str = ""
    ending: str = ""
    places: list[Place] = field(default_factory=list)
    waiting: list[Place] = field(default_factory=list)
    _decoded: int = 0
    _tokens: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens were generated, without the one that ends the text."""
        return self._tokens

    def push(self, piece: Generation) -> list[Place]:
        """Append a piece, and return the tokens whose text is now final."""
        self.text += piece.text
        self.ending = piece.ending
        self._tokens += len(piece.tokens)
        if self.job is None or self.job.decoder is None:
            return []
        tops = piece.alternatives or ((),) * len(piece.tokens)
        for token, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True):
            start, self._decoded = self._decoded, self._decoded + self._count(token)
            is_part = start == self._decoded and bool(self.tokenizer.lengths[token])
            self.waiting.append(Place(token, logprob, top, start, self._decoded + is_part))
        new = self._take_final()
        self.places += new
        return new

    def _count(self, token: int) -> int:
        """Return how many characters a token completes."""
        assert self.job is not None
        assert self.job.decoder is not None
        mask, decoder = self.job.row.masks.get(token), self.job.decoder
        return len(decoder.push([token]) if mask is None else decoder.flush() + mask)

    def _take_final(self) -> list[Place]:
        """Take the tokens whose text is final; those of a stop string are dropped."""
        size = len(self.text)
        if self.ending == "stop":
            new = [place for place in self.waiting if place.start < size]
        elif self.ending:
            new = self.waiting
        else:
            new = [place for place in self.waiting if place.end <= size]
        self.waiting = [] if self.ending else self.waiting[len(new) :]
        return new


def name_token(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """Return a token as text and as bytes; a special token by its name."""
    found = tokenizer.join_bytes([token]) if token < tokenizer.vocab_size else b""
    if not found:
        names = {index: name for name, index in tokenizer.special_ids.items()}
        found = names.get(token, f"<{token}>").encode("utf-8", "replace")
    return found.decode("utf-8", "replace"), found


# --- chat --------------------------------------------------------------------------------------


def make_chat_logprobs(tokenizer: Tokenizer, places: Sequence[Place]) -> dict[str, Any]:
    """Return the log-probabilities of tokens in the shape of chat completions."""

    def row(token: int, logprob: float | None) -> dict[str, Any]:
        text, data = name_token(tokenizer, token)
        return {"token": text, "logprob": _bound(logprob), "bytes": list(data)}

    content = [
        row(place.token, place.logprob) | {"top_logprobs": [row(*x) for x in place.alternatives]}
        for place in places
    ]
    return {"content": content, "refusal": None}


def make_chat_choice(index: int, text: str, logprobs: Any, ending: str) -> dict[str, Any]:
    """Return a whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return _make_choice(index, {"message": message}, logprobs, ending)


def make_chat_delta(index: int, text: str, logprobs: Any) -> dict[str, Any]:
    """Return the next part of an answer."""
    return _make_choice(index, {"delta": {"content": text}}, logprobs)


def make_chat_start(index: int) -> dict[str, Any]:
    """Return the first part of an answer: its role."""
    return _make_choice(index, {"delta": {"role": "assistant", "content": ""}}, None)


def make_chat_end(index: int, ending: str) -> dict[str, Any]:
    """Return the last part of an answer: why it ends."""
    return _make_choice(index, {"delta": {}}, None, ending)


# --- completions -------------------------------------------------------------------------------


def make_completion_logprobs(tokenizer: Tokenizer, places: Sequence[Place]) -> dict[str, Any]:
    """Return the log-probabilities of tokens in the shape of completions."""

    def name(token: int) -> str:
        text, data = name_token(tokenizer, token)
        is_whole = text.encode("utf-8", "replace") == data
        return text if is_whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def list_top(place: Place) -> dict[str, float] | None:
        if place.logprob is None:
            return None
        rows = [(place.token, place.logprob), *reversed(place.alternatives)]  # its own in any case
        found = {name(token): max(value, LEAST_LOGPROB) for token, value in rows}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    return {
        "tokens": [name(place.token) for place in places],
        "token_logprobs": [_bound(place.logprob) for place in places],
        "top_logprobs": [list_top(place) for place in places],
        "text_offset": [place.start for place in places],
    }


def make_completion_choice(index: int, text: str, logprobs: Any, ending: str) -> dict[str, Any]:
    """Return a whole text."""
    return _make_choice(index, {"text": text}, logprobs, ending)


def make_completion_delta(index: int, text: str, logprobs: Any) -> dict[str, Any]:
    """Return the next part of a text."""
    return _make_choice(index, {"text": text}, logprobs)


def make_completion_end(index: int, ending: str) -> dict[str, Any]:
    """Return the last part of a text: why it ends."""
    return _make_choice(index, {"text": ""}, None, ending)


class Flavor(NamedTuple):
    """How one of the two routes writes its answers."""

    prefix: str  # of ids
    kind: str
    chunk: str
    make_logprobs: Any
    make_choice: Any
    make_delta: Any
    make_start: Any  # None if there is no such chunk
    make_end: Any


CHAT = Flavor(
    "chatcmpl-", "chat.completion", "chat.completion.chunk", make_chat_logprobs, make_chat_choice,
    make_chat_delta, make_chat_start, make_chat_end,
)  # fmt: skip
COMPLETION = Flavor(
    "cmpl-", "text_completion", "text_completion", make_completion_logprobs,
    make_completion_choice, make_completion_delta, None, make_completion_end,
)  # fmt: skip


def make_head(flavor: Flavor, plan: Plan) -> dict[str, Any]:
    """Return what an answer and each of its chunks begin with, but for their kind."""
    return {
        "id": flavor.prefix + secrets.token_hex(12),
        "object": flavor.kind,
        "created": int(time.time()),
        "model": plan.model,
        "system_fingerprint": f"jaxgpt-{jaxgpt.__version__}",
    }


def make_usage(plan: Plan, answers: Sequence[Answer], cached: int) -> dict[str, Any]:
    """Return the numbers of tokens; `cached` of the prompts' were read before."""
    prompt = sum(map(len, plan.prompts))
    generated = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }


def make_embeddings(vectors: Sequence[Any], model: str, tokens: int) -> dict[str, Any]:
    """Return the answer of /v1/embeddings.

    Args:
        vectors: lists of numbers, or texts in base64.
    """
    rows = [{"object": "embedding", "index": n, "embedding": x} for n, x in enumerate(vectors)]
    usage: Mapping[str, int] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": rows, "model": model, "usage": usage}


def _make_choice(index: int, content: dict, logprobs: Any, ending: str = "") -> dict[str, Any]:
    finish = FINISH_REASONS[ending] if ending else None
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def _bound(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
