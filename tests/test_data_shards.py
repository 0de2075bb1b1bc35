import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import make_content

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import DataConfig
from jaxgpt.data import Tokens, prepare, prepare_evaluation, shards, sources, units, work
from jaxgpt.data.shards import ConcatenatedArray
from jaxgpt.settings import ConfigError

VOCAB = 280
ROOT = pathlib.Path(__file__).parent.parent


def make_texts(count=100):
    return [f"Text number {n}: the cat sat on mat {n * 7919}.\n" for n in range(count)]


@pytest.fixture
def cfg(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in make_texts()]
    (folder / "a.jsonl").write_text("\n".join(lines))
    os.utime(folder / "a.jsonl", (1, 1))  # long ago, so that the survey is kept
    return DataConfig(source=str(folder), cache=str(tmp_path / "cache"))


def override(cfg, **settings):
    return DataConfig(**{**vars(cfg), **settings})


def decode_documents(corpus, part):
    """Return the documents of a stream, after checking that each is between bos and eos."""
    tokens, tokenizer = getattr(corpus, part), corpus.tokenizer
    pairs = zip(tokens.starts[:-1], tokens.starts[1:], strict=True)
    documents = [np.asarray(tokens.ids[begin:end]) for begin, end in pairs]
    assert all(ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos for ids in documents)
    return [tokenizer.decode(ids[1:-1]) for ids in documents]


def find_corpus_folder(cfg):
    """Return the folder of the only corpus in the cache."""
    (folder,) = (p for p in pathlib.Path(cfg.cache).iterdir() if p.name != "units")
    return folder


@pytest.fixture
def small_units(monkeypatch):
    """Ranges of 1000 bytes: the text of `cfg` has six."""
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 1000)


@pytest.fixture
def written_names(monkeypatch):
    """The names of the files written so far."""
    names = []
    real = work.atomic_write

    def record_and_write(path):
        names.append(os.path.basename(path))
        return real(path)

    monkeypatch.setattr(work, "atomic_write", record_and_write)
    return names


def raise_if_called(*args, **kwargs):
    raise AssertionError("this should not have been called")


# --- tokens ---


def test_the_two_streams_contain_every_document_once_in_order(cfg):
    corpus = prepare(cfg, VOCAB)
    train, held = decode_documents(corpus, "train"), decode_documents(corpus, "held_out")
    assert [text for text in make_texts() if text in set(train)] == train
    assert [text for text in make_texts() if text in set(held)] == held
    assert sorted(train + held) == sorted(make_texts())
    assert train
    assert held


def test_documents_split_by_tail_concatenate_to_the_originals(cfg):
    corpus = prepare(override(cfg, split="tail", tokenizer="bytes"), VOCAB)
    joined = zip(
        decode_documents(corpus, "train"), decode_documents(corpus, "held_out"), strict=True
    )
    assert [train + held for train, held in joined] == make_texts()
    assert corpus.rule == "tail"


def test_small_batches_of_documents_give_the_same_tokens(cfg, tmp_path, monkeypatch):
    one = prepare(cfg, VOCAB)
    monkeypatch.setattr(shards, "ENCODE_BATCH_BYTES", 100)
    other = prepare(override(cfg, cache=str(tmp_path / "other")), VOCAB)
    np.testing.assert_array_equal(one.train.ids, other.train.ids)
    np.testing.assert_array_equal(one.held_out.starts, other.held_out.starts)


def test_tokens_have_two_bytes_if_the_vocabulary_allows(cfg, monkeypatch):
    corpus = prepare(cfg, VOCAB)
    assert (corpus.train.ids.dtype, corpus.train.starts.dtype) == (np.uint16, np.int64)
    large = tokenizers.make_byte_tokenizer()
    large.token_bytes += [b""] * (65_537 - large.vocab_size)
    monkeypatch.setattr(tokenizers, "make_byte_tokenizer", lambda: large)
    assert prepare(override(cfg, tokenizer="bytes"), 70_000).train.ids.dtype == np.uint32


