import csv
import gzip
import io
import json
import os
import pickle
import shutil
import sys
import types

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import DataConfig
from jaxgpt.data import files, sources, units
from jaxgpt.data.sources import Document, divide, hold_out_document, hold_out_tail, read_documents
from jaxgpt.data.units import SourceUnit
from jaxgpt.settings import ConfigError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def write_files(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_source(source, **settings):
    return list(read_documents(DataConfig(source=str(source), **settings)))


def survey_source(cfg):
    """Return the survey of a source: the sum of those of its units."""
    return sum(
        (sources.survey_unit(unit, cfg.holdout) for unit in sources.list_units(cfg)),
        sources.EMPTY_SURVEY,
    )


def relative_names(folder, found):
    return [os.path.relpath(document.name, folder) for document in found]


def get_error(source, **settings):
    with pytest.raises(ConfigError) as caught:
        read_source(source, **settings)
    return str(caught.value)


# --- files ---


def test_a_folder_is_read_recursively_in_the_order_of_paths(tmp_path):
    write_files(tmp_path, {"b.txt": b"2", "a.md": b"1", "inner/deep/c.py": b"3", "no.csv": b"x"})
    found = read_source(tmp_path)
    assert relative_names(tmp_path, found) == ["a.md", "b.txt", "inner/deep/c.py"]
    assert [document.content for document in found] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "in/c.txt"]),
        ("in", ["in/c.txt"]),
        ("a.txt", ["a.txt"]),
    ],
)
def test_a_source_is_a_file_or_a_folder_or_a_glob(tmp_path, pattern, expected):
    write_files(tmp_path, {"a.txt": b"1", "b.txt": b"2", "in/c.txt": b"3"})
    assert relative_names(tmp_path, read_source(tmp_path / pattern)) == expected


def test_a_folder_whose_name_looks_like_a_glob_is_read(tmp_path):
    write_files(tmp_path, {"runs[1]/a.txt": b"1"})
    assert relative_names(tmp_path, read_source(tmp_path / "runs[1]")) == ["runs[1]/a.txt"]


def test_empty_documents_are_left_out(tmp_path):
    write_files(
        tmp_path, {"a.txt": b"", "b.txt": b"2", "c.jsonl": b'{"text": ""}\n\n{"text": "3"}'}
    )
    assert [document.content for document in read_source(tmp_path)] == [b"2", b"3"]


def test_text_that_is_not_utf8_is_unchanged(tmp_path):
    content = bytes(range(256)) + b"\r\n"
    write_files(tmp_path, {"a.txt": content})
    assert read_source(tmp_path, encoding="utf-8")[0].content == content


@pytest.mark.parametrize("compression", COMPRESS)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5), piece=st.integers(1, 40))
@settings(deadline=None)
def test_jsonl_yields_each_record_with_its_line(tmp_path_factory, compression, texts, piece):
    folder = tmp_path_factory.mktemp("records")
    lines = "\n".join(json.dumps({"id": 1, "text": text}) for text in texts)
    write_files(folder, {f"a.jsonl{compression}": COMPRESS[compression](lines.encode())})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", piece)  # borders of pieces fall anywhere
        found = read_source(folder)
    assert [document.content.decode() for document in found] == texts
    expected = [f"a.jsonl{compression}:{line}" for line in range(1, len(texts) + 1)]
    assert relative_names(folder, found) == expected


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_compressed_text_is_decompressed(tmp_path, compression):
    content = b"To be, or not to be\n" * 200_000  # more than one piece
    write_files(tmp_path, {f"a.txt{compression}": COMPRESS[compression](content)})
    assert [document.content for document in read_source(tmp_path)] == [content]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_concatenated_compressed_parts_are_one_text(tmp_path, compression):
    write_files(
        tmp_path,
        {f"a.txt{compression}": COMPRESS[compression](b"one ") + COMPRESS[compression](b"two")},
    )
    assert read_source(tmp_path)[0].content == b"one two"


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("harm", [lambda b: b[:-3], lambda b: b"nonsense" + b])
def test_a_truncated_or_corrupt_file_is_rejected_by_name(tmp_path, compression, harm):
    packed = COMPRESS[compression](os.urandom(5000).hex().encode())
    write_files(tmp_path, {f"a.txt{compression}": harm(packed)})
    message = get_error(tmp_path)
    assert f"a.txt{compression} cannot be read" in message
    assert "get it again" in message


