"""The engine: many requests decode at once, each as if it were alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.config import ModelConfig, SampleConfig
from jaxgpt.engine.processors import check_scores, count_occurrences, make_rules, pack_mask
from jaxgpt.engine.programs import (
    CHUNK_TOKENS,
    DecodeState,
    Drawn,
    copy_row,
    decode,
    init_state,
    insert,
    prefill,
    verify,
)
from jaxgpt.engine.request import Request
from jaxgpt.engine.scheduler import Chunk, Scheduler, Slot, list_sizes, round_up
from jaxgpt.engine.size import Size, explain_no_reuse
from jaxgpt.engine.speculation import Acceptance, DraftModel, find_draft
from jaxgpt.engine.text import Generation
from jaxgpt.hosts import fetch
from jaxgpt.model.layers import check_indices
from jaxgpt.optional import is_installed
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of

INTERACTIVE_TOKENS = 4  # that are decoded per call where somebody waits for each piece
FORCED_TOKENS = 8  # that are read in one pass
MAX_TOP = 20  # likeliest tokens at a place, at most


class Call(NamedTuple):
    """A call whose results were not fetched yet, and the requests of its slots."""

    drawn: Drawn
    requests: list[tuple[Slot, Request]]
    drafted: np.ndarray | None = None


class Engine:
    """Rows of a model's cache, and the requests that decode in them.

    `submit` a request and call `step` until `is_idle`: each step reads chunks of prompts and
    decodes a few tokens. It is used by one thread; `worker.EngineWorker` has one of its own.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        size: Size,
        ends: Sequence[int],
        allowed: np.ndarray,
        *,
        draft: DraftModel | None = None,
        is_interactive: bool = False,
        has_reuse: bool = False,
    ):
        """Allocate the state.

        Args:
            cfg, params: the model, with the parameters of `prepare_decode_params`.
            size: the fixed shapes.
            ends: the tokens that end a text.
            allowed: bool [V], the tokens that may be drawn.
            draft: a model that guesses the next tokens; None looks them up in the row's own text.
            is_interactive: whether one chunk at most is read between two calls that decode, and a
                new row's first token comes alone. Otherwise all prompts are read first.
            has_reuse: whether the cache of a prompt serves later prompts that begin alike.

        Raises:
            ConfigError: the model cannot do this.
        """
        size.check(cfg)
        if draft is not None:
            draft.check(cfg)
        self.cfg, self.params, self.size, self.draft = cfg, params, size, draft
        self.ends = tuple(ends)
        self.is_end = np.isin(np.arange(cfg.vocab), self.ends)
        self.no_mask = pack_mask(np.asarray(allowed))
        self.is_interactive = is_interactive
        configs = [cfg] if draft is None else [cfg, draft.cfg]
        can_reuse = all(explain_no_reuse(each, size) is None for each in configs)
        self.scheduler = Scheduler(size.rows, size.chunk, has_reuse and can_reuse)
        self.in_flight: Call | None = None
        self.reset()

    def reset(self):
        """Allocate an empty state: the old one is lost if a call has failed."""
        size, cfg = self.size, self.cfg
        whole = round_up(size.slots) if "prefix" in cfg.pattern else 0
        chunk = max(size.chunk, size.speculate + 1, whole)
        self.in_flight = None
        self.scheduler.forget()
        with use_mesh_of(self.params):
            self.state: DecodeState = init_state(
                cfg, size.rows, size.slots, chunk, size.source, size.cache
            )
            if self.draft is not None:
                self.draft.reset(size.rows, size.slots, chunk)

    # --- requests ---

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or decodes."""
        return self.scheduler.is_idle and self.in_flight is None

    def submit(self, request: Request):
        """Add a request to those that wait.

        Raises:
            ConfigError: it does not fit.
        """
        row, size = request.row, self.size
        check_indices(np.asarray(row.ids), self.cfg.vocab, "token id")
        if len(row.source) > size.source:
            raise ConfigError(
                f"the source has {len(row.source)} tokens; the engine has room for {size.source}."
            )
        if request.top > MAX_TOP:
            raise ConfigError(f"top={request.top}: at most {MAX_TOP} tokens are returned.")
        if row.sample.beams > 1:
            raise ConfigError(
                f"sample.beams={row.sample.beams}: beam search needs all rows; use `generate`."
            )
        if len(row.ids) >= min(self.cfg.context, size.slots) and not row.sample.slide:
            raise ConfigError(
                f"the prompt has {len(row.ids)} tokens; the engine has rows of {size.slots}, and "
                f"model.context={self.cfg.context}: shorten it."
            )
        request.drafts = Acceptance()
        self._move_window(request)
        self.scheduler.waiting.append(request)

    def cancel(self, request: Request):
        """End a request: its slot is free after the next step."""
        request.is_cancelled = True
        if request in self.scheduler.waiting:
            self.scheduler.waiting.remove(request)

    def list_requests(self) -> list[Request]:
        """Return all requests that wait or decode."""
        held = [slot.request for slot in self.scheduler.slots if slot.request is not None]
        return [*self.scheduler.waiting, *held]

    def drop_all(self):
        """Drop all requests, and allocate an empty state."""
        self.scheduler.waiting.clear()
        for slot in self.scheduler.slots:
            self.scheduler.free(slot)
        self.reset()

    @property
    def window(self) -> int:
        """Tokens that a row may have."""
        return min(self.cfg.context, self.size.slots)

    def _move_window(self, request: Request):
        """Drop the first half of a window that is full."""
        row = request.row
        if len(row.ids) >= self.window:
            row.ids = row.ids[-max(1, self.window // 2) :]

    def warm_up(self):
        """Compile every program that a request may need, and leave the state empty."""
        cfg, number = self.cfg, np.int32(0)
        whole = round_up(self.size.slots) if "prefix" in cfg.pattern else 0
        last = max(self.size.chunk, whole)
        key = jax.random.key(0)
        with use_mesh_of(self.params):
            for size in list_sizes(last):
                args = (number, np.zeros((1, size), np.int32), *map(np.int32, (1, 0, 1)))
                padded = np.zeros((1, self.size.source), np.int32)
                for source in [None] + [(padded, np.int32(1))] * bool(self.size.source):
                    self.state = prefill(cfg, self.params, self.state, *args, source, number)
                if self.draft is not None:
                    self.draft.prefill(*args)
            rules = make_rules(SampleConfig(), cfg.vocab, key)
            history = count_occurrences([0], [], cfg.vocab)
            ones = np.int32(1), np.int32(1)
            self.state = insert(cfg, self.state, number, history, *ones, rules)
            self.state = copy_row(cfg, self.state, number, number)
            keep = np.zeros(self.size.rows, bool)
            shared = (keep, np.tile(self.no_mask, (self.size.rows, 1)), self.is_end)
            T = self.size.speculate + 1 if self.size.speculate else FORCED_TOKENS
            draft = (
                np.zeros((self.size.rows, T), np.int32),
                *np.zeros((2, self.size.rows), np.int32),
            )
            for top in (0, MAX_TOP):
                self.state, _ = decode(cfg, self.params, self.state, *shared, np.int32(1), top=top)
                if self.size.speculate or is_installed("llguidance"):
                    self.state, _ = verify(cfg, self.params, self.state, *shared, *draft, top=top)
                if self.draft is not None and self.size.speculate:
                    self.draft.copy_row(number, number)
                    self.state, _ = self.draft.speculate(
                        cfg, self.params, self.state, *shared, keep, self.size.speculate, top
                    )
        self.reset()

    # --- one step ---

    def step(self) -> list[tuple[Request, Generation]]:
        """Read prompts and decode; return the new pieces of requests.

        A piece whose `ending` is not empty is the last one.

        Raises:
            Exception: a program has failed. The state is lost: call `drop_all`.
        """
        with use_mesh_of(self.params):  # never while the caller has control
            self._release_cancelled()
            self._admit()
            started, failed = self._read_prompts()
            return failed + self._decode(started)

    def _release_cancelled(self):
        for slot in self.scheduler.slots:
            if slot.request is not None and slot.request.is_cancelled:
                self.scheduler.free(slot)

    def _admit(self):
        for source, slot in self.scheduler.admit():
            numbers = np.int32(source.number), np.int32(slot.number)
            self.state = copy_row(self.cfg, self.state, *numbers)
            if self.draft is not None:
                self.draft.copy_row(*numbers)

    def _read_prompts(self) -> tuple[bool, list[tuple[Request, Generation]]]:
        """Read one chunk, or all that there are.

        Returns:
            Whether a row has begun to decode, and the last pieces of those that have failed.
        """
        is_whole, has_started, failed = "prefix" in self.cfg.pattern, False, []
        while chunk := self.scheduler.next_chunk(is_whole):
            self._read_chunk(chunk)
            self.scheduler.finish_chunk(chunk)
            request = chunk.slot.request
            if chunk.slot.is_decoding and request is not None:
                try:
                    self._insert(chunk.slot)
                    has_started = True
                except ConfigError as error:
                    failed.append((request, self._fail(chunk.slot, request, error)))
            if self.is_interactive:
                break
        return has_started, failed

    def _read_chunk(self, chunk: Chunk):
        request = chunk.slot.request
        assert request is not None
        row, end = request.row, chunk.start + chunk.tokens
        tokens = np.zeros((1, chunk.size), np.int32)
        tokens[0, : chunk.tokens] = row.ids[chunk.start : end]
        source = None
        if row.source and not chunk.start:
            padded = np.zeros((1, self.size.source), np.int32)
            padded[0, : len(row.source)] = row.source
            source = padded, np.int32(len(row.source))
        sizes = (chunk.tokens, chunk.start, _count_prefix(request))
        args = (np.int32(chunk.slot.number), tokens, *map(np.int32, sizes))
        more = (source, np.int32(request.adapter))
        self.state = prefill(self.cfg, self.params, self.state, *args, *more)
        if self.draft is not None:
            self.draft.prefill(*args)

    def _insert(self, slot: Slot):
        request = slot.request
        assert request is not None
        row, vocab = request.row, self.cfg.vocab
        if not row.drawn:
            request.follow_constraint(())
        self.state = insert(
            self.cfg,
            self.state,
            np.int32(slot.number),
            count_occurrences(row.ids, row.drawn, vocab),
            np.int32(min(row.room, self.window - len(row.ids))),
            np.int32(_count_prefix(request)),
            request.rules,
        )

    # --- decoding ---

    def _decode(self, has_started: bool) -> list[tuple[Request, Generation]]:
        """Decode a few tokens, and return the pieces of this call or of the one before."""
        slots = self.scheduler.decoding
        if not slots:
            return self._collect_in_flight()
        if any(_needs_host(slot.request) for slot in slots) or self.size.speculate:
            pieces = self._collect_in_flight()
            for group in self._group_by_forced(self.scheduler.decoding):  # some may have ended
                pieces += self._collect(self._call(group, has_started))
            return pieces
        call = self._call(slots, has_started)
        pieces = self._collect_in_flight()
        self.in_flight = call
        is_busy = self.scheduler.waiting or any(slot.is_reading for slot in self.scheduler.slots)
        return pieces + (self._collect_in_flight() if is_busy or has_started else [])

    def _group_by_forced(self, slots: list[Slot]) -> list[list[Slot]]:
        """Return the rows with forced text, and the others: forced text is read in a longer pass.

        Products of other sizes are rounded differently, which no other row may notice. An engine
        that guesses does not promise that, and has one pass for all.
        """
        if self.size.speculate:
            return [slots] if slots else []
        forced = [slot for slot in slots if slot.request is not None and slot.request.forced]
        rest = [slot for slot in slots if slot not in forced]
        return [group for group in (forced, rest) if group]

    def _collect_in_flight(self) -> list[tuple[Request, Generation]]:
        call, self.in_flight = self.in_flight, None
        return [] if call is None else self._collect(call)

    def _call(self, slots: list[Slot], has_started: bool) -> Call:
        """Dispatch one call for the rows that decode."""
        requests = [(slot, slot.request) for slot in slots if slot.request is not None]
        keep = np.zeros(self.size.rows, bool)
        mask = np.tile(self.no_mask, (self.size.rows, 1))
        for slot, request in requests:
            keep[slot.number] = True
            if request.mask is not None:
                mask[slot.number] = request.mask
        top = MAX_TOP if any(request.top for _, request in requests) else 0
        shared = (keep, mask, self.is_end)
        draft = self._make_draft(requests)
        if draft is not None:
            self._leave_draft_behind(requests)
            self.state, drawn = verify(self.cfg, self.params, self.state, *shared, *draft, top=top)
            return Call(drawn, requests, draft[1])
        guesses = self._list_guessing(requests)
        if guesses.any():
            assert self.draft is not None
            count = self.size.speculate
            self.state, drawn = self.draft.speculate(
                self.cfg, self.params, self.state, *shared, guesses, count, top
            )
            return Call(drawn, requests, guesses * (count + 1))
        self._leave_draft_behind(requests)
        is_slow = any(request.constraint is not None for _, request in requests)
        is_first = self.is_interactive and has_started
        most = INTERACTIVE_TOKENS if self.is_interactive else CHUNK_TOKENS
        steps = np.int32(1 if is_slow or is_first else most)
        self.state, drawn = decode(self.cfg, self.params, self.state, *shared, steps, top=top)
        return Call(drawn, requests)

    def _list_guessing(self, requests) -> np.ndarray:
        """Return the rows whose tokens the draft model guesses, bool [B]."""
        guesses = np.zeros(self.size.rows, bool)
        for slot, request in requests if self.draft is not None and self.size.speculate else ():
            guesses[slot.number] = request.constraint is None and request.drafts.is_following
        return guesses

    def _leave_draft_behind(self, requests):
        """Note that the draft model does not see the tokens of a call: it cannot guess on."""
        for _, request in requests if self.draft is not None else ():
            request.drafts.is_following = False

    def _make_draft(self, requests) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return the guessed and the forced tokens of all rows; None if there are none."""
        T = self.size.speculate + 1 if self.size.speculate else FORCED_TOKENS
        draft = np.zeros((self.size.rows, T), np.int32)
        drafted, forced = np.zeros((2, self.size.rows), np.int32)
        for slot, request in requests:
            row, n = request.row, slot.number
            if request.constraint is not None:
                tokens = request.forced[: min(T, row.room)]
                forced[n] = len(tokens)
            elif self.size.speculate and self.draft is None and request.drafts.is_worthwhile:
                tokens = find_draft(row.ids, self.size.speculate + 1)
            else:
                tokens = []
            draft[n, : len(tokens)], drafted[n] = tokens, len(tokens)
        return (draft, drafted, forced) if drafted.any() else None

    def _collect(self, call: Call) -> list[tuple[Request, Generation]]:
        """Fetch what a call has drawn, and append it to the rows."""
        tokens, logprobs, count, *tops = fetch(call.drawn)
        pieces = []
        for slot, request in call.requests:
            if slot.request is not request:  # it has ended, or was cancelled
                continue
            n = slot.number
            if call.drafted is not None and request.constraint is None:
                request.drafts.record(int(call.drafted[n]) - 1, int(count[n]))
            new = zip(tokens[n].tolist(), logprobs[n].tolist(), strict=True)
            try:
                piece = self._extend(request, list(new)[: count[n]])
            except ConfigError as error:
                pieces.append((request, self._fail(slot, request, error)))
                continue
            if request.top:
                places = [each[n, : len(piece.tokens), : request.top].tolist() for each in tops]
                piece = dataclasses.replace(piece, alternatives=_zip_places(*places))
            if piece.ending:
                self.scheduler.free(slot)
            elif len(request.row.ids) >= self.window:
                self._move_window(request)
                self.scheduler.read_again(slot)
            pieces.append((request, piece))
        return pieces

    def _fail(self, slot: Slot, request: Request, error: Exception) -> Generation:
        """End a request by an error, which is its own: the others go on."""
        request.error = error
        self.scheduler.free(slot)
        return Generation("", (), (), "error")

    def _extend(self, request: Request, new: list[tuple[int, float]]) -> Generation:
        """Append new tokens to a row until it ends. Return what is now final."""
        row, text, before, values = request.row, "", len(request.row.drawn), []
        for token, logprob in new:
            if row.ending or len(row.ids) >= self.window:
                break
            check_scores(logprob)
            text += row.push(token, self.ends)
            values.append(logprob)
        if len(row.ids) >= self.window and not row.sample.slide and not row.ending:
            text += row.end("context")
        drawn = tuple(row.drawn[before:])
        if not row.ending:
            request.follow_constraint(drawn)
        return Generation(text, drawn, tuple(values[: len(drawn)]), row.ending)


def _needs_host(request: Request | None) -> bool:
    """Whether what a row draws next depends on what the host makes of its last tokens."""
    return request is not None and (request.constraint is not None or bool(request.row.sample.stop))


def _count_prefix(request: Request) -> int:
    """Return the length of the prefix of a prefix language model: what is left of the prompt."""
    return max(len(request.row.ids) - len(request.row.drawn), 0)


def _zip_places(tokens, logprobs) -> tuple:
    """Return (token, log-probability) of the likeliest tokens at every place."""
    places = zip(tokens, logprobs, strict=True)
    return tuple(tuple(zip(*place, strict=True)) for place in places)