def test_the_corpus_reports_its_sizes(cfg):
    corpus = prepare(override(cfg, tokenizer="bytes"), VOCAB)
    assert corpus.train_bytes + corpus.held_out_bytes == sum(map(len, make_texts()))
    assert corpus.train.documents + corpus.held_out.documents == 100
    assert corpus.bytes_per_token == 1
    assert (corpus.source, corpus.rule) == (cfg.source, "document")


def test_stream_is_mapped_and_not_read(cfg):
    assert isinstance(prepare(cfg, VOCAB).train.ids, np.memmap)


# --- tokenizer ---


def test_the_tokenizer_is_not_trained_on_held_out_text(cfg, monkeypatch):
    seen = []
    real = tokenizers.train

    def spy(documents, vocab, log):
        seen.extend(documents)
        return real(seen, vocab)

    monkeypatch.setattr(tokenizers, "train", spy)
    for split in ("document", "tail"):
        seen.clear()
        corpus = prepare(override(cfg, split=split), VOCAB)
        assert [text.decode() for text in seen] == decode_documents(corpus, "train")


def test_a_tokenizer_is_loaded_from_a_path(cfg, tmp_path):
    trained = tokenizers.train(["some other text " * 10], 270)
    trained.save(tmp_path / "other.json")
    corpus = prepare(override(cfg, tokenizer=str(tmp_path / "other.json")), VOCAB)
    assert corpus.tokenizer.fingerprint == trained.fingerprint


def test_a_tokenizer_with_too_many_tokens_is_rejected(cfg):
    with pytest.raises(ConfigError, match=r"'bytes' has 260 tokens.*model\.vocab=200"):
        prepare(override(cfg, tokenizer="bytes"), 200)


def test_a_resumed_run_with_its_tokenizer_uses_the_same_files(cfg, tmp_path, monkeypatch):
    first = prepare(cfg, VOCAB)
    first.tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(work, "atomic_write", raise_if_called)
    again = prepare(cfg, VOCAB, tokenizers.load(tmp_path / "tokenizer.json"))
    assert again.fingerprint == first.fingerprint


def test_a_given_tokenizer_overrides_the_config(cfg):
    first = prepare(cfg, VOCAB)
    other = tokenizers.train(["some other text " * 10], 270)
    corpus = prepare(cfg, VOCAB, other)
    assert corpus.tokenizer is other
    assert decode_documents(corpus, "held_out") == decode_documents(first, "held_out")
    assert corpus.fingerprint != first.fingerprint


# --- many shards ---


def test_a_source_in_many_units_gives_the_same_corpus(cfg, tmp_path, monkeypatch):
    one = prepare(cfg, VOCAB)
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 1000)
    many = prepare(override(cfg, cache=str(tmp_path / "other")), VOCAB)
    assert isinstance(many.train.ids, ConcatenatedArray)
    assert len(many.train.ids.arrays) == 6
    assert many.fingerprint == one.fingerprint
    for part in ("train", "held_out"):
        assert decode_documents(many, part) == decode_documents(one, part)
        np.testing.assert_array_equal(getattr(many, part).starts, getattr(one, part).starts)
    assert (many.train_bytes, many.bytes_per_token) == (one.train_bytes, one.bytes_per_token)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    firsts=st.lists(st.integers(0, 200), max_size=5),
    size=st.integers(0, 80),
)
def test_windows_of_concatenated_arrays_are_those_of_one_array(sizes, firsts, size):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    starts, firsts = np.array([0, whole.size]), np.array(firsts, int)
    joined = Tokens(ConcatenatedArray(np.split(whole, np.cumsum(sizes)[:-1])), starts)
    found = joined.gather_windows(firsts, size)
    expected = Tokens(whole, starts).gather_windows(firsts, size)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype == np.int32
    assert (joined.ids.size, len(joined.ids), joined.ids.dtype) == (whole.size,) * 2 + (np.uint16,)
    for begin in firsts.tolist():
        np.testing.assert_array_equal(joined.ids[begin : begin + size], whole[begin : begin + size])


