"""The embedded stack: `python -m deploy.local` runs Valkey, an S3 server and a worker on free ports.

    python -m deploy.local                  until Ctrl-C; prints the environment to use it
    python -m deploy.local -- CMD ARG...    runs CMD inside a stack of its own, and returns its exit code

Real servers from Python wheels: no root, no Docker. Everything that was started is stopped, however this
ends: at the end of CMD, by Ctrl-C (once: gracefully, twice: at once), SIGTERM or SIGHUP, when a part fails,
and also when this process itself is killed. For development, demos and tests, not for production.

Exit codes: CMD's own; 128 + N when signal N ended it; 3 when a part could not be started or was lost; 2 for
a wrong option.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from deploy.embedded.home import Home, StackError
from deploy.embedded.process import Process
from deploy.embedded.servers import WorkerProcess
from deploy.embedded.stack import Stack

#: Exit code when the stack itself failed.
STACK_FAILED = 3
#: Seconds that CMD gets to end by itself after a signal: first to hear the terminal's own, then ours.
_HEAR_S, _END_S = 2.0, 8.0
#: Seconds between two looks at the logs, with `--logs`.
_LOGS_EVERY_S = 0.2
#: Left in the user's shell, these would go before or spoil what the stack prints.
_IN_THE_WAY = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "S3_PREFIX")


class Interrupted(BaseException):
    """Raised in the main thread by the first signal that asks the stack to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into `Interrupted`, and later ones into `hurry()`.

    After `disarm` every signal means `hurry()`: so the first exception cannot be overtaken by a second one,
    and stopping is never cut short by an exception.
    """

    def __init__(self, hurry: Callable[[], None]) -> None:
        self._hurry = hurry
        self._armed = True
        self._holding = False
        self._held: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Ignored by whoever started us (nohup, a background job): then it stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def disarm(self) -> None:
        """From now on, raise nothing."""
        self._armed = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it, the first signal is kept, and raised when what is inside is done: not half of it."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._held is not None:
            raise Interrupted(self._held)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            self._hurry()
            return
        self._armed = False
        if not self._holding:
            raise Interrupted(number)
        self._held = number


class _Command:
    """CMD, with this process' own input and output.

    At a terminal it stays in the foreground process group, so that Ctrl-C, Ctrl-Z and reading from the
    keyboard work as without a stack. Elsewhere it has a group of its own, and signals are passed on to it.
    """

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], home: Home, on_end: Callable[[], None]
    ) -> None:
        """Raises `OSError` when there is no such program."""
        self._shared = os.isatty(0)
        self._popen = subprocess.Popen(argv, env=dict(environment), process_group=None if self._shared else 0)
        home.order(f"{'process' if self._shared else 'group'} {self._popen.pid}")
        self._home = home
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=[on_end], name="watch command", daemon=True).start()

    @property
    def code(self) -> int:
        """Exit code as a shell gives it: 128 + N after signal N. Known when the command has ended."""
        code = self._popen.returncode
        return code if code >= 0 else 128 - code

    def end(self, number: int) -> None:
        """Have the command end because of signal `number`, and return when it has."""
        heard = self._shared and number == signal.SIGINT and self._ended.wait(_HEAR_S)
        if not heard:
            # Not SIGINT again: a program that is busy with the first one would be cut short by a second.
            self._signal(signal.SIGTERM if self._shared else number)
        if not self._ended.wait(_END_S):
            self.kill_now()
            self._ended.wait()

    def kill_now(self) -> None:
        """Send SIGKILL, without waiting."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                (os.kill if self._shared else os.killpg)(self._popen.pid, number)

    def _watch(self, on_end: Callable[[], None]) -> None:
        self._popen.wait()
        if not self._shared:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)  # what it left in the background
        self._home.order(f"forget {self._popen.pid}")
        self._ended.set()
        on_end()


