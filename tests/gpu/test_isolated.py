"""Jobs in processes of their own: whatever one does, the others' results arrive."""

import os
import signal
import threading
import time

import pytest

from sfg_fast.gpu.isolated import Job, run


def forever():
    threading.Event().wait()


def broken():
    raise ValueError("the tensor\nis wrong")


def crash():
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's own handler would tell of it at length
    os.kill(os.getpid(), signal.SIGSEGV)


def unpicklable():
    return lambda: None


def outcomes(jobs, processes=2, **options):
    return {one.name: one for one in run(jobs, processes, **options)}


def test_results_come_by_name_whatever_the_number_of_processes():
    jobs = {f"job {n}": Job(lambda n=n: {"square": n * n}) for n in range(7)}
    for processes in (1, 3, 20):
        found = outcomes(jobs, processes)
        assert {name: one.value for name, one in found.items()} == {f"job {n}": {"square": n * n} for n in range(7)}
        assert all(one.error is None and one.seconds >= 0 for one in found.values())


@pytest.mark.parametrize("processes", [1, 2])
def test_what_goes_wrong_costs_one_line(processes):
    jobs = {
        "before": Job(os.getpid),
        "raises": Job(broken),
        "exits": Job(lambda: os._exit(3)),
        "crashes": Job(crash),
        "killed": Job(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "hangs": Job(forever, patience=0.5),
        "can't answer": Job(unpicklable),
        "after": Job(os.getpid),
    }
    found = outcomes(jobs, processes)
    assert found["raises"].error == "ValueError: the tensor is wrong"
    assert found["exits"].error == "the process died (exit code 3)"
    assert found["crashes"].error == "the process died (SIGSEGV)"
    assert found["killed"].error == "the process died (SIGKILL)"
    assert found["hangs"].error == "no answer in 0.5 s: killed"
    assert "pickle" in found["can't answer"].error
    for name in ("before", "after"):
        assert found[name].error is None
        assert found[name].value != os.getpid()


def test_a_job_that_failed_takes_its_process_with_it():
    """After an illegal access nothing that a process says of its GPU is true."""
    jobs = {"one": Job(os.getpid), "two": Job(os.getpid), "raises": Job(broken), "three": Job(os.getpid)}
    found = outcomes(jobs, 1)
    assert found["one"].value == found["two"].value != found["three"].value


def test_the_time_holds():
    jobs = {"quick": Job(lambda: 1), "hangs": Job(forever), "late": Job(lambda: 2)}
    begun = []
    found = outcomes(jobs, 1, until=time.monotonic() + 0.5, begin=begun.append)
    assert found["quick"].value == 1
    assert found["hangs"].error == "the time was up: killed"
    assert found["late"].error == "left out: the time was up"
    assert begun == ["quick", "hangs"]


def test_nobody_is_left_when_the_caller_stops_early():
    jobs = {"one": Job(os.getpid), "hangs": Job(forever)}
    running = run(jobs, 2)
    first = next(running)
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first.value, 0)


def test_what_processes_print_goes_to_the_log(tmp_path):
    log = tmp_path / "log"
    list(run({"prints": Job(lambda: os.write(1, b"hello")), "raises": Job(broken)}, 1, log=log))
    assert "hello" in log.read_text()
    assert "ValueError: the tensor" in log.read_text()


def test_a_process_that_dies_with_nothing_to_do_is_replaced():
    running = run({"first": Job(os.getpid), "second": Job(os.getpid)}, 1)
    first = next(running)
    os.kill(first.value, signal.SIGKILL)
    os.waitid(os.P_PID, first.value, os.WEXITED | os.WNOWAIT)
    (second,) = running
    assert second.error is None
    assert second.value != first.value
