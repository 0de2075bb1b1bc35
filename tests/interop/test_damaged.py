"""Damaged and hostile files: each is refused with its file, what is wrong, and what is right."""

import json
import os
import pathlib
import shutil
import struct

import pytest
from interop.make_files import edit_header, edit_json, write_folder

import jaxgpt
from jaxgpt.interop import hub, safetensors_files
from jaxgpt.settings import ConfigError

NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sharded") / "model", shards=3)


@pytest.fixture
def folder(source, tmp_path) -> pathlib.Path:
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture
def shards(sharded, tmp_path) -> pathlib.Path:
    return shutil.copytree(sharded, tmp_path / "model")


def get_error(folder) -> str:
    with pytest.raises(ConfigError) as error:
        jaxgpt.load(folder)
    return str(error.value)


def change_entry(header: dict, **changes):
    header[NAME] |= changes


def overlap(header: dict):
    header[NAME]["data_offsets"] = [x - 64 for x in header[NAME]["data_offsets"]]


def rename(header: dict, old: str, new: str) -> dict:
    return {new if name == old else name: entry for name, entry in header.items()}


HEADERS = {
    "numbers of 8 bits": (lambda h: change_entry(h, dtype="F8_E4M3"), "F8_E4M3', which is not"),
    "an unknown dtype": (lambda h: change_entry(h, dtype="Q4"), "the dtype 'Q4'"),
    "a negative size": (lambda h: change_entry(h, shape=[-1, 16]), "not a list of sizes"),
    "a shape of texts": (lambda h: change_entry(h, shape=["a"]), "not a list of sizes"),
    "a size that overflows": (lambda h: change_entry(h, shape=[2**63, 2**63]), "list of sizes"),
    "another shape": (lambda h: change_entry(h, shape=[24, 17]), "1632 bytes, and"),
    "the shape transposed": (lambda h: change_entry(h, shape=[16, 24]), "does not fit the config"),
    "offsets reversed": (lambda h: change_entry(h, data_offsets=[9, 3]), "outside of the file"),
    "offsets beyond the end": (
        lambda h: change_entry(h, data_offsets=[2**40, 2**40 + 1536]), "outside of the file"
    ),
    "one offset": (lambda h: change_entry(h, data_offsets=[0]), "not two positions"),
    "no dtype": (lambda h: h[NAME].pop("dtype") and None, "not described by dtype"),
    "more keys": (lambda h: change_entry(h, more=1), "not described by dtype"),
    "overlapping tensors": (overlap, "overlaps the one before it"),
    "a hole": (lambda h: h.pop(NAME) and None, "follows bytes of no tensor"),
    "an unknown tensor": (lambda h: rename(h, NAME, "model.layers.0.extra"), "missing"),
    "a tensor of another layer": (
        lambda h: rename(h, NAME, NAME.replace("0", "7")), f"'{NAME}' is missing"
    ),
    "integers": (lambda h: change_entry(h, dtype="I32"), "is of int32, and parameters must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_refused(folder, name):
    change, words = HEADERS[name]
    edit_header(folder / "model.safetensors", change)
    error = get_error(folder)
    assert words in error
    assert str(folder) in error


def write_bytes(path: pathlib.Path, change):
    path.write_bytes(change(path.read_bytes()))


BYTES = {
    "cut off": (lambda data: data[:-5], "outside of the file"),
    "longer": (lambda data: data + b"12345", "the file is damaged"),
    "empty": (lambda data: b"", "it has 0 bytes"),
    "a huge header": (lambda data: struct.pack("<Q", 2**60) + data[8:], "1,152,921,504"),
    "a header that is no JSON": (lambda data: data[:8] + b"x" + data[9:], "is not valid JSON"),
    "a header that is a list": (lambda data: struct.pack("<Q", 2) + b"[]", "is not an object"),
    "a deep header": (
        lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000, "is not valid JSON"
    ),
    "a name twice": (
        lambda data: struct.pack("<Q", 15) + b'{"a":1, "a":2}\x20', "'a' is there twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_a_damaged_file_is_refused(folder, name):
    change, words = BYTES[name]
    write_bytes(folder / "model.safetensors", change)
    error = get_error(folder)
    assert words in error
    assert "model.safetensors" in error


def send_to(place: str):
    def change(index: dict):
        index["weight_map"][NORM] = place

    return change


INDEXES = {
    "a parent folder": (send_to("../other.safetensors"), "in the same folder"),
    "an absolute path": (send_to("/etc/passwd"), "in the same folder"),
    "a folder inside": (send_to("sub/x.safetensors"), "in the same folder"),
    "a backslash": (send_to("..\\x.safetensors"), "in the same folder"),
    "a number": (send_to(3), "in the same folder"),
    "a pickle": (send_to("pytorch_model.bin"), "in the same folder"),
    "a missing file": (send_to("model-9.safetensors"), "model-9.safetensors is missing"),
    "another file": (send_to("model-00001-of-00003.safetensors"), "by weight_map"),
    "a tensor of no file": (
        lambda index: index["weight_map"].update(more="model-00001-of-00003.safetensors"),
        "does not have the tensor 'more'",
    ),
    "no map": (lambda index: index.pop("weight_map") and None, "weight_map is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXES)
def test_a_damaged_index_is_refused(shards, name):
    change, words = INDEXES[name]
    edit_json(shards / "model.safetensors.index.json", change)
    error = get_error(shards)
    assert words in error
    assert "model.safetensors.index.json" in error


def test_a_tensor_in_two_files_is_refused(shards):
    first = shards / "model-00001-of-00003.safetensors"
    shutil.copy(first, shards / "model-00002-of-00003.safetensors")
    assert "is in two files" in get_error(shards)


def test_a_pickle_is_never_opened(folder, tmp_path):
    os.remove(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    error = get_error(folder)
    assert "a pickle" in error
    assert "save_pretrained" in error
    for ending in ("bin", "pth", "pt"):
        file = tmp_path / f"model.{ending}"
        file.write_bytes(b"\x80\x02}q\x00.")
        assert "never opened" in get_error(file)


def test_code_that_comes_with_a_model_is_refused_with_the_way_out(folder):
    edit_json(folder / "config.json", lambda c: c | {"auto_map": {"AutoModel": "evil.Model"}})
    (folder / "evil.py").write_text("raise SystemExit")
    error = get_error(folder)
    assert "never executed" in error
    assert "remove auto_map" in error


@pytest.mark.parametrize(("change", "words"), [
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized (quantization_config, gptq)"),
    ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
    ({"num_hidden_layers": 10**6}, "1000000 layers"),
    ({"num_hidden_layers": 1}, "has no place in the model"),
    ({"vocab_size": 10**9}, "1000000000 tokens"),
    ({"vocab_size": 271}, "'model.embed_tokens.weight' has the shape [270, 16]"),
    ({"hidden_size": 32}, "does not fit the config"),
    ({"intermediate_size": 25}, "does not fit the config"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is false, and there is no lm_head"),
])  # fmt: skip
def test_a_config_of_another_model_is_refused(folder, change, words):
    edit_json(folder / "config.json", lambda c: c | change)
    assert words in get_error(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama", "model_type": "gpt2"}'])
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in get_error(folder)


def test_a_damaged_tokenizer_is_refused(folder):
    edit_json(folder / "tokenizer.json", lambda t: t["model"].pop("vocab") and None)
    assert "tokenizer.json" in get_error(folder)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder):
    def change(content):
        token = content["added_tokens"][0] | {"id": 999, "content": "<more>"}
        content["added_tokens"].append(token)

    edit_json(folder / "tokenizer.json", change)
    assert "ids, and the model model.vocab=270" in get_error(folder)


def test_a_name_of_the_hub_without_a_network_says_how_to_download(monkeypatch):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert not {"*.bin", "*.py", "*"} & {*allow_patterns}
            raise OSError("no route to host")

    monkeypatch.setattr(hub, "require", lambda module, user: Hub)
    error = get_error("someone/model")
    assert "no route to host" in error
    assert "hf download someone/model --local-dir model" in error


def test_a_name_of_the_hub_is_downloaded_and_loaded(monkeypatch, source):
    class Hub:
        snapshot_download = staticmethod(lambda name, allow_patterns: str(source))

    monkeypatch.setattr(hub, "require", lambda module, user: Hub)
    assert jaxgpt.load("someone/model").config.model.vocab == 270


def test_a_mistyped_run_is_no_name_of_the_hub():
    assert "is not a run" in get_error("runs/nothing")
    assert "is not a run" in get_error("./some/thing")


def test_an_array_that_is_not_contiguous_is_written_as_its_values(tmp_path):
    import numpy as np

    from jaxgpt.interop.archive import store

    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    safetensors_files.write_file({"x": store(array)}, str(tmp_path / "x.safetensors"))
    found = safetensors_files.open_file(str(tmp_path / "x.safetensors"))["x"]
    np.testing.assert_array_equal(found.read(), array)


def test_duplicate_names_are_found_before_the_library_sees_them(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = f'{{"a": {json.dumps(entry)}, "a": {json.dumps(entry)}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ConfigError, match="'a' is there twice"):
        safetensors_files.open_file(str(path))
