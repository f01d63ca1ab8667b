"""Files written in blocks by many ranks: the bytes that one would write, each once, and their digests."""

import errno
import hashlib
import itertools
import os
import random
import time

import pytest
import torch

from hpcllm import blocks, files


@pytest.fixture
def small(monkeypatch):
    """Blocks of four pages."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)


def made_up(size, seed):
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(size)), dtype=torch.uint8)


def cut(contents, seed):
    """(offset, part) of `contents`, which is cut at random places, in random order."""
    draw = random.Random(seed)
    places = sorted({0, len(contents), *(draw.randrange(len(contents)) for _ in range(40))})
    found = [(begin, contents[begin:end]) for begin, end in itertools.pairwise(places)]
    draw.shuffle(found)
    return found


def empty(path, size):
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def expected(contents, size=1 << 14):
    whole = contents.numpy().tobytes()
    return {at // size: hashlib.sha256(whole[at : at + size]).hexdigest() for at in range(0, len(whole), size)}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [1, 4095, 1 << 14, (1 << 14) + 1, 200_000, 13 << 14])
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("direct", ["", "off"])
def test_one_that_has_everything_writes_it_and_tells_all_digests(tmp_path, monkeypatch, size, ahead, direct):
    monkeypatch.setenv("HPCLLM_DIRECT_IO", direct)
    contents = made_up(size, size)
    empty(tmp_path / "file", size)
    wanted = blocks.segments(cut(contents, 1))
    copies = blocks.Memory().take(wanted) if ahead else None
    told = blocks.write(tmp_path / "file", wanted, copies)
    assert (tmp_path / "file").read_bytes() == contents.numpy().tobytes()
    assert told == expected(contents) == blocks.digests(tmp_path / "file", block_bytes=1 << 14)


@pytest.mark.usefixtures("small")
def test_what_two_have_between_them_is_there_and_only_whole_blocks_are_told(tmp_path):
    contents = made_up(300_000, 3)
    empty(tmp_path / "file", len(contents))
    edges, told = [0, 50_000, 120_000, 120_001, 230_000, 300_000], []
    for rank in (0, 1):
        pairs = list(itertools.pairwise(edges))[rank::2]
        told.append(blocks.write(tmp_path / "file", blocks.segments([(a, contents[a:b]) for a, b in pairs])))
    assert (tmp_path / "file").read_bytes() == contents.numpy().tobytes()
    known = told[0] | told[1]
    assert len(known) == len(told[0]) + len(told[1]) < len(expected(contents))
    assert known.items() <= expected(contents).items()
    left = [number for number in expected(contents) if number not in known]
    assert known | blocks.digests(tmp_path / "file", left, 1 << 14) == expected(contents)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [1, 5000, 100_000, 1_000_000])
@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_those_who_have_the_same_bytes_divide_them(size, copies):
    contents = made_up(size, size)
    for mine in range(copies):
        at, offset = 0, []
        for begin, part in cut(contents, 2):
            shares = list(blocks.share(begin, part, size, copies, mine))
            offset += [(b, len(p)) for b, p in shares]
            assert all(torch.equal(p, contents[b : b + len(p)]) for b, p in shares)
        at = sum(length for _, length in offset)
        assert at <= size // copies + (1 << 14) + 4096
    whole = sorted((b, len(p)) for mine in range(copies) for b, p in blocks.share(0, contents, size, copies, mine))
    ends = [b + length for b, length in whole]
    assert [b for b, _ in whole] == [0, *ends[:-1]]
    assert ends[-1] == size


@pytest.mark.usefixtures("small")
def test_copies_do_not_change_with_what_was_copied_and_use_the_same_memory_again():
    contents = made_up(100_000, 5)
    before, memory = contents.clone(), blocks.Memory()
    first = memory.take(blocks.segments([(7, contents)]))
    contents.zero_()
    assert torch.equal(torch.cat(first), before)
    second = memory.take(blocks.segments([(7, contents)]))
    assert second[0].data_ptr() == first[0].data_ptr()
    assert not torch.cat(second).any()


@pytest.mark.usefixtures("small")
def test_a_file_system_that_refuses_to_go_past_the_cache_gets_it_the_plain_way(tmp_path, monkeypatch):
    contents, pwrite, refused = made_up(100_000, 6), os.pwrite, []
    empty(tmp_path / "file", len(contents))

    def picky(handle, memory, offset):
        with open(f"/proc/self/fdinfo/{handle}", encoding="ascii") as info:
            flags = int(next(line for line in info if line.startswith("flags")).split()[1], 8)
        if flags & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(handle, memory, offset)

    monkeypatch.setattr(os, "pwrite", picky)
    assert blocks.write(tmp_path / "file", blocks.segments([(0, contents)])) == expected(contents)
    assert (tmp_path / "file").read_bytes() == contents.numpy().tobytes()
    assert len(refused) <= 1  # once is enough


@pytest.mark.usefixtures("small")
def test_an_error_of_the_disk_arrives_after_a_few_tries(tmp_path, monkeypatch):
    contents, tried, code = made_up(100_000, 7), [], errno.EIO
    empty(tmp_path / "file", len(contents))
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0))

    def broken(handle, memory, offset):
        tried.append(offset)
        raise OSError(code, "cannot be")

    monkeypatch.setattr(os, "pwrite", broken)
    for code, times in ((errno.EIO, 3), (errno.ENOSPC, 1), (errno.EDQUOT, 1)):  # noqa: B007 (broken reads it)
        tried.clear()
        with pytest.raises(OSError, match="cannot be"):
            blocks.write(tmp_path / "file", blocks.segments([(0, contents)]))
        assert len(tried) == times


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ahead", [True, False])
def test_what_fails_for_a_moment_is_written_again_all_of_it(tmp_path, monkeypatch, ahead):
    contents, fsync, tried = made_up(100_000, 8), os.fsync, []
    empty(tmp_path / "file", len(contents))
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0))

    def lossy(handle):
        tried.append(handle)
        if len(tried) <= 2:  # after which nobody knows what of the file is on the disk
            (tmp_path / "file").write_bytes(bytes(len(contents)))
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", lossy)
    wanted = blocks.segments([(0, contents)])
    assert blocks.write(tmp_path / "file", wanted, blocks.Memory().take(wanted) if ahead else None) == expected(
        contents
    )
    assert (tmp_path / "file").read_bytes() == contents.numpy().tobytes()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ahead", [True, False])
def test_memory_is_not_used_again_before_it_is_on_the_disk_and_digested(tmp_path, monkeypatch, ahead):
    contents, pwrite, digest = made_up(100_000, 9), os.pwrite, blocks._digest
    empty(tmp_path / "file", len(contents))
    monkeypatch.setattr(os, "pwrite", lambda *arguments: time.sleep(0.02) or pwrite(*arguments))
    for late in (0.0, 0.04):  # the disk is the slower one, then the digests
        monkeypatch.setattr(blocks, "_digest", lambda memory, late=late: time.sleep(late) or digest(memory))
        wanted = blocks.segments([(0, contents)])
        copies = blocks.Memory().take(wanted) if ahead else None
        assert blocks.write(tmp_path / "file", wanted, copies) == expected(contents)
        assert (tmp_path / "file").read_bytes() == contents.numpy().tobytes()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ahead", [True, False])
def test_bytes_that_are_not_fit_are_not_written_nor_what_follows(tmp_path, ahead):
    contents = made_up(100_000, 10)
    contents[contents == 7] = 8
    contents[50_000] = 7  # in the fourth block
    empty(tmp_path / "file", len(contents))
    wanted = blocks.segments([(0, contents)])
    copies = blocks.Memory().take(wanted) if ahead else None
    assert blocks.write(tmp_path / "file", wanted, copies, lambda memory: not (memory == 7).any()) is None
    assert (tmp_path / "file").read_bytes() == contents[: 3 << 14].numpy().tobytes() + bytes(100_000 - (3 << 14))
    assert blocks.write(tmp_path / "file", wanted, copies, lambda memory: True) == expected(contents)
