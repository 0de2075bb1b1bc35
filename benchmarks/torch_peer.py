"""What PyTorch runs in benchmarks/speed.py: models of transformers in an ordinary training loop.

The autocast is that of jaxgpt: float32 parameters, matrix products in the dtype of the case
(autocast), AdamW that decays matrices, gradients clipped by their global norm. Attention is
`scaled_dot_product_attention`. "compile" gives the model and its loss to `torch.compile`; where
there are more than 24 layers, each block, since compiling the whole would take minutes.
"""

import contextlib
import gc
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch.nn import functional

from benchmarks.worker import Case, Contestant, Side, count_cores, serve_pipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANY_LAYERS = 24


def draw_normal(case: Case, *shape: int, **more) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPES[case.dtype], **more)


def autocast(case: Case):
    if case.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, DTYPES[case.dtype])


def make_model(case: Case):
    """A model of transformers of the same shape."""
    if case.is_llama:
        config: Any = transformers.LlamaConfig(
            vocab_size=case.V, hidden_size=case.D, intermediate_size=case.F,
            num_hidden_layers=case.L, num_attention_heads=case.H, num_key_value_heads=case.G,
            head_dim=case.K, max_position_embeddings=case.T, tie_word_embeddings=True,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=case.V, n_positions=case.T, n_embd=case.D, n_layer=case.L, n_head=case.H,
            n_inner=case.F, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)  # nothing ends early
    torch.manual_seed(0)
    with torch.device(DEVICE):
        make = transformers.AutoModelForCausalLM.from_config
        return make(config, attn_implementation="sdpa", dtype=torch.float32)


def count_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())  # a tied table once


def make_batch(case: Case) -> torch.Tensor:
    return torch.randint(case.V, (2, case.B, case.T), device=DEVICE)


# --- training ---


def make_loss_fn(model, case: Case, is_compiled: bool) -> Callable:
    """(tokens, targets) -> mean loss."""

    def loss(tokens, targets):
        scores = model(input_ids=tokens, use_cache=False).logits
        return functional.cross_entropy(scores.view(-1, case.V).float(), targets.view(-1))

    if not is_compiled:
        return loss
    if case.L <= MANY_LAYERS:
        return torch.compile(loss)
    for block in model.model.layers if case.is_llama else model.transformer.h:
        block.compile()
    return loss


def make_adamw(model) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)


