"""GGUF files against llama.cpp, the package gguf, and damage of every kind."""

import dataclasses
import json
import os
import pathlib
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compute_logits, single_document_coords
from interop import gguf_cases
from interop.llama_cpp import LlamaCpp
from interop.make_files import make_model

from jaxgpt.interop import convert, exporting, gguf_files, gguf_format
from jaxgpt.interop.archive import Archive, store
from jaxgpt.settings import ConfigError

# Of the largest logit. llama.cpp looks GELU up in a table of float16.
TOLERANCE, GELU_TOLERANCE = 1e-5, 2e-3
GELUS = ("gpt2", "gemma2", "gemma3", "gpt_neox", "bloom", "mpt", "bert", "bert with classes",
         "t5 v1.1")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("gguf")


def run_llama_cpp(path, model) -> np.ndarray:
    name = type(model).__name__
    with LlamaCpp(path) as llama:
        if name == "BertForMaskedLM":
            return llama.embeddings(gguf_cases.TOKENS)
        if name == "BertForSequenceClassification":
            return llama.pooled(gguf_cases.TOKENS, model.config.num_labels)
        if name == "T5ForConditionalGeneration":
            llama.encode(gguf_cases.TOKENS)
            return np.stack([llama.step([token]) for token in gguf_cases.TARGET])
        return llama.logits(gguf_cases.TOKENS)


@pytest.mark.parametrize("name", gguf_cases.CASES)
def test_llama_cpp_computes_what_transformers_does(name, folder):
    case = gguf_cases.make_case(name, folder)
    expected = gguf_cases.run_transformers(case.model)
    if name == "t5":  # llama.cpp leaves out the constant factor of its logits, 1/√D
        expected = expected * case.archive.config["d_model"] ** 0.5
    found = run_llama_cpp(case.path, case.model)
    tolerance = GELU_TOLERANCE if name in GELUS else TOLERANCE
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", gguf_cases.CASES)
def test_a_file_becomes_the_same_model_as_the_folder_it_was_written_from(name, folder):
    case = gguf_cases.make_case(name, folder)
    archive = gguf_files.open_file(case.path)
    mine, theirs = (convert.plan_import(x).config.model for x in (archive, case.archive))
    if name == "bert":  # llama.cpp has no head for masked words
        assert (mine.head, theirs.head) == ("linear", "mlm")
    elif name in ("gemma2", "gemma3"):  # it scales queries by 1/√K, and weights by the rest
        assert (mine.query_scale, theirs.query_scale) == (16**-0.5, 24**-0.5)
    else:
        assert mine == theirs
    tensors = {key: x for key, x in case.archive.tensors.items() if "cls.predictions" not in key}
    assert archive.tensors.keys() == tensors.keys()
    for key, stored in tensors.items():
        found, expected = archive.tensors[key].read(), stored.read()
        assert found.shape == expected.shape == archive.tensors[key].shape == stored.shape
        scaled = {"gemma2": "q_proj", "gemma3": "q_norm"}.get(name, "nothing")
        if scaled in key:
            continue
        is_rounded = "gemma" in name or "A_log" in key  # 1 was added, or the exponential taken
        np.testing.assert_allclose(found, expected, rtol=2e-6 * is_rounded, atol=2e-7 * is_rounded)


def test_a_mistral_has_the_context_of_its_window(folder):
    model = gguf_cases.models.CASES["mistral"]()[1]
    model.save_pretrained(folder / "mistral")
    archive = gguf_cases.huggingface.open_folder(str(folder / "mistral"))
    with pytest.warns(UserWarning, match="no sliding window for mistral.*ends at 5 tokens"):
        gguf_files.write_file(archive, folder / "mistral.gguf")
    assert gguf_files.open_file(folder / "mistral.gguf").config["max_position_embeddings"] == 5


