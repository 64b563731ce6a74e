"""How a run's files are read: what `--check` shows, seeds that are drawn, and runs of an earlier version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from producer.cli.main import cli
from producer.ingest.plan import Plan, Planned, unresolved
from producer.ingest.submit_file import make_plan, make_variants


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checked(*words: str) -> tuple[int, list[str], str]:
    ran = CliRunner().invoke(cli, ["ingest", *words, "--check"], catch_exceptions=False)
    return ran.exit_code, ran.stdout.splitlines(), ran.stderr


def seeds(plan: Plan) -> list[int]:
    return [each.templated.seed for each in plan.items(unresolved) if isinstance(each, Planned)]


def test_check_shows_how_the_first_lines_are_read_and_what_means_nothing_here() -> None:
    lines = ["prompt,steps,customer", *[f"a (red:1.2) cat {n},{n + 1},ann" for n in range(9)], "x,many,bob"]
    Path("p.csv").write_text("\n".join(lines))
    code, said, errors = checked("p.csv")
    assert code == 1
    assert said[0] == "p.csv, line 2: a (red:1.2) cat 0"
    assert "steps 1, " in said[1]
    assert 'metadata {"customer": "ann"}' in said[1]
    assert said[6:] == [
        "to metadata: customer (9 jobs)",
        "(x:1.3) in the prompt: not supported, and only drawn as words. (9 jobs, the first in p.csv, line 2)",
        "9 jobs, 1 bad lines; nothing was sent",
    ]
    assert errors.startswith("p.csv, line 11: steps is 'many'")


def test_check_as_json_is_a_line_for_each_job_and_each_bad_line() -> None:
    lines = ["a cat --seed 3 --steps 9 --cfg_scale 7", "a dog BREAK --seed 4", "a cow --stpes 3"]
    Path("p.txt").write_text("\n".join(lines))
    code, said, errors = checked("p.txt", "--json", "--images", "2")
    jobs = [json.loads(line) for line in said]
    assert code == 1
    cat = {"file": "p.txt", "line": 1, "prompt": "a cat", "seed": 3, "steps": 9, "guidance_scale": 7.0}
    assert jobs[:2] == [cat, cat | {"seed": 4}]
    assert jobs[2]["warnings"] == ["BREAK in the prompt: not supported, and only drawn as words."]
    assert (jobs[4]["line"], jobs[4]["field"]) == (3, "steps")
    assert 'did you mean "steps"' in jobs[4]["reason"]
    assert errors.splitlines()[-1] == "4 jobs, 1 bad lines; nothing was sent"


@pytest.mark.parametrize("how", [["--seed", "-1"], ["--seed-start", "-1"], ["--grid", "seed=-1,-1"]])
def test_a_seed_of_minus_one_is_drawn_and_a_later_call_draws_it_again(how: list[str]) -> None:
    Path("p.txt").write_text("a cat\na dog\n--prompt x --seed -1\n")
    _, first, _ = checked("p.txt", "--json", "--images", "2", *how)
    _, again, _ = checked("p.txt", "--json", "--images", "2", *how)
    found = [json.loads(line)["seed"] for line in first]
    assert first == again
    assert min(found) >= 0
    assert len(set(found)) == len(found) >= 6


def test_a_line_that_wants_any_seed_does_not_get_the_runs_own() -> None:
    Path("p.csv").write_text("prompt,seed\na cat,-1\na dog,\n")
    variants = make_variants({"seed": 5}, 1, None, {}, None, None, literal=False)
    drawn, given = seeds(make_plan(["p.csv"], file_format=None, variants=variants))
    assert (drawn != 5, given) == (True, 5)


@pytest.mark.parametrize("seed", [-2, -3])
def test_a_seed_that_is_none_is_refused_whatever_picture_it_is_for(seed: int) -> None:
    """Its third picture would have the seed 0 or -1, which is one that is drawn."""
    Path("p.csv").write_text(f"prompt,seed\na cat,{seed}\n")
    code, said, errors = checked("p.csv", "--images", "4")
    assert (code, said) == (1, ["0 jobs, 1 bad lines; nothing was sent"])
    assert f"seed is {seed}: it must be greater than or equal to 0" in errors