def test_zstandard_is_required_only_for_files_that_need_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    write_files(tmp_path, {"a.txt": b"1", "b.txt.zst": COMPRESS[".zst"](b"2")})
    assert read_source(tmp_path / "a.txt")
    assert "b.txt.zst needs zstandard: pip install 'jaxgpt[zstd]'" in get_error(tmp_path)


def test_a_source_that_matches_nothing_is_rejected(tmp_path):
    message = get_error(tmp_path / "none*.txt")
    assert "data.source=" in message
    assert "none*.txt" in message
    assert ".jsonl" in message
    assert "tfds:name" in message


def test_a_source_without_a_readable_ending_is_rejected(tmp_path):
    write_files(tmp_path, {"a.parquet": b"x", "b.pdf": b"x"})
    message = get_error(tmp_path)
    assert "matches 2 files" in message
    assert ".parquet, .pdf" in message
    assert ".txt .md .py .jsonl .csv .tsv (each also with .gz or .zst)" in message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{oops", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is a JSON list"),
        (b'{"body": "x", "id": 1}', "has no key 'text'; it has body, id"),
        (b'{"text": 7}', "'text' is 7, not a string"),
    ],
)
def test_a_bad_record_is_rejected_with_its_line(tmp_path, line, complaint):
    write_files(tmp_path, {"a.jsonl": b'{"text": "fine"}\n' + line})
    message = get_error(tmp_path)
    assert "a.jsonl:2" in message
    assert complaint in message


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py.gz"])
@pytest.mark.parametrize("before", [10, 10_000, 2_000_000])
def test_a_binary_file_with_the_ending_of_text_is_rejected_by_name(tmp_path, name, before):
    content = b"x" * before + b"\0\0"
    write_files(tmp_path, {name: COMPRESS[".gz" if name.endswith("gz") else ""](content)})
    message = get_error(tmp_path)
    assert f"{name} is not text: it has a NUL byte at {before}" in message
    assert "leave it out with a glob" in message


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"x" * 5000),
        ("a.jsonl", b'{"text": "fine"}\n' + b"y" * 4000 + b"\n\n"),
        ("a.csv", b"text\nfine\n" + b"y" * 4000),
        ("a.csv", b'text\n"' + b"y\n" * 2000 + b'"'),
    ],
)
def test_a_gigantic_text_is_rejected_and_never_loaded(
    tmp_path, monkeypatch, compression, name, content
):
    write_files(tmp_path, {name + compression: COMPRESS[compression](content)})
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    buffered = []
    real = files._BoundedBuffer.add

    def add(self, piece, name):
        real(self, piece, name)
        buffered.append(sum(map(len, self.chunks)))

    monkeypatch.setattr(files._BoundedBuffer, "add", add)
    message = get_error(tmp_path, max_document=0.003)
    assert name + compression in message
    assert "data.max_document=0.003 MB" in message or "field larger than field limit" in message
    assert max(buffered, default=0) <= 3000


def test_a_text_of_the_longest_size_is_read(tmp_path):
    write_files(tmp_path, {"a.txt": b"x" * 5000})
    assert len(read_source(tmp_path, max_document=0.005)[0].content) == 5000
    assert "max_document=0.004999" in get_error(tmp_path, max_document=0.004999)


