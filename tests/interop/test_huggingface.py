"""Models through files: transformers writes them, this library reads them, and back."""

import json
import pathlib
import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import single_document_coords
from interop.hf_cases import MODELS, make_bare_bert, randomize, write_old_form

import jaxgpt
from jaxgpt.interop import convert, huggingface
from jaxgpt.interop.exporting import _score as score
from jaxgpt.language_model import LanguageModel

B, T = 2, 12
# Two float32 implementations of two to eight layers, on values up to 30.
TOLERANCE = 1e-4


class Case(NamedTuple):
    """One model of transformers, its files, and what it computes."""

    reference: Any
    folder: pathlib.Path
    model: LanguageModel
    tokens: np.ndarray  # int32 [B T]
    expected: np.ndarray  # logits


def run_transformers(reference, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of transformers, on the inputs of `exporting._score`."""
    ids = torch.tensor(tokens, dtype=torch.long)
    args = dict(input_ids=ids)
    if reference.config.is_encoder_decoder:
        args = dict(input_ids=ids.flip(1), decoder_input_ids=ids)
    with torch.no_grad():
        return reference(**args).logits.numpy()


def run_jaxgpt(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(score(model.config.model, model.params, jnp.asarray(tokens)))


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory) -> Case:
    reference = randomize(MODELS[request.param]())
    folder = tmp_path_factory.mktemp("model") / "new"
    reference.save_pretrained(folder)
    model = jaxgpt.load(folder)
    tokens = np.random.default_rng(0).integers(0, model.config.model.vocab, (B, T), dtype=np.int32)
    return Case(reference, folder, model, tokens, run_transformers(reference, tokens))


def test_logits_agree(case):
    assert case.expected.std() > 0.02  # the logits are not trivially small
    np.testing.assert_allclose(run_jaxgpt(case.model, case.tokens), case.expected, atol=TOLERANCE)


def test_files_of_transformers_4_give_the_same_model(case):
    old = case.folder.parent / "old"
    write_old_form(case.folder, old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the heads of a BERT that are left out
        model = jaxgpt.load(old)
    assert model.config.model == case.model.config.model
    chex.assert_trees_all_equal(model.params, case.model.params)


def test_three_shards_give_the_same_model(case):
    folder = case.folder.parent / "shards"
    size = (case.folder / "model.safetensors").stat().st_size
    case.reference.save_pretrained(folder, max_shard_size=size // 3 + 1)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    chex.assert_trees_all_equal(jaxgpt.load(folder).params, case.model.params)


def test_bfloat16_is_kept_or_becomes_float32(case):
    folder = case.folder.parent / "half"
    rounded = type(case.reference)(case.reference.config).to(torch.bfloat16)
    rounded.load_state_dict(case.reference.state_dict())
    rounded.save_pretrained(folder)
    model = jaxgpt.load(folder)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert model.config.model.dtype == "bfloat16"
    wide = jaxgpt.load(folder, dtype="float32")
    # Not `rounded.float()`, whose frequencies of RoPE stay rounded.
    exact = type(case.reference).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    expected = run_transformers(exact.eval(), case.tokens)
    np.testing.assert_allclose(run_jaxgpt(wide, case.tokens), expected, atol=TOLERANCE)


def test_what_is_written_is_what_was_read(case):
    archive = convert.to_archive(case.model)
    folder = case.folder.parent / "back"
    huggingface.write_folder(archive, str(folder), max_shard_bytes=20_000)
    before = huggingface.open_folder(str(case.folder)).tensors
    after = huggingface.open_folder(str(folder)).tensors
    assert after.keys() == before.keys()
    for name, stored in after.items():
        assert (stored.shape, stored.dtype) == (before[name].shape, before[name].dtype)
        a, b = stored.read(), before[name].read()
        if name.endswith("embed_positions.weight"):  # of BART, which does not use two rows
            a, b = a[2:], b[2:]
        np.testing.assert_array_equal(a, b, err_msg=name)
    again, info = type(case.reference).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert again.config.model_type == case.reference.config.model_type
    np.testing.assert_array_equal(run_transformers(again.eval(), case.tokens), case.expected)


def test_the_encoder_of_a_bert_without_a_head_has_its_vectors(tmp_path):
    reference = randomize(make_bare_bert())
    reference.save_pretrained(tmp_path / "bert")
    model = jaxgpt.load(tmp_path / "bert")
    tokens = np.random.default_rng(0).integers(0, 97, (B, T), dtype=np.int32)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens, dtype=torch.long)).last_hidden_state.numpy()
    from jaxgpt.model import build

    coords = single_document_coords(jnp.asarray(tokens))
    actual, _ = build(model.config.model).apply({"params": model.params}, tokens, coords)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    assert convert.to_archive(model).config["architectures"] == ["BertModel"]


def test_the_text_model_of_a_multimodal_gemma_is_taken_with_a_message(tmp_path):
    reference = randomize(MODELS["gemma3"]())
    reference.save_pretrained(tmp_path / "text")
    expected = jaxgpt.load(tmp_path / "text")
    archive = huggingface.open_folder(str(tmp_path / "text"))
    for prefix, head in (("language_model.model.", "model."), ("model.language_model.", "model.")):
        tensors = {n.replace(head, prefix, 1): x for n, x in archive.tensors.items()}
        tensors["vision_tower.patch.weight"] = next(iter(archive.tensors.values()))
        config = {"model_type": "gemma3", "text_config": archive.config, "vision_config": {"x": 1}}
        config["eos_token_id"] = [1, 106]
        notes: list[str] = []
        whole = convert.Archive(config, tensors, None, {}, "gemma/")
        model = convert.to_model(whole, log=notes.append)
        chex.assert_trees_all_equal(model.params, expected.params)
        assert notes == [
            "gemma/: only the text model is read",
            "gemma/: left out: the vision tower",
        ]


def test_the_token_that_a_target_begins_with_is_that_of_the_file(tmp_path):
    for name, start in (("t5", 0), ("bart", 2)):
        randomize(MODELS[name]()).save_pretrained(tmp_path / name)
        model = jaxgpt.load(tmp_path / name)
        assert model.config.model.get_start_token(bos=77) == start
        assert convert.to_archive(model).config["decoder_start_token_id"] == start


def change_config(folder: pathlib.Path, **changes) -> pathlib.Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
