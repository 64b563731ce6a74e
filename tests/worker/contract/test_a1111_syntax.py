"""AUTOMATIC1111's syntax as text. Expected values are those of the web UI's own parser, version 1.10.1:
modules/prompt_parser.py, extra_networks.py and processing_scripts/comments.py, run with lark 1.3."""

from __future__ import annotations

import time

import pytest

from worker.contract.a1111_syntax import (
    MAX_OPEN,
    MAX_PARTS,
    MAX_TEXTS,
    check,
    networks,
    parts,
    pieces,
    schedule,
    without_comments,
)
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.job_parameters import MAX_PROMPT
from worker.contract.served_model import Defaults, ServedModel


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(step, ("(b:1.1)", "a")[step % 2]) for step in range(1, 11)]),
        ("[fe|]male", [(step, ("male", "female")[step % 2]) for step in range(1, 11)]),
        ("[a::4]", [(4, "a"), (10, "")]),
        ("[a:b:0.25]", [(2, "a"), (10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-3]", [(10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:1e1]", [(10, "a")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("(a:b:c) [d:3]", [(3, "(a:b:c) "), (10, "(a:b:c) d")]),
        ("a | [b:3]", [(10, "a | [b:3]")]),
        ("(a|b) [c:3]", [(10, "(a|b) [c:3]")]),
        ("[a|b:3] [c:3]", [(10, "[a|b:3] [c:3]")]),
        ("\\[a:b:3\\] [c:3]", [(3, "\\[a:b:3\\] "), (10, "\\[a:b:3\\] c")]),
        ("[c:3] \\", [(10, "[c:3] \\")]),
        ("(x [a:b:3] y:1.2)", [(3, "(x a y:1.2)"), (10, "(x b y:1.2)")]),
        ("", [(10, "")]),
    ],
)
def test_a_text_by_step(text: str, expected: list[tuple[int, str]]) -> None:
    assert schedule(text, 10) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("\\(literal\\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        ("(x: 1.5 )", [("x", 1.5)]),
        ("(x:-1)", [("x", -1.0)]),
        ("x:1.5)", [("x:1.5)", 1.0)]),
        ("[x:1.5]", [("x:1.5", 1 / 1.1)]),
        ("a BREAK  b", [("a", 1.0), (None, -1.0), ("b", 1.0)]),
        ("BREAK", [("", 1.0), (None, -1.0), ("", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("(a BREAK b)", [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)]),
        ("a\\b\\\\", [("ab\\", 1.0)]),
        ("()", [("", 1.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_the_weights_of_a_text(text: str, expected: list[tuple[str | None, float]]) -> None:
    assert [tuple(each) for each in pieces(text)] == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog: -.5 ", [("a cat", 1.2), (" a dog", -0.5)]),
        ("a cat :1.2", [("a cat", 1.2)]),
        ("a (cat:1.2)", [("a (cat:1.2)", 1.0)]),
        ("at 10:30", [("at 10", 30.0)]),
        ("a :1 :2.", [("a :1", 2.0)]),
        ("ANDES AND", [("ANDES", 1.0), ("", 1.0)]),
        ("a\ncat\n:2\n", [("a\ncat", 2.0)]),
        ("a cat <lora:x:0.8>, a dog", [("a cat , a dog", 1.0)]),
    ],
)
def test_the_parts_of_a_prompt(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert [tuple(each) for each in parts(prompt)] == expected


def test_what_is_behind_a_number_sign_is_a_comment() -> None:
    assert without_comments("a cat # small\n# all of it\na dog") == "a cat \n\na dog"
    assert networks("a <lora:x:1> # <lora:y:1>") == ("<lora:x:1>",)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"prompt": "a cat <hypernet:pixel:0.8>"},
            "prompt_syntax is a1111, and the prompt asks for <hypernet:pixel:0.8>: not offered, take it out.",
        ),
        (
            {"prompt": "a cat <LORA:pixel:0.8>"},
            "prompt_syntax is a1111, and the prompt asks for <LORA:pixel:0.8>: write <lora:...> in small",
        ),
        (
            {"prompt": " AND ".join("x" * (MAX_PARTS + 1))},
            "prompt_syntax is a1111, and AND parts the prompt into 17, the limit is 16: take fewer.",
        ),
        (
            {"prompt": "x", "negative_prompt": "(x:1.2.3)"},
            'and the prompt has the weight ":1.2.3)", which is no number: write one such as (x:1.2), or',
        ),
        (
            {"prompt": f"{'x' * 7_000} " + "".join(f"[{n}:{n}]" for n in range(20)), "steps": 30},
            f"the limit is {MAX_TEXTS:,}: let it change less often, or make it shorter.",
        ),
        (
            # One long text among many short ones: all are made as long.
            {"prompt": f"[{'b ' * 3_000}|{'|'.join(f'w{n}' for n in range(148))}]", "steps": 150},
            "the prompt's texts by step have 894,000 characters, each text as long as the longest",
        ),
        ({"prompt": "BREAK " * 200 + "[a|b|c|d|e]", "steps": 5}, "and BREAK as 75, the limit is 64,000"),
        (
            {"prompt": "[" * 101 + "a" + "]" * 101},
            "the prompt has 101 brackets open at a time, the limit is 100: close them sooner, or write",
        ),
        ({"prompt": "x", "negative_prompt": "(a[" * 51}, "the prompt has 102 brackets open at a time"),
        (
            {"prompt": f"a cat AND b :{'9' * 400}"},
            "the weight :inf, the limit is 1,000 with either sign: take a smaller number, or end the prompt",
        ),
        ({"prompt": "a cat :-1001"}, "a part of the prompt ends with the weight :-1001, the limit is 1,000"),
        (
            {"prompt": "a (cat:1001)"},
            "give the weight 1001, the limit is 1,000 with either sign: take a smaller one such as (x:1.2)",
        ),
        ({"prompt": "((a:-100):11)"}, "brackets in the prompt give the weight -1100, the limit is 1,000"),
        # A weight that only some steps have.
        ({"prompt": "(a:1[.|0000])", "steps": 4}, "brackets in the prompt give the weight 10000"),
        ({"prompt": "(a:1.[2.|3]3)", "steps": 4}, 'has the weight ":1.2.3)", which is no number'),
    ],
)
def test_what_is_not_offered_is_refused_by_name(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        Job.parse({**fields, "prompt_syntax": "a1111"})
    assert sentence in str(caught.value)
    assert Job.parse(fields).prompt_syntax == "plain"


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("[" * MAX_OPEN + "a" + "]" * MAX_OPEN, "(a)" * 2_000),
        ("[a]" * 2_000, "\\(" * 2_000),
        ("a :1000 AND (b:-1000)", ""),
        ("x" * 7_990 + "[a|b]", "BREAK " * 1_300),
    ],
)
def test_what_is_at_the_limits_is_taken(prompt: str, negative: str) -> None:
    assert Job.parse({"prompt": prompt, "negative_prompt": negative, "steps": 8, "prompt_syntax": "a1111"})


def test_the_steps_that_a_model_fills_in_count() -> None:
    job = Job.parse({"prompt": "x" * 4_000 + "[a|b|c|d|e|f|g|h|i|j|k|l|m|n|o|p|q]", "prompt_syntax": "a1111"})
    few, many = (
        ServedModel(
            name="m", revision="r", defaults=Defaults(width=64, height=64, steps=steps, guidance_scale=1)
        )
        for steps in (5, 50)
    )
    assert job.resolved(few).steps == 5
    with pytest.raises(InvalidJobError, match="texts by step have"):
        job.resolved(many)


def test_what_cannot_be_a_job_is_refused_in_a_moment() -> None:
    for hostile in ("[" * 3_900 + "a" + "]" * 3_900, "(a" * 4_000, "((a)" * 2_000, "[(" * 4_000):
        started_s = time.process_time()
        with pytest.raises(ValueError, match="brackets open at a time"):
            check(hostile, hostile, 150)
        assert time.process_time() - started_s < 0.1, hostile[:4]


def test_the_number_of_a_part_is_read_as_it_is_found() -> None:
    # str.strip takes this character for white space, float does not.
    assert parts("a cat :\x1c2") == [("a cat", 2.0)]


def test_the_largest_prompts_are_read_in_a_moment() -> None:
    for hostile in (
        "(",
        "[",
        "(a",
        "[a:",
        "[a|",
        "[a:b:0.5]",
        "((a)",
        "a:1 ",
        "\\",
        "<x:",
        "BREAK ",
        "(a:1.1)",
    ):
        prompt = (hostile * MAX_PROMPT)[:MAX_PROMPT]
        started_s = time.process_time()
        for part in parts(prompt):
            schedule(part.text, 150)
            pieces(part.text)
        assert time.process_time() - started_s < 5, hostile
    nested = "[" * 2_000 + "a" + ":1]" * 2_000
    assert schedule(nested, 150)[-1] == (150, "a")
