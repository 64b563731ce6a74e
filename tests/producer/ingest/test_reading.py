"""How a run's files are read: what `--check` shows, refuses and warns of, and seeds that are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deploy.embedded.servers import ValkeyProcess
from producer.cli.ingest_display import QuietDisplay
from producer.cli.main import cli
from producer.ingest.check import refuse_bad_lines
from producer.ingest.message_templates import resolver_of
from producer.ingest.plan import Plan, Planned, Rejected, unresolved
from producer.ingest.submit_file import grid_of, make_ingest, make_plan, make_variants
from producer.ingest.types import Options
from producer.prompts.variants import Variants
from tests.fast_worker import SERVED
from worker.contract.choices import PromptSyntax
from worker.contract.errors import PromptFileError
from worker.contract.file_index import NO_FILES, FileEntry, FileIndex, Kind
from worker.contract.job import FORMAT_VERSION, Job
from worker.contract.prompt_syntax import COMMENT_IN_A1111, UNUSED_NEGATIVE, only_words_warning
from worker.state.fleet import FleetSnapshot
from worker.state.groups import WorkerInfo, groups_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("producer.cli.ingest_check._snapshot", lambda: FleetSnapshot((), (), {}))


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
        f"{only_words_warning(('(x:1.3)',))} (9 jobs, the first in p.csv, line 2)",
        "9 jobs, 1 bad line; nothing was sent",
    ]
    assert errors.startswith("p.csv, line 11: steps is 'many'")


def test_check_as_json_is_a_line_for_each_job_and_each_bad_line() -> None:
    lines = ["a cat --seed 3 --steps 9 --cfg_scale 7", "a dog BREAK --prompt_syntax plain", "a cow --stpes 3"]
    Path("p.txt").write_text("\n".join(lines))
    code, said, errors = checked("p.txt", "--json", "--images", "2")
    jobs = [json.loads(line) for line in said]
    assert code == 1
    cat = {"file": "p.txt", "line": 1, "prompt": "a cat", "seed": 3, "steps": 9, "guidance_scale": 7.0}
    cat |= {"prompt_syntax": "a1111"}
    assert jobs[:2] == [cat, cat | {"seed": 4}]
    assert jobs[2]["warnings"] == [
        "BREAK in the prompt: only drawn as words, since its syntax is plain. prompt_syntax a1111 reads them."
    ]
    assert (jobs[4]["line"], jobs[4]["field"]) == (3, "steps")
    assert 'did you mean "steps"' in jobs[4]["reason"]
    assert errors.splitlines()[-1] == "4 jobs, 1 bad line; nothing was sent"


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
    assert (code, said) == (1, ["0 jobs, 1 bad line; nothing was sent"])
    assert f"seed is {seed}: it must be 0 to {2**63 - 1:,}, or -1 for a drawn one" in errors


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--name", "{lin}.png", "--download", "d"], "has the field 'lin'"),
        (["--name", "../{line}.png", "--download", "d"], "leads out of the folder"),
        (["--name", "{line}.png"], "add a folder with download"),
        (["--run", "My Run"], "use up to 40 lower-case letters"),
        (["--max-queued", "0"], "it must be at least 1"),
    ],
)
def test_check_looks_at_the_options_too(options: list[str], refusal: str) -> None:
    Path("p.txt").write_text("a cat\n")
    with pytest.raises(PromptFileError, match=refusal):
        checked("p.txt", *options)


def test_the_manifests_folder_is_made(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    Path("p.txt").write_text("a cat\n")
    plan = make_plan(["p.txt"], file_format=None, variants=variants())
    make_ingest(plan, Options(Path("out/of/m.csv")), QuietDisplay())
    assert Path("out/of").is_dir()
    Path("file").touch()
    with pytest.raises(
        PromptFileError, match=r"file/m\.csv cannot be written: (File exists|Not a directory)"
    ):
        make_ingest(plan, Options(Path("file/m.csv")), QuietDisplay())


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("promt,seed\na cat,7\n", 'rename "promt" to "prompt".'),
        (
            "what,seed\na cat,7\n",
            'rename one of them to "prompt". Where this line is a prompt and no heading, put',
        ),
        ("a cat\na dog\n", "put a line with headings above it."),
    ],
)
def test_a_table_without_prompts_is_refused_with_advice_that_loses_none(text: str, advice: str) -> None:
    Path("p.csv").write_text(text)
    with pytest.raises(PromptFileError) as refused:
        checked("p.csv")
    assert advice in str(refused.value)


@pytest.mark.parametrize(
    ("line", "is_unused"),
    [
        ("a cat,blurry,1,,", True),
        ("a cat,blurry,0.5,,", True),
        ("a cat,blurry,7,0.5,0.5", True),
        ("a cat,blurry,7,0,1", False),
        ("a cat,blurry,,,", False),
        ("a cat,,1,,", False),
    ],
)
def test_a_negative_prompt_without_guidance_is_warned_of(line: str, is_unused: bool) -> None:
    heading = "prompt,negative_prompt,guidance_scale,guidance_start,guidance_stop"
    Path("p.csv").write_text(f"{heading}\n{line}\n{line}\n")
    _, said, _ = checked("p.csv")
    expected = f"{UNUSED_NEGATIVE} (2 jobs, the first in p.csv, line 2)"
    assert (expected in said) == is_unused
    _, jobs, _ = checked("p.csv", "--json")
    assert json.loads(jobs[0]).get("warnings") == ([UNUSED_NEGATIVE] if is_unused else None)
    warned: list[str] = []
    plan = make_plan(["p.csv"], file_format=None, variants=variants())
    list(plan.items(unresolved, warn=warned.append))
    assert warned == ([f"p.csv, line 2: {UNUSED_NEGATIVE}"] if is_unused else [])


def variants() -> Variants:
    return make_variants({}, 1, None, {}, None, None, literal=False)


# The syntax of prompts.


def syntaxes(plan: Plan) -> list[str]:
    jobs = (each.templated for each in plan.items(unresolved) if isinstance(each, Planned))
    return [json.loads(job.job).get("prompt_syntax", "plain") for job in jobs]


def a_plan(text: str, **fields: Any) -> Plan:
    Path("p.txt").write_text(text)
    return make_plan(
        ["p.txt"], file_format=None, variants=make_variants(fields, 1, 0, {}, None, None, literal=False)
    )


def test_a_text_file_with_options_in_any_line_is_in_the_syntax_of_who_has_such_files() -> None:
    assert syntaxes(a_plan("a (cat:1.3)\na dog --steps 9\n")) == ["a1111", "a1111"]
    assert syntaxes(a_plan("a (cat:1.3)\na dog -- steps 9\n# --steps 9\n")) == ["plain", "plain"]
    assert syntaxes(a_plan("a cat --prompt-syntax plain\na dog")) == ["plain", "a1111"]
    assert syntaxes(a_plan("a cat --steps 9\na dog", prompt_syntax="plain")) == ["plain", "plain"]
    assert syntaxes(a_plan("a cat\na dog", prompt_syntax="a1111")) == ["a1111", "a1111"]


def test_a_run_that_an_earlier_version_began_stays_plain() -> None:
    plan = a_plan("a cat --steps 9\na dog\n")
    earlier = plan.as_begun(lambda digest: digest != plan.digest)
    assert syntaxes(earlier) == ["plain", "plain"]
    assert plan.as_begun(lambda digest: digest == plan.digest) is plan
    # Its digest is the one that it had.
    assert earlier.digest == Plan(plan.sources, plan.variants, knows_a1111=False).digest
    without = a_plan("a cat\na dog\n")
    assert without.digest == Plan(without.sources, without.variants, knows_a1111=False).digest


def test_a_prompt_that_cannot_be_read_in_its_syntax_is_a_bad_line() -> None:
    plan = a_plan('a cat --steps 9\na dog <hypernet:x:1>\n"a <hypernet:x:1> --prompt-syntax plain"\n')
    [bad] = [each for each in plan.items(unresolved) if not isinstance(each, Planned)][:1]
    assert (bad.line, bad.field) == (2, "prompt_syntax")
    assert "<hypernet:x:1>" in bad.reason


def test_a_comment_in_a_prompt_of_a1111_is_warned_of_without_a_remedy_that_is_none() -> None:
    Path("p.txt").write_text("a cat \\#3 --steps 9\n")
    _, said, _ = checked("p.txt")
    assert any(line.startswith(COMMENT_IN_A1111) for line in said)
    Path("p.txt").write_text("a cat #3 --steps 9\n")
    assert "\\#" not in checked("p.txt")[2]
    Path("p.txt").write_text("a cat #3 {a|b}\n")
    assert "or write \\#" in checked("p.txt")[2]


def test_loras_of_options_lines_and_grids() -> None:
    Path("p.txt").write_text("a cat\na dog --lora pixel=1 --prompt_syntax plain\na <lora:x:0.5> cow\n")
    grid = grid_of(["loras=none,detail=0.5,detail=1;pixel=1"])
    plan = make_plan(
        ["p.txt"],
        file_format=None,
        variants=make_variants({"loras": ["style=1"]}, 1, 0, {}, None, None, literal=False),
    )
    jobs = [json.loads(each.templated.job) for each in plan.items(unresolved) if isinstance(each, Planned)]
    named = [[(each["name"], each["weight"]) for each in job["loras"]] for job in jobs]
    assert named == [[("style", 1.0)], [("pixel", 1.0)], [("style", 1.0), ("x", 0.5)]]
    assert [job["prompt"] for job in jobs] == ["a cat", "a dog", "a  cow"]
    variants = make_variants({}, 1, 0, grid, None, None, literal=False)
    plan = make_plan(["p.txt"], file_format=None, variants=variants)
    planned = [each for each in plan.items(unresolved) if isinstance(each, Planned)]
    assert [len(json.loads(each.templated.job).get("loras", [])) for each in planned] == [0, 1, 2] * 2 + [
        1,
        2,
        3,
    ]
    assert [each.grid["loras"] for each in planned][:3] == grid["loras"]


def a_fleet(index: FileIndex = NO_FILES, **announced: Any) -> FleetSnapshot:
    """A fleet of one worker, which offers these files."""
    worker = WorkerInfo(
        name="w1",
        served=SERVED,
        started_at=1.0,
        device="CPU",
        attention="native",
        max_rows=8,
        versions={},
        reads=FORMAT_VERSION,
        files=index.digest,
        **announced,
    )
    return FleetSnapshot(groups_of([worker]), (), {index.digest: index})


def test_check_rejects_what_a_run_would_by_the_files_that_workers_offer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = FileIndex.of([FileEntry(kind=Kind.LORA, name="pixel", sha256="ab" * 32)])
    fleet = a_fleet(index)
    monkeypatch.setattr("producer.cli.ingest_check._snapshot", lambda: fleet)
    Path("p.csv").write_text("prompt,loras,vae\na,pixel=0.8,\nb,detail=0.8,\nc,,nope\nd <lora:x:1>,,\n")
    code, said, errors = checked("p.csv", "--prompt-syntax", "a1111")
    assert code == 1
    offered = "they offer pixel (smallcat doctor lists them)."
    none = "they offer no VAE. SMALLCAT_VAES of the workers says where theirs are."
    assert errors.splitlines() == [
        f'p.csv, line 3: loras has "detail", which no worker offers: {offered}',
        f'p.csv, line 4: vae is "nope", which no worker offers: {none}',
        f'p.csv, line 5: loras has "x", which no worker offers: {offered}',
    ]
    # Jobs are shown as the file has them, and values as people write them.
    assert "loras pixel=0.8" in said[1]
    assert "steps" not in said[1]
    assert said[-1] == "1 job, 3 bad lines; nothing was sent"
    variants = make_variants({"prompt_syntax": "a1111"}, 1, None, {}, None, None, literal=False)
    plan = make_plan(["p.csv"], file_format=None, variants=variants)
    rejected = [each.line for each in plan.items(resolver_of(fleet)) if isinstance(each, Rejected)]
    assert rejected == [3, 4, 5]
    monkeypatch.setattr("producer.cli.ingest_check._snapshot", lambda: None)
    code, said, _ = checked("p.csv", "--prompt-syntax", "a1111")
    assert code == 0
    assert said[-1] == (
        "4 jobs, 0 bad lines; nothing was sent (Redis does not answer: models and names of LoRAs and VAEs "
        "were not checked)"
    )


def in_a1111(job: Job) -> Job:
    return job.in_syntax(PromptSyntax.A1111)


def test_strict_and_check_read_lines_in_the_fleets_syntax(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = a_plan("a (cat:1.3)\na <hypernet:foo:1> dog\n")
    refuse_bad_lines(plan, lambda _: None)
    with pytest.raises(PromptFileError, match=r"1 line is no job, and nothing was sent:\np.txt, line 2"):
        refuse_bad_lines(plan, lambda _: None, in_a1111)
    monkeypatch.setattr(
        "producer.cli.ingest_check._snapshot", lambda: a_fleet(prompt_syntax=PromptSyntax.A1111)
    )
    code, said, errors = checked("p.txt")
    assert code == 1
    assert "p.txt, line 2: prompt_syntax is a1111, and the prompt asks for <hypernet:foo:1>" in errors
    assert not any("since its syntax is plain" in line for line in said)
    # Who says the syntax is not asked again.
    assert checked("p.txt", "--prompt-syntax", "plain")[0] == 0


def test_check_says_where_the_fleets_syntax_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.cli.ingest_check._snapshot", lambda: None)
    Path("p.txt").write_text("a (cat:1.3)\n")
    assert "the fleet's default syntax of prompts is not known" in checked("p.txt")[2]
    assert "is not known" not in checked("p.txt", "--prompt-syntax", "plain")[2]
    Path("p.txt").write_text("a cat\n")
    assert "not known" not in checked("p.txt")[2]
