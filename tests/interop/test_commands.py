"""The commands import, export and inspect, train.start, and parameters on devices."""

import json
import os
import shutil
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import tiny
from interop.make_files import MODEL, edit_json, make_model, write_folder
from tiny_runs import run_config

import jaxgpt
from jaxgpt import cli, loading
from jaxgpt.architecture import ExpertsConfig
from jaxgpt.config import MeshConfig, override
from jaxgpt.interop import convert, exporting, huggingface
from jaxgpt.interop.archive import store
from jaxgpt.interop.formats import find_format
from jaxgpt.model import abstract_params
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh
from jaxgpt.tokenizer import SPECIALS
from jaxgpt.trainer.start import find_start, load_config, match_start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mine"
    loading.save(make_model(step=7), path)
    metrics = {"kind": "eval", "step": 7, "loss": 1.25, "accuracy": 0.5}
    (path / "metrics.jsonl").write_text(json.dumps(metrics) + "\n{broken")
    return path


def call(command: str, *arguments) -> int:
    return cli.find_module(command).main([str(x) for x in arguments], f"jaxgpt {command}")


# --- export and import ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "mine"
    assert call("export", run, path, "--license", "apache-2.0") == 0
    return path


def test_an_export_has_all_files_and_the_same_parameters(run, exported):
    assert {x.name for x in exported.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert os.listdir(exported.parent) == ["mine"]  # and nothing half-written
    expected, model = jaxgpt.load(run), jaxgpt.load(exported)
    chex.assert_trees_all_equal(model.params, expected.params)
    assert model.tokenizer.fingerprint == expected.tokenizer.fingerprint
    assert model.tokenizer.adds_bos


def test_transformers_loads_an_export_and_its_tokenizer(run, exported):
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(info.values())
    assert type(reference) is transformers.LlamaForCausalLM
    assert reference.generation_config.eos_token_id == [SPECIALS.index("<eos>")]
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(exported), jaxgpt.load(run)
    text = "Ein Café,\n  北京 1234 <unk"
    assert tokenizer(text).input_ids == model.tokenizer.encode(text).tolist()
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [
        model.tokenizer.bos, model.tokenizer.eos, model.tokenizer.pad
    ]  # fmt: skip


def test_the_model_card_names_data_steps_loss_config_versions_and_license(exported):
    card = (exported / "README.md").read_text()
    head = card.split("---")[1]
    assert "license: apache-2.0" in head
    assert "pipeline_tag: text-generation" in head
    for words in ("- data: `stdlib`", "steps: 7", "held-out loss: 1.2500 nats at step 7",
                  "| width | 16 |", f"jax {jax.__version__}", "License: apache-2.0."):  # fmt: skip
        assert words in card


def test_an_import_is_a_run_folder_of_the_same_model(exported, tmp_path):
    path = tmp_path / "runs" / "back"
    assert call("import", exported, path) == 0
    model, expected = jaxgpt.load(path), jaxgpt.load(exported)
    chex.assert_trees_all_equal(model.params, expected.params)
    assert model.config.name == "back"
    assert model.config.data.tokenizer == str(path / "tokenizer.json")
    assert model.config.run_folder == str(path)
    assert model.generate(["ab"], tokens=2, temperature=0) == expected.generate(
        ["ab"], tokens=2, temperature=0
    )


def test_an_import_in_bfloat16_stays_in_bfloat16(exported, tmp_path):
    assert call("import", exported, tmp_path / "half", "--dtype", "bfloat16") == 0
    model = jaxgpt.load(tmp_path / "half")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert model.config.model.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_is_rounded_to_a_dtype(run, tmp_path, dtype):
    assert call("export", run, tmp_path / "half", "--dtype", dtype) == 0
    archive = huggingface.open_folder(str(tmp_path / "half"))
    assert {x.dtype for x in archive.tensors.values()} == {dtype}
    assert archive.config["dtype"] == archive.config["torch_dtype"] == dtype
    # Numbers of 16 bits other than bfloat16 become float32.
    kept = {"bfloat16": "bfloat16", "float16": "float32"}[dtype]
    model = jaxgpt.load(tmp_path / "half")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(kept)}


