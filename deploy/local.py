"""The embedded stack: `python -m deploy.local` runs Valkey, an S3 server, a worker and the HTTP API.

    python -m deploy.local                  until Ctrl-C; prints the environment to use it
    python -m deploy.local -- CMD ARG...    runs CMD inside a stack of its own, and returns its exit code;
                                            this interpreter's programs, such as smallcat, are on its PATH

Real servers from Python wheels, on free ports: no root, no Docker. Everything that was started is stopped,
however this ends: at the end of CMD, by Ctrl-C (once: gracefully, twice: at once), SIGTERM or SIGHUP, when a
part fails, and also when this process itself is killed. For development, demos and tests, not for production.

Exit codes: CMD's own; 128 + N when signal N ended it; 3 when a part could not be started or ended by itself;
2 for a wrong option, or where somebody's worker.py hides ours.
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

from deploy.embedded.home import Home, StackError, write_privately
from deploy.embedded.process import Process
from deploy.embedded.servers import WorkerProcess
from deploy.embedded.stack import Stack

#: Exit code when the stack itself failed.
STACK_FAILED = 3
#: Seconds that CMD has to end after the terminal's own SIGINT, and then after a signal of ours.
_TERMINAL_GRACE_S, _GRACE_S = 2.0, 8.0
#: Seconds between two reads of the logs, with `--logs`.
_LOGS_EVERY_S = 0.2
#: The file in a kept folder that a shell reads to use the stack: `source .smallcat/env`.
ENV_FILE = "env"
#: Variables that would override what the stack prints, if they were left in the user's shell.
_OVERRIDES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "S3_PREFIX")


class Interrupted(BaseException):
    """Raised in the main thread by the first signal that asks the stack to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """Raises `Interrupted` at the first SIGINT, SIGTERM or SIGHUP, and calls `kill` at each later one.

    After `disarm` every signal calls `kill`: no second exception can replace the first one, and none can
    interrupt the stopping.
    """

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self._armed = True
        self._deferring = False
        self._deferred: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup and shells' background jobs start us with signals ignored: they stay ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def disarm(self) -> None:
        """From now on, raise nothing."""
        self._armed = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A context that is never interrupted: a signal within it raises `Interrupted` at its end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._deferred is not None:
            raise Interrupted(self._deferred)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            self._kill()
            return
        self._armed = False
        if not self._deferring:
            raise Interrupted(number)
        self._deferred = number


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
        home.tell_guard(f"{'process' if self._shared else 'group'} {self._popen.pid}")
        self._home = home
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=[on_end], name="watch command", daemon=True).start()

    @property
    def code(self) -> int:
        """Exit code as a shell gives it: 128 + N after signal N. Valid when the command has ended."""
        code = self._popen.returncode
        return code if code >= 0 else 128 - code

    def end(self, number: int) -> None:
        """End the command because of signal `number`, by force if it takes too long; return when it ended."""
        by_terminal = self._shared and number == signal.SIGINT and self._ended.wait(_TERMINAL_GRACE_S)
        if not by_terminal:
            # Not SIGINT again: many programs end without cleaning up at a second one.
            self._signal(signal.SIGTERM if self._shared else number)
        if not self._ended.wait(_GRACE_S):
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
        self._home.tell_guard(f"forget {self._popen.pid}")
        self._ended.set()
        on_end()


class _Session:
    """One run of the program: a stack, and the command in it if there is one."""

    def __init__(self, stack: Stack, console: Console, *, hold: bool) -> None:
        self._stack = stack
        self._console = console
        self._hold = hold and os.isatty(0)
        self._command: _Command | None = None
        #: What ends the waiting: a part that ended by itself, or None for the end of the command.
        self._events: queue.SimpleQueue[Process | None] = queue.SimpleQueue()
        stack.on_loss = self._events.put

    def run(self, argv: Sequence[str], signals: _Signals) -> int:
        """Start the stack, run `argv` in it or wait for a signal, and return the exit code.

        The stack is left running. Raises `StackError` and `Interrupted`.
        """
        status = self._console.status("Starting the queue and the bucket")
        with status if self._console.is_terminal else contextlib.nullcontext():
            self._stack.start(lambda part: self._started(part, status.update))
        if self._stack.home.kept:
            # The overrides are unset in any shell: which one will read it is not known.
            text = "".join(f"unset {name}\n" for name in _OVERRIDES) + exports(self._stack.variables) + "\n"
            write_privately(self._stack.home.path / ENV_FILE, text)
        if not argv:
            return self._serve()
        code = self._run(argv, signals)
        if self._hold and code == 0:
            self._wait_for_enter()
        return code

    def kill_now(self) -> None:
        """Send SIGKILL to the command and to all parts, without waiting."""
        if self._command is not None:
            self._command.kill_now()
        self._stack.kill_now()

    def _started(self, part: Process, update: Callable[[str], None]) -> None:
        if isinstance(part, WorkerProcess):
            for line in part.choices():
                self._print_note(f"  {line}")
        self._print_note(f"{part.name} is ready.")
        update("Loading the model")

    def _print_note(self, line: str) -> None:
        """Print `line` where standard error is a terminal: it is for people, not for logs."""
        if self._console.is_terminal:
            self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _serve(self) -> int:
        """Print the environment, and wait. A signal is the normal end: exit code 0."""
        with contextlib.suppress(Interrupted):
            print(exports(self._stack.variables), flush=True)
            if self._stack.home.kept:
                file = shlex.quote(str(self._stack.home.path / ENV_FILE))
                self._print_note(f"In another terminal: source {file}")
            if self._stack.http is not None:
                self._print_note(f"The page: {self._stack.http.url}")
                self._print_note("The HTTP API has the same address; SMALLCAT_HTTP_KEY is the key of both.")
                self._print_note(
                    "It tells webhooks, also on this machine; SMALLCAT_WEBHOOK_SECRET verifies them."
                )
            self._print_note("The stack is up; Ctrl-C stops it.")
            while (part := self._events.get()) is None:
                pass
            raise part.loss()
        return 0

    def _run(self, argv: Sequence[str], signals: _Signals) -> int:
        try:
            with signals.deferred():
                # An exception between the start and the assignment would leave the command running.
                self._command = _Command(
                    argv,
                    with_own_programs(self._stack.environment),
                    self._stack.home,
                    on_end=lambda: self._events.put(None),
                )
            part = self._events.get()
        except OSError as error:
            # As a shell: 127 where there is no such program, 126 where it cannot be executed.
            print_error(
                self._console,
                f"{argv[0]} cannot be run: {error.strerror}. Check its name, and that it can be executed.",
            )
            return 127 if isinstance(error, FileNotFoundError) else 126
        except Interrupted as interruption:
            assert self._command is not None  # noqa: S101 - `deferred` raises after the assignment
            self._command.end(interruption.number)
            raise
        if part is not None:
            self._command.end(signal.SIGTERM)
            raise part.loss()
        return self._command.code

    def _wait_for_enter(self) -> None:
        """Keep the stack up until Enter or a signal, so that links to the bucket can be opened."""
        with contextlib.suppress(Interrupted):
            self._print_note("The stack stays up. To use it from another terminal:")
            print(exports(self._stack.variables), flush=True)
            self._console.input("[dim]Press Enter to stop it. [/dim]")


