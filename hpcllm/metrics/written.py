"""How near texts that were written are to those that were wanted: BLEU, chrF, ROUGE and exact match, in percent.

BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacrebleu's, with its signature (Post 2018); ROUGE (Lin 2004) is
rouge-score's, F1, with Porter's stemmer, the mean over texts.
"""

import importlib.util
import math

from ..errors import DataError, UsageError

_ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}


def check():
    """Raise UsageError where the libraries are missing."""
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"scores of texts need {' and '.join(missing)}: pip install 'hpcllm[metrics]'")


def scores(pairs):
    """{"bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "bleu_signature"} of `pairs`.

    pairs: [(what was wanted: list of str, any of which will do; what was written)], at least one. Texts are compared as
    they are but for blanks around them. Of several references a text's ROUGE is that of the one nearest to it.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [([text.strip() for text in wanted], written.strip()) for wanted, written in pairs]
    if not pairs or not all(wanted for wanted, _ in pairs):
        raise DataError("scores need at least one text, and for each one that was wanted")
    written = [text for _, text in pairs]
    most = max(len(wanted) for wanted, _ in pairs)
    # sacrebleu has a list for each first reference, each second one, ...
    references = [[wanted[at] if at < len(wanted) else None for wanted, _ in pairs] for at in range(most)]
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    found = {"bleu": bleu.corpus_score(written, references).score}
    found["chrf"] = chrf.corpus_score(written, references).score
    scorer = RougeScorer(list(_ROUGES), use_stemmer=True)
    rouges = [scorer.score_multi(wanted, text) for wanted, text in pairs]
    for name in _ROUGES:
        found[name] = 100 * math.fsum(one[name].fmeasure for one in rouges) / len(pairs)
    found["exact_match"] = 100 * sum(text in wanted for wanted, text in pairs) / len(pairs)
    return {**found, "bleu_signature": str(bleu.get_signature())}
