"""The cost of a training step by XLA's cost analysis: no time is measured, so there is no noise.

FLOPs, products and arrays are those of the traced program, before the compiler rewrites it, so
neither the flags with which tests compile nor a new compiler change them. XLA counts the body of a
loop once; to count everything, layers are unrolled and the loss is one chunk.
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
from jaxgpt.config import Config, ConfigError, load, override
from jaxgpt.model import count_params
from jaxgpt.planning.hlo import add_trip_counts, list_collectives
from jaxgpt.planning.step import lower_step
from jaxgpt.trainer.speed import flops_per_token

CONFIGS = {
    "tiny": config("optimizer.name=adamw", "train.accumulate=1"),
    "gpt_mini": load(
        str(pathlib.Path(__file__).parent.parent / "configs" / "gpt_mini.py"),
        ["train.accumulate=1"],
    ),
}


@functools.cache
def lower(name: str, *assignments: str):
    return lower_step(override(CONFIGS[name], assignments), jax.devices()[:1]).lowered


def make_loop_free_settings(cfg: Config) -> tuple[str, ...]:
    """Return settings without loops, so that each operation occurs as often as it runs."""
    tokens = cfg.train.batch * cfg.model.context
    return (f"model.unroll={cfg.model.layers}", f"train.loss_chunk={tokens}", "model.kernel=dense")


def count_costs(name: str, *assignments: str) -> dict[str, float]:
    cfg = override(CONFIGS[name], assignments)
    return lower(name, *assignments, *make_loop_free_settings(cfg)).cost_analysis()


def estimate_elementwise(cfg: Config) -> dict[str, int]:
    """Return bounds on elementwise operations by part: elements times operations per element."""
    m, d = cfg.model, cfg.model.sizes
    N = cfg.train.batch * m.context
    return {
        # Mask and softmax (maximum, difference, exponential, sum, quotient), once more for the
        # backward pass, and the gradient.
        "attention weights": 20 * m.layers * d["H"] * N * m.context,
        # Rotation by RoPE, scaling (twice), and their gradients.
        "queries and keys": 12 * m.layers * N * (d["H"] + d["G"]) * d["K"],
        # silu(gate) * up, once more for the backward pass, and the gradients of both.
        "feed-forward": 20 * m.layers * N * d["F"],
        # Two norms and two residuals a layer, a final norm; a norm, recomputed, and its gradient
        # take 19.
        "residual stream": 41 * (m.layers + 1) * N * d["D"],
        # Log-softmax, the prediction and its comparison, and the gradient.
        "logits": 7 * N * d["V"],
        # Clipping, two moments, decay, the step.
        "optimizer": 23 * count_params(m)["total"],
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_flops_of_a_step_equal_the_formula_plus_few_elementwise_operations(name):
    cfg = CONFIGS[name]
    products = flops_per_token(cfg.model) * cfg.train.batch * cfg.model.context
    rest = sum(estimate_elementwise(cfg).values())
    flops = count_costs(name)["flops"]
    assert products + 0.85 * rest < flops < products + rest


def test_other_operations_are_under_one_percent_of_a_step_of_gpt_mini():
    cfg = CONFIGS["gpt_mini"]
    products = flops_per_token(cfg.model) * cfg.train.batch * cfg.model.context
    assert count_costs("gpt_mini")["flops"] < 1.01 * products


def test_the_flop_count_includes_recomputation():
    cfg = CONFIGS["gpt_mini"]
    products = flops_per_token(cfg.model) * cfg.train.batch * cfg.model.context
    recomputed = (
        count_costs("gpt_mini", "model.remat=full")["flops"] - count_costs("gpt_mini")["flops"]
    )
    vocabulary = 6 * cfg.model.vocab * cfg.model.width * cfg.train.batch * cfg.model.context
    # The forward pass of the layers, one third of their products, without the last product of each,
    # whose result the backward pass does not need.
    assert 0.25 < recomputed / (products - vocabulary) < 1 / 3


def test_every_layer_costs_the_same():
    shallow, deeper, deepest = (
        count_costs("tiny", f"model.layers={n}")["flops"] for n in (2, 4, 12)
    )
    assert (deepest - shallow) / 10 == pytest.approx((deeper - shallow) / 2, rel=1e-6)


# --- products and arrays; those kept for the backward pass: model/test_saved_activations.py ---


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_multiplies_three_times_for_each_product_of_the_model(name):
    cfg = override(CONFIGS[name], ["model.layers=1"])
    program = lower(name, "model.layers=1", *make_loop_free_settings(cfg)).as_text()
    # Four maps of attention, its logits and averages, three maps of a gated feed-forward, and the
    # vocabulary: each once forward and twice backward, and none of them recomputed.
    assert program.count("stablehlo.dot_general") == 3 * (4 + 2 + 3 + 1)


def find_arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Return (dtype, shape) of all arrays in a program."""
    return set(map(parse_array, re.findall(r"tensor<(?:\d+x)+\w+>", text)))


