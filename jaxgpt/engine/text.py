"""Rows of text: one prompt each, its continuation so far, and where it ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from jaxgpt.config import SampleConfig
from jaxgpt.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Generation:
    """Generated text, or in a stream the next piece of one."""

    text: str
    tokens: tuple[
        int, ...
    ]  # without the one that ends the text; the text ends before a stop string, the tokens after it
    logprobs: tuple[float, ...]  # of every token in the model's own distribution, in nats
    ending: str  # "eos", "stop", "tokens" (as many as requested) or "context" (full); "" = goes on
    # The likeliest tokens at the place of every token, (token, log-probability), if requested.
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass
class Row:
    """One prompt and its continuation so far."""

    sample: SampleConfig
    source: list[int]  # source tokens of an encoder-decoder
    ids: list[int]  # the tokens in the context window
    decoder: StreamDecoder
    drawn: list[int] = field(default_factory=list)
    held: str = ""  # text that may be the beginning of a stop string
    ending: str = ""  # see `Generation`
    masks: dict[int, str] = field(default_factory=dict)  # sentinel token -> its text

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return self.sample.tokens - len(self.drawn)

    def push(self, token: int, eos: Collection[int]) -> str:
        """Append a token, of which `eos` end the text, and return the text that is now final."""
        if token in eos:
            return self.end("eos")
        self.ids.append(token)
        self.drawn.append(token)
        mask = self.masks.get(token)
        self.held += self.decoder.push([token]) if mask is None else self.decoder.flush() + mask
        stops = self.sample.stop
        found = [self.held.find(stop) for stop in stops if stop in self.held]
        if found:
            self.ending = "stop"
            return self.held[: min(found)]
        if not self.room:
            return self.end("tokens")
        n_held = max((_count_overlap(self.held, stop) for stop in stops), default=0)
        cut = len(self.held) - n_held
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def end(self, reason: str) -> str:
        """End the row and return the rest of its text."""
        self.ending = reason
        return self.held + self.decoder.flush()


def _count_overlap(text: str, stop: str) -> int:
    """Count the characters at the end of `text` that may be the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def join_pieces(pieces: Sequence[Generation]) -> Generation:
    """Join the pieces of one row of a stream."""
    return Generation(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        logprobs=tuple(value for piece in pieces for value in piece.logprobs),
        ending=pieces[-1].ending,
        alternatives=tuple(each for piece in pieces for each in piece.alternatives),
    )
