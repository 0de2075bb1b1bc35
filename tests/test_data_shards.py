import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import DataConfig
from jaxgpt.data import prepare, shards, sources
from jaxgpt.settings import ConfigError

VOCAB = 280


def texts(count=100):
    return [f"Text number {n}: the cat sat on mat {n * 7919}.\n" for n in range(count)]


@pytest.fixture
def cfg(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in texts()]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return DataConfig(source=str(folder), cache=str(tmp_path / "cache"))


def changed(cfg, **settings):
    return DataConfig(**{**vars(cfg), **settings})


def decoded(corpus, part):
    """The documents of a part, checked to stand between bos and eos."""
    tokens, tokenizer = getattr(corpus, part), corpus.tokenizer
    pairs = zip(tokens.starts[:-1], tokens.starts[1:], strict=True)
    documents = [np.asarray(tokens.ids[begin:end]) for begin, end in pairs]
    assert all(ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos for ids in documents)
    return [tokenizer.decode(ids[1:-1]) for ids in documents]


def whole_folders(cfg):
    return sorted(p for p in pathlib.Path(cfg.cache).iterdir() if p.is_dir())


def never(*args, **kwargs):
    raise AssertionError("this should not have been called")


# --- tokens ---


def test_the_two_streams_hold_every_document_once_in_order(cfg):
    corpus = prepare(cfg, VOCAB)
    train, held = decoded(corpus, "train"), decoded(corpus, "held")
    assert [text for text in texts() if text in set(train)] == train
    assert [text for text in texts() if text in set(held)] == held
    assert sorted(train + held) == sorted(texts())
    assert train
    assert held


def test_documents_split_by_tail_join_to_the_documents(cfg):
    corpus = prepare(changed(cfg, split="tail", tokenizer="bytes"), VOCAB)
    joined = zip(decoded(corpus, "train"), decoded(corpus, "held"), strict=True)
    assert [train + held for train, held in joined] == texts()
    assert corpus.rule == "tail"


def test_small_batches_of_documents_give_the_same_tokens(cfg, tmp_path, monkeypatch):
    one = prepare(cfg, VOCAB)
    monkeypatch.setattr(shards, "BATCH", 100)
    other = prepare(changed(cfg, cache=str(tmp_path / "other")), VOCAB)
    np.testing.assert_array_equal(one.train.ids, other.train.ids)
    np.testing.assert_array_equal(one.held.starts, other.held.starts)


def test_tokens_have_two_bytes_if_the_vocabulary_allows(cfg, monkeypatch):
    corpus = prepare(cfg, VOCAB)
    assert (corpus.train.ids.dtype, corpus.train.starts.dtype) == (np.uint16, np.int64)
    large = tokenizers.from_bytes()
    large.vocab_size = 65_537
    monkeypatch.setattr(tokenizers, "from_bytes", lambda: large)
    assert prepare(changed(cfg, tokenizer="bytes"), 70_000).train.ids.dtype == np.uint32


def test_the_corpus_tells_its_sizes(cfg):
    corpus = prepare(changed(cfg, tokenizer="bytes"), VOCAB)
    assert corpus.train_bytes + corpus.held_bytes == sum(map(len, texts()))
    assert corpus.train.documents + corpus.held.documents == 100
    assert corpus.bytes_per_token == 1
    assert (corpus.source, corpus.rule) == (cfg.source, "document")


def test_stream_is_mapped_and_not_read(cfg):
    assert isinstance(prepare(cfg, VOCAB).train.ids, np.memmap)


# --- tokenizer ---


def test_the_tokenizer_never_sees_text_that_is_held_out(cfg, monkeypatch):
    seen = []
    real = tokenizers.train

    def spy(documents, vocab):
        seen.extend(documents)
        return real(seen, vocab)

    monkeypatch.setattr(tokenizers, "train", spy)
    for split in ("document", "tail"):
        seen.clear()
        corpus = prepare(changed(cfg, split=split), VOCAB)
        assert [text.decode() for text in seen] == decoded(corpus, "train")


def test_a_tokenizer_is_loaded_from_a_path(cfg, tmp_path):
    trained = tokenizers.train(["some other text " * 10], 270)
    trained.save(tmp_path / "other.json")
    corpus = prepare(changed(cfg, tokenizer=str(tmp_path / "other.json")), VOCAB)
    assert corpus.tokenizer.fingerprint == trained.fingerprint


def test_a_tokenizer_with_too_many_tokens_is_refused(cfg):
    with pytest.raises(ConfigError, match=r"'bytes' has 260 tokens.*model\.vocab=200"):
        prepare(changed(cfg, tokenizer="bytes"), 200)


def test_a_run_that_goes_on_with_its_tokenizer_uses_the_same_files(cfg, tmp_path, monkeypatch):
    first = prepare(cfg, VOCAB)
    first.tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(shards, "_write", never)
    again = prepare(cfg, VOCAB, tokenizers.load(tmp_path / "tokenizer.json"))
    assert again.fingerprint == first.fingerprint


