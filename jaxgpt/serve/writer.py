"""The answer to a request for text: as one JSON object, or in chunks as the text comes."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxgpt.language_model import LanguageModel
from jaxgpt.serve import results
from jaxgpt.serve.choices import Choices
from jaxgpt.serve.echo import score_prompt
from jaxgpt.serve.jobs import Plan
from jaxgpt.serve.results import Answer, Flavor, Place
from jaxgpt.serve.served import Served
from jaxgpt.tokenizer import StreamDecoder


class Writer:
    """Makes the JSON of the answer to one request, whole or in chunks.

    Args:
        served, plan, flavor: what is asked for.
        choices: its texts, as the engine generates them.
        prompt_places: the tokens of every prompt, if the answer has their log-probabilities.
    """

    def __init__(
        self, served: Served, plan: Plan, flavor: Flavor, choices: Choices,
        prompt_places: Sequence[Sequence[Place]],
    ):  # fmt: skip
        self.plan, self.flavor, self.choices = plan, flavor, choices
        self.prompt_places = prompt_places
        self.tokenizer = served.model.tokenizer
        self.answers = [Answer(self.tokenizer, job) for job in plan.jobs]
        if not plan.jobs:  # max_tokens=0
            self.answers = [Answer(self.tokenizer, ending="tokens") for _ in range(plan.count)]

    async def collect(self) -> dict[str, Any]:
        """Return the whole answer."""
        async for found in self.choices.iterate():
            if found is not None:
                self.answers[found[0]].push(found[1])
        choices = []
        for index, answer in enumerate(self.answers):
            echo, places = self._find_echo(index)
            logprobs = self._make_logprobs([*places, *_shift(answer.places, len(echo))])
            choices.append(
                self.flavor.make_choice(index, echo + answer.text, logprobs, answer.ending)
            )
        return {**results.make_head(self.flavor, self.plan), "choices": choices,
                "usage": self._make_usage()}  # fmt: skip

    async def stream(self) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the chunks of the answer; None while there is nothing new for long."""
        head = results.make_head(self.flavor, self.plan) | {"object": self.flavor.chunk}
        usage = {"usage": None} if self.plan.has_usage else {}

        def make_chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return {**head, "choices": [choice], **usage}

        flavor = self.flavor
        for index, answer in enumerate(self.answers):
            if flavor.make_start:
                yield make_chunk(flavor.make_start(index))
            echo, places = self._find_echo(index)
            if echo or places:
                yield make_chunk(flavor.make_delta(index, echo, self._make_logprobs(places)))
            if answer.ending:
                yield make_chunk(flavor.make_end(index, answer.ending))
        async for found in self.choices.iterate():
            if found is None:
                yield None
                continue
            index, piece = found
            new = self.answers[index].push(piece)
            if piece.text or new:
                offset = len(self._find_echo(index)[0])
                logprobs = self._make_logprobs(_shift(new, offset))
                yield make_chunk(flavor.make_delta(index, piece.text, logprobs))
            if piece.ending:
                yield make_chunk(flavor.make_end(index, piece.ending))
        if self.plan.has_usage:
            yield {**head, "choices": [], "usage": self._make_usage()}

    def _find_echo(self, index: int) -> tuple[str, Sequence[Place]]:
        """Return the text and the tokens that an answer repeats."""
        prompt = index * len(self.plan.prompts) // self.plan.count
        text = self.plan.echo[prompt] if self.plan.echo else ""
        return text, self.prompt_places[prompt] if self.prompt_places else ()

    def _make_logprobs(self, places: Sequence[Place]) -> Any:
        if self.plan.logprobs is None:
            return None
        return self.flavor.make_logprobs(self.tokenizer, places)

    def _make_usage(self) -> dict[str, Any]:
        return results.make_usage(self.plan, self.answers, self.choices.reused)


def _shift(places: Sequence[Place], offset: int) -> Sequence[Place]:
    """Return tokens of a text that stands after `offset` characters."""
    if not offset:
        return places
    return [place._replace(start=place.start + offset) for place in places]


def list_places(model: LanguageModel, plan: Plan) -> list[list[Place]]:
    """Return the tokens of every prompt with their log-probabilities."""
    found = []
    for ids, hidden in zip(plan.prompts, plan.hidden, strict=True):
        decoder, end, places = StreamDecoder(model.tokenizer), 0, []
        scored = score_prompt(model, ids, plan.logprobs or 0)
        for token, (logprob, top) in list(zip(ids, scored, strict=True))[hidden:]:
            start, end = end, end + len(decoder.push([token]))
            places.append(Place(token, logprob, top, start, end))
        found.append(places)
    return found
