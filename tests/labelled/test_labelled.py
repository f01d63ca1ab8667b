"""Labelled text is read as it stands, each example once however files are cut, and what is wrong is named by line."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcllm.data import labelled, labels, text
from hpcllm.data.labelled import Reading
from hpcllm.errors import DataError, UsageError


def read(path, content, unit_bytes=None, **how):
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(content.encode())
    reading = Reading(**how)
    units = text.cut([str(path)], unit_bytes)
    return [example for unit in units for example, _ in labelled.examples(unit, reading)]


def pairs(examples):
    return [(example.text, example.label) for example in examples]


CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\n# text = a comment of CoNLL-U\n#tag NN O\n# SYM O\n"


def test_columns_of_conll_are_words_and_tags(tmp_path):
    found = [(["EU", "rejects"], ["B-ORG", "O"]), (["#tag", "#"], ["O", "O"])]
    assert pairs(read(tmp_path / "a.conll", CONLL, kind="tags")) == found
    assert pairs(read(tmp_path / "a.txt.gz", CONLL.replace("\n", "\r\n"), kind="tags")) == found
    tagged = [(["EU", "rejects"], ["NNP", "VBZ"]), (["#tag", "#"], ["NN", "SYM"])]
    assert pairs(read(tmp_path / "a.x", CONLL, kind="tags", format="conll", text="0", label="1")) == tagged
    # A word of a tab-separated file may hold blanks.
    assert pairs(read(tmp_path / "b.conll", "New York\tB-LOC\n", kind="tags")) == [(["New York"], ["B-LOC"])]


def test_conll_u_has_words_and_parts_of_speech_at_their_places(tmp_path):
    lines = [
        "# text = del mar",
        "1-2\tdel\t_\t_",
        "1\tde\tde\tADP",
        "2\tel\tel\tDET",
        "2.1\tx\tx\tX",
        "3\tmar\tmar\tNOUN",
    ]
    found = [(["de", "el", "mar"], ["ADP", "DET", "NOUN"])]
    assert pairs(read(tmp_path / "a.conllu", "\n".join(lines) + "\n", kind="tags")) == found


def test_tables_have_named_columns(tmp_path):
    tsv = 'id\ttext\tlabel\n1\ta "b\tpos\n\n2\tc, d\tneg\n'
    assert pairs(read(tmp_path / "a.tsv", tsv)) == [('a "b', "pos"), ("c, d", "neg")]
    named = {"columns": ("s", "l"), "text": "s", "label": "l"}
    assert pairs(read(tmp_path / "b.tsv", "x y\t0\n", **named)) == [("x y", "0")]
    csv = 'label,text,text\npos,"a ""b"", c",x\n'
    assert pairs(read(tmp_path / "a.csv", csv.replace("text,text", "text,more"))) == [('a "b", c', "pos")]
    two = read(tmp_path / "c.csv", "a,b,label\nx,y,1\n", text="a", pair="b")
    assert (two[0].text, two[0].pair, two[0].label) == ("x", "y", "1")


def test_json_lines_have_named_fields(tmp_path):
    lines = '{"text": "a", "label": 3}\n\n{"text": "b", "label": ["x"]}\n'
    assert pairs(read(tmp_path / "a.jsonl", lines)) == [("a", 3), ("b", ["x"])]
    words = '{"words": ["a", "b"], "ner": ["O", "B-x"]}\n'
    assert pairs(read(tmp_path / "b.jsonl", words, kind="tags", text="words", label="ner")) == [
        (["a", "b"], ["O", "B-x"])
    ]


@given(
    st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "é"]), min_size=1, max_size=5), min_size=1), st.integers(1, 60)
)
def test_every_sentence_is_read_once_wherever_files_are_cut(tmp_path_factory, sentences, unit_bytes):
    path = tmp_path_factory.getbasetemp() / "cut.conll"
    content = "\n".join("".join(f"{word}\tO\n" for word in words) + "\n" * (len(words) % 3) for words in sentences)
    assert [example.text for example in read(path, content, unit_bytes, kind="tags")] == sentences


@given(st.lists(st.text('ab," é', max_size=8), min_size=1), st.integers(1, 40))
def test_every_row_is_read_once_wherever_files_are_cut(tmp_path_factory, texts, unit_bytes):
    path = tmp_path_factory.getbasetemp() / "cut.tsv"
    content = "text\tlabel\n" + "".join(f"{text}\t{number}\n" for number, text in enumerate(texts))
    expected = [(text, str(number)) for number, text in enumerate(texts)]
    assert pairs(read(path, content, unit_bytes)) == expected


@pytest.mark.parametrize(
    ("name", "content", "how", "words"),
    [
        (
            "a.conll",
            "a O\n\nb O\nc d O\n",
            {"kind": "tags"},
            "line 4: 3 columns where the first line of the sentence has 2",
        ),
        ("a.conll", "a O\n", {"kind": "tags", "label": "2"}, "line 1: no column 2, there are 2"),
        ("a.tsv", "text\tlabel\na\t1\nb\t2\t3\n", {}, r"line 3: 3 columns, not the 2 \(text, label\)"),
        ("a.csv", 'text,label\n"a\nb",1\n', {}, "line 2: not a row of CSV"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', {}, "line 2: no field 'label'"),
        ("a.jsonl", '{"text": 7, "label": 1}\n', {}, "line 1: the field 'text' is a int"),
        ("a.jsonl", '{"tokens": ["a"], "tags": []}\n', {"kind": "tags"}, "line 1: 1 words and 0 tags"),
        ("a.jsonl", '{"tokens": "a", "tags": []}\n', {"kind": "tags"}, "line 1: .* are not lists of words and tags"),
        ("a.jsonl", "[]\n", {}, "line 1: a JSON list"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', {}, "line 1: .*lone surrogate"),
    ],
)
def test_what_cannot_be_read_is_named_by_line(tmp_path, name, content, how, words):
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path / name, content, **how)
    assert name in str(caught.value)


def test_bytes_of_another_encoding_are_named_by_line(tmp_path):
    (tmp_path / "a.tsv").write_bytes("text\tlabel\ngut\t1\nschön\t1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.tsv is not UTF-8: byte 0xf6 in line 3"):
        list(labelled.examples(text.cut([str(tmp_path / "a.tsv")])[0], Reading()))


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("a.dat", {}, "its ending does not tell the format"),
        ("a.conll", {}, "this task reads tsv, csv or jsonl"),
        ("a.tsv", {"kind": "tags"}, "this task reads conll or jsonl"),
        ("b.tsv", {"label": "class"}, 'there is no column "class"; the first line of .*b.tsv names text, label'),
    ],
)
def test_what_does_not_suit_the_task_is_a_usage_error(tmp_path, name, how, words):
    with pytest.raises(UsageError, match=words):
        read(tmp_path / name, "text\tlabel\na\t1\n", **how)


IOB2 = ["O", "B-x", "I-x", "O", "B-x", "B-x", "I-x", "B-y"]


@pytest.mark.parametrize(
    "tags",
    [IOB2, ["O", "I-x", "I-x", "O", "I-x", "B-x", "I-x", "I-y"], ["O", "B-x", "E-x", "O", "S-x", "B-x", "E-x", "S-y"]],
    ids=["IOB2", "IOB1", "BIOES"],
)
def test_tags_of_every_scheme_become_iob2(tags):
    assert labels.to_iob2(tags) == IOB2


def named(kind, label):
    unit = text.Unit("f", 0, 1, 1)
    return labels.named(kind, labelled.Example("a", None, label, 0), unit)


def test_labels_have_names():
    assert named("single", "x ") == ["x"] and named("single", 3) == ["3"] and named("single", True) == ["true"]
    assert named("multi", "a, b,") == ["a", "b"] and named("multi", ["b", 1]) == ["b", "1"] and named("multi", "") == []


@pytest.mark.parametrize(("kind", "label"), [("single", ""), ("single", None), ("single", 1.5), ("multi", ["a", "a"])])
def test_what_is_no_label_is_named_by_line(tmp_path, kind, label):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n' + json.dumps({"text": "a", "label": label}) + "\n")
    unit = text.cut([str(path)])[0]
    with pytest.raises(DataError, match=r"a\.jsonl line 2: "):
        for example, _ in labelled.examples(unit, Reading()):
            labels.named(kind, example, unit)


@pytest.mark.parametrize("label", ["x", "nan", "inf", None, True, [1]])
def test_what_is_no_number_is_no_value(tmp_path, label):
    (tmp_path / "f").write_text("\n")
    unit = text.Unit(str(tmp_path / "f"), 0, 1, 1)
    with pytest.raises(DataError, match=r"line 1: .* is not a number"):
        labels.Labels("value", ()).numbers(labelled.Example("a", None, label, 0), unit)