def test_a_file_that_vanishes_after_it_was_listed_is_named(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": b"1", "b.txt": b"2"})
    (unit,) = sources.list_units(DataConfig(source=str(tmp_path)))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConfigError, match=r"b\.txt cannot be read.*No such file"):
        list(sources.read_unit(unit))
    monkeypatch.setattr(files, "find_files", lambda source: [str(tmp_path / "b.txt")])
    assert "b.txt cannot be read" in get_error(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": b"1", "closed/b.txt": b"2"})
    real = os.access
    closed = str(tmp_path / "closed")  # simulated, as permissions do not restrict root
    monkeypatch.setattr(
        os, "access", lambda path, mode: os.fspath(path) != closed and real(path, mode)
    )
    assert f"the folder {closed} cannot be read" in get_error(tmp_path)


# --- several documents in a file ---


@given(
    texts=st.lists(st.text("ab<|>\n"), min_size=1, max_size=6),
    separator=st.sampled_from(["<|endoftext|>", "||", "\\n\\n", "é"]),
    piece=st.integers(1, 40),
)
@settings(deadline=None)
def test_a_separator_divides_a_file_into_documents(tmp_path_factory, texts, separator, piece):
    folder = tmp_path_factory.mktemp("stories")
    content = separator.replace("\\n", "\n").join(texts)
    write_files(folder, {"a.txt": content.encode()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", piece)
        patch.setattr("jaxgpt.data.encodings.SAMPLE_BYTES", piece)
        found = read_source(folder, separator=separator)
    parts = [part.strip("\r\n") for part in content.split(separator.replace("\\n", "\n"))]
    numbered = [(f"a.txt:{n}", part) for n, part in enumerate(parts, start=1) if part]
    assert [(os.path.basename(d.name), d.content.decode()) for d in found] == numbered


def test_documents_between_separators_are_read_one_by_one(tmp_path):
    write_files(tmp_path, {"a.txt": (b"x" * 900 + b"\n<|endoftext|>\n") * 10})
    found = read_source(tmp_path, separator="<|endoftext|>", max_document=0.001)
    assert [document.content for document in found] == [b"x" * 900] * 10
    assert "of more than data.max_document" in get_error(tmp_path, max_document=0.001)


# --- tables ---


@pytest.mark.parametrize(("ending", "dialect"), [(".csv", "excel"), (".tsv", "excel-tab")])
@pytest.mark.parametrize("compression", COMPRESS)
@given(
    rows=st.lists(st.tuples(st.text("a\"',\t é\n"), st.text("xy,")), min_size=1, max_size=5),
    piece=st.integers(1, 40),
)
@settings(deadline=None)
def test_a_table_yields_each_row(tmp_path_factory, ending, dialect, compression, rows, piece):
    folder, buffer = tmp_path_factory.mktemp("table"), io.StringIO(newline="")
    writer = csv.writer(buffer, dialect)
    writer.writerows([("id", "body", "label"), *((7, *row) for row in rows)])
    content = COMPRESS[compression](buffer.getvalue().encode("utf-8-sig"))
    write_files(folder, {f"a{ending}{compression}": content})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", piece)
        found = read_source(folder, text_key="body", target_key="label")
    expected = [(text.encode(), target.encode()) for text, target in rows if text]
    assert [(document.content, document.target) for document in found] == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"id,body\n1,x\n", "a.csv:2 has no key 'text'; it has id, body"),
        (b"id,text\n1,x\n2,y,z\n", "a.csv:3 has 3 fields, and the first row names 2 columns"),
        (b'id,text\n1,"x"y\n', "a.csv:2 is not a row of a table: ',' expected after '\"'"),
        (b'id,text\n1,"x\n', "is not a row of a table: unexpected end of data"),
    ],
)
def test_a_bad_table_is_rejected_with_its_line(tmp_path, content, complaint):
    write_files(tmp_path, {"a.csv": content})
    assert complaint in get_error(tmp_path)


def test_tables_beside_other_texts_of_a_folder_are_not_read(tmp_path):
    write_files(tmp_path, {"a.txt": b"1", "b.csv": b"text\n2\n"})
    assert [document.content for document in read_source(tmp_path)] == [b"1"]
    assert [document.content for document in read_source(tmp_path / "*")] == [b"1", b"2"]


@pytest.mark.parametrize(("label", "expected"), [(b"3", b"3"), (b"-1", b"-1"), (b'"x"', b"x")])
def test_the_number_of_a_class_is_an_answer(tmp_path, label, expected):
    write_files(tmp_path, {"a.jsonl": b'{"text": "t", "label": ' + label + b"}"})
    assert read_source(tmp_path, target_key="label")[0].target == expected


def test_surrogates_in_json_have_the_bytes_that_they_have_in_a_prompt(tmp_path):
    write_files(tmp_path, {"a.jsonl": rb'{"text": "\udcff\ud800\ud83d\ude42"}'})
    expected = b"\xff\xed\xa0\x80" + "\U0001f642".encode()
    assert read_source(tmp_path)[0].content == expected


# --- units ---