def make_step(case: Case, is_compiled: bool) -> Contestant:
    model = make_model(case).train()
    loss, optimizer = make_loss_fn(model, case, is_compiled), make_adamw(model)
    tokens, targets = make_batch(case)

    def run():
        with autocast(case):
            value = loss(tokens, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return Contestant(run, count_parameters(model))


def make_lora_step(case: Case) -> Contestant:
    """A step of peft on the modules that the case's `lora` settings name."""
    import peft

    lora = case.config["lora"]
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    targets = [names.get(x, f"{x}_proj") for x in lora["targets"]]
    config = peft.LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=targets)
    model = peft.get_peft_model(make_model(case), config).train()
    loss, tokens_and_targets = make_loss_fn(model, case, False), make_batch(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    more = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    optimizer = torch.optim.AdamW(trained, **more)

    def run():
        with autocast(case):
            value = loss(*tokens_and_targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return Contestant(run, sum(p.numel() for p in trained))


def make_forward(case: Case, is_compiled: bool) -> Contestant:
    model = make_model(case).eval()
    loss = make_loss_fn(model, case, is_compiled)
    tokens, targets = make_batch(case)

    def run():
        with torch.no_grad(), autocast(case):
            return loss(tokens, targets)

    return Contestant(run, count_parameters(model))


def make_optimizer_step(case: Case) -> Contestant:
    """Clips and moves the parameters."""
    model = make_model(case)
    optimizer = make_adamw(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)

    def run():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Contestant(run, count_parameters(model))


# --- parts of a step ---


def make_matmul(case: Case, *sizes: int) -> Contestant:
    rows, inner, columns = sizes or (case.N, case.D, case.F)
    x, w = draw_normal(case, rows, inner), draw_normal(case, inner, columns)
    return Contestant(lambda: x @ w)


def make_copy(case: Case, numbers: int) -> Contestant:
    x, y = torch.ones(numbers, device=DEVICE), torch.ones(numbers, device=DEVICE)
    return Contestant(lambda: y.copy_(x))


def make_dense_products(case: Case) -> Contestant:
    """The products of one block with its matrices, forward and backward, and nothing else."""
    given = [
        (draw_normal(case, case.N, n), draw_normal(case, n, m), draw_normal(case, case.N, m))
        for n, m in case.products
    ]
    return Contestant(lambda: [(x @ w, d @ w.T, x.T @ d) for x, w, d in given])


def make_attention(case: Case, is_gradient: bool) -> Contestant:
    shapes = [(case.B, heads, case.T, case.K) for heads in (case.H, case.G, case.G)]
    given = [draw_normal(case, *shape, requires_grad=is_gradient) for shape in shapes]
    d = draw_normal(case, *shapes[0])

    def forward():
        return functional.scaled_dot_product_attention(
            *given, is_causal=True, enable_gqa=case.H != case.G
        )

    return Contestant(
        lambda: torch.autograd.grad(forward(), given, d) if is_gradient else forward()
    )


def make_loss(case: Case, is_compiled: bool) -> Contestant:
    """The vocabulary's loss and its gradient in hidden states and table."""
    hidden = draw_normal(case, case.N, case.D, requires_grad=True)
    table = (torch.randn(case.V, case.D, device=DEVICE) * 0.02).requires_grad_()
    _, targets = make_batch(case)

    def plain(hidden, table):
        with autocast(case):
            scores = functional.linear(hidden, table)
        return functional.cross_entropy(scores.float(), targets.view(-1))

    value = torch.compile(plain) if is_compiled else plain
    return Contestant(lambda: torch.autograd.grad(value(hidden, table), (hidden, table)))


# --- everything else ---


def make_decode(case: Case, rows: int, cache: str) -> Contestant:
    model = make_model(case).eval().to(DTYPES[case.dtype])
    tokens = torch.randint(case.V, (rows, case.prompt), device=DEVICE)
    how = dict(max_new_tokens=case.new, min_new_tokens=case.new, do_sample=False)

    def run():
        with torch.inference_mode():
            mask = torch.ones_like(tokens)
            out = model.generate(tokens, attention_mask=mask, cache_implementation=cache, **how)
        assert out.shape[1] == case.prompt + case.new
        return out

    return Contestant(run, count_parameters(model))


def make_tokenizer(case: Case) -> Contestant:
    """The vocabulary of the other side in transformers."""
    from benchmarks.tokenizer import make_corpus

    texts = [document.decode(errors="replace") for document in make_corpus(4)[0]]
    path = os.path.join(case.scratch, "tokenizer.json")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    return Contestant(lambda: fast(texts)["input_ids"])


def free_memory() -> None:
    gc.collect()
    torch.compiler.reset()  # else what is compiled keeps its model
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def read_peak_bytes() -> int:
    """Bytes held at most since this was last asked."""
    if DEVICE == "cpu":
        return 0
    bytes_held = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return bytes_held


def synchronize(_) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_side() -> Side:
    is_cpu = DEVICE == "cpu"
    if is_cpu:
        torch.set_num_threads(count_cores())
    square, numbers = (2048, 2**26) if is_cpu else (8192, 2**29)

    def both(make: Callable) -> dict[str, Callable[[Case], Contestant]]:
        return {"torch eager": partial(make, is_compiled=False),
                "torch compile": partial(make, is_compiled=True)}  # fmt: skip

    def by_cache(rows: int) -> dict[str, Callable[[Case], Contestant]]:
        return {f"torch {cache} cache": partial(make_decode, rows=rows, cache=cache)
                for cache in ("dynamic", "static")}  # fmt: skip

    return Side(
        makers={
            "matmul, square": {
                "torch eager": lambda case: make_matmul(case, square, square, square)
            },
            "matmul, [N D] x [D F]": {"torch eager": make_matmul},
            "copy": {"torch eager": partial(make_copy, numbers=numbers)},
            "step": both(make_step),
            "lora step": {"peft": make_lora_step},
            "forward": both(make_forward),
            "dense of a block": {"torch eager": make_dense_products},
            "attention forward": {"torch eager": partial(make_attention, is_gradient=False)},
            "attention gradient": {"torch eager": partial(make_attention, is_gradient=True)},
            "loss gradient": both(make_loss),
            "optimizer": {"torch eager": make_optimizer_step},
            "decode 1 row": by_cache(1),
            "decode 8 rows": by_cache(8),
            "tokenizer": {"transformers": make_tokenizer},
        },
        wait=synchronize,
        about={name: version(name) for name in ("torch", "transformers")},
        is_queue=not is_cpu,
        free=free_memory,
        peak=read_peak_bytes,
    )


if __name__ == "__main__":
    serve_pipe(make_side)
