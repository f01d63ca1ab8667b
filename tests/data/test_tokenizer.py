"""Tokenizers come out the same in every run and survive the trip through Hugging Face's folder layout."""

import contextlib
import hashlib
import json
import subprocess
import sys

import pytest
from small_inputs import lines

from hpcllm import model
from hpcllm.data import tokenizer
from hpcllm.errors import DataError, MissingInput, UsageError

TEXTS = [line for line in lines(400, 5) if line]

# Punctuation, CJK, combining characters and many ties: what a hash map's order could decide.
TRAIN = """
import sys, hashlib
from hpcllm.data import tokenizer
texts = ["ab cd ef gh ij", "zy xw vu ts", "a-b c.d 東京 e\\u0301te\\u0301 x_y (z)", "\\U0001f600 ok", "Ab CD"] * 3
print(hashlib.sha256(tokenizer.train(sys.argv[1], 380, lambda: iter(texts)).to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("kind", tokenizer.KINDS)
def test_training_gives_the_same_bytes_in_every_process(kind):
    runs = [subprocess.Popen([sys.executable, "-c", TRAIN, kind], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    digests = {run.communicate(timeout=60)[0] for run in runs}
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


@pytest.fixture(scope="module", params=tokenizer.KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / request.param
    tokenizer.save(tokenizer.train(request.param, 400, lambda: iter(TEXTS)), request.param, str(path))
    return path


def test_the_saved_folder_loads_offline_with_its_special_tokens(folder):
    loaded = tokenizer.load(str(folder))
    assert loaded.is_fast and loaded.model_max_length > 1e9
    if folder.name == "wordpiece":
        specials = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
        assert [getattr(loaded, name) for name in specials] == [0, 1, 2, 3, 4]
        assert loaded.convert_ids_to_tokens(loaded("The RANK").input_ids) == ["[CLS]", "the", "rank", "[SEP]"]
        assert tokenizer.separator_id(loaded, "") == 3
    elif folder.name == "bpe":
        assert loaded.decode(loaded(" été 東京\n\tTHE").input_ids) == " été 東京\n\tTHE"
        assert tokenizer.separator_id(loaded, "") == loaded.eos_token_id == 0
    else:  # T5's own places
        assert loaded.decode(loaded(" été 東京\n\tTHE").input_ids) == " été 東京\n\tTHE</s>"
        assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
        assert tokenizer.separator_id(loaded, "") == 1
        sentinels = model.vocabulary(loaded).sentinels
        assert loaded.convert_ids_to_tokens(sentinels) == [f"<extra_id_{number}>" for number in range(100)]
        assert set(sentinels) <= set(model.vocabulary(loaded).special)
    assert len(loaded) <= 400


def test_the_hash_is_of_the_ids_not_of_the_files(folder, tmp_path):
    loaded = tokenizer.load(str(folder))
    first = tokenizer.folder_hash(str(folder))
    loaded.padding_side = "left"
    loaded.model_max_length = 128
    loaded.backend_tokenizer.enable_truncation(16)
    loaded.backend_tokenizer.enable_padding(length=16)
    loaded.save_pretrained(tmp_path / "again")
    assert tokenizer.folder_hash(str(tmp_path / "again")) == first
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.folder_hash(str(tmp_path / "again")) != first


def test_shards_of_another_tokenizer_are_refused(folder):
    class Stream:
        folder, tokenizer_hash = "data/train", hashlib.sha256().hexdigest()

    with pytest.raises(DataError, match=rf"e3b0c44298fc.*{tokenizer.folder_hash(str(folder))[:12]}"):
        tokenizer.check_same(Stream, str(folder))
    Stream.tokenizer_hash = tokenizer.folder_hash(str(folder))
    tokenizer.check_same(Stream, str(folder))


def test_a_vocabulary_too_small_for_the_alphabet_is_refused_with_numbers():
    with pytest.raises(UsageError, match=r"vocab-size: 20 cannot hold .* 5 special tokens, \d+ characters and \d+"):
        tokenizer.train("wordpiece", 20, lambda: iter(TEXTS))
    with pytest.raises(UsageError, match="vocab-size: 256 cannot hold the 256 bytes and 1 special token"):
        tokenizer.train("bpe", 256, lambda: iter(TEXTS))
    with pytest.raises(UsageError, match='"unigram" is not one of wordpiece, bpe, t5'):
        tokenizer.train("unigram", 1000, lambda: iter(TEXTS))


def test_the_smallest_vocabulary_that_fits_is_taken():
    with pytest.raises(UsageError) as refused:
        tokenizer.train("wordpiece", 1, lambda: iter(TEXTS))
    least = int(str(refused.value).split()[-1])
    assert tokenizer.train("wordpiece", least, lambda: iter(TEXTS)).get_vocab_size() == least


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(MissingInput, match="there is no folder"):
        tokenizer.load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds no tokenizer \(none of tokenizer\.json, vocab\.txt, "):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="does not hold a Hugging Face tokenizer"):
        tokenizer.load(str(tmp_path))


def test_code_in_a_tokenizer_folder_is_not_run(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(DataError):
        tokenizer.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_an_end_of_document_is_refused(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="neither an eos nor a sep token"):
        tokenizer.folder_hash(str(tmp_path))
