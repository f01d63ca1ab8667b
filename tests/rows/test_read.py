"""Rows are found, cut and refused the same way wherever a unit begins, in every format."""

import csv
import gzip
import io
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcllm.data import text
from hpcllm.errors import DataError, UsageError
from hpcllm.rows import read


def rows_of(path, columns=(), unit_bytes=1 << 30, format=None):
    path = str(path)
    reader = read.Reader(columns)
    units = read.cut(path, read.format_of(path, columns, format), columns, unit_bytes)
    rows = [row for unit in units for row in reader.rows(unit)]
    reader.close()
    return rows


def fields_of(*arguments, **options):
    return [row.fields for row in rows_of(*arguments, **options)]


@st.composite
def tables(draw):
    """(format, bytes of a file, its rows) with all that is hard to cut: quotes, lines in quotes, blank lines, CRLF."""
    format = draw(st.sampled_from(read.FORMATS))
    hard = draw(st.sampled_from(['aé"', 'a," \n\r', "a\t", "aé東 "]))
    cells = st.text(st.sampled_from(list(hard)), max_size=6)
    if format != "csv":
        cells = cells.map(lambda cell: cell.translate(dict.fromkeys(map(ord, "\n\r"), "x")))
    if format == "tsv":
        cells = cells.map(lambda cell: cell.replace("\t", "y"))
    pairs = draw(st.lists(st.tuples(cells, cells), max_size=25))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    out = io.StringIO()
    if format == "csv":
        lone = any("\r" in cell for pair in pairs for cell in pair)  # which csv.writer leaves without quotes
        writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL if lone else csv.QUOTE_MINIMAL)
        writer.writerows([("one", "two"), *pairs])
        rows = [{"one": one, "two": two} for one, two in pairs]
    elif format == "tsv":
        out.write(end.join("\t".join(pair) for pair in [("one", "two"), *pairs]))
        rows = [{"one": one, "two": two} for one, two in pairs]
    elif format == "jsonl":
        rows = [{"one": one, "two": [two, 1]} for one, two in pairs]
        out.write((end + draw(st.sampled_from(["", end, f" \t{end}"]))).join(map(json.dumps, rows)))
    else:
        rows = [{"text": f"{one}{two}"} for one, two in pairs]
        out.write(end.join(row["text"] for row in rows))
        rows = [row for row in rows if row["text"].strip()]
    content = out.getvalue() + draw(st.sampled_from(["", end]))
    return format, draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + content.encode(), rows


@settings(max_examples=400, deadline=None)
@given(table=tables(), unit_bytes=st.integers(1, 60), compressed=st.booleans(), read_bytes=st.integers(2, 30))
def test_every_row_belongs_to_exactly_one_unit(tmp_path_factory, table, unit_bytes, compressed, read_bytes):
    format, content, rows = table
    path = tmp_path_factory.getbasetemp() / f"units.{format}{'.gz' if compressed else ''}"
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_READ_BYTES", read_bytes)
        assert fields_of(path, unit_bytes=unit_bytes) == rows
        units = read.cut(str(path), format, (), unit_bytes)
    assert all(a.stop == b.start for a, b in itertools.pairwise(units)) and all(unit.size for unit in units)
    # Short rows make units of about what was asked for, none of them much longer.
    assert all(unit.size > unit_bytes or unit is units[-1] or compressed or format == "csv" for unit in units)
    assert all(unit.size <= unit_bytes + 150 for unit in units)


def test_twenty_thousand_short_rows_are_shared_evenly_by_four_ranks(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(f"{number:099d}\n" for number in range(20_000)))
    units = read.cut(str(path), "text", (), read.unit_bytes([str(path)]))
    assert 4 * 25 < len(units) < 200


def test_a_quote_in_tab_separated_text_is_a_letter(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b'a\tb\r\n"x\t1\r\n\t\r\n\r\ny"\t2\r\n')
    assert fields_of(tmp_path / "t.tsv") == [{"a": '"x', "b": "1"}, {"a": "", "b": ""}, {"a": 'y"', "b": "2"}]


