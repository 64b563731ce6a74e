"""What `smallcat submit` says at once of a job: of its prompts, and of who serves it."""

from __future__ import annotations

import difflib

from producer.cli import local_stack
from producer.cli.json_output import say
from producer.client import JobHandle
from producer.session import session
from worker.contract.choices import PromptSyntax
from worker.contract.file_index import NO_FILES
from worker.contract.job_files import unknown_warnings
from worker.contract.prompt_syntax import (
    UNUSED_NEGATIVE,
    has_unused_negative,
    only_words,
    only_words_in,
    only_words_warning,
)
from worker.contract.record import State

#: Characters of a model's name that are compared with others.
_LONGEST = 200


def of_prompts(handle: JobHandle, prompt: str, negative: str | None) -> frozenset[str]:
    """Say what of the prompts no picture shows. Raises `QueueError`.

    Returns the warnings of the job's record that say the same: nobody needs them twice.
    """
    said = set()
    found = only_words(prompt, negative)
    if found and handle.record().job.prompt_syntax is PromptSyntax.PLAIN:
        texts = only_words_in(prompt, negative or "")
        say(f"note  {only_words_warning(found, texts, '--prompt-syntax a1111')}", err=True)
        said.add(only_words_warning(found, texts))
    if "<" in prompt or "<" in (negative or ""):
        job, now = handle.record().job, session()
        with now.queue_errors():
            meant = now.fleet.meant(job)
        for warning in unknown_warnings(job, meant.index if meant else NO_FILES):
            say(f"note  {warning}", err=True)
            said.add(warning)
    # Whether there is guidance may be for the model to say.
    if negative and has_unused_negative(vars(handle.record().job)):
        say(f"note  {UNUSED_NEGATIVE}", err=True)
        said.add(UNUSED_NEGATIVE)
    return frozenset(said)


def of_workers(handle: JobHandle, *, waits: bool) -> None:
    """Say at once that no worker serves the job, and what the live workers serve.

    Where somebody `waits`, the display says the first. Of a job that waits for another nothing is said: who
    serves it is looked at when it is queued.
    """
    progress = handle.progress()
    note = progress.note
    if not note or progress.state is State.WAITING:
        return
    now = session()
    with now.queue_errors():
        served = sorted({group.served.name for group in now.fleet.groups()})
    if not waits:
        say(f"note  {note}", err=True)
    if served:
        near = difflib.get_close_matches(handle.record().job.model[:_LONGEST], served, 1)
        meant = f" Did you mean --model {near[0]}?" if near and near[0] != handle.record().job.model else ""
        say(f"note  The live workers serve {', '.join(served)}.{meant}", err=True)
    elif text := local_stack.hint():
        say(f"note  {text}", err=True)
