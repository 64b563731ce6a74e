from __future__ import annotations

import pytest

from worker.contract.job import Job
from worker.contract.prompt_syntax import (
    COMMENT_IN_A1111,
    ONLY_COMMENTS,
    UNUSED_NEGATIVE,
    UNUSED_RESCALE,
    only_words,
    warnings_of,
)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("a (red:1.3) cat", ("(x:1.3)",)),
        ("a (very red, big : .5 ) cat", ("(x:1.3)",)),
        ("a cat <lora:pixel:0.8>", ("<lora:...>",)),
        ("<LoRA:pixel>", ("<lora:...>",)),
        ("a cat BREAK a dog AND a cow", ("BREAK", "AND")),
        ("a [cat:dog:0.5]", ("[x:y:0.5]",)),
        ("a cat, breakfast and a BRAND, (red) [blue], \\(x:1\\), at 10:30", ()),
    ],
)
def test_what_is_only_drawn_as_words_is_named(prompt: str, names: tuple[str, ...]) -> None:
    assert only_words(prompt) == names
    assert only_words("x", prompt) == names


def test_a_job_gets_one_warning() -> None:
    [warning] = warnings_of(Job(prompt="a (cat:1.2) AND a dog", negative_prompt="(x:2)"))
    assert warning == (
        "(cat:1.2), AND in the prompt: only drawn as words, since its syntax is plain. "
        "prompt_syntax a1111 reads them."
    )
    assert not warnings_of(Job(prompt="a cat and a dog"))
    [warning] = warnings_of(Job(prompt="a cat", negative_prompt=f"({'x' * 90}:1.2)"))
    assert warning.startswith(f"({'x' * 36}... in the prompt")


def test_it_takes_linear_time() -> None:
    only_words("(:" * 500_000, "[:1" * 500_000, "<lora:" * 300_000, "(" + ":1" * 500_000)


def test_a_record_warns_of_an_unused_negative_prompt() -> None:
    job = Job(prompt="a cat", negative_prompt="blurry", guidance_scale=1.0)
    assert warnings_of(job) == (UNUSED_NEGATIVE,)
    rescaled = Job.parse({"prompt": "x", "guidance_rescale": 0.5, "guidance_scale": 1.0})
    assert warnings_of(rescaled) == (UNUSED_RESCALE,)
    assert warnings_of(Job.parse({"prompt": "x", "guidance_rescale": 0.5})) == ()
    assert warnings_of(job.model_copy(update={"guidance_scale": 1.5})) == ()


def test_comments_that_a1111_leaves_out_are_warned_of() -> None:
    def warned(prompt: str, negative: str = "") -> tuple[str, ...]:
        fields = {"prompt": prompt, "negative_prompt": negative, "prompt_syntax": "a1111"}
        return warnings_of(Job.parse(fields))

    assert warned("a cat #3") == warned("a cat", "b # c") == (COMMENT_IN_A1111,)
    assert warned("#all comment") == (COMMENT_IN_A1111, ONLY_COMMENTS)
    assert warned("a cat") == ()
    assert warnings_of(Job(prompt="a cat #3")) == ()