def test_greedy_text_of_a_hundred_tokens_is_that_of_llama_cpp(folder):

    case = gguf_cases.make_case("llama", folder)
    config = case.archive.config | {"max_position_embeddings": 128}
    path = folder / "long.gguf"
    gguf_files.write_file(Archive(config, case.archive.tensors), path)
    prompt = gguf_cases.TOKENS[:8]
    with LlamaCpp(path) as llama:
        expected = llama.greedy(prompt, 100)
        logits = np.sort(llama.logits(prompt + expected), axis=-1)
    assert (logits[:, -1] - logits[:, -2]).min() > 1e-4, "a tie: choose other weights"
    model = convert.to_model(gguf_files.open_file(path))
    tokens = jnp.array([prompt + expected])
    coords = single_document_coords(tokens)
    found = compute_logits(model.config.model, model.params, tokens, coords)[0].argmax(-1)
    assert found[len(prompt) - 1 : -1].tolist() == expected


def test_a_bert_is_verified_without_its_head_for_masked_words(tmp_path):
    cfg = dataclasses.replace(
        gguf_cases.models.CASES["bert"]()[0], vocab=270, mask_token=269, layers=1
    )
    model = make_model(cfg, "masked")
    with pytest.warns(UserWarning, match=r"no place for cls.predictions.bias"):
        gguf_files.write_file(convert.to_archive(model), tmp_path / "x.gguf")
    archive = gguf_files.open_file(tmp_path / "x.gguf")
    assert exporting.verify(model, archive, None, None) < 1e-5
    name = "bert.encoder.layer.0.output.dense.weight"
    changed = dict(archive.tensors) | {name: store(2 * archive.tensors[name].read())}
    with pytest.raises(ConfigError, match="computes other logits"):
        exporting.verify(model, dataclasses.replace(archive, tensors=changed), None, None)


# --- quantization ------------------------------------------------------------------------------