def test_a_given_tokenizer_wins_over_the_config(cfg):
    first = prepare(cfg, VOCAB)
    other = tokenizers.train(["some other text " * 10], 270)
    corpus = prepare(cfg, VOCAB, other)
    assert corpus.tokenizer is other
    assert decoded(corpus, "held") == decoded(first, "held")
    assert corpus.fingerprint != first.fingerprint


# --- cache ---


def test_the_second_time_nothing_is_tokenized(cfg, monkeypatch):
    first = prepare(cfg, VOCAB)
    monkeypatch.setattr(shards, "_write", never)
    second = prepare(cfg, VOCAB)
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.train.ids, first.train.ids)


@pytest.mark.parametrize("name", [*shards.FILES, "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_broken_cache_is_built_again(cfg, name, harm):
    first = prepare(cfg, VOCAB)
    expected = np.array(first.train.ids)
    (folder,) = whole_folders(cfg)
    if harm == "missing":
        (folder / name).unlink()
    else:
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    again = prepare(cfg, VOCAB)
    np.testing.assert_array_equal(again.train.ids, expected)
    assert whole_folders(cfg) == [folder]


def test_an_error_while_writing_leaves_nothing(cfg, monkeypatch):
    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards._Writer, "flush", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg, VOCAB)
    assert whole_folders(cfg) == []


SCRIPT = """
import os, signal, sys
from jaxgpt.config import DataConfig
from jaxgpt.data import prepare, shards
if "kill" in sys.argv:
    real = shards._Writer.flush
    def flush(self):
        real(self)
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    shards._Writer.flush = flush
corpus = prepare(DataConfig(source=sys.argv[1], cache=sys.argv[2]), 280)
print(corpus.fingerprint, corpus.train.ids.size)
"""


def start(cfg, *args):
    command = [sys.executable, "-c", SCRIPT, cfg.source, cfg.cache, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_while_writing_leaves_nothing_to_the_next(cfg):
    killed = start(cfg, "kill")
    killed.communicate()
    assert killed.returncode < 0
    (remains,) = whole_folders(cfg)
    assert remains.suffix == ".tmp"
    corpus = prepare(cfg, VOCAB)
    assert sorted(decoded(corpus, "train") + decoded(corpus, "held")) == sorted(texts())
    (folder,) = whole_folders(cfg)
    assert folder.suffix == ""


def test_two_processes_that_prepare_at_once_agree(cfg):
    both = [start(cfg), start(cfg)]
    outputs = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    corpus = prepare(cfg, VOCAB)
    assert outputs == {f"{corpus.fingerprint} {corpus.train.ids.size}\n"}
    assert len(whole_folders(cfg)) == 1


def test_a_cache_that_can_not_be_written_is_refused(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache="):
        prepare(changed(cfg, cache=str(tmp_path / "file")), VOCAB)


def test_a_source_that_changes_while_it_is_read_is_refused(cfg, monkeypatch):
    real = shards._write

    def write(*args):
        real(*args)
        (pathlib.Path(cfg.source) / "b.txt").write_text("more")

    monkeypatch.setattr(shards, "_write", write)
    with pytest.raises(ConfigError, match="changed while it was tokenized"):
        prepare(cfg, VOCAB)


# --- fingerprint ---


def test_other_data_or_settings_give_another_fingerprint(cfg):
    corpora = [
        prepare(cfg, VOCAB),
        prepare(cfg, VOCAB - 5),
        prepare(changed(cfg, split="tail"), VOCAB),
        prepare(changed(cfg, holdout=0.3), VOCAB),
        prepare(changed(cfg, tokenizer="bytes"), VOCAB),
    ]
    (pathlib.Path(cfg.source) / "b.txt").write_text("one more")
    corpora.append(prepare(cfg, VOCAB))
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)


def test_data_that_moved_keep_their_fingerprint_and_files(cfg, tmp_path, monkeypatch):
    first = prepare(cfg, VOCAB)
    os.rename(cfg.source, tmp_path / "moved")
    monkeypatch.setattr(shards, "_write", never)
    moved = changed(cfg, source=str(tmp_path / "moved"))
    assert prepare(moved, VOCAB).fingerprint == first.fingerprint


def test_a_source_with_its_own_split_is_held_out_by_it(cfg, monkeypatch):
    def own(cfg):
        yield from [("a", b"to learn from", "train"), ("b", b"to test on", "held")]

    monkeypatch.setitem(sources.SOURCES, "own:", own)
    corpus = prepare(changed(cfg, source="own:x", tokenizer="bytes"), VOCAB)
    assert (decoded(corpus, "train"), decoded(corpus, "held")) == (
        ["to learn from"],
        ["to test on"],
    )
    assert corpus.rule == "own"
