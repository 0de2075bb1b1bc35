"""Experiments are values: frozen dataclasses, checked when made, overridden from the shell.

A `Config` can not exist in an invalid state: every section checks its own fields as it is built
(type, range, known name) and then the combinations of them, before any array exists. The message
names the key, the value and what would be right. A config is a file of Python that says

    config = Config(name="mine", model=ModelConfig(width=512), ...)

and any field is set from the shell with `path=value`: `model.width=512 optimizer.lr=3e-4`.
"""

import json
import os
import runpy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from jaxgpt.architecture import ModelConfig
from jaxgpt.config_files import find_config, importable_configs
from jaxgpt.settings import (
    ConfigError,
    Section,
    choose,
    flat_fields,
    flat_hints,
    from_dict,
    get,
    list_choices,
    nearest_multiples,
    option,
    parse,
    resolve_table,
    to_dict,
    unknown,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SampleConfig",
    "TrainConfig",
    "choose",
    "describe",
    "differences",
    "from_json",
    "load",
    "override",
    "parse_assignments",
    "to_json",
]


@dataclass(frozen=True)
class DataConfig(Section):
    """Where text comes from and how it becomes batches."""

    section: ClassVar[str] = "data"

    source: str = option(
        "stdlib",
        "stdlib (Python's own documentation and library source, no download), a file, folder or "
        "glob of .txt .md .py .jsonl(.gz|.zst), tfds:name, hf:name[:config] or hf:folder, or "
        "classes:folder (one text a line, or a file; its class is the file's ending, or for .txt "
        "the folder); several are mixed as '0.7 * wiki/ + 0.3 * tfds:lm1b'",
    )
    text_key: str = option(
        "text", "the field of a .jsonl record or data set's example that holds the text"
    )
    tokenizer: str = option(
        "train",
        "train (byte-level BPE of model.vocab entries), bytes (no merges), or a path to a "
        "tokenizer.json or to a folder with encoder.json and vocab.bpe",
    )
    target_key: str = option(
        "", "the field that holds the answer (a translation, a class) where texts come in pairs"
    )
    holdout: float = option(0.1, "share of the text held out for evaluation", above=0.0, high=0.5)
    split: str = option("auto", "what is held out", table="jaxgpt.data.sources:SPLITS")
    packing: str = option(
        "stream",
        "stream (rows are cut from the text as it comes) or documents (kept whole, or pairs, and "
        "put together to rows with little padding)",
        table="jaxgpt.data.packing:PACKINGS",
    )
    cache: str = option("runs/.tokens", "where token files are kept between runs", free=True)
    verify: bool = option(
        True, "token files are read and checked at the start: false for terabytes", free=True
    )
    workers: int = option(
        0, "processes that tokenize a large source, 0 = one for each core", low=0, free=True
    )
    prefetch: int = option(2, "batches prepared ahead of the device", low=0, free=True)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """How parameters move."""

    section: ClassVar[str] = "optimizer"

    name: str = option("adamw", "the update rule", table="jaxgpt.optimizer:OPTIMIZERS")
    lr: float = option(1e-3, "peak learning rate", above=0)
    b1: float = option(0.9, "decay of the first moment (momentum)", low=0, high=0.99999)
    b2: float = option(0.95, "decay of the second moment", low=0, high=0.99999)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = option(
        0.1, "decoupled decay, on matrices only; every rule has it but adam", low=0
    )
    moments: str = option(
        "float32",
        "how moments of matrices are kept: in 4, 2 or 1 bytes",
        table="jaxgpt.moments:MOMENTS",
    )
    clip: float = option(1.0, "largest global norm of the gradient, 0 = no clipping", low=0)
    schedule: str = option(
        "warmup_cosine", "learning rate over the run", table="jaxgpt.optimizer:SCHEDULES"
    )
    warmup: int = option(100, "steps of linear warmup", low=0)
    floor: float = option(0.1, "final learning rate as a share of the peak", low=0, high=1)
    decay_share: float = option(
        0.2, "share of the run that warmup_stable_decay spends decaying", above=0, high=1
    )
    matrix_lr: float | None = option(
        None, "muon's peak learning rate for the matrices in blocks: none = lr", above=0
    )

    def check(self):
        without = resolve_table("jaxgpt.optimizer:WITHOUT_MOMENTS")
        if self.moments != "float32" and self.name in without:
            rules = resolve_table("jaxgpt.optimizer:OPTIMIZERS")
            fits = ", ".join(name for name in rules if name not in without)
            raise ConfigError(
                f"optimizer.moments={self.moments!r} with optimizer.name={self.name!r}, which "
                "keeps no moments of matrices: use optimizer.moments=float32, or one of "
                f"{fits}."
            )


