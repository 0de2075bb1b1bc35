"""The settings of a model, and which combinations of them are impossible.

Names choose a function; numbers choose a size. Every variant declares its capabilities (`MIXERS`,
`KERNELS`, `WIRINGS`, ...), so `check` compares the settings with these declarations and mentions as
few variants by name as possible.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxgpt.sections import ExpertsConfig, MixerConfig, RopeConfig, SparseConfig
from jaxgpt.settings import ConfigError, Section, format_nearest_multiples, option, resolve_table

# Where there are bias vectors: at the projections of attention or at other sites. See `Linear`.
BIASES: dict[str, tuple[str, ...]] = {
    "all": ("qkv", "attention_output", "other"),
    "attention": ("qkv", "attention_output"),
    "qkv": ("qkv",),
}


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is made of."""

    mixer: str
    pattern: str
    feedforward: str
    ffn: int
    position: str
    rope: RopeConfig  # of this layer: single numbers

    @property
    def position_scheme(self) -> tuple[str, RopeConfig]:
        """The position encoding and its numbers; layers that agree in them share its arrays."""
        return self.position, self.rope


# The settings that may have several values, which are cycled by the layers.
PER_LAYER = ("mixers", "pattern", "feedforward", "ffn", "position")
ROPE_PER_LAYER = ("theta", "scaling", "factor")  # in `model.rope`

# The pattern that uses a size of `model.sparse`.
PATTERN_OF_SIZE = {
    "window": "window",
    "chunk": "chunked",
    "stride": "strided",
    **dict.fromkeys(("block", "near", "anchors", "random"), "blocks"),
}

OPTIONS_OF_ATTENTION = (
    "softcap",
    "qk_norm",
    "sinks",
    "attention_dropout",
)  # which a mixer declares in `USES`


