"""The schema of an experiment: frozen dataclasses, validated when constructed.

A `Config` cannot exist in an invalid state: every section checks its own fields (type, range, known
name) and then their combinations when it is constructed, before any array exists. The error names
the key, the value and what would be right. A config file is a Python file with

    config = Config(name="mine", model=ModelConfig(width=512), ...)

and any field is set on the command line with `path=value`: `model.width=512 optimizer.lr=3e-4`.
"""

import hashlib
import importlib.metadata
import json
import os
import runpy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import jaxgpt
from jaxgpt.architecture import PATTERN_OF_SIZE, PER_LAYER, ROPE_PER_LAYER, ModelConfig
from jaxgpt.config_files import find_config, importable_configs
from jaxgpt.plugins import (
    OTHER_TABLES,
    import_plugins,
    import_recorded_plugins,
    parse_plugins,
    read_plugins,
)
from jaxgpt.settings import (
    ConfigError,
    Section,
    check_field,
    choose,
    describe_unknown_key,
    format_nearest_multiples,
    from_dict,
    get,
    list_choices,
    list_fields,
    list_types,
    option,
    parse,
    resolve_table,
    to_dict,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "SampleConfig",
    "TrainConfig",
    "choose",
    "describe",
    "from_json",
    "list_differences",
    "load",
    "override",
    "parse_assignments",
    "rename_setting",
    "to_json",
]


WARMUP_SHARE = 20  # the warmup of a run that does not set it is one in so many steps

DEFAULT_SPIKE_MULTIPLE = 10.0

MAX_SEED = 2**63 - 1  # JAX's seeds are signed numbers of 64 bits


