"""The corpus that every machine has: the same in every run, of the standard library alone, nothing overwritten."""

import json

import pytest

from hpcllm.data import corpus
from hpcllm.errors import CannotCreate, MissingInput


def test_the_corpus_is_several_megabytes_of_documents_and_the_same_each_time(tmp_path):
    documents, size = corpus.write(tmp_path / "a" / "c.jsonl")
    corpus.write(tmp_path / "b.jsonl")
    content = (tmp_path / "a" / "c.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes() and len(content) == size > 2e6
    texts = [json.loads(line)["text"] for line in content.splitlines()]
    assert len(texts) == documents > 400
    assert any(text.startswith('The "assert" statement') for text in texts)
    assert any("Text wrapping and filling." in text for text in texts)
    assert not any("ndarray" in text for text in texts)  # numpy's: not the standard library


def test_sources_are_read_without_being_run(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'Second.', 'a': 'First.'}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text(f'"""{"No. " * 100}"""')
    long = " ".join(["A sentence in a docstring."] * 12)
    (tmp_path / "module.py").write_text(
        f'"""{long}"""\nopen({str(tmp_path / "ran")!r}, "w")\nclass C:\n    def f(self):\n        """Inner."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "short.py").write_text('"""Too short."""')
    assert list(corpus.collect(tmp_path)) == ["First.", "Second.", f"{long}\n\nInner."]
    assert not (tmp_path / "ran").exists()


def test_a_file_that_exists_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "collect", lambda: iter(["one", "two"]))
    path = tmp_path / "c.jsonl"
    path.write_text("mine")
    with pytest.raises(CannotCreate):
        corpus.write(path)
    assert corpus.main(["--output", str(path)]) == 73 and "exists" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert corpus.main(["--output", str(path), "--overwrite"]) == 0 and path.read_text().count("text") == 2
    assert [each.name for each in tmp_path.iterdir()] == ["c.jsonl"]
    with pytest.raises(CannotCreate, match="is a folder"):
        corpus.write(tmp_path, overwrite=True)


def test_a_python_without_its_topics_is_refused(tmp_path):
    with pytest.raises(MissingInput, match=r"topics\.py"):
        list(corpus.collect(tmp_path))
