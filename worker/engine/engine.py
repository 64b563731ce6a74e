"""The loop that owns the device: one denoising step a turn.

    submit ─► prepare ─► prepared ─► batcher ─► step ─► finished? ─► decode ─► the job's future
    (caller's thread) ▲  (engine's thread)       │                   (worker.engine.decode_stage)
                      │                          └─ cancelled, late or failed: leaves now, alone
                      └─ a second pass, from decode (worker.engine.prepare_stage)

This is continuous batching: a job joins at the next step and leaves after its last. The loop runs steps and
nothing else. A job's text is encoded on the thread that submits it, and its picture is decoded beside the
next step where the device gains by it. A job with a second pass changes its lane in between: it leaves the
batcher as a finished one does, and joins it again, with its age, when the second pass is prepared.

A job fails alone. If a step fails, each half of its batch runs again from the same latents, down to the job
that fails by itself. If a batch does not fit in memory, the lane's cap is lowered. A job is too large only if
it does not fit while the device does nothing else.
Every future is resolved, whatever happens. A machine fault (`MachineError`) of the runner ends the loop, and
so does a fault of the loop itself: then all jobs go back to the queue with `EngineFailedError`, and the
process ends.

The engine is given its runner (`worker.engine.runner`) and imports no torch.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic

from worker.contract.errors import (
    EngineStoppedError,
    JobCancelledError,
    JobTimeoutError,
    JobTooLargeError,
    OutOfMemoryError,
    SmallcatError,
)
from worker.contract.job import Job
from worker.engine.batcher import Batcher
from worker.engine.decode_stage import DecodeStage
from worker.engine.movement import Movement
from worker.engine.prepare_stage import PrepareStage
from worker.engine.runner import FirstPass, JobInputs, Outcome, Picture, Runner, Sizes, StateT
from worker.engine.step_watch import StepWatch
from worker.engine.ticket import Rendered, Ticket, as_job_error, engine_failed, is_machine_fault, shared

logger = logging.getLogger("smallcat.engine")


class Engine(Generic[StateT]):
    """Renders jobs together, a step at a time, on a thread of its own.

    `job_timeout_s` (seconds, > 0) limits the time of a job in the engine. `on_failure` is called once, from
    the engine's thread, if the loop fails: all jobs have been given back by then, and the process should
    exit. `on_step` is called with each step's rows and seconds, `on_turn` with its batch and whether more is
    to do. `clock` returns monotonic seconds. Public methods may be called from any thread.
    """

    def __init__(
        self,
        runner: Runner[StateT],
        *,
        job_timeout_s: float,
        on_failure: Callable[[BaseException], None],
        on_step: Callable[[int, float], None] = lambda rows, seconds: None,
        on_turn: Callable[[Sequence[Ticket[StateT]], bool], None] = lambda batch, goes_on: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._job_timeout_s = job_timeout_s
        self._on_failure = on_failure
        self._on_step, self._on_turn = on_step, on_turn
        self._clock = clock
        #: Whether the jobs in flight move.
        self.movement = Movement(clock, lambda: runner.is_compiling)
        self._batcher: Batcher[Ticket[StateT]] = Batcher(runner)
        #: All jobs in flight by id: from `submit` until resolved.
        self._tickets: dict[str, Ticket[StateT]] = {}
        #: Jobs that are ready for their first step and not in the batcher yet.
        self._prepared: list[Ticket[StateT]] = []
        #: Jobs whose text or picture did not fit in memory beside a step: the engine's thread tries again.
        self._out_of_memory: list[Ticket[StateT]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._has_failed = False
        #: An error of another thread that ends the loop.
        self._failure: BaseException | None = None
        #: When the present turn of the loop started; None between two turns.
        self._turn_started_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._prepare_stage: PrepareStage[StateT] = PrepareStage(
            runner,
            ready=functools.partial(self._append, self._prepared),
            too_large=functools.partial(self._append, self._out_of_memory),
            resolve=self._resolve,
            fail=self._fail,
        )
        #: Has the jobs that are past the last step of a pass.
        self._decode_stage: DecodeStage[StateT] = DecodeStage(
            runner, self._deliver, self._fail, self._notify, clock=clock
        )

    @property
    def sizes(self) -> Sizes:
        """How many rows its steps have, as far as it is known at the moment of asking."""
        return self._runner

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    def submit(
        self, job_id: str, job: Job, inputs: JobInputs | None = None, watch: StepWatch | None = None
    ) -> Future[Rendered]:
        """Encode the job's text on the caller's thread, and let the job wait for its first step.

        The future resolves to a `Rendered`, or to the job's own `SmallcatError`. A job whose id is in flight
        shares that one's future. If the engine has stopped, it is `EngineStoppedError`. `watch` notes steps.
        """
        with self._changed:
            if (known := self._tickets.get(job_id)) is not None:
                # Submitted again after its cancellation: it is wanted again.
                known.cancelled = False
                return known.future
            deadline_s = self._clock() + self._job_timeout_s
            ticket: Ticket[StateT] = Ticket(job_id, job, deadline_s, inputs, watch=watch)
            if self._stopped:
                ticket.resolve(EngineStoppedError("The engine has stopped: the job goes back to the queue."))
                return ticket.future
            self.movement.joined(is_first=not self._tickets)
            self._tickets[job_id] = ticket
        self._prepare_stage.prepare(ticket)
        return ticket.future

    def cancel(self, job_id: str) -> None:
        """End a job at the next step with `JobCancelledError`. Does nothing if it is not in flight."""
        with self._changed:
            if ticket := self._tickets.get(job_id):
                ticket.cancelled = True
                self._changed.notify()

    def tickets(self) -> dict[str, Ticket[StateT]]:
        """The jobs in flight, by id."""
        with self._changed:
            return dict(self._tickets)

    def progress(self) -> dict[str, tuple[int, int]]:
        """(steps done, steps asked for) of each job in flight, by id; (0, 0) until its text is encoded."""
        return {job_id: ticket.progress for job_id, ticket in self.tickets().items()}

    def is_alive(self) -> bool:
        """Liveness: False once the loop has failed or while it hangs, so that no job is being finished."""
        return not (self._has_failed or self.is_hung())

    def is_hung(self) -> bool:
        """Whether a step or a decode call has been running for longer than `job_timeout_s`."""
        started = (self._turn_started_s, *self._decode_stage.started_s)
        return any(at is not None and self._clock() - at > self._job_timeout_s for at in started)

    def drain(self, timeout_s: float) -> None:
        """Wait until all jobs in flight are done, at most `timeout_s` seconds; then `stop`."""
        deadline = self._clock() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not self._tickets, timeout=max(0.0, deadline - self._clock()))
        self.stop()

    def stop(self) -> None:
        """Give back all jobs in flight with `EngineStoppedError`, and end the loop after its current step."""
        self._give_all_back(EngineStoppedError("The worker is stopping: the job goes back to the queue."))
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)

    # The methods below run on the engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn_started_s = self._clock()
                self._admit()
                self._drop_cancelled_and_late()
                self._retry_out_of_memory()
                if not self._should_wait() and (batch := self._batcher.next_batch(self._clock())):
                    self._step(batch)
                    self._decode_finished(batch)
                    self._on_turn(batch, len(self._batcher) > 0)
                self._turn_started_s = None
        except BaseException as error:
            self._has_failed = True
            logger.critical("The engine failed, its jobs go back to the queue: %r", error, exc_info=True)
            self._give_all_back(engine_failed(error))
            self._on_failure(error)

    def _wait_for_work(self) -> bool:
        """Sleep while there is no work. False: stop. Raises the `_failure` of another thread."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or self._failure
                    or self._prepared
                    or self._out_of_memory
                    or (len(self._batcher) and not self._should_wait())
                )
            )
            if self._failure is not None:
                raise self._failure
            return not self._stopped

    def _should_wait(self) -> bool:
        """Whether the next step would only finish jobs, which then had to wait for the decode stage.

        Until the stage has a free slot, more jobs may join the step. Where jobs have few steps, small batches
        are the largest loss of throughput.
        """
        if not self._decode_stage.is_full:
            return False
        states = [ticket.state for ticket in self._batcher if ticket.state is not None]
        rows = sum(state.rows for state in states)
        return rows < self._runner.max_rows and all(state.step == state.steps - 1 for state in states)

    def _admit(self) -> None:
        """Move the jobs that were prepared since the last step to the batcher."""
        with self._changed:
            prepared = list(self._prepared)
            self._prepared.clear()
        for ticket in prepared:
            if ticket.state is not None:
                if ticket.ready_s is None:
                    ticket.ready_s = self._clock()
                self._batcher.add(
                    ticket,
                    lane=ticket.state.lane,
                    rows=ticket.state.rows,
                    text_tokens=ticket.state.text_tokens,
                    lora_rows=ticket.state.lora_rows,
                    priority=ticket.job.priority,
                    now_s=ticket.ready_s,
                )

    def _drop_cancelled_and_late(self) -> None:
        now_s = self._clock()
        for ticket in list(self._batcher):
            if ticket.cancelled:
                self._drop(ticket, JobCancelledError("The job was cancelled."))
            elif now_s > ticket.deadline_s and ticket.state is not None:
                limit = f"{self._job_timeout_s:g} s (SMALLCAT_JOB_TIMEOUT_S)"
                done = "step {} of {}".format(*ticket.progress)
                self._drop(ticket, JobTimeoutError(f"The job was at {done} after its limit of {limit}."))

    def _step(self, batch: Sequence[Ticket[StateT]], *, is_alone: bool = False) -> None:
        """Run one step of `batch`. If it fails, run each half from the same latents, down to one job.

        `is_alone`: nothing else runs on the device. A job is called too large only if it does not fit then.
        """
        states = [ticket.state for ticket in batch if ticket.state is not None]
        rows = sum(shares := [state.rows for state in states])
        started_s = self._clock()
        self.movement.expect(self._batcher.step_s(batch))
        try:
            failures = self._runner.step(states)
        except BaseException as error:
            if is_machine_fault(error):
                raise
            is_out_of_memory = isinstance(error, OutOfMemoryError)
            if len(batch) == 1 and is_out_of_memory and not is_alone:
                logger.warning(
                    "A step of one job is out of memory: trying it again with nothing else on the device."
                )
                self._decode_stage.wait_until_idle()
                self._step(batch, is_alone=True)
                return
            if len(batch) == 1:
                self._drop(batch[0], as_job_error(batch[0].job, error))
                return
            if is_out_of_memory:
                self._lower_cap(states[0], rows)
            else:
                text = "A step of %d jobs failed (%r): trying each half, to find the job."
                logger.warning(text, len(batch), error)
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                self._step(half)
            return
        self._on_step(rows, shared(batch, shares, started_s, self._clock()))
        for ticket, state, failure in zip(batch, states, failures, strict=True):
            if failure is not None:
                self._drop(ticket, failure)
            else:
                self._batcher.resize(ticket, state.rows, state.text_tokens, state.lora_rows)

    def _lower_cap(self, state: StateT, rows: int) -> None:
        """Remember that `rows` rows of this job's lane do not fit in memory."""
        self._batcher.lower_cap(state.lane, rows)
        cap = self._batcher.cap(state.lane)
        logger.warning("A step of %d rows is out of memory: from now on at most %d at this size.", rows, cap)

    def _decode_finished(self, batch: Iterable[Ticket[StateT]]) -> None:
        finished = [
            ticket
            for ticket in batch
            if ticket in self._batcher and ticket.state and ticket.state.step >= ticket.state.steps
        ]
        for ticket in finished:
            self._batcher.remove(ticket)
        if finished:
            self._decode_stage.add(finished)

    def _drop(self, ticket: Ticket[StateT], error: SmallcatError) -> None:
        """End a job before its last step."""
        self._batcher.remove(ticket)
        self._resolve(ticket, error)

    def _retry_out_of_memory(self) -> None:
        """Prepare or decode again what did not fit in memory beside a step, with nothing beside it."""
        with self._changed:
            tickets = list(self._out_of_memory)
            self._out_of_memory.clear()
        if not tickets:
            return
        logger.warning("%d jobs did not fit in memory beside a step: trying each one alone.", len(tickets))
        # No decode call starts meanwhile: only this thread adds jobs to the stage.
        self._decode_stage.wait_until_idle()
        for ticket in tickets:
            if ticket.is_prepared:
                for outcome in self._decode_stage.decode([ticket], is_alone=True):
                    self._finish(ticket, outcome)
            else:
                self._prepare_stage.prepare(ticket, is_alone=True)

    # The methods below run on any thread.

    def _append(self, tickets: list[Ticket[StateT]], ticket: Ticket[StateT]) -> None:
        """Hand a job to the engine's thread, by one of its lists."""
        with self._changed:
            tickets.append(ticket)
            self._changed.notify_all()

    def _deliver(self, ticket: Ticket[StateT], outcome: Outcome) -> None:
        """Go on with what a job's last step gave, but try again if it did not fit in memory beside a step."""
        if isinstance(outcome, JobTooLargeError) and self._runner.decodes_beside:
            self._append(self._out_of_memory, ticket)
        else:
            self._finish(ticket, outcome)

    def _finish(self, ticket: Ticket[StateT], outcome: Outcome) -> None:
        """End a job with its picture or its error, or let its second pass begin."""
        if isinstance(outcome, FirstPass):
            self._prepare_stage.begin_second(ticket, outcome)
        elif isinstance(outcome, Picture):
            assert ticket.state is not None  # noqa: S101 - it had its last step
            seconds = ticket.device_s, ticket.decode_s(self._clock())
            warnings = (*ticket.state.warnings, *outcome.warnings)
            self._resolve(ticket, Rendered(outcome, warnings, *seconds))
        else:
            self._resolve(ticket, outcome)

    def _resolve(self, ticket: Ticket[StateT], outcome: Rendered | SmallcatError) -> None:
        """End a job: it is no longer in flight, and its future has a result. Every job ends here."""
        with self._changed:
            if self._tickets.get(ticket.job_id) is ticket:
                del self._tickets[ticket.job_id]
            self.movement.moved(has_jobs=bool(self._tickets))
            self._changed.notify_all()
        ticket.resolve(outcome)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """End the loop with `error`."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _give_all_back(self, error: EngineStoppedError) -> None:
        with self._changed:
            self._stopped = True
            tickets = list(self._tickets.values())
            self._tickets.clear()
            self.movement.moved(has_jobs=False)
            self._prepared.clear()
            self._out_of_memory.clear()
            self._changed.notify_all()
        self._decode_stage.stop()
        self._prepare_stage.stop()
        for ticket in tickets:
            ticket.resolve(error)
