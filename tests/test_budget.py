"""What a training step may cost, by XLA's own count: no time is measured, so nothing here is noisy.

FLOPs and bytes are those of the traced program, before any machine's compiler rewrites it, and so
the flags with which tests compile do not change them. XLA counts a loop's body once; for a count of
everything, layers are unrolled and the loss is one chunk.
"""

import functools
import math
import pathlib
import re
import sys
from collections import Counter

import jax
import pytest
from tiny_runs import config

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks are not installed

from benchmarks import tpu
from benchmarks.hlo import collectives
from benchmarks.step import lower_step
from jaxgpt.config import Config, ConfigError, load, override
from jaxgpt.model import count_params
from jaxgpt.trainer.speed import flops_per_token

CONFIGS = {
    "tiny": config("optimizer.name=adamw", "train.accumulate=1"),
    "gpt_mini": load(
        str(pathlib.Path(__file__).parent.parent / "configs" / "gpt_mini.py"),
        ["train.accumulate=1"],
    ),
}


@functools.cache
def lowered(name: str, *assignments: str):
    return lower_step(override(CONFIGS[name], assignments), jax.devices()[:1]).lowered


def whole(cfg: Config) -> tuple[str, ...]:
    """Settings with which no loop is left, and every operation stands there as often as it runs."""
    tokens = cfg.train.batch * cfg.model.context
    return (f"model.unroll={cfg.model.layers}", f"train.loss_chunk={tokens}", "model.kernel=dense")


def counted(name: str, *assignments: str) -> dict[str, float]:
    cfg = override(CONFIGS[name], assignments)
    return lowered(name, *assignments, *whole(cfg)).cost_analysis()


