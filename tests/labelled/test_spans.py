"""Questions and texts become windows, as transformers' tokenizers make them, with the answer's tokens, on all ranks."""

import gzip
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_labelled import write_tokenizer
from small_questions import prepare, questions, write_lines, write_squad
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import hpcllm.mpi
from hpcllm.data import encode, shards, spans, text, texts
from hpcllm.data.labelled import Example, Reading
from hpcllm.data.labels import Labels
from hpcllm.data.prepare_labelled import table
from hpcllm.data.squad import Asked
from hpcllm.errors import DataError, MissingInput, UsageError

TEXT = "the  Paris city, anna smith sees dieter of oslo harbour; then emma walks under rome and never reads"


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def folder(request, tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer", request.param)


@pytest.fixture(scope="module")
def encoder(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def unit(tmp_path):
    (tmp_path / "in.json").write_text("\n" * 5)
    return text.Unit(str(tmp_path / "in.json"), 0, 5, 5)


def theirs(folder, question, context, max_tokens, stride):
    """[(ids, segments, offsets with None for what is no context)] of each window, by transformers."""
    words = AutoTokenizer.from_pretrained(folder)
    how = {"truncation": "only_second", "max_length": max_tokens, "stride": stride}
    found = words(question, context, **how, return_overflowing_tokens=True, return_offsets_mapping=True)
    for row, ids in enumerate(found["input_ids"]):
        inside = [number == 1 for number in found.sequence_ids(row)]
        pairs = zip(found["offset_mapping"][row], inside, strict=True)
        yield ids, [None if not there else tuple(one) for one, there in pairs], found.encodings[row].type_ids


@pytest.mark.parametrize(("max_tokens", "stride"), [(16, 0), (16, 2), (24, 5), (40, 9), (512, 128)])
def test_windows_are_those_of_transformers(folder, encoder, max_tokens, stride):
    question = "who often"
    windows = spans.Windows(encoder, max_tokens, stride)
    [(found, cut), (short, _)] = windows.of([(question, TEXT * 3), (question, "rome")])
    wanted = list(theirs(folder, question, TEXT * 3, max_tokens, stride))
    assert len(found) == len(wanted) and not cut and (len(wanted) > 1 or max_tokens == 512)
    for window, (ids, offsets, types) in zip(found, wanted, strict=True):
        assert (window.ids, window.segments) == (ids, types) and len(ids) <= max_tokens
        for at, pair in enumerate(offsets):
            assert (window.begins[at], window.ends[at]) == (pair or (-1, -1))
    assert len(short) == 1 and len(short[0].inside) >= 1
    # Each token of the text is in a window, and as many as that in two.
    firsts, lasts = ([window.begins[window.inside[at]] for window in found] for at in (0, -1))
    assert firsts == sorted(firsts) and all(a <= b or stride == 0 for a, b in zip(firsts[1:], lasts, strict=False))


def test_of_long_questions_the_end_is_cut(encoder):
    windows = spans.Windows(encoder, 512)
    word = "paris "
    bytes_too = encoder.num_special_tokens_to_add(True) == 0  # by which several tokens are one character
    for question in (word * 200, "dieterichs " * 90, *["\U0001f600" * 90] * bytes_too):
        [(found, cut)] = windows.of([(question, "rome and oslo")])
        assert cut and len(found) == 1
        inside = found[0].inside
        special = encoder.num_special_tokens_to_add(True)
        told = len(found[0].ids) - len(inside) - special
        assert 60 < told <= 64
        encoder.no_truncation()
        begin = encoder.encode(question, add_special_tokens=False).ids[: told - 4]
        at = 1 if special else 0
        assert found[0].ids[at : at + len(begin)] == begin
    [(_, cut)] = windows.of([(word * 3, "rome")])
    assert not cut


def test_strides_must_leave_room(encoder):
    special = encoder.num_special_tokens_to_add(True)
    with pytest.raises(
        UsageError, match=rf"stride: windows of 512 tokens share 0 to {447 - special} of a text, not 500"
    ):
        spans.Windows(encoder, 512, 500)
    with pytest.raises(UsageError, match="not -1"):
        spans.Windows(encoder, 512, -1)
    assert spans.Windows(encoder, 512).stride == 128 and 0 < spans.Windows(encoder, 24).stride < 8
    widest = spans.Windows(encoder, 24, (room := 24 - special) - room // 2 - 1)
    [(found, _)] = widest.of([("who often " * 20, TEXT)])
    assert len(found) > 3 and all(len(window.ids) <= 24 for window in found)


def as_in_their_example(offsets, start, end):
    """First and last token as run_qa.py of transformers finds them; offsets: None for what is no context."""
    first = next(at for at, pair in enumerate(offsets) if pair)
    last = max(at for at, pair in enumerate(offsets) if pair)
    if not (offsets[first][0] <= start and offsets[last][1] >= end):
        return 0, 0
    while first <= last and offsets[first][0] <= start:
        first += 1
    while offsets[last][1] >= end:
        last -= 1
    return first - 1, last + 1


@pytest.mark.parametrize(
    "answer", ["the", "anna smith", "Paris city,", "oslo harbour; then emma walks under", "reads", "iete"]
)
@pytest.mark.parametrize("max_tokens", [24, 512])
def test_the_tokens_of_an_answer_are_those_of_transformers_example(folder, encoder, answer, max_tokens):
    if folder.parent.name.startswith("words1") and max_tokens == 24:
        max_tokens = 40
    start = TEXT.index(answer)
    [(found, _)] = spans.Windows(encoder, max_tokens, 4).of([("who often", TEXT)])
    wanted = list(theirs(folder, "who often", TEXT, max_tokens, 4))
    held = 0
    for window, (_, offsets, _) in zip(found, wanted, strict=True):
        labels = window.tokens(start, start + len(answer))
        assert labels == as_in_their_example(offsets, start, start + len(answer))
        if labels[1]:
            said = TEXT[window.begins[labels[0]] : window.ends[labels[1]]]
            assert answer in said and (answer == "iete" or len(said.strip()) <= len(answer) + 1)
            held += 1
    assert held or len(answer) > 30


def test_an_answer_of_characters_that_are_several_tokens_has_all_of_them(tmp_path):
    encoder = Tokenizer.from_file(str(write_tokenizer(tmp_path / "t", "bpe") / "tokenizer.json"))
    context = "of \U0001f600 rome"
    [([window], _)] = spans.Windows(encoder, 64).of([("who", context)])
    one, other = window.tokens(3, 4)
    assert other > one and context[window.begins[one] : window.ends[other]].strip() == "\U0001f600"
    assert window.tokens(3, 9)[1] == len(window.ids) - 1 and window.tokens(0, 99) == (0, 0)


@pytest.mark.parametrize(
    ("answer", "start", "found"),
    [
        ("Paris city", 5, (5, 15)),
        ("paris City ", 5, (5, 15)),
        (" the Paris", 0, (0, 10)),
        ("the Paris\n", 0, (0, 10)),
        ("Paris city", 4, (5, 15)),
        ("Paris city", 6, None),
        ("Paris.city", 5, None),
        ("reads", len(TEXT) - 5, (len(TEXT) - 5, len(TEXT))),
        ("reads", len(TEXT), None),
        ("reads", -5, None),
    ],
)
def test_answers_stand_where_they_should_but_for_blanks_and_case(answer, start, found):
    assert spans.place(TEXT, answer, start) == found


@given(st.text("aB \n.", min_size=1, max_size=12), st.data())
def test_any_part_of_a_text_is_found_where_it_is(context, data):
    start = data.draw(st.integers(0, len(context) - 1))
    answer = context[start : data.draw(st.integers(start + 1, len(context)))]
    if answer.strip():
        begin, end = spans.place(context, answer, start)
        assert context[begin:end] == answer.strip()


def encoded(encoder, unit, examples, truncation="split", max_tokens=24, **how):
    counts = Counter()
    made = encode.encoding(encoder, Labels("span", ()), max_tokens, truncation, **how)
    batch = [
        (Example(context, question, Asked(f"q{number}", True, answers), 2), unit)
        for number, (context, question, answers) in enumerate(examples)
    ]
    return list(made.documents(batch, counts)), counts


def test_what_is_too_long_goes_by_the_policy(encoder, unit):
    long, short = (TEXT, "who", [("rome", TEXT.index("rome"))]), ("in rome", "where", [("rome", 3), ("in rome", 0)])
    found, counts = encoded(encoder, unit, [long, short])
    lines = [json.loads(beside["line"]) for _, beside in found if beside["line"]]
    assert [line["id"] for line in lines] == ["q0", "q1"] and lines[1]["answers"] == ["rome", "in rome"]
    assert len(found) > 3 and counts["split"] == 1 and counts["lost"] == counts["unanswerable"] == 0
    assert [bool(beside["line"]) for _, beside in found] == [True] + [False] * (len(found) - 2) + [True]
    for ids, beside in found:
        assert len(ids) == len(beside["begins"]) == len(beside["ends"]) <= 24
        assert beside["text"] == (texts.line(json.loads(beside["line"]))[1] if beside["line"] else (0, 0))
        assert beside["begins"][beside["second"]] == beside["begins"][beside["begins"] >= 0][0]
        assert beside["second"] == 0 or beside["begins"][beside["second"] - 1] == -1
    # The first answer is the one that is learnt.
    begin, end = (found[-1][1][side][at] for side, at in zip(("begins", "ends"), found[-1][1]["labels"], strict=True))
    assert "in rome"[begin:end].strip() == "rome"
    found, counts = encoded(encoder, unit, [long, short], "cut")
    assert len(found) == 2 and counts["cut"] == counts["lost"] == 1 and found[0][1]["labels"] == (0, 0)
    found, counts = encoded(encoder, unit, [long, short], "drop")
    assert len(found) == 1 and counts["dropped"] == 1
    with pytest.raises(DataError, match=r"in.json line 3: more than 24 tokens; .*--truncation cut, drop or split"):
        encoded(encoder, unit, [long, short], "error")


def test_questions_are_counted(encoder, unit):
    examples = [
        (" ", "who", []),
        ("in rome", " \n", []),
        ("in rome", "who", []),
        ("in rome", "who " * 99, [("rome", 3)]),
    ]
    found, counts = encoded(encoder, unit, examples, max_tokens=200)
    assert len(found) == counts["documents"] == 2 and counts["read"] == 4
    assert (counts["empty"], counts["unanswerable"], counts["shortened"], counts["lost"]) == (2, 1, 1, 0)
    assert found[0][1]["labels"] == (0, 0)


def test_answers_that_do_not_stand_where_they_should_are_refused(encoder, unit):
    for start, words in (
        (4, 'the text has "ome"'),
        (70, "the text has 7 characters"),
        (-4, "the text has 7 characters"),
    ):
        answers = [("rome", 3), ("rome", start)]
        with pytest.raises(
            DataError, match=rf'line 3: answer 2, "rome", is not at character {start}: {words}'
        ) as caught:
            encoded(encoder, unit, [("in rome", "where", answers)])
        assert str(caught.value).endswith('(question "q0")')


# --- prepare -------------------------------------------------------------------------------------------------------


def digests(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_shards_and_lines_are_the_same_bytes_at_any_number_of_ranks(world, base, name, monkeypatch):
    monkeypatch.setattr("hpcllm.data.text._UNIT_BYTES", (2000, 2000))
    records = questions(150, 1, missing=0.2, longest=60)
    if world.is_root:
        (write_squad if name == "train.json" else write_lines)(base / name, records)
        write_squad(base / "test.json.gz", questions(9, 2))
        (base / "test.json.gz").write_bytes(gzip.compress((base / "test.json.gz").read_bytes()))
    world.comm.Barrier()
    how = {"inputs": [str(base / name)], "test": [f"{base}/test.json.gz"], "validation_fraction": 0.2}
    how |= {"shard_tokens": 3000, "stride": 4}
    together = prepare(world, base, "together", **how)
    alone = prepare(hpcllm.mpi.alone(world), base, f"alone-{world.rank}", **how)
    assert digests(base / "together") == digests(base / f"alone-{world.rank}")
    held = []
    for part in ("train", "validation", "test"):
        assert together[part] == alone[part]
        folder = base / "together" / part
        manifest = shards.read_manifest(str(folder))
        assert manifest["labelled"]["version"] == 2 and manifest["labelled"]["stride"] == 4
        for shard in manifest["shards"]:
            shards.check(str(folder), shard, manifest)
        columns = shards.columns_of(manifest["labelled"])
        mapped = [shards.map_beside(folder / shard["name"], columns) for shard in manifest["shards"]]
        about = np.concatenate([one["text"] for one in mapped])
        assert manifest["labelled"]["text_bytes"] == (folder / "texts.jsonl").stat().st_size == about[:, 0].sum()
        lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
        kept = texts.Texts(folder, about)
        assert len(lines) == len(kept.firsts) and [kept.of(first) for first in kept.firsts] == lines
        documents = range(len(about))
        assert [kept.of(number)["id"] for number in documents] == [
            lines[int(kept.firsts.searchsorted(number, "right")) - 1]["id"] for number in documents
        ]
        held.append(lines)
    assert len(held[2]) == 9 and together["train"]["examples"] > len(held[0]) and len(mapped) == 1
    every = {line["id"]: line for lines in held[:2] for line in lines}
    in_order = [record["id"] for record in records]
    assert [line["id"] for line in held[0]] == [name for name in in_order if name in {line["id"] for line in held[0]}]
    assert sorted(every) == sorted(in_order)
    for record in records:
        told = every[record["id"]]
        assert told["context"] == record["context"] and told["answers"] == [a["text"] for a in record["answers"]]
    # Questions about the same text are on one side.
    assert not {line["context"] for line in held[0]} & {line["context"] for line in held[1]}


@pytest.mark.mpi
def test_two_questions_of_one_name_are_refused_on_every_rank(world, base, monkeypatch):
    monkeypatch.setattr("hpcllm.data.text._UNIT_BYTES", (500, 500))
    records = questions(40, 1)
    if world.is_root:
        write_squad(base / "train.json", records[:30])
        write_lines(base / "more.jsonl", [*records[30:], {**records[30], "id": records[3]["id"]}])
    world.comm.Barrier()
    before = sorted(path.name for path in base.iterdir())
    inputs = [f"{base}/train.json", f"{base}/more.jsonl"]
    with pytest.raises(DataError, match=r'there are 2 questions "1-3", in .*more.jsonl and .*train.json'):
        prepare(world, base, "out", inputs=inputs)
    world.comm.Barrier()
    assert sorted(path.name for path in base.iterdir()) == before
    # Other parts may have the same ones, and what has no name has none twice.
    prepare(world, base, "out", test=[f"{base}/train.json"])
    if world.is_root:
        write_lines(base / "nameless.jsonl", [{k: v for k, v in r.items() if k != "id"} for r in records[:3]] * 2)
    world.comm.Barrier()
    assert prepare(world, base, "nameless", inputs=[f"{base}/nameless.jsonl"])["train"]["became"]["read"] == 6


@pytest.mark.mpi
def test_what_is_wrong_with_one_question_is_told_on_every_rank(world, base):
    records = questions(40, 1)
    wrong = {**records[33], "answers": [{"text": "nobody", "answer_start": 0}]}
    if world.is_root:
        write_squad(base / "train.json", [*records[:33], wrong, *records[34:]])
    world.comm.Barrier()
    with pytest.raises(DataError, match=r'train.json line 1: answer 1, "nobody", is not at .*question "1-33"'):
        prepare(world, base, "out")
    with pytest.raises(UsageError, match="stride: windows of 24 tokens share 0 to 10 of a text, not 11"):
        prepare(world, base, "out", stride=11)
    world.comm.Barrier()
    assert not (base / "out").exists()


def test_a_table_tells_what_became_of_questions(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    write_squad(tmp_path / "train.json", questions(40, 1, missing=0.3, longest=40))
    summary = prepare(world, tmp_path, "out")
    rows = {line[:41].strip(): line.split()[-1] for line in table(summary).splitlines()}
    assert rows["examples read"] == "40" and int(rows["documents"]) > 40 and summary["labels"] == []
    became = summary["train"]["became"]
    assert rows["questions without an answer"] == str(became["unanswerable"]) != "0"
    assert rows["answers that are in no document"] == str(became["lost"])
    assert rows["cut: questions of more than 64 tokens"] == "0"


def test_texts_that_are_not_those_of_the_shards_are_refused(world, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    write_squad(tmp_path / "train.json", questions(5, 1))
    prepare(world, tmp_path, "out")
    folder = tmp_path / "out" / "train"
    stream = shards.open_folder(str(folder))
    mapped = shards.map_beside(stream.paths[0], shards.columns_of(stream.labelled))
    file = folder / "texts.jsonl"
    content = bytearray(file.read_bytes())
    content[int(mapped["text"][0, 0]) + 5] ^= 1
    file.write_bytes(content)
    kept = texts.Texts(str(folder), mapped["text"])
    kept.of(0)
    with pytest.raises(DataError, match=r"texts.jsonl is damaged within \d+ bytes at \d+"):
        kept.of(1)
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match="the manifest says"):
        shards.open_folder(str(folder))
    file.unlink()
    with pytest.raises(MissingInput, match=r"there is no .*texts.jsonl"):
        shards.open_folder(str(folder))
    assert Reading("span").named("squad") == ("context", "question", "answers")
