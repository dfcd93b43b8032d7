"""The controller, stepped by hand over a fake group; the clock moves only when the controller waits."""

import pytest

from longtrain.cluster.controller import Controller, Done, Limits, Report, State
from longtrain.cluster.failure import Failure, Fault, GiveUp, Restart
from longtrain.cluster.pulse import Pulse
from longtrain.core.errors import CorruptData, ExchangeFailed, LongtrainError, Refused, WorkerFailed


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeGroup:
    size = 2

    def __init__(self, clock):
        self.clock = clock
        self.calls = []
        self.reports = []
        self.available = True

    def place(self, timeout):
        if not self.available:
            self.clock.sleep(timeout)
        return self.available

    def shortage(self):
        return "2 workers need GPU 2 in all; the cluster has free: GPU 0 of 0; use fewer workers"

    def start(self, attempt):
        self.calls.append(f"start {attempt}")

    def poll(self, timeout):
        if self.reports:
            return self.reports.pop(0)
        self.clock.sleep(timeout)
        return Report()

    def stop(self):
        self.calls.append("stop")

    def kill(self):
        self.calls.append("kill")

    def release(self):
        self.calls.append("release")

    def name(self, rank):
        return f"rank {rank}"


class FakePolicy:
    def __init__(self, *decisions):
        self.decisions = list(decisions)
        self.asked = []

    def decide(self, failure, history):
        self.asked.append((failure, list(history)))
        return self.decisions.pop(0)


class FakeObserver:
    def __init__(self):
        self.events, self.incidents, self.committed = [], [], None

    def event(self, event):
        self.events.append(event)
        self.committed = event

    def incident(self, kind, message, **details):
        self.incidents.append((kind, message, details))

    def committed_step(self):
        return self.committed


class Machine:
    """A controller and all its fakes."""

    def __init__(self, *decisions, heartbeat_timeout=10.0, hang_timeout=1000.0):
        self.clock = Clock()
        self.group, self.policy, self.observer = FakeGroup(self.clock), FakePolicy(*decisions), FakeObserver()
        limits = Limits(30.0, heartbeat_timeout, hang_timeout)
        self.controller = Controller(
            self.group, self.policy, self.observer, limits, clock=self.clock, sleep=self.clock.sleep
        )

    @property
    def state(self):
        return self.controller.state

    @property
    def result(self):
        return self.controller.result

    def step(self, report=None):
        if report is not None:
            self.group.reports.append(report)
        self.controller.step()
        return self.controller.state

    def until_running(self):
        assert self.step() is State.STARTING
        assert self.step(Report(running=True)) is State.RUNNING
        return self


def died(rank=1):
    return Failure(Fault.DIED, rank, f"rank {rank} died")


DONE = {0: Done(20, 640, False), 1: Done(20, 640, False)}


def test_a_run_without_faults_goes_from_placing_to_finished():
    machine = Machine().until_running()
    assert machine.step(Report(running=True, events=("one",), done={1: DONE[1]})) is State.RUNNING
    assert machine.step(Report(running=True, events=("two",), done={0: DONE[0]})) is State.FINISHED
    assert machine.result.outcome == DONE[0]
    assert machine.observer.events == ["one", "two"]
    assert machine.observer.incidents == []


def test_a_failure_kills_all_ranks_before_the_policy_is_asked_and_restarts_in_the_kept_place():
    machine = Machine(Restart(0.0)).until_running()
    machine.step(Report(running=True, pulses={1: Pulse("checkpoint", 7, 3)}, events=(6,)))
    assert machine.step(Report(running=True, failures=(died(),))) is State.RESTARTING
    failure, history = machine.policy.asked[0]
    assert (failure.rank, failure.step, failure.phase, failure.committed_step) == (1, 7, "checkpoint", 6)
    assert history == []
    assert machine.step() is State.PLACING
    assert machine.step() is State.STARTING
    assert machine.group.calls == ["start 0", "kill", "start 1"]
    assert machine.step(Report(running=True)) is State.RUNNING
    kinds = [kind for kind, _, _ in machine.observer.incidents]
    assert kinds == ["died", "recovered"]
    details = machine.observer.incidents[0][2]
    assert (details["rank"], details["step"], details["decision"], details["attempt"]) == (1, 7, "restart", 0)
    assert machine.step(Report(running=True, done=DONE)) is State.FINISHED