def write_raw(path, kind: str, raw: np.ndarray, name: str = "token_embd.weight", **keys):
    """Write a file with one tensor by the package gguf."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", gguf_format.list_readable_kinds())
def test_every_quantization_is_dequantized_as_the_package_gguf_does(kind, tmp_path, monkeypatch):
    number = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[number]
    rows, columns = 37, 2 * max(block, 32)
    raw = np.random.default_rng(0).integers(0, 100, (rows, columns // block * width), np.uint8)
    write_raw(tmp_path / "x.gguf", kind, raw)
    monkeypatch.setattr(gguf_format, "STRIP_BYTES", 4 * columns * 5)  # several strips
    entry = gguf_format.read_header(str(tmp_path / "x.gguf")).tensors["token_embd.weight"]
    found = gguf_format.read_tensor(entry)
    assert found.shape == entry.shape == (rows, columns)
    expected = gguf.quants.dequantize(raw, number)
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    np.testing.assert_array_equal(gguf_format.read_tensor(entry, 3, 5), found[3:5])


@pytest.fixture(scope="module")
def wide(folder) -> Archive:
    """Return a Llama whose rows are whole blocks, all but those of one matrix."""
    rng = np.random.default_rng(0)
    make = lambda *shape: store(rng.normal(0, 0.1, shape).astype(np.float32))  # noqa: E731
    config = dict(
        model_type="llama", hidden_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=200, max_position_embeddings=64, vocab_size=97,
        rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False, head_dim=64,
    )  # fmt: skip
    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": make(97, 256), "lm_head.weight": make(97, 256),
        "model.norm.weight": make(256), layer + "input_layernorm.weight": make(256),
        layer + "post_attention_layernorm.weight": make(256),
        layer + "self_attn.q_proj.weight": make(256, 256),
        layer + "self_attn.k_proj.weight": make(128, 256),
        layer + "self_attn.v_proj.weight": make(128, 256),
        layer + "self_attn.o_proj.weight": make(256, 256),
        layer + "mlp.gate_proj.weight": make(200, 256),
        layer + "mlp.up_proj.weight": make(200, 256),
        layer + "mlp.down_proj.weight": make(256, 200),
    }  # fmt: skip
    return Archive(config, tensors, origin=str(folder / "wide"))


@pytest.mark.parametrize("kind", gguf_format.list_writable_kinds())
def test_matrices_are_quantized_as_the_package_gguf_does(kind, wide, tmp_path):
    gguf_files.write_file(wide, tmp_path / "x.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    large = kind if kind in ("F32", "F16", "BF16") else "Q8_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == large
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.0.attn_q.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    is_plain = kind in gguf_format.PLAIN_KINDS
    assert kinds["blk.0.ffn_down.weight"] == (kind if is_plain else "F16")  # rows of 200
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    original = wide.tensors["model.layers.0.mlp.up_proj.weight"].read()
    number = gguf.GGMLQuantizationType[kind]
    np.testing.assert_array_equal(up.data, gguf.quants.quantize(original, number))
    expected = gguf.quants.dequantize(gguf.quants.quantize(original, number), number)
    archive = gguf_files.open_file(tmp_path / "x.gguf")
    found = archive.tensors["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    np.testing.assert_array_equal(found.read().astype(np.float32), expected)
    assert reader.get_field("general.file_type").contents() == gguf_files.FILE_TYPES[kind]
    assert np.isfinite(run_llama_cpp(tmp_path / "x.gguf", None)).all()


def test_llama_cpp_computes_eight_bits_closely(wide, tmp_path):
    logits = {}
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        gguf_files.write_file(wide, tmp_path / f"{kind}.gguf", kind)
        logits[kind] = run_llama_cpp(tmp_path / f"{kind}.gguf", None)
    scale = np.abs(logits["F32"]).max()
    for kind, tolerance in (("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 5e-2)):
        assert np.abs(logits[kind] - logits["F32"]).max() < tolerance * scale, kind


def test_without_a_wish_the_dtype_stays(wide, tmp_path):
    half = {name: store(stored.read().astype(np.float16)) for name, stored in wide.tensors.items()}
    gguf_files.write_file(Archive(wide.config, half), tmp_path / "x.gguf")
    archive = gguf_files.open_file(tmp_path / "x.gguf")
    assert archive.tensors["lm_head.weight"].dtype == "float16"
    assert archive.tensors["model.norm.weight"].dtype == "float32"
    for name, stored in half.items():
        np.testing.assert_array_equal(archive.tensors[name].read(), stored.read())


@pytest.mark.parametrize(
    ("kind", "message"),
    [("Q4_K", "can be read but not written.*Q5_1"), ("IQ2_XXS", "llama-quantize"),
     ("q8", "'q8' is not known. Known: F32, F16")],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_with_the_list(kind, message, wide, tmp_path):
    with pytest.raises(ConfigError, match=message):
        gguf_files.write_file(wide, tmp_path / "x.gguf", kind)
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16_are_refused_and_nothing_is_left(wide, tmp_path):
    tensors = dict(wide.tensors) | {"lm_head.weight": store(np.full((97, 256), 7e4, np.float32))}
    with pytest.raises(ConfigError, match=r"'output.weight' has the value 70000.*use BF16"):
        gguf_files.write_file(Archive(wide.config, tensors), tmp_path / "x.gguf", "F16")
    assert not list(tmp_path.iterdir())


def test_experts_are_read_one_at_a_time(folder, monkeypatch):
    case = gguf_cases.make_case("mixtral", folder)
    stored = gguf_files.open_file(case.path).tensors
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    reads: list[tuple] = []
    read = gguf_format.read_tensor
    monkeypatch.setattr(
        gguf_format, "read_tensor", lambda *args: reads.append(args[1:]) or read(*args)
    )
    np.testing.assert_array_equal(stored[name].read(), case.archive.tensors[name].read())
    assert reads == [(3, 4)]


def test_old_files_with_an_expert_in_each_tensor_are_read(folder, tmp_path):
    case = gguf_cases.make_case("mixtral", folder)
    header = gguf_format.read_header(str(case.path))
    tensors = []
    for entry in header.tensors.values():
        array = gguf_format.read_tensor(entry)
        parts = list(array) if "_exps" in entry.name else [array]
        for i, part in enumerate(parts):
            name = entry.name.replace("_exps.weight", f".{i}.weight")
            tensors.append(gguf_format.NewTensor(name, part.shape, "F32", lambda x=part: x))
    values = {}
    for key, value in header.metadata.items():
        kinds = {int: "uint32", float: "float32", str: "string"}
        if key not in ("GGUF.version", "general.architecture"):
            values[key] = gguf_format.Value(value, kinds[type(value)])
    gguf_format.write(str(tmp_path / "old.gguf"), "llama", values, tensors)
    archive = gguf_files.open_file(tmp_path / "old.gguf")
    assert archive.tensors.keys() == case.archive.tensors.keys()
    for name, stored in case.archive.tensors.items():
        np.testing.assert_array_equal(archive.tensors[name].read(), stored.read())


def test_a_model_in_parts_is_opened_by_the_first(wide, tmp_path):
    split_model(wide, tmp_path)
    archive = gguf_files.open_file(tmp_path / "x-00001-of-00003.gguf")
    for name, stored in wide.tensors.items():
        np.testing.assert_array_equal(archive.tensors[name].read(), stored.read())
    with pytest.raises(ConfigError, match="opened by the first"):
        gguf_files.open_file(tmp_path / "x-00002-of-00003.gguf")
    os.remove(tmp_path / "x-00002-of-00003.gguf")
    with pytest.raises(ConfigError, match=r"x-00002-of-00003\.gguf, another part.*missing"):
        gguf_files.open_file(tmp_path / "x-00001-of-00003.gguf")


def split_model(archive: Archive, folder: pathlib.Path):
    """Write a model in three parts by the package gguf."""
    gguf_files.write_file(archive, folder / "whole.gguf")
    reader = gguf.GGUFReader(folder / "whole.gguf")
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama", split_max_tensors=5)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- what cannot be read -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(wide, folder) -> bytes:
    gguf_files.write_file(wide, folder / "good.gguf")
    return (folder / "good.gguf").read_bytes()


def replace_number(content: bytes, key: str, form: str, value, skip: int = 4) -> bytes:
    """Replace the value of a metadata key, which stands after its type."""
    at = content.index(key.encode()) + len(key) + skip
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


def replace_entry(content: bytes, name: str, field: int, form: str, value) -> bytes:
    """Replace a field of the entry of a matrix: 0 rank, 4 dimensions, 20 kind, 24 offset."""
    at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + field
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


DAMAGES = {
    "another file": (lambda x: b"GGML" + x[4:], "begins with b'GGML', not b'GGUF'"),
    "empty": (lambda x: b"", "cut short, or damaged"),
    "version 1": (lambda x: x[:4] + struct.pack("<I", 1) + x[8:], "GGUF version 1 is not 2 or 3"),
    "big endian": (lambda x: x[:4] + struct.pack(">I", 3) + x[8:], "gguf-convert-endian"),
    "too many tensors": (
        lambda x: x[:8] + struct.pack("<Q", 1 << 60) + x[16:], "no room for .* tensors"
    ),
    "too many values": (
        lambda x: x[:16] + struct.pack("<Q", 1 << 60) + x[24:], "no room for .* metadata entries"
    ),
    "a key without end": (
        lambda x: x[:24] + struct.pack("<Q", 1 << 62) + x[32:], "a metadata key has .* bytes"
    ),
    "cut in the header": (lambda x: x[:500], "cut short, or damaged"),
    "cut in the tensors": (lambda x: x[:-1000], "ends at byte .* and the file has"),
    "a key twice": (
        lambda x: x.replace(b"llama.block_count", b"general.file_typ2").replace(
            b"general.file_typ2", b"general.type_bogu"
        ), "llama.block_count is missing"
    ),
    "no architecture": (
        lambda x: x.replace(b"general.architecture", b"general.architectura"),
        "no general.architecture",
    ),
    "an unknown architecture": (
        lambda x: x.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"lhama", 1),
        "general.architecture='lhama' is not known. Did you mean 'llama'",
    ),
    "an unknown type": (
        lambda x: replace_number(x, "llama.block_count", "<I", 99, 0), "unknown type 99"
    ),
    "no layers": (lambda x: replace_number(x, "llama.block_count", "<I", 0), "block_count is 0"),
    "more layers": (
        lambda x: replace_number(x, "llama.block_count", "<I", 1 << 30), "more than 10,000"
    ),
    "another width of heads": (
        lambda x: replace_number(x, "llama.rope.dimension_count", "<I", 32),
        "rope.dimension_count=32 is not supported: it must be 64",
    ),
    "a setting that nothing knows": (
        lambda x: x.replace(b"llama.rope.freq_base", b"llama.logit_scale_xx"),
        "the setting llama.logit_scale_xx=10000.0 is not supported",
    ),
    "another vocabulary": (
        lambda x: replace_number(x, "llama.vocab_size", "<I", 98), "vocab_size=98 is not supported"
    ),
    "a tensor twice": (
        lambda x: x.replace(b"blk.0.attn_q.weight", b"blk.0.attn_v.weight"), "is there twice"
    ),
    "a tensor of another architecture": (
        lambda x: x.replace(b"blk.0.attn_q.weight", b"blk.0.ssm_xx.weight"),
        "'blk.0.ssm_xx.weight' is none of the architecture llama",
    ),
    "a rank of 0": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 0, "<I", 0), "has 0 dimensions"
    ),
    "a huge rank": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 0, "<I", 1 << 31), "dimensions, not 1"
    ),
    "a huge dimension": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 4, "<Q", 1 << 62), "ends at byte"
    ),
    "a dimension of 0": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 4, "<Q", 0), "no dimension may be 0"
    ),
    "an unknown kind": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 20, "<I", 77), "unknown kind 77"
    ),
    "a kind that is no model's": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 20, "<I", 26), "I32, which cannot be read"
    ),
    "a kind of larger blocks": (
        lambda x: replace_entry(x, "blk.0.ffn_down.weight", 20, "<I", 12),
        "in blocks of 256 values, and has rows of 200",
    ),
    "an offset between": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 24, "<Q", 7), "no multiple of 32"
    ),
    "overlapping tensors": (
        lambda x: replace_entry(x, "blk.0.attn_q.weight", 24, "<Q", 0), "overlap"
    ),
    "no UTF-8": (lambda x: x.replace(b"llama.vocab_size", b"llama.vocab_\xff\xffze"), "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(name, content, tmp_path):
    damage, message = DAMAGES[name]
    damaged = damage(content)
    assert damaged != content
    path = tmp_path / "bad.gguf"
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=message) as error:
        gguf_files.open_file(path)
    assert "bad.gguf" in str(error.value)


def test_values_that_are_not_finite_are_refused_by_tensor(content, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content[:-4] + struct.pack("<f", np.nan))
    archive = gguf_files.open_file(path)
    assert list(gguf_format.read_header(str(path)).tensors)[-1] == "blk.0.ffn_down.weight"
    with pytest.raises(ConfigError, match=r"'blk.0.ffn_down.weight' has values that are not fin"):
        archive.tensors["model.layers.0.mlp.down_proj.weight"].read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="bart"), "'bart' has no counterpart in llama.cpp. Known: bert"),
        (dict(hidden_act="gelu"), "hidden_act='gelu': llama.cpp computes a llama with 'silu'"),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "scaling 'dynamic' has no"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=2.0)), "low_freq"),
        (dict(partial_rotary_factor=0.5, rope_parameters=dict(partial_rotary_factor=0.5)),
         "rotates whole heads"),
        (dict(num_hidden_layers=None), "the config has no num_hidden_layers"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_not_written(changes, message, wide, tmp_path):
    with pytest.raises(ConfigError, match=message):
        gguf_files.write_file(Archive(wide.config | changes, wide.tensors), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tensor_without_a_place_is_not_lost(wide, tmp_path):
    tensors = dict(wide.tensors) | {"model.extra.weight": store(np.ones((2, 2), np.float32))}
    with pytest.raises(ConfigError, match=r"'model.extra.weight' has no place"):
        gguf_files.write_file(Archive(wide.config, tensors), tmp_path / "x.gguf")


def test_rope_factors_of_another_scaling_are_refused(folder, tmp_path):
    case = gguf_cases.make_case("llama with llama3 scaling", folder)
    header = gguf_format.read_header(str(case.path))
    factors = gguf_format.read_tensor(header.tensors["rope_freqs.weight"])
    assert len(set(factors.tolist())) > 2, "a factor between both limits"
    raw = bytearray(case.path.read_bytes())
    at = header.tensors["rope_freqs.weight"].offset
    raw[at : at + 4] = struct.pack("<f", 1.7)
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is no scaling of Llama 3"):
        gguf_files.open_file(tmp_path / "bad.gguf")


def test_the_package_gguf_is_asked_for_by_its_extra(content, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"pip install 'jaxgpt\[gguf\]'"):
        gguf_files.open_file(tmp_path / "x.gguf")


def test_a_config_is_plain_json(folder):
    for name in gguf_cases.CASES:
        config = gguf_files.open_file(gguf_cases.make_case(name, folder).path).config
        assert json.loads(json.dumps(config)) == config
