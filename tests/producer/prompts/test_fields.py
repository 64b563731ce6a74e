"""One reading for all formats: the same names and values give the same job, or the same refusal, in each."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from producer.cli.job_options import JOB_OPTIONS, given_fields, job_options, option_of
from producer.http.pictures import fields_of
from producer.ingest.message_templates import JobTemplates
from producer.ingest.plan import unresolved
from producer.prompts.fields import near_miss
from producer.prompts.reader import BadEntry, Entry, read
from producer.prompts.sources import source
from worker.contract.errors import InvalidJobError, PromptFileError
from worker.contract.job import JOB_FIELDS, Job

FORMATS = ("txt", "csv", "semicolons.csv", "tsv", "utf16.csv", "jsonl", "jsonl with texts", "parquet")

#: For each pair of a name and a value the job fields that it means; a text where it is refused.
CASES: list[tuple[str, Any, Any]] = [
    ("steps", 20.0, {"steps": 20}),
    ("steps", "20", {"steps": 20}),
    ("STEPS", " 20.0 ", {"steps": 20}),
    ("sampling steps", 20, {"steps": 20}),
    ("num_inference_steps", 20, {"steps": 20}),
    ("numInferenceSteps", 20, {"steps": 20}),
    ("steps", None, {}),
    ("steps", math.nan, {}),
    ("steps", "null", {}),
    ("steps", "NaN", {}),
    ("steps", "", {}),
    ("steps", 20.5, "steps"),
    ("steps", "many", "steps"),
    ("steps", "9" * 400, "steps"),
    ("steps", "1e999", "steps"),
    ("steps", "-1", "steps"),
    ("seed", -1, {"seed": -1}),
    ("seed", "-1", {"seed": -1}),
    ("seed", -1.0, {"seed": -1}),
    ("seed", -2, "seed"),
    ("cfg_scale", 7, {"guidance_scale": 7.0}),
    ("cfg", "7.5", {"guidance_scale": 7.5}),
    ("CFG Scale", "7.", {"guidance_scale": 7.0}),
    ("guidance", "1e1", {"guidance_scale": 10.0}),
    ("guidance_scale", "inf", "guidance_scale"),
    ("guidance_scale", "1_0", "guidance_scale"),
    ("negative", "None", {}),
    ("neg-prompt", "blurry", {"negative_prompt": "blurry"}),
    ("sampler_name", "Euler a", {"scheduler": "euler_ancestral"}),
    ("sampler", "DPM++ 2M Karras", {"scheduler": "dpmpp_2m_karras"}),
    ("scheduler", "DDIMScheduler", {"scheduler": "ddim"}),
    ("scheduler", "nobody's", "scheduler"),
    ("model", 15, {"model": "15"}),
    ("sd_model", "sd-1.5", {"model": "sd-1.5"}),
    ("metadata", '{"a": [1]}', {"metadata": {"a": [1]}}),
    ("metadata", "[1]", "metadata"),
    ("customer", "ann", {"metadata": {"customer": "ann"}}),
    ("customer", "", {}),
    ("clip_skip", "2", {"clip_skip": 2}),
    ("CLIP_stop_at_last_layers", 2, {"clip_skip": 2}),
    ("stpes", 20, "steps"),
    ("stpes", None, "steps"),
    ("guidence_scale", 7, "guidance_scale"),
    ("captoin", "x", "caption"),
    ("x" * 50_000, "1", "metadata"),
    # AUTOMATIC1111's log.csv has this heading.
    ("cfgs", 7.0, {"guidance_scale": 7.0}),
    ("size", "512x768", {"width": 512, "height": 768}),
    ("Image Size", " 512 × 768 ", {"width": 512, "height": 768}),
    ("resolution", "512*768", {"width": 512, "height": 768}),
    ("size", "XL", {"metadata": {"size": "XL"}}),
    ("size", "512x777", "height"),
    ("size", "", {}),
]


def write(folder: Path, form: str, pairs: dict[str, Any]) -> Path:
    """A file of one line with these names and values."""
    texts = {name: "" if value is None else str(value) for name, value in pairs.items()}
    ending = "csv" if form.endswith("csv") else form.partition(" ")[0]
    path = folder / f"p.{ending}"
    if form == "txt":
        quoted = {name: value.replace('"', '\\"') for name, value in texts.items()}
        path.write_text(" ".join(f'--{name.replace(" ", "_")} "{value}"' for name, value in quoted.items()))
    elif ending == "jsonl":
        path.write_text(json.dumps(pairs if form == "jsonl" else texts))
    elif ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {name: [value] for name, value in pairs.items()}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        delimiter = {"semicolons.csv": ";", "tsv": "\t", "utf16.csv": "\t"}.get(form, ",")
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter).writerows([texts.keys(), texts.values()])
        path.write_text(file.getvalue(), encoding="utf-16" if form == "utf16.csv" else "utf-8", newline="")
    return path


def outcome(path: Path, *, extra: bool = False) -> dict[str, Any] | str:
    """The job fields that are read and that a job takes, or the field that is refused."""
    try:
        [entry] = read(source(str(path)), extra=extra)
    except PromptFileError as error:
        return str(error)
    if isinstance(entry, BadEntry):
        return f"{entry.field}: {entry.reason}"
    seed = {"seed": 1} if entry.fields.get("seed") in (None, -1) else {}
    try:
        templated = JobTemplates(unresolved).fill({**entry.fields, **seed})
    except InvalidJobError as error:
        return str(error)
    chosen = ("scheduler", "schedule") if "scheduler" in entry.fields else ()
    return entry.fields | {name: templated.shape[name] for name in chosen if name in templated.shape}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "value", "expected"), CASES, ids=lambda value: str(value)[:20])
def test_a_name_and_a_value_mean_the_same_in_every_format(
    tmp_path: Path, form: str, name: str, value: Any, expected: Any
) -> None:
    found = outcome(write(tmp_path, form, {"prompt": "a cat", name: value}))
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert expected in found
        assert len(found) < 600
    else:
        assert found == {"prompt": "a cat", **expected}


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_several_pairs_means_the_same_in_every_format(tmp_path: Path, form: str) -> None:
    def found(**pairs: Any) -> Any:
        return outcome(write(tmp_path, form, pairs))

    # ComfyUI's two columns, and AUTOMATIC1111's: read together.
    assert found(prompt="x", sampler_name="dpmpp_2m", scheduler="karras")["scheduler"] == "dpmpp_2m_karras"
    assert found(prompt="x", sampler="DPM++ 2M", schedule_type="Karras")["scheduler"] == "dpmpp_2m_karras"
    both = {"prompt": "x", "scheduler": "dpmpp_2m", "schedule": "exponential"}
    assert found(prompt="x", sampler="DPM++ 2M", schedule_type="Exponential") == both
    assert found(prompt="x", sampler="dpmpp_2m", schedule="Exponential") == both
    assert found(prompt="x", sampler_name="DPM++ 2M Exponential") == both
    assert "not offered" in found(prompt="x", sampler="Euler a", schedule_type="Exponential")
    assert found(caption="a cat") == {"prompt": "a cat"}
    assert found(text="words", prompt="a cat") == {"prompt": "a cat", "metadata": {"text": "words"}}
    assert found(prompt="x", cfg=7, cfg_scale=7.0) == {"prompt": "x", "guidance_scale": 7.0}
    assert "keep one" in found(prompt="x", cfg=7, cfg_scale=8)
    assert "none" in found(prompt="null", steps=3)
    assert isinstance(found(prompt="\u200b", steps=3), str)
    [entry] = read(source(str(write(tmp_path, form, {"prompt": "x", "n_iter": "2", "batch_size": 3.0}))))
    assert isinstance(entry, Entry)
    assert (entry.images, entry.fields) == (6, {"prompt": "x"})
    misspelt = write(tmp_path, form, {"prompt": "x", "stpes": "20"})
    assert outcome(misspelt, extra=True) == {"prompt": "x", "metadata": {"stpes": "20"}}


LORAS = [{"name": "detail", "weight": 0.8}, {"name": "pixel", "weight": 1.0, "text_encoder_weight": 0.5}]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["loras", "LoRA"])
def test_loras_are_read_in_every_format(tmp_path: Path, form: str, name: str) -> None:
    def found(value: Any) -> Any:
        read_ = outcome(write(tmp_path, form, {"prompt": "a cat", name: value}))
        return read_ if isinstance(read_, str) else Job.parse(read_).model_dump().get("loras", [])

    for text in ("detail=0.8; pixel=1:te=0.5", json.dumps(LORAS), "pixel=1:te=.5;detail.safetensors=.8"):
        assert found(text) == LORAS
    assert found("none") == found("") == found("detail=0") == []
    assert found("detail=9") == "loras has the weight 9.0 for 'detail': it must be -4 to 4."
    assert "no weight" in found("detail=much")
    if form in ("jsonl", "parquet"):
        assert found(LORAS) == LORAS
        assert found({"detail": 0.8, "pixel": {"weight": 1, "text_encoder_weight": 0.5}}) == LORAS
    if form == "semicolons.csv":
        assert found("detail=0,8; pixel=1") == [LORAS[0], {"name": "pixel", "weight": 1.0}]


def test_loras_of_several_options_add_up_as_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat --lora detail=0.8 --lora pixel=1:te=0.5")
    found = outcome(tmp_path / "p.txt")
    assert isinstance(found, dict)
    assert Job.parse(found).model_dump()["loras"] == LORAS
    (tmp_path / "p.txt").write_text("a cat --lora detail=0.8 --lora detail=0.5")
    assert "has 'detail' twice" in str(outcome(tmp_path / "p.txt"))


def test_the_word_none_in_a_line_is_none_of_the_loras_that_are_given_for_all(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,loras\na cat,none\na dog,\na cow,pixel\n")
    entries = [each for each in read(source(str(tmp_path / "p.csv"))) if isinstance(each, Entry)]
    jobs = [Job.parse({"loras": ["detail=0.5"], "seed": 1} | each.fields) for each in entries]
    assert [[each.name for each in job.loras] for job in jobs] == [[], ["detail"], ["pixel"]]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_seed_that_has_lost_digits_is_refused(tmp_path: Path, form: str) -> None:
    """Where a column of integers has a gap, pandas makes numbers with a fraction of them."""

    def found(seed: float) -> Any:
        return outcome(write(tmp_path, form, {"prompt": "a cat", "seed": seed}))

    for seed in (1234567890123456789.0, 9007199254740993.0):
        assert f"seed is {seed!r}: it must be a valid integer" in found(seed)
    assert found(2.0**53 - 1) == {"prompt": "a cat", "seed": 2**53 - 1}


@pytest.mark.parametrize("seed", ["1.000", "1,000"])
def test_what_may_be_a_thousand_is_no_integer_where_a_comma_is_a_decimal_point(
    tmp_path: Path, seed: str
) -> None:
    path = write(tmp_path, "semicolons.csv", {"prompt": "a cat", "seed": seed})
    assert f"seed is '{seed}': it must be a valid integer" in str(outcome(path))


def test_a_comma_is_a_decimal_point_where_semicolons_part_cells_alone(tmp_path: Path) -> None:
    pairs = {"prompt": "a cat", "guidance_scale": "7,5"}
    found = {form: outcome(write(tmp_path, form, pairs)) for form in FORMATS}
    assert found.pop("semicolons.csv") == {"prompt": "a cat", "guidance_scale": 7.5}
    assert all("guidance_scale is '7,5'" in str(each) for each in found.values())


@pytest.mark.parametrize(("name", "value", "expected"), CASES, ids=lambda value: str(value)[:20])
def test_a_name_and_a_value_mean_the_same_on_the_command_line(name: str, value: Any, expected: Any) -> None:
    import click

    field = option_of(name.replace(" ", "_")).replace("-", "_")
    if field not in JOB_FIELDS:
        return  # Click refuses what is no option.
    given: dict[str, Any] = {}

    @click.command(context_settings={"token_normalize_func": option_of})
    @job_options
    def command(**options: Any) -> None:
        given.update(given_fields(options))

    text = "" if value is None else str(value)
    if text.lower() == "nan":
        expected = "no empty cell"
    try:
        command.main([f"--{name.replace(' ', '_')}", text], standalone_mode=False)
        given["seed"] = given.get("seed", 1)
        job = Job.parse({"prompt": "a cat", **given})
    except (click.UsageError, InvalidJobError):
        job = None
    assert (job is None) == isinstance(expected, str)
    if job is None:
        return
    assert {each: getattr(job, each) for each in expected if expected[each] != -1} == {
        each: value for each, value in expected.items() if value != -1
    }


@pytest.mark.parametrize("number", ["nan", " NaN ", "-nan", "inf", "-inf", "1e999", "<NA>"])
@pytest.mark.parametrize(
    "field", [each for each in JOB_FIELDS.values() if each.kind in (int, float)], ids=lambda field: field.name
)
def test_a_number_of_a_call_is_finite_or_refused_by_its_name(field: Any, number: str) -> None:
    """An option of the command line, and a part of a form."""
    import click

    @click.command()
    @job_options
    def command(**options: Any) -> None:
        Job.parse({"prompt": "a cat", "seed": 1, **given_fields(options)})

    if field.name in JOB_OPTIONS:
        with pytest.raises((click.BadParameter, InvalidJobError)) as refused:
            command.main([f"{field.option}={number}"], standalone_mode=False)
        said = (
            refused.value.format_message() if isinstance(refused.value, click.BadParameter) else refused.value
        )
        assert field.option.removeprefix("--").replace("-", "_") in str(said).replace("-", "_")
    with pytest.raises(InvalidJobError, match=rf"{field.name} is .*: it must be"):
        Job.parse({"prompt": "a cat", "seed": 1, field.name: 1, **fields_of([(field.name, number)])})


def test_values_of_parquets_own_types_are_read(tmp_path: Path) -> None:
    pairs = {"prompt": b"a cat", "steps": Decimal("20.00"), "cfg": Decimal("7.5"), "when": Decimal("1.5")}
    found = outcome(write(tmp_path, "parquet", pairs))
    assert found == {"prompt": "a cat", "steps": 20, "guidance_scale": 7.5, "metadata": {"when": "1.5"}}


def test_a_near_miss_is_a_letter_or_two_from_a_fields_name_and_no_other_word() -> None:
    near = {"stpes": "steps", "step": "steps", "seeds": "seed", "promt": "prompt", "heigth": "height"}
    near |= {"guidence_scale": "guidance_scale", "negativ_promt": "negative_prompt", "smapler": "sampler"}
    assert {name: near_miss(name) for name in near} == near
    for word in ("weight", "id", "customer", "tag", "test", "need", "file", "line", "", "x" * 10_000_000):
        assert near_miss(word) is None


# Values that Parquet has and text formats have not.


def parquet_entry(tmp_path: Path, column: Any, name: str = "extra") -> Any:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a cat"], name: column}), tmp_path / "p.parquet")
    [entry] = read(source(str(tmp_path / "p.parquet")))
    return entry


def test_nested_columns_of_parquet_are_what_json_lines_have(tmp_path: Path) -> None:
    """Lists, structs and maps; what JSON does not know is a text in them, too, and NaN is no value."""
    import pyarrow as pa

    when = datetime.datetime(2024, 1, 2, 3, 4, 5)  # noqa: DTZ001 - such a column has no zone
    nanoseconds = pa.timestamp("ns")
    columns: dict[str, tuple[Any, Any]] = {
        "list": (pa.array([["a", None]]), ["a", None]),
        "struct": (pa.array([{"a": 1, "b": {"c": [True]}}]), {"a": 1, "b": {"c": [True]}}),
        "map": (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), {"k": 1}),
        "time in a struct": (pa.array([{"t": when}]), {"t": "2024-01-02 03:04:05"}),
        "nanoseconds": (pa.array([1_700_000_000_123_456_789], nanoseconds), "2023-11-14 22:13:20.123456"),
        "nested nanoseconds": (pa.array([[when]], pa.list_(nanoseconds)), ["2024-01-02 03:04:05"]),
        "year 10,000": (pa.array([10**15], pa.timestamp("s")), None),
        "bytes": (pa.array([b"abc"]), "abc"),
        "other bytes": (pa.array([[b"\xff\x00"]]), ["ff00"]),
        "numbers": (pa.array([[1.5, math.nan]]), [1.5, None]),
        "decimals": (pa.array([[Decimal("1.50")]]), ["1.50"]),
    }
    for name, (column, expected) in columns.items():
        entry = parquet_entry(tmp_path, column)
        assert isinstance(entry, Entry), name
        found = entry.fields["metadata"]["extra"]
        assert found == (found if expected is None else expected), name
        fields = {**entry.fields, "seed": 1}
        assert JobTemplates(unresolved).fill(fields).metadata == {"extra": found}, name
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", "extra": found}) + "\n")
        [same] = read(source(str(tmp_path / "p.jsonl")))
        assert isinstance(same, Entry)
        assert same.fields == entry.fields, name


def test_a_nested_value_of_a_job_field_is_refused_by_name_in_parquet_as_in_json_lines(tmp_path: Path) -> None:
    import pyarrow as pa

    mapping = pa.map_(pa.string(), pa.string())
    entry = parquet_entry(tmp_path, pa.array([[("shop", "x")]], mapping), "metadata")
    assert entry.fields["metadata"] == {"shop": "x"}
    for name, value in (("steps", [5]), ("negative_prompt", ["x"]), ("seed", {"a": 1}), ("metadata", ["x"])):
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", name: value}) + "\n")
        [of_json] = read(source(str(tmp_path / "p.jsonl")))
        for each in (of_json, parquet_entry(tmp_path, pa.array([value]), name)):
            assert isinstance(each, Entry)
            with pytest.raises(InvalidJobError, match=rf"{name} is "):
                Job.parse(each.fields)


# What people paste, and what spreadsheets add.


def outcomes(path: Path) -> tuple[list[Any], list[str]]:
    """For each line its fields or the reason that it is bad; and what was warned of."""
    warned: list[str] = []
    entries = read(source(str(path)), warn=warned.append)
    return [each.fields if isinstance(each, Entry) else each.reason for each in entries], warned


@pytest.mark.parametrize(
    "prompt",
    [
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512",
        "a cat Negative prompt: blurry Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5",
        "Negative prompt: blurry, dark",
        "a cat\nNegative prompt: blurry",
        "a cat\nSteps: 30, CFG scale: 5",
    ],
)
def test_a_picture_s_parameters_are_no_prompt_in_any_format(tmp_path: Path, prompt: str) -> None:
    for form in FORMATS:
        if form == "txt" and "\n" in prompt:
            continue
        found = outcome(write(tmp_path, form, {"prompt": prompt, "steps": 5}))
        assert isinstance(found, str), form
        assert "would be drawn as words" in found, form
    (tmp_path / "p.txt").write_text(f"a cat\n{prompt}\n")
    first, *others = outcomes(tmp_path / "p.txt")[0]
    assert first == {"prompt": "a cat"}
    assert any("would be drawn as words" in str(each) for each in others)


def test_prompts_that_only_speak_of_steps_stay(tmp_path: Path) -> None:
    texts = [
        "Steps: an old stone stair, 20 of them",
        "a sign: next steps: 20",
        "the negative prompt of a cat",
    ]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    assert outcomes(tmp_path / "p.txt")[0] == [{"prompt": text} for text in texts]


def test_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,w,size\na cat,512,512x768\na dog,640,512x768\n")
    same, differs = outcomes(tmp_path / "p.csv")[0]
    assert same == {"prompt": "a cat", "width": 512, "height": 768}
    assert differs == '"w" is 640 and "size" is 512: both mean width, keep one.'
    (tmp_path / "p.txt").write_text("a dress \u2014size large\na dress --size 512x512\n")
    bad, dress = outcomes(tmp_path / "p.txt")[0]
    assert "no size such as 512x768" in bad
    assert dress == {"prompt": "a dress", "width": 512, "height": 512}


def test_headings_may_have_what_is_not_seen_and_wide_letters(tmp_path: Path) -> None:
    for heading in ("\u200bprompt\u200b,steps", "\u00a0Prompt\u00a0,\u2060steps", "ｐｒｏｍｐｔ,ｓｔｅｐｓ"):
        (tmp_path / "p.csv").write_text(f"{heading}\na cat,20\n")
        assert outcomes(tmp_path / "p.csv")[0] == [{"prompt": "a cat", "steps": 20}]


def test_a_text_formula_of_a_spreadsheet_is_its_text(tmp_path: Path) -> None:
    """The idiom ="007", which keeps a spreadsheet from reading a number."""
    (tmp_path / "p.csv").write_text('prompt,seed,note\n="a ""small"" cat",="007","=""x"""\n=1+2,5,="a"&"b"\n')
    first, second = outcomes(tmp_path / "p.csv")[0]
    assert first == {"prompt": 'a "small" cat', "seed": 7, "metadata": {"note": "x"}}
    assert second == {"prompt": "=1+2", "seed": 5, "metadata": {"note": '="a"&"b"'}}


