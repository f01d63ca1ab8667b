"""A Python that has made the imports that take long, of which ranks of jobs that tests start are forks. Not a test.

    python warm.py serve SOCKET          imports, says so, and forks until its standard input ends
    python warm.py SOCKET ARGUMENT ...   as `python ARGUMENT ...`, by a fork of that

A rank spends two and a half seconds on importing torch and transformers; a test of what happens when ranks die has more
of that than of all else. mpirun starts the second form, which hands on what it was given (arguments, environment,
folder, standard streams), passes signals on, and ends as its fork ends; where it is killed, so is its fork. Not for
tests of how processes start, nor of what may differ from rank to rank with how Python hashes text, on which forks
agree. MPI is not imported before the fork, which would make one process of all.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LENGTH = struct.Struct("!q")


_HAS = ("hpcllm.config", "h5py", "rich.progress", "torch._dynamo", "torch.distributed.fsdp")
_HAS += ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")
_HAS += ("transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert")


def prepare():
    from hpcllm import imports

    imports.remember()
    with imports.undisturbed():
        for name in _HAS:
            importlib.import_module(name)


def serve(path):
    """Fork for each that asks, until standard input ends. Returns in the forks: the arguments that they are to run."""
    prepare()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        asking = {}  # {pidfd of a fork: (its number, the connection to who asked for it)}
        while True:
            connections = {connection: number for number, connection in asking.values()}
            ready, _, _ = select.select([0, listener, *asking, *connections], [], [])
            if 0 in ready:
                for number, _ in asking.values():
                    os.kill(number, signal.SIGKILL)
                sys.exit()
            for connection in connections.keys() & set(ready):
                passed_on = connection.recv(1) or [signal.SIGKILL]  # nothing: who asked has been killed
                os.kill(connections[connection], passed_on[0])
            for over in asking.keys() & set(ready):
                number, connection = asking.pop(over)
                _, status = os.waitpid(number, 0)
                os.close(over)
                with contextlib.suppress(OSError):  # who asked may be gone
                    connection.sendall(_LENGTH.pack(status))
                connection.close()
            if listener in ready:
                connection, _ = listener.accept()
                try:
                    wanted, streams = received(connection)
                except EOFError:  # who asked has been killed
                    connection.close()
                    continue
                number = os.fork()
                if number == 0:
                    connection.close()
                    for over, (_, other) in asking.items():
                        os.close(over)
                        other.close()
                    become(wanted, streams)
                    return wanted["arguments"]
                for fd in streams:
                    os.close(fd)
                asking[os.pidfd_open(number)] = number, connection


def received(connection):
    """(what is asked for, descriptors of the standard streams). Raises EOFError where it does not come whole."""
    head, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    try:
        (left,) = _LENGTH.unpack(head + whole(connection, _LENGTH.size - len(head)))
        return json.loads(whole(connection, left)), streams
    except EOFError:
        for fd in streams:
            os.close(fd)
        raise


def whole(connection, size):
    """So many bytes. Raises EOFError where there are fewer."""
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise EOFError
        found += part
    return found


def become(wanted, streams):
    """Make this fork the process that asked for it, as far as the job can tell."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])


def ask(path, arguments):
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    body = json.dumps(wanted).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    socket.send_fds(connection, [_LENGTH.pack(len(body))], [0, 1, 2])
    connection.sendall(body)
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    (status,) = _LENGTH.unpack(whole(connection, _LENGTH.size))
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def run(arguments):
    """As Python does with its own arguments."""
    sys.path[0] = ""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        run(serve(sys.argv[2]))
    else:
        ask(sys.argv[1], sys.argv[2:])