def test_the_delay_of_a_restart_is_waited_for():
    machine = Machine(Restart(5.0)).until_running()
    machine.step(Report(failures=(died(),)))
    before = machine.clock()
    while machine.state is State.RESTARTING:
        machine.step()
    assert 5.0 <= machine.clock() - before < 5.5


def test_giving_up_names_the_failure_and_the_reason():
    machine = Machine(GiveUp("cluster.max_failures=0 is used up")).until_running()
    assert machine.step(Report(failures=(died(),))) is State.FAILED
    assert isinstance(machine.result.error, WorkerFailed)
    assert str(machine.result.error) == "rank 1 died; given up: cluster.max_failures=0 is used up"


@pytest.mark.parametrize("error", [CorruptData("tokens-00003.bin is truncated"), LongtrainError("the disk is full")])
def test_an_error_of_longtrain_keeps_its_class_and_message(error):
    machine = Machine(GiveUp("no")).until_running()
    machine.step(Report(failures=(Failure(Fault.RAISED, 0, f"rank 0 raised {error}", error),)))
    assert machine.result.error is error


def test_the_traceback_of_a_foreign_exception_is_kept_for_the_end():
    machine = Machine(GiveUp("no")).until_running()
    machine.step(Report(failures=(Failure(Fault.RAISED, 0, "rank 0 raised ValueError: x", None, "Traceback ..."),)))
    assert machine.result.traceback == "Traceback ..."


def test_the_peers_of_a_dead_rank_are_not_blamed():
    machine = Machine(Restart(0.0)).until_running()
    peer = Failure(Fault.RAISED, 0, "rank 0 raised RuntimeError: Connection closed by peer")
    machine.group.reports += [Report(failures=(peer,)), Report(), Report(failures=(died(1),))]
    machine.step()
    assert machine.policy.asked[0][0].rank == 1


def test_an_exception_without_another_cause_is_blamed_soon():
    machine = Machine(Restart(0.0)).until_running()
    before = machine.clock()
    machine.step(Report(failures=(Failure(Fault.RAISED, 0, "rank 0 raised ValueError: x"),)))
    assert machine.policy.asked[0][0].rank == 0
    assert machine.clock() - before < 0.5


def test_a_silent_rank_is_named_and_a_rank_that_beats_or_is_done_is_not():
    machine = Machine(Restart(0.0)).until_running()
    count = 0
    while machine.state is State.RUNNING:
        count += 1
        done = {0: DONE[0]} if count == 5 else {}
        machine.clock.now += 1.0
        machine.step(Report(running=True, pulses={0: Pulse("step", count, min(count, 5))}, done=done))
        assert count < 30
    failure = machine.policy.asked[0][0]
    assert (failure.fault, failure.rank) == (Fault.SILENT, 1)
    assert "rank 1" in failure.message and "10 s" in failure.message


def test_a_rank_that_keeps_others_waiting_ends_the_attempt_although_it_beats():
    machine = Machine(Restart(0.0), hang_timeout=5.0).until_running()
    count = 0
    while machine.state is State.RUNNING:
        count += 1
        machine.clock.now += 0.5
        machine.step(Report(pulses={0: Pulse("step", 7, count, 5, 2), 1: Pulse("step", 6, count, 4, 2, stack="main")}))
        assert count < 30
    failure = machine.policy.asked[0][0]
    assert (failure.fault, failure.rank, failure.step, failure.traceback) == (Fault.HANG, 1, 6, "main")
    details = machine.observer.incidents[0][2]
    assert details["ranks"] == [1] and details["places"] == {"in step 8": [0], "in step 7": [1]}
    assert 10 <= count <= 12


def test_the_only_rank_may_take_as_long_as_it_likes_and_is_recorded_as_slow():
    machine = Machine(hang_timeout=5.0)
    machine.group.size = 1
    machine.until_running()
    for count in range(1, 300):
        machine.clock.now += 0.5
        machine.step(Report(pulses={0: Pulse("step", 6, count, 4, 2, stack="in backward")}))
    assert machine.state is State.RUNNING and "kill" not in machine.group.calls
    [(kind, message, details)] = machine.observer.incidents
    assert kind == "slow" and message.startswith("rank 0: no progress for 50 s in step 7; no other rank waits for it")
    assert details == {"rank": 0, "step": 6, "phase": "step", "traceback": "in backward"}


