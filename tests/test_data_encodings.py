"""Test that text files of any encoding are read as UTF-8, or refused by name."""

import codecs
import gzip
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.config import DataConfig
from jaxgpt.data import encodings
from jaxgpt.data.encodings import decode_chunks
from jaxgpt.data.sources import read_documents
from jaxgpt.settings import ConfigError

FRENCH = "Les élèves français étaient à l'école, où ils mangeaient des pâtés très chauds. " * 30
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива. " * 20
CHINESE = "北京是中华人民共和国的首都，位于华北平原的北部，是全国的政治和文化中心。\n" * 30
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 30
ENGLISH = "All happy families are alike; each unhappy family is unhappy in its own way.\n" * 30


def decode(content, encoding="auto", piece=1 << 20):
    chunks = (content[start : start + piece] for start in range(0, len(content), piece))
    return b"".join(decode_chunks("a.txt", chunks, encoding))


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
@pytest.mark.parametrize("text", [ENGLISH, FRENCH, CHINESE, "x", ""], ids=lambda text: text[:5])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "bom utf-16-be", "bom utf-32-be"]
)
def test_a_byte_order_mark_is_obeyed_and_dropped(encoding, text, piece):
    name = encoding.removeprefix("bom ")
    content = ("\ufeff" * (name != encoding) + text).encode(name)
    assert decode(content, piece=piece).decode() == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [ENGLISH, FRENCH], ids=lambda text: text[:5])
def test_wide_characters_without_a_mark_are_recognized_by_their_nuls(encoding, text):
    assert decode(text.encode(encoding)).decode() == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "latin-1"),
        (FRENCH, "cp1252"),
        ("“Ça coûte 5 €”, dit-elle – déjà. " * 20, "cp1252"),
        ("café", "latin-1"),
        ("Grüße aus München, schöne Städte!", "latin-1"),
        ("¿Qué pasó? El niño comió mañana.", "latin-1"),
        ("Pójdź, kińże tę chmurność w głąb flaszy. Zażółć gęślą jaźń, chłopcze. " * 20, "cp1250"),
        ("Příliš žluťoučký kůň úpěl ďábelské ódy, řekl děda a šel domů. " * 20, "cp1250"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (CHINESE, "gb18030"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        (ENGLISH * 100 + FRENCH, "latin-1"),
    ],
    ids=lambda value: value[:9],
)
@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_other_encodings_are_recognized(text, encoding, piece):
    assert decode(text.encode(encoding), piece=piece).decode() == text


def test_what_was_recognized_is_printed(capsys):
    encodings._log_encoding.cache_clear()
    for _ in range(2):
        decode(FRENCH.encode("latin-1"))
    assert capsys.readouterr().err == "data.source: a.txt is read as cp1252\n"
    decode(FRENCH.encode())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", [FRENCH, CHINESE, RUSSIAN, "é", "naïve"], ids=lambda t: t[:5])
@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
def test_utf8_is_not_changed_even_where_it_is_damaged(text, piece):
    whole = text.encode()
    damaged = whole[: len(whole) // 2] + b"\xff" + whole[len(whole) // 2 :]
    assert decode(whole, piece=piece) == whole
    if len(text) > 100:
        assert decode(damaged, piece=max(piece, 1000)) == damaged


def test_a_mark_is_found_after_an_empty_chunk():  # as decompressors yield them
    assert b"".join(decode_chunks("a.txt", iter([b"", codecs.BOM_UTF8, b"", b"x"]))) == b"x"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff")), st.integers(1, 20))
def test_any_utf8_is_not_changed(text, piece):
    assert decode(text.encode(), piece=piece).decode() == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 9000 + b"\0", "it has a NUL byte at 9000"),
        (CHINESE.encode() + b"\0", "it has a NUL byte at"),
        (b"\0" * 5000, "it has a NUL byte at 0"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(1, 256)) * 9, "its encoding is not recognized"),
        (codecs.BOM_UTF16_LE + b"x\0" * 50 + b"x", "is not utf-16-le"),
    ],
    ids=["late", "after text", "only", "binary", "cut"],
)
def test_what_is_no_text_is_rejected_by_name(content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        decode(content)
    assert "data.source: a.txt" in str(caught.value)


def test_utf16_without_a_mark_or_nuls_is_not_taken_silently():
    content = CHINESE.replace("\n", "").encode("utf-16-le")
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8, and its encoding is not"):
        decode(content)
    assert decode(content, "utf-16-le").decode() == CHINESE.replace("\n", "")


def test_an_encoding_can_be_named():
    assert decode(FRENCH.encode("mac-roman"), "mac-roman").decode() == FRENCH
    for name in ("utf-16", "utf-16-le"):
        assert decode(codecs.BOM_UTF16_LE + FRENCH.encode("utf-16-le"), name).decode() == FRENCH
    assert decode(b"\xef\xbb\xbf\xff\0", "utf-8") == b"\xff\0"  # any bytes pass
    with pytest.raises(ConfigError, match="is not ascii after byte 0"):
        decode("é".encode(), "ascii")
    with pytest.raises(ConfigError, match=r"data\.encoding='no-such' is not known"):
        DataConfig(encoding="no-such")
    with pytest.raises(ConfigError, match=r"data\.encoding='base64'"):
        DataConfig(encoding="base64")


def test_all_readers_of_text_decode(tmp_path):
    (tmp_path / "a.csv").write_bytes(f'text\n"{FRENCH}"\n'.encode("utf-16"))
    (tmp_path / "b.pos").write_bytes(FRENCH.encode("latin-1"))
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}')
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n' * 2, "utf-16")
    sources = [str(tmp_path / "a.csv"), f"classes:{tmp_path / '*.pos'}", str(tmp_path / "c.jsonl")]
    found = [next(read_documents(DataConfig(source=source))).content for source in sources]
    assert [text.decode().strip() for text in found] == [FRENCH.strip()] * 2 + ["x"]
    with pytest.raises(ConfigError, match=r"d\.jsonl:\d is not JSON.*UTF-16: save it as UTF-8"):
        list(read_documents(DataConfig(source=str(tmp_path / "d.jsonl"))))


def test_a_compressed_bomb_is_rejected_before_it_fills_the_memory(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(150):
            file.write(b"a" * 1_000_000)
    script = (
        "import resource\n"
        "from jaxgpt.config import DataConfig\n"
        "from jaxgpt.data.sources import read_documents\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "try:\n"
        f"    list(read_documents(DataConfig(source={str(tmp_path)!r}, max_document=20)))\n"
        "except ValueError as error:\n"
        "    print(peak() - before, error)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, _, message = done.stdout.partition(" ")
    assert "a.txt.gz is one text of more than data.max_document=20 MB" in message
    assert float(grown) < 60  # megabytes; 25 measured, of a file of 150
