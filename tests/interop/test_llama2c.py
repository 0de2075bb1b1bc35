import struct

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compute_logits, single_document_coords
from interop import llama2c_files
from interop.llama2c_files import SIZE

import jaxgpt
from jaxgpt.interop import convert, llama2c
from jaxgpt.settings import ConfigError

TOKENS = [1, 5, 290, 17, 8, 299, 0, 2, 77, 60]
PIECES = [
    (b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0),
    *((f"<0x{byte:02X}>".encode(), 0.0) for byte in range(256)),
    *((text.encode(), score) for score, text in [
        (-1e9, " "), (-1e9, "a"), (-1e9, "b"), (-1e9, "c"), (-1e9, "é"), (-5.0, " a"),
        (-6.0, "ab"), (-1.0, "bc"), (-7.0, " ab"),
    ]),
]  # fmt: skip
PIECES += [(f"unused{i}".encode(), -1e9) for i in range(300 - len(PIECES))]


@pytest.fixture
def weights() -> dict:
    return llama2c_files.make_weights(SIZE)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_file_of_each_version_holds_the_weights(version, is_tied, weights, tmp_path):
    path = tmp_path / "stories.bin"
    llama2c_files.write(path, SIZE, weights, version, is_tied)
    assert llama2c.is_llama2c(path)
    archive = llama2c.open_file(path)
    assert archive.config["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in archive.tensors) is not is_tied
    kept = {
        "model.embed_tokens.weight": weights["tok_embeddings"],
        "model.norm.weight": weights["norm"],
        "model.layers.1.input_layernorm.weight": weights["attention_norm"][1],
        "model.layers.1.post_attention_layernorm.weight": weights["ffn_norm"][1],
        "model.layers.1.self_attn.v_proj.weight": weights["wv"][1],
        "model.layers.0.self_attn.o_proj.weight": weights["wo"][0],
        "model.layers.0.mlp.gate_proj.weight": weights["w1"][0],
        "model.layers.1.mlp.down_proj.weight": weights["w2"][1],
        "model.layers.1.mlp.up_proj.weight": weights["w3"][1],
    }
    for name, expected in kept.items():
        if version == 2 and expected.ndim == 2:
            values, scales = llama2c_files.quantize(expected, 8)
            expected = (values.astype(np.float32) * scales[:, None]).reshape(expected.shape)
        np.testing.assert_array_equal(archive.tensors[name].read(), expected)
    # Rows of heads of 4: (2i, 2i + 1) become (i, i + 2).
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    if version < 2:
        found = archive.tensors["model.layers.1.self_attn.k_proj.weight"].read()
        np.testing.assert_array_equal(found, weights["wk"][1][order])


@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_are_those_of_its_own_forward_pass(is_tied, weights, tmp_path):
    path = tmp_path / "stories.bin"
    llama2c_files.write(path, SIZE, weights, 0, is_tied)
    model = convert.to_model(llama2c.open_file(path))
    tokens = jnp.array([TOKENS])
    coords = single_document_coords(tokens)
    found = compute_logits(model.config.model, model.params, tokens, coords)[0]
    expected = llama2c_files.run(SIZE, weights, TOKENS, is_tied)
    # Of logits of up to 30, in float32 against float64.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["tokenizer.bin", "tok300.bin"])
def test_its_tokenizer_stands_beside_it(name, weights, tmp_path):
    llama2c_files.write(tmp_path / "stories.bin", SIZE, weights, 0, True)
    llama2c_files.write_tokenizer(tmp_path / name, PIECES)
    model = jaxgpt.load(tmp_path / "stories.bin")
    tokenizer = model.tokenizer
    ids = {text: index for index, (text, _) in enumerate(PIECES)}
    # The best score first: "bc" before " a" before "ab".
    assert tokenizer.encode("abc").tolist() == [ids[b" a"], ids[b"bc"]]
    assert tokenizer.encode("ab é€").tolist() == [
        ids[b" ab"], ids[b" "], ids["é".encode()], *(3 + byte for byte in "€".encode())
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("ab é€ \n")) == "ab é€ \n"
    assert (tokenizer.bos, tokenizer.ends, tokenizer.adds_bos) == (1, (2, 1), True)


def test_another_tokenizer_can_be_named(weights, tmp_path):
    llama2c_files.write(tmp_path / "stories.bin", SIZE, weights, 0, True)
    llama2c_files.write_tokenizer(tmp_path / "mine.bin", PIECES)
    archive = llama2c.open_file(tmp_path / "stories.bin", tmp_path / "mine.bin")
    assert archive.tokenizer.vocab_size == 300
    assert llama2c.open_file(tmp_path / "stories.bin").tokenizer is None


def change(content: bytes, at: int, form: str, value) -> bytes:
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x[:-4], "is cut short, damaged, or of another kind"),
        (lambda x: x + b"\0", "is cut short, damaged, or of another kind"),
        (lambda x: x[:100], "100 bytes are no model"),
        (lambda x: change(x, 8, "<i", 0), "layers would be 0"),
        (lambda x: change(x, 0, "<i", 1 << 30), "width would be 1073741824"),
        (lambda x: change(x, 12, "<i", 3), "it would have Sizes"),
        (lambda x: change(x, 16, "<i", -2), "kv_heads would be -2"),
        (lambda x: struct.pack("<Ii", 0x616B3432, 9) + x[8:], "version 9 of llama2.c"),
    ],
)
def test_damage_is_refused(damage, message, weights, tmp_path):
    path = tmp_path / "stories.bin"
    llama2c_files.write(path, SIZE, weights, 0, True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=message):
        llama2c.open_file(path)


def test_a_group_size_must_divide_the_matrices(weights, tmp_path):
    path = tmp_path / "stories.bin"
    llama2c_files.write(path, SIZE, weights, 2, True)
    path.write_bytes(change(path.read_bytes(), 37, "<i", 7))
    with pytest.raises(ConfigError, match="group size of 7 does not divide"):
        llama2c.open_file(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x[:-3], "token 299 would have 8 bytes"),
        (lambda x: x[:-16], "ends after 299 of the 300 tokens"),
        (lambda x: x + b"more", "more than the 300 tokens"),
        (lambda x: change(x, 8, "<i", -5), "token 0 would have -5 bytes"),
        (lambda x: x.replace(b"<unk>", b"<un\xff>"), "is not UTF-8"),
        (lambda x: x.replace(b"unused7", b"unused8"), "has 'unused8.*' twice"),
        (lambda x: change(x, 4, "<f", np.nan), "not finite"),
    ],
)
def test_a_damaged_tokenizer_is_refused(damage, message, weights, tmp_path):
    llama2c_files.write(tmp_path / "stories.bin", SIZE, weights, 0, True)
    llama2c_files.write_tokenizer(tmp_path / "tokenizer.bin", PIECES)
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=message):
        llama2c.open_file(tmp_path / "stories.bin")


def test_a_pickle_is_not_taken_for_one(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
    assert not llama2c.is_llama2c(path)
    with pytest.raises(ConfigError, match="never opened"):
        jaxgpt.load(path)
