"""A model of jaxgpt in lm-evaluation-harness: every task of it, with the numbers of its hf backend.

    python -m jaxgpt.evaluate.harness --model jaxgpt --model_args run=runs/stdlib --tasks arc_easy

takes the arguments of `lm_eval`. Version 0.4.13 has a registry of models and no entry points, so
that a model is registered by the process that uses it: this command, or in Python

    import jaxgpt.evaluate.harness
    lm_eval.simple_evaluate(model="jaxgpt", model_args="run=runs/stdlib", tasks=["arc_easy"])

Arguments of the model: run (a run, a saved model or that of another library), checkpoint (best or
latest), dtype (float32, bfloat16), max_length, max_gen_toks, batch_tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxgpt.config import SampleConfig
from jaxgpt.evaluate.likelihood import Pair, score_pairs
from jaxgpt.evaluate.texts import roll_windows
from jaxgpt.loading import load
from jaxgpt.optional import is_installed, require
from jaxgpt.score import BATCH_TOKENS
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.chat import render

if is_installed("lm_eval"):
    import lm_eval.models  # registers the others, which the harness does only once
    from lm_eval.api.model import TemplateLM
else:  # the module can be imported; its model and its command name what is missing
    TemplateLM = object  # type: ignore[misc,assignment]

# How the names of generation settings there are those of `sample` here.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}


class JaxgptLM(TemplateLM):
    """A decoder of jaxgpt, as lm-evaluation-harness sees a model.

    Args:
        run: whatever `jaxgpt.load` takes.
        checkpoint, dtype: as of `jaxgpt.load`.
        max_length: of a context, tokens; None: that of the model.
        max_gen_toks: tokens to generate where a task does not say.
        batch_size: rows that are generated at once; "auto" is 16. Likelihoods have batches of
            `batch_tokens` tokens, whose rows depend on their length.

    Raises:
        ConfigError: there is no such model, or it does not generate text.
    """

    def __init__(
        self,
        run: str,
        checkpoint: str = "best",
        dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        batch_tokens: int = BATCH_TOKENS,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        require("lm_eval", "jaxgpt.evaluate.harness")
        super().__init__()
        self.model = load(str(run), checkpoint=checkpoint, dtype=dtype)
        family = self.model.config.model.family
        if family != "decoder" or "score" not in self.model.abilities:
            raise ConfigError(f"run={run} is no decoder that generates text, but a {family}.")
        self.max_length = min(max_length or 1 << 30, self.model.config.model.context)
        self.max_gen_toks, self.batch_tokens = max_gen_toks, batch_tokens
        text = str(batch_size)
        self.rows = int(text) if text.isdecimal() and int(text) > 1 else 16
        self.batch_size = self.rows

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return self.model.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness caches requests: the fingerprint of the tokenizer."""
        return self.model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text, after bos if the tokenizer adds it.

        Special tokens that the text spells are those tokens, as in transformers: a chat template
        writes them.
        """
        tokenizer = self.model.tokenizer
        ids = [] if add_special_tokens is False else list(tokenizer.prefix)
        pattern, end = tokenizer.special_pattern, 0
        for found in pattern.finditer(string) if pattern else ():
            token = tokenizer.special_ids[found[0].strip()]
            place = "section" if end else "start"
            ids += [*tokenizer.encode(string[end : found.start()], place).tolist(), token]
            end = found.end()
        if ids[:1] == [tokenizer.bos] == ids[1:2] and tokenizer.prefix:
            ids = ids[1:]  # the text begins with bos itself
        return [*ids, *tokenizer.encode(string[end:], "section" if end else "start").tolist()]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is_greedy) of each (texts, context, continuation)."""
        pairs = [Pair(tuple(before), tuple(after)) for _, before, after in requests]
        found = [(x.total, x.is_greedy) for x in self._score(pairs)]
        for (texts, *_), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _score(self, pairs: Sequence[Pair]):
        cfg = dataclasses.replace(self.model.config.model, context=self.max_length)
        self.model.check_finite()
        return score_pairs(cfg, self.model.params, pairs, self.batch_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False):
        """Return the log-likelihood of each text, read in windows of the context."""
        texts = [request.args[0] for request in requests]
        windows = [
            roll_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)
            for text in texts
        ]
        found = iter(self._score([pair for part in windows for pair in part]))
        totals = [sum(next(found).total for _ in part) for part in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that continues each prompt, up to one of its stops."""
        prepared = [self._read_request(*request.args) for request in requests]
        order = sorted(range(len(prepared)), key=lambda i: -len(prepared[i][0]))
        texts = [""] * len(prepared)
        for first in range(0, len(order), self.rows):
            numbers = order[first : first + self.rows]
            rows, samples = zip(*(prepared[i] for i in numbers), strict=True)
            for i, found in zip(numbers, self.model.generate(rows, samples), strict=True):
                texts[i] = found.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _read_request(self, prompt: str, given: dict[str, Any]) -> tuple[list[int], SampleConfig]:
        """Return the tokens of a prompt, cut from the left, and its sampling rules."""
        from lm_eval.models.utils import normalize_gen_kwargs

        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        tokens = int(kwargs["max_gen_toks"])
        room = self.max_length - tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={tokens} leaves no room for a prompt: the context has "
                f"{self.max_length} tokens. Give fewer, as --gen_kwargs max_gen_toks=32."
            )
        rules = {mine: kwargs[name] for name, mine in SAMPLING.items() if name in kwargs}
        if not kwargs.get("do_sample"):
            rules["temperature"] = 0.0
        until = kwargs.get("until") or []
        stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
        sample = dataclasses.replace(SampleConfig(top_p=1.0), tokens=tokens, stop=stop, **rules)
        ids = self.tok_encode(prompt) or [self.prefix_token_id]
        return ids[-room:], sample

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, by the model's chat template."""
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            raise ConfigError("the model has no chat template: leave out --apply_chat_template.")
        names = {key: value for key, value in tokenizer.list_template_tokens().items() if value}
        return render(
            tokenizer.chat_template,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            **names,
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template by which the harness caches requests."""
        return self.model.tokenizer.chat_template


def main():
    """Run the command line of lm-evaluation-harness, with the model jaxgpt among its models."""
    require("lm_eval", "python -m jaxgpt.evaluate.harness")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":  # the class of the imported module is the one that is registered
    from jaxgpt.evaluate import harness

    harness.main()
elif is_installed("lm_eval"):
    lm_eval.api.registry.register_model("jaxgpt")(JaxgptLM)