@dataclass(frozen=True)
class DataConfig(Section):
    """The source of the text and how it becomes batches."""

    section: ClassVar[str] = "data"

    source: str = option(
        "stdlib",
        "stdlib (Python's own documentation and library source, no download), a file, folder or "
        "glob of .txt .md .py .jsonl .csv .tsv(.gz|.zst), tfds:name, hf:name[:config] or hf:folder "
        "(@split reads one split), or classes:folder (one text per line, or per file; its class is "
        "the file extension, or for .txt the folder); several are mixed as '0.7 * wiki/ + 0.3 * "
        "tfds:lm1b'",
    )
    validation: str = option(
        "",
        "a source of its own for the held-out text, in place of a part of data.source (holdout and "
        "split are then not used)",
    )
    test: str = option(
        "", "a source for the final measurement, used by nothing before it", is_runtime=True
    )
    text_key: str = option(
        "text", "field of a .jsonl record, column of a .csv, or data set feature with the text"
    )
    tokenizer: str = option(
        "train",
        "train (a byte-level BPE of model.vocab entries), bytes (no merges), or the path of a "
        "tokenizer.json or tokenizer.model, or of a folder with the files of a tokenizer",
    )
    target_key: str = option(
        "", "field that holds the target (a translation, a class) where texts come in pairs"
    )
    separator: str = option(
        "",
        "text between the documents of a .txt, .md or .py file, such as '<|endoftext|>' or "
        "'\\n\\n'; line breaks beside it are dropped; none = a file is one document",
    )
    chat_template: str = option(
        "",
        "how conversations are written (chat, preference, online): chatml, llama3, gemma, mistral, "
        "plain, or the path of a file with Jinja source; empty = the tokenizer's own",
    )
    encoding: str = option(
        "auto",
        "encoding of text files: auto (UTF-8, or what is recognized, which is printed), utf-8 (any "
        "other bytes are kept), or latin-1, utf-16, gb18030, ...",
    )
    max_document: float = option(
        256.0,
        "longest document or line in MB (10^6 bytes, decompressed); longer ones are refused",
        above=0,
        is_runtime=True,
    )
    holdout: float = option(
        0.1, "fraction of the text held out for evaluation", above=0.0, high=0.5
    )
    split: str = option(
        "auto", "which part of the text is held out", table="jaxgpt.data.sources:SPLITS"
    )
    packing: str = option(
        "stream",
        "stream (rows are cut from the concatenated text) or documents (whole documents or pairs, "
        "packed into rows with little padding)",
        table="jaxgpt.data.packing:PACKINGS",
    )
    cache: str = option(
        "runs/.tokens", "folder of the token files, kept between runs", is_runtime=True
    )
    verify: bool = option(
        True, "verify the checksums of token files at startup; false for terabytes", is_runtime=True
    )
    benchmarks: str = option(
        "",
        "folder of the files of benchmarks (blimp/, mmlu/, ...); empty = $JAXGPT_BENCHMARKS, or "
        "data/benchmarks",
        is_runtime=True,
    )
    workers: int = option(
        0, "processes that tokenize a large source, 0 = one per core", low=0, is_runtime=True
    )
    prefetch: int = option(2, "batches to prefetch to the device", low=0, is_runtime=True)

    def check(self):
        try:
            "".encode("utf-8" if self.encoding == "auto" else self.encoding)
        except LookupError:  # also for codecs that are not of text
            raise ConfigError(
                f"data.encoding={self.encoding!r} is not known: use auto, or an encoding of Python "
                "such as utf-8, latin-1, cp1252, utf-16, gb18030, shift_jis."
            ) from None


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer and the learning rate schedule."""

    section: ClassVar[str] = "optimizer"

    name: str = option("adamw", "update rule", table="jaxgpt.optimizer:OPTIMIZERS")
    lr: float = option(1e-3, "peak learning rate", above=0)
    b1: float = option(0.9, "decay rate of the first moment (momentum)", low=0, high=0.99999)
    b2: float = option(0.95, "decay rate of the second moment", low=0, high=0.99999)
    eps: float = option(1e-8, "epsilon, added to the square root of the second moment", above=0)
    weight_decay: float = option(
        0.1, "decoupled weight decay, on matrices only; ignored by adam", low=0
    )
    moments: str = option(
        "float32",
        "storage format of the moments of matrices: 4, 2 or 1 bytes per number",
        table="jaxgpt.moments:MOMENT_FORMATS",
    )
    clip: float = option(1.0, "maximum global norm of the gradient, 0 = no clipping", low=0)
    schedule: str = option(
        "warmup_cosine", "learning rate schedule", table="jaxgpt.optimizer:SCHEDULES"
    )
    warmup: int | None = option(
        None, f"steps of linear warmup: none = {1 / WARMUP_SHARE:.0%} of train.steps", low=0
    )
    floor: float = option(0.1, "final learning rate, as a fraction of the peak", low=0, high=1)
    decay_share: float = option(
        0.2, "fraction of the run in which warmup_stable_decay decays", above=0, high=1
    )
    matrix_lr: float | None = option(
        None, "peak learning rate of muon for the matrices in blocks: none = lr", above=0
    )
    logit_lr: float = option(
        10.0,
        "learning rate of tables of attention logits (t5, synthesizer_random), as a multiple of lr",
        above=0,
        effective="logit_lr",
    )
    relative_lr: bool = option(
        False,
        "learning rate of adafactor relative to the RMS of each matrix or vector, at least 1e-3, "
        "as T5 was trained",
    )
    train: tuple[str, ...] = option(
        (),
        "parameters to train, by path (stack.layers.*), group (stack) or letters (L*>*), as in "
        "the shell; empty = all",
    )

    def check(self):
        without = resolve_table("jaxgpt.optimizer:OPTIMIZERS_WITHOUT_MOMENTS")
        if self.moments != "float32" and self.name in without:
            rules = resolve_table("jaxgpt.optimizer:OPTIMIZERS")
            suitable = ", ".join(name for name in rules if name not in without)
            raise ConfigError(
                f"optimizer.moments={self.moments!r} with optimizer.name={self.name!r}, which "
                "keeps no moments of matrices: use optimizer.moments=float32, or one of "
                f"{suitable}."
            )
        if self.relative_lr and self.name != "adafactor":
            raise ConfigError(
                f"optimizer.relative_lr=True with optimizer.name={self.name!r}, whose rates are "
                "absolute: use optimizer.name=adafactor, or leave it out."
            )

    def count_warmup(self, steps: int) -> int:
        """Return the steps of warmup in a run of so many steps."""
        return steps // WARMUP_SHARE if self.warmup is None else self.warmup


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters (LoRA) on a frozen base, the model of train.start."""

    section: ClassVar[str] = "lora"

    rank: int = option(
        0,
        "rank of the adapters: every adapted map W becomes W + scale · A B, and only A and B are "
        "trained; 0 = no adapters, all of the model is trained",
        low=0,
    )
    alpha: float = option(
        16.0, "numerator of the scale: alpha / rank, or with rslora alpha / √rank", above=0
    )
    rslora: bool = option(False, "scale by alpha / √rank in place of alpha / rank (rsLoRA)")
    dropout: float = option(
        0.0, "dropout of the inputs of adapters while training", low=0, high=0.99
    )
    targets: tuple[str, ...] = option(
        (),
        "maps to adapt, by name (q, k, v, o, gate, up, down, head, embed) or by path as in the "
        "shell (stack.*.mixer.*); empty = all maps in layers",
    )
    base: str = option(
        "float32",
        "storage format of the frozen base",
        table="jaxgpt.lora:BASE_FORMATS",
    )

    @property
    def scale(self) -> float:
        """What the product of both factors is multiplied by.

        Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023,
        arXiv:2312.03732, theorem 3.2.
        """
        return self.alpha / (self.rank**0.5 if self.rslora else max(self.rank, 1))