def test_job_fields_inside_another_object_have_no_effect_and_a_warning_says_so(tmp_path: Path) -> None:
    lines = [{"prompt": "a cat", "parameters": {"steps": 20}}] * 3 + [{"prompt": "a dog", "shop": {"id": 1}}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found, warned = outcomes(tmp_path / "p.jsonl")
    assert found[0] == {"prompt": "a cat", "metadata": {"parameters": {"steps": 20}}}
    [said] = warned
    assert '"parameters" goes to metadata, and so "steps" in it has no effect' in said


@pytest.mark.parametrize(
    "name", ["aspect_ratio", "checkpoint", "ckpt_name", "refiner", "hires_fix", "tiling"]
)
def test_what_would_change_the_picture_elsewhere_and_means_nothing_here_is_named(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "p.csv").write_text(f"prompt,{name}\na cat,x\n")
    assert f'"{name}" has no meaning here' in outcomes(tmp_path / "p.csv")[1][0]


@pytest.mark.parametrize(
    "text", ['[{"prompt": "a cat"},\n{"prompt": "a dog"}]', '{"prompt": "a"},\n{"prompt": "b"},']
)
def test_an_array_of_json_in_lines_is_told_how_to_become_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    assert "jq -c '.[]' FILE" in outcomes(tmp_path / "p.jsonl")[0][0]


@pytest.mark.parametrize("start", ["{\\rtf1 a cat}", "<!DOCTYPE html>", "<html>", '<?xml version="1.0"?>'])
def test_rich_text_and_web_pages_are_no_prompts(tmp_path: Path, start: str) -> None:
    for name in ("p.txt", "p.csv", "p.jsonl"):
        (tmp_path / name).write_text(f"{start}\na cat\n")
        with pytest.raises(PromptFileError, match="save it as CSV or text"):
            outcomes(tmp_path / name)
