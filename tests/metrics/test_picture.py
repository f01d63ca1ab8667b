"""The picture of a confusion matrix is drawn for few and many classes, complete or not at all."""

import sys

import numpy as np
import pytest

from hpcllm.errors import IOFailure, UsageError
from hpcllm.metrics import picture


@pytest.mark.parametrize("count", [1, 2, 100])
def test_it_is_of_the_asked_kind_and_leaves_nothing_else(tmp_path, count):
    pytest.importorskip("matplotlib")
    matrix = np.arange(count * count).reshape(count, count)
    matrix[0] = 0  # a class without gold examples
    names = [rf"class {number} $\frac$ " + "x" * number for number in range(count)]
    picture.confusion_picture(matrix, names, tmp_path / "a.svg")
    picture.confusion_picture(matrix, names, tmp_path / "b.png")
    assert "<svg" in (tmp_path / "a.svg").read_text() and (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_cells_say_the_count_and_colours_the_share_of_the_row(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **options: (drawn.append(self), path.touch()))
    picture.confusion_picture(np.array([[30, 10], [0, 2]]), ["no", "yes"], tmp_path / "a.png")
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [
        ("30", (0, 0)),
        ("10", (1, 0)),
        ("0", (0, 1)),
        ("2", (1, 1)),
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["no", "yes"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("found", "gold", "42 examples, 32 right")


def test_what_cannot_be_drawn_is_refused_and_the_old_file_stays(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    matrix, names, path = np.eye(2, dtype=int), ["a", "b"], tmp_path / "a.png"
    with pytest.raises(UsageError, match=r"a\.doc: the name must end in one of \."):
        picture.check("a.doc")
    with pytest.raises(IOFailure, match="No such file"):
        picture.confusion_picture(matrix, names, tmp_path / "none" / "a.png")
    path.write_text("old")

    def full(self, part, **options):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(IOFailure, match="No space left"):
        picture.confusion_picture(matrix, names, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_the_user_hears_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'hpcllm\[plots\]'"):
        picture.confusion_picture(np.eye(2, dtype=int), ["a", "b"], "a.png")
