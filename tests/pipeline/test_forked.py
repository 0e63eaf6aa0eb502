"""Calls shared out among copies of the process: what they give, and what they may not change."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
from bitladder.pipeline import forked
from bitladder.pipeline.forked import FEWEST, results_of


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    monkeypatch.setattr(forked, "usable_cores", lambda: 3)


def alone(call):
    """What a call gives in a fresh process: that of the tests may have other threads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(on_three_cores, call).result(timeout=60)


def on_three_cores(call):
    forked.usable_cores = lambda: 3
    return os.getpid(), call()


def square(number):
    return number**2, os.getpid()


def squares(calls=30):
    return list(results_of([partial(square, number) for number in range(calls)]))


def pids(calls=30):
    found = squares(calls)
    assert [value for value, _ in found] == [number**2 for number in range(calls)]
    return {pid for _, pid in found}


def test_results_come_in_the_order_of_the_calls_from_a_process_for_each_core():
    here, found = alone(squares)
    assert [value for value, _ in found] == [number**2 for number in range(30)]
    pids = [pid for _, pid in found]
    assert pids[0] == here  # what it imports is there for the others
    assert len(set(pids[1:]) - {here}) == 3


def test_what_is_not_worth_a_process_is_called_here():
    assert pids(2 * FEWEST - 1) == {os.getpid()}
    assert list(results_of([])) == []


def test_with_other_threads_about_nothing_is_forked():
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert pids() == {os.getpid()}
    finally:
        over.set()
        thread.join()


def test_an_error_is_raised_as_it_is():
    def fail():
        raise LookupError("of the fifth")

    calls = [partial(square, number) for number in range(30)]
    calls[4] = fail
    given = results_of(calls)
    assert [next(given)[0] for _ in range(4)] == [0, 1, 4, 9]
    with pytest.raises(LookupError, match="of the fifth"):
        next(given)


def test_what_a_killed_process_owes_is_called_here():
    here, found = alone(squares_and_a_death)
    assert found.pop(1) == ("done", here)
    assert [value for value, _ in found] == [number**2 for number in range(29)]
    assert len({pid for _, pid in found} - {here}) == 2


def squares_and_a_death():
    here = os.getpid()

    def die():
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done", here

    calls = [partial(square, number) for number in range(29)]
    return list(results_of([calls[0], die, *calls[1:]]))


def test_who_stops_asking_leaves_no_process_behind():
    here, child = alone(child_of_the_first_two)
    assert child != here
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def child_of_the_first_two():
    given = results_of([partial(square, number) for number in range(30)])
    next(given)
    child = next(given)[1]
    given.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)  # while the process that asked still lives
    return child