def test_a_tokenizer_is_trained_on_a_share_of_every_unit(cfg, small_units, monkeypatch):
    seen = []
    real = tokenizers.train
    monkeypatch.setattr(
        tokenizers, "train", lambda texts, vocab, log: real(seen.extend(texts) or seen, vocab)
    )
    prepare(cfg, VOCAB)
    everything, whole = [*seen], sum(map(len, seen))
    seen.clear()
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", whole // 3)
    cached = override(cfg, cache=cfg.cache + "2")
    prepare(cached, VOCAB)
    assert 0.9 * whole / 3 < sum(map(len, seen)) <= whole / 3
    places = [next(n for n, text in enumerate(everything) if text.startswith(s)) for s in seen]
    assert places == sorted(places)
    gaps = np.diff([*places, len(everything)])
    assert max(gaps) < len(everything) / 6  # evenly sampled


def test_there_may_be_more_shards_than_the_open_file_limit(cfg, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 50)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, limits[1]))
        corpus = prepare(override(cfg, tokenizer="bytes"), VOCAB)
        assert len(corpus.train.ids.arrays) + len(corpus.held_out.ids.arrays) > 80
        assert sorted(
            decode_documents(corpus, "train") + decode_documents(corpus, "held_out")
        ) == sorted(make_texts())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_workers_make_the_same_files_as_one_process(cfg, tmp_path, monkeypatch, small_units):
    one = prepare(override(cfg, workers=1), VOCAB)
    monkeypatch.setattr(work, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(work, "MIN_LOG_SECONDS", 0.0)
    monkeypatch.setattr(
        work, "_run_job", lambda job, wait: work.read_record(job) or raise_if_called()
    )
    lines = []
    others = override(cfg, workers=2, cache=str(tmp_path / "other"))
    many = prepare(others, VOCAB, log=lines.append)
    assert many.fingerprint == one.fingerprint
    assert decode_documents(many, "train") == decode_documents(one, "train")
    assert any(line.startswith("reading: ") for line in lines)
    assert any(line.startswith("tokenizing: ") and "of 6 pieces, " in line for line in lines)


def test_progress_is_logged_at_most_every_two_seconds(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 6.0, 7.0, 8.0, 10.0])
    monkeypatch.setattr(work.time, "monotonic", lambda: next(clock))
    lines = []
    progress = work._Progress("tokenizing", [10**7] * 7, [1, 2, 3, 4, 5, 6], lines.append)
    for number in (1, 2, 2, 3, 4, 5, 6):  # 2 is reported twice
        progress.mark_done(number)
    assert lines == [
        "tokenizing: 3 of 7 pieces, 30 of 70 MB, 4.0 MB/s, 0:10 left",
        "tokenizing: 5 of 7 pieces, 50 of 70 MB, 5.7 MB/s, 0:03 left",
    ]