@given(
    texts=st.lists(st.one_of(st.text(max_size=30), st.none()), min_size=1, max_size=12),
    size=st.integers(1, 200),
    piece=st.integers(1, 40),
)
def test_ranges_of_a_jsonl_yield_each_line_once_and_in_order(tmp_path_factory, texts, size, piece):
    folder = tmp_path_factory.mktemp("ranges")
    lines = ["" if text is None else json.dumps({"text": text}) for text in texts]
    write_files(folder, {"a.jsonl": "\n".join(lines).encode()})
    cfg = DataConfig(source=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "TARGET_UNIT_BYTES", size)
        patch.setattr(files, "CHUNK_BYTES", piece)
        found = [list(sources.read_unit(unit)) for unit in sources.list_units(cfg)]
    assert len(found) == max(-(-len("\n".join(lines).encode()) // size), 1)
    assert [d.content.decode() for unit in found for d in unit] == [t for t in texts if t]


def test_a_bad_line_inside_a_range_is_named_by_its_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 1000)
    good = b'{"text": "fine"}\n'
    write_files(tmp_path, {"a.jsonl": good * 100 + b"{oops\n" + good * 100})
    assert f"a.jsonl at byte {len(good) * 100} is not JSON" in get_error(tmp_path)
    write_files(tmp_path, {"a.jsonl": good * 2 + b"{oops\n" + good * 100})
    assert "a.jsonl:3 is not JSON" in get_error(tmp_path)


def test_small_files_share_a_unit_and_large_ones_have_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 100)
    sizes = dict(a=40, b=60, c=1, d=500, e=99, f=1, g=1)
    write_files(tmp_path, {f"{name}.txt": b"x" * size for name, size in sizes.items()})
    found = sources.list_units(DataConfig(source=str(tmp_path)))
    inside = [
        "".join(relative_names(tmp_path, sources.read_unit(u))).replace(".txt", "") for u in found
    ]
    assert inside == ["ab", "c", "d", "ef", "g"]
    assert [unit.size for unit in found] == [100, 1, 500, 100, 1]


def test_the_digest_does_not_depend_on_how_documents_are_divided(tmp_path, monkeypatch):
    texts = [f"text {n}" for n in range(50)]
    write_files(
        tmp_path, {"in/a.jsonl": "\n".join(json.dumps({"text": t}) for t in texts).encode()}
    )
    write_files(tmp_path, {f"out/{n:02}.txt": text.encode() for n, text in enumerate(texts)})
    found = [survey_source(DataConfig(source=str(tmp_path / "in")))]
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 70)
    found += [survey_source(DataConfig(source=str(tmp_path / name))) for name in ("in", "out")]
    assert found[0] == found[1] == found[2]
    texts[7], texts[8] = texts[8], texts[7]
    write_files(
        tmp_path, {"in/a.jsonl": "\n".join(json.dumps({"text": t}) for t in texts).encode()}
    )
    assert survey_source(DataConfig(source=str(tmp_path / "in"))).digest != found[0].digest


@pytest.mark.parametrize("change", ["size", "time", "name", "key", "text"])
def test_the_facts_of_a_unit_change_with_its_files_and_settings(tmp_path, change):
    write_files(tmp_path, {"a.jsonl": b'{"text": "x"}'})
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))

    def facts(**settings):
        return [
            unit.facts for unit in sources.list_units(DataConfig(source=str(tmp_path), **settings))
        ]

    before = facts()
    assert facts() == before
    changes = dict(
        size=lambda: (write_files(tmp_path, {"a.jsonl": b'{"text": "xy"}'}),
                      os.utime(tmp_path / "a.jsonl", ns=(1, 1))),
        text=lambda: (write_files(tmp_path, {"a.jsonl": b'{"text": "y"}'}),
                      os.utime(tmp_path / "a.jsonl", ns=(1, 1))),
        time=lambda: os.utime(tmp_path / "a.jsonl", ns=(2, 2)),
        name=lambda: os.rename(tmp_path / "a.jsonl", tmp_path / "b.jsonl"),
        key=lambda: None,
    )  # fmt: skip
    changes[change]()
    assert facts(**({"text_key": "body"} if change == "key" else {})) != before


# --- several sources ---


def test_sources_are_read_one_after_another(tmp_path):
    write_files(tmp_path, {"b/1.txt": b"1", "b/2.txt": b"2", "a/3.txt": b"3"})
    found = read_source(f"{tmp_path / 'b'} + {tmp_path / 'a'}")
    assert [document.content for document in found] == [b"1", b"2", b"3"]


