"""Examples become tokens with labels beside them; what is too long or empty goes by the policy, and is counted."""

from collections import Counter

import pytest
from small_labelled import write_tokenizer
from tokenizers import Tokenizer

from hpcllm.data import text
from hpcllm.data.encode import encoding
from hpcllm.data.labelled import Example
from hpcllm.data.labels import Labels
from hpcllm.errors import DataError, UsageError

TAGS = Labels("tags", ("O", "B-x", "I-x"), chunks=True)


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def encoder(request, tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer", request.param)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def unit(tmp_path):
    (tmp_path / "in.conll").write_text("\n" * 5)
    return text.Unit(str(tmp_path / "in.conll"), 0, 5, 5)


def encode(encoder, labels, examples, unit, max_tokens=64, truncation="cut"):
    counts = Counter()
    batch = [(Example(*example, 2), unit) for example in examples]
    return list(encoding(encoder, labels, max_tokens, truncation).documents(batch, counts)), counts


def test_the_first_token_of_a_word_has_its_label(encoder, unit):
    words = ["the", "dieteranna", "paris"]
    [(ids, beside)], counts = encode(encoder, TAGS, [(words, None, ["O", "B-x", "I-x"])], unit)
    # As the text is encoded that has them one after the other, after a blank; there a word begins where its token does.
    plain = encoder.encode(" " + " ".join(words))
    assert ids == plain.ids
    begins = [1, 5, 16]
    firsts = [next(at for at, (a, b) in enumerate(plain.offsets) if b > begin) for begin in begins]
    assert len(ids) > 3 + sum(plain.special_tokens_mask)  # a word has several
    assert [beside["labels"][at] for at in firsts] == [0, 1, 2]
    assert [label for at, label in enumerate(beside["labels"]) if at not in firsts] == [-100] * (len(ids) - 3)
    assert counts["read"] == 1 and counts["wordless"] == 0


def test_a_word_without_tokens_keeps_its_label(encoder, unit):
    [(_, beside)], counts = encode(encoder, TAGS, [(["the", "", "paris"], None, ["O", "B-x", "B-x"])], unit)
    assert [label for label in beside["labels"] if label != -100] == [0, 1, 1]
    assert counts["wordless"] == 1


@pytest.mark.parametrize("truncation", ["cut", "drop", "error", "split"])
def test_a_long_sentence_goes_by_the_policy(encoder, unit, truncation):
    words, tags = ["the", "paris"] * 5000, ["O", "B-x"] * 5000
    short = (["rome"], None, ["B-x"])
    if truncation == "error":
        with pytest.raises(DataError, match=r"in.conll line 3: more than 16 tokens; say what to do with such"):
            encode(encoder, TAGS, [(words, None, tags), short], unit, 16, truncation)
        return
    found, counts = encode(encoder, TAGS, [(words, None, tags), short], unit, 16, truncation)
    kept = [[label for label in beside["labels"] if label != -100] for _, beside in found]
    assert kept[-1] == [1] and all(len(ids) <= 16 for ids, _ in found)
    joined = [number for part in kept[:-1] for number in part]
    wanted = [0, 1] * 5000
    if truncation == "drop":
        assert joined == [] and counts["dropped"] == 1
    elif truncation == "cut":
        assert joined == wanted[: len(joined)] and len(found) == 2 and counts["cut"] == 1
    else:
        assert joined == wanted and counts["split"] == 1
        assert [beside["continues"] for _, beside in found] == [False] + [True] * (len(found) - 2) + [False]


def test_a_long_text_goes_by_the_policy(encoder, unit):
    labels = Labels("single", ("a", "b"))
    examples = [("the paris " * 5000, None, "b"), ("rome", None, "a")]
    found, counts = encode(encoder, labels, examples, unit, 16, "cut")
    assert [len(ids) for ids, _ in found] == [16, len(found[1][0])] and counts["cut"] == 1
    assert [beside["labels"] for _, beside in found] == [1, 0]
    found, counts = encode(encoder, labels, examples, unit, 16, "drop")
    assert [beside["labels"] for _, beside in found] == [0] and counts["dropped"] == 1
    with pytest.raises(DataError, match="line 3: more than 16 tokens"):
        encode(encoder, labels, examples, unit, 16, "error")
    with pytest.raises(UsageError, match='"split" is for words with tags'):
        encode(encoder, labels, examples, unit, 16, "split")


def test_empty_examples_are_left_out_and_counted(encoder, unit):
    found, counts = encode(encoder, TAGS, [([], None, []), (["rome"], None, ["O"])], unit)
    assert len(found) == 1 and counts["empty"] == 1
    found, counts = encode(encoder, Labels("single", ("a",)), [(" \t", None, "a"), ("x", None, "a")], unit)
    assert len(found) == 1 and counts["empty"] == 1 and counts["read"] == 2


def test_a_pair_says_where_its_second_text_begins(unit, tmp_path):
    encoder = Tokenizer.from_file(str(write_tokenizer(tmp_path / "t") / "tokenizer.json"))
    [(ids, beside)], _ = encode(encoder, Labels("single", ("a",)), [("the paris", "of rome", "a")], unit)
    plain = encoder.encode("the paris", "of rome")
    assert ids == plain.ids and plain.type_ids == [int(at >= beside["second"]) for at in range(len(ids))]
    [(ids, beside)], _ = encode(encoder, Labels("single", ("a",)), [("the paris", None, "a")], unit)
    assert beside["second"] == len(ids)


def test_a_label_of_no_training_example_is_named_by_line(encoder, unit):
    with pytest.raises(
        DataError, match=r'in.conll line 3: the label "c" is none of the 2 of the training examples \(a, b\)'
    ):
        encode(encoder, Labels("single", ("a", "b")), [("x", None, "c")], unit)
