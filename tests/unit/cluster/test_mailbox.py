"""The mailbox keeps every event once and in order, and forgets earlier attempts."""

import asyncio

from longtrain.cluster.mailbox import Mailbox
from longtrain.cluster.pulse import Pulse


def pulse(count):
    return Pulse("step", 7, count)


def test_events_arrive_once_although_they_were_sent_twice():
    async def talk():
        box = Mailbox()
        await box.open(0)
        await box.push(0, 0, pulse(1), 0, ["a", "b"])
        first = await box.drain(0, 0)
        await box.push(0, 0, pulse(2), 0, ["a", "b"])  # no answer reached the worker
        await box.push(0, 0, pulse(3), 1, ["b", "c"])
        return first, await box.drain(0, 0)

    first, second = asyncio.run(talk())
    assert first == ({0: pulse(1)}, ["a", "b"])
    assert second == ({0: pulse(3)}, ["c"])


def test_drain_waits_for_events_but_not_longer():
    async def talk():
        box = Mailbox()
        await box.open(0)
        waiting = asyncio.ensure_future(box.drain(0, 60))
        await asyncio.sleep(0)
        await box.push(0, 1, pulse(1), 0, ["late"])
        return await waiting, await box.drain(0, 0.01)

    news, nothing = asyncio.run(talk())
    assert news == ({1: pulse(1)}, ["late"])
    assert nothing == ({1: pulse(1)}, [])


def test_an_earlier_attempt_is_not_heard_and_a_stop_is_told():
    async def talk():
        box = Mailbox()
        await box.open(0)
        await box.open(1)
        old = await box.push(0, 0, pulse(9), 0, ["old"])
        before = await box.push(1, 0, pulse(1), 0, [])
        await box.stop()
        return old, before, await box.push(1, 0, pulse(2), 0, []), await box.drain(1, 0)

    assert asyncio.run(talk()) == (False, False, True, ({0: pulse(2)}, []))
