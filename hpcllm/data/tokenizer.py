"""Tokenizers: train WordPiece or BPE, load a Hugging Face tokenizer folder, and say which one made a shard.

Training and encoding are the tokenizers library's; this file makes the result the same bytes in every run, writes
it in Hugging Face's layout, and hashes what decides a text's ids. Reading the training text is `prepare`'s.
"""

import hashlib
import json
import os

from ..errors import DataError, MissingInput, UsageError

KINDS = ("wordpiece", "bpe", "t5")
# As in BERT: the most frequent characters are kept, the others become [UNK].
_ALPHABET_LIMIT = 1000
_MIN_FREQUENCY = 2
_BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_GPT_SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_T5_SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_SPECIALS = {"wordpiece": _BERT_SPECIALS, "bpe": _GPT_SPECIALS, "t5": _T5_SPECIALS}
# What a tokenizer's folder may hold, by any of whose first the words come, and what else belongs to it.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
_VOCABULARIES += ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
FILES = (*_VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
FILES += ("added_tokens.json", "chat_template.jinja")
_SENTINELS = [f"<extra_id_{number}>" for number in range(100)]  # as many as T5 has


def train(kind, vocab_size, texts):
    """Train a tokenizer and return it as a `tokenizers.Tokenizer`.

    kind: "wordpiece" (BERT: lower-cased, ## continues a word), "bpe" (GPT-2: byte level, <|endoftext|>) or "t5" (as
    "bpe", with T5's special tokens: texts end with </s>, and <extra_id_0> to <extra_id_99> stand for what is hidden).
    texts: a function that returns a new iterator over the training documents; called once or twice.
    The result depends on kind, vocab_size and the texts alone. It may have fewer than vocab_size entries when the
    texts hold no more pieces that occur twice. Raises UsageError when vocab_size cannot hold the alphabet.
    """
    if kind not in KINDS:
        raise UsageError(f'tokenizer-kind: "{kind}" is not one of {", ".join(KINDS)}')
    return _train_wordpiece(vocab_size, texts) if kind == "wordpiece" else _train_bpe(kind, vocab_size, texts)


def _train_wordpiece(vocab_size, texts):
    """Train WordPiece so that equal texts give equal vocabularies.

    The library numbers the pieces "##x" in the order in which it meets them in a hash map that is seeded afresh in
    every process, and breaks ties between equally frequent merges by these numbers: two runs differ. Counting the
    alphabet here and handing all "##x" over as ready-made pieces, in order, leaves nothing to chance.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    def empty(model):
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    specials = list(_BERT_SPECIALS.values())
    learner = empty(models.WordPiece(unk_token="[UNK]"))
    alphabet, continuing = _alphabet(texts(), learner.normalizer, learner.pre_tokenizer)
    pieces = ["##" + character for character in continuing]
    least = len(specials) + len(alphabet) + len(pieces)
    if vocab_size < least:
        raise UsageError(
            f"vocab-size: {vocab_size} cannot hold the alphabet of this text: {len(specials)} special tokens, "
            f"{len(alphabet)} characters and {len(pieces)} of them inside words make {least}"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=specials + pieces,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts(), trainer)
    vocabulary = learner.get_vocab()

    tokenizer = empty(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _alphabet(texts, normalizer, pre_tokenizer):
    """The characters of `texts` after normalising, and those that occur inside a word, each sorted.

    At most _ALPHABET_LIMIT characters, the most frequent first, ties to the lower code point.
    """
    import numpy as np

    counts = np.zeros(0x110000, np.int64)
    inside = np.zeros(0x110000, bool)
    breaks = {}  # code point: True where the pre-tokenizer cuts around it; asked of the library, once each

    def cuts_words(code):
        if code not in breaks:
            pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str("a" + chr(code) + "a")]
            breaks[code] = len(pieces) != 1
        return breaks[code]

    for text in texts:
        codes = np.frombuffer(normalizer.normalize_str(text).encode("utf-32-le"), np.uint32)
        if not codes.size:
            continue
        found, where, found_counts = np.unique(codes, return_inverse=True, return_counts=True)
        counts[found] += found_counts
        cut = np.array([cuts_words(code) for code in found.tolist()])[where]
        inside[codes[1:][~cut[1:] & ~cut[:-1]]] = True

    present = [code for code in np.flatnonzero(counts).tolist() if not chr(code).isspace()]
    kept = sorted(sorted(present, key=lambda code: (-counts[code], code))[:_ALPHABET_LIMIT])
    return [chr(code) for code in kept], [chr(code) for code in kept if inside[code]]


def _train_bpe(kind, vocab_size, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    specials = list(dict.fromkeys(_SPECIALS[kind].values())) + (_SENTINELS if kind == "t5" else [])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(specials) + len(alphabet)
    if vocab_size < least:
        raise UsageError(
            f"vocab-size: {vocab_size} cannot hold the {len(alphabet)} bytes and {len(specials)} special "
            f"token{'s' * (len(specials) > 1)}, together {least}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if kind == "t5":
        end = _T5_SPECIALS["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return tokenizer


def save(tokenizer, kind, folder):
    """Write a trained tokenizer to `folder` (made here) as `AutoTokenizer.from_pretrained` reads it, offline."""
    os.makedirs(folder)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    specials = _SPECIALS[kind]
    names = (
        ["input_ids", "token_type_ids", "attention_mask"] if kind == "wordpiece" else ["input_ids", "attention_mask"]
    )
    # No model_max_length: shards hold documents of any length and the model's own limit is in its config.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": names,
        "clean_up_tokenization_spaces": False,
        **specials,
    }
    if kind == "t5":
        config["extra_special_tokens"] = _SENTINELS
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
        file.write("\n")


def load(folder):
    """The fast transformers tokenizer in `folder`; never from the network, never running code of the folder.

    Raises MissingInput (66) when the folder does not exist, DataError (65) when no fast tokenizer comes out of it.
    """
    if not os.path.isdir(folder):
        raise MissingInput(f"tokenizer: there is no folder {folder}")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in _VOCABULARIES):
        # transformers would make an empty one of a model's config.json.
        raise DataError(f"tokenizer: {folder} holds no tokenizer (none of {', '.join(_VOCABULARIES)})")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises OSError, ValueError, KeyError and Rust exceptions alike
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"tokenizer: {folder} does not hold a Hugging Face tokenizer that loads ({first})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"tokenizer: {folder} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def separator_id(tokenizer, folder):
    """The id that ends each document: eos, else sep. Raises DataError for a tokenizer with neither."""
    for number in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if number is not None:
            return number
    raise DataError(f"tokenizer: {folder} has neither an eos nor a sep token to end documents with")


def tokenizer_hash(tokenizer):
    """SHA-256, as 64 hex digits, of what decides the ids in a shard: normalizer, pre-tokenizer, model, added words.

    Not of files: saving a tokenizer beside a checkpoint may reorder or extend them without changing an id. Special
    tokens count only as the separator, for text never becomes one (see `prepare`): a padding token may be added.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {name: parts.get(name) for name in ("normalizer", "pre_tokenizer", "model")}
    deciding["added_tokens"] = [token for token in parts["added_tokens"] if not token["special"]]
    deciding["separator"] = separator_id(tokenizer, "this tokenizer")
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def folder_hash(folder):
    """`tokenizer_hash` of the tokenizer in `folder`."""
    return tokenizer_hash(load(folder))


def check_same(stream, folder, ours=None):
    """Raise DataError unless the shards of `stream` were made with the tokenizer in `folder` (of hash `ours`)."""
    theirs, ours = stream.tokenizer_hash, ours or folder_hash(folder)
    if theirs != ours:
        raise DataError(
            f"data: {stream.folder} was tokenised by another tokenizer (hash {theirs[:12]}) than the one in "
            f"{folder} (hash {ours[:12]}); the ids would mean other words"
        )