def test_an_export_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    def write_wrong(archive, path, quantize):
        name = "model.norm.weight"
        wrong = {**archive.tensors, name: store(-archive.tensors[name].read())}
        huggingface.write_folder(convert.Archive(archive.config, wrong, archive.tokenizer), path)

    monkeypatch.setattr(huggingface, "write_archive", write_wrong)
    with pytest.raises(ConfigError, match="computes other logits"):
        call("export", run, tmp_path / "out" / "wrong")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(("arguments", "words"), [
    (("--format", "onnx"), "--format='onnx' is not known"),
    (("--dtype", "int8"), "--dtype='int8' is not known"),
    (("--quantize", "Q8_0"), "--quantize Q8_0 is for --format gguf"),
])  # fmt: skip
def test_an_export_that_cannot_be_is_refused_and_leaves_nothing(run, tmp_path, arguments, words):
    with pytest.raises(ConfigError, match=words):
        call("export", run, tmp_path / "out" / "x", *arguments)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_nothing_that_exists_is_overwritten(run, exported):
    with pytest.raises(ConfigError, match="exists: export to a new path"):
        call("export", run, exported)
    with pytest.raises(ConfigError, match="exists: import into a new folder"):
        call("import", exported, run)


def test_a_model_without_a_counterpart_is_not_exported(tmp_path):
    cfg = tiny(vocab=270, mixers=("performer",))
    with pytest.raises(ConfigError, match="performer"):
        exporting.export(make_model(cfg), str(tmp_path / "x"))
    assert not os.listdir(tmp_path)


def test_a_classifier_and_an_encoder_of_masked_words_are_exported_as_bert(tmp_path):
    bert = dict(
        vocab=270, family="encoder", position="learned", norm="layer", wiring="post", kv_heads=None,
        feedforward="plain", activation="gelu", bias=True, embed_norm=True,
    )  # fmt: skip
    classifier = make_model(tiny(**bert, classes=2), "classify", labels=("bad", "good"))
    exporting.export(classifier, str(tmp_path / "classifier"), log=lambda line: None)
    reference = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert reference.config.id2label == {0: "bad", 1: "good"}
    assert jaxgpt.load(tmp_path / "classifier").labels == ("bad", "good")
    masked = make_model(tiny(**bert, head="mlm"), "masked")
    exporting.export(masked, str(tmp_path / "masked"), log=lambda line: None)
    _, info = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "masked", output_loading_info=True
    )
    assert not any(info.values()), info
    found = [x.fill(["a<mask>b"], 3) for x in (masked, jaxgpt.load(tmp_path / "masked"))]
    assert found[0] == found[1]


def test_a_mixture_of_experts_is_exported_as_mixtral_and_back(tmp_path):
    cfg = tiny(vocab=270, tie=False, feedforward="moe_gated", moe=ExpertsConfig(3, 2))
    model = make_model(cfg)
    exporting.export(model, str(tmp_path / "moe"), log=lambda line: None)
    chex.assert_trees_all_equal(jaxgpt.load(tmp_path / "moe").params, model.params)


# --- inspect -------------------------------------------------------------------------------------


