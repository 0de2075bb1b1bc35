"""Tokenizers from every form of file, what stands beside them, and files that are damaged."""

import json
import pathlib
import pickle
import random

import pytest
from fuzz_tokenizers import FORMS, mutate, try_file
from tokenizer_kinds import make_content, train_sentencepiece

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer, load, sentencepiece_model
from jaxgpt.tokenizer.spec import check_charsmap

TEXT = "The word, 'the' words; naïve café 北京 🙂\n  12345 don't"


def write(folder: pathlib.Path, **files) -> pathlib.Path:
    """Write files: NAME_ENDING=content, a text or JSON."""
    for key, content in files.items():
        name = key[::-1].replace("_", ".", 1)[::-1]
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, "utf-8")
    return folder


def make_slow_files(kind: str, folder: pathlib.Path, names=("vocab.json", "merges.txt")) -> dict:
    """Write the vocabulary and the merges of a byte-level BPE; return its tokenizer.json."""
    tree = json.loads(make_content(kind))
    model = tree["model"]
    (folder / names[0]).write_text(json.dumps(model["vocab"]), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / names[1]).write_text("\n".join(lines) + "\n", "utf-8")
    return tree


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_a_vocabulary_and_merges_make_a_byte_level_tokenizer(names, tmp_path):
    make_slow_files("gpt2", tmp_path, names)
    tokenizer, expected = load(tmp_path), Tokenizer(make_content("gpt2"))
    assert tokenizer.encode(TEXT).tolist() == expected.encode(TEXT).tolist()
    assert (tokenizer.eos, tokenizer.is_lossless) == (expected.eos, True)


def test_the_class_of_a_vocabulary_decides_how_text_is_split(tmp_path):
    make_slow_files("qwen2", tmp_path)
    write(tmp_path, tokenizer_config_json={"tokenizer_class": "Qwen2TokenizerFast"})
    expected = Tokenizer(make_content("qwen2")).encode(TEXT).tolist()
    assert load(tmp_path).encode(TEXT).tolist() == expected
    write(tmp_path, tokenizer_config_json={"tokenizer_class": "NewTokenizer"})
    with pytest.raises(ConfigError, match=r"class NewTokenizer .*: its tokenizer\.json does"):
        load(tmp_path)