def with_own_programs(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with this interpreter's programs, such as smallcat, first on PATH."""
    own = str(Path(sys.executable).parent)
    return {**environment, "PATH": os.pathsep.join((own, environment.get("PATH", os.defpath)))}


def exports(variables: Mapping[str, str]) -> str:
    """Lines for a shell that set `variables`, and unset what would override them."""
    unset = [f"unset {name}" for name in _OVERRIDES if name in os.environ]
    return "\n".join(unset + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()])


def print_error(console: Console, text: str) -> None:
    """Print `text` in red and unchanged: brackets are not markup, and long lines are not wrapped."""
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _print_logs(stack: Stack, console: Console, ended: threading.Event) -> None:
    """Print the logs of all parts as they grow, until `ended` is set."""
    shown: dict[str, int] = {}
    while True:
        last = ended.wait(_LOGS_EVERY_S)
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
    help="Workers to start. Each takes a GPU of its own where there are GPUs.",
)
@click.option("--no-worker", is_flag=True, help="Start queue and bucket only.")
@click.option("--no-http", is_flag=True, help="Start no HTTP API.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep queue, pictures, logs, ports and keys in DIR between runs, and write DIR/env for `source`. "
    "Not set: nothing is kept.",
)
@click.option("--logs", is_flag=True, help="Show what the parts log.")
@click.option("--hold", is_flag=True, help="After CMD, stay up until Enter is pressed; only at a terminal.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD ARG...]")
def main(
    workers: int,
    no_worker: bool,
    no_http: bool,
    data: Path | None,
    logs: bool,
    hold: bool,
    command: tuple[str, ...],
) -> None:
    """Run Valkey, an S3 server, a worker and the HTTP API on free ports, and CMD inside them.

    Without CMD, print the environment to use them, and stay until Ctrl-C.
    """
    _refuse_strangers()
    console = Console(stderr=True)
    try:
        has_http = not (no_worker or no_http)
        stack = Stack(0 if no_worker else workers, data, http=has_http, webhooks=has_http)
    except (StackError, OSError) as error:
        print_error(console, str(error))
        sys.exit(STACK_FAILED)
    sys.exit(_supervise(stack, _Session(stack, console, hold=hold), command, console, logs=logs))


def _refuse_strangers() -> None:
    """Exit where another `worker` or `producer` hides smallcat's: the stack's processes would load that."""
    try:
        import smallcat  # noqa: F401
    except ImportError as error:
        print(f"smallcat: {error}", file=sys.stderr)
        sys.exit(2)


def _supervise(stack: Stack, session: _Session, argv: Sequence[str], console: Console, *, logs: bool) -> int:
    """Run `session`, stop `stack` whatever happens, and return the exit code."""
    ended = threading.Event()
    printer = threading.Thread(target=_print_logs, args=[stack, console, ended], name="logs", daemon=True)
    if logs:
        printer.start()
    signals = _Signals(session.kill_now)
    failure = ""
    try:
        try:
            code = session.run(argv, signals)
        except StackError as error:
            code, failure = STACK_FAILED, str(error)
        signals.disarm()
    except Interrupted as interruption:
        code = 128 + interruption.number
    ended.set()
    if logs:
        printer.join()
    stack.stop()
    # The terminal may be gone by now.
    with contextlib.suppress(OSError):
        if failure:
            print_error(console, failure)
    return code


if __name__ == "__main__":
    main()
