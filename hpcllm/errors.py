"""What hpcllm refuses, and the exit code that says so to a batch system.

A `Refusal` is a sentence for the user, in the user's words and with the numbers; it is raised before any
step runs and is the same on every rank (see `hpcllm.mpi.together`). Anything else that escapes is a fault
of the program and is shown with its traceback. The codes are those of sysexits.h (BSD) where one fits.
"""

# No error: the run was asked to end early, is saved, and goes on when it is started again (EX_TEMPFAIL).
PAUSED = 75


class Refusal(Exception):
    """The user's input cannot be used; `str(refusal)` is the sentence to print."""

    code = 2
    # Set once every rank is known to raise this same refusal: then root speaks and nobody needs to abort.
    agreed = False

    def known_to_all(self):
        """Mark a refusal that every rank raises from the same numbers, without having asked the others."""
        self.agreed = True
        return self


class UsageError(Refusal):
    """A wrong command line, run file or launch."""

    code = 2


class DataError(Refusal):
    """Input that exists but is damaged, of the wrong kind, or too small."""

    code = 65


class MissingInput(Refusal):
    """An input file or folder that does not exist."""

    code = 66


class CannotCreate(Refusal):
    """An output that exists already or cannot be created."""

    code = 73


class IOFailure(Refusal):
    """Reading or writing failed: disk full, quota, lost file system."""

    code = 74


class Fruitless(Refusal):
    """Started again and again without getting any further: it must not be requeued."""

    code = 93


class TooFewRanks(Refusal):
    """Ranks have died, and those that are left cannot hold the model as it is laid out: start again on more."""

    code = PAUSED


class Corrupted(Refusal):
    """Ranks that hold the same numbers have different bits: a later start goes on from the last good checkpoint.

    tensors: {rank: name of the first tensor in which it differs}.
    """

    code = PAUSED

    def __init__(self, text, tensors=None):
        super().__init__(text)
        self.tensors = tensors or {}


class Diverged(Refusal):
    """The loss is no longer a number; starting again would only repeat it, so the job must not be requeued."""

    code = 93
