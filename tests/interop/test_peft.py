"""Folders of peft: peft writes them and this library reads them, and back; the same training."""

import dataclasses
import json
import pathlib
import shutil
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from interop.hf_cases import MODELS, randomize
from interop.test_huggingface import TOLERANCE, run_transformers
from safetensors.torch import load_file, save_file

import jaxgpt
from jaxgpt.adapters import Adapter, Base, compute_fingerprint
from jaxgpt.cli import import_
from jaxgpt.config import Config, ConfigError, DataConfig, LoraConfig, OptimizerConfig, TrainConfig
from jaxgpt.data import Batch
from jaxgpt.interop import exporting
from jaxgpt.interop.exporting import _score as score
from jaxgpt.language_model import LanguageModel
from jaxgpt.lora import describe_adapters
from jaxgpt.model import build
from jaxgpt.sharding import make_mesh
from jaxgpt.trainer.state import FrozenBase, TrainState, make_abstract_state
from jaxgpt.trainer.step import make_train_step

B, T, STEPS = 2, 12, 20

# The modules of peft that are adapted, and settings of LoRA besides.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (["c_attn", "c_proj", "wte"], {"fan_in_fan_out": True}),
    "llama": (r".*\.(q|k|o|gate|down)_proj", {
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1},
        "alpha_pattern": {"k_proj": 7},
        "modules_to_save": ["lm_head", "norm"],
    }),
    "qwen2": (["q_proj", "v_proj", "up_proj"], {"use_rslora": True, "layers_to_transform": [1]}),
    "mixtral": (["q_proj", "v_proj", "o_proj"], {"lora_alpha": 3}),
    "t5": (["q", "v", "o", "wi"], {}),
    "gpt_neox": (["query_key_value", "dense_h_to_4h", "embed_out"], {}),
}  # fmt: skip


class Case(NamedTuple):
    """An adapted model of transformers, its folders, and what it computes."""

    base: pathlib.Path
    folder: pathlib.Path
    tokens: np.ndarray  # int32 [B T]
    expected: np.ndarray  # logits
    model: LanguageModel  # as jaxgpt loads the folder


def make_reference(name: str):
    return randomize(MODELS[name]())


