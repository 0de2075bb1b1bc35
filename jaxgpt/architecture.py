"""The settings of a model, and which combinations of them are impossible.

Names choose a function; numbers choose a size. Every variant declares its capabilities (`MIXERS`,
`KERNELS`, `WIRINGS`, ...), so `check` compares the settings with these declarations and mentions as
few variants by name as possible.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from jaxgpt.settings import ConfigError, Section, format_nearest_multiples, option, resolve_table


@dataclass(frozen=True)
class RopeConfig(Section):
    """Rotary position embedding, and its scaling to contexts longer than in training."""

    section: ClassVar[str] = "model.rope"

    theta: float = option(10_000.0, "base of the wavelengths", above=0)
    share: float = option(
        1.0, "fraction of the channels of each head that is rotated", above=0, high=1
    )
    scaling: str = option(
        "none", "method of context extension", table="jaxgpt.model.positions:SCALINGS"
    )
    factor: float = option(1.0, "context extension factor, relative to the original context", low=1)
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


@dataclass(frozen=True)
class ModelConfig(Section):
    """The architecture of a Transformer."""

    section: ClassVar[str] = "model"

    family: str = option(
        "decoder", "encoder, decoder or both", table="jaxgpt.model.transformer:FAMILIES"
    )
    vocab: int = option(8192, "V, rows of the embedding table", low=1)
    context: int = option(256, "C, context length in tokens", low=1)
    width: int = option(384, "D, width of the residual stream", low=1)
    layers: int = option(6, "L, number of blocks", low=1)
    encoder_layers: int | None = option(
        None, "blocks of the encoder of an encoder_decoder: none = layers", low=1
    )
    heads: int = option(6, "H, query heads", low=1)
    kv_heads: int | None = option(
        None, "G, key and value heads: none = heads (MHA), 1 = MQA, between = GQA", low=1
    )
    head_width: int | None = option(None, "K, width of a head: none = width / heads", low=1)
    ffn: int = option(1024, "F, width of the feed-forward layer", low=1)
    mixers: tuple[str, ...] = option(
        ("attention",),
        "token mixer per layer, cycled",
        table="jaxgpt.model.mixers:MIXERS",
    )
    pattern: tuple[str, ...] = option(
        ("full",),
        "attention pattern per layer, cycled",
        table="jaxgpt.model.masks:PATTERNS",
    )
    documents: str = option(
        "separate",
        "attention within each document (separate) or over the whole row, as GPT-2 was trained "
        "(joined); joined needs no attention mask on a GPU",
        table="jaxgpt.model.masks:DOCUMENT_MASKS",
    )
    sparse: SparseConfig = field(default_factory=SparseConfig)
    position: str = option(
        "rope", "position encoding", table="jaxgpt.model.positions:POSITION_ENCODINGS"
    )
    rope: RopeConfig = field(default_factory=RopeConfig)
    position_buckets: int = option(32, "U, buckets of the relative position bias of t5", low=4)
    position_reach: int = option(
        128, "maximum distance of the relative position bias of t5, in tokens", low=2
    )
    qk_norm: bool = option(False, "normalize queries and keys per head (QK-norm)")
    softcap: float | None = option(
        None, "softcap of the attention logits, ± this: none = off", above=0
    )
    query_scale: float | None = option(
        None, "scale of the attention logits: none = 1 / sqrt(head width)", above=0
    )
    norm: str = option("rms", "normalization layer", table="jaxgpt.model.norms:NORMS")
    norm_eps: float = option(1e-5, "epsilon, added to the variance in the norm", above=0)
    wiring: str = option(
        "pre", "placement of norms and residual connections", table="jaxgpt.model.block:WIRINGS"
    )
    feedforward: str = option(
        "gated", "feed-forward layer", table="jaxgpt.model.feedforward:FEEDFORWARDS"
    )
    activation: str = option(
        "silu",
        "activation function (with gated: silu is SwiGLU, gelu GeGLU, relu ReGLU)",
        table="jaxgpt.model.feedforward:ACTIVATIONS",
    )
    moe: ExpertsConfig = field(default_factory=ExpertsConfig)
    mixer: MixerConfig = field(default_factory=MixerConfig)
    bias: bool = option(False, "bias vectors in linear layers and LayerNorm")
    embed_norm: bool = option(False, "normalize embeddings before the first block")
    embed_scale: bool = option(False, "multiply embeddings by sqrt(width)")
    types: int = option(0, "number of token type embeddings (BERT: 2), 0 = none", low=0)
    tie: bool = option(True, "tie the input embedding and the output head")
    head: str = option("linear", "output head", table="jaxgpt.model.heads:HEADS")
    head_scale: float | None = option(None, "scale of the output logits: none = 1", above=0)
    final_softcap: float | None = option(
        None, "softcap of the output logits, ± this: none = off", above=0
    )
    classes: int = option(0, "number of classes of a text classifier (encoder), 0 = none", low=0)
    dropout: float = option(0.0, "dropout rate during training", low=0.0, high=0.99)
    kernel: str = option("auto", "attention kernel", table="jaxgpt.model.kernels:KERNELS")
    dtype: str = option(
        "float32",
        "compute dtype; parameters stay float32",
        table="jaxgpt.model.layers:DTYPES",
        is_runtime=True,
    )
    products: str = option(
        "plain",
        "matrix products in blocks: plain (in dtype) or fp8 (GPUs since Hopper; MFU stays "
        "relative to bfloat16)",
        table="jaxgpt.model.layers:MATMULS",
        is_runtime=True,
    )
    remat: str = option(
        "none",
        "rematerialization: what the backward pass recomputes",
        table="jaxgpt.model.block:REMAT_POLICIES",
        is_runtime=True,
    )
    unroll: int = option(
        0,
        "layer cycles per iteration of the scan over layers, 0 = chosen by platform and size",
        low=0,
        is_runtime=True,
    )

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every dimension of a parameter, by its letter (see dims.py)."""
        return dict(
            V=self.vocab,
            C=self.context,
            D=self.width,
            H=self.heads,
            G=self.kv_heads or self.heads,
            K=self.head_width or self.width // self.heads,
            F=self.ffn,
            E=self.moe.experts,
            U=self.position_buckets,
            I=self.mixer.expand * self.width,
            Z=self.mixer.state,
            R=math.ceil(self.width / 16),
            W=self.mixer.conv,
            P=self.mixer.summary,
            Q=self.mixer.chunk,
            Y=self.types,
            A=self.classes,
        )

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward is a mixture of experts."""
        return self.feedforward.startswith("moe")

    @property
    def attention_scale(self) -> float:
        """The factor of q·k."""
        return self.sizes["K"] ** -0.5 if self.query_scale is None else self.query_scale

    @property
    def layer_cycle(self) -> tuple[tuple[str, str], ...]:
        """(mixer, pattern) of the layers in one period of both lists: the body of the scan."""
        size = math.lcm(len(self.mixers), len(self.pattern))
        return tuple(
            (self.mixers[i % len(self.mixers)], self.pattern[i % len(self.pattern)])
            for i in range(size)
        )

    @property
    def directions(self) -> tuple[str, ...]:
        """The attention directions of the stacks of the family: "causal", "both"."""
        return resolve_table("jaxgpt.model.transformer:FAMILIES")[self.family].DIRECTIONS

    def check(self):
        for check in (self._check_heads, self._check_layers, self._check_positions,
                     self._check_mixers, self._check_kernel, self._check_family):  # fmt: skip
            check()

    def _check_heads(self):
        mixers = resolve_table("jaxgpt.model.mixers:MIXERS")
        if not any(mixers[name].HAS_HEADS for name in self.mixers):
            return
        if self.head_width is None and self.width % self.heads:
            near = format_nearest_multiples(self.width, self.heads)
            raise ConfigError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}: "
                f"set model.width={near}, or give model.head_width."
            )
        if self.kv_heads and self.heads % self.kv_heads:
            divisors = [g for g in range(1, self.heads + 1) if self.heads % g == 0]
            raise ConfigError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}: "
                f"use one of {divisors}."
            )

    def _check_layers(self):
        for key, names in (("mixers", self.mixers), ("pattern", self.pattern)):
            if not names:
                raise ConfigError(f"model.{key} is empty: give at least one.")
        cycle = len(self.layer_cycle)
        for key in ("layers", "encoder_layers"):
            layers = getattr(self, key)
            if layers and layers % cycle:
                raise ConfigError(
                    f"model.{key}={layers} is not a multiple of the {cycle} layers that "
                    f"model.mixers={','.join(self.mixers)} and model.pattern="
                    f"{','.join(self.pattern)} repeat: "
                    f"use {format_nearest_multiples(layers, cycle)}."
                )
            if layers and layers // cycle % (self.unroll or 1):
                raise ConfigError(
                    f"model.unroll={self.unroll} does not divide the {layers // cycle} repeats of "
                    f"model.{key}={layers}: use a divisor, or 1."
                )

    def _check_positions(self):
        if self.position == "rope":
            rotated = self.sizes["K"] * self.rope.share
            if rotated % 2:
                raise ConfigError(
                    f"model.position='rope' rotates pairs, so head width x model.rope.share "
                    f"must be even; it is {self.sizes['K']} x {self.rope.share:g} = {rotated:g}. "
                    "Set model.head_width or model.rope.share."
                )
        elif self.rope != RopeConfig():
            raise ConfigError(
                f"model.rope.* is set, but model.position={self.position!r} does not use it: set "
                "model.position=rope, or leave model.rope as it is."
            )
        if self.rope.factor > 1 and self.rope.scaling == "none":
            raise ConfigError(
                f"model.rope.factor={self.rope.factor:g} has no effect with model.rope.scaling"
                "='none': choose linear, ntk, yarn or llama3."
            )
        sinusoids = sorted({"sinusoidal", "transformer_xl"} & {self.position, *self.mixers})
        if sinusoids and self.width % 2:
            raise ConfigError(f"{sinusoids[0]!r} needs an even model.width; it is {self.width}.")
        if self.position == "t5" and self.position_reach <= self.position_buckets // 2:
            raise ConfigError(
                f"model.position_reach={self.position_reach} must be more than half of "
                f"model.position_buckets={self.position_buckets}, the number of exact distances."
            )

    def _check_mixers(self):
        mixers = resolve_table("jaxgpt.model.mixers:MIXERS")
        encodings = resolve_table("jaxgpt.model.positions:POSITION_ENCODINGS")
        hook = encodings[self.position].ATTENTION_HOOK
        for name, pattern in self.layer_cycle:
            for direction in self.directions:
                if direction not in mixers[name].DIRECTIONS:
                    problem = {"causal": "is not causal", "both": "is causal only"}
                    raise ConfigError(
                        f"model.mixers={name!r} {problem[direction]}, which a stack of "
                        f"model.family={self.family!r} cannot use: "
                        f"use one of {_join_names_with(mixers, 'DIRECTIONS', direction)}."
                    )
            if pattern != "full" and "pattern" not in mixers[name].USES:
                raise ConfigError(
                    f"model.pattern={pattern!r} is for a layer of model.mixers={name!r}, which has "
                    "no attention mask: use 'full' there, or one of "
                    f"{_join_names_with(mixers, 'USES', 'pattern')}."
                )
        requested = {
            "position": hook,
            "softcap": self.softcap and "softcap",
            "qk_norm": self.qk_norm and "qk_norm",
        }
        for key, what in requested.items():
            if what and not any(what in mixers[name].USES for name in self.mixers):
                remedy = {"position": "use none, sinusoidal or learned"}.get(key, "leave it out")
                raise ConfigError(
                    f"model.{key}={getattr(self, key)!r} has no effect in model.mixers="
                    f"{','.join(self.mixers)}: {remedy}, or one of the mixers "
                    f"{_join_names_with(mixers, 'USES', what)}."
                )

    def _check_kernel(self):
        limits = resolve_table("jaxgpt.model.kernels:LIMITS").get(self.kernel, {})
        encodings = resolve_table("jaxgpt.model.positions:POSITION_ENCODINGS")
        hook = encodings[self.position].ATTENTION_HOOK
        requested = {
            "bias": ("position", hook == "bias"),
            "softcap": ("softcap", self.softcap is not None),
        }
        for what, reason in limits.items():
            key, is_requested = requested[what]
            if is_requested:
                raise ConfigError(
                    f"model.kernel={self.kernel!r} does not support model.{key}="
                    f"{getattr(self, key)!r}: {reason}. "
                    "Use model.kernel=auto, strips, blockwise or dense."
                )

    def _check_family(self):
        for key, families in (("classes", ["encoder"]), ("types", ["encoder"]),
                              ("encoder_layers", ["encoder_decoder"])):  # fmt: skip
            if getattr(self, key) and self.family not in families:
                raise ConfigError(
                    f"model.{key}={getattr(self, key)} belongs to model.family="
                    f"{' or '.join(families)}, not to {self.family!r}."
                )
        if self.classes == 1:
            raise ConfigError("model.classes=1: a classifier needs at least 2 classes.")
        if "prefix" in self.pattern and self.family != "decoder":
            raise ConfigError(
                f"model.pattern='prefix' belongs to model.family=decoder, not to {self.family!r}: "
                "the attention of an encoder is not restricted to the past."
            )


def _join_names_with(table, kind: str, what: str) -> str:
    return ", ".join(name for name, row in table.items() if what in getattr(row, kind))