def test_a_quoted_field_of_csv_holds_lines_and_much_text(tmp_path):
    long = "x, " * 100_000
    (tmp_path / "t.csv").write_text(f'a,b\n"one\n\ntwo ""2""",1\n"{long}",2\n')
    assert fields_of(tmp_path / "t.csv", unit_bytes=5) == [{"a": 'one\n\ntwo "2"', "b": "1"}, {"a": long, "b": "2"}]


def test_a_unit_of_a_compressed_file_is_read_on_from_the_one_before(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"id": number}) + "\n" for number in range(20_000)))
    begun, open_, rewind = [], gzip.open, gzip._GzipReader._rewind
    monkeypatch.setattr(gzip, "open", lambda *arguments: (begun.append("open"), open_(*arguments))[1])
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: (begun.append("again"), rewind(self)))
    assert [row["id"] for row in fields_of(tmp_path / "t.jsonl.gz", unit_bytes=1000)] == list(range(20_000))
    assert begun.count("open") == 2 and begun.count("again") <= 1  # once to cut, once to read


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", '{"a": "fine"}\n\n{not json\n', "line 3: not JSON"),
        ("t.jsonl", '{"a": "fine"}\n\n[1]\n', "line 3: a JSON list where an object"),
        ("t.ndjson", '{"a": "fine"}\n\n{"b": 1}\n', "line 3: no field 'a'; it has 'b'"),
        ("t.jsonl", '{"a": "fine"}\n\n{"a": 1}\n', "line 3: the field 'a' is a int"),
        ("t.tsv", "a\tb\n1\t2\n1\t2\t3\n", r"line 3: 3 fields where the header names 2 \(a, b\)"),
        ("t.csv", 'a,b\n"1\n",2\n1\n', r"line 4: 1 fields where the header names 2 \(a, b\)"),
        ("t.csv", 'a,b\n1,2\n"1,2\n1,2\n', "line 3: not CSV"),
        ("t.csv", "b,c\n1,2\n", "no column 'a' in its header, the first line; it has 'b', 'c'"),
        ("t.tsv", "a\ta\n1\t2\n", "two columns 'a'"),
        ("t.tsv", "", "no column 'a' in its header, the first line; it has none"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_no_row_is_named_by_file_and_line(tmp_path, name, content, says, suffix):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix else content.encode())
    with pytest.raises(DataError, match=rf"{path}.* ?{says}"):
        rows_of(path, ["a"], unit_bytes=3)


def test_bytes_that_are_not_utf8_and_damaged_gzip_are_named(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"fine\n" * 50 + b"bad \xff here\n")
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xff in line 51 at byte offset 254"):
        rows_of(tmp_path / "t.txt", unit_bytes=7)
    (tmp_path / "t.gz").write_bytes(gzip.compress(bytes(range(97, 123)) * 400)[:-9])
    with pytest.raises(DataError, match=r"t.gz is damaged or not gzip"):
        rows_of(tmp_path / "t.gz")


def test_the_name_says_the_format_unless_the_user_does():
    names = {
        "a.jsonl": "jsonl",
        "a.ndjson.gz": "jsonl",
        "a.TSV": "tsv",
        "a.csv.gz": "csv",
        "a.txt": "text",
        "a": "text",
    }
    assert {name: read.format_of(name, ()) for name in names} == names
    assert read.format_of("a.txt", (), "csv") == "csv"
    with pytest.raises(UsageError, match="not one of jsonl, tsv, csv, text"):
        read.format_of("a", (), "xml")
    with pytest.raises(UsageError, match="there is no 'question' in it"):
        read.format_of("a.txt", ("text", "question"))


def test_a_caller_refuses_a_row_by_its_line(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    refusal = rows_of(tmp_path / "t.txt")[1].refusal("too long")
    assert isinstance(refusal, DataError) and str(refusal) == f"input: {tmp_path}/t.txt line 3: too long"
