"""The restart policy judges failures by their committed step alone; no controller, no clock."""

import pytest

from longtrain.cluster.failure import Failure, Fault, GiveUp, Restart
from longtrain.cluster.policies.restart import Config, Policy
from longtrain.core.errors import CorruptData, LongtrainError


def failure(committed_step, fault=Fault.DIED, error=None):
    return Failure(fault, 1, "rank 1 died", error, committed_step=committed_step)


def policy(max_failures=3):
    return Policy(Config(name="restart", max_failures_without_progress=3, delay_seconds=1.0), max_failures)


def test_the_first_failure_restarts_at_once():
    assert policy().decide(failure(10), []) == Restart(0.0)


def test_progress_restarts_at_once_until_the_budget_is_used_up():
    history = [failure(step) for step in (10, 20)]
    assert policy().decide(failure(30), history) == Restart(0.0)
    decision = policy().decide(failure(40), [*history, failure(30)])
    assert decision == GiveUp("cluster.max_failures=3 is used up (last committed step 40)")


def test_a_budget_of_zero_never_restarts():
    assert isinstance(policy(0).decide(failure(None), []), GiveUp)


def test_without_progress_the_delay_doubles_and_the_third_failure_gives_up():
    patient = Policy(Config(name="restart", max_failures_without_progress=4, delay_seconds=2.0), 10)
    assert patient.decide(failure(10), [failure(10)]) == Restart(2.0)
    assert patient.decide(failure(10), [failure(10)] * 2) == Restart(4.0)
    decision = policy(10).decide(failure(10), [failure(10)] * 2)
    assert decision == GiveUp("3 failures in a row without progress (last committed step 10)")


def test_no_checkpoint_at_all_counts_as_no_progress():
    decision = policy(10).decide(failure(None), [failure(None)] * 2)
    assert decision == GiveUp("3 failures in a row without progress (no checkpoint was committed)")


def test_an_earlier_stop_at_the_same_step_does_not_count_after_progress():
    history = [failure(10), failure(10), failure(20)]
    assert policy(10).decide(failure(20), history) == Restart(1.0)


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.RAISED])
def test_a_refusal_is_never_retried(fault):
    refused = failure(10, fault, CorruptData("tokens-00003.bin does not match its digest"))
    assert isinstance(policy().decide(refused, []), GiveUp)


def test_other_errors_of_longtrain_are_retried():
    assert policy().decide(failure(10, Fault.RAISED, LongtrainError("the disk is full")), []) == Restart(0.0)
