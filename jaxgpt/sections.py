"""The groups of settings inside `model`: model.rope, model.sparse, model.moe, model.mixer."""

from dataclasses import dataclass
from typing import ClassVar

from jaxgpt.settings import ConfigError, Section, format_nearest_multiples, option


@dataclass(frozen=True)
class RopeConfig(Section):
    """Rotary position embedding, and its scaling to contexts longer than in training."""

    section: ClassVar[str] = "model.rope"

    theta: float | tuple[float, ...] = option(
        10_000.0, "base of the wavelengths; several are cycled by the layers", above=0
    )
    share: float = option(
        1.0, "fraction of the channels of each head that is rotated", above=0, high=1
    )
    scaling: str | tuple[str, ...] = option(
        "none",
        "method of context extension, or several per layer, cycled",
        table="jaxgpt.model.positions:SCALINGS",
    )
    factor: float | tuple[float, ...] = option(
        1.0, "context extension factor, relative to the original context; or per layer", low=1
    )
    original: int | None = option(
        None, "original context before extension, in tokens: none = context / factor", low=1
    )


@dataclass(frozen=True)
class SparseConfig(Section):
    """The sizes of sparse attention patterns, in tokens or blocks."""

    section: ClassVar[str] = "model.sparse"

    window: int = option(
        128, "width of `window` on each side, in tokens, including the query", low=1
    )
    chunk: int = option(
        128, "chunk length of `chunked`, in tokens: attention is within chunks of a document", low=1
    )
    stride: int = option(
        16, "`strided` attends to the last `stride` tokens and to every stride-th one", low=1
    )
    block: int = option(16, "block size of `blocks`, in tokens", low=1)
    near: int = option(3, "local blocks of `blocks`, including the own one (odd)", low=1)
    anchors: int = option(1, "global blocks of `blocks`: the first ones of a document", low=0)
    random: int = option(2, "random blocks that each block of `blocks` attends to", low=0)

    def check(self):
        if self.near % 2 == 0:
            raise ConfigError(
                f"model.sparse.near={self.near} must be odd: the same number of blocks on both "
                f"sides of the own one. Use {self.near - 1} or {self.near + 1}."
            )


@dataclass(frozen=True)
class ExpertsConfig(Section):
    """Mixture of experts, for a feed-forward of type moe_*."""

    section: ClassVar[str] = "model.moe"

    experts: int = option(8, "E, number of experts", low=1)
    active: int = option(2, "experts per token (top-k routing)", low=1)
    capacity: float = option(
        0.0,
        "capacity factor: maximum tokens of an expert over the even share; 0 = unlimited",
        low=0,
    )

    shared: int = option(
        0, "shared experts, which all tokens pass in addition, as one of their total width", low=0
    )
    scoring: str = option(
        "softmax",
        "router scores: softmax, normalized over the chosen experts, or sigmoid",
        table="jaxgpt.model.experts:SCORINGS",
    )
    gated: str = option(
        "outputs",
        "whether gates multiply the outputs or the inputs of experts",
        table="jaxgpt.model.experts:GATED_SIDES",
    )

    def check(self):
        if self.active > self.experts:
            raise ConfigError(
                f"model.moe.active={self.active} is more than model.moe.experts={self.experts}: "
                "a token cannot be routed to more experts than there are."
            )


@dataclass(frozen=True)
class MixerConfig(Section):
    """The sizes of the token mixers other than attention."""

    section: ClassVar[str] = "model.mixer"

    state: int = option(16, "Z, state size per channel of mamba and (complex) s4", low=1)
    expand: int = option(2, "inner width of mamba, relative to the width", low=1)
    conv: int = option(4, "width of the convolution of mamba, in tokens", low=1)
    features: int = option(64, "random features of performer, per head", low=1)
    summary: int = option(32, "projected length of linformer: keys per sequence (or block)", low=1)
    chunk: int = option(
        32,
        "chunk length of performer and linformer, block size of linformer_causal, in tokens",
        low=1,
    )
    hashes: int = option(4, "hash rounds of reformer", low=1)
    buckets: int = option(8, "hash buckets of reformer (even)", low=2)
    bucket_window: int = option(32, "latest tokens of a bucket that reformer attends to", low=1)
    memory: int = option(64, "segment length and memory length of transformer_xl, in tokens", low=1)

    def check(self):
        if self.buckets % 2:
            raise ConfigError(
                f"model.mixer.buckets={self.buckets} must be even: a rotation gives pairs of "
                f"buckets. Use {format_nearest_multiples(self.buckets, 2)}."
            )
