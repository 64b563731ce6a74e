"""What a run pins once: its model, and the syntax of its prompts."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from producer.ingest.pinned import Pinned
from worker.contract.choices import PromptSyntax
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import NO_FILES, FileEntry, FileIndex
from worker.contract.job import Job
from worker.contract.served_model import Defaults, ServedModel
from worker.state.groups import Meant

SERVED = ServedModel(
    name="m", revision="r", defaults=Defaults(width=64, height=64, steps=4, guidance_scale=7.5)
)
LARGE = SERVED.model_copy(update={"defaults": Defaults(width=1024, height=1024, steps=4, guidance_scale=7)})
IMAGE = f"sha256:{'ab' * 32}:640x480"


class Notes:
    """A run's notes, as Redis keeps them."""

    id = "run"

    def __init__(self, notes: dict[str, str]) -> None:
        self.notes = notes

    def note_once(self, name: str, value: str) -> str:
        return self.notes.setdefault(name, value)

    def noted(self, name: str) -> str | None:
        return self.notes.get(name)


def pinned(
    notes: dict[str, str],
    syntax: PromptSyntax,
    index: FileIndex = NO_FILES,
    served: ServedModel = SERVED,
) -> Pinned:
    run: Any = Notes(notes)
    fleet: Any = SimpleNamespace(meant=lambda job: Meant(served, syntax, index))
    return Pinned(run, fleet)


@pytest.mark.parametrize("first", PromptSyntax)
def test_a_run_keeps_the_fleets_syntax_that_it_began_with(first: PromptSyntax) -> None:
    notes: dict[str, str] = {}
    job = Job(prompt="a (cat:1.3)", seed=1)
    assert pinned(notes, first).resolve(job).prompt_syntax is first
    for later in PromptSyntax:
        assert pinned(notes, later).resolve(job).prompt_syntax is first
        for said in PromptSyntax:
            own = Job(prompt="a", seed=1, prompt_syntax=said)
            assert pinned(notes, later).resolve(own).prompt_syntax is said


def test_a_run_that_an_earlier_version_pinned_stays_plain() -> None:
    pin = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 7.5, "model": "m", "revision": "r"}
    notes = {f"model:{json.dumps(('default', ''))}": json.dumps(pin)}
    resolved = pinned(notes, PromptSyntax.A1111).resolve(Job(prompt="a (cat:1.3)", seed=1))
    assert (resolved.prompt_syntax, resolved.steps, resolved.model) == ("plain", 4, "m")
    # And nothing new is pinned where the fleet is plain: earlier versions read it.
    fresh: dict[str, str] = {}
    pinned(fresh, PromptSyntax.PLAIN).resolve(Job(prompt="a", seed=1))
    assert json.loads(next(iter(fresh.values()))) == pin


def test_what_is_foreseen_is_what_a_run_would_pin_or_has_pinned() -> None:
    notes: dict[str, str] = {}
    job = Job(prompt="a (cat:1.3)", seed=1)
    foreseen = pinned(notes, PromptSyntax.A1111).foreseen(job)
    assert not notes
    assert foreseen == pinned(notes, PromptSyntax.A1111).resolve(job)
    assert pinned(notes, PromptSyntax.PLAIN).foreseen(job) == foreseen


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"upscale": 2, "upscale_strength": 0.2}, "upscale_strength is 0.2, which leaves none of 4 steps"),
        ({"upscale": 4}, "upscale is 4, which makes 4096x4096 px of 1024x1024"),
        ({"image": IMAGE, "strength": 0.2}, "strength is 0.2, which leaves none of 4 steps"),
        ({"scheduler": "dpmpp_2m", "schedule": "align_your_steps"}, "steps is 4"),
    ],
)
def test_a_run_refuses_what_its_model_cannot_draw_as_whoever_submits_it_does(
    fields: dict[str, Any], sentence: str
) -> None:
    """No worker would read its message."""
    job = Job.parse({"prompt": "a cat", "seed": 1} | fields)
    with pytest.raises(InvalidJobError) as caught:
        pinned({}, PromptSyntax.PLAIN, served=LARGE).resolve(job)
    assert sentence in str(caught.value)
    with pytest.raises(InvalidJobError, match=re.escape(str(caught.value))):
        job.resolved(LARGE)


def test_a_run_keeps_the_files_that_it_began_with() -> None:
    """Although the one of that name was replaced since, and Redis has the index of then no longer."""
    notes: dict[str, str] = {}
    first, second = (
        FileIndex.of([FileEntry(kind="embedding", name="x", sha256=digits * 32)]) for digits in ("aa", "bb")
    )
    job = Job(prompt="a <x>", seed=1)
    resolved = pinned(notes, PromptSyntax.PLAIN, first).resolve(job)
    assert resolved.file_hashes == {"embedding:x": "aa" * 32}
    resumed = pinned(notes, PromptSyntax.PLAIN, second)
    assert resumed.resolve(job) == resolved
    assert resumed.resolver.names(job).may_be_in("a <x>")
    assert pinned({}, PromptSyntax.PLAIN, second).foreseen(job).id != resolved.id


def test_a_run_refuses_a_lora_for_another_architecture_also_when_it_is_resumed() -> None:
    index = FileIndex.of([FileEntry(kind="lora", name="x", sha256="aa" * 32, architecture="SD 1.x")])
    notes: dict[str, str] = {}
    job = Job.parse({"prompt": "a cat", "seed": 1, "loras": "x"})
    served = SERVED.model_copy(update={"architecture": "SDXL"})
    for known in (served, SERVED):
        with pytest.raises(
            InvalidJobError, match=r'loras has the LoRA "x", which is for SD 1\.x, and the model'
        ):
            pinned(notes, PromptSyntax.PLAIN, index, known).resolve(job)
    # A run that an earlier version pinned does not know it.
    (key, pin), *_ = notes.items()
    earlier = {name: value for name, value in json.loads(pin).items() if name != "architecture"}
    assert pinned({key: json.dumps(earlier)}, PromptSyntax.PLAIN, index, served).resolve(job).loras
