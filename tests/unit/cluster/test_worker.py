"""What a worker does around the training, without Ray."""

import time

import pytest
import ray

from longtrain.cluster.group import actor_resources, check_resources
from longtrain.cluster.worker import Heart, Raised
from longtrain.comm.journal import Journal
from longtrain.core.errors import CorruptData, LongtrainError, Refused


class OwnRefusal(Refused):
    """As a plug-in may define; the driver need not be able to import it."""


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return Raised.of(caught)


@pytest.mark.parametrize("error", [CorruptData("a file"), Refused("a value"), LongtrainError("a disk")])
def test_an_error_of_longtrain_crosses_with_class_and_message_and_no_traceback(error):
    crossed = raised(error)
    assert type(crossed.error()) is type(error) and str(crossed.error()) == str(error)
    assert crossed.traceback == ""


def test_a_class_that_only_the_worker_knows_arrives_as_the_nearest_that_all_know():
    assert type(raised(OwnRefusal("a value")).error()) is Refused


def test_a_foreign_exception_crosses_as_text():
    crossed = raised(ZeroDivisionError("by zero\nsecond line"))
    assert crossed.error() is None
    assert crossed.summary == "ZeroDivisionError: by zero"
    assert "test_worker.py" in crossed.traceback


def test_the_heart_delivers_all_events_before_it_closes_and_hears_a_stop():
    sent = []

    def push(pulse, first, events):
        if len(sent) == 1:
            sent.append(None)
            raise ray.exceptions.RaySystemError("the mailbox is out of reach")
        sent.append((pulse.phase, pulse.step, pulse.count, first, events))
        return bool(events)

    heart = Heart(push)
    heart.phase("step", 3)
    heart.event("a")
    heart.event("b")
    while not heart.stop_requested():
        time.sleep(0.01)
    heart.event("c")
    heart.close()
    delivered = [push for push in sent if push is not None]
    numbered = {first + i: event for _, _, _, first, events in delivered for i, event in enumerate(events)}
    assert numbered == {0: "a", 1: "b", 2: "c"}
    counts = [count for _, _, count, _, _ in delivered]
    assert counts == sorted(set(counts))
    assert delivered[-1][:2] == ("step", 3)


def test_the_heart_tells_how_far_the_rank_is_and_where_it_stands_still(monkeypatch):
    monkeypatch.setattr("longtrain.cluster.worker._STACK_SECONDS", 0.0)
    pulses = []
    heart = Heart(lambda pulse, first, events: pulses.append(pulse) or False)
    journal = Journal()
    heart.watch(journal)
    heart.phase("step", 3)
    heart.phase("checkpoint", 4)
    with journal.inside("all_reduce", "the world"):
        heart.event("push now")
        while not (pulses and pulses[-1].exchanges.inside):
            time.sleep(0.01)
        inside = pulses[-1]
    heart.close()
    assert (inside.phases, inside.steps) == (2, 1)
    assert str(inside) == "in all_reduce 1 of the world, the checkpoint of step 4"
    assert "test_worker.py" in inside.stack and "time.sleep" in inside.stack
    assert pulses[-1].position != inside.position


@pytest.mark.parametrize(
    ("resources", "complaint"),
    [({"CPU": -1.0}, "negative"), ({"GPU": 0.5}, "one GPU"), ({"GPU": 2.0}, "one GPU"), ({"CPU": 0.0}, "nothing")],
)
def test_resources_that_a_rank_cannot_use_are_refused(resources, complaint):
    with pytest.raises(Refused, match=complaint):
        check_resources(resources)


def test_resources_become_options_of_an_actor():
    assert check_resources({"CPU": 2.0, "GPU": 1.0, "rack": 0.0}) == {"CPU": 2.0, "GPU": 1.0}
    assert actor_resources({"GPU": 1.0, "rack": 0.5}) == {"num_cpus": 0, "num_gpus": 1.0, "resources": {"rack": 0.5}}
