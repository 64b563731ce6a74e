"""What happens after a failed attempt, for every error there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract import errors
from worker.contract.errors import MachineError, NotFiniteError, SmallcatError
from worker.jobs.retry_policy import JOB_BACKOFF, Backoff, RetryPolicy, Verdict

POLICY = RetryPolicy(3)

#: Each class of errors that a job may end with, and what follows its first attempt.
VERDICTS = {
    errors.CallerError: Verdict.FAIL,
    errors.InvalidJobError: Verdict.FAIL,
    errors.InputError: Verdict.FAIL,
    errors.PromptFileError: Verdict.FAIL,
    errors.UnknownModelError: Verdict.FAIL,
    errors.UnknownJobError: Verdict.FAIL,
    errors.JobCancelledError: Verdict.CANCEL,
    errors.SettingsError: Verdict.FAIL,
    errors.JobError: Verdict.RETRY,
    errors.RenderError: Verdict.RETRY,
    errors.NotFiniteError: Verdict.RETRY,
    errors.JobTooLargeError: Verdict.RETRY,
    errors.JobTimeoutError: Verdict.RETRY,
    errors.PoisonJobError: Verdict.FAIL,
    errors.MachineError: Verdict.GIVE_BACK,
    errors.OutOfMemoryError: Verdict.GIVE_BACK,
    errors.DeviceError: Verdict.GIVE_BACK,
    errors.EngineStoppedError: Verdict.GIVE_BACK,
    errors.EngineFailedError: Verdict.DEATH,
    errors.BucketRefusedError: Verdict.GIVE_BACK,
    errors.MissingFileError: Verdict.GIVE_BACK,
    errors.NewerMessageError: Verdict.GIVE_BACK,
    errors.ServiceError: Verdict.FAIL,
    errors.QueueError: Verdict.FAIL,
    errors.StorageError: Verdict.FAIL,
    errors.PermanentStorageError: Verdict.FAIL,
}


def below(root: type[SmallcatError]) -> Iterator[type[SmallcatError]]:
    for child in root.__subclasses__():
        yield child
        yield from below(child)


def test_every_error_has_a_verdict() -> None:
    ours = {each for each in below(SmallcatError) if each.__module__ == errors.__name__}
    assert set(VERDICTS) == ours


@pytest.mark.parametrize("kind", VERDICTS)
def test_whose_fault_it_is_decides(kind: type[SmallcatError]) -> None:
    assert POLICY.verdict(kind("x"), 1) is VERDICTS[kind]
    assert POLICY.verdict(kind("x"), 2) is VERDICTS[kind]


@pytest.mark.parametrize(
    ("by_machine", "alone", "verdict"),
    [
        (False, False, Verdict.DEATH),
        (False, True, Verdict.DEATH),
        (True, False, Verdict.SUSPECT),
        (True, True, Verdict.DEATH),
    ],
)
def test_an_engine_s_failure_counts_as_a_death_and_a_device_s_as_an_attempt_of_a_job_alone(
    by_machine: bool, alone: bool, verdict: Verdict
) -> None:
    error = errors.EngineFailedError("x")
    error.by_machine = by_machine
    assert POLICY.verdict(error, 1, alone=alone) is verdict


@pytest.mark.parametrize("kind", VERDICTS)
@pytest.mark.parametrize("attempt", [3, 4])
def test_the_last_attempt_is_not_followed_by_another(kind: type[SmallcatError], attempt: int) -> None:
    kept = VERDICTS[kind] if VERDICTS[kind] is not Verdict.RETRY else Verdict.FAIL
    assert POLICY.verdict(kind("x"), attempt) is kept


def test_the_machine_s_fault_gives_the_job_back_whatever_attempt_it_is() -> None:
    assert {POLICY.verdict(MachineError("x"), attempt) for attempt in range(1, 9)} == {Verdict.GIVE_BACK}


def test_with_one_attempt_nothing_is_retried() -> None:
    assert RetryPolicy(1).verdict(NotFiniteError("x"), 1) is Verdict.FAIL


def test_pauses_double_up_to_the_longest() -> None:
    assert [JOB_BACKOFF.pause_s(failures) for failures in range(1, 8)] == [2, 4, 8, 16, 32, 60, 60]
    assert JOB_BACKOFF.pause_s(100_000) == 60


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_jitter_takes_up_to_half_off(failures: int, chance: float) -> None:
    backoff = Backoff(0.5, 10.0)
    pause_s = backoff.pause_s(failures)
    assert 0.5 * pause_s <= backoff.jittered_s(failures, chance) <= pause_s
    assert backoff.jittered_s(failures, 0.0) == 0.5 * pause_s
    assert backoff.jittered_s(failures, 1.0) == pause_s
    assert POLICY.pause_s(failures, chance) == JOB_BACKOFF.jittered_s(failures, chance)


@pytest.mark.parametrize(
    ("attempts", "deaths", "alone"),
    [
        (0, 0, False),
        (1, 1, False),
        (2, 0, False),
        (2, 1, True),
        (2, 2, True),
        (3, 3, False),
        # Deaths that used up no attempt.
        (0, 1, False),
        (0, 2, True),
        (1, 2, True),
        (2, 5, True),
        (3, 5, False),
    ],
)
def test_the_last_attempt_after_a_worker_s_death_is_made_alone(
    attempts: int, deaths: int, alone: bool
) -> None:
    assert POLICY.runs_alone(attempts, deaths) is alone


def test_a_poison_job_says_how_often_it_was_tried_and_by_which_setting() -> None:
    error = POLICY.poison(3)
    assert "tried 3 times (SMALLCAT_MAX_ATTEMPTS)" in str(error)
    assert POLICY.verdict(error, 1) is Verdict.FAIL
