"""The settings of a model, and which combinations of them can not be.

Names choose a function; numbers choose a size. A variant says itself what it can do (`MIXERS`,
`KERNELS`, `WIRINGS`, ...), so `check` compares what is asked for with what is offered, and knows
no variant by name where it can help it.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from jaxgpt.settings import ConfigError, Section, nearest_multiples, option, resolve_table


@dataclass(frozen=True)
class RopeConfig(Section):
    """How RoPE turns, and how it is stretched to contexts longer than it was trained on."""

    section: ClassVar[str] = "model.rope"

    theta: float = option(10_000.0, "base of the wavelengths", above=0)
    share: float = option(1.0, "share of each head's channels that is turned", above=0, high=1)
    scaling: str = option(
        "none", "how wavelengths are stretched", table="jaxgpt.model.positions:SCALINGS"
    )
    factor: float = option(1.0, "how many times longer than the original context", low=1)
    original: int | None = option(
        None, "context before stretching, in tokens: none = context / factor", low=1
    )


@dataclass(frozen=True)
class SparseConfig(Section):
    """The numbers of the attention patterns, in tokens or blocks."""

    section: ClassVar[str] = "model.sparse"

    window: int = option(128, "tokens that `window` sees on each side, with itself", low=1)
    stride: int = option(16, "`strided` sees its last `stride` tokens and every stride-th", low=1)
    block: int = option(16, "tokens of a block of `blocks`", low=1)
    near: int = option(3, "neighbouring blocks that `blocks` sees, with its own (odd)", low=1)
    anchors: int = option(1, "first blocks of a document that see all and that all see", low=0)
    random: int = option(2, "random blocks that each block of `blocks` sees", low=0)

    def check(self):
        if self.near % 2 == 0:
            raise ConfigError(
                f"model.sparse.near={self.near} must be odd: as many blocks on either side of its "
                f"own. Use {self.near - 1} or {self.near + 1}."
            )


@dataclass(frozen=True)
class ExpertsConfig(Section):
    """A mixture of experts, where the feed-forward is one."""

    section: ClassVar[str] = "model.moe"

    experts: int = option(8, "E, feed-forward layers to choose from", low=1)
    active: int = option(2, "experts that each token goes to", low=1)
    capacity: float = option(
        0.0, "tokens an expert takes at most, over its fair share; 0 = it takes all", low=0
    )

    def check(self):
        if self.active > self.experts:
            raise ConfigError(
                f"model.moe.active={self.active} is more than model.moe.experts={self.experts}: "
                "a token can not go to more experts than there are."
            )


@dataclass(frozen=True)
class MixerConfig(Section):
    """The numbers of the token mixers that are not attention."""

    section: ClassVar[str] = "model.mixer"

    state: int = option(16, "Z, numbers of state per channel of mamba; of s4, complex ones", low=1)
    expand: int = option(2, "mamba's inner width, over the width", low=1)
    conv: int = option(4, "tokens that mamba's convolution sees", low=1)
    features: int = option(64, "random features of performer, per head", low=1)
    summary: int = option(32, "keys that linformer projects a sequence (or block) to", low=1)
    chunk: int = option(
        32, "tokens computed at once by performer, linformer; a block of linformer_causal", low=1
    )
    hashes: int = option(4, "rounds of hashing of reformer", low=1)
    buckets: int = option(8, "buckets of reformer (even)", low=2)
    bucket_window: int = option(32, "latest tokens of its bucket that reformer sees", low=1)
    memory: int = option(
        64, "transformer_xl: tokens of a segment, and of what it remembers before", low=1
    )

    def check(self):
        if self.buckets % 2:
            raise ConfigError(
                f"model.mixer.buckets={self.buckets} must be even: a rotation gives buckets in "
                f"pairs. Use {nearest_multiples(self.buckets, 2)}."
            )


@dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of a Transformer."""

    section: ClassVar[str] = "model"

    family: str = option(
        "decoder", "how blocks are put together", table="jaxgpt.model.transformer:FAMILIES"
    )
    vocab: int = option(8192, "V, rows of the embedding table", low=1)
    context: int = option(256, "the longest sequence trained on, in tokens", low=1)
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
        "what mixes tokens, layer by layer, from the first again when the list ends",
        table="jaxgpt.model.mixers:MIXERS",
    )
    pattern: tuple[str, ...] = option(
        ("full",),
        "whom attention sees, layer by layer, from the first again when the list ends",
        table="jaxgpt.model.masks:PATTERNS",
    )
    documents: str = option(
        "apart",
        "whether tokens see their own document only, or (joined) all of a row, as GPT-2's training "
        "did: then a GPU's attention needs no mask",
        table="jaxgpt.model.masks:DOCUMENTS",
    )
    sparse: SparseConfig = field(default_factory=SparseConfig)
    position: str = option(
        "rope", "how tokens know their place", table="jaxgpt.model.positions:POSITIONS"
    )
    rope: RopeConfig = field(default_factory=RopeConfig)
    position_buckets: int = option(32, "U, distances that t5 tells apart", low=4)
    position_reach: int = option(128, "distance from which on t5 tells no difference", low=2)
    qk_norm: bool = option(False, "queries and keys are normed, head by head")
    softcap: float | None = option(None, "attention logits stay within ± this", above=0)
    query_scale: float | None = option(
        None, "multiplies attention logits: none = 1 / sqrt(head width)", above=0
    )
    norm: str = option("rms", "normalisation", table="jaxgpt.model.norms:NORMS")
    norm_eps: float = option(1e-5, "added to the variance inside the norm", above=0)
    wiring: str = option(
        "pre", "where norms and residuals stand", table="jaxgpt.model.block:WIRINGS"
    )
    feedforward: str = option(
        "gated", "the channel mixer", table="jaxgpt.model.feedforward:FEEDFORWARDS"
    )
    activation: str = option(
        "silu",
        "the nonlinearity (gated: silu is SwiGLU, gelu GeGLU, relu ReGLU)",
        table="jaxgpt.model.feedforward:ACTIVATIONS",
    )
    moe: ExpertsConfig = field(default_factory=ExpertsConfig)
    mixer: MixerConfig = field(default_factory=MixerConfig)
    bias: bool = option(False, "bias vectors in every linear map and LayerNorm")
    embed_norm: bool = option(False, "embeddings are normed before the first block")
    embed_scale: bool = option(False, "embeddings are multiplied by sqrt(width)")
    types: int = option(0, "kinds of tokens with an embedding each (BERT: 2), 0 = none", low=0)
    tie: bool = option(True, "one table embeds tokens and scores them")
    head: str = option(
        "linear", "what is between the last block and the scores", table="jaxgpt.model.heads:HEADS"
    )
    head_scale: float | None = option(None, "multiplies the scores: none = 1", above=0)
    final_softcap: float | None = option(None, "scores stay within ± this", above=0)
    classes: int = option(0, "classes of whole texts that an encoder tells, 0 = none", low=0)
    dropout: float = option(0.0, "share of activations dropped while training", low=0.0, high=0.99)
    kernel: str = option("auto", "how attention is computed", table="jaxgpt.model.kernels:KERNELS")
    dtype: str = option(
        "float32",
        "compute dtype; parameters stay float32",
        table="jaxgpt.model.layers:DTYPES",
        free=True,
    )
    products: str = option(
        "plain",
        "matrix products in blocks: plain (in dtype) or fp8 (one byte a number, for GPUs from "
        "Hopper on; MFU stays relative to bfloat16)",
        table="jaxgpt.model.layers:PRODUCTS",
        free=True,
    )
    remat: str = option(
        "none", "what the backward pass recomputes", table="jaxgpt.model.block:REMATS", free=True
    )
    unroll: int = option(
        0,
        "repeats of the pattern per step of the scan, 0 = chosen by platform and size",
        low=0,
        free=True,
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
        """What multiplies q·k."""
        return self.sizes["K"] ** -0.5 if self.query_scale is None else self.query_scale

    @property
    def unit(self) -> tuple[tuple[str, str], ...]:
        """(mixer, pattern) of the layers, until both lists begin again: what is scanned."""
        size = math.lcm(len(self.mixers), len(self.pattern))
        return tuple(
            (self.mixers[i % len(self.mixers)], self.pattern[i % len(self.pattern)])
            for i in range(size)
        )

    @property
    def directions(self) -> tuple[str, ...]:
        """The ways in which the stacks of the family look: "causal", "both"."""
        return resolve_table("jaxgpt.model.transformer:FAMILIES")[self.family].DIRECTIONS

    def check(self):
        for rule in (self._check_heads, self._check_layers, self._check_positions,
                     self._check_mixers, self._check_kernel, self._check_family):  # fmt: skip
            rule()

    def _check_heads(self):
        mixers = resolve_table("jaxgpt.model.mixers:MIXERS")
        if not any(mixers[name].HAS_HEADS for name in self.mixers):
            return
        if self.head_width is None and self.width % self.heads:
            near = nearest_multiples(self.width, self.heads)
            raise ConfigError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}: "
                f"set model.width={near}, or give model.head_width."
            )
        if self.kv_heads and self.heads % self.kv_heads:
            fits = [g for g in range(1, self.heads + 1) if self.heads % g == 0]
            raise ConfigError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}: "
                f"use one of {fits}."
            )

    def _check_layers(self):
        for key, names in (("mixers", self.mixers), ("pattern", self.pattern)):
            if not names:
                raise ConfigError(f"model.{key} is empty: name at least one.")
        unit = len(self.unit)
        for key in ("layers", "encoder_layers"):
            layers = getattr(self, key)
            if layers and layers % unit:
                raise ConfigError(
                    f"model.{key}={layers} is not a multiple of the {unit} layers that "
                    f"model.mixers={','.join(self.mixers)} and model.pattern="
                    f"{','.join(self.pattern)} repeat: use {nearest_multiples(layers, unit)}."
                )
            if layers and layers // unit % (self.unroll or 1):
                raise ConfigError(
                    f"model.unroll={self.unroll} does not divide the {layers // unit} repeats of "
                    f"model.{key}={layers}: use a divisor, or 1."
                )

    def _check_positions(self):
        if self.position == "rope":
            turned = self.sizes["K"] * self.rope.share
            if turned % 2:
                raise ConfigError(
                    f"model.position='rope' turns pairs, so head width x model.rope.share must be "
                    f"even; it is {self.sizes['K']} x {self.rope.share:g} = {turned:g}. "
                    "Set model.head_width or model.rope.share."
                )
        elif self.rope != RopeConfig():
            raise ConfigError(
                f"model.rope.* is set, but model.position={self.position!r} does not read it: set "
                "model.position=rope, or leave model.rope as it is."
            )
        if self.rope.factor > 1 and self.rope.scaling == "none":
            raise ConfigError(
                f"model.rope.factor={self.rope.factor:g} stretches nothing while model.rope.scaling"
                "='none': choose linear, ntk, yarn or llama3."
            )
        sines = sorted({"sinusoidal", "transformer_xl"} & {self.position, *self.mixers})
        if sines and self.width % 2:
            raise ConfigError(f"{sines[0]!r} needs an even model.width; it is {self.width}.")
        if self.position == "t5" and self.position_reach <= self.position_buckets // 2:
            raise ConfigError(
                f"model.position_reach={self.position_reach} must be more than half of "
                f"model.position_buckets={self.position_buckets}, which are exact distances."
            )

    def _check_mixers(self):
        mixers = resolve_table("jaxgpt.model.mixers:MIXERS")
        place = resolve_table("jaxgpt.model.positions:POSITIONS")[self.position].PLACE
        for name, pattern in self.unit:
            for direction in self.directions:
                if direction not in mixers[name].DIRECTIONS:
                    which = {"causal": "looks into the future", "both": "only looks back"}
                    raise ConfigError(
                        f"model.mixers={name!r} {which[direction]}, which a stack of "
                        f"model.family={self.family!r} can not: "
                        f"use one of {_offering(mixers, 'DIRECTIONS', direction)}."
                    )
            if pattern != "full" and "pattern" not in mixers[name].USES:
                raise ConfigError(
                    f"model.pattern={pattern!r} meets model.mixers={name!r}, which has no mask to "
                    "put it in: use 'full' there, or one of "
                    f"{_offering(mixers, 'USES', 'pattern')}."
                )
        asked = {
            "position": place,
            "softcap": self.softcap and "softcap",
            "qk_norm": self.qk_norm and "qk_norm",
        }
        for key, what in asked.items():
            if what and not any(what in mixers[name].USES for name in self.mixers):
                without = {"position": "use none, sinusoidal or learned"}.get(key, "leave it out")
                raise ConfigError(
                    f"model.{key}={getattr(self, key)!r} has nothing to act on in model.mixers="
                    f"{','.join(self.mixers)}: {without}, or one of the mixers "
                    f"{_offering(mixers, 'USES', what)}."
                )

    def _check_kernel(self):
        limits = resolve_table("jaxgpt.model.kernels:LIMITS").get(self.kernel, {})
        place = resolve_table("jaxgpt.model.positions:POSITIONS")[self.position].PLACE
        asked = {
            "bias": ("position", place == "bias"),
            "softcap": ("softcap", self.softcap is not None),
        }
        for what, why in limits.items():
            key, is_asked = asked[what]
            if is_asked:
                raise ConfigError(
                    f"model.kernel={self.kernel!r} can not do model.{key}="
                    f"{getattr(self, key)!r}: {why}. "
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
            raise ConfigError("model.classes=1: there is nothing to tell apart; use 2 or more.")
        if "prefix" in self.pattern and self.family != "decoder":
            raise ConfigError(
                f"model.pattern='prefix' belongs to model.family=decoder, not to {self.family!r}: "
                "an encoder sees all there is."
            )


def _offering(table, kind: str, what: str) -> str:
    return ", ".join(name for name, row in table.items() if what in getattr(row, kind))