def test_weights_precede_their_sources():
    found = sources.parse_sources(
        DataConfig(source="0.7 * wiki/*.jsonl + 3e-1 * tfds:lm1b/x + 2 * a*b")
    )
    assert [(weight, cfg.source) for weight, cfg in found] == [
        (0.7, "wiki/*.jsonl"), (0.3, "tfds:lm1b/x"), (2.0, "a*b")]  # fmt: skip
    ((weight, cfg),) = sources.parse_sources(DataConfig(source="1*/*.txt"))
    assert (weight, cfg.source) == (None, "1*/*.txt")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("0.5 * a + b", "'b' has no weight"),
        ("0 * a + 1 * b", "'0 * a' must be"),
        ("1.2.3 * a", "must be a source, or a weight above 0"),
        ("a + ", "'' must be a source"),
    ],
)
def test_weights_are_for_all_sources_or_none_and_above_0(source, complaint):
    assert complaint in get_error(source)


@pytest.mark.parametrize("name", ["a + b.txt", "0.5 * x.txt", "c + d + e/f.txt"])
def test_a_path_that_looks_like_several_sources_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(write_files(tmp_path, {name: b"1", "g.txt": b"2"}))
    assert [document.content for document in read_source(name)] == [b"1"]
    assert [document.content for document in read_source(f"g.txt + {name}")] == [b"2", b"1"]
    weights = [
        (weight, cfg.source)
        for weight, cfg in sources.parse_sources(DataConfig(source=f"0.3 * {name} + 0.7 * g.txt"))
    ]
    assert weights == [(0.3, name), (0.7, "g.txt")]


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write_files(tmp_path, {"a + b/c.txt": b"1"})))
    assert read_source("~/a + b")[0].content == b"1"


def test_text_key_names_the_field(tmp_path):
    write_files(tmp_path, {"a.jsonl": b'{"body": "x"}'})
    assert read_source(tmp_path, text_key="body")[0].content == b"x"


# --- stdlib ---


def test_stdlib_has_the_documentation_and_the_source_and_no_tests():
    found = {document.name: document.content for document in read_source("stdlib")}
    assert b"assert" in found["topics/assert"]
    assert b"class JSONDecoder" in found[os.path.join("json", "decoder.py")]
    parts = {part for name in found for part in name.split(os.sep)}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__", "topics.py"}
    assert sum(map(len, found.values())) > 5e6


# --- what is held out ---


def divide_all(documents, split, holdout=0.1):
    divided = [divide(document, split, holdout) for document in documents]
    return [train for train, _ in divided if train], [held for _, held in divided if held]


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=60), st.floats(0.05, 0.5))
def test_no_document_is_on_both_sides(contents, holdout):
    train, held = divide_all([Document("", content) for content in contents], "document", holdout)
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(contents)


@pytest.mark.parametrize("holdout", [0.001, 0.1, 0.3])
def test_the_share_of_documents_held_out_is_about_the_holdout(holdout):
    contents = [str(number).encode() for number in range(40_000)]
    held = [content for content in contents if hold_out_document(content, holdout)[1]]
    # Five standard deviations of the binomial; the hash is the same everywhere.
    expected, deviation = 40_000 * holdout, (40_000 * holdout * (1 - holdout)) ** 0.5
    assert abs(len(held) - expected) < 5 * deviation


def test_the_tail_of_shakespeare_is_that_of_nanogpt():
    train, held = hold_out_tail(b"x" * 1_115_394, 0.1)
    assert len(train) == 1_003_854 == int(1_115_394 * 0.9)
    assert len(held) == 111_540


@given(st.integers(1, 5000), st.sampled_from([0.1, 0.2, 0.25, 0.05, 0.01, 0.5]))
def test_the_tail_of_ascii_is_cut_at_the_share_exactly(size, holdout):
    train, held = hold_out_tail(b"x" * size, holdout)
    assert len(train) == int(size * (1 - holdout))
    assert len(train) + len(held) == size


@given(st.text(), st.floats(0.01, 0.5))
def test_the_tail_is_not_cut_inside_a_character(text, holdout):
    content = text.encode()
    train, held = hold_out_tail(content, holdout)
    assert train.decode() + held.decode() == text
    assert 0 <= len(train) - int(len(content) * (1 - holdout)) <= 3


@given(st.binary(), st.floats(0.01, 0.5))
def test_the_tail_of_any_bytes_loses_none(content, holdout):
    assert b"".join(hold_out_tail(content, holdout)) == content