def test_an_exchange_that_failed_is_blamed_after_any_other_exception_and_told_with_its_rank():
    machine = Machine(GiveUp("enough")).until_running()
    failed = ExchangeFailed("all_reduce 3 of the world failed after 300 s")
    waited = Failure(Fault.RAISED, 0, f"rank 0 raised ExchangeFailed: {failed}", failed)
    machine.step(Report(failures=(waited, Failure(Fault.RAISED, 1, "rank 1 raised ValueError: x"))))
    assert machine.policy.asked[0][0].rank == 1
    machine = Machine(GiveUp("enough")).until_running()
    machine.step(Report(failures=(waited,)))
    assert type(machine.result.error) is WorkerFailed
    assert str(machine.result.error).startswith("rank 0 raised ExchangeFailed: all_reduce 3 of the world")


def test_an_old_pulse_is_no_sign_of_life():
    machine = Machine(Restart(0.0)).until_running()
    for _ in range(30):
        machine.clock.now += 1.0
        if machine.step(Report(pulses={0: Pulse("step", 1, 4), 1: Pulse("step", 1, 4)})) is not State.RUNNING:
            break
    assert machine.policy.asked[0][0].fault is Fault.SILENT


def test_a_driver_that_was_suspended_does_not_blame_its_workers():
    machine = Machine().until_running()
    machine.clock.now += 3600.0
    assert machine.step(Report(running=True)) is State.RUNNING
    assert machine.step(Report(running=True, pulses={0: Pulse("step", 1, 1), 1: Pulse("step", 1, 1)})) is State.RUNNING


def test_a_stop_is_passed_on_and_ends_as_preempted():
    machine = Machine().until_running()
    machine.controller.request_stop()
    assert machine.step() is State.STOPPING
    saved = {rank: Done(7, 224, True) for rank in (0, 1)}
    assert machine.step(Report(running=True, done=saved)) is State.PREEMPTED
    assert machine.group.calls.count("stop") == 1
    assert machine.result.outcome == Done(7, 224, True)


def test_a_run_that_finishes_while_it_is_stopped_is_finished():
    machine = Machine().until_running()
    machine.controller.request_stop()
    machine.step()
    assert machine.step(Report(running=True, done=DONE)) is State.FINISHED


def test_a_worker_that_fails_while_it_saves_is_not_restarted():
    machine = Machine().until_running()
    machine.controller.request_stop()
    machine.step()
    assert machine.step(Report(failures=(died(),))) is State.FAILED
    assert "asked to stop" in str(machine.result.error)


@pytest.mark.parametrize("state", [State.PLACING, State.STARTING, State.RESTARTING])
def test_a_stop_outside_a_running_attempt_leaves_at_once(state):
    machine = Machine(Restart(60.0))
    if state is State.RESTARTING:
        machine.until_running().step(Report(failures=(died(),)))
    elif state is State.STARTING:
        machine.step()
    assert machine.state is state
    machine.controller.request_stop()
    assert machine.step() is State.PREEMPTED


def test_resources_that_never_come_are_refused_with_numbers():
    machine = Machine()
    machine.group.available = False
    while not machine.state.terminal:
        machine.step()
    assert isinstance(machine.result.error, Refused)
    assert "GPU 2" in str(machine.result.error) and "start_timeout_seconds=30" in str(machine.result.error)


def test_resources_that_do_not_come_back_end_the_run_as_a_failure():
    machine = Machine(Restart(0.0)).until_running()
    machine.step(Report(failures=(died(),)))
    machine.group.available = False
    while not machine.state.terminal:
        machine.step()
    assert isinstance(machine.result.error, WorkerFailed)
    assert str(machine.result.error).startswith("rank 1 died")


def test_workers_that_do_not_start_are_a_failure_for_the_policy():
    machine = Machine(Restart(0.0))
    while machine.state in (State.PLACING, State.STARTING):
        machine.step()
    assert machine.policy.asked[0][0].fault is Fault.NOT_STARTED


def test_workers_are_ended_and_the_place_is_given_back_whatever_happens():
    machine = Machine().until_running()
    machine.group.poll = lambda timeout: 1 / 0
    with pytest.raises(ZeroDivisionError):
        machine.controller.run()
    assert machine.group.calls[-2:] == ["kill", "release"]


def test_two_failures_in_a_row_are_two_entries_of_the_history():
    machine = Machine(Restart(0.0), Restart(0.0)).until_running()
    machine.step(Report(failures=(died(1),)))
    machine.step()
    machine.step()
    assert machine.step(Report(failures=(died(0),))) is State.RESTARTING  # while starting
    failure, history = machine.policy.asked[1]
    assert failure.rank == 0 and [earlier.rank for earlier in history] == [1]
