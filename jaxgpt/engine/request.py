"""A request: one prompt, its rules and what has become of it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxgpt.engine.processors import Rules
from jaxgpt.engine.text import Row

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """A row of text to continue.

    Attributes:
        row: the prompt and the sampling rules; it grows by what is drawn.
        rules: the rules of the row for the compiled programs, see `processors.make_rules`.
        constraint: a `constraints.Constraint`, or None.
        top: how many of the likeliest tokens to return at each place.
        adapter: which of several adapters in the parameters, if there are any.
        error: what it has failed with; then its last piece has the ending "error".
        mask: the tokens that its constraint allows next, packed.
        forced: the only tokens that its constraint allows next.
        number: counts up by arrival.
        reused: tokens of the prompt that the cache had already.
        drafts: how well guesses were accepted, see `speculation.Acceptance`.
    """

    row: Row
    rules: Rules
    constraint: Any = None
    top: int = 0
    adapter: int = 0
    is_cancelled: bool = False
    error: Exception | None = None
    mask: np.ndarray | None = None
    forced: Sequence[int] = ()
    number: int = field(default_factory=lambda: next(_numbers))
    drafts: Any = None
    reused: int = 0

    def follow_constraint(self, tokens: Sequence[int]):
        """Append tokens to the constraint, if there is one, and find out what may come next.

        Raises:
            ConfigError: nothing may.
        """
        if self.constraint is None:
            return
        for token in tokens:
            self.constraint.push(token)
        self.forced = self.constraint.list_forced()
        self.mask = self.constraint.compute_mask()
