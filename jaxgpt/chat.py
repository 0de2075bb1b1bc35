"""`jaxgpt chat RUN`: a conversation with a model, in a terminal or through a pipe.

A line is a message of the user, and the answer appears as it is generated. A line that begins with
/ is a command: /reset forgets the conversation, /help lists all. Ctrl-C stops an answer, Ctrl-D
leaves.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from jaxgpt.console import load_model, print_note
from jaxgpt.data.conversations import drop_turns, with_answer_end
from jaxgpt.data.work import atomic_write
from jaxgpt.interactive import apply_command, format_settings_help, run_lines, with_sample
from jaxgpt.language_model import LanguageModel
from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError

COMMANDS = {
    "reset": "forget the conversation; the system prompt stays",
    "system TEXT": "show or set the system prompt, and forget the conversation",
    "save FILE": "write the conversation as a line of JSON, as train.objective=chat reads it",
    "settings": "show the settings",
    "help": "list the commands",
    "exit": "leave (also /quit and Ctrl-D)",
}

CUT_BY = {"tokens": "tokens (/tokens 500 allows more)", "context": "model.context"}


def run_cli(
    run_folder: str,
    checkpoint: str,
    settings: Sequence[str],
    system: str = "",
    template: str = "",
    **quantization,
):
    """Load a model and answer messages until the input ends.

    Args:
        run_folder, checkpoint, settings, quantization: as of `console.sample_cli`.
        system: the system prompt, "" for none.
        template: in place of the model's own: the name of a built-in one, or Jinja source.

    Raises:
        ConfigError: the model cannot be loaded, generates no text, or has no chat template.
    """
    chat = Chat(load_model(run_folder, checkpoint, settings, **quantization), system, template)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # line editing and a history
            import readline  # noqa: F401
    print_note(f"[{run_folder}, step {chat.model.step}; /help lists commands, Ctrl-D leaves]")
    run_lines(lambda: input("> " if is_terminal else ""), chat.apply_line)


class Chat:
    """A conversation with a model.

    Args:
        model: any that generates text.
        system, template: as of `run_cli`.

    Attributes:
        messages: what the model reads, of which whole turns have left if it did not fit.
        transcript: the whole conversation.

    Raises:
        ConfigError: the model generates no text, or has no chat template.
    """

    def __init__(self, model: LanguageModel, system: str = "", template: str = ""):
        if "generate" not in model.abilities:
            raise ConfigError(
                f"a model of train.objective={model.config.train.objective!r} writes no answers."
            )
        tokenizer = model.tokenizer
        if template:
            tokenizer = tokenizer.with_chat_template(template)
        with contextlib.suppress(ConfigError):  # an answer may then end at sample.tokens
            tokenizer = with_answer_end(tokenizer)
        self.model = dataclasses.replace(model, tokenizer=tokenizer)
        self.system, self._saved = system, ""
        self.reset()
        self.encode([*self.messages, {"role": "user", "content": "a"}])

    def reset(self):
        """Forget the conversation."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        self.messages: list[dict[str, Any]] = list(first)
        self.transcript: list[dict[str, Any]] = list(first)

    def apply_line(self, line: str):
        """Answer a message, or carry out a command. A message that begins with / has it twice.

        Raises:
            ConfigError: an unknown command, an invalid setting, or a message that is too long.
        """
        if line.startswith("/") and not line.startswith("//"):
            self.apply_command(line[1:])
        elif line.strip():
            self.answer(line.removeprefix("/") if line.startswith("//") else line)

    def apply_command(self, command: str):
        """Carry out a command without its slash."""
        name, _, text = command.strip().partition(" ")
        actions = {"reset": self._tell_reset, "system": self._set_system, "save": self._save}
        if name in actions:
            actions[name](text.strip())
        elif name == "help":
            print_note(
                format_settings_help("A line is a message; Ctrl-C stops an answer.", COMMANDS)
            )
        else:
            known = dict.fromkeys(key.partition(" ")[0] for key in COMMANDS)
            self.set_sample(apply_command(self.model.config.sample, command, known))

    def set_sample(self, sample):
        """Change the sampling rules."""
        self.model = with_sample(self.model, sample)

    def answer(self, text: str) -> str:
        """Print and return the answer to a message; both become part of the conversation.

        An answer that Ctrl-C stops is kept as far as it came.

        Raises:
            ConfigError: the message alone does not fit the context; it is not kept.
        """
        message = {"role": "user", "content": text}
        kept, prompt = self.fit([*self.messages, message])
        parts: list[str] = []
        is_whole = False
        try:
            self._print_answer(prompt, parts)
            is_whole = True
        finally:
            reply = "".join(parts)
            if reply or is_whole:
                exchange = [message, {"role": "assistant", "content": reply}]
                self.messages = [*kept[:-1], *exchange]
                self.transcript += exchange
        sample = self.model.config.sample
        self.set_sample(dataclasses.replace(sample, seed=sample.seed + 1))
        return reply

    def _print_answer(self, prompt: Any, parts: list[str]):
        """Print an answer as it is generated, and append its pieces to `parts`."""
        ending = ""
        for pieces in self.model.stream([prompt]):
            parts.append(pieces[0].text)
            ending = pieces[0].ending
            print_text(parts[-1], end="")
        print_text("")
        if ending in CUT_BY:
            print_note(f"[the answer was cut at {CUT_BY[ending]}]")

    def fit(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """Return the messages that fit the context with room for an answer, and their ids.

        Whole turns leave from the front, and a line is printed about it.

        Raises:
            ConfigError: the last message alone does not fit.
        """
        context = self.model.config.model.context
        room = min(self.model.config.sample.tokens, max(context // 4, 1))
        kept = messages
        for kept in drop_turns(messages):
            ids = self.encode(kept)
            if ids.size + room <= context:
                break
        if ids.size >= context:
            raise ConfigError(
                f"the message has {ids.size} tokens with the system prompt, and model.context="
                f"{context} must hold it and an answer: shorten it."
            )
        if dropped := len(messages) - len(kept):
            print_note(
                f"[the context of {context} tokens is full: the first {dropped} messages are "
                "forgotten]"
            )
        return kept, ids

    def encode(self, messages: list[dict[str, Any]]):
        """Return the ids of a conversation that the assistant is to continue."""
        return self.model.tokenizer.encode_chat(messages, add_generation_prompt=True)

    def _tell_reset(self, _: str):
        self.reset()
        print_note("[the conversation is forgotten]")

    def _set_system(self, text: str):
        if text:
            before = self.system
            self.system = text
            try:
                self.reset()
                self.encode([*self.messages, {"role": "user", "content": "a"}])
            except ConfigError:
                self.system = before
                self.reset()
                raise
        print_note(f"[system prompt: {self.system or 'none'}]")

    def _save(self, path: str):
        if not path:
            raise ConfigError("/save needs the name of a file: /save chat.jsonl")
        path = os.path.expanduser(path)
        if os.path.exists(path) and os.path.abspath(path) != self._saved:
            raise ConfigError(f"{path} exists: save under another name.")
        try:
            with atomic_write(path) as file:
                record = json.dumps({"messages": self.transcript}, ensure_ascii=False)
                file.write(f"{record}\n".encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
        self._saved = os.path.abspath(path)
        print_note(f"[{len(self.transcript)} messages in {path}]")