def test_an_error_in_a_worker_is_raised(cfg, tmp_path, monkeypatch, small_units):
    with open(os.path.join(cfg.source, "a.jsonl"), "a") as file:
        file.write("\n{oops")
    os.utime(os.path.join(cfg.source, "a.jsonl"), (1, 1))
    monkeypatch.setattr(work, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(work, "_run_jobs_here", raise_if_called)
    with pytest.raises(ConfigError, match=r"a\.jsonl at byte \d+ is not JSON"):
        prepare(override(cfg, workers=2), VOCAB)


def test_workers_import_neither_jax_nor_the_program_that_called():
    code = "import sys, jaxgpt.data.work, jaxgpt.data.shards; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- several sources ---


def write_source(folder, name, count):
    (folder / name).mkdir()
    for n in range(count):
        (folder / name / f"{n}.txt").write_text(f"{name} {n * 7919}")
    return folder / name


def test_a_mixture_has_a_stream_for_each_weight(cfg, tmp_path):
    a, b = (write_source(tmp_path, name, 40) for name in "ab")
    corpus = prepare(override(cfg, source=f"3 * {a} + 1 * {b}", tokenizer="bytes"), VOCAB)
    assert corpus.names == (str(a), str(b))
    assert [share for share, _ in corpus.mixture] == [0.75, 0.25]
    streams = [
        decode_documents(dataclasses.replace(corpus, train=t), "train") for _, t in corpus.mixture
    ]
    assert [{text[0] for text in texts} for texts in streams] == [{"a"}, {"b"}]
    assert streams[0] + streams[1] == decode_documents(corpus, "train")
    assert {text[0] for text in decode_documents(corpus, "held_out")} == {"a", "b"}
    bare = prepare(override(cfg, source=f"{a} + {b}", tokenizer="bytes"), VOCAB)
    assert decode_documents(bare, "train") == decode_documents(corpus, "train")
    assert [(share, stream is bare.train) for share, stream in bare.mixture] == [(1.0, True)]


def test_the_fingerprint_of_a_mixture_depends_on_shares_and_sources(cfg, tmp_path):
    a, b = (write_source(tmp_path, name, 40) for name in "ab")
    found = {
        prepare(override(cfg, source=source, tokenizer="bytes"), VOCAB).fingerprint
        for source in (
            f"{a} + {b}",
            f"3 * {a} + 1 * {b}",
            f"1 * {a} + 3 * {b}",
            f"3 * {b} + 1 * {a}",
        )
    }
    assert len(found) == 4
    same = (f"0.3 * {a} + 0.1 * {b}", f"0.75 * {a} + 0.25 * {b}")
    assert len({prepare(override(cfg, source=s), VOCAB).fingerprint for s in same}) == 1


def test_a_weight_of_an_empty_source_is_rejected(cfg, tmp_path):
    a = write_source(tmp_path, "a", 40)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.txt").write_text("")
    with pytest.raises(ConfigError, match=r"gives a weight to '.*/b', of which nothing"):
        prepare(override(cfg, source=f"1 * {a} + 1 * {tmp_path / 'b'}"), VOCAB)


# --- cache ---


def test_the_second_time_nothing_is_read_or_written(cfg, small_units, monkeypatch):
    first = prepare(cfg, VOCAB)
    monkeypatch.setattr(sources, "read_unit", raise_if_called)
    monkeypatch.setattr(work, "atomic_write", raise_if_called)
    lines = []
    second = prepare(cfg, VOCAB, log=lines.append)
    assert second.fingerprint == first.fingerprint
    assert decode_documents(second, "train") == decode_documents(first, "train")
    assert lines == []


def test_a_recently_changed_file_is_read_again(cfg, monkeypatch):
    path = pathlib.Path(cfg.source) / "a.jsonl"
    path.write_text(path.read_text())  # the next change might leave its mtime as it is
    first = prepare(cfg, VOCAB)
    before = path.stat()
    path.write_text(path.read_text().replace("cat", "dog"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(cfg, VOCAB).fingerprint != first.fingerprint


def test_an_added_file_keeps_the_surveys_of_the_others(cfg, small_units, written_names):
    prepare(override(cfg, tokenizer="bytes"), VOCAB)
    assert sum(name.endswith(".train.bin") for name in written_names) == 6
    written_names.clear()
    (pathlib.Path(cfg.source) / "b.txt").write_text("one more")
    prepare(override(cfg, tokenizer="bytes"), VOCAB)
    # Surveys are written to <32 hexadecimal digits>.json.
    assert not [name for name in written_names if len(name) == 37]


@pytest.mark.parametrize("name", ["000002.train.bin", "000003.held.npy"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "checked by size only"])
def test_a_damaged_shard_is_named_and_made_again_once_it_is_deleted(
    cfg, small_units, written_names, name, harm
):
    expected = decode_documents(prepare(cfg, VOCAB), "train")
    path = find_corpus_folder(cfg) / name
    content = path.read_bytes()
    path.write_bytes(content[:-2] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    if harm == "checked by size only":
        prepare(override(cfg, verify=False), VOCAB)
    with pytest.raises(ConfigError) as caught:
        prepare(override(cfg, verify=harm != "cut"), VOCAB)
    assert str(path) in str(caught.value)
    wrong = f"bytes should be {len(content)}, and is {len(content) - 2}"
    assert (wrong if harm == "cut" else "blake2b should be ") in str(caught.value)
    assert "Delete it" in str(caught.value)
    path.unlink()
    written_names.clear()
    assert decode_documents(prepare(cfg, VOCAB), "train") == expected
    assert {file.partition(".")[0] for file in written_names} == {
        name.partition(".")[0],
        "manifest",
    }
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "000000.json"])
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_other_damaged_files_are_made_again(cfg, name, harm):
    first = prepare(cfg, VOCAB)
    path = find_corpus_folder(cfg) / name
    expected = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        os.truncate(path, len(expected) // 2)
    (find_corpus_folder(cfg) / "manifest.json").unlink(missing_ok=True)  # it contains all records
    assert decode_documents(prepare(cfg, VOCAB), "held_out") == decode_documents(first, "held_out")
    assert path.read_bytes() == expected


def test_shards_of_another_tokenizer_are_made_again(cfg):
    prepare(cfg, VOCAB)
    other = tokenizers.train(["some other text " * 10], 270)
    other.save(find_corpus_folder(cfg) / "tokenizer.json")
    corpus = prepare(cfg, VOCAB)
    assert corpus.tokenizer.fingerprint == other.fingerprint
    assert sorted(
        decode_documents(corpus, "train") + decode_documents(corpus, "held_out")
    ) == sorted(make_texts())


def test_the_manifest_describes_the_corpus(cfg, small_units):
    corpus = prepare(cfg, VOCAB)
    manifest = json.loads((find_corpus_folder(cfg) / "manifest.json").read_text())
    assert manifest["source"] == cfg.source
    assert manifest["tokenizer"] == corpus.tokenizer.fingerprint
    assert manifest["dtype"] == "uint16"
    found = [unit["train"] for unit in manifest["units"]]
    assert sum(shard["tokens"] for shard in found) == corpus.train.ids.size
    assert sum(shard["documents"] for shard in found) == corpus.train.documents
    assert sum(shard["bytes"] for shard in found) == corpus.train_bytes
    for name, facts in (item for unit in manifest["units"] for item in unit["files"].items()):
        content = (find_corpus_folder(cfg) / name).read_bytes()
        assert facts["bytes"] == len(content)
        assert facts["blake2b"] == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_an_error_while_writing_leaves_only_complete_files(cfg, small_units, monkeypatch):
    real, calls = shards._ShardWriter.close, []

    def fail(self):
        calls.append(self.stem)
        if len(calls) == 6:  # the third unit's second shard
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(shards._ShardWriter, "close", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg, VOCAB)
    endings = (".json", ".train.bin", ".train.npy", ".held.bin", ".held.npy")
    whole = {f"00000{n}{ending}" for n in (0, 1) for ending in endings}
    assert set(os.listdir(find_corpus_folder(cfg))) == whole | {"tokenizer.json"}


# --- processes ---


SCRIPT = """
import os, signal, sys
from jaxgpt.config import DataConfig
from jaxgpt.data import prepare, shards, units
units.TARGET_UNIT_BYTES = 1000
written_names, real = [], shards._ShardWriter.close
def close(self):
    if "kill" in sys.argv and len(written_names) == 7:  # inside the fourth unit
        os.kill(os.getpid(), signal.SIGKILL)
    real(self)
    written_names.append(self.stem)
shards._ShardWriter.close = close
print("ready", flush=True)
sys.stdin.readline()
corpus = prepare(DataConfig(source=sys.argv[1], cache=sys.argv[2], workers=1), 280)
print(corpus.fingerprint, corpus.train.ids.size, len(written_names) // 2)
"""


def start_process(cfg, *args):
    command = [sys.executable, "-c", SCRIPT, cfg.source, cfg.cache, *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_process_killed_while_writing_loses_only_its_current_unit(
    cfg, small_units, written_names
):
    killed = start_process(cfg, "kill")
    killed.communicate("\n")
    assert killed.returncode == -9
    left = os.listdir(find_corpus_folder(cfg))
    assert "manifest.json" not in left
    assert any(name.endswith(".tmp") for name in left)
    corpus = prepare(cfg, VOCAB)
    assert sorted(
        decode_documents(corpus, "train") + decode_documents(corpus, "held_out")
    ) == sorted(make_texts())
    assert sum(name.endswith(".train.bin") for name in written_names) == 3
    assert not any(name.endswith((".tmp", ".lock")) for name in os.listdir(find_corpus_folder(cfg)))


def test_two_processes_that_prepare_at_once_share_the_work(cfg, small_units):
    both = [start_process(cfg), start_process(cfg)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    corpus = prepare(cfg, VOCAB)
    for fingerprint, size, _ in outputs:
        assert (fingerprint, int(size)) == (corpus.fingerprint, corpus.train.ids.size)
    assert sum(int(count) for _, _, count in outputs) == 6  # each unit once
    find_corpus_folder(cfg)  # there is one


def test_without_working_locks_the_work_is_done_twice_and_correctly(
    cfg, small_units, monkeypatch, written_names
):
    """Another process makes the same files and finishes while one is in the middle of a unit."""
    monkeypatch.setattr(work.fcntl, "flock", lambda *args: None)
    real, others = shards._ShardWriter.close, []

    def close(self):
        if self.stem.endswith("000003.held") and not others:
            others.append(None)
            others.append(prepare(cfg, VOCAB))  # which removes the unfinished files
        real(self)

    monkeypatch.setattr(shards._ShardWriter, "close", close)
    corpus = prepare(cfg, VOCAB)
    assert corpus.fingerprint == others[1].fingerprint
    assert decode_documents(corpus, "train") == decode_documents(others[1], "train")
    assert written_names.count("000003.train.bin") == 2


def test_a_cache_that_cannot_be_written_is_rejected(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache="):
        prepare(override(cfg, cache=str(tmp_path / "file")), VOCAB)


@pytest.mark.parametrize("name", ["a.jsonl", "b.txt", "a.jsonl, with its size and time"])
def test_a_source_that_changes_while_it_is_tokenized_is_rejected(cfg, monkeypatch, name):
    real = tokenizers.train

    def train(*args):  # after the first reading, before the tokens are written
        path = pathlib.Path(cfg.source) / name.partition(",")[0]
        is_hidden = path.name != name
        path.write_text(path.read_text().replace("cat", "dog") if is_hidden else '{"text": "more"}')
        os.utime(path, (1, 1) if is_hidden else (2, 2))
        return real(*args)

    monkeypatch.setattr(tokenizers, "train", train)
    with pytest.raises(ConfigError, match="changed while it was tokenized"):
        prepare(cfg, VOCAB)
    assert not (find_corpus_folder(cfg) / "manifest.json").exists()


# --- fingerprint ---


def test_other_data_or_settings_change_the_fingerprint(cfg):
    corpora = [
        prepare(cfg, VOCAB),
        prepare(cfg, VOCAB - 5),
        prepare(override(cfg, split="tail"), VOCAB),
        prepare(override(cfg, holdout=0.3), VOCAB),
        prepare(override(cfg, tokenizer="bytes"), VOCAB),
    ]
    (pathlib.Path(cfg.source) / "b.txt").write_text("one more")
    corpora.append(prepare(cfg, VOCAB))
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)


def test_moved_data_keeps_its_fingerprint_and_files(cfg, tmp_path, monkeypatch):
    first = prepare(cfg, VOCAB)
    os.rename(cfg.source, tmp_path / "moved")
    # It must be read to compute its digest, but nothing is written.
    monkeypatch.setattr(shards, "_write_shards", raise_if_called)
    moved = override(cfg, source=str(tmp_path / "moved"))
    assert prepare(moved, VOCAB).fingerprint == first.fingerprint


def test_a_source_with_its_own_split_is_held_out_by_it(cfg, monkeypatch):
    documents = [("a", b"to learn from", "train"), ("b", b"to test on", "held")]
    unit = units.SourceUnit("own", [], 23, lambda: documents)
    monkeypatch.setitem(sources.SOURCES, "own:", lambda cfg: [unit])
    corpus = prepare(override(cfg, source="own:x", tokenizer="bytes"), VOCAB)
    assert (decode_documents(corpus, "train"), decode_documents(corpus, "held_out")) == (
        ["to learn from"],
        ["to test on"],
    )
    assert corpus.rule == "own"


# --- sources of their own for validation and test ---


def write_own(tmp_path, name, count, ending=".jsonl"):
    texts = [f"{name} number {n}" for n in range(count)]
    lines = [json.dumps({"text": text}) for text in texts]
    content = "\n".join(["text", *texts] if ending == ".csv" else lines)
    (tmp_path / f"{name}{ending}").write_text(content)
    return str(tmp_path / f"{name}{ending}"), texts


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_data_validation_is_what_is_held_out(cfg, tmp_path, ending):
    source, texts = write_own(tmp_path, "valid", 7, ending)
    corpus = prepare(override(cfg, validation=source), VOCAB)
    assert decode_documents(corpus, "train") == make_texts()
    assert decode_documents(corpus, "held_out") == texts
    assert corpus.rule == "own"
    assert corpus.test is None
    assert corpus.fingerprint != prepare(cfg, VOCAB).fingerprint


def test_data_validation_is_not_part_of_a_mixture(cfg, tmp_path):
    source, texts = write_own(tmp_path, "valid", 7)
    other, others = write_own(tmp_path, "other", 30)
    mixed = override(cfg, source=f"0.5 * {cfg.source} + 0.5 * {other}", validation=source)
    corpus = prepare(mixed, VOCAB)
    assert [stream.documents for _, stream in corpus.mixture] == [100, 30]
    assert decode_documents(corpus, "train") == make_texts() + others
    assert decode_documents(corpus, "held_out") == texts


def test_what_a_source_holds_out_itself_is_not_trained_on_with_data_validation(
    cfg, tmp_path, monkeypatch
):
    source, _ = write_own(tmp_path, "valid", 7)
    split = [("a", b"train", "train", b""), ("b", b"held", "held", b"")]
    unit = units.SourceUnit("own", ["own"], 9, lambda: iter(split))
    monkeypatch.setitem(sources.SOURCES, "own:", lambda cfg: [unit])
    corpus = prepare(override(cfg, source="own:x", validation=source, tokenizer="bytes"), VOCAB)
    assert decode_documents(corpus, "train") == ["train"]
    corpus = prepare(override(cfg, validation="own:x", tokenizer="bytes"), VOCAB)
    assert decode_documents(corpus, "held_out") == ["held"]


def test_data_test_changes_nothing_of_the_rest(cfg, tmp_path):
    source, texts = write_own(tmp_path, "test", 5)
    plain, corpus = prepare(cfg, VOCAB), prepare(override(cfg, test=source), VOCAB)
    assert decode_documents(corpus, "test") == texts
    assert corpus.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(corpus.train.ids, plain.train.ids)
    np.testing.assert_array_equal(corpus.held_out.ids, plain.held_out.ids)


def test_a_corpus_to_evaluate_on_is_all_of_a_source(cfg, tmp_path, monkeypatch):
    source, texts = write_own(tmp_path, "test", 5)
    tokenizer = prepare(cfg, VOCAB).tokenizer
    whole = prepare_evaluation(cfg, tokenizer, setting="source")
    assert decode_documents(whole, "held_out") == make_texts()
    assert whole.held_out_bytes == sum(map(len, make_texts()))
    corpus = prepare_evaluation(override(cfg, test=source), tokenizer)
    assert decode_documents(corpus, "held_out") == decode_documents(corpus, "train") == texts
    monkeypatch.setattr(shards, "_write_shards", raise_if_called)
    again = prepare_evaluation(override(cfg, test=source), tokenizer)
    assert again.fingerprint == corpus.fingerprint


@pytest.mark.parametrize("setting", ["validation", "test"])
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("missing.txt", "data.{}='missing.txt' matches no file"),
        ("0.5 * a + 0.5 * b", "data.{}='0.5 * a + 0.5 * b' has weights: leave them out"),
    ],
)
def test_an_error_in_a_source_of_its_own_names_its_setting(cfg, setting, source, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint.format(setting))):
        prepare(override(cfg, **{setting: source}), VOCAB)


def test_an_empty_test_set_is_rejected(cfg, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"data\.test=.*has no text to evaluate on"):
        prepare(override(cfg, test=str(tmp_path / "empty.txt")), VOCAB)


# --- memory ---


@pytest.mark.parametrize(
    "line",
    ["acgt" * 750_000, "北京是首都，" * 167_000, "the cat sat on the mat\n" * 130_000],
    ids=["one word", "Chinese", "English"],
)
@pytest.mark.parametrize("ending", [".jsonl"])
def test_the_memory_for_a_long_document_is_a_small_multiple_of_it(tmp_path, line, ending):
    # Of 3 MB, with a tokenizer trained on it.
    text = json.dumps({"text": line}, ensure_ascii=False) if ending == ".jsonl" else line
    (tmp_path / f"a{ending}").write_text(text)
    script = (
        "import resource\n"
        "from jaxgpt.config import DataConfig\n"
        "from jaxgpt.data import prepare\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        f"prepare(DataConfig(source={str(tmp_path / ('a' + ending))!r}, "
        f"cache={str(tmp_path / 'cache')!r}), 300)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 160  # megabytes; 40 to 82 measured, and 344 before


@pytest.mark.parametrize("kind", ["llama2", "t5", "wordpiece", "qwen2"])
def test_documents_of_any_tokenizer_have_its_ids_between_what_begins_and_ends_a_text(
    kind, cfg, tmp_path
):
    settings = {"bos_token": None}  # as a file of transformers: the file says whether bos is added
    tokenizer = tokenizers.Tokenizer(make_content(kind), settings=settings)
    tokenizer.save(tmp_path / "tokenizer.json")
    notes = []
    corpus = prepare(
        override(cfg, tokenizer=str(tmp_path / "tokenizer.json")), 2000, log=notes.append
    )
    assert corpus.tokenizer.adds_bos == (kind in ("llama2", "wordpiece"))
    prefix, eos = tokenizer.prefix, tokenizer.eos
    expected = [[*prefix, *tokenizer.encode(text).tolist(), eos] for text in make_texts()]
    found = [
        tokens.ids[begin:end].tolist()
        for tokens in (corpus.train, corpus.held_out)
        for begin, end in zip(tokens.starts[:-1], tokens.starts[1:], strict=True)
    ]
    assert sorted(found) == sorted(expected)
    assert any("does not keep all of a text" in note for note in notes)
    frames = corpus.held_out.documents * (1 + tokenizer.adds_bos)
    size = corpus.held_out.ids.size - frames
    assert corpus.bytes_per_token == corpus.held_out_bytes / size


def test_targets_begin_with_bos_even_if_texts_do_not(tmp_path):
    lines = [json.dumps({"text": f"source {n}", "answer": f"target {n}"}) for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.make_byte_tokenizer().content, settings={"add_bos_token": False}
    )
    cfg = DataConfig(source=str(tmp_path / "pairs.jsonl"), cache=str(tmp_path / "cache"),
                     target_key="answer")  # fmt: skip
    corpus = prepare(cfg, VOCAB, tokenizer, is_paired=True)
    firsts = corpus.train.ids[corpus.train.starts[:-1]].reshape(-1, 2)
    assert set(firsts[:, 0].tolist()) == {4 + ord("s")}
    assert set(firsts[:, 1].tolist()) == {tokenizer.bos}
    pairs = corpus.held_out.documents // 2
    text = corpus.held_out.ids.size - 3 * pairs
    assert corpus.bytes_per_token == corpus.held_out_bytes / text
