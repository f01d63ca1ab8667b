"""Questions are read as they stand, each once however files are cut; what is wrong is named by file, line and id."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_questions import articles, questions, write_lines, write_squad

from benchmarks import cloze
from hpcllm.data import labelled, squad
from hpcllm.data.labelled import Reading
from hpcllm.errors import DataError, UsageError

SPAN = Reading("span")
RECORDS = questions(41, 1, missing=0.3)


def read(paths, reading=SPAN, unit_bytes=None):
    paths = [str(path) for path in paths]
    cut = squad.cut(paths, unit_bytes) if unit_bytes else labelled.cut(paths, reading)
    return [example for unit in cut for example, _ in labelled.examples(unit, reading)]


def told(examples):
    return [(e.label.name, e.text, e.pair, e.label.answers) for e in examples]


def wanted(records):
    return [
        (r["id"], r["context"], r["question"], [(a["text"], a["answer_start"]) for a in r["answers"]]) for r in records
    ]


def test_every_form_of_a_question_is_the_same_question(tmp_path):
    paths = [write_squad(tmp_path / "a.json", RECORDS), write_squad(tmp_path / "b.json", RECORDS, indent=1)]
    paths.append(write_lines(tmp_path / "c.jsonl", RECORDS))
    lists = [
        {**r, "answers": {key: [a[key] for a in r["answers"]] for key in ("text", "answer_start")}} for r in RECORDS
    ]
    paths.append(write_lines(tmp_path / "d.jsonl", lists))
    (tmp_path / "e.json").write_text(json.dumps({"note": ["data", [1], {"data": [2]}], "data": RECORDS, "more": [[0]]}))
    paths.append(tmp_path / "e.json")
    for path in paths.copy():
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        paths.append(packed)
    for path in paths:
        assert told(read([path])) == wanted(RECORDS), path


def test_fields_may_have_other_names(tmp_path):
    names = {"context": "passage", "question": "query", "answers": "spans", "id": "id"}
    renamed = [{names[key]: value for key, value in record.items()} for record in RECORDS]
    write_lines(tmp_path / "a.jsonl", renamed)
    (tmp_path / "a.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"passage": r["passage"], "qas": [r]}]} for r in renamed]})
    )
    reading = Reading("span", text="passage", pair="query", label="spans")
    for name in ("a.jsonl", "a.json"):
        assert told(read([tmp_path / name], reading)) == wanted(RECORDS)


STRINGS = st.text('ab"\\[]{}:,é😀\n', max_size=8)


@given(
    st.lists(st.lists(st.tuples(STRINGS, STRINGS), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 400),
    st.integers(1, 30),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_every_question_is_read_once_wherever_files_are_cut(tmp_path_factory, some, unit_bytes, block, indent, ascii):
    records = [
        {"id": f"{number}-{at}", "context": context + str(number), "question": question, "answers": []}
        for number, pairs in enumerate(some)
        for at, (context, question) in enumerate(pairs)
    ]
    path = tmp_path_factory.getbasetemp() / "cut.json"
    write_squad(path, records, indent=indent, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squad, "_READ_BYTES", block)
        assert told(read([path], unit_bytes=unit_bytes)) == wanted(records)
        units = squad.cut([str(path)], unit_bytes)
        whole = path.read_bytes()
        # Units are what lies between brackets, and but the last as long as was asked for.
        borders = [whole[at : at + 1] for unit in units for at in (unit.start, unit.stop - 1)]
        assert borders == [b"{", b"}"] * len(units)
        assert all(unit.stop - unit.start >= unit_bytes for unit in units[:-1])
        assert len(units) <= len(articles(records))


def test_positions_tell_how_far_a_unit_is_read(tmp_path):
    path = write_squad(tmp_path / "a.json", RECORDS, indent=1)
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for unit in (*squad.cut([str(path)], 500), *squad.cut([str(packed)])):
        positions = [position for _, position in labelled.examples(unit, SPAN)]
        assert positions == sorted(positions) and positions[-1] == unit.stop - unit.start


def test_questions_without_names_get_some(tmp_path):
    nameless = [{key: value for key, value in record.items() if key != "id"} for record in RECORDS]
    path = write_squad(tmp_path / "a.json", nameless)
    found = read([path], unit_bytes=300)
    names = [example.label.name for example in found]
    assert len(set(names)) == len(names) and names == [example.label.name for example in read([path])]
    assert names[0] == f"a.json:{path.read_text().index('{', 5)}:1" and not any(e.label.own for e in found)
    write_lines(tmp_path / "b.jsonl", nameless)
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    assert [e.label.name for e in read([tmp_path / "b.jsonl"])][:2] == ["b.jsonl:0", f"b.jsonl:{len(lines[0])}"]


def changed(**fields):
    record = {"id": "q7", "context": "the cat", "question": "who", "answers": [{"text": "cat", "answer_start": 4}]}
    return {key: value for key, value in {**record, **fields}.items() if value is not Ellipsis}


BAD = [
    ({"context": ...}, "no field 'context'"),
    ({"question": 7}, "the field 'question' is a int, not a string"),
    ({"answers": ...}, "no field 'answers'"),
    ({"answers": "cat"}, '"answers": neither a list of'),
    ({"answers": [{"text": "cat"}]}, 'answer 1 has no "text" that is a string, or no whole number'),
    ({"answers": [{"text": "cat", "answer_start": True}]}, "answer 1 has no"),
    ({"answers": [{"text": "cat", "answer_start": 4}, {"text": " ", "answer_start": 3}]}, "answer 2 is blank"),
    ({"answers": {"text": ["cat"], "answer_start": []}}, "not two lists of the same length"),
    ({"is_impossible": True}, 'there are some, and "is_impossible" is true'),
    ({"question": "\ud800"}, "lone surrogate"),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_what_is_no_question_is_named(tmp_path, fields, words):
    lines = write_lines(tmp_path / "a.jsonl", [changed(id="q6"), changed(**fields)])
    with pytest.raises(DataError, match=words) as caught:
        read([lines])
    assert "a.jsonl line 2: " in str(caught.value) and str(caught.value).endswith('(question "q7")')
    path = tmp_path / "a.json"
    record = changed(**fields)
    context = {key: record.pop(key) for key in ("context",) if key in record}
    paragraphs = [{"context": "the cat", "qas": [changed(id="q6")]}], [{**context, "qas": [record]}]
    path.write_text(json.dumps({"data": [{"paragraphs": some} for some in paragraphs]}, indent=1))
    with pytest.raises(DataError, match=words) as caught:
        read([path])
    number = path.read_text()[: path.read_text().rindex('"paragraphs"')].count("\n")
    assert f"a.json line {number}: " in str(caught.value) and str(caught.value).endswith('(question "q7")')


def test_names_that_are_neither_text_nor_numbers_are_refused(tmp_path):
    for name in (True, ["x"], 1.5):
        with pytest.raises(DataError, match='line 1: its "id" is neither text nor a whole number'):
            read([write_lines(tmp_path / "a.jsonl", [changed(id=name)])])
    assert [example.label.name for example in read([write_lines(tmp_path / "a.jsonl", [changed(id=3)])])] == [3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", 'has no list "data"'),
        ("[]", 'has no list "data"'),
        ('{"data": {"a": [{}]}}', 'has no list "data"'),
        ('{"id": 1}\n{"id": 2}\n', 'has no list "data".* --format jsonl'),
        ('{"data": []}', 'its list "data" is empty'),
        ('{"data": [{"paragraphs": []}', "is not JSON: it ends within"),
        ('{"data": [{"paragraphs": []}]}}', "is not JSON: .* ends one too many"),
        ('{"data": [{"paragraphs": ["]}', "is not JSON: it ends within"),
        ('{"data":\n[{"paragraphs": [],\n "x" 3}]}', r"line 3: not JSON \(Expecting ':' delimiter\)"),
        ('{"data": [[1]]}', "a list where an article was expected"),
        ('{"data": [{"paragraphs": {}}]}', 'has no list of objects "paragraphs"'),
        ('{"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [1]}]}]}', 'the article "T" has no list of'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_squad_is_named(tmp_path, content, words, packed):
    path = tmp_path / ("a.json.gz" if packed else "a.json")
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    if packed and content == '{"data": []}':
        assert read([path]) == []  # whose part is then found to be empty
        return
    with pytest.raises(DataError, match=words) as caught:
        read([path])
    assert "a.json" in str(caught.value)


def test_bytes_of_another_encoding_are_named_by_line(tmp_path):
    (tmp_path / "a.json").write_bytes('{"data": [\n{"paragraphs":\n["schön"]}]}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.json is not UTF-8: byte 0xf6 in line 3"):
        read([tmp_path / "a.json"])
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"data": [' + b"{}, " * 99)[:-20])
    with pytest.raises(DataError, match=r"b\.json\.gz is damaged or not gzip"):
        read([tmp_path / "b.json.gz"])


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is tsv .*, this task reads squad or jsonl"):
        read([tmp_path / "a.tsv"])
    with pytest.raises(UsageError, match="its ending does not tell the format"):
        read([tmp_path / "a.json"], Reading("single"))


def test_questions_made_of_running_text_are_read(tmp_path, monkeypatch, capsys):
    names, lines = ["Rome", "New Oslo", "Lima"], []
    for number in range(40):
        name = names[number % 3]
        lines += [f" = Town {number} = ", f'We saw {name} . It was in {name} then . " A b " was here . So they left .']
    (tmp_path / "wiki.txt").write_text("\n".join(lines))
    arguments = ["cloze", "--input", str(tmp_path / "wiki.txt"), "--output", str(tmp_path), "--missing", "0.5"]
    monkeypatch.setattr("sys.argv", arguments)
    cloze.main()
    made = {part: read([tmp_path / f"{part}.json"]) for part in ("train", "validation", "test")}
    assert [len(examples) for examples in made.values()] == [32, 4, 4]
    for example in (example for examples in made.values() for example in examples):
        assert "[gap]" in example.pair and len(example.label.answers) <= 1
        for answer, start in example.label.answers:
            assert answer in names and example.text.startswith(answer, start) and answer not in example.pair
    assert 0 < sum(not example.label.answers for example in made["train"]) < 32
    assert capsys.readouterr().out.startswith("train: 32 questions about 32 articles")
