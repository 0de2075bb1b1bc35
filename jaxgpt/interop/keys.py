"""The keys of a config.json: each is read, is known to change nothing, or is refused."""

from collections.abc import Mapping
from typing import Any

from jaxgpt.settings import ConfigError, choose

MAX_SIZE = 2**31 - 1  # of any dimension: a larger one is a mistake

# Keys that change nothing that is computed here: notes, initial values, and defaults of generation
# (generation_config.json has those that count).
# fmt: off
IGNORED = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_name_or_path", "architectures", "attn_implementation", "begin_suppress_tokens",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "classifier_dropout",
    "cls_token_id", "decoder_start_token_id", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "init_device", "init_std",
    "initializer_factor", "initializer_range", "is_encoder_decoder",
    "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "max_new_tokens",
    "min_length", "model_max_length", "model_type", "name_or_path", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "output_router_logits", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "transformers.js_config", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
})
# fmt: on
_REQUIRED: Any = object()

# Activations by their names in transformers, the one that is written first.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}


def name_activation(activation: str, tanh: str = "gelu_pytorch_tanh") -> str:
    """Return the name of an activation in transformers; `tanh` is that of GELU with a tanh."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return tanh if activation == "gelu_tanh" else names[activation]


class Keys:
    """The keys of a config.json, which records those that were read.

    Args:
        values: the config.
        where: its path, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.left = {k for k, v in values.items() if v and k not in IGNORED}

    def take(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Return the value of the first of several names of a key that is set, or the default."""
        self.left -= {*names}
        found = [self.values[name] for name in names if self.values.get(name) is not None]
        if found:
            return found[0]
        if default is _REQUIRED:
            raise ConfigError(f"{self.where}: the key {names[0]!r} is missing.")
        return default

    def fail(self, name: str, expected: str) -> ConfigError:
        """Return the error of a key whose value is not what it must be."""
        return ConfigError(f"{self.where}: {name}={self.values.get(name)!r} must be {expected}.")

    def size(self, *names: str, default: Any = _REQUIRED) -> int:
        """Return a whole number of at least 1."""
        value = self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
            raise self.fail(self._name(names), f"a whole number from 1 to {MAX_SIZE:,}")
        return value

    def number(self, *names: str, default: Any = _REQUIRED) -> float:
        """Return a number above 0."""
        value = self.take(*names, default=default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise self.fail(self._name(names), "a number above 0")
        return float(value)

    def maybe_number(self, *names: str, default: Any = None) -> float | None:
        """Return a number above 0, or None for a key that is null."""
        names_set = [name for name in names if name in self.values]
        if names_set and self.values[names_set[0]] is None:
            self.left -= {*names}
            return None
        return None if self.take(*names, default=default) is None else self.number(
            *names, default=default
        )  # fmt: skip

    def flag(self, *names: str, default: Any = _REQUIRED) -> bool:
        """Return true or false."""
        value = self.take(*names, default=default)
        if not isinstance(value, bool):
            raise self.fail(self._name(names), "true or false")
        return value

    def activation(self, *names: str, default: Any = _REQUIRED) -> str:
        """Return the name of an activation in jaxgpt."""
        value = self.take(*names, default=default)
        return choose(ACTIVATIONS, str(value), f"{self.where}: {self._name(names)}")

    def group(self, *names: str) -> dict[str, Any]:
        """Return an object, {} if it is not set."""
        value = self.take(*names, default={})
        if not isinstance(value, dict):
            raise self.fail(self._name(names), "an object")
        return value

    def expect(self, name: str, *allowed: Any):
        """Refuse a key with another value than these, of which the first is the default.

        Raises:
            ConfigError: it has one; the message names the key and the values that work.
        """
        value = self.take(name, default=allowed[0])
        if value not in allowed:
            words = " or ".join(repr(x) for x in allowed)
            raise ConfigError(f"{self.where}: {name}={value!r} is not supported; {words} is.")

    def ignore(self, *names: str):
        """Accept keys that change nothing that is computed here, such as rates of dropout."""
        self.left -= {*names}

    def check_all_read(self):
        """Refuse the keys that nothing has read: what they change would be lost without a word."""
        if self.left:
            name = min(self.left)
            kind = self.values.get("model_type")
            raise ConfigError(
                f"{self.where}: the key {name!r} (={self.values[name]!r}) is not known for "
                f"model_type={kind!r}, so that the model might be computed wrongly. If it changes "
                "nothing, remove it from the file."
            )

    def _name(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if self.values.get(name) is not None), names[0])