def besides_products(cfg: Config) -> dict[str, int]:
    """Elements that are worked on one by one, by part, times the operations that each may cost."""
    m, d = cfg.model, cfg.model.sizes
    N = cfg.train.batch * m.context
    return {
        # Mask and softmax (maximum, difference, exponential, sum, quotient), once more for the
        # backward pass, and the gradient.
        "weights of attention": 20 * m.layers * d["H"] * N * m.context,
        # Turned by RoPE, scaled (twice), and back.
        "queries and keys": 12 * m.layers * N * (d["H"] + d["G"]) * d["K"],
        # silu(gate) * up, once more for the backward pass, and the gradients of both.
        "feed-forward": 20 * m.layers * N * d["F"],
        # Two norms and two residuals a layer, a norm at the end; a norm, once more, and its
        # gradient take 19.
        "stream": 41 * (m.layers + 1) * N * d["D"],
        # Log-softmax, the guess and its check, and the gradient.
        "scores": 7 * N * d["V"],
        # Clipping, two moments, decay, the step.
        "optimizer": 23 * count_params(m)["total"],
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_multiplies_what_the_formula_says_and_little_else(name):
    cfg = CONFIGS[name]
    products = flops_per_token(cfg.model) * cfg.train.batch * cfg.model.context
    rest = sum(besides_products(cfg).values())
    flops = counted(name)["flops"]
    assert products + 0.85 * rest < flops < products + rest


def test_all_else_is_under_one_percent_of_a_step_of_gpt_mini():
    cfg = CONFIGS["gpt_mini"]
    products = flops_per_token(cfg.model) * cfg.train.batch * cfg.model.context
    assert counted("gpt_mini")["flops"] < 1.01 * products


def test_the_budget_sees_what_is_computed_twice():
    cfg = CONFIGS["gpt_mini"]
    products = flops_per_token(cfg.model) * cfg.train.batch * cfg.model.context
    again = counted("gpt_mini", "model.remat=full")["flops"] - counted("gpt_mini")["flops"]
    vocabulary = 6 * cfg.model.vocab * cfg.model.width * cfg.train.batch * cfg.model.context
    # The forward pass of the layers, one third of their products, less the last of each: what it
    # makes is not needed again.
    assert 0.25 < again / (products - vocabulary) < 1 / 3


def test_every_layer_costs_the_same():
    few, more, many = (counted("tiny", f"model.layers={n}")["flops"] for n in (2, 4, 12))
    assert (many - few) / 10 == pytest.approx((more - few) / 2, rel=1e-6)


# --- bytes ---

# Bytes read and written if nothing were fused, per step. They are not what a machine moves, but
# they grow with every array that is made: a float32 copy, a mask for each layer, a transposition.
# The middle of two releases of jax: 0.10 makes 0.4% less of it, 0.11 as much more.
BYTES = {"tiny": 56_990_000, "gpt_mini": 39_860_000_000}


@pytest.mark.parametrize("name", BYTES)
def test_no_arrays_are_made_that_were_not_made_before(name):
    assert counted(name)["bytes accessed"] == pytest.approx(BYTES[name], rel=0.01)


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of everything in a program."""
    return set(map(array, re.findall(r"tensor<(?:\d+x)+\w+>", text)))


def array(kind: str) -> tuple[str, tuple[int, ...]]:
    """("f32", (2, 3)) of "tensor<2x3xf32>"."""
    *shape, dtype = kind.removeprefix("tensor<").removesuffix(">").split("x")
    return dtype, tuple(map(int, shape))


def scores(name: str, *assignments: str) -> int:
    """The most scores of tokens for the vocabulary that are held at once, in numbers."""
    cfg = override(CONFIGS[name], assignments)
    V, D = cfg.model.vocab, cfg.model.width
    tables = {(V, D), (D, V), (V,)}
    found = {shape for _, shape in arrays(lowered(name, *assignments).as_text())}
    return max(math.prod(shape) for shape in found - tables if V in shape)


def test_the_scores_of_all_tokens_are_never_held_at_once():
    cfg = CONFIGS["gpt_mini"]
    N, V = cfg.train.batch * cfg.model.context, cfg.model.vocab
    assert scores("gpt_mini") == N * V // 8  # chunks of 512 tokens
    assert scores("gpt_mini", f"train.loss_chunk={N}") == N * V  # so that this test can see them


def test_chunks_of_the_loss_take_the_memory_of_a_chunk():
    def temporary(chunk):
        settings = "model.vocab=4096", f"train.loss_chunk={chunk}"
        return lowered("tiny", *settings).compile().memory_analysis().temp_size_in_bytes

    # At least the scores themselves, in float32, for the tokens that are not in the chunk.
    assert temporary(128) - temporary(32) > 4 * (128 - 32) * 4096


@pytest.mark.parametrize("kernel", ["auto", "dense", "blockwise"])
def test_a_bfloat16_model_multiplies_in_bfloat16(kernel):
    text = lowered("gpt_mini", "model.dtype=bfloat16", f"model.kernel={kernel}").as_text()
    operands = re.findall(r"dot_general.* : \((\S+), (\S+)\) -> ", text)
    assert {dtype for pair in operands for dtype, _ in map(array, pair)} == {"bf16"}
    assert len(operands) > 20


def test_compiled_products_suit_a_cpu():
    # What the compiler makes of a step, layer by layer: it must not move transpositions into
    # products (`layers.columns`), nor RoPE's sines to all who use them.
    text = lowered("gpt_mini", "train.batch=4", "model.unroll=6").compile().as_text()
    flat = re.findall(r"= f32\[\d+,\d+\]\S* dot\(.*lhs_contracting_dims={(\d)}", text)
    assert len(flat) > 6 * 7 * 3  # seven maps of a layer, forward and both gradients
    assert set(flat) == {"1"}
    assert text.count(" sine(") == 1


# --- length: compilations are counted in trainer/test_loop.py ---


def test_a_program_is_no_longer_for_more_layers():
    shallow, deep = (len(lowered("tiny", f"model.layers={n}").as_text()) for n in (12, 48))
    assert deep == pytest.approx(shallow, rel=0.01)


# --- the reader of programs for TPUs, which CI can not make ---

PROGRAM = """HloModule step, num_partitions=4

%fused (p: f32[2,8]) -> f32[2,8] {
  ROOT %inner = f32[2,8]{1,0} copy(%p), backend_config={"estimated_cycles":"1000"}
}

%condition (p: (s32[])) -> pred[] {
  %many = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%turn, %many), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %stack = f32[12,1024,1024]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %near = f32[1024,1024]{1,0:T(8,128)S(1)} fusion(%stack), calls=%fused, x={"estimated_cycles":"5"}
  %copy.3 = f32[1024,1024]{0,1:T(8,128)} copy(%near), x={"estimated_cycles":"7"}
  %splash.2 = f32[1024,1024]{1,0} custom-call(%copy.3), custom_call_target="tpu_custom_call"
  %sum = f32[2,8]{1,0} all-reduce(%near), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (a: f32[2,8]) -> f32[2,8] {
  %weights = f32[2,3,1024,1024]{3,2,1,0} bitcast(%b)
  %a = f32[12,1024,1024]{2,1,0} parameter(0)
  %w = (s32[], f32[12,1024,1024]{2,1,0}, bf16[12,64,32768]{2,1,0}) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_program_for_a_tpu_is_read_with_its_loops():
    text = tpu.with_turns(PROGRAM)
    this = tpu.read(text, override(CONFIGS["tiny"], ["model.layers=12", "model.context=1024"]))
    assert this.cycles["fusion"] == 12 * 5  # and nothing for what is inside of it
    assert this.cycles["copy"] == 12 * 7
    assert this.slowest[0].name == "copy.3"
    assert this.copies == {"f32[1024,1024]": 12 * 4 * 2**20}
    assert this.kernels == {"splash": 12}
    assert this.scores == ["f32[2,3,1024,1024]"]
    assert this.kept == {"bf16[12,64,32768]": 1}  # the other is as large as a parameter
    assert [(c.kind, c.times) for c in collectives(text)] == [("all-reduce", 12)]
    # A turn of the stack, the copy, which the kernel reads, what it gives, the sum, the condition.
    square = 4 * 2**20
    assert this.traffic == 12 * (square + square + 2 * square + 64 + 5)


def test_a_kernel_that_runs_again_costs_again():
    cfg = override(CONFIGS["tiny"], ["model.layers=3", "model.width=512", "model.heads=4"])
    once = {"splash_mha_fwd_residuals": 3, "splash_mha_dq": 3, "splash_mha_dkv": 3}
    # 3 layers of 9 products [T K] x [K T] of 4 heads of 128, half of each, for 100 tokens.
    flops = 3 * 9 * (2 * 100 * cfg.model.context * 512) / 2
    assert tpu.attention_seconds(cfg, 100, 1e6, Counter(once)) == pytest.approx(flops / 1e6)
    again = once | {"splash_mha_fwd_residuals": 6}
    more = tpu.attention_seconds(cfg, 100, 1e6, Counter(again))
    assert more == pytest.approx(11 / 9 * flops / 1e6)


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch):
    def missing(name):
        raise tpu.PackageNotFoundError(name)

    monkeypatch.setattr(tpu, "version", missing)
    with pytest.raises(ConfigError, match="libtpu"):
        tpu.main(["--models", "gpt2_124m", "--chips", "v5e"])
