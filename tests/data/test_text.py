"""Documents are found, cut and refused the same way wherever a unit begins."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcllm.data import text
from hpcllm.errors import DataError, MissingInput, UsageError


def read(path, unit_bytes=None, **reading):
    return [document for unit in text.cut([str(path)], unit_bytes) for document, _ in text.documents(unit, **reading)]


@settings(max_examples=300, deadline=None)
@given(
    content=st.text(st.sampled_from(list("aé \n\r\0")), min_size=1, max_size=120),
    separator=st.sampled_from(text.SEPARATORS),
    unit_bytes=st.integers(1, 40),
    read_bytes=st.integers(2, 30),
)
def test_every_document_belongs_to_exactly_one_unit(tmp_path_factory, content, separator, unit_bytes, read_bytes):
    path = tmp_path_factory.getbasetemp() / "units.txt"
    path.write_bytes(content.encode())
    whole = read(path, 1 << 30, document_separator=separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_READ_BYTES", read_bytes)
        assert read(path, unit_bytes, document_separator=separator) == whole


def test_lines_and_paragraphs_are_what_a_reader_would_say(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \n\n \t\nthree\nfour\n\n")
    assert read(path) == ["one", "two ", "three", "four"]
    assert read(path, document_separator="blank-line") == ["one\ntwo ", "three\nfour"]


def test_gzip_holds_the_same_documents(tmp_path):
    content = "\n".join(f"line {i}" for i in range(1000)).encode()
    (tmp_path / "t.txt").write_bytes(content)
    with gzip.open(tmp_path / "t.txt.gz", "wb") as file:
        file.write(content)
    assert read(tmp_path / "t.txt.gz", 100) == read(tmp_path / "t.txt", 100)


def test_a_huge_line_and_a_nul_are_text_like_any_other(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\0b\n" + b"x y " * 1_000_000 + b"\nlast")
    documents = read(path, 1 << 16)
    assert [len(document) for document in documents] == [3, 4_000_000, 4] and documents[0] == "a\0b"


def test_positions_end_at_the_end_of_the_unit(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("ab\n" * 100)
    for unit in text.cut([str(path)], 70):
        positions = [position for _, position in text.documents(unit)]
        assert positions == sorted(positions) and positions[-1] == unit.stop - unit.start


def test_bytes_that_are_not_utf8_are_named_by_file_line_and_offset(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"fine\n" * 50 + b"bad \xff here\n")
    for unit_bytes in (None, 7):
        with pytest.raises(DataError, match=rf"{path} is not UTF-8: byte 0xff in line 51 at byte offset 254"):
            read(path, unit_bytes)
    with gzip.open(tmp_path / "t.txt.gz", "wb") as file:
        file.write(path.read_bytes())
    with pytest.raises(DataError, match="line 51 at byte offset 254 of the uncompressed text"):
        read(tmp_path / "t.txt.gz")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list where an object"),
        ('{"body": "x"}', "no field 'text'; it has 'body'"),
        ('{"text": 7}', "is a int, not a string"),
        ('{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path, line, says):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"{path} line 3: .*{says}"):
        read(path, jsonl_field="text")


def test_json_lines_give_their_field(tmp_path):
    path = tmp_path / "t.jsonl"
    held = ["one", "two\nlines", "é 東京"]
    path.write_text("\n".join(json.dumps({"id": 1, "text": each}) for each in held))
    assert read(path, 9, jsonl_field="text") == held


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"plain text", lambda b: b[:30] + b"\0\0" + b[32:]])
def test_damaged_gzip_is_refused(tmp_path, damage):
    path = tmp_path / "t.gz"
    path.write_bytes(damage(gzip.compress(bytes(range(97, 123)) * 400)))
    with pytest.raises(DataError, match=str(path)):
        read(path)


def test_globs_are_sorted_and_name_each_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "[x].txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    found = text.find_inputs([f"{tmp_path}/[x].txt", f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"])
    assert [path.rpartition("/")[2] for path in found] == ["[x].txt", "a.txt", "b.txt"]


def test_missing_input_is_refused(tmp_path):
    with pytest.raises(MissingInput, match=r"no file matches .*\*\.txt"):
        text.find_inputs([f"{tmp_path}/*.txt"])
    with pytest.raises(MissingInput, match="there is no file nowhere"):
        text.find_inputs(["nowhere.txt"])
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(MissingInput, match="link to a file that does not exist"):
        text.find_inputs([str(tmp_path / "link")])
    with pytest.raises(DataError, match="is a folder"):
        text.find_inputs([str(tmp_path)])
    with pytest.raises(DataError, match="not a regular file"):
        text.find_inputs(["/dev/null"])


def test_json_lines_are_not_taken_for_plain_text():
    with pytest.raises(UsageError, match="--jsonl-field"):
        text.check_format(["x.jsonl.gz"], None, "newline")
    text.check_format(["x.jsonl.gz"], "text", "newline")


def test_empty_files_are_refused_when_there_is_nothing_else(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="1 file of 0 bytes"):
        text.cut([str(tmp_path / "empty.txt")])
