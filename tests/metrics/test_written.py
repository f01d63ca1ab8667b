"""Scores of texts are those of the libraries they come from, used as their own papers and examples do."""

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from hpcllm.errors import DataError, UsageError
from hpcllm.metrics import written

WANTED = ["The cat sat on the mat.", "There is a dog\nand a bird", "no", "das Haus ist alt", ""]
WRITTEN = ["the cat sat on a mat .", "There is a bird\nand a dog", "no ", "das Haus", "x"]


def test_one_reference_each_is_as_the_libraries_say():
    found = written.scores([([a], b) for a, b in zip(WANTED, WRITTEN, strict=True)])
    clean = [text.strip() for text in WRITTEN]
    assert found["bleu"] == sacrebleu.corpus_bleu(clean, [WANTED]).score > 0
    assert found["chrf"] == sacrebleu.corpus_chrf(clean, [WANTED]).score
    assert found["exact_match"] == 20.0
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        mean = sum(scorer.score(a, b)[name].fmeasure for a, b in zip(WANTED, clean, strict=True)) / 5
        assert found[name] == pytest.approx(100 * mean, rel=1e-12)
    assert found["rougeLsum"] > found["rougeL"] and "version" in found["bleu_signature"]


def test_of_several_references_the_nearest_counts():
    many = [(["a dog barks", "the cat sat on the mat"], "the cat sat on the mat"), (["yes it is"], "yes it is")]
    found = written.scores(many)
    assert found["exact_match"] == 100 and found["rouge1"] == pytest.approx(100) and found["bleu"] == pytest.approx(100)


def test_what_cannot_be_scored_is_refused(monkeypatch):
    with pytest.raises(DataError, match="at least one text"):
        written.scores([])
    with pytest.raises(DataError, match="for each one that was wanted"):
        written.scores([([], "x")])
    written.check()
    monkeypatch.setattr(written.importlib.util, "find_spec", lambda name: None if name == "rouge_score" else 1)
    with pytest.raises(UsageError, match=r"scores of texts need rouge-score: pip install 'hpcllm\[metrics\]'"):
        written.check()
