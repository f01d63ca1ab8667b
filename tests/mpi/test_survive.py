"""What the survival of ranks is made of, as far as no rank has to die for it (those do in tests/test_recovery.py)."""

import pytest

from hpcllm.mpi import launcher

FT = {"OMPI_MCA_mpi_ft_enable": "1"}


@pytest.mark.parametrize(
    ("environ", "without"),
    [
        ({}, False),
        ({"OMPI_MCA_coll": "^han"}, True),
        ({"OMPI_MCA_coll": "^tuned,han"}, True),
        ({"OMPI_MCA_coll": "^tuned"}, False),
        ({"OMPI_MCA_coll": "basic,libnbc,ftagree"}, True),
        ({"OMPI_MCA_coll": "han,basic"}, False),
        ({"OMPI_MCA_coll_han_priority": "0"}, True),
        ({"OMPI_MCA_coll_han_priority": "35"}, False),
    ],
)
def test_whether_unfinished_sums_are_ruled_out(environ, without):
    assert launcher.without_han(environ) == without


def test_only_the_launcher_says_whether_deaths_are_survived():
    assert launcher.fault_tolerant(FT)
    assert not launcher.fault_tolerant({})
    assert not launcher.fault_tolerant({"OMPI_MCA_mpi_ft_enable": "0"})


@pytest.mark.mpi()
def test_without_fault_tolerance_a_sentence_says_what_is_needed(world, monkeypatch):
    from hpcllm.mpi import survive

    monkeypatch.setattr(launcher, "fault_tolerant", lambda: False)
    assert "mpirun --with-ft ulfm" in survive.refusal(world)


@pytest.mark.mpi()
def test_communicators_made_of_known_ones_are_known_and_all_ranks_have_met(world):
    from hpcllm.mpi import survive

    known = survive.known(world.comm.Dup())
    made = [known.Dup(), known.Split(0, -world.rank)]
    for comm in made:
        assert type(comm) is survive.Comm and comm.settled
        assert any(comm is one for one in survive._known.values())
        assert comm.allreduce(1) == world.size
    only = world.comm.group.Incl([0])
    if world.rank == 0:
        assert type(known.Create_group(only)) is survive.Comm
    assert made[1].rank == world.size - 1 - world.rank
    assert survive.missing(known, made[1]) == []
    survive._known.clear()


@pytest.mark.mpi()
def test_who_is_missing_goes_by_the_ranks_of_before(world):
    from mpi4py import MPI

    from hpcllm.mpi import survive

    part = world.comm.Split(0 if world.rank % 2 == 0 else MPI.UNDEFINED, world.rank)
    if world.rank % 2 == 0:
        assert survive.missing(world.comm, part) == list(range(1, world.size, 2))
        part.Free()
