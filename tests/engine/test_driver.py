"""Turns and the thread that takes them, without a model."""

import threading
import time

import pytest

from jaxstack.engine.driver import Driver
from jaxstack.engine.errors import EngineDead


class Work:
    """So many units, one done in a turn; `broken` turns raise."""

    def __init__(self):
        self.open, self.broken, self.recovered, self.given_up = 0, 0, 0, False
        self.hold = threading.Event()
        self.hold.set()
        self.driver = Driver(turn=self.turn, busy=lambda: self.open > 0, recover=self.recover, give_up=self.give_up)

    def turn(self):
        self.hold.wait()
        if self.broken:
            self.broken -= 1
            raise RuntimeError("a broken turn")
        self.open -= (worked := self.open > 0)
        return worked

    def recover(self):
        self.recovered += 1

    def give_up(self):
        self.given_up, self.open = True, 0

    def add(self, units):
        self.driver.post(lambda: setattr(self, "open", self.open + units), while_alive=True)


def test_stopping_waits_for_open_work_and_no_longer():
    work = Work()
    work.add(500)
    work.driver.start()
    began = time.monotonic()
    work.driver.stop(float("inf"))  # returns at all: it is woken by the turn that ended the last unit
    assert work.open == 0 and time.monotonic() - began < 300
    with pytest.raises(EngineDead):
        work.add(1)
    assert work.driver.posted == 0


def test_stopping_gives_up_waiting_after_a_while():
    work = Work()
    work.hold.clear()
    work.add(3)
    work.driver.start()
    while work.open < 3:
        time.sleep(0.001)
    stopper = threading.Thread(target=work.driver.stop, args=(0.05,))
    stopper.start()
    while not work.driver.stopping:
        time.sleep(0.001)
    work.hold.set()
    stopper.join(300)
    assert not stopper.is_alive() and work.open == 2


def test_an_action_between_turns_runs_on_the_thread_and_raises_here():
    work = Work()
    ran: list[str] = []
    work.driver.start()
    work.driver.between_turns(lambda: ran.append(threading.current_thread().name))
    with pytest.raises(ZeroDivisionError):
        work.driver.between_turns(lambda: ran.append(str(1 // 0)))
    work.driver.stop(0)
    work.driver.between_turns(lambda: ran.append("here"))
    assert ran == ["engine-steps", "here"]


def test_two_broken_turns_are_survived_and_three_in_a_row_are_not():
    work = Work()
    work.broken = 2
    work.add(1)
    work.driver.start()
    work.driver.wait_until(lambda: work.open == 0 and work.recovered == 2)
    assert work.driver.alive
    work.broken = 3
    with pytest.raises(EngineDead) as raised:
        work.driver.wait_for(threading.Event())
    assert str(raised.value.__cause__) == "a broken turn" and work.recovered == 5
    work.driver.stop(float("inf"))
    assert work.given_up
    with pytest.raises(EngineDead):
        work.add(1)