def test_added_tokens_of_other_files_are_read(tmp_path):
    tree = make_slow_files("gpt2", tmp_path)
    size = len(tree["model"]["vocab"])
    write(
        tmp_path,
        added_tokens_json={"<tool>": size, "<|end|>": size + 1},
        special_tokens_map_json={"eos_token": {"content": "<|end|>"}, "pad_token": "<s>"},
    )
    tokenizer = load(tmp_path)
    assert (tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (size + 1, 1, size + 2)
    ids = tokenizer.encode("a<tool>b<|end|>").tolist()
    assert size in ids
    assert size + 1 not in ids
    assert tokenizer.decode(ids) == "a<tool>b<|end|>"


def test_a_vocab_txt_makes_a_wordpiece_tokenizer_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind, lowercase in (("wordpiece", True), ("wordpiece_cased", False)):
        vocab = json.loads(make_content(kind))["model"]["vocab"]
        write(tmp_path, vocab_txt="\n".join(sorted(vocab, key=vocab.get)) + "\n",
              tokenizer_config_json={"do_lower_case": lowercase})  # fmt: skip
        tokenizer = load(tmp_path)
        theirs = transformers.BertTokenizerFast(vocab=vocab, do_lower_case=lowercase)
        ids = tokenizer.encode(TEXT).tolist()
        assert [tokenizer.bos, *ids, tokenizer.eos] == theirs(TEXT)["input_ids"]
        assert tokenizer.adds_bos
        assert not tokenizer.is_lossless
        assert tokenizer.decode(ids) == theirs.decode(ids)


def test_a_spiece_model_of_t5_has_sentinels_and_no_bos(tmp_path):
    data = train_sentencepiece(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "spiece.model").write_bytes(data)
    write(tmp_path, tokenizer_config_json={"tokenizer_class": "T5Tokenizer", "extra_ids": 3,
                                           "eos_token": "</s>", "pad_token": "<pad>"})  # fmt: skip
    tokenizer = load(tmp_path)
    assert (tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2)
    assert not tokenizer.adds_bos
    size = tokenizer.vocab_size
    assert tokenizer.special_ids["<extra_id_0>"] == size - 1
    assert tokenizer.special_ids["<extra_id_2>"] == size - 3
    post = json.loads(tokenizer.content)["post_processor"]
    assert [*post["special_tokens"]] == ["</s>"]


def test_user_defined_pieces_are_found_in_text_and_are_not_special(tmp_path):
    data = train_sentencepiece(model_type="bpe", byte_fallback=True, vocab_size=800,
                               user_defined_symbols="<tool>", add_dummy_prefix=False,
                               normalization_rule_name="identity",
                               remove_extra_whitespaces=False)  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = load(tmp_path / "tokenizer.model")
    ids = tokenizer.encode("a <tool> b").tolist()
    assert json.loads(tokenizer.content)["model"]["vocab"]["<tool>"] in ids
    assert tokenizer.decode(ids) == "a <tool> b"


# --- what stands beside a tokenizer.json ---


def test_the_ends_of_a_text_are_those_of_all_files_and_the_tokenizers_own_is_first(tmp_path):
    write(
        tmp_path,
        tokenizer_json=make_content("gpt2"),
        tokenizer_config_json={"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": None},
        generation_config_json={"eos_token_id": [2, 4]},
        config_json={"model_type": "llama", "eos_token_id": 3, "pad_token_id": 0},
    )
    tokenizer = load(tmp_path)
    assert tokenizer.ends == (4, 2, 3)
    assert (tokenizer.eos, tokenizer.bos, tokenizer.adds_bos) == (4, 1, False)
    assert load(tmp_path / "tokenizer.json").ends == (4, 2, 3)
    write(tmp_path, generation_config_json={"eos_token_id": [2, 10**6, True, "x"]})
    assert load(tmp_path).ends == (4, 2, 3)  # no token has the others


@pytest.mark.parametrize("form", ["text", "named", "file", "files"])
def test_a_chat_template_is_read_in_all_its_forms(form, tmp_path):
    write(tmp_path, tokenizer_json=make_content("gpt2"))
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    if form in ("text", "named"):
        value = "a" if form == "text" else named
        write(tmp_path, tokenizer_config_json={"chat_template": value})
    else:
        write(tmp_path, chat_template_jinja="a", tokenizer_config_json={"chat_template": "old"})
        if form == "files":
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("b")
    tokenizer = load(tmp_path)
    assert tokenizer.chat_template == "a"
    assert (tokenizer.chat_templates.get("tool_use") == "b") == (form in ("named", "files"))


def test_saving_and_loading_keeps_all_that_is_known(tmp_path):
    tokenizer = Tokenizer(
        make_content("llama2"), ends=[2, 4], chat_template={"default": "é", "tool_use": "t"},
        settings={"bos_token": "<|im_start|>", "add_bos_token": False, "pad_token": "<unk>"},
    )  # fmt: skip
    tokenizer.save(tmp_path / "tokenizer.json")
    for copy in (load(tmp_path), load(tmp_path / "tokenizer.json"),
                 pickle.loads(pickle.dumps(tokenizer))):  # fmt: skip
        for name in ("content", "ends", "eos", "bos", "pad", "unk", "adds_bos", "chat_templates",
                     "fingerprint", "token_bytes", "special_ids"):  # fmt: skip
            assert getattr(copy, name) == getattr(tokenizer, name), name
        assert copy.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["tokenizer.json", "tokenizer_config.json"]
    copy = load(tmp_path)
    copy.save(tmp_path / "other.json")
    assert load(tmp_path / "other.json").ends == (2, 4)
    texts = (tmp_path / "tokenizer_config.json", tmp_path / "other_config.json")
    assert texts[0].read_text("utf-8") == texts[1].read_text("utf-8")


def test_transformers_reads_a_saved_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    tokenizer = Tokenizer(make_content("llama2"), chat_template="{{ bos_token }}x",
                          settings=settings)  # fmt: skip
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs("the word")["input_ids"] == [1, *tokenizer.encode("the word").tolist()]
    assert (theirs.eos_token, theirs.chat_template) == ("</s>", "{{ bos_token }}x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[1]", "a JSON list, not an object"),
        ("tokenizer_config.json", "{", "JSONDecodeError"),
        ("generation_config.json", "\xff", "JSONDecodeError"),
        ("tokenizer_config.json", '{"chat_template": 5}', "its chat_template is 5"),
    ],
)
def test_a_damaged_file_beside_a_tokenizer_is_named(name, content, message, tmp_path):
    write(tmp_path, tokenizer_json=make_content("gpt2"))
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_ends_that_no_token_has_are_refused():
    with pytest.raises(ConfigError, match="end with the token id 99999, which no token has"):
        Tokenizer(make_content("gpt2"), ends=[99999])


def test_one_of_two_files_is_refused(tmp_path):
    make_slow_files("gpt2", tmp_path)
    with pytest.raises(ConfigError, match=r"vocab\.json and merges\.txt belong together"):
        load(tmp_path / "vocab.json")


def test_a_tiktoken_file_is_recognized(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ConfigError, match=r"tiktoken: use its tokenizer\.json"):
        load(tmp_path)


# --- damaged files ---


def test_a_table_of_characters_that_leads_outside_is_refused():
    fields = dict(sentencepiece_model.read_fields(train_sentencepiece()))
    charsmap = dict(sentencepiece_model.read_fields(fields[3]))[2]
    check_charsmap(charsmap, "x")
    size = int.from_bytes(charsmap[:4], "little")
    far = (0x1FFFFF << 10 | ord("a")).to_bytes(4, "little")
    for damaged in (charsmap[:100], b"", charsmap[: 4 + size] + b"\xff\xfe",
                    charsmap[:4] + far * (size // 4) + charsmap[4 + size :],
                    (size + 4).to_bytes(4, "little") + charsmap[4:]):  # fmt: skip
        with pytest.raises(ConfigError, match="table of characters"):
            check_charsmap(damaged, "x")


def test_two_tokens_with_one_id_and_gaps_in_ids_are_refused():
    tree = json.loads(make_content("gpt2"))
    vocab = tree["model"]["vocab"]
    token = next(iter(vocab))
    vocab["zz"] = vocab[token]
    with pytest.raises(ConfigError, match="have the id"):
        Tokenizer(json.dumps(tree))
    vocab["zz"] = 10**7
    with pytest.raises(ConfigError, match="the token id 10000000 and only"):
        Tokenizer(json.dumps(tree))


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_file_gives_an_error_or_a_tokenizer_that_works(form, tmp_path):
    rng, content = random.Random(0), FORMS[form]()
    errors = 0
    for number in range(25):
        path = tmp_path / f"{number}{pathlib.Path(form).suffix}"
        errors += bool(try_file(path, mutate(content, rng)))
    assert errors