@dataclass(frozen=True)
class MeshConfig(Section):
    """The number of devices of each kind of parallelism; -1 takes the remaining ones."""

    section: ClassVar[str] = "mesh"

    data: int = option(
        -1,
        "data parallelism: replicas of the model, each with its part of the batch",
        low=-1,
        is_runtime=True,
    )
    pipe: int = option(
        1, "pipeline parallelism: parts that the layers are divided into", low=-1, is_runtime=True
    )
    fsdp: int = option(
        1, "fully sharded data parallelism: parts of parameters and batch", low=-1, is_runtime=True
    )
    expert: int = option(
        1, "expert parallelism: parts of experts and batch", low=-1, is_runtime=True
    )
    context: int = option(
        1, "context parallelism: parts of the tokens of a row", low=-1, is_runtime=True
    )
    tensor: int = option(
        1,
        "tensor parallelism: parts of heads, feed-forward and vocabulary",
        low=-1,
        is_runtime=True,
    )

    def check(self):
        sizes = {f"mesh.{k}": v for k, v in asdict(self).items()}
        for key, size in sizes.items():
            if size == 0:
                raise ConfigError(
                    f"{key}=0: an axis has at least 1 device, or -1 for the remaining ones."
                )
        rest = [key for key, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ConfigError(
                f"{' and '.join(rest)} are both -1: only one axis can take the remaining devices."
            )


@dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop: objective and loss, duration, intervals."""

    section: ClassVar[str] = "train"

    objective: str = option("causal", "training objective", table="jaxgpt.objectives:OBJECTIVES")
    steps: int = option(2000, "number of optimizer steps", low=1)
    batch: int = option(16, "sequences per step, over all devices", low=1)
    accumulate: int = option(
        0,
        "gradient accumulation: parts of a batch, one after the other, 0 = chosen by platform",
        low=0,
    )
    mask_rate: float = option(
        0.15, "fraction of tokens masked or corrupted (masked, span)", above=0, high=0.9
    )
    span: float = option(3.0, "mean length of a corrupted span, in tokens (span)", low=1)
    balance: float = option(0.01, "weight of the auxiliary load-balancing loss of experts", low=0)
    label_smoothing: float = option(
        0.0, "label smoothing: fraction of the target spread over the vocabulary", low=0, high=0.99
    )
    z_loss: float = option(
        0.0, "z-loss: weight of the squared log partition function (PaLM: 1e-4)", low=0
    )
    loss_chunk: int = option(
        0,
        "tokens per chunk of the softmax over the vocabulary, 0 = chosen by size",
        low=0,
        is_runtime=True,
    )
    start: str = option(
        "",
        "begin with the parameters of another run (its best, or with @latest its latest), of one "
        "of its checkpoints or of a saved model",
    )
    start_missing: str = option(
        "refuse",
        "parameters that train.start does not have, or in another shape: refuse, or init (random)",
        table="jaxgpt.config:START_MISSING",
    )
    eval_every: int = option(250, "steps between evaluations", low=1)
    eval_batches: int = option(0, "batches per evaluation, 0 = all held-out text", low=0)
    patience: int = option(0, "early stopping: evaluations without improvement, 0 = never", low=0)
    best_by: str = option(
        "auto",
        "held-out metric that the best checkpoint and early stopping go by: loss, accuracy, or "
        "auto (accuracy with train.objective=classify, otherwise loss)",
        table="jaxgpt.config:BEST_BY",
    )
    eval_tasks: tuple[str, ...] = option(
        (),
        "benchmarks that are evaluated during training; their files are in data.benchmarks; auto = "
        "blimp, if its files are there",
        table="jaxgpt.evaluate.tasks:TRAINING_TASKS",
        is_runtime=True,
    )
    eval_tasks_every: int = option(
        0, "steps between evaluations of eval_tasks, 0 = eval_every", low=0, is_runtime=True
    )
    eval_tasks_limit: int = option(
        10,
        "questions of each group (paradigm, subject) of eval_tasks, the first ones, 0 = all",
        low=0,
        is_runtime=True,
    )
    log_every: int = option(10, "steps between logged metrics", low=1, is_runtime=True)
    save_every: int = option(250, "steps between checkpoints", low=1, is_runtime=True)
    keep: int = option(
        2,
        "latest checkpoints to keep, in addition to the best one; if the last one is damaged, the "
        "run continues from the one before",
        low=1,
        is_runtime=True,
    )
    on_save_error: str = option(
        "continue",
        "if a checkpoint cannot be saved (full disk, lost mount): continue to the next, or stop",
        table="jaxgpt.config:ON_SAVE_ERROR",
        is_runtime=True,
    )
    sample_every: int = option(
        250, "steps between samples, 0 = only at the end", low=0, is_runtime=True
    )
    on_spike: str = option(
        "stop",
        "answer to a step whose loss or gradient is not finite or far above its mean: stop the "
        "run, skip the step's update, or rollback to the last checkpoint and on with the batches "
        "after the spike",
        table="jaxgpt.config:SPIKE_ACTIONS",
        is_runtime=True,
    )
    spike_threshold: float | None = option(
        None,
        "loss or gradient norm that is a spike, as a multiple of its running mean; 0 = only one "
        "that is not finite; none = 10 with on_spike=skip or rollback, 0 with stop",
        low=0,
        is_runtime=True,
    )
    spike_window: int = option(
        100,
        "steps that the running means of the loss and the gradient norm are taken over; before so "
        "many steps no finite value is a spike",
        low=1,
        is_runtime=True,
    )
    max_spikes: int = option(
        5, "spikes within 1,000 batches after which the next one stops the run", low=0,
        is_runtime=True,
    )  # fmt: skip
    log_norms: int = option(
        0,
        "steps between logged norms of the gradient and the parameters of each layer, 0 = never",
        low=0,
        is_runtime=True,
    )
    profile: str = option(
        "",
        "first:last, steps to trace for TensorBoard and XProf, in the run's plugins/profile",
        is_runtime=True,
    )

    def check(self):
        if self.batch % (self.accumulate or 1):
            near = format_nearest_multiples(self.batch, self.accumulate)
            raise ConfigError(
                f"train.batch={self.batch} is not divisible by train.accumulate={self.accumulate}: "
                f"use train.batch={near}."
            )
        if self.spike_threshold is not None and 0 < self.spike_threshold <= 1:
            raise ConfigError(
                f"train.spike_threshold={self.spike_threshold:g} is at most the mean itself, so "
                "that every other step would be a spike: use a larger multiple, such as 10, or 0 "
                "for values that are not finite alone."
            )
        self.parse_profile()

    @property
    def task_interval(self) -> int:
        """Steps between evaluations of `eval_tasks`."""
        return self.eval_tasks_every or self.eval_every

    @property
    def spike_multiple(self) -> float:
        """`spike_threshold`, or what it is if it is not set."""
        if self.spike_threshold is not None:
            return self.spike_threshold
        return 0.0 if self.on_spike == "stop" else DEFAULT_SPIKE_MULTIPLE

    @property
    def is_guarded(self) -> bool:
        """Whether the training step itself finds spikes, and leaves their updates out."""
        return self.on_spike != "stop" or self.spike_multiple > 0

    def parse_profile(self) -> tuple[int, int]:
        """Return the first and last step of `profile`; (0, 0) if it is empty."""
        if not self.profile:
            return 0, 0
        first, colon, last = self.profile.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise ConfigError(
                f"train.profile={self.profile!r} must be the first and last step to trace, counted "
                "from 1, such as 100:110."
            )
        if int(first) > self.steps:
            raise ConfigError(
                f"train.profile={self.profile!r} begins after the last step, "
                f"train.steps={self.steps}: nothing would be traced."
            )
        return int(first), int(last)


@dataclass(frozen=True)
class PreferenceConfig(Section):
    """How `train.objective=preference` learns from pairs of completions."""

    section: ClassVar[str] = "preference"

    loss: str = option("dpo", "loss of a pair", table="jaxgpt.tuning_losses:PREFERENCE_LOSSES")
    beta: float = option(0.1, "strength of the tie to the reference model", above=0)
    label_smoothing: float = option(
        0.0, "fraction of the pairs taken to be swapped by mistake", low=0, high=0.49
    )


@dataclass(frozen=True)
class DistillConfig(Section):
    """A teacher whose distribution is learned, besides the text (causal, prefix, chat)."""

    section: ClassVar[str] = "distill"

    teacher: str = option(
        "", "any model with the same tokenizer, as `jaxgpt.load` takes it; empty = none"
    )
    temperature: float = option(1.0, "softens both distributions", above=0)
    weight: float = option(
        0.5, "of the divergence from the teacher; the rest is that of the text", low=0, high=1
    )


@dataclass(frozen=True)
class OnlineConfig(Section):
    """How `train.objective=online` learns from rewards of what the model itself writes."""

    section: ClassVar[str] = "online"

    reward: str = option(
        "",
        "function (record, answer) -> number: module:function, file.py:function, or a row of "
        "jaxgpt.rewards:REWARDS",
    )
    group: int = option(8, "answers to each prompt, whose mean reward is the baseline", low=2)
    answer_tokens: int = option(64, "maximum number of tokens of an answer", low=1)
    temperature: float = option(1.0, "of sampling answers", above=0)
    kl: float = option(0.0, "weight of the divergence from the model at the start", low=0)


@dataclass(frozen=True)
class SampleConfig(Section):
    """How text is sampled from a model."""

    section: ClassVar[str] = "sample"

    prompt: str = option("", "text to continue; empty starts a new document", is_runtime=True)
    tokens: int = option(200, "maximum number of tokens to generate", low=1, is_runtime=True)
    temperature: float = option(0.5, "softmax temperature; 0 = greedy", low=0, is_runtime=True)
    top_k: int = option(0, "sample from the k likeliest tokens, 0 = all", low=0, is_runtime=True)
    top_p: float = option(
        0.95,
        "nucleus sampling: total probability of the likeliest tokens to keep",
        above=0,
        high=1,
        is_runtime=True,
    )
    min_p: float = option(
        0.0,
        "keep tokens with at least this probability, relative to the likeliest",
        low=0,
        high=1,
        is_runtime=True,
    )
    repetition_penalty: float = option(
        1.0, "penalty on tokens that occurred before (1 = off)", above=0, is_runtime=True
    )
    presence_penalty: float = option(
        0.0, "subtracted from the logits of tokens that were generated before", is_runtime=True
    )
    frequency_penalty: float = option(
        0.0, "subtracted from a token's logit for every time it was generated", is_runtime=True
    )
    min_tokens: int = option(
        0, "minimum number of tokens before a text may end", low=0, is_runtime=True
    )
    banned: tuple[str, ...] = option((), "words that are never generated", is_runtime=True)
    json_schema: str = option("", "JSON schema that the text follows, as JSON", is_runtime=True)
    regex: str = option("", "regular expression that the text matches", is_runtime=True)
    grammar: str = option("", "Lark grammar that the text follows", is_runtime=True)
    beams: int = option(
        1, "beam search with so many beams, without sampling; 1 = off", low=1, is_runtime=True
    )
    length_penalty: float = option(
        1.0, "beam search: exponent of the length by which scores are divided", is_runtime=True
    )
    stop: tuple[str, ...] = option((), "strings that end the generation", is_runtime=True)
    seed: int = option(0, "random seed of sampling", low=0, high=MAX_SEED, is_runtime=True)
    slide: bool = option(
        False,
        "continue past the context with a sliding window instead of stopping",
        is_runtime=True,
    )

    cache: str = option(
        "model",
        "numbers of the KV cache: model (those of model.dtype) or int8, half the bytes of bfloat16",
        table="jaxgpt.config:CACHES",
        is_runtime=True,
    )

    def check(self):
        if "" in self.stop:
            raise ConfigError(
                f"sample.stop={list(self.stop)} has an empty string, which would end every text "
                "immediately: leave it out."
            )
        if "" in self.banned:
            raise ConfigError(
                f"sample.banned={list(self.banned)} has an empty string, which is in every text: "
                "leave it out."
            )
        given = [name for name in CONSTRAINTS if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"sample.{given[0]} and sample.{given[1]}: give one of them.")
        if self.beams > 1:
            for name in (*CONSTRAINTS, *NO_BEAM_SETTINGS):
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(
                        f"sample.beams={self.beams} searches without sample.{name}: set "
                        "sample.beams=1, or leave it out."
                    )


CONSTRAINTS = ("json_schema", "regex", "grammar")  # settings of a sample, one at most
# Settings that beam search does not have. It ignores those of the sampler, which has defaults.
NO_BEAM_SETTINGS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "banned",
    "slide",
)


@dataclass(frozen=True)
class Config(Section):
    """One complete experiment. With the code it determines the run, bit for bit."""

    name: str = option("run", "name of the run's folder inside `folder`")
    folder: str = option("runs", "folder of all runs", is_runtime=True)
    seed: int = option(
        0, "random seed of initialization, data order and dropout", low=0, high=MAX_SEED
    )
    resume: str = option(
        "auto",
        "auto: resume from the last checkpoint if the config agrees; force: even if it differs",
        table="jaxgpt.config:RESUME_MODES",
        is_runtime=True,
    )
    plugins: tuple[str, ...] = option(
        (),
        "modules, or paths of .py files, that are imported first and add mixers, sources, ...; "
        "see jaxgpt/plugins.py",
        is_runtime=True,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)

    @property
    def run_folder(self) -> str:
        """Return the path of the run's folder."""
        return os.path.join(os.path.expanduser(self.folder), self.name)

    @property
    def logit_lr(self) -> float:
        """`optimizer.logit_lr`, or 1 where it has no effect."""
        return self.optimizer.logit_lr if self.model.has_logit_tables else 1.0

    @property
    def best_by(self) -> str:
        """The held-out metric that picks the best checkpoint: loss or accuracy."""
        by_objective = "accuracy" if self.train.objective == "classify" else "loss"
        return by_objective if self.train.best_by == "auto" else self.train.best_by

    def check(self):
        if not self.name or self.name in (".", "..") or os.sep in self.name:
            raise ConfigError(
                f"name={self.name!r} must be a plain folder name, such as 'gpt_mini'."
            )
        if self.optimizer.count_warmup(self.train.steps) > self.train.steps:
            raise ConfigError(
                f"optimizer.warmup={self.optimizer.warmup} is longer than "
                f"train.steps={self.train.steps}: the learning rate would never reach its peak. "
                f"Set optimizer.warmup={self.train.steps // 10}."
            )
        self._check_objective()
        masks = self.objective.task.count_mask_tokens(self)
        if masks > self.model.first_mask + 1:
            raise ConfigError(
                f"model.mask_token={self.model.mask_token}: the {masks} masks of train.objective="
                f"{self.train.objective} count down from it, so that it must be at least "
                f"{masks - 1}."
            )
        min_vocab = 260 + masks  # 256 bytes, 4 specials
        if self.data.tokenizer in ("train", "bytes") and self.model.vocab < min_vocab:
            extra = f" and the {masks} masks of train.objective={self.train.objective}"
            raise ConfigError(
                f"model.vocab={self.model.vocab} has no room for the 256 bytes and 4 specials"
                f"{extra if masks else ''}: use at least {min_vocab}."
            )

    @property
    def tokenizer_vocab(self) -> int:
        """The largest size of a tokenizer: masks are ids of their own, or some of its ids."""
        has_own_masks = self.model.mask_token is None
        masks = self.objective.task.count_mask_tokens(self) if has_own_masks else 0
        return self.model.vocab - masks

    @property
    def objective(self):
        """The row of OBJECTIVES that `train.objective` names."""
        return resolve_table("jaxgpt.objectives:OBJECTIVES")[self.train.objective]

    def _check_objective(self):
        name, model = self.train.objective, self.model
        if self.objective.family != model.family:
            table = resolve_table("jaxgpt.objectives:OBJECTIVES")
            suitable = [name for name, row in table.items() if row.family == model.family]
            raise ConfigError(
                f"train.objective={name!r} is for model.family={self.objective.family}, and it is "
                f"{model.family!r}: use train.objective={' or '.join(suitable)}."
            )
        if (name == "classify") != bool(model.classes):
            raise ConfigError(
                f"train.objective={name!r} with model.classes={model.classes}: classify needs the "
                "number of classes in the data, the other objectives 0."
            )
        if name == "classify" and self.data.packing != "stream":
            raise ConfigError(
                f"data.packing={self.data.packing!r} with train.objective='classify', which "
                "predicts one class per row: use data.packing=stream, one text per row."
            )
        self._check_tuning()
        if model.documents == "joined" and self.data.packing != "stream":
            raise ConfigError(
                f"data.packing={self.data.packing!r} keeps documents separate, and model.documents="
                "'joined' does not: use data.packing=stream, or model.documents=separate."
            )
        if (name == "prefix") != ("prefix" in model.pattern):
            raise ConfigError(
                f"train.objective={name!r} with model.pattern={','.join(model.pattern)}: "
                "the objective prefix and the pattern prefix must be used together."
            )

    def _check_tuning(self):
        name, train, row = self.train.objective, self.train, self.objective
        if name in ("preference", "online") and self.data.packing != "stream":
            raise ConfigError(
                f"data.packing={self.data.packing!r} with train.objective={name!r}, whose rows are "
                "one record each: use data.packing=stream."
            )
        if self.distill.teacher and not row.can_distill:
            suitable = [
                name for name, row in resolve_table("jaxgpt.objectives:OBJECTIVES").items()
                if row.can_distill
            ]  # fmt: skip
            raise ConfigError(
                f"distill.teacher={self.distill.teacher!r} with train.objective={name!r}, which "
                f"does not predict the next token: use {', '.join(suitable)}."
            )
        owner = "distill.teacher" if self.distill.teacher else f"train.objective={name}"
        for key in ("label_smoothing", "z_loss"):
            if getattr(train, key) and (row.settings or self.distill.teacher):
                raise ConfigError(
                    f"train.{key}={getattr(train, key):g} has no effect with {owner}: leave it out."
                )


SPIKE_ACTIONS = {
    "stop": "end the run with a message",
    "skip": "leave the update out, and go on with the next batch",
    "rollback": "go on from the last checkpoint, with the batches after the spike",
}
BEST_BY = {"auto": "by objective", "loss": "the lowest loss", "accuracy": "the highest accuracy"}
RESUME_MODES = {"auto": "resume if the config agrees", "force": "resume with the new config"}
ON_SAVE_ERROR = {"continue": "train on to the next save", "stop": "end the run with an error"}
CACHES = {"model": "in model.dtype", "int8": "integers, with a scale for each token and head"}
START_MISSING = {"refuse": "name them and stop", "init": "initialize them as in a new run"}

# Renamed keys and values, old -> new. Old ones are still accepted on the command line and in the
# config.json of a run, so that old run folders open and old commands work.
RENAMED_SETTINGS = {
    "train.noise": "train.mask_rate",
    "model.documents=apart": "model.documents=separate",
}
# The values, in a saved config without the setting, of settings whose default was another one.
FORMER_DEFAULTS = {"model.embed_scale": False, "optimizer.logit_lr": 1.0}


# --- reading and writing ---


def load(path: str, assignments: Iterable[str] = ()) -> Config:
    """Run a config file and apply `path=value` assignments.

    Args:
        path: a Python file that defines `config`, or the bare name of one in ./configs or of one
            that comes with jaxgpt.
        assignments: such as ["model.width=512", "data.source=text/*.txt"].

    Raises:
        ConfigError: there is no such file, it defines no config, or a value is invalid.
    """
    found, assignments = find_config(path), list(assignments)
    folder = os.path.dirname(os.path.abspath(found))
    import_plugins(read_plugins(found), list_tables(), folder)
    import_plugins(parse_plugins(assignments) or (), list_tables(), folder)
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
    """Apply `path=value` assignments, all at once, so that only the result must be valid.

    Examples:
        >>> override(Config(), ["model.width=512", "model.heads=8"]).model.sizes["K"]
        64
    """
    assignments = list(assignments)
    import_plugins(parse_plugins(assignments) or (), list_tables())
    tree = to_dict(config)
    values = parse_assignments(assignments)
    if "train.steps" in values and "optimizer.warmup" not in values:
        values["optimizer.warmup"] = _fit_warmup(config, values["train.steps"])
    for key, value in values.items():
        node = tree
        *sections, name = key.split(".")
        for section in sections:
            node = node[section]
        node[name] = value
    return from_dict(type(config), tree)


def _fit_warmup(config: Config, steps: int) -> int | None:
    """Return the warmup for another number of steps: shorter, in proportion, if it is too long."""
    warmup = config.optimizer.warmup
    if warmup is None or warmup <= steps:
        return warmup
    return warmup * steps // config.train.steps


def parse_assignments(assignments: Iterable[str], check_names: bool = False) -> dict[str, Any]:
    """Return the values of `path=value` assignments by key.

    Checks each value alone, which is fast: to check combinations of settings, the modules of the
    model would have to be imported.

    Args:
        check_names: also check the names of registries; not if plugins may add more of them later.

    Raises:
        ConfigError: there is no such setting, or the value has another type, is out of bounds or is
            an unknown name.
    """
    fields, hints = list_fields(Config), list_types(Config)
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals:
            raise ConfigError(f"expected path=value, such as model.width=512; got {assignment!r}.")
        key, text = rename_setting(key, text)
        if key not in hints:
            raise ConfigError(describe_unknown_key(key, hints))
        values[key] = check_field(parse(text, hints[key], key), fields[key], hints[key], key)
        if check_names and fields[key].metadata["table"]:
            known = dict.fromkeys(list_choices(fields[key].metadata["table"]))
            for name in values[key] if isinstance(values[key], tuple) else (values[key],):
                if name is not None:
                    choose(known, name, key)
    return values


def list_tables() -> list[str]:
    """Return all registries, as "module:NAME"."""
    named = [f.metadata["table"] for f in list_fields(Config).values()]
    return [*dict.fromkeys([*filter(None, named), *OTHER_TABLES])]


def rename_setting(key: str, value: Any) -> tuple[str, Any]:
    """Return the present key and value of a setting that may have been renamed."""
    key = RENAMED_SETTINGS.get(key, key)
    renamed = RENAMED_SETTINGS.get(f"{key}={value}")
    return key, renamed.partition("=")[2] if renamed else value


def _rename_settings(tree: Any) -> Any:
    """Apply `rename_setting` to the nested dicts of a saved config; leave malformed ones as is."""
    if not isinstance(tree, dict):
        return tree
    tree = {name: dict(v) if isinstance(v, dict) else v for name, v in tree.items()}
    for old in (setting.partition("=")[0] for setting in RENAMED_SETTINGS):
        section, name = old.split(".")
        values = tree.get(section)
        if isinstance(values, dict) and name in values:
            key, value = rename_setting(old, values.pop(name))
            values[key.split(".")[1]] = value
    return tree


def _drop_unused(tree: Any) -> None:
    """Remove settings without effect from a saved config: older versions accepted them."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        return
    patterns, sparse = model.get("pattern", ("full",)), model.get("sparse")
    if isinstance(sparse, dict) and isinstance(patterns, list):
        used = {name for name, pattern in PATTERN_OF_SIZE.items() if pattern in patterns}
        if {*patterns} <= {"full", "prefix", *PATTERN_OF_SIZE.values()}:
            unused = PATTERN_OF_SIZE.keys() - used
            model["sparse"] = {k: v for k, v in sparse.items() if k not in unused}
    counts = [model.get(key) for key in ("layers", "encoder_layers")]
    most = max((n for n in counts if isinstance(n, int)), default=0)
    for section, names in ((model, PER_LAYER), (model.get("rope"), ROPE_PER_LAYER)):
        if isinstance(section, dict) and most > 0:
            cut = {k: section[k][:most] for k in names if isinstance(section.get(k), list)}
            section.update(cut)


def _restore_defaults(tree: Any) -> None:
    """Add `FORMER_DEFAULTS` to the nested dicts of a saved config."""
    for key, value in FORMER_DEFAULTS.items():
        section, name = key.split(".")
        if isinstance(tree, dict) and isinstance(tree.get(section), dict):
            tree[section].setdefault(name, value)


FORMAT = 1  # of run folders; raised when an older version could not read them


def to_json(config: Config) -> str:
    """Serialize a config, with the versions that write it; `from_json` is the inverse."""
    versions = {
        "format": FORMAT,
        "jaxgpt": jaxgpt.__version__,
        "jax": importlib.metadata.version("jax"),
    }
    tree = json.loads(json.dumps({"versions": versions, **to_dict(config)}))
    versions["checksum"] = _hash_tree(tree)
    return json.dumps({**tree, "versions": versions}, indent=2) + "\n"


def check_json(text: str, where: str = "config.json") -> bool:
    """Check that the output of `to_json` is as it was written.

    Args:
        where: the path of the file.

    Returns:
        Whether it has a checksum: older versions wrote none.

    Raises:
        ConfigError: it has changed.
        ValueError: it is no JSON.
    """
    tree = json.loads(text)
    versions = tree.get("versions") if isinstance(tree, dict) else None
    expected = versions.pop("checksum", None) if isinstance(versions, dict) else None
    if expected is not None and expected != _hash_tree(tree):
        raise ConfigError(
            f"{where} is not as it was written: its checksum is {_hash_tree(tree)}, and it was "
            f"{expected}. Put the file back; or delete its line with the checksum, if it was "
            "changed on purpose."
        )
    return expected is not None


def _hash_tree(tree: Any) -> str:
    canonical = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def from_json(
    text: str, where: str = "config.json", plugins: Sequence[str] | None = None
) -> Config:
    """Parse the output of `to_json`, also of older versions.

    Args:
        where: the path of the file.
        plugins: imported in place of those that the file names, which are imported as far as that
            is safe; see plugins.py.

    Raises:
        ConfigError: a setting is invalid, a plugin is missing, or the format is newer.
    """
    try:
        tree = _rename_settings(json.loads(text))
        _restore_defaults(tree)
        _drop_unused(tree)
        if isinstance(tree, dict):
            _check_format(tree.pop("versions", {}))
            if plugins is None:
                recorded = [str(name) for name in tree.get("plugins", ())]
                import_recorded_plugins(recorded, list_tables(), os.path.dirname(where) or ".")
            else:
                import_plugins(plugins, list_tables())
                tree["plugins"] = plugins
        return from_dict(Config, tree)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not a saved config: {error}.") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_format(versions: Any) -> None:
    """Raise ConfigError if a newer version, whose format this one cannot read, wrote the file."""
    found = versions.get("format", 0) if isinstance(versions, dict) else versions
    if not isinstance(found, int) or found > FORMAT:
        by = versions.get("jaxgpt", "?") if isinstance(versions, dict) else "?"
        raise ConfigError(
            f"versions.format={found!r} was written by jaxgpt {by}; this is {jaxgpt.__version__}, "
            f"which reads up to format {FORMAT}: install a newer jaxgpt."
        )


def list_differences(old: Config, new: Config) -> list[str]:
    """Return the settings, with both values, that make two configs learn something different.

    Names and paths are compared by what they stand for. What a source contains is not known here:
    its text is compared by its fingerprint when a run is resumed.
    """
    fields = {key: f for key, f in list_fields(Config).items() if key not in ("name", DATA_KEY)}
    fixed = [
        (key, f.metadata["effective"] or key)
        for key, f in fields.items()
        if not f.metadata["is_runtime"]
    ]
    pairs = [(key, used, get(old, used), get(new, used)) for key, used in fixed]
    return [
        f"{key}: {a!r} -> {b!r}"
        for key, used, a, b in pairs
        if a != b and _resolve(old, used) != _resolve(new, used)
    ]


DATA_KEY = "data.source"
PATH_KEYS = ("data.tokenizer", "train.start", "distill.teacher")


def _resolve(config: Config, key: str) -> Any:
    """Return what a setting stands for."""
    value = get(config, key)
    if key == "optimizer.warmup":
        return config.optimizer.count_warmup(config.train.steps)
    if key == "train.best_by":
        return config.best_by
    if key in PATH_KEYS and value:
        return os.path.realpath(os.path.expanduser(value))
    return value


def describe(section: str = "") -> str:
    """List the settings with their defaults, meanings and choices: the body of `--help`."""
    lines = []
    for key, f in list_fields(Config).items():
        if not key.startswith(section):
            continue
        value: Any = f.default
        shown = {None: "none", "": "''", (): "''"}.get(value, value)
        lines.append(f"  {f'{key}={shown}':34} {f.metadata['doc']}")
        if f.metadata["table"]:
            lines.append(f"{'':37}{' | '.join(list_choices(f.metadata['table']))}")
    return "\n".join(lines)