@pytest.mark.parametrize(("count", "rule"), [(1, "tail"), (19, "tail"), (100, "document")])
def test_auto_holds_out_documents_if_there_are_enough(tmp_path, count, rule):
    write_files(tmp_path, {f"{n}.txt": b"document %d" % n for n in range(count)})
    cfg = DataConfig(source=str(tmp_path))
    assert sources.choose_rule(cfg, survey_source(cfg)) == rule


def test_auto_falls_back_to_tails_if_no_document_would_be_held_out(tmp_path):
    write_files(tmp_path, {f"{n}.txt": b"all are equal" for n in range(40)})
    cfg = DataConfig(source=str(tmp_path))
    assert sources.choose_rule(cfg, survey_source(cfg)) == "tail"


def test_a_split_that_leaves_nothing_is_rejected(tmp_path):
    write_files(tmp_path, {f"{n}.txt": b"all are equal" for n in range(40)})
    cfg = DataConfig(source=str(tmp_path), split="document")
    with pytest.raises(ConfigError, match=r"data\.split='document' with data\.holdout=0\.1"):
        sources.choose_rule(cfg, survey_source(cfg))


def test_a_source_of_empty_documents_is_rejected(tmp_path):
    write_files(tmp_path, {"a.txt": b""})
    cfg = DataConfig(source=str(tmp_path))
    with pytest.raises(ConfigError, match="every document is empty"):
        sources.choose_rule(cfg, survey_source(cfg))


def test_a_split_is_looked_up_by_name():
    with pytest.raises(ConfigError, match="Did you mean 'document'"):
        DataConfig(split="documnet")


def test_the_survey_depends_on_content_and_not_on_names(tmp_path):
    one = write_files(tmp_path / "one", {"a.txt": b"1", "b.txt": b"2"})
    two = write_files(tmp_path / "two", {"c.txt": b"1", "d.txt": b"2"})
    other = write_files(tmp_path / "other", {"a.txt": b"1", "b.txt": b"3"})
    digests = [survey_source(DataConfig(source=str(folder))).digest for folder in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]


def test_the_survey_depends_on_what_the_source_itself_holds_out(monkeypatch):
    digests = set()
    for part in ("train", "held", ""):
        unit = SourceUnit("own", [], 4, lambda part=part: [("a", b"text", part)])
        monkeypatch.setitem(sources.SOURCES, "own:", lambda cfg, unit=unit: [unit])
        found = survey_source(DataConfig(source="own:x"))
        digests.add(found.digest)
        assert found.has_own_split == bool(part)
    assert len(digests) == 3


# --- tfds ---