def _cycle(values: Any, i: int) -> Any:
    """Return the value of layer i of a setting with one value, or several that are cycled."""
    return values[i % len(values)] if isinstance(values, tuple) else values


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
    ffn: int | tuple[int, ...] = option(
        1024, "F, width of the feed-forward layer, or per layer, cycled", low=1
    )
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
    position: str | tuple[str, ...] = option(
        "rope",
        "position encoding, or one per layer, cycled",
        table="jaxgpt.model.positions:POSITION_ENCODINGS",
    )
    rope: RopeConfig = field(default_factory=RopeConfig)
    position_buckets: int = option(32, "U, buckets of the relative position bias of t5", low=4)
    position_reach: int = option(
        128, "maximum distance of the relative position bias of t5, in tokens", low=2
    )
    temperature_scale: float = option(
        0.1, "scale of the attention temperature of the position encoding temperature", low=0
    )
    temperature_floor: int = option(
        8192, "tokens after which the attention temperature grows (position temperature)", low=1
    )
    qk_norm: str | None = option(
        None,
        "normalize queries and keys (QK-norm): per head, over the width of all heads, or without "
        "a scale after the rotation (l2)",
        table="jaxgpt.model.mixers.attention:QK_NORMS",
        aliases={True: "head", "true": "head", False: None, "false": None, "none": None},
    )
    softcap: float | None = option(
        None, "softcap of the attention logits, ± this: none = off", above=0
    )
    query_scale: float | None = option(
        None, "scale of the attention logits: none = 1 / sqrt(head width)", above=0
    )
    sinks: bool = option(
        False, "attention sinks: a learned logit per head in the denominator of the softmax"
    )
    norm: str = option("rms", "normalization layer", table="jaxgpt.model.norms:NORMS")
    norm_eps: float = option(1e-5, "epsilon, added to the variance in the norm", above=0)
    wiring: str = option(
        "pre", "placement of norms and residual connections", table="jaxgpt.model.block:WIRINGS"
    )
    feedforward: str | tuple[str, ...] = option(
        "gated",
        "feed-forward layer, or one per layer, cycled",
        table="jaxgpt.model.feedforward:FEEDFORWARDS",
    )
    activation: str = option(
        "silu",
        "activation function (with gated: silu is SwiGLU, gelu GeGLU, relu ReGLU)",
        table="jaxgpt.model.feedforward:ACTIVATIONS",
    )
    moe: ExpertsConfig = field(default_factory=ExpertsConfig)
    mixer: MixerConfig = field(default_factory=MixerConfig)
    bias: str | None = option(
        None,
        "bias vectors: in all linear layers and LayerNorms, or in attention's alone",
        table="jaxgpt.architecture:BIASES",
        aliases={True: "all", "true": "all", False: None, "false": None, "none": None},
    )
    embed_norm: bool = option(False, "normalize embeddings before the first block")
    embed_scale: bool | None = option(
        None,
        "multiply embeddings by sqrt(width): none = with sinusoidal positions, which are as large",
        effective="model.has_embed_scale",
    )
    embed_std: float | None = option(
        None,
        "standard deviation of the initial embeddings: none = 0.02, but 1 / sqrt(width) with "
        "sinusoidal positions",
        above=0,
        effective="model.embed_init_std",
    )
    types: int = option(0, "number of token type embeddings (BERT: 2), 0 = none", low=0)
    tie: bool = option(True, "tie the input embedding and the output head")
    head: str = option("linear", "output head", table="jaxgpt.model.heads:HEADS")
    head_scale: float | None = option(None, "scale of the output logits: none = 1", above=0)
    final_softcap: float | None = option(
        None, "softcap of the output logits, ± this: none = off", above=0
    )
    classes: int = option(0, "number of classes of a text classifier (encoder), 0 = none", low=0)
    start_token: int | None = option(
        None,
        "id of the token that the target of an encoder_decoder begins with: none = the "
        "tokenizer's bos",
        low=0,
    )
    mask_token: int | None = option(
        None,
        "id of the mask, from which further ones count down: none = the last of the vocabulary",
        low=0,
    )
    dropout: float = option(0.0, "dropout rate during training", low=0.0, high=0.99)
    attention_dropout: float = option(
        0.0, "dropout rate of attention weights during training", low=0.0, high=0.99
    )
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
        table="jaxgpt.model.products:MATMULS",
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
            F=max(self.ffn) if isinstance(self.ffn, tuple) else self.ffn,
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
    def first_mask(self) -> int:
        """The id of the first mask: further ones count down from it."""
        return self.vocab - 1 if self.mask_token is None else self.mask_token

    def get_start_token(self, bos: int) -> int:
        """Return the id that a target begins with, given the tokenizer's bos."""
        return bos if self.start_token is None else self.start_token

    @property
    def has_dropout(self) -> bool:
        """Whether a training step needs a random key for dropout of any kind."""
        return bool(self.dropout or self.attention_dropout)

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward of a layer is a mixture of experts."""
        return any(spec.feedforward.startswith("moe") for spec in self.layer_cycle)

    @property
    def bias_sites(self) -> tuple[str, ...]:
        """The sites with bias vectors."""
        return BIASES[self.bias] if self.bias else ()

    @property
    def has_unit_positions(self) -> bool:
        """Whether position vectors of size 1 are added to the embeddings."""
        encodings = resolve_table("jaxgpt.model.positions:POSITION_ENCODINGS")
        return any(encodings[spec.position].ADDS_UNIT_SIZE for spec in self.layer_cycle)

    @property
    def has_embed_scale(self) -> bool:
        """Whether embeddings are multiplied by sqrt(width)."""
        return self.has_unit_positions if self.embed_scale is None else self.embed_scale

    @property
    def embed_init_std(self) -> float:
        """The standard deviation of the initial embeddings: scaled, they are as large as positions.

        Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.4, and its code.
        """
        if self.embed_std is not None:
            return self.embed_std
        return self.width**-0.5 if self.has_unit_positions and self.has_embed_scale else 0.02

    @property
    def has_logit_tables(self) -> bool:
        """Whether attention logits, or a part of them, are parameters."""
        encodings = resolve_table("jaxgpt.model.positions:POSITION_ENCODINGS")
        mixers = resolve_table("jaxgpt.model.mixers:MIXERS")
        rows = [row for s in self.layer_cycle for row in (encodings[s.position], mixers[s.mixer])]
        return any(row.HAS_LOGIT_TABLE for row in rows)

    @property
    def attention_scale(self) -> float:
        """The factor of q·k."""
        return self.sizes["K"] ** -0.5 if self.query_scale is None else self.query_scale

    @property
    def layer_cycle(self) -> tuple[LayerSpec, ...]:
        """The layers in one period of all settings that are given per layer."""
        values = [getattr(self, name) for name in PER_LAYER]
        values += [getattr(self.rope, name) for name in ROPE_PER_LAYER]
        size = math.lcm(*(len(value) for value in values if isinstance(value, tuple)))
        return tuple(self._make_spec(i) for i in range(size))

    def _make_spec(self, i: int) -> LayerSpec:
        mixer, pattern, feedforward, ffn, position = (
            _cycle(getattr(self, name), i) for name in PER_LAYER
        )
        numbers = {name: _cycle(getattr(self.rope, name), i) for name in ROPE_PER_LAYER}
        if numbers["scaling"] == "none":
            numbers["factor"] = 1.0  # of the layers that are scaled
        rope = dataclasses.replace(self.rope, **numbers) if position == "rope" else RopeConfig()
        return LayerSpec(mixer, pattern, feedforward, ffn, position, rope)

    def group_layers(self, layers: int) -> tuple[tuple[LayerSpec, ...], int, tuple[LayerSpec, ...]]:
        """Divide a stack into (the layers that repeat, how often, the tail after the repeats).

        >>> cfg = ModelConfig(pattern=("window", "full"))
        >>> cycle, repeats, tail = cfg.group_layers(5)
        >>> len(cycle), repeats, [spec.pattern for spec in tail]
        (2, 2, ['window'])
        """
        cycle = self.layer_cycle[:layers]
        repeats, rest = divmod(layers, len(cycle))
        return cycle, repeats, cycle[:rest]

    def list_layers(self, layers: int) -> tuple[LayerSpec, ...]:
        """Return the specs of all layers of a stack."""
        cycle, repeats, tail = self.group_layers(layers)
        return cycle * repeats + tail

    @property
    def position_schemes(self) -> tuple[tuple[str, RopeConfig], ...]:
        """The distinct position schemes of the layers, in the order of their first layers."""
        return tuple(dict.fromkeys(spec.position_scheme for spec in self.layer_cycle))

    def at_layer(self, spec: LayerSpec) -> "ModelConfig":
        """Return the config of a model whose layers all have this feed-forward and position."""
        names = ("feedforward", "ffn", "position", "rope")
        changes = {name: getattr(spec, name) for name in names}
        if changes == {name: getattr(self, name) for name in names}:
            return self
        return dataclasses.replace(self, unroll=0, **changes)  # which divides the repeats of all

    @property
    def directions(self) -> tuple[str, ...]:
        """The attention directions of the stacks of the family: "causal", "both"."""
        return resolve_table("jaxgpt.model.transformer:FAMILIES")[self.family].DIRECTIONS

    def check(self):
        for check in (self._check_heads, self._check_layers, self._check_sparse,
                      self._check_positions, self._check_mixers, self._check_kernel,
                      self._check_family):  # fmt: skip
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
        values = {f"model.{name}": getattr(self, name) for name in PER_LAYER}
        values |= {f"model.rope.{name}": getattr(self.rope, name) for name in ROPE_PER_LAYER}
        for key, value in values.items():
            if value == ():
                raise ConfigError(f"{key} is empty: give at least one.")
            most = max(self.layers, self.encoder_layers or 0)
            if isinstance(value, tuple) and len(value) > most:
                raise ConfigError(
                    f"{key} has {len(value)} values for {most} layers: the last "
                    f"{len(value) - most} would have no effect. Leave them out."
                )
        for key in ("layers", "encoder_layers"):
            layers = getattr(self, key)
            repeats = self.group_layers(layers)[1] if layers else 0
            if repeats % (self.unroll or 1):
                raise ConfigError(
                    f"model.unroll={self.unroll} does not divide the {repeats} repeats of "
                    f"model.{key}={layers}: use a divisor, or 1."
                )

    def _check_sparse(self):
        if not {*self.pattern} <= {"full", "prefix", *PATTERN_OF_SIZE.values()}:
            return  # a plugin's pattern may use any of the sizes
        for name, pattern in PATTERN_OF_SIZE.items():
            value = getattr(self.sparse, name)
            if value != getattr(SparseConfig(), name) and pattern not in self.pattern:
                raise ConfigError(
                    f"model.sparse.{name}={value} has no effect with model.pattern="
                    f"{','.join(self.pattern)}: it is of the pattern {pattern!r}. Add that to "
                    "model.pattern, or leave it out."
                )

    def _check_positions(self):
        names = {spec.position for spec in self.layer_cycle}
        encodings = resolve_table("jaxgpt.model.positions:POSITION_ENCODINGS")
        embedded = sorted(name for name in names if encodings[name].ADDS_TO_EMBEDDING)
        if embedded and len(names) > 1:
            raise ConfigError(
                f"model.position={','.join(self.position)}: {embedded[0]!r} adds to the embedding, "
                "which all layers share, so it must be the only position encoding."
            )
        if "rope" in names:
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
        if self.rope.factor != 1 and self.rope.scaling == "none":
            raise ConfigError(
                f"model.rope.factor={self.rope.factor} has no effect with model.rope.scaling"
                "='none': choose linear, ntk, yarn or llama3."
            )
        sinusoids = sorted({"sinusoidal", "transformer_xl"} & {*names, *self.mixers})
        if sinusoids and self.width % 2:
            raise ConfigError(f"{sinusoids[0]!r} needs an even model.width; it is {self.width}.")
        if "t5" in names and self.position_reach <= self.position_buckets // 2:
            raise ConfigError(
                f"model.position_reach={self.position_reach} must be more than half of "
                f"model.position_buckets={self.position_buckets}, the number of exact distances."
            )

    def _check_mixers(self):
        mixers = resolve_table("jaxgpt.model.mixers:MIXERS")
        encodings = resolve_table("jaxgpt.model.positions:POSITION_ENCODINGS")
        for name, pattern in {(spec.mixer, spec.pattern): None for spec in self.layer_cycle}:
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
        hooks = {encodings[spec.position].ATTENTION_HOOK for spec in self.layer_cycle}
        requested = dict.fromkeys(sorted(hooks), "position")
        requested |= {"attention_bias": "bias"} if self.bias in ("qkv", "attention") else {}
        requested |= {key: key for key in OPTIONS_OF_ATTENTION if getattr(self, key)}
        for what, key in requested.items():
            if what and not any(what in mixers[name].USES for name in self.mixers):
                remedy = {"position": "use none, sinusoidal or learned"}.get(key, "leave it out")
                raise ConfigError(
                    f"model.{key}={getattr(self, key)!r} has no effect in model.mixers="
                    f"{','.join(self.mixers)}: {remedy}, or one of the mixers "
                    f"{_join_names_with(mixers, 'USES', what)}."
                )

    def _check_kernel(self):
        all_limits = resolve_table("jaxgpt.model.kernels:LIMITS")
        limits = all_limits.get(self.kernel, {})
        encodings = resolve_table("jaxgpt.model.positions:POSITION_ENCODINGS")
        hooks = {encodings[spec.position].ATTENTION_HOOK for spec in self.layer_cycle}
        for what, reason in limits.items():
            key = {"bias": "position"}.get(what, what)
            if what in hooks if key == "position" else getattr(self, key):
                kernels = resolve_table("jaxgpt.model.kernels:KERNELS")
                others = [name for name in kernels if what not in all_limits.get(name, {})]
                raise ConfigError(
                    f"model.kernel={self.kernel!r} does not support model.{key}="
                    f"{getattr(self, key)!r}: {reason}. "
                    f"Use model.kernel={' or '.join(others)}."
                )

    def _check_family(self):
        for key, families in (("classes", ["encoder"]), ("types", ["encoder"]),
                              ("encoder_layers", ["encoder_decoder"])):  # fmt: skip
            if getattr(self, key) and self.family not in families:
                raise ConfigError(
                    f"model.{key}={getattr(self, key)} belongs to model.family="
                    f"{' or '.join(families)}, not to {self.family!r}."
                )
        for key in ("start_token", "mask_token"):
            value = getattr(self, key)
            if value is not None and value >= self.vocab:
                raise ConfigError(
                    f"model.{key}={value} is not among the ids of model.vocab={self.vocab}: they "
                    f"go from 0 to {self.vocab - 1}."
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