@dataclass(frozen=True)
class MeshConfig(Section):
    """How many devices each kind of parallelism gets; -1 takes what is left."""

    section: ClassVar[str] = "mesh"

    data: int = option(
        -1, "copies of the model, each with its part of the batch", low=-1, free=True
    )
    pipe: int = option(1, "parts that the layers are divided in", low=-1, free=True)
    fsdp: int = option(1, "parts that parameters and batch are divided in", low=-1, free=True)
    expert: int = option(1, "parts that experts and batch are divided in", low=-1, free=True)
    context: int = option(1, "parts that the tokens of a row are divided in", low=-1, free=True)
    tensor: int = option(
        1, "parts that heads, feed-forward and vocabulary are divided in", low=-1, free=True
    )

    def check(self):
        sizes = {f"mesh.{k}": v for k, v in asdict(self).items()}
        for key, size in sizes.items():
            if size == 0:
                raise ConfigError(
                    f"{key}=0: an axis has at least 1 device, or -1 for what is left."
                )
        rest = [key for key, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ConfigError(
                f"{' and '.join(rest)} are both -1: only one axis can take what is left."
            )


@dataclass(frozen=True)
class TrainConfig(Section):
    """The loop: how long, how often, what counts as the loss."""

    section: ClassVar[str] = "train"

    objective: str = option("causal", "what is predicted", table="jaxgpt.objectives:OBJECTIVES")
    steps: int = option(2000, "optimizer steps", low=1)
    batch: int = option(16, "sequences per step, over all devices", low=1)
    accumulate: int = option(
        0, "parts a batch is divided in, one after the other, 0 = chosen by platform", low=0
    )
    noise: float = option(0.15, "share of tokens to tell (masked, span)", above=0, high=0.9)
    span: float = option(3.0, "mean tokens of a span (span)", low=1)
    balance: float = option(0.01, "weight of the loss that keeps experts evenly busy", low=0)
    label_smoothing: float = option(
        0.0, "share of the target spread over the vocabulary", low=0, high=0.99
    )
    z_loss: float = option(0.0, "weight of the squared log-partition (PaLM: 1e-4)", low=0)
    loss_chunk: int = option(
        0, "tokens per chunk of the vocabulary softmax, 0 = chosen by size", low=0, free=True
    )
    eval_every: int = option(250, "steps between evaluations", low=1)
    eval_batches: int = option(0, "batches per evaluation, 0 = the whole held-out text", low=0)
    patience: int = option(
        0, "evaluations without a new best before stopping early, 0 = never", low=0
    )
    log_every: int = option(10, "steps between lines of metrics", low=1, free=True)
    save_every: int = option(250, "steps between checkpoints", low=1, free=True)
    keep: int = option(1, "latest checkpoints kept, beside the best one", low=1, free=True)
    sample_every: int = option(250, "steps between samples, 0 = only at the end", low=0, free=True)

    def check(self):
        if self.batch % (self.accumulate or 1):
            near = nearest_multiples(self.batch, self.accumulate)
            raise ConfigError(
                f"train.batch={self.batch} is not divisible by train.accumulate={self.accumulate}: "
                f"use train.batch={near}."
            )


@dataclass(frozen=True)
class SampleConfig(Section):
    """How text is drawn from a model."""

    section: ClassVar[str] = "sample"

    prompt: str = option("", "text to continue; empty starts a new document", free=True)
    tokens: int = option(200, "tokens to draw at most", low=1, free=True)
    temperature: float = option(0.8, "divides the logits; 0 = greedy", low=0, free=True)
    top_k: int = option(0, "keep the k likeliest tokens, 0 = all", low=0, free=True)
    top_p: float = option(
        1.0, "keep the likeliest tokens that hold this much probability", above=0, high=1, free=True
    )
    min_p: float = option(
        0.0, "keep tokens at least this likely, relative to the likeliest", low=0, high=1, free=True
    )
    repetition_penalty: float = option(
        1.0, "makes tokens seen before less likely (1 = off)", above=0, free=True
    )
    stop: tuple[str, ...] = option((), "strings that end the text", free=True)
    seed: int = option(0, "chooses among the possible texts", low=0, free=True)
    slide: bool = option(
        False, "go on past the context with a sliding window instead of stopping", free=True
    )

    def check(self):
        if "" in self.stop:
            raise ConfigError(
                f"sample.stop={list(self.stop)} has an empty string, which would end every text "
                "at once: leave it out."
            )


@dataclass(frozen=True)
class Config(Section):
    """One experiment, whole. With the code it determines the run, bit for bit."""

    name: str = option("run", "the run's folder inside `folder`")
    folder: str = option("runs", "where runs are kept", free=True)
    seed: int = option(0, "of initialisation, data order and dropout", low=0)
    resume: str = option(
        "auto",
        "auto: go on from the last checkpoint if the config agrees; force: even if it differs",
        table="jaxgpt.config:RESUME",
        free=True,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @property
    def run_folder(self) -> str:
        return os.path.join(self.folder, self.name)

    def check(self):
        if not self.name or self.name in (".", "..") or os.sep in self.name:
            raise ConfigError(
                f"name={self.name!r} must be a plain folder name, such as 'gpt_mini'."
            )
        if self.optimizer.warmup > self.train.steps:
            raise ConfigError(
                f"optimizer.warmup={self.optimizer.warmup} is longer than "
                f"train.steps={self.train.steps}: the learning rate would never reach its peak. "
                f"Set optimizer.warmup={self.train.steps // 10}."
            )
        self._check_objective()
        masks = self.objective.task.reserved(self)
        smallest = 260 + masks  # 256 bytes, 4 specials
        if self.data.tokenizer in ("train", "bytes") and self.model.vocab < smallest:
            more = f" and the {masks} masks of train.objective={self.train.objective}"
            raise ConfigError(
                f"model.vocab={self.model.vocab} has no room for the 256 bytes and 4 specials"
                f"{more if masks else ''}: use at least {smallest}."
            )

    @property
    def objective(self):
        """The row of OBJECTIVES that is trained for."""
        return resolve_table("jaxgpt.objectives:OBJECTIVES")[self.train.objective]

    def _check_objective(self):
        name, model = self.train.objective, self.model
        if self.objective.family != model.family:
            table = resolve_table("jaxgpt.objectives:OBJECTIVES")
            fits = [name for name, row in table.items() if row.family == model.family]
            raise ConfigError(
                f"train.objective={name!r} is for model.family={self.objective.family}, and it is "
                f"{model.family!r}: use train.objective={' or '.join(fits)}."
            )
        if (name == "classify") != bool(model.classes):
            raise ConfigError(
                f"train.objective={name!r} with model.classes={model.classes}: classify needs as "
                "many classes as the data has, the other objectives none."
            )
        if name == "classify" and self.data.packing != "stream":
            raise ConfigError(
                f"data.packing={self.data.packing!r} with train.objective='classify', which tells "
                "the class of a row as a whole: use data.packing=stream, one text a row."
            )
        if model.documents == "joined" and self.data.packing != "stream":
            raise ConfigError(
                f"data.packing={self.data.packing!r} keeps documents apart, and model.documents="
                "'joined' does not: use data.packing=stream, or model.documents=apart."
            )
        if (name == "prefix") != ("prefix" in model.pattern):
            raise ConfigError(
                f"train.objective={name!r} with model.pattern={','.join(model.pattern)}: "
                "the objective prefix and the pattern prefix belong together."
            )


RESUME = {"auto": "go on if the config agrees", "force": "go on with the new config"}


# --- reading and writing ---


def load(path: str, assignments: Iterable[str] = ()) -> Config:
    """Runs a config file and applies `path=value` assignments.

    Args:
        path: a Python file that defines `config`, or the bare name of one in ./configs or of one
            that comes with jaxgpt.
        assignments: such as ["model.width=512", "data.source=text/*.txt"].

    Raises:
        ConfigError: there is no such file, it defines no config, or a value can not work.
    """
    found = find_config(path)
    try:
        with importable_configs(found):
            config = runpy.run_path(found).get("config")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config {found}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"--config {found} must define `config = Config(...)`; "
            f"its `config` is a {type(config).__name__}."
        )
    return override(config, assignments)


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Applies `path=value` assignments, all at once, so that only the outcome must be valid.

    >>> override(Config(), ["model.width=512", "model.heads=8"]).model.sizes["K"]
    64
    """
    tree = to_dict(config)
    for key, value in parse_assignments(assignments).items():
        node = tree
        *sections, name = key.split(".")
        for section in sections:
            node = node[section]
        node[name] = value
    return from_dict(type(config), tree)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the values of `path=value` assignments by their keys.

    It checks keys and types and builds nothing, which is quick: names of registries, and what can
    not be combined, need the modules of the model.

    Raises:
        ConfigError: there is no such setting, or the value is of another type.
    """
    hints = flat_hints(Config)
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals:
            raise ConfigError(f"expected path=value, such as model.width=512; got {assignment!r}.")
        if key not in hints:
            raise ConfigError(unknown(key, hints))
        values[key] = parse(text, hints[key], key)
    return values


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """The config that `to_json` wrote. `where` names the file in errors."""
    try:
        return from_dict(Config, json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not a saved config: {error}.") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def differences(old: Config, new: Config) -> list[str]:
    """The keys, with both values, in which two configs would learn something different."""
    fixed = [key for key, f in flat_fields(Config).items() if not f.metadata.get("free")]
    pairs = [(key, get(old, key), get(new, key)) for key in fixed]
    return [f"{key}: {a!r} -> {b!r}" for key, a, b in pairs if a != b]


def describe(section: str = "") -> str:
    """The settings with their defaults, meanings and choices: the body of `--help`."""
    lines = []
    for key, f in flat_fields(Config).items():
        if not key.startswith(section):
            continue
        value: Any = f.default
        shown = {None: "none", "": "''", (): "''"}.get(value, value)
        lines.append(f"  {f'{key}={shown}':34} {f.metadata['doc']}")
        if f.metadata["table"]:
            lines.append(f"{'':37}{' | '.join(list_choices(f.metadata['table']))}")
    return "\n".join(lines)