def make_peft(reference, base: pathlib.Path, targets, **settings):
    """Return a model of peft whose factors are random."""
    settings = {"r": 3, "lora_alpha": 6, **settings}
    config = peft.LoraConfig(target_modules=targets, **settings)
    model = peft.get_peft_model(reference, config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.2 * torch.randn(x.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("peft")
    reference = make_reference(request.param)
    reference.save_pretrained(folder / "base")
    targets, settings = CASES[request.param]
    model = make_peft(reference, folder / "base", targets, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the table of an embedding is saved too
        model.save_pretrained(folder / "adapter")
    vocab = reference.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (B, T), dtype=np.int32)
    expected = run_transformers(model, tokens)
    return Case(folder / "base", folder / "adapter", tokens, expected,
                jaxgpt.load(folder / "adapter"))  # fmt: skip


def run_jaxgpt(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(score(model.config.model, model.params, jnp.asarray(tokens)))


def load_peft(base, folder):
    """Return a model of peft from its folders; a warning is an error."""
    kind = json.loads((base / "config.json").read_text())["architectures"][0]
    reference = getattr(transformers, kind).from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about peft's own code
        # That a tied table is adapted, which is so in whatever file.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(reference, folder).eval()


def test_logits_are_those_of_peft(case):
    plain = run_jaxgpt(case.model.switch(""), case.tokens)
    found = run_jaxgpt(case.model, case.tokens)
    np.testing.assert_allclose(found, case.expected, atol=TOLERANCE * max(np.std(found), 1))
    assert np.max(np.abs(found - plain)) > 0.1 * np.std(plain)
    merged = case.model.merge()
    limit = 3e-5 * max(np.std(found), 1)
    np.testing.assert_allclose(run_jaxgpt(merged, case.tokens), found, atol=limit)


def test_peft_loads_what_is_exported_without_a_warning(case, tmp_path):
    out = tmp_path / "out"
    difference = exporting.export(case.model, str(out), "peft", log=lambda line: None)
    assert difference < 1e-5
    written = load_peft(case.base, out)
    found = run_transformers(written, case.tokens)
    np.testing.assert_allclose(found, case.expected, atol=TOLERANCE * max(np.std(found), 1))
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json"
    ]  # fmt: skip


def test_transformers_loads_what_is_merged(case, tmp_path):
    out = tmp_path / "merged"
    exporting.export(case.model, str(out), "hf", log=lambda line: None)
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    written = getattr(transformers, kind).from_pretrained(out).eval()
    found = run_transformers(written, case.tokens)
    np.testing.assert_allclose(found, case.expected, atol=TOLERANCE * max(np.std(found), 1))


# --- other adapters than a file of peft had --------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    make_reference("gpt2").save_pretrained(folder)
    return folder, jaxgpt.load(folder)


def adapt(model, targets, rank=2, seed=3):
    """Return a model with a random adapter."""
    lora = LoraConfig(rank=rank, alpha=6, targets=targets)
    shapes, _ = describe_adapters(model.config.model, lora)
    dice = np.random.default_rng(seed)
    trained = jax.tree.map(lambda x: jnp.asarray(dice.normal(0, 0.2, x.shape), jnp.float32), shapes)
    base = Base((model.origin,), compute_fingerprint(model.params))
    return model.with_adapters({"x": Adapter(trained, lora, base)}).switch("x")


@pytest.mark.parametrize(
    ("targets", "rank"), [(("q", "k", "v"), 6), (("q", "v"), 4), (("k",), 2), (("o", "up"), 2)]
)
def test_maps_that_are_one_module_are_written_side_by_side(gpt2, tmp_path, targets, rank):
    base, plain = gpt2
    model = adapt(plain, targets)
    exporting.export(model, str(tmp_path / "out"), "peft", log=lambda line: None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {*config["rank_pattern"].values()} or {config["r"]}
    assert ranks == {rank}
    tokens = np.arange(B * T, dtype=np.int32).reshape(B, T)
    found = run_transformers(load_peft(base, tmp_path / "out"), tokens)
    expected = run_jaxgpt(model, tokens)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * max(np.std(found), 1))
    again = jaxgpt.load(tmp_path / "out")
    np.testing.assert_allclose(run_jaxgpt(again, tokens), expected, atol=TOLERANCE)


@pytest.mark.parametrize("objective", ["chat", "preference", "online"])
def test_adapters_of_every_objective_on_text_are_opened_by_their_folder_alone(
    gpt2, tmp_path, objective
):
    tuned = adapt(gpt2[1], ("q", "v"))
    rules = dataclasses.replace(tuned.config.train, objective=objective)
    tuned = dataclasses.replace(tuned, config=dataclasses.replace(tuned.config, train=rules))
    exporting.export(tuned, str(tmp_path / "out"), "peft", log=lambda line: None)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = np.arange(B * T, dtype=np.int32).reshape(B, T)
    np.testing.assert_allclose(
        run_transformers(found, tokens), run_jaxgpt(tuned, tokens), atol=TOLERANCE
    )
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read the one may read the others


def test_a_folder_of_peft_is_imported_and_a_start(gpt2, tmp_path, capsys):
    model = adapt(gpt2[1], ("q", "v"))
    exporting.export(model, str(tmp_path / "out"), "peft", log=lambda line: None)
    assert import_.main([str(tmp_path / "out"), str(tmp_path / "run")], "jaxgpt import") == 0
    run = jaxgpt.load(tmp_path / "run")
    tokens = np.arange(B * T, dtype=np.int32).reshape(B, T)
    np.testing.assert_allclose(run_jaxgpt(run, tokens), run_jaxgpt(model, tokens), atol=TOLERANCE)
    assert (
        sum(x.stat().st_size for x in (tmp_path / "run" / "best").rglob("*") if x.is_file())
        < (gpt2[0] / "model.safetensors").stat().st_size
    )


# --- what is refused -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid") / "adapter"
    exporting.export(adapt(gpt2[1], ("o", "up")), str(folder), "peft", log=lambda line: None)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported: it is DoRA"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters=.* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"use_new_thing": 3}, r"the key 'use_new_thing' \(=3\) is not known"),
        ({"r": "x"}, "r='x' must be a number above 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(valid, tmp_path, change, message):
    folder = tmp_path / "changed"
    shutil.copytree(valid, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        jaxgpt.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {k.replace("c_proj", "c_x"): v for k, v in x.items()}, "'.*c_x' has no place"),
        (lambda x: {k: v for k, v in x.items() if "lora_A" not in k}, "needs lora_A .* and lora_B"),
        (lambda x: {k: v[:, :5] if "lora_A" in k else v for k, v in x.items()}, "has 5 inputs"),
        (lambda x: {**x, "other.weight": torch.ones(1)}, "does not begin with 'base_model.model.'"),
        (lambda x: {**x, "base_model.model.n.weight": torch.ones(1)}, "'n.weight' has no place"),
        (lambda x: {**x, "base_model.model.wte.lora_magnitude_vector": torch.ones(1)},
         "lora_magnitude_vector' is not supported"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused(valid, tmp_path, change, message):
    folder = tmp_path / "changed"
    shutil.copytree(valid, folder)
    path = folder / "adapter_model.safetensors"
    tensors = {name: x.contiguous() for name, x in change(load_file(path)).items()}
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=message):
        jaxgpt.load(folder)


def test_another_base_is_refused(valid, gpt2, tmp_path):
    shutil.copytree(valid, tmp_path / "adapter")
    shutil.copytree(gpt2[0], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("c_attn.weight"))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "adapter" / "adapter_config.json"
    values = {**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"is not the base of .*fingerprint"):
        jaxgpt.load(tmp_path / "adapter")
    path.write_text(json.dumps({**values, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="base_model_name_or_path is missing"):
        jaxgpt.load(tmp_path / "adapter")


def test_a_model_without_an_adapter_is_not_exported(gpt2, tmp_path):
    with pytest.raises(ConfigError, match="has none in use"):
        exporting.export(gpt2[1], str(tmp_path / "x"), "peft", log=lambda line: None)
    assert not list(tmp_path.iterdir())


# --- training --------------------------------------------------------------------------------


def test_losses_of_training_are_those_of_peft(tmp_path):
    reference = make_reference("llama")
    reference.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(reference, config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "first")  # the same initial factors
    dice = np.random.default_rng(0)
    tokens = dice.integers(0, reference.config.vocab_size, (STEPS, B, T + 1))
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    expected = []
    for batch in torch.tensor(tokens):
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(train(tmp_path / "first", tokens), expected, atol=1e-4)
    assert expected[-1] != pytest.approx(expected[0], abs=0.05)


def train(folder, tokens) -> list[float]:
    """Return the losses of the same steps here."""
    loaded = jaxgpt.load(folder)
    adapter = loaded.adapters[loaded.adapter]
    cfg = Config(
        model=loaded.config.model,
        data=DataConfig(tokenizer="other.json"),
        lora=adapter.config,
        train=TrainConfig(steps=STEPS, batch=B),
        optimizer=OptimizerConfig(
            lr=1e-2, schedule="warmup_constant", warmup=0, weight_decay=0.1, clip=0
        ),
    )
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    optimizer, schedule, _ = make_abstract_state(cfg, mesh)
    base = FrozenBase(loaded.base, cfg.lora.scale)
    state = TrainState(
        jnp.int32(0), adapter.trained, optimizer.init(adapter.trained), jax.random.key(0), base=base
    )
    step = jax.jit(make_train_step(cfg, build(cfg.model), optimizer, schedule))
    losses = []
    for rows in tokens.astype(np.int32):
        position = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        batch = Batch(
            tokens=rows[:, :-1], positions=position, segment_ids=np.ones_like(position),
            targets=rows[:, 1:], weights=np.ones((B, T), np.float32), prefix=None,
            encoder_inputs=None,
        )  # fmt: skip
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses
