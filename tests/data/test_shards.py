"""The file format is what it says, gathering is right across shards, and every kind of damage is refused."""

import fcntl
import json
import os
import re
import threading

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_inputs import HASH, rewrite_manifest, write_shards

import hpcllm.mpi
from hpcllm.data import manifest, shards
from hpcllm.data.stream import merge
from hpcllm.errors import DataError, IOFailure, MissingInput, UsageError


def by_h5py(folder):
    """All tokens of a folder as HDF5 itself reads them."""
    paths = sorted(folder.glob("*.h5"))
    return np.concatenate([h5py.File(path, "r", locking=shards.LOCKING)["tokens"][:] for path in paths])


# --- the format --------------------------------------------------------------------------------------------------


def test_a_shard_is_a_plain_hdf5_file_as_documented(three_shards):
    with h5py.File(three_shards / "shard-00000.h5", "r", locking=shards.LOCKING) as file:
        assert {label: data.dtype for label, data in file.items()} == {
            "tokens": np.uint16,
            "document_offsets": np.int64,
            "token_crc32": np.uint32,
        }
        for data in file.values():
            assert data.chunks is None and data.compression is None and not data.fletcher32
        assert file["tokens"].id.get_offset() % (1 << 20) == 0
        assert file["document_offsets"][:].tolist() == [0, 350_000, 700_000]
        assert file["token_crc32"].shape == (2,)
        attributes = dict(file.attrs)
    assert attributes.pop("format") == b"hpcllm tokens" and attributes.pop("tokenizer_hash") == HASH.encode()
    tokens = by_h5py(three_shards)[:700_000]
    assert attributes == {
        "version": 1,
        "vocab_size": 1000,
        "highest_id": tokens.max(),
        "separator_id": 3,
        "token_count": 700_000,
        "document_count": 2,
        "complete": 1,
    }


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    folder = write_shards(tmp_path / "data", [[[0, vocab_size - 1]]], vocab_size)
    assert by_h5py(folder).dtype == dtype
    assert shards.open_folder(folder).gather([0], 2).tolist() == [[0, vocab_size - 1]]


def test_tiny_and_large_shards_begin_at_a_mebibyte(tmp_path):
    folder = write_shards(tmp_path / "data", [[range(count)] for count in (1, 3, 999)])
    for shard in shards.read_manifest(folder)["shards"]:
        assert shard["tokens_offset"] % (1 << 20) == 0


# --- reading -----------------------------------------------------------------------------------------------------


def test_the_stream_tells_what_the_manifest_says(three_shards):
    stream = shards.open_folder(three_shards)
    written = json.loads((three_shards / "manifest.json").read_text())
    assert (stream.token_count, stream.document_count, stream.vocab_size) == (701_505, 6, 1000)
    assert stream.highest_id == 999 and stream.tokenizer_hash == HASH and stream.digest == written["digest"]


@pytest.fixture
def read_twice(three_shards):
    """The same tokens as a stream and as HDF5 reads them."""
    return shards.open_folder(three_shards), by_h5py(three_shards)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gather_equals_slices_of_h5py(read_twice, data):
    stream, tokens = read_twice
    length = data.draw(st.one_of(st.integers(1, 3000), st.integers(1, len(tokens))))
    last = len(tokens) - length
    near = st.sampled_from([0, 524_280, 524_288, 699_990, 700_000, 700_004, 700_005, last]).map(
        lambda at: min(at, last)
    )
    starts = data.draw(st.lists(st.one_of(near, st.integers(0, last)), max_size=8 if length < 5000 else 2))
    got = stream.gather(np.array(starts, np.int64), length)
    assert got.dtype == np.int64 and got.shape == (len(starts), length)
    for row, start in zip(got, starts, strict=True):
        assert np.array_equal(row, tokens[start : start + length])


def test_samples_that_end_at_or_just_after_a_border(read_twice):
    stream, tokens = read_twice
    for border in (700_000, 700_005, 701_505):
        starts = np.arange(border - 70, min(border + 3, len(tokens) - 64))
        expected = np.stack([tokens[start : start + 64] for start in starts])
        assert np.array_equal(stream.gather(starts, 64), expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_blocks_in_the_middle_of_a_long_sample_are_checked_too(tmp_path, monkeypatch, threads):
    monkeypatch.setattr("hpcllm.data.stream._THREADS", threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    folder = write_shards(tmp_path / "data", [[np.arange(2_000_000) % 900]])
    flip(folder / "shard-00000.h5", shards.read_manifest(folder)["shards"][0]["tokens_offset"] + (3 << 19))
    stream = shards.open_folder(folder)
    stream.gather([0, 1_999_990], 10)
    with pytest.raises(DataError, match="block 1 of its tokens"):
        stream.gather([5], 1_999_995)


def test_samples_outside_the_stream_are_an_error(three_shards):
    stream = shards.open_folder(three_shards)
    for start in (-1, 701_505 - 9):
        with pytest.raises(IndexError, match="701505 tokens"):
            stream.gather([start], 10)


def test_a_forked_process_reads_the_same(three_shards):
    stream = shards.open_folder(three_shards)
    here = stream.gather([699_000], 2000)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, stream.gather([699_000], 2000).astype(np.uint16).tobytes())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        assert np.array_equal(np.frombuffer(pipe.read(), np.uint16), here[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_arrays_outlive_the_stream(three_shards):
    stream = shards.open_folder(three_shards)
    got = stream.gather([5, 6], 100)
    stream.close()
    assert np.array_equal(got[0, 1:], got[1, :-1]) and np.array_equal(stream.gather([5, 6], 100), got)


def test_union_of_intervals():
    assert merge([(7, 8), (1, 5), (0, 2), (5, 6), (1, 2)]) == [(0, 6), (7, 8)]
    assert merge([]) == []


@pytest.mark.mpi(min_size=1)
def test_every_rank_opens_and_reads_the_folder(world, prepared):
    stream = shards.open_folder(prepared / "train", comm=world.comm)
    tokens = by_h5py(prepared / "train")
    start = world.rank * 37
    assert np.array_equal(stream.gather([start], 500)[0], tokens[start : start + 500])


@pytest.mark.mpi(min_size=1)
def test_damage_that_one_rank_finds_is_refused_by_all(world, three_shards):
    folder = world.comm.bcast(three_shards)
    if world.is_root:
        cut(folder / "shard-00001.h5")
    world.comm.Barrier()
    with pytest.raises(DataError, match=r"shard-00001\.h5 has .* bytes, the manifest says") as refused:
        shards.open_folder(folder, comm=world.comm)
    assert refused.value.agreed
    world.comm.Barrier()


def test_collective_reading_needs_a_parallel_h5py(three_shards):
    if h5py.get_config().mpi:
        pytest.skip("this h5py is parallel")
    with pytest.raises(UsageError, match="built with parallel HDF5; this one"):
        shards.open_folder(three_shards, reader="mpio", comm=hpcllm.mpi.join().comm)
    with pytest.raises(UsageError, match='"fast" is not one of "mapped", "mpio"'):
        shards.open_folder(three_shards, reader="fast")


# --- damage ------------------------------------------------------------------------------------------------------


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path, offset, bit=1):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


def edit(change):
    """Damage by HDF5 itself, to a manifest that fits: what remains is the check of the content."""

    def damage(folder):
        with h5py.File(folder / "shard-00000.h5", "r+", locking=shards.LOCKING) as file:
            change(file)
        rewrite_manifest(folder)

    return damage


def replace(label, **creation):
    def change(file):
        values = file[label][:]
        del file[label]
        file.create_dataset(label, data=values, **creation)

    return change


def external_link(file):
    del file["document_offsets"]
    file["document_offsets"] = h5py.ExternalLink("/etc/passwd", "/x")


def virtual(file):
    layout = h5py.VirtualLayout(shape=(3,), dtype="<i8")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(3,))
    del file["document_offsets"]
    file.create_virtual_dataset("document_offsets", layout)


def external_storage(file):
    del file["token_crc32"]
    file.create_dataset("token_crc32", (2,), "<u4", external=[("/etc/passwd", 0, 8)])


def attribute(key, value):
    return lambda file: file.attrs.modify(key, value)


def values(label, numbers):
    return lambda file: file[label].write_direct(np.array(numbers, file[label].dtype))


def test_a_missing_folder_manifest_or_shard_is_named(three_shards, tmp_path):
    with pytest.raises(MissingInput, match="there is no folder"):
        shards.open_folder(tmp_path / "nowhere")
    (three_shards / "shard-00001.h5").unlink()
    with pytest.raises(MissingInput, match=r"1 of the 3 shards of .* are missing: shard-00001\.h5"):
        shards.open_folder(three_shards)
    (three_shards / "manifest.json").unlink()
    with pytest.raises(MissingInput, match=r"has no manifest\.json"):
        shards.open_folder(three_shards)


def test_a_shard_cut_by_one_byte_is_refused_with_both_sizes(three_shards):
    path = three_shards / "shard-00002.h5"
    size = path.stat().st_size
    cut(path)
    with pytest.raises(DataError, match=rf"{path} has {size - 1} bytes, the manifest says {size}"):
        shards.open_folder(three_shards)


def test_what_is_not_hdf5_is_refused(three_shards):
    path = three_shards / "shard-00001.h5"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=rf"{path} is not an HDF5 file"):
        shards.open_folder(three_shards)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (attribute("complete", np.uint8(0)), "is incomplete"),
        (attribute("version", 2), "has format version 2, this program reads version 1"),
        (attribute("format", np.bytes_("other")), "not of the format 'hpcllm tokens'"),
        (attribute("token_count", 699_999), "says token_count 699999, the manifest 700000"),
        (attribute("vocab_size", 7), "says vocab_size 7, the manifest 1000"),
        (attribute("tokenizer_hash", np.bytes_("f" * 64)), "another tokenizer than the manifest says"),
        (replace("document_offsets", dtype="<i4"), "has int32 document_offsets, expected int64"),
        (replace("document_offsets", chunks=(3,)), "does not store 'document_offsets' contiguously"),
        (replace("document_offsets", chunks=(3,), fletcher32=True), "does not store 'document_offsets' contiguously"),
        (replace("token_crc32", chunks=(2,), compression="gzip"), "does not store 'token_crc32' contiguously"),
        (lambda file: file.__delitem__("token_crc32"), "has no data set 'token_crc32'"),
        (values("document_offsets", [0, 700_001, 700_000]), "document_offsets that do not go from 0 up to its 700000"),
        (values("document_offsets", [0, 1, 2]), "document_offsets that do not go from 0 up to its 700000 tokens"),
        (attribute("format", 1 << 40), "not of the format"),
        (lambda file: file.attrs.__setitem__("version", [1, 1]), "cannot be read as HDF5"),
        (external_link, "behind an external or soft link"),
        (virtual, "does not store 'document_offsets' contiguously"),
        (external_storage, "does not store 'token_crc32' contiguously"),
    ],
)
def test_another_content_is_refused_by_name(three_shards, change, says):
    edit(change)(three_shards)
    with pytest.raises(DataError, match=rf"shard-00000\.h5 .*{says}"):
        shards.open_folder(three_shards)


@pytest.mark.parametrize("dtype", ["<f4", "<i8", "<u4"])
def test_tokens_of_another_type_are_refused(three_shards, dtype):
    edit(replace("tokens", dtype=dtype))(three_shards)
    with pytest.raises(DataError, match=r"shard-00000\.h5 has .* tokens, expected uint16"):
        shards.open_folder(three_shards)


def test_counts_that_differ_from_the_manifest_are_refused(three_shards):
    rewrite_manifest(three_shards, document_count=3)
    with pytest.raises(DataError, match=r"has document_offsets of shape \(3,\), the manifest says \(4,\)"):
        shards.open_folder(three_shards)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(shards=[]), "there are no shards"),
        (lambda m: m.update(shards=7), "there are no shards"),
        (lambda m: m["shards"][0].update(name="../other.h5"), "a shard is called '../other.h5'"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"]), "a shard is called 'shard-00000.h5'"),
        (lambda m: m["shards"][2].update(token_count=-1), "token_count of shard-00002.h5 is -1"),
        (lambda m: m["shards"][2].update(token_count=0), "shard-00002.h5 has no tokens"),
        (lambda m: m["shards"][2].update(token_count=1501), "token_count is 701505, of its shards 701506"),
        (lambda m: m["shards"][2].update(tokens_offset=1 << 40), "reach beyond its"),
        (lambda m: m["shards"][2].pop("sha256"), "KeyError: 'sha256'"),
        (lambda m: m.update(token_count=1), "token_count is 1, of its shards 701505"),
        (lambda m: m.update(vocab_size=True), "vocab_size is True"),
        (lambda m: m.update(separator_id=1000), "separator_id 1000 of a vocabulary of 1000"),
        (lambda m: m.update(dtype="float64"), "dtype 'float64'"),
        (lambda m: m.update(labelled={"columns": [{"name": "a", "of": "document", "dtype": "O"}]}), "column a has 'O'"),
        (lambda m: m.update(labelled={"columns": [{"name": "../a", "of": "token", "dtype": "u1"}]}), "called '../a'"),
        (lambda m: m.update(labelled=5), "TypeError"),
    ],
)
def test_a_manifest_that_fits_its_digest_and_makes_no_sense_is_refused(three_shards, change, says):
    path = three_shards / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content | {"digest": manifest.digest(content)}))
    with pytest.raises(DataError, match=rf"manifest\.json is not a manifest of shards \(.*{says}"):
        shards.open_folder(three_shards)


def test_a_manifest_nested_without_end_is_refused(three_shards):
    (three_shards / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="is not a manifest of shards"):
        shards.open_folder(three_shards)


def test_a_shard_that_is_written_elsewhere_is_waited_for_and_then_told_of(three_shards, monkeypatch):
    monkeypatch.setattr(shards, "_PATIENCE_S", 0.3)
    path = three_shards / "shard-00001.h5"
    with open(path, "r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)  # as HDF5 does
        with pytest.raises(IOFailure, match=f"{path} is open for writing elsewhere"):
            shards.open_folder(three_shards)
        monkeypatch.setattr(shards, "_PATIENCE_S", 30)
        threading.Timer(0.1, fcntl.flock, (writer, fcntl.LOCK_UN)).start()
        shards.open_folder(three_shards)
    with open(path, "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        shards.open_folder(three_shards)


# --- quarantine --------------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_left_out_and_the_others_are_read(three_shards, capsys):
    tokens, whole = by_h5py(three_shards), shards.open_folder(three_shards)
    flip(three_shards / "shard-00001.h5", shards.read_manifest(three_shards)["shards"][1]["tokens_offset"])
    stream = shards.open_folder(three_shards, quarantine=True)
    assert list(stream.left_out) == ["shard-00001.h5"] and "is damaged (SHA-256" in stream.left_out["shard-00001.h5"]
    assert "data: 1 damaged of 3 shards left out (data.quarantine): " in capsys.readouterr().out
    assert (stream.token_count, stream.document_count) == (701_500, 4)
    assert np.array_equal(stream.gather([0], 701_500)[0], np.delete(tokens, slice(700_000, 700_005)))
    assert stream.digest != whole.digest and stream.digest == shards.open_folder(three_shards, quarantine=True).digest
    cut(three_shards / "shard-00002.h5")
    assert shards.open_folder(three_shards, quarantine=True).digest not in (whole.digest, stream.digest)
    (three_shards / "shard-00000.h5").write_bytes(b"")
    with pytest.raises(DataError, match=r"all 3 shards of .* are damaged: .*shard-00000\.h5 has 0 bytes"):
        shards.open_folder(three_shards, quarantine=True)


def test_nothing_is_left_out_of_whole_shards_or_without_being_asked(three_shards):
    whole = shards.open_folder(three_shards)
    assert whole.left_out == {} and shards.open_folder(three_shards, quarantine=True).digest == whole.digest
    cut(three_shards / "shard-00001.h5")
    with pytest.raises(DataError, match="the manifest says"):
        shards.open_folder(three_shards)


@pytest.mark.mpi()
def test_all_ranks_leave_the_same_shards_out(world, three_shards):
    folder = world.comm.bcast(three_shards)
    tokens = by_h5py(folder)
    world.comm.Barrier()
    if world.is_root:
        cut(folder / "shard-00001.h5")
    world.comm.Barrier()
    stream = shards.open_folder(folder, comm=world.comm, quarantine=True)
    assert list(stream.left_out) == ["shard-00001.h5"]
    assert np.array_equal(
        stream.gather([699_000], 2000)[0], np.delete(tokens, slice(700_000, 700_005))[699_000:701_000]
    )
    assert len(set(world.comm.allgather(stream.digest))) == 1
    world.comm.Barrier()


def test_an_edited_manifest_is_refused(three_shards):
    path = three_shards / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"vocab_size": 1000', '"vocab_size": 1001'))
    with pytest.raises(DataError, match="was changed after it was written"):
        shards.open_folder(three_shards)
    for broken in ("{}", "[]", "null", text[:100], text.replace('"version": 1', '"version": 9'), "\xff"):
        path.write_text(broken, encoding="latin-1")
        with pytest.raises(DataError, match=r"manifest\.json is"):
            shards.open_folder(three_shards)


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    folder = write_shards(tmp_path / "data", [[[1, 2, 1000]]], 1000)
    with pytest.raises(DataError, match="holds the id 1000, its vocabulary has 1000"):
        shards.open_folder(folder)


def test_any_flipped_bit_outside_the_tokens_is_refused_at_once(three_shards):
    path = three_shards / "shard-00000.h5"
    shard = shards.read_manifest(three_shards)["shards"][0]
    rng = np.random.default_rng(1)
    offsets = [8, 100, shard["tokens_offset"] - 1, *rng.integers(8, 4096, 20).tolist()]
    for offset in offsets:
        flip(path, offset)
        with pytest.raises(DataError, match=rf"{path} is damaged outside its tokens"):
            shards.open_folder(three_shards)
        flip(path, offset)
    shards.open_folder(three_shards)


def test_a_flipped_bit_in_the_tokens_is_refused_when_its_block_is_read(three_shards):
    path = three_shards / "shard-00000.h5"
    flip(path, shards.read_manifest(three_shards)["shards"][0]["tokens_offset"] + 2 * 600_000)
    stream = shards.open_folder(three_shards)
    stream.gather([0, 500_000], 1000)
    for starts in ([599_500], [523_900], [0, 690_000]):
        with pytest.raises(DataError, match=rf"{path} is damaged in block 1 of its tokens \(CRC-32 "):
            stream.gather(starts, 1000)


def test_a_shard_exchanged_for_another_is_refused(three_shards):
    written = shards.read_manifest(three_shards)
    first, last = (three_shards / written["shards"][index]["name"] for index in (1, 2))
    os.replace(last, first)
    last.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match=rf"{first} has \d+ bytes"):
        shards.open_folder(three_shards)


def test_a_shard_that_has_vanished_since_is_named_with_a_sentence(tmp_path):
    stream = shards.open_folder(write_shards(tmp_path / "data", [[[1, 2, 3] * 10], [[4, 5, 6] * 10]]))
    os.unlink(stream.paths[1])
    assert stream.gather([0], 5).tolist() == [[1, 2, 3, 1, 2]]
    with pytest.raises(IOFailure, match=re.escape(str(stream.paths[1]))):
        stream.gather([30], 5)


def test_a_shard_that_is_another_one_by_now_is_refused(tmp_path):
    folder, anew = (
        write_shards(tmp_path / name, [[[1, 2, 3] * 10], [[4, last, 6] * 10]]) for name, last in (("a", 5), ("b", 7))
    )
    stream = shards.open_folder(folder)
    stream.gather([0], 5)
    name = os.path.basename(stream.paths[1])
    os.replace(anew / name, folder / name)
    with pytest.raises(DataError, match=f"{name} is damaged outside its tokens"):
        stream.gather([30], 5)
