import os
import subprocess
import sys

from service.runner.identity import host_name, is_dead, start_of, this_process


def test_this_process_is_alive() -> None:
    owner = this_process()
    assert owner.pid == os.getpid()
    assert owner.host == host_name()
    assert owner.process == start_of(os.getpid())
    assert not is_dead(owner.pid, owner.process)
    assert this_process().name != owner.name


def test_a_process_that_ended_is_dead_even_before_it_was_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = start_of(process.pid)
        assert started
        assert not is_dead(process.pid, started)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_dead(process.pid, started)
    assert is_dead(process.pid, started)


def test_another_process_with_the_same_pid_is_not_the_one() -> None:
    assert is_dead(os.getpid(), "boot/12345")


def test_what_cannot_be_known_counts_as_alive() -> None:
    assert not is_dead(None, "boot/1")
    assert not is_dead(os.getpid(), None)
    assert not is_dead(2**22 + 1, "")