def inspect(capsys, path) -> dict:
    assert call("inspect", path, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_shows_a_folder_and_a_run_alike(folder, run, capsys):
    facts, of_run = inspect(capsys, folder), inspect(capsys, run)
    assert facts["architecture"] == "llama"
    assert facts["context"] == of_run["context"] == 32
    assert facts["parameters"] == of_run["parameters"]
    assert facts["dtypes"] == of_run["dtypes"] == {"float32": facts["parameters"]["total"]}
    assert facts["tokenizer"]["ends"] == [{"id": 3, "token": "<eos>"}]
    assert facts["chat_template"] is False
    assert facts["not_supported"] == []
    call("inspect", folder)
    text = capsys.readouterr().out
    assert "Llama 1-3" in text
    assert "not supported  nothing" in text


def test_inspect_shows_what_is_not_supported(folder, tmp_path, capsys):
    path = shutil.copytree(folder, tmp_path / "model")
    edit_json(path / "config.json", lambda c: c | {"new_trick": 3})
    facts = inspect(capsys, path)
    assert "'new_trick'" in facts["not_supported"][0]
    assert facts["parameters"]["total"] > 0


# --- tokenizers ----------------------------------------------------------------------------------


def test_every_id_that_a_file_ends_a_text_with_ends_it(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "model")
    edit_json(path / "config.json", lambda c: c | {"eos_token_id": 3})
    edit_json(path / "generation_config.json", lambda c: c | {"eos_token_id": [5, 6]})
    assert {*jaxgpt.load(path).tokenizer.ends} == {3, 5, 6}
    archive = convert.to_archive(jaxgpt.load(path))
    assert {*archive.generation["eos_token_id"]} == {3, 5, 6}


def test_a_model_without_a_tokenizer_has_ids_and_says_so_of_text(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        os.remove(path / name)
    model = jaxgpt.load(path)
    assert (model.tokenizer.vocab_size, model.tokenizer.eos) == (270, 3)
    with pytest.raises(ConfigError, match="came without a tokenizer"):
        model.generate(["ab"])
    loading.save(model, tmp_path / "run")
    assert jaxgpt.load(tmp_path / "run").tokenizer.eos == 3


# --- train.start ---------------------------------------------------------------------------------


def test_a_run_begins_with_the_parameters_of_a_foreign_model(folder, tmp_path):
    start = find_start(str(folder))
    cfg = override(load_config([f"train.start={folder}", f"folder={tmp_path}", "name=x"]), [])
    assert cfg.model == jaxgpt.load(folder).config.model
    matched = match_start(start, cfg, start.tokenizer)
    assert matched.differences == ()
    assert jax.tree.structure(matched.taken) == jax.tree.structure(abstract_params(cfg.model)[0])


def test_training_goes_on_from_a_foreign_model(folder, tmp_path):
    from jaxgpt.trainer import train

    cfg = run_config(tmp_path, f"train.start={folder}", "train.steps=1", "optimizer.lr=1e-9",
                     "data.tokenizer=train")  # fmt: skip
    names = ("vocab", "context", "width", "layers", "heads", "kv_heads", "ffn")
    cfg = override(cfg, [f"model.{name}={getattr(MODEL, name)}" for name in names])
    train(cfg)
    trained, expected = jaxgpt.load(cfg.run_folder), jaxgpt.load(folder)
    assert trained.step == 1
    chex.assert_trees_all_close(trained.params, expected.params, atol=1e-6)


# --- devices and memory --------------------------------------------------------------------------


def test_no_device_holds_the_whole_of_a_sharded_model(tmp_path):
    path = write_folder(
        tmp_path / "model", shards=2, cfg=tiny(vocab=272, width=32, heads=8, kv_heads=8)
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    model, whole = jaxgpt.load(path, mesh=mesh), jaxgpt.load(path)
    chex.assert_trees_all_equal(jax.device_get(model.params), jax.device_get(whole.params))
    total = sum(x.nbytes for x in jax.tree.leaves(whole.params))
    held = dict.fromkeys(jax.devices(), 0)
    for x in jax.tree.leaves(model.params):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) < total / 4  # norms are whole everywhere


def test_the_host_holds_one_parameter_at_a_time(tmp_path):
    cfg = tiny(vocab=2000, width=128, layers=8, ffn=256)
    path = write_folder(tmp_path / "model", shards=3, cfg=cfg)
    largest = max(x.size * 4 for x in jax.tree.leaves(abstract_params(cfg)[0]))
    archive = huggingface.open_folder(str(path))
    tensor = max(x.read().nbytes for x in archive.tensors.values())
    plan = convert.plan_import(archive)
    tracemalloc.start()
    for place in plan.places.values():
        convert.read_parameters(plan, [place])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < largest + 1.1 * tensor + 300_000


def test_the_format_of_a_path_is_found(folder, run, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    found = [
        find_format(str(x)) for x in (folder, run, tmp_path / "x.gguf", "some/model", "runs/x")
    ]
    assert found == ["hf", "", "gguf", "hub", ""]


def test_numbers_come_in_the_dtype_that_is_asked_for(tmp_path):
    path = write_folder(tmp_path / "half", dtype="bfloat16")
    model = jaxgpt.load(path, dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), jaxgpt.load(path).params)
    chex.assert_trees_all_equal(jax.device_get(model.params), exact)
