"""The Python whose forks are the ranks of jobs in tests does what `python` would do."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from launching import warm_python

TELL = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['WORD'], 'torch' in sys.modules)"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIG{})"
SLEEPS = (
    "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: os._exit(75)); print(os.getpid(), flush=True)"
)
SLEEPS += "; time.sleep(60)"


def run(*arguments, python=None, **how):
    return subprocess.run([*(python or warm_python()), *arguments], capture_output=True, text=True, **how)


def test_it_has_what_it_was_started_with(tmp_path):
    done = run("-c", TELL, "a b", "", cwd=tmp_path, env={**os.environ, "WORD": "said"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"['a b', ''] {tmp_path} said True\n"


@pytest.mark.parametrize("code", [
    "raise SystemExit(7)", "raise SystemExit('why')", "1 / 0", "import os; os._exit(3)", "print(input())",
    DIES.format("KILL"), DIES.format("TERM"),
    "import atexit; atexit.register(print, 'at the end'); print('first')",
])  # fmt: skip
def test_it_ends_as_python_does(code):
    forked, started = (run("-c", code, python=python, input="given\n") for python in (None, [sys.executable]))
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_signals_reach_it(number, code):
    with subprocess.Popen([*warm_python(), "-c", SLEEPS], stdout=subprocess.PIPE, text=True) as asking:
        fork = int(asking.stdout.readline())
        asking.send_signal(number)
        assert asking.wait(20) == code
        until = time.monotonic() + 20
        while os.path.exists(f"/proc/{fork}"):
            assert time.monotonic() < until, "the fork is left"
            time.sleep(0.01)


def test_one_that_is_killed_as_it_asks_does_no_harm():
    for _ in range(20):
        with subprocess.Popen([*warm_python(), "-c", "pass"]) as asking:
            time.sleep(random.random() * 0.1)
            asking.kill()
    assert run("-c", "print('here')").stdout == "here\n"
