"""The fixed shapes of an engine, and what a model cannot do in them."""

from dataclasses import dataclass

from jaxgpt.config import ModelConfig
from jaxgpt.engine.scheduler import list_sizes, round_up
from jaxgpt.model.cache import find_reach
from jaxgpt.model.mixers import MIXERS
from jaxgpt.settings import ConfigError


@dataclass(frozen=True)
class Size:
    """The fixed shapes of an engine.

    Attributes:
        rows: requests that decode at once.
        slots: tokens of a row, prompt and output; at most the context of the model.
        source: tokens of an encoder-decoder's source.
        chunk: tokens of a prompt that are read at once: 16, 24, 32, 40, 48, 64, 80, 96, 128, ...
        speculate: tokens that are guessed at once; 0 = none.
        cache: how keys and values are stored, a value of `sample.cache`.
    """

    rows: int
    slots: int
    source: int = 0
    chunk: int = 256
    speculate: int = 0
    cache: str = "model"

    def check(self, cfg: ModelConfig):
        """Raise ConfigError if a model cannot decode in this shape."""
        if self.rows < 1 or self.slots < 2:
            raise ConfigError(
                f"an engine of rows={self.rows} and slots={self.slots}: it has one row of two "
                "slots at least."
            )
        if round_up(self.chunk) != self.chunk:
            raise ConfigError(f"chunk={self.chunk}: expected one of {list_sizes(self.chunk + 64)}.")
        recurrent = list_recurrent_mixers(cfg)
        if self.speculate and recurrent:
            raise ConfigError(
                f"speculation does not work with model.mixers={recurrent[0]}: its state cannot go "
                "back to before a guess that was wrong. Leave speculate out."
            )


def explain_no_reuse(cfg: ModelConfig, size: Size) -> str | None:
    """Return why the cache of a prompt cannot serve another prompt, or None if it can."""
    if recurrent := list_recurrent_mixers(cfg):
        return f"model.mixers={recurrent[0]} keeps a summary, not the tokens"
    if cfg.family == "encoder_decoder":
        return "model.family=encoder_decoder keeps the source with the tokens"
    if "prefix" in cfg.pattern:
        return "model.pattern=prefix attends to the whole prompt"
    reaches = [find_reach(cfg, spec) for spec in cfg.list_layers(cfg.layers)]
    if any(reach is not None and reach + size.chunk < size.slots for reach in reaches):
        return "layers with a window keep the last tokens only"
    return None


def list_recurrent_mixers(cfg: ModelConfig) -> list[str]:
    """Return the mixers of a model whose state summarizes its tokens: none can be taken back."""
    mixers = dict.fromkeys(spec.mixer for spec in cfg.list_layers(cfg.layers))
    return [mixer for mixer in mixers if not MIXERS[mixer].HAS_TOKEN_STATE]