def parse_array(kind: str) -> tuple[str, tuple[int, ...]]:
    """Parse "tensor<2x3xf32>" to ("f32", (2, 3))."""
    *shape, dtype = kind.removeprefix("tensor<").removesuffix(">").split("x")
    return dtype, tuple(map(int, shape))


def find_max_logits(name: str, *assignments: str) -> int:
    """Return the size of the largest array of logits in a program, in elements."""
    cfg = override(CONFIGS[name], assignments)
    V, D = cfg.model.vocab, cfg.model.width
    tables = {(V, D), (D, V), (V,)}
    shapes = {shape for _, shape in find_arrays(lower(name, *assignments).as_text())}
    return max(math.prod(shape) for shape in shapes - tables if V in shape)


def test_the_logits_of_all_tokens_are_never_materialized_at_once():
    cfg = CONFIGS["gpt_mini"]
    N, V = cfg.train.batch * cfg.model.context, cfg.model.vocab
    assert find_max_logits("gpt_mini") == N * V // 8  # chunks of 512 tokens
    assert find_max_logits("gpt_mini", f"train.loss_chunk={N}") == N * V  # the test detects them


def test_a_chunked_loss_takes_the_memory_of_one_chunk():
    def measure_temporary_bytes(chunk):
        settings = "model.vocab=4096", f"train.loss_chunk={chunk}"
        return lower("tiny", *settings).compile().memory_analysis().temp_size_in_bytes

    # At least the float32 logits of the tokens that are not in the chunk.
    assert measure_temporary_bytes(128) - measure_temporary_bytes(32) > 4 * (128 - 32) * 4096


@pytest.mark.parametrize("kernel", ["auto", "dense", "blockwise"])
def test_a_bfloat16_model_multiplies_in_bfloat16(kernel):
    text = lower("gpt_mini", "model.dtype=bfloat16", f"model.kernel={kernel}").as_text()
    operands = re.findall(r"dot_general.* : \((\S+), (\S+)\) -> ", text)
    assert {dtype for pair in operands for dtype, _ in map(parse_array, pair)} == {"bf16"}
    assert len(operands) > 20


def test_compiled_matrix_products_have_a_layout_fast_on_cpus():
    # In the compiled step, layer by layer: the compiler must not move transpositions into
    # products (`products.transpose_copy`), nor duplicate RoPE's sines for all uses.
    text = lower("gpt_mini", "train.batch=4", "model.unroll=6").compile().as_text()
    flat = re.findall(r"= f32\[\d+,\d+\]\S* dot\(.*lhs_contracting_dims={(\d)}", text)
    assert len(flat) > 6 * 7 * 3  # seven maps of a layer, forward and both gradients
    assert set(flat) == {"1"}
    assert text.count(" sine(") == 1


# --- program length: compilations are counted in trainer/test_loop.py ---


def test_the_length_of_a_program_does_not_depend_on_the_number_of_layers():
    shallow, deep = (len(lower("tiny", f"model.layers={n}").as_text()) for n in (12, 48))
    assert deep == pytest.approx(shallow, rel=0.01)


# --- parsing programs for TPUs, which CI cannot compile ---

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


def test_a_program_for_a_tpu_is_parsed_with_its_loops():
    text = add_trip_counts(PROGRAM)
    stats = tpu.analyze_program(
        text, override(CONFIGS["tiny"], ["model.layers=12", "model.context=1024"])
    )
    assert stats.cycles["fusion"] == 12 * 5  # and nothing for instructions inside it
    assert stats.cycles["copy"] == 12 * 7
    assert stats.slowest[0].name == "copy.3"
    assert stats.copies == {"f32[1024,1024]": 12 * 4 * 2**20}
    assert stats.kernels == {"splash": 12}
    assert stats.scores == ["f32[2,3,1024,1024]"]
    assert stats.saved == {"bf16[12,64,32768]": 1}  # the other has the size of a parameter
    assert [(c.kind, c.times) for c in list_collectives(text)] == [("all-reduce", 12)]
    # One slice of the stack, the copy, the kernel's input and output, the sum, the condition.
    square = 4 * 2**20
    assert stats.traffic == 12 * (square + square + 2 * square + 64 + 5)


def test_a_kernel_that_runs_twice_costs_twice():
    cfg = override(CONFIGS["tiny"], ["model.layers=3", "model.width=512", "model.heads=4"])
    once = {"splash_mha_fwd_residuals": 3, "splash_mha_dq": 3, "splash_mha_dkv": 3}
    # 3 layers of 9 products [T K] x [K T] of 4 heads of 128, half of each, for 100 tokens.
    flops = 3 * 9 * (2 * 100 * cfg.model.context * 512) / 2
    assert tpu.estimate_attention_seconds(cfg, 100, 1e6, Counter(once)) == pytest.approx(
        flops / 1e6
    )
    recomputed = once | {"splash_mha_fwd_residuals": 6}
    twice = tpu.estimate_attention_seconds(cfg, 100, 1e6, Counter(recomputed))
    assert twice == pytest.approx(11 / 9 * flops / 1e6)


def test_without_the_compiler_the_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="libtpu"):
        tpu.main(["--models", "gpt2_124m", "--chips", "v5e"])