def make_builder_class(name, splits, key="text", prepare=None, feature=None):
    """Make a builder of tensorflow_datasets: {split: texts}. Its name must be new.

    `feature` is what one of a split is, in place of a text.
    """
    import tensorflow_datasets as tfds

    def split_generators(self, manager):
        if prepare:
            prepare(self, manager)
        return {split: self._generate_examples(texts) for split, texts in splits.items()}

    def generate(self, texts):
        yield from enumerate({key: text} for text in texts)

    def info(self):
        features = tfds.features.FeaturesDict({key: feature or tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    body = dict(
        VERSION=tfds.core.Version("1.0.0"),
        _info=info,
        _split_generators=split_generators,
        _generate_examples=generate,
        __module__=__name__,
        name=name,
    )
    return types.new_class(name, (tfds.core.GeneratorBasedBuilder,), {}, lambda ns: ns.update(body))


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture(autouse=True)
def without_tensorflow(monkeypatch):
    monkeypatch.setattr("jaxgpt.data.tfds.find_spec", lambda name: None)
    before = "tensorflow" in sys.modules
    yield
    assert ("tensorflow" in sys.modules) == before


def test_tfds_prepares_and_reads_array_records_without_tensorflow(tfds_folder):
    make_builder_class("fresh_texts", {"train": ["eins", "zwei ü", "drei"]})
    found = read_source("tfds:fresh_texts")
    assert sorted(document.content.decode() for document in found) == ["drei", "eins", "zwei ü"]
    assert [d.name for d in found] == [f"tfds:fresh_texts/train/{n}" for n in range(3)]
    assert {document.part for document in found} == {""}
    assert list(tfds_folder.rglob("*.array_record*"))
    assert read_source("tfds:fresh_texts") == found  # from disk, in the same order


def test_tfds_reads_files_without_a_registered_builder(tfds_folder, monkeypatch):
    import tensorflow_datasets as tfds

    kind = make_builder_class("files_only", {"train": ["a text"]}, key="body")
    monkeypatch.delitem(tfds.core.registered._DATASET_REGISTRY, "files_only")
    kind(data_dir=tfds_folder, file_format="array_record").download_and_prepare()
    found = read_source("tfds:files_only", text_key="body")
    assert [document.content for document in found] == [b"a text"]
    message = get_error("tfds:files_only")
    assert "data.text_key='text'" in message
    assert "it has body" in message


@pytest.mark.parametrize(
    ("name", "splits", "expected"),
    [
        ("has_all", ["train", "validation", "test"], {"train": "train", "validation": "held"}),
        (
            "has_test",
            ["train", "extra", "test"],
            {"train": "train", "extra": "train", "test": "held"},
        ),
        ("has_one", ["train", "extra"], {"train": "", "extra": ""}),
    ],
)
def test_a_data_set_with_its_own_split_is_held_out_by_it(tfds_folder, name, splits, expected):
    make_builder_class(name, {split: [f"text of {split}"] for split in splits})
    found = read_source(f"tfds:{name}")
    assert {d.content.decode().removeprefix("text of "): d.part for d in found} == expected
    for document in found:
        train, held = divide(document, "tail", 0.5)
        if document.part:
            assert (held if document.part == "held" else train) == document.content


def test_tiny_shakespeare_is_prepared_without_tensorflow(tfds_folder, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 10
    file = tmp_path / "input.txt"
    file.write_text(text)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, url: str(file))
    train, validation = read_source("tfds:tiny_shakespeare")
    assert train.content.decode() == text[: int(len(text) * 0.9)]
    assert (train.part, validation.part) == ("train", "held")
    assert survey_source(DataConfig(source="tfds:tiny_shakespeare")).has_own_split


def offline(builder, manager):
    raise ConnectionError("Failed to resolve 'raw.githubusercontent.com'\nmore lines")


def needs_tensorflow(builder, manager):
    raise ModuleNotFoundError("No module named 'tensorflow'")


@pytest.mark.parametrize(
    ("name", "prepare", "complaints"),
    [
        ("is_offline", offline, ["download or preparation failed", "Failed to resolve 'raw"]),
        ("is_bound", needs_tensorflow, ["the preparation needs tensorflow"]),
    ],
)
def test_the_error_for_a_failed_preparation_has_the_reason_and_a_remedy(
    tfds_folder, name, prepare, complaints
):
    make_builder_class(name, {"train": ["x"]}, prepare=prepare)
    message = get_error(f"tfds:{name}")
    assert f"data.source='tfds:{name}'" in message
    assert f"tfds.builder('{name}', file_format='array_record').download_and_prepare()" in message
    assert str(tfds_folder) in message
    assert all(complaint in message for complaint in complaints)


def test_an_unknown_data_set_is_rejected_with_the_nearest_name(tfds_folder):
    message = get_error("tfds:tiny_shakespear")
    assert "has no such data set" in message
    assert "Did you mean tfds:tiny_shakespeare?" in message


def test_a_malformed_data_set_name_is_rejected(tfds_folder):
    assert "must be tfds:name" in get_error("tfds:")


def test_a_data_set_without_random_access_is_rejected(tfds_folder):
    make_builder_class("broken_files", {"train": ["x"]})
    read_source("tfds:broken_files")
    info = next(tfds_folder.rglob("dataset_info.json"))
    content = info.read_text()
    assert "array_record" in content
    info.write_text(content.replace("array_record", "tfrecord"))
    for file in tfds_folder.rglob("*array_record*"):
        shutil.move(file, str(file).replace("array_record", "tfrecord"))
    message = get_error("tfds:broken_files")
    assert "data.source='tfds:broken_files'" in message
    assert "array_record" in message


def test_the_error_for_missing_tensorflow_datasets_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert get_error("tfds:tiny_shakespeare") == (
        "data.source=tfds:tiny_shakespeare needs tensorflow-datasets: pip install 'jaxgpt[tfds]'"
    )


def test_a_range_of_a_split_is_a_unit(tfds_folder, monkeypatch):
    make_builder_class("many_texts", {"train": [f"text {n}" for n in range(20)], "test": ["held"]})
    whole = read_source("tfds:many_texts")
    assert len(sources.list_units(DataConfig(source="tfds:many_texts"))) == 2
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 100)
    found = sources.list_units(DataConfig(source="tfds:many_texts"))
    assert len(found) > 3
    assert [d for unit in found for d in sources.read_unit(unit)] == whole
    info = next(tfds_folder.rglob("dataset_info.json"))
    os.utime(info)
    again = sources.list_units(DataConfig(source="tfds:many_texts"))
    assert all(one.facts != other.facts for one, other in zip(found, again, strict=True))


# --- Hugging Face ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def test_a_folder_of_parquet_is_read_with_its_own_splits(hub, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = hub.Dataset.from_dict({"text": [f"{split} {n}" for n in range(3)], "id": [1, 2, 3]})
        rows.to_parquet(folder / f"{split}.parquet")
    found = read_source(f"hf:{folder}")
    assert [(d.content.decode(), d.part) for d in found] == [
        *((f"train {n}", "train") for n in range(3)),
        *((f"validation {n}", "held") for n in range(3)),
    ]
    assert found[1].name == f"hf:{folder}/train/1"


@pytest.mark.parametrize("is_divided", [True, False])
def test_a_data_set_saved_to_disk_is_read_in_ranges(hub, tmp_path, monkeypatch, is_divided):
    texts = [f"text {n}" * (n % 3) for n in range(30)]
    data = hub.Dataset.from_dict({"body": [None, *texts], "label": [0, *range(30)]})
    (hub.DatasetDict(train=data) if is_divided else data).save_to_disk(tmp_path / "saved")
    cfg = DataConfig(source=f"hf:{tmp_path / 'saved'}", text_key="body", target_key="label")
    whole = list(read_documents(cfg))
    assert [(d.content.decode(), d.target) for d in whole] == [
        (text, b"%d" % n) for n, text in enumerate(texts) if text]  # fmt: skip
    monkeypatch.setattr(units, "TARGET_UNIT_BYTES", 100)
    found = sources.list_units(cfg)
    assert len(found) > 3
    assert found[0].facts != found[1].facts
    assert [unit.facts for unit in sources.list_units(cfg)] == [unit.facts for unit in found]
    read_back = [d for unit in pickle.loads(pickle.dumps(found)) for d in sources.read_unit(unit)]
    assert read_back == whole


def test_one_split_of_a_data_set_is_read_by_its_name(hub, tmp_path):
    for split in ("train", "test"):
        hub.Dataset.from_dict({"text": [f"{split} {n}" for n in range(3)]}).to_parquet(
            tmp_path / "data" / f"{split}.parquet"
        )
    found = read_source(f"hf:{tmp_path / 'data'}@test")
    assert [(d.content, d.part) for d in found] == [(b"test %d" % n, "") for n in range(3)]
    assert "has the splits test, train" in get_error(f"hf:{tmp_path / 'data'}@dev")


def test_a_column_that_is_missing_or_not_text_is_rejected(hub, tmp_path):
    hub.Dataset.from_dict({"body": ["x"], "id": [1]}).save_to_disk(tmp_path / "saved")
    source = f"hf:{tmp_path / 'saved'}"
    message = get_error(source)
    assert "data.text_key='text' is not a column" in message
    assert "it has body, id" in message
    assert "data.text_key='id' is a int" in get_error(source, text_key="id")
    assert "data.target_key='z'" in get_error(source, text_key="body", target_key="z")


@pytest.mark.parametrize("name", ["nobody/such-data", "nobody/such-data:config"])
def test_the_error_for_an_unavailable_data_set_explains_how_to_copy_it(hub, name):
    message = get_error(f"hf:{name}")
    assert f"data.source='hf:{name}' cannot be loaded" in message
    arguments = ", ".join(map(repr, name.split(":")))
    assert f"datasets.load_dataset({arguments}).save_to_disk('folder')" in message
    assert "data.source=hf:folder" in message


def test_a_folder_without_data_is_rejected(hub, tmp_path):
    assert "cannot be loaded" in get_error(f"hf:{tmp_path}")


def test_the_error_for_missing_datasets_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert get_error("hf:name") == "data.source=hf:name needs datasets: pip install 'jaxgpt[hub]'"
