"""Tiny models of every architecture of llama.cpp, with the same weights in transformers."""

import functools
import pathlib
from typing import NamedTuple

import numpy as np
import torch
import transformers
from oracles import models

from jaxgpt.interop import gguf_files, huggingface
from jaxgpt.interop.archive import Archive

TOKENS = np.random.default_rng(0).integers(5, models.V, 20).tolist()
TARGET = [0, *TOKENS[:10]]  # of an encoder-decoder


class Case(NamedTuple):
    model: torch.nn.Module
    archive: Archive
    path: pathlib.Path  # of the GGUF file in float32


def _make_mamba():
    config = transformers.MambaConfig(
        vocab_size=models.V, hidden_size=32, num_hidden_layers=3, layer_norm_epsilon=1e-4,
        state_size=5, expand=2, conv_kernel=3, tie_word_embeddings=True,
    )  # fmt: skip
    return None, transformers.MambaForCausalLM(config), None


def _make_t5(is_gated: bool):
    made = models.make_t5(is_gated)
    made[1].config.relative_attention_max_distance = 128  # the only one that llama.cpp has
    for part in made[1].modules():
        if hasattr(part, "relative_attention_max_distance"):
            part.relative_attention_max_distance = 128
    return made


def _make_linear_llama():
    from jaxgpt.architecture import RopeConfig

    return models.make_llama(rope=RopeConfig(20.0, 1.0, "linear", 3.0, None))


DECODERS = {
    name: make for name, make in models.CASES.items()
    if not name.startswith(("bert", "t5", "bart", "llama4", "mistral")) and "ntk" not in name
    and "gpt-oss" not in name
} | {"mamba": _make_mamba, "llama with linear scaling": _make_linear_llama}  # fmt: skip
OTHERS = {
    "bert": models.CASES["bert"], "bert with classes": models.CASES["bert with classes"],
    "t5": lambda: _make_t5(False), "t5 v1.1": lambda: _make_t5(True),
}  # fmt: skip
CASES = DECODERS | OTHERS


@functools.cache
def make_case(name: str, folder: pathlib.Path) -> Case:
    """Make a model with random weights, none of them zero or one, and write it."""
    torch.manual_seed(0)
    model = CASES[name]()[1].eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = folder / name.replace(" ", "_")
    model.save_pretrained(path)
    archive = huggingface.open_folder(str(path))
    gguf_files.write_file(archive, path / "model.gguf")
    return Case(model, archive, path / "model.gguf")


def run_transformers(model) -> np.ndarray:
    """Return logits, or the hidden states of an encoder without a head."""
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        if isinstance(model, transformers.BertForMaskedLM):
            return model.bert(ids).last_hidden_state[0].numpy()
        if isinstance(model, transformers.T5ForConditionalGeneration):
            target = torch.tensor([TARGET])
            return model(input_ids=ids, decoder_input_ids=target).logits[0].numpy()
        return model(ids).logits[0].numpy()
