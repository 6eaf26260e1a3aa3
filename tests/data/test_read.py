"""Readers against what was written, and against everything that real files do wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemel.config.data.pipeline import Recipe
from gemel.config.errors import ConfigError
from gemel.data import build
from gemel.data.document import Document, Dropped
from gemel.data.read import files
from gemel.data.read.lines import NEWLINE, records
from gemel.data.read.reader import Piece, Reader, Reading, cut
from gemel.data.write import compressor

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: (made := compressor("zst")).compress(data) + made.flush(),
}
ROWS = [{"text": f"text {i} 文本 {'x' * i}", "id": f"id-{i}", "n": i, "metadata": {"lang": "zh"}} for i in range(50)]
JSONL = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def reader(**table: Any) -> Reader:
    return build.reader(Recipe.parse({"input": table, "output": {"kind": "jsonl"}}).input[0])


def read(**table: Any) -> list[Document | Dropped]:
    made = reader(**table)
    return [item for piece in made.pieces() for item in made.read(piece, Reading())]


def texts(items: list[Document | Dropped]) -> list[str]:
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items if isinstance(item, Document)]


def only_reason(items: list[Document | Dropped]) -> Dropped:
    (dropped,) = [item for item in items if isinstance(item, Dropped)]
    return dropped


# Streams


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_forms_of_jsonl_are_the_same_documents(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](JSONL))
    items = read(kind="jsonl", paths=[str(tmp_path)])
    assert texts(items) == [row["text"] for row in ROWS]
    assert [item.metadata for item in items if isinstance(item, Document)] == [{"lang": "zh", "n": row["n"]} for row in ROWS]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_streams_that_follow_each_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    half = JSONL.index(b"\n", 1000) + 1
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](JSONL[:half]) + COMPRESS[suffix](JSONL[half:]))
    assert texts(read(kind="jsonl", paths=[str(tmp_path)])) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_truncated_stream_gives_what_precedes_the_damage_and_one_reason(tmp_path: Path, suffix: str) -> None:
    noise = b"".join(b'{"text": "%s"}\n' % bytes(str(hash((i, 1)) * 7919**5), "ascii") for i in range(30_000))
    whole = COMPRESS[suffix](noise)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    items = read(kind="jsonl", paths=[str(tmp_path)])
    *good, last = items
    assert isinstance(last, Dropped)
    assert last.reason == "read.truncated"
    assert last.detail.startswith("the file ends inside its compressed stream, after ")
    want = [json.loads(line)["text"] for line in noise.splitlines()]
    assert texts(good) == want[: len(good)]
    assert suffix == ".bz2" or len(good) > 5000  # bzip2 gives nothing of a block that is not whole


def test_a_corrupt_stream_gives_what_precedes_the_damage_and_one_reason(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(JSONL) + gzip.compress(JSONL))
    whole[len(gzip.compress(JSONL)) + 30] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    items = read(kind="jsonl", paths=[str(tmp_path)])
    assert only_reason(items).reason in ("read.corrupt", "read.truncated")
    assert texts(items[:50]) == [row["text"] for row in ROWS]


def test_a_small_file_that_unpacks_to_much_is_read_in_chunks() -> None:
    bomb = gzip.compress(bytes(50 * 2**20))
    chunks = list(files.decompressed(iter([bomb]), files.Gunzip))
    assert sum(map(len, chunks)) == 50 * 2**20
    assert max(map(len, chunks)) <= files.CHUNK_BYTES


def test_globs_folders_and_urls_find_each_file_once(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/3.jsonl.gz", "a/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = files.find([f"{tmp_path}/b/2.jsonl", str(tmp_path), f"{tmp_path}/**/*.jsonl"], (".jsonl",))
    assert [file.path.removeprefix(f"{tmp_path}/") for file in found] == ["b/2.jsonl", "a/1.jsonl", "a/3.jsonl.gz"]
    with pytest.raises(ConfigError, match="matches no file"):
        files.find([f"{tmp_path}/*.warc"], (".warc",))
    with pytest.raises(ConfigError, match="nosuch"):
        files.find(["nosuch://bucket/file"], (".jsonl",))


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(JSONL)
    assert texts(read(kind="jsonl", paths=["memory://corpus/*.jsonl"], unit_bytes=1024)) == [row["text"] for row in ROWS]


# Lines


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"")), max_size=30),
    st.integers(1, 40),
    st.integers(1, 9),
    st.booleans(),
)
def test_however_a_file_is_cut_every_line_is_read_once(lines: list[bytes], num: int, chunk: int, ends: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    want = data.split(b"\n")
    want = want[:-1] if want[-1] == b"" else want

    def chunks(start: int) -> Iterator[bytes]:
        return (data[i : i + chunk] for i in range(start, len(data), chunk))

    found = []
    for piece in cut("", len(data), -(-max(len(data), 1) // num)):
        made = records(chunks(max(piece.start - 1, 0)), NEWLINE, 100, piece.start, piece.stop)
        found += [(record.offset, record.data) for record in made]
    assert [line for _, line in found] == want
    assert all(data[offset : offset + len(line)] == line for offset, line in found)


@pytest.mark.parametrize("separator", [b"\n", b"\n\n", b"<|end|>"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_long_records_are_named_and_the_next_ones_whole(separator: bytes, chunk: int) -> None:
    data = separator.join([b"short", b"x" * 50, b"y" * 50, b"also short", b"z" * 50])
    found = list(records((data[i : i + chunk] for i in range(0, len(data), chunk)), separator, 20))
    assert [(record.num_bytes, record.data[:1]) for record in found] == [(5, b"s"), (50, b"x"), (50, b"y"), (10, b"a"), (50, b"z")]
    assert found[3].data == b"also short"
    assert [data[record.offset : record.offset + 1] for record in found] == [b"s", b"x", b"y", b"a", b"z"]


def test_a_line_of_200_mb_takes_little_memory(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from tests.data.test_read import read; from gemel.data.document import Dropped\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "items = read(kind='jsonl', paths=[sys.argv[1]], max_document_bytes=2**20, unit_bytes=2**25)\n"
        "assert [getattr(item, 'reason', item.id if not isinstance(item, Dropped) else '') for item in items] "
        "== ['first', 'read.line_too_long', 'last'], items\n"
        "assert items[1].detail == '200000012 bytes, max_document_bytes = 1048576' and len(items[1].document.text) == 4096\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a", "id": "first"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "b", "id": "last"}\n')
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl")], capture_output=True, text=True, check=False, cwd=ROOT, env=ENV
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 1024  # kilobytes


# Rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "x"}', "read.no_text"),
        (b'{"text": 3}', "read.no_text"),
        (b'{"text": null}', "read.no_text"),
        (b'{"text": ""}', "read.empty"),
        ('{"text": " \u3000\\n"}'.encode(), "read.empty"),
        (b'{"text": "a"', "read.bad_json"),
        (b'{"text": "\\ud800"}', "read.bad_json"),
        (b'["text"]', "read.not_object"),
        (b'{"text": "\xff"}', "read.not_utf8"),
        ('{"text": "中文"}'.encode("gb18030"), "read.not_utf8"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "read.line_too_long"),
    ],
)
def test_a_line_that_cannot_be_read_has_a_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\r\n\n  \n{"text": "after"}')
    before, dropped, after = read(kind="jsonl", paths=[str(tmp_path)], max_document_bytes=1024)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, texts([before, after])) == (reason, ["before", "after"])
    assert dropped.detail


def test_json_as_python_writes_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one", "score": NaN}\r\n{"text": "two", "id": 7}\n')
    one, two = read(kind="jsonl", paths=[str(tmp_path)])
    assert texts([one, two]) == ["one", "two"]
    assert isinstance(one, Document)
    assert isinstance(two, Document)
    assert one.metadata["score"] != one.metadata["score"]
    assert (one.id.rpartition(":")[2], two.id) == ("0", "7")


def test_fields_and_sources_are_those_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "t", "url": "u", "origin": "web", "k": 1}\n{"content": "t", "url": "v"}\n')
    table = {"kind": "jsonl", "paths": [str(tmp_path)], "text_field": "content", "id_field": "url", "source_field": "origin"}
    one, two = read(**table, source="mine")
    assert one == Document("t", "u", "web", {"k": 1})
    assert two == Document("t", "v", "mine", {})


def test_datatrove_form_round_trips(tmp_path: Path) -> None:
    rows = [{"text": "t", "id": "i/0", "media": [], "metadata": {"url": "http://a.example", "language": "zh"}}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    want = Document("t", "i/0", "web", {"url": "http://a.example", "language": "zh", "media": []})
    for kind in ("jsonl", "parquet"):
        assert read(kind=kind, paths=[str(tmp_path)], source="web") == [want]


def test_parquet_row_groups_are_pieces_and_rich_values_become_json(tmp_path: Path) -> None:
    import datetime
    import decimal

    table = pa.table(
        {
            "text": [f"text {i}" for i in range(100)],
            "id": [f"{i}" for i in range(100)],
            "when": [datetime.date(2020, 1, 1 + i % 28) for i in range(100)],
            "price": [decimal.Decimal("1.50")] * 100,
            "score": [float("nan"), *[0.5] * 99],
            "raw": [b"\xff"] * 100,
            "nested": [{"a": [1, None]}] * 100,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    made = reader(kind="parquet", paths=[str(tmp_path)])
    pieces = made.pieces()
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    reading = Reading()
    items = [item for piece in pieces for item in made.read(piece, reading)]
    assert texts(items) == [f"text {i}" for i in range(100)]
    assert reading.num_bytes == sum(piece.weight_bytes for piece in pieces)
    first = items[0]
    assert isinstance(first, Document)
    assert first.metadata == {"when": "2020-01-01", "price": "1.50", "raw": "\\xff", "nested": {"a": [1, None]}}  # no value, no entry
    assert isinstance(items[1], Document)
    assert items[1].metadata["score"] == 0.5
    json.dumps([item.metadata for item in items if isinstance(item, Document)])


def test_parquet_that_cannot_be_read_has_reasons(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff\xfe", None, b" "], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text, "id": ["a", "b", "c", "d"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    (tmp_path / "c.parquet").write_bytes(b"")
    items = read(kind="parquet", paths=[str(tmp_path)])
    reasons = [item.reason for item in items if isinstance(item, Dropped)]
    assert reasons == ["read.not_utf8", "read.no_text", "read.empty", "read.corrupt", "read.corrupt"]


# Text


def test_text_is_one_document_per_file_line_or_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff第一段。\r\n还是。\r\n\r\n第二段。\n".encode())
    (whole,) = read(kind="text", paths=[str(tmp_path)])
    assert whole == Document("第一段。\n还是。\n\n第二段。\n", str(tmp_path / "a.txt"), "text")
    assert texts(read(kind="text", paths=[str(tmp_path)], separator="\n", unit_bytes=1024)) == ["第一段。", "还是。", "第二段。"]
    (tmp_path / "a.txt").write_text("one\nmore\n\n\ntwo\n\n \n\nthree")
    assert texts(read(kind="text", paths=[str(tmp_path)], separator="\n\n")) == ["one\nmore", "two", "three"]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfenot utf-8")
    assert only_reason(read(kind="text", paths=[str(tmp_path)])).reason == "read.not_utf8"
    (tmp_path / "a.txt").write_bytes(b"x" * 2000)
    assert only_reason(read(kind="text", paths=[str(tmp_path)], max_document_bytes=1024)).reason == "read.too_long"


def test_markdown_front_matter_and_title(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("---\ntitle: x\ntags: [a]\n---\n\n# 标题 #\n\ntext\n\n---\n\nmore\n")
    (tmp_path / "b.md").write_text("no front matter\n---\nmore\n---\n")
    one, two = read(kind="markdown", paths=[str(tmp_path)])
    assert isinstance(one, Document)
    assert one.metadata == {"front_matter": "title: x\ntags: [a]\n", "title": "标题"}
    assert one.text == "# 标题 #\n\ntext\n\n---\n\nmore\n"
    assert isinstance(two, Document)
    assert (two.text, two.metadata) == ("no front matter\n---\nmore\n---\n", {})


PAGE = "<html><head>{}</head><body>中文网页，标点。</body></html>"


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="utf-8">', "utf-8"),
        ('<meta charset="gb2312">', "gb18030"),
        ("<meta http-equiv=Content-Type content='text/html; charset=GBK'>", "gb18030"),
        ('<meta charset="big5">', "big5hkscs"),
        ("", "utf-8"),
        ("", "utf-8-sig"),
        ("", "gb18030"),
        ("", "utf-16"),
        ('<meta charset="utf-8">', "gb18030"),  # what is said is wrong
        ('<meta charset="no-such-charset">', "utf-8"),
    ],
)
def test_html_is_decoded_as_browsers_do(tmp_path: Path, head: str, encoding: str) -> None:
    page = PAGE.format(head).replace("网", "網" if "big5" in encoding else "网").replace("页", "頁" if "big5" in encoding else "页")
    page = page.replace("标", "標").replace("点", "點") if "big5" in encoding else page
    (tmp_path / "a.html").write_bytes(page.encode(encoding))
    assert texts(read(kind="html", paths=[str(tmp_path)])) == [page]


def test_html_that_is_no_text_is_dropped_and_single_bad_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "b.html").write_bytes(b"<p>" + b"word " * 200 + b"\xff</p>")
    (tmp_path / "c.html").write_bytes(b"  \n")
    noise, good, blank = read(kind="html", paths=[str(tmp_path)])
    assert isinstance(noise, Dropped)
    assert isinstance(blank, Dropped)
    assert (noise.reason, blank.reason) == ("read.charset", "read.empty")
    assert isinstance(good, Document)
    assert good.metadata["counts"] == {"read.replaced_characters": 1}


# Web archives


def warc(kind: str, content: bytes, **headers: str) -> bytes:
    fields = {"WARC-Type": kind, "WARC-Record-ID": f"<urn:uuid:{zlib.crc32(content):08x}>", **headers, "Content-Length": str(len(content))}
    return b"WARC/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()).encode() + b"\r\n" + content + b"\r\n\r\n"


def http(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Type": "text/html", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return f"HTTP/1.1 {status}\r\n".encode() + "".join(f"{k}: {v}\r\n" for k, v in fields.items()).encode() + b"\r\n" + body


def page(i: int) -> bytes:
    return b"<html>page %d %s</html>" % (i, zlib.compress(str(i).encode() * 9).hex().encode() * 20)


def archive(num: int = 40) -> list[bytes]:
    made = [warc("warcinfo", b"software: test\r\n")]
    for i in range(num):
        url = {"WARC-Target-URI": f"http://a.example/{i}", "WARC-Date": "2024-01-01T00:00:00Z"}
        made += [warc("request", b"GET / HTTP/1.1\r\n\r\n", **url), warc("response", http(page(i)), **url)]
    return made


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz", ".warc.zst"])
@pytest.mark.parametrize("unit_bytes", [1024, 10**6])
def test_pages_of_an_archive_are_read_once_however_it_is_cut(tmp_path: Path, suffix: str, unit_bytes: int) -> None:
    parts = archive()
    data = b"".join(map(gzip.compress, parts)) if suffix == ".warc.gz" else COMPRESS[suffix[5:]](b"".join(parts))
    (tmp_path / f"a{suffix}").write_bytes(data)
    made, reading = reader(kind="warc", paths=[str(tmp_path)], unit_bytes=unit_bytes), Reading()
    pieces = made.pieces()
    assert len(pieces) == (len(data) // 1024 + 1 if suffix == ".warc.gz" and unit_bytes == 1024 else 1)
    items = [item for piece in pieces for item in made.read(piece, reading)]
    assert texts(items) == [page(i).decode() for i in range(40)]
    first = items[0]
    assert isinstance(first, Document)
    assert first.metadata == {"url": "http://a.example/0", "date": "2024-01-01T00:00:00Z"}
    assert first.id.startswith("urn:uuid:")
    assert reading.skipped == {"warc.warcinfo": 1, "warc.request": 40}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda part: gzip.compress(part.replace(b"Content-Length: ", b"Content-Length: x")), "read.broken_record"),
        (lambda part: gzip.compress(part[:-50]), "read.broken_record"),
        (lambda part: gzip.compress(b"HTTP/1.1 200 OK\r\n\r\nno frame"), "read.broken_record"),
        (lambda part: gzip.compress(part)[:40] + b"\0" * 40 + gzip.compress(part)[80:], "read.corrupt"),
        (lambda part: gzip.compress(part)[:60], "read.corrupt"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [1024, 10**6])
def test_one_broken_record_costs_one_record(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str, unit_bytes: int) -> None:
    parts = archive()
    data = [gzip.compress(part) for part in parts]
    data[20] = damage(parts[20])  # the response with page 9
    (tmp_path / "a.warc.gz").write_bytes(b"".join(data))
    items = read(kind="warc", paths=[str(tmp_path)], unit_bytes=unit_bytes)
    assert only_reason(items).reason == reason
    assert texts([item for item in items if isinstance(item, Document)]) == [page(i).decode() for i in range(40) if i != 9]


def test_broken_records_of_a_plain_archive_and_a_truncated_one(tmp_path: Path) -> None:
    parts = archive()
    parts[20] = parts[20].replace(b"Content-Length: ", b"Content-Length: x")
    (tmp_path / "a.warc").write_bytes(b"".join(parts))
    items = read(kind="warc", paths=[str(tmp_path)])
    assert only_reason(items).reason == "read.broken_record"
    assert len(items) == 40
    (tmp_path / "a.warc").unlink()
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, parts[:20]))[:-30])
    assert only_reason(read(kind="warc", paths=[str(tmp_path)])).reason == "read.truncated"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (http(b"x", status="404 Not Found"), "read.http_status"),
        (http(b"\x89PNG", Content_Type="image/png"), "read.content_type"),
        (http(b"x", Content_Encoding="br"), "read.content_encoding"),
        (http(b"\x1f\x8bbroken", Content_Encoding="gzip"), "read.broken_record"),
        (http(gzip.compress(b"x" * 5000), Content_Encoding="gzip"), "read.too_long"),
        (http(b"x" * 5000), "read.too_long"),
        (http(b""), "read.empty"),
        (b"no http", "read.broken_record"),
    ],
)
def test_answers_that_are_no_pages_have_reasons(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.warc").write_bytes(warc("response", content))
    assert only_reason(read(kind="warc", paths=[str(tmp_path)], max_document_bytes=2048)).reason == reason


@pytest.mark.parametrize(
    "content",
    [
        http(b"7\r\n<p>one \r\n4;x=1\r\ntwo \r\n8\r\nthree</p\r\n1\r\n>\r\n0\r\n\r\n", Transfer_Encoding="chunked"),
        http(b"<p>one two three</p>", Transfer_Encoding="chunked"),  # the archivist has undone it
        http(gzip.compress(b"<p>one two three</p>"), Content_Encoding="gzip"),
        http(zlib.compress(b"<p>one two three</p>"), Content_Encoding="deflate"),
        http(zlib.compress(b"<p>one two three</p>", wbits=-15), Content_Encoding="deflate"),
        http("<p>one two three</p>".encode("utf-16"), Content_Type="text/html"),
        http(b"<p>one two three</p>", Content_Encoding="gzip"),
    ],
)
def test_codings_of_http_are_undone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.warc").write_bytes(warc("response", content))
    assert texts(read(kind="warc", paths=[str(tmp_path)])) == ["<p>one two three</p>"]


def test_the_servers_charset_comes_before_the_pages(tmp_path: Path) -> None:
    body = PAGE.format('<meta charset="utf-8">')
    (tmp_path / "a.warc").write_bytes(warc("response", http(body.encode("gbk"), Content_Type="text/html; charset=GBK")))
    assert texts(read(kind="warc", paths=[str(tmp_path)])) == [body]


def test_text_extracts_of_common_crawl(tmp_path: Path) -> None:
    parts = [
        warc("warcinfo", b"x: y\r\n"),
        *(warc("conversion", f"正文 {i}".encode(), **{"WARC-Target-URI": f"http://a/{i}"}) for i in range(5)),
    ]
    (tmp_path / "a.warc.wet.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    items = read(kind="wet", paths=[str(tmp_path)])
    assert texts(items) == [f"正文 {i}" for i in range(5)]


# Packages


def test_the_standard_library_is_a_corpus() -> None:
    import ast
    import email.message
    import inspect as python_inspect

    items = read(kind="package", names=["email"])
    by_id = {item.id: item.text for item in items if isinstance(item, Document)}
    assert by_id["email.message"] == Path(email.message.__file__).read_text(encoding="utf-8")
    docs = read(kind="package", names=["email"], part="docstring", source="docs")
    by_id = {item.id: item.text for item in docs if isinstance(item, Document)}
    assert by_id["email.message:Message.get_payload"] == python_inspect.getdoc(email.message.Message.get_payload)
    assert by_id["email.message"] == ast.get_docstring(ast.parse(Path(email.message.__file__).read_text(encoding="utf-8")))
    assert len(by_id) > 100
    with pytest.raises(ConfigError, match="'no_such_package' is not installed"):
        read(kind="package", names=["no_such_package"])


def test_excluded_modules_are_left_out() -> None:
    made = reader(kind="package", names=["json"], exclude=["tool", "tests"])
    names = {Path(piece.path).name for piece in made.pieces()}
    assert names == {"__init__.py", "decoder.py", "encoder.py", "scanner.py"}
    assert all(isinstance(piece, Piece) and piece.weight_bytes == Path(piece.path).stat().st_size for piece in made.pieces())