class _Session:
    """One run of the program: a stack, perhaps a command in it, and the user in front of it."""

    def __init__(self, stack: Stack, console: Console, *, hold: bool) -> None:
        self._stack = stack
        self._console = console
        self._hold = hold and os.isatty(0)
        self._command: _Command | None = None
        #: What happens while we wait: a lost part, or None for the end of the command.
        self._news: queue.SimpleQueue[Process | None] = queue.SimpleQueue()
        stack.on_loss = self._news.put

    def run(self, argv: Sequence[str], signals: _Signals) -> int:
        """Start the stack, run `argv` in it or wait for a signal; the exit code. The stack is left running.

        Raises `StackError` and `Interrupted`.
        """
        status = self._console.status("Starting the queue and the bucket")
        with status if self._console.is_terminal else contextlib.nullcontext():
            self._stack.start(lambda part: self._started(part, status.update))
        if not argv:
            return self._serve()
        code = self._run(argv, signals)
        if self._hold and code == 0:
            self._hold_on()
        return code

    def hurry(self) -> None:
        """The user is out of patience: end everything at once."""
        if self._command is not None:
            self._command.kill_now()
        self._stack.kill_now()

    def _started(self, part: Process, update: Callable[[str], None]) -> None:
        if isinstance(part, WorkerProcess):
            for line in part.choices():
                self._note(f"  {line}")
        self._note(f"{part.name} is ready.")
        update("Loading the model")

    def _note(self, line: str) -> None:
        """Say something that is of interest to a person in front of a terminal, and to nobody else."""
        if self._console.is_terminal:
            self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _serve(self) -> int:
        """Print the environment, and wait. A signal is the normal end: exit code 0."""
        with contextlib.suppress(Interrupted):
            print(exports(self._stack.coordinates), flush=True)
            self._note("The stack is up; Ctrl-C stops it.")
            while (part := self._news.get()) is None:
                pass
            raise part.lost()
        return 0

    def _run(self, argv: Sequence[str], signals: _Signals) -> int:
        try:
            with signals.held():
                # A signal that came in the midst of this would leave a command that nobody knows.
                self._command = _Command(
                    argv, self._stack.environment, self._stack.home, on_end=lambda: self._news.put(None)
                )
            part = self._news.get()
        except OSError as error:
            # The codes that a shell gives: there is no such program, or it is none.
            complain(self._console, f"{argv[0]} cannot be run: {error.strerror}.")
            return 127 if isinstance(error, FileNotFoundError) else 126
        except Interrupted as interruption:
            assert self._command is not None  # noqa: S101 - it is raised when there is one
            self._command.end(interruption.number)
            raise
        if part is not None:
            self._command.end(signal.SIGTERM)
            raise part.lost()
        return self._command.code

    def _hold_on(self) -> None:
        """Keep the stack up until Enter or a signal, so that links to the bucket can be opened."""
        with contextlib.suppress(Interrupted):
            self._note("The stack stays up. To use it from another terminal:")
            print(exports(self._stack.coordinates), flush=True)
            self._console.input("[dim]Press Enter to stop it. [/dim]")


def exports(coordinates: Mapping[str, str]) -> str:
    """Lines for a shell that make it use the stack at `coordinates`."""
    unset = [f"unset {name}" for name in _IN_THE_WAY if name in os.environ]
    return "\n".join(unset + [f"export {name}={shlex.quote(value)}" for name, value in coordinates.items()])


def complain(console: Console, text: str) -> None:
    """Say what went wrong, as it is: paths and brackets are no markup, and long lines stay whole."""
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _stream(stack: Stack, console: Console, over: threading.Event) -> None:
    """Print the logs of all parts as they grow, until `over`."""
    shown: dict[str, int] = {}
    while True:
        last = over.wait(_LOGS_EVERY_S)
        for part in stack.parts:
            lines = part.output().splitlines()
            for line in lines[shown.get(part.name, 0) :]:
                console.print(f"{part.name:8} {line}", markup=False, highlight=False, soft_wrap=True)
            shown[part.name] = len(lines)
        if last:
            return


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Workers to start; each takes a GPU of its own where there are any.",
)
@click.option("--no-worker", is_flag=True, help="Start queue and bucket only.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep queue, pictures and logs in DIR between runs. Not set: nothing is kept.",
)
@click.option("--logs", is_flag=True, help="Show what the parts log.")
@click.option("--hold", is_flag=True, help="After CMD, stay up until Enter is pressed; only at a terminal.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD ARG...]")
def main(
    workers: int, no_worker: bool, data: Path | None, logs: bool, hold: bool, command: tuple[str, ...]
) -> None:
    """Run Valkey, an S3 server and a worker on free ports, and CMD inside them.

    Without CMD, print the environment to use them, and stay until Ctrl-C.
    """
    console = Console(stderr=True)
    try:
        stack = Stack(0 if no_worker else workers, data)
    except (StackError, OSError) as error:
        complain(console, str(error))
        sys.exit(STACK_FAILED)
    sys.exit(_supervise(stack, _Session(stack, console, hold=hold), command, console, logs=logs))


def _supervise(stack: Stack, session: _Session, argv: Sequence[str], console: Console, *, logs: bool) -> int:
    """Run `session` and stop `stack`, whatever happens; the exit code."""
    over = threading.Event()
    stream = threading.Thread(target=_stream, args=[stack, console, over], name="logs", daemon=True)
    if logs:
        stream.start()
    signals = _Signals(session.hurry)
    complaint = ""
    try:
        try:
            code = session.run(argv, signals)
        except StackError as error:
            code, complaint = STACK_FAILED, str(error)
        signals.disarm()
    except Interrupted as interruption:
        code = 128 + interruption.number
    over.set()
    if logs:
        stream.join()
    stack.stop()
    # The terminal may be gone by now.
    with contextlib.suppress(OSError):
        if complaint:
            complain(console, complaint)
    return code


if __name__ == "__main__":
    main()
