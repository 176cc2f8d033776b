"""Signals: deferred until a block ends, or raised as `Stopped`; a program's own handlers are left alone."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from fastddpm.processes.signals import Stopped, deferred, stoppable

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def default_handlers():
    before = {number: signal.getsignal(number) for number in BOTH}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


def test_deferred_signal_is_raised_after_the_block():
    before, done = handlers(), []

    def work():
        with deferred() as caught:
            assert caught == []
            signal.raise_signal(signal.SIGINT)
            done.append(list(caught))

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [[signal.SIGINT]]
    assert handlers() == before


def test_second_signal_is_not_deferred():
    done = []

    def work():
        with deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("first")
            signal.raise_signal(signal.SIGINT)
            done.append("second")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["first"]


@pytest.mark.parametrize("context", [deferred, lambda: stoppable(str)], ids=["deferred", "stoppable"])
def test_own_handler_of_the_program_stays(context):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    before = handlers()
    with context() as caught:
        signal.raise_signal(signal.SIGTERM)
        assert handlers()[0] != before[0]
    assert (heard, caught, handlers()) == ([signal.SIGTERM], [], before)


@pytest.mark.parametrize("context", [deferred, lambda: stoppable(str)], ids=["deferred", "stoppable"])
def test_other_threads_set_no_handlers(context):
    before, inside = handlers(), []

    def work():
        with context():
            inside.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.parametrize("number", BOTH)
def test_signal_raises_stopped_with_its_message(number):
    before = handlers()

    def work():
        with stoppable(lambda: "3 of 4 are done") as stopped:
            try:
                signal.raise_signal(number)
            finally:
                assert [each.number for each in stopped] == [number]
                signal.raise_signal(number)  # this soon it is the same request

    with pytest.raises(Stopped, match=r"^3 of 4 are done$") as caught:
        work()
    assert caught.value.number == number
    assert handlers() == before


def test_keyboard_interrupt_counts_as_ctrl_c():
    with pytest.raises(Stopped) as stopped, stoppable(lambda: "stopped"):
        raise KeyboardInterrupt
    assert stopped.value.number == signal.SIGINT


def test_second_signal_kills():
    code = """
import signal
from fastddpm.processes import signals
signals.REPEAT_SECONDS = -1
with signals.stoppable(str):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGTERM)
        print("not killed")
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
