"""Schemes of tags: what is read, told apart and converted; the readings are those of seqeval."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcllm.errors import DataError
from hpcllm.metrics import tags

TYPES = ["PER", "LOC", "A-B", "B", "O"]
# Tags in any order, right or wrong; "B" without a type, types with "-" and such as look like letters.
ANY = st.one_of(
    st.just("O"), st.builds("{}-{}".format, st.sampled_from("BIES"), st.sampled_from(TYPES[2:])), st.just("I")
)
ENTITIES = st.lists(st.tuples(st.sampled_from([*TYPES, "O "]), st.integers(1, 4)), max_size=8)


def written(entities):
    """IOB2 tags of (type, length), "O " being no entity."""
    tagged = []
    for kind, length in entities:
        tagged += ["O"] * length if kind == "O " else [f"B-{kind}"] + [f"I-{kind}"] * (length - 1)
    return tagged


def test_the_lenient_reading_by_hand():
    assert tags.spans(["O", "I-A", "I-A", "I-B", "B-B", "O", "E-B", "E-B", "S-A", "B-A"]) == [
        ("A", 1, 3),
        ("B", 3, 4),
        ("B", 4, 5),
        ("B", 6, 7),
        ("B", 7, 8),
        ("A", 8, 9),
        ("A", 9, 10),
    ]
    assert tags.spans(["B", "I", "I-A-B", "I-A-B"]) == [("_", 0, 2), ("A-B", 2, 4)]
    assert tags.spans(["B-A", "M-A", "L-A", "U-A"]) == [("A", 0, 3), ("A", 3, 4)]
    assert tags.spans([]) == tags.spans(["O"] * 3) == []


def test_the_strict_reading_by_hand():
    tagged = ["I-A", "B-A", "I-A", "I-B", "B-B", "O", "S-A", "B-A", "E-A", "E-A", "B-A"]
    assert tags.strict_spans(tagged[:6], "bio") == [("A", 1, 3), ("B", 4, 5)]
    assert tags.strict_spans(tagged[6:], "IOBES") == [("A", 0, 1), ("A", 1, 3)]
    assert tags.strict_spans(["B-A", "I-A", "O", "B-A"], "BIOES") == []  # both without an end
    assert tags.strict_spans(["I-A", "E-A", "O", "E-A"], "BIOES") == []  # both without a beginning
    assert tags.strict_spans(["I-A", "B-A"], "IOB1") == [("A", 0, 1), ("A", 1, 2)]
    assert tags.strict_spans(["B-A", "M-A", "E-A", "M-A"], "BMES") == [("A", 0, 3)]


@pytest.mark.parametrize(
    "sentences, name",
    [
        ([], "IOB2"),
        ([[], ["O", "O"]], "IOB2"),
        ([["B-A", "O"]], "IOB2"),
        ([["B-A", "I-A", "B-A", "B-B"]], "IOB2"),
        ([["I-A", "I-A", "B-A", "I-B"], ["O"]], "IOB1"),
        ([["I-A"]], "IOB1"),
        ([["S-A", "O"]], "BIOES"),
        ([["B-A", "I-A", "E-A"]], "BIOES"),
        ([["O"], ["B-A", "E-A"]], "BIOES"),
        ([["U-A", "B-A", "L-A"]], "BILOU"),
        ([["B-A", "M-A", "E-A"], ["S-B"]], "BMES"),
    ],
)
def test_the_scheme_is_told(sentences, name):
    assert tags.scheme(sentences) == name


@pytest.mark.parametrize(
    "sentences, words",
    [
        ([["O"], ["B-A", "O", "I-A"]], r"sentence 1, tag 2 \(from 0\): 'I-A' after 'O' does not fit IOB2"),
        ([["I-A", "O", "B-A"]], r"sentence 0, tag 2 \(from 0\): 'B-A' after 'O' does not fit IOB1"),
        ([["B-A", "I-B"]], r"sentence 0, tag 1 \(from 0\): 'I-B' after 'B-A' does not fit IOB2"),
        ([["S-A"], ["E-A"]], r"sentence 1, tag 0 \(from 0\): 'E-A' does not fit BIOES or BMES"),
        ([["S-A", "B-A", "I-A"]], r"sentence 0, tag 3 \(from 0\): the end after 'I-A' does not fit BIOES"),
        ([["U-A"], ["S-A"]], r"sentence 1, tag 0 \(from 0\): 'S-A' does not fit BILOU"),
        ([["O", "person"]], "'person' is not a tag"),
        ([["ORG"]], "'ORG' is not a tag"),
        ([["O-A"]], "'O-A' is not a tag"),
    ],
)
def test_the_first_tag_that_fits_no_scheme_is_named(sentences, words):
    with pytest.raises(DataError, match=words):
        tags.scheme(sentences)


def test_conversion_by_hand():
    tagged = ["B-A", "I-A", "I-A", "B-A", "B-B", "O", "B-A"]
    for scheme, converted in {
        "IOB1": ["I-A", "I-A", "I-A", "B-A", "I-B", "O", "I-A"],
        "IOBES": ["B-A", "I-A", "E-A", "S-A", "S-B", "O", "S-A"],
        "bilou": ["B-A", "I-A", "L-A", "U-A", "U-B", "O", "U-A"],
        "BMES": ["B-A", "M-A", "E-A", "S-A", "S-B", "O", "S-A"],
    }.items():
        assert tags.convert(tagged, "BIO", scheme) == converted
        assert tags.convert(converted, scheme, "IOB2") == tagged
    assert tags.convert(["B", "I"], "IOB2", "BIOES") == ["B", "E"]
    with pytest.raises(DataError, match=r"sentence 0, tag 0 \(from 0\): 'I-A' does not fit IOB2"):
        tags.convert(["I-A"], "IOB2", "IOB1")
    with pytest.raises(DataError, match="'XYZ' is not a scheme"):
        tags.convert(["O"], "IOB2", "XYZ")


@settings(deadline=None)
@given(ENTITIES, st.sampled_from(list(tags.SCHEMES)), st.sampled_from(list(tags.SCHEMES)))
def test_conversion_keeps_the_entities_and_comes_back(entities, one, other):
    tagged = written(entities)
    there = tags.convert(tagged, "IOB2", one)
    assert tags.spans(there) == tags.spans(tagged) == tags.strict_spans(there, one)
    assert tags.convert(tags.convert(there, one, other), other, "IOB2") == tagged
    assert tags.scheme([there], [one]) == one


@settings(deadline=None)
@given(st.lists(ANY, max_size=12))
def test_the_lenient_reading_is_that_of_seqeval(tagged):
    theirs = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities(tagged)
    assert tags.spans(tagged) == [(kind, start, last + 1) for kind, start, last in theirs]


@settings(deadline=None)
@given(st.lists(ANY, max_size=12), st.sampled_from(["IOB2", "BIOES"]))
def test_the_strict_reading_is_that_of_seqeval(tagged, scheme):
    theirs = pytest.importorskip("seqeval.scheme")
    tagged = [tag for tag in tagged if tag[0] in tags.SCHEMES[scheme]]
    entities = theirs.Tokens(tagged, theirs.IOB2 if scheme == "IOB2" else theirs.IOBES, sent_id=0).entities
    assert tags.strict_spans(tagged, scheme) == [(each.tag, each.start, each.end) for each in entities]
