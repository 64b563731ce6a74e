"""The LoRAs of a job: how they are written, what is refused, and that their content is in the id."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import a1111_networks
from worker.contract.a1111_syntax import without_comments
from worker.contract.choices import PromptSyntax
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import NO_FILES, FileEntry, FileIndex, Kind
from worker.contract.infotext import read, write
from worker.contract.job import Job
from worker.contract.job_files import files_of, lacking, lacks_hashes, loras_of, with_files
from worker.contract.lora_tags import tags_of, taken
from worker.contract.loras import MAX_LORAS, Lora, read_loras, shown_loras
from worker.contract.message import Message, payload_of
from worker.contract.served_model import Defaults, ServedModel
from worker.state.groups import Meant

SERVED = ServedModel(
    name="m", revision="r", defaults=Defaults(width=64, height=64, steps=4, guidance_scale=7.5)
)


def parsed(loras: Any, **fields: Any) -> Job:
    return Job.parse({"prompt": "a small cat", "seed": 1, "loras": loras, **fields})


def refusal(loras: Any, **fields: Any) -> str:
    with pytest.raises(InvalidJobError) as caught:
        parsed(loras, **fields)
    return str(caught.value)


DETAIL = {"name": "detail", "weight": 0.8}


@pytest.mark.parametrize(
    "written",
    [
        [DETAIL],
        [Lora(**DETAIL)],
        (DETAIL,),
        DETAIL,
        {"detail": 0.8},
        {"detail": {"weight": 0.8}},
        "detail=0.8",
        " detail = 0.8 ; ",
        ["detail=.8"],
        "detail.safetensors=0.8",
        "detail=0.8:te=0.8",
        json.dumps([DETAIL]),
        json.dumps({"detail": 0.8}),
        [DETAIL, {"name": "other", "weight": 0}],
        [{**DETAIL, "text_encoder_weight": None}],
    ],
)
def test_they_are_one_thing_however_they_are_written(written: Any) -> None:
    job = parsed(written)
    assert job.model_dump(mode="json")["loras"] == [DETAIL]
    assert job.id == parsed([DETAIL]).id
    assert job.version == 4


def test_a_weight_that_is_not_given_is_one_and_text_encoders_may_have_another() -> None:
    [lora] = parsed("detail").loras
    assert (lora.weight, lora.in_text_encoders) == (1.0, 1.0)
    [lora] = parsed("detail=0.5:te=-2").loras
    assert (lora.weight, lora.in_text_encoders) == (0.5, -2.0)
    # In one of the two alone.
    assert [(each.name, each.in_text_encoders) for each in parsed("a=0:te=1; b=1:te=0").loras] == [
        ("a", 1.0),
        ("b", 0.0),
    ]


@pytest.mark.parametrize("none", [[], {}, "", "none", "a=0", {"a": 0, "b": -0.0}, "a=0:te=0"])
def test_none_of_any_weight_are_the_job_of_before(none: Any) -> None:
    job = parsed(none)
    assert job.id == Job.parse({"prompt": "a small cat", "seed": 1}).id
    assert "loras" not in job.model_dump(mode="json")
    assert job.version == 1


def test_their_order_does_not_count() -> None:
    one, other = parsed("a=1; b=0.5"), parsed([{"name": "b", "weight": 0.5}, "a"])
    assert one == other
    assert one.id == other.id


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("detail=5", "loras has the weight 5.0 for 'detail': it must be -4 to 4."),
        ({"detail": float("nan")}, "loras has the weight nan for 'detail': it must be -4 to 4."),
        ({"detail": "x"}, "loras has the weight 'x' for 'detail': it must be a number, -4 to 4."),
        ({"detail": True}, "loras has the weight True for 'detail': it must be a number, -4 to 4."),
        ("detail=1e400", "loras has 'detail=1e400', and '1e400' is no weight: write a number, -4 to 4."),
        ("detail=1:te=nan", "loras has 'detail=1:te=nan', and 'nan' is no weight: write a number, -4 to 4."),
        ("detail=much", "loras has 'detail=much', and 'much' is no weight: write a number, -4 to 4."),
        ("a=1; a=2", "loras has 'a' twice: name it once, with one weight."),
        ("a; a=0", "loras has 'a' twice: name it once, with one weight."),
        ([f"a{number}" for number in range(9)], f"loras has 9 LoRAs, the limit is {MAX_LORAS}: use fewer."),
        ([{"nam": "x"}], "loras has 'nam' beside a name: known are name, weight, text_encoder_weight."),
        ([{"weight": 1}], "loras has {'weight': 1}, which has no name: write a list such as"),
        ("a=1:unet=2", "loras has 'a=1:unet=2': write name, name=0.8, or name=0.8:te=0.5 for another weight"),
        ("=1", "loras has the name '': it must be 1 to"),
        ("[1", "loras is '[1', which is no JSON"),
        (5, "loras is 5: write a list such as"),
        ([5], "loras has 5: write a list such as"),
        ([[]], "loras has []: write a list such as"),
        ([{"name": 5}], "loras has the name 5: it must be a text such as detail."),
    ],
)
def test_what_is_none_is_refused_with_its_value_and_the_remedy(written: Any, sentence: str) -> None:
    assert refusal(written).startswith(sentence)


NAME = st.text(min_size=1, max_size=12).filter(lambda name: name.isprintable() and name.strip())
WEIGHT = st.floats(-4, 4)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(NAME, WEIGHT, st.none() | WEIGHT), max_size=4, unique_by=lambda each: each[0].strip())
)
def test_reading_what_is_shown_gives_the_same(written: list[tuple[str, float, float | None]]) -> None:
    names = ("name", "weight", "text_encoder_weight")
    try:
        loras = read_loras([dict(zip(names, each, strict=True)) for each in written])
    except ValueError:  # The names are one, or none, without blanks and suffixes.
        return
    assert read_loras(shown_loras(loras)) == loras
    assert read_loras(json.loads(json.dumps([each.model_dump() for each in loras]))) == loras
    prompt, found = taken(f"a cat {tags_of(loras)}") if tags_of(loras) else ("a cat", [])
    assert prompt == "a cat"
    assert read_loras(found) == [each for each in loras if not set(each.name) & set(">:=#\n")]


# --- which files they are -----------------------------------------------------------------------------------


def index(**contents: str) -> FileIndex:
    return FileIndex.of(
        FileEntry(kind=Kind.LORA, name=name, sha256=digits * 32) for name, digits in contents.items()
    )


HERE = index(detail="ab", pixel="cd", detail_v2="ef")


@pytest.mark.parametrize("name", ["detail", "ab" * 32, "AB" * 32, "ABABABABAB", "ababababab", "abababababab"])
def test_a_file_is_found_by_its_name_and_by_its_hashes(name: str) -> None:
    job = with_files(parsed({name: 0.5}), HERE)
    assert [each.name for each in job.loras] == ["detail"]
    assert job.file_hashes == {"lora:detail": "ab" * 32}
    assert job.id == with_files(parsed({"detail": 0.5}), HERE).id
    assert Message.parse(payload_of(job)).job == job


def test_the_web_uis_own_hash_finds_a_file_and_is_in_infotexts() -> None:
    """AUTOMATIC1111 1.10.1 writes it as `Lora hashes`; Civitai calls it AutoV3."""
    entry = FileEntry(kind=Kind.LORA, name="mine", sha256="ab" * 32, auto_v3="7c6bad76eb54")
    files = FileIndex.of([entry])
    for name in ("7C6BAD76EB54", "theirs@7c6bad76eb54"):
        job = with_files(parsed({name: 0.5}).resolved(SERVED), files)
        assert job.file_hashes == {"lora:mine": "ab" * 32}
    assert 'Lora hashes: "mine: 7c6bad76eb54"' in write(job, files)
    assert 'Lora hashes: "mine: ababababab"' in write(job)
    assert read(write(job, files)) == read(write(job)) == job
    # An older producer, which knows nothing of it, takes the index of a newer worker for what it is.
    assert files.digest == FileIndex.of([entry.model_copy(update={"auto_v3": ""})]).digest


def test_a_name_with_a_hash_is_that_file_or_none() -> None:
    assert with_files(parsed("other@cdcdcdcdcdcd"), HERE).loras == parsed("pixel").loras
    with pytest.raises(InvalidJobError) as caught:
        with_files(parsed("detail@000000000000"), HERE)
    assert str(caught.value) == (
        'loras has "detail@000000000000", which no worker offers: their "detail" is another file, '
        'ABABABABAB. To take that one, name it "detail".'
    )


def lora_entry(name: str, sha256: str, auto_v3: str = "7c6bad76eb54", **more: Any) -> FileEntry:
    return FileEntry(kind=Kind.LORA, name=name, sha256=sha256, auto_v3=auto_v3, **more)


#: Alike behind the header, in which PEFT keeps another alpha; and two whose SHA-256 begins alike.
ALIKE = FileIndex.of(
    [
        lora_entry("style_v1", "ab" * 32),
        lora_entry("style_v2", "cd" * 32),
        lora_entry("one", "0" * 63 + "1", "111111111111"),
        lora_entry("other", "0" * 63 + "2", "222222222222"),
        lora_entry("copy", "0" * 63 + "2", "222222222222"),
    ]
)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("style_v1@7c6bad76eb54", "style_v1"),
        ("style_v2@7C6BAD76EB54", "style_v2"),
        ("other@0000000000", "other"),
        ("one@000000000000", "one"),
        ("0" * 63 + "1", "one"),
        ("0" * 63 + "2", "copy"),
        ("theirs@" + "0" * 63 + "2", "copy"),
        ("other@" + "0" * 63 + "2", "other"),
        ("theirs@222222222222", "copy"),
    ],
)
def test_of_files_with_one_hash_the_name_says_which_it_is(asked: str, name: str) -> None:
    job = with_files(parsed(asked), ALIKE)
    assert [each.name for each in job.loras] == [name]
    assert job.file_hashes == {f"lora:{name}": next(e.sha256 for e in ALIKE.files if e.name == name)}


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("7c6bad76eb54", '"style_v1" (ABABABABAB), "style_v2" (CDCDCDCDCD)'),
        ("theirs@7c6bad76eb54", '"style_v1" (ABABABABAB), "style_v2" (CDCDCDCDCD)'),
        ("0000000000", '"one" (0000000000), "copy" (0000000000)'),
        ("style_v1@000000000000", '"one" (0000000000), "copy" (0000000000)'),
    ],
)
def test_a_hash_of_several_contents_is_refused_with_their_names(asked: str, names: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        with_files(parsed(asked), ALIKE)
    assert str(caught.value) == (
        f'loras has "{asked}", and this hash is that of 2 different files: {names}. Name one of them, or '
        "give its SHA-256 in full."
    )


def test_a_file_of_that_hash_that_cannot_be_used_says_why() -> None:
    broken = FileIndex.of([lora_entry("x", "ab" * 32, problem="it is a LoHa")])
    with pytest.raises(InvalidJobError, match=r"cannot be used: it is a LoHa\."):
        with_files(parsed("x@ababababab"), broken)
    usable = FileIndex.of([*broken.files, lora_entry("y", "ab" * 32)])
    assert with_files(parsed("x@ababababab"), usable).loras == parsed("y").loras


@pytest.mark.parametrize("own", ["e\u0301te\u0301", "\u00e9t\u00e9"])
@pytest.mark.parametrize("asked", ["e\u0301te\u0301", "\u00e9t\u00e9"])
def test_a_name_is_found_in_whatever_form_of_unicode(own: str, asked: str) -> None:
    """macOS stores names with their accents apart."""
    files, sha256 = FileIndex.of([lora_entry(own, "ab" * 32)]), "ab" * 32
    job = with_files(parsed(asked), files)
    assert ([each.name for each in job.loras], job.file_hashes) == (
        ["\u00e9t\u00e9"],
        {"lora:\u00e9t\u00e9": sha256},
    )
    assert with_files(parsed(f"{asked}@7c6bad76eb54"), files) == job
    # A hash that the job brings along is of this name, too.
    assert with_files(parsed(asked, file_hashes={f"lora:{own}": sha256}), NO_FILES) == job
    assert files.near(Kind.LORA, f"{asked}s") == [own]
    text = f'a cat <lora:{own}:1>\nSteps: 20, Sampler: Euler, Seed: 1, Lora hashes: "{asked}: 7c6bad76eb54"'
    assert with_files(read(text), files).file_hashes == job.file_hashes


def test_an_infotext_asks_for_the_file_of_its_name_among_those_with_its_hash() -> None:
    text = (
        "a cat <lora:{0}:1>\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, "
        'Lora hashes: "{0}: 7c6bad76eb54", Version: v1.10.1'
    )
    for name in ("style_v1", "style_v2"):
        assert [each.name for each in with_files(read(text.format(name)), ALIKE).loras] == [name]
    with pytest.raises(InvalidJobError, match="2 different files"):
        with_files(read(text.format("style_v3")), ALIKE)


def test_a_name_that_nobody_has_is_refused_with_near_misses() -> None:
    with pytest.raises(
        InvalidJobError, match=r'loras has "detial", which no worker offers: did you mean detail'
    ):
        with_files(parsed("detial"), HERE)
    with pytest.raises(InvalidJobError, match=r"no LoRA\. SMALLCAT_LORAS of the workers says where theirs"):
        with_files(parsed("detail"), NO_FILES)
    with pytest.raises(InvalidJobError, match=r"they offer a, b, c, d and 2 more \(smallcat doctor"):
        with_files(parsed("zzzzz"), index(**{name: f"{n:02}" for n, name in enumerate("abcdef")}))
    broken = FileIndex.of([FileEntry(kind=Kind.LORA, name="x", problem="it is a LoHa")])
    with pytest.raises(InvalidJobError, match=r'The LoRA "x" cannot be used: it is a LoHa\.'):
        with_files(parsed("x"), broken)
    # One of weight 0 is not looked for.
    assert with_files(parsed("nobody=0"), NO_FILES).loras == []


@pytest.mark.parametrize(
    ("kind", "own", "model", "fits"),
    [
        ("lora", "SDXL", "SDXL", True),
        ("lora", "SD 1.x", "SDXL", False),
        ("lora", "SD 1.x", "SD 2.x", False),
        ("lora", "SDXL", "a UNet that takes text 64 wide", False),
        ("lora", "a UNet that takes text 64 wide", "a UNet that takes text 64 wide", True),
        # What nobody says is the worker's to find out.
        ("lora", "", "SDXL", True),
        ("lora", "SDXL", "", True),
        ("embedding", "SD 1.x", "SDXL", False),
        ("embedding", "SDXL", "SDXL", True),
        # Of embeddings it is the text encoders that count, of which a UNet's input does not say all.
        ("embedding", "a text encoder 1280 wide", "SDXL's refiner", True),
        ("embedding", "SD 1.x", "a UNet that takes text 64 wide", True),
        ("vae", "4 latent channels", "SDXL", True),
    ],
)
def test_a_file_for_another_architecture_than_the_models_is_refused_at_the_door(
    kind: str, own: str, model: str, fits: bool
) -> None:
    files = FileIndex.of([FileEntry(kind=kind, name="x", sha256="ab" * 32, architecture=own)])
    served = SERVED.model_copy(update={"architecture": model})
    fields = {"lora": {"loras": "x"}, "vae": {"vae": "x"}, "embedding": {"prompt": "a <x>"}}[kind]
    job = Job.parse({"prompt": "a small cat", "seed": 1, **fields})
    meant = Meant(served, PromptSyntax.PLAIN, files)
    if fits:
        resolved = meant.resolve(job)
        assert resolved.file_hashes == {f"{kind}:x": "ab" * 32}
        return
    with pytest.raises(InvalidJobError) as caught:
        meant.resolve(job)
    called = "LoRA" if kind == "lora" else kind
    assert str(caught.value) == (
        f'{"loras" if kind == "lora" else "prompt"} has the {called} "x", which is for {own}, and the model '
        f"is {model}: use one that fits, or another model."
    )
    # One whose content the job says already, as when it is sent again, is refused as well.
    with pytest.raises(InvalidJobError, match=f"is for {own}, and the model is"):
        meant.resolve(job.model_copy(update={"file_hashes": {f"{kind}:x": "ab" * 32}}))


def test_another_content_is_another_picture_and_another_name_is_the_same_one() -> None:
    job = parsed("detail=0.5; pixel")
    first = with_files(job, HERE)
    assert with_files(job, index(detail="00", pixel="cd")).id != first.id
    renamed = with_files(parsed("a=0.5; z"), index(z="cd", a="ab"))
    swapped = with_files(parsed("z=0.5; a"), index(a="cd", z="ab"))
    assert first.id == renamed.id == swapped.id
    assert with_files(parsed("z; a=0.5"), index(z="ab", a="cd")).id != first.id
    # Added up in an order that depends on the content alone.
    assert [(sha256, each.weight) for sha256, each in loras_of(first)] == [("ab" * 32, 0.5), ("cd" * 32, 1.0)]
    assert [each[0] for each in loras_of(swapped)] == [each[0] for each in loras_of(first)]
    # A job that is sent again is the same one, whatever became of its files.
    assert with_files(first, index(detail="00")) == first


def test_one_file_under_two_names_is_refused() -> None:
    with pytest.raises(InvalidJobError, match=r'the same file twice, as "a" and "b": keep one of them\.'):
        with_files(parsed("a=1; b=1"), index(a="ab", b="ab"))
    # As they were written.
    with pytest.raises(InvalidJobError, match=r'twice, as "ABABABABAB" and "pixel": keep'):
        with_files(parsed("pixel; ABABABABAB"), index(pixel="ab"))


def test_none_stands_alone() -> None:
    assert read_loras(["none"]) == read_loras("None") == []
    for values in (["pixel", "none"], ["None", "pixel=0.5"]):
        with pytest.raises(ValueError, match="beside others: it stands alone, for no LoRA"):
            read_loras(values)


def test_who_lacks_one_lacks_its_content() -> None:
    job = parsed("detail")
    assert lacks_hashes(job)
    job = with_files(job, HERE)
    assert not lacks_hashes(job)
    assert files_of(job) == ['LoRA "detail" (ABABABABAB)']
    assert lacking(job, index(renamed="ab")) == []
    assert lacking(job, index(detail="cd")) == files_of(job)


# --- in prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "rest", "loras"),
    [
        ("a cat <lora:x>", "a cat", "x=1"),
        ("a <lora:x:0.8>, <lyco:y:-1> cat", "a ,  cat", "x=0.8; y=-1"),
        ("<lora:x:0.5:0.8>a cat", "a cat", "x=0.8:te=0.5"),
        ("a cat <lora:x:te=0.5:unet=0.8>", "a cat", "x=0.8:te=0.5"),
        ("a cat <lora:x:unet=0.8:0.5>", "a cat", "x=0.8:te=0.5"),
        ("a cat <lora:x:te=0.5>", "a cat", "x=0.5"),
        ("[a <lora:x:1>:b:0.5] AND c", "[a :b:0.5] AND c", "x"),
        ("a cat <lora:x:0>", "a cat", ""),
        ("a cat # <lora:x:1>", "a cat # <lora:x:1>", ""),
        ("a cat <lora:x #y\n:0.8>", "a cat", "x=0.8"),
        ("a cat <Lora:x:1>", None, "prompt_syntax is a1111, and the prompt asks for <Lora:x:1>"),
        (
            "a cat <lora:x:1:1:16>",
            None,
            "loras has '<lora:x:1:1:16>' in the prompt, and a part of a LoRA's rank is not offered: take",
        ),
        (
            "a cat <lora:x:1:lbw=ALL>",
            None,
            "loras has '<lora:x:1:lbw=ALL>' in the prompt: write <lora:name:0.8>",
        ),
        ("a cat <lora:x:y>", None, "loras has '<lora:x:y>' in the prompt, and 'y' is no weight"),
        ("a cat <lora:x:9>", None, "loras has the weight 9.0 for 'x': it must be -4 to 4."),
        ("a cat <lora:x> <lyco:x>", None, "loras has 'x' twice: name it once, with one weight."),
        ("<lora:x:1>", None, "loras are all that the prompt has: say what to draw, too."),
        (
            "a <<lora:x:1>lora:y:1>",
            None,
            "loras has '<lora:y:1>' in the prompt once other tags are out of it",
        ),
        (
            "a <lora:x:1> <hypernet:y:1>",
            None,
            "prompt_syntax is a1111, and the prompt asks for <hypernet:y:1>",
        ),
    ],
)
def test_tags_of_a_prompt_are_read_as_automatic1111_reads_them(
    prompt: str, rest: str | None, loras: str
) -> None:
    """AUTOMATIC1111 1.10.1: modules/extra_networks.py, extensions-builtin/Lora/extra_networks_lora.py."""
    if rest is None:
        assert refusal([], prompt=prompt, prompt_syntax="a1111").startswith(loras)
        return
    job = parsed([], prompt=prompt, prompt_syntax="AUTOMATIC1111")
    assert (job.prompt, job.loras) == (rest, parsed(loras).loras)
    assert Job.parse(job.model_dump(mode="json")) == job


PIECES = st.sampled_from(
    ["a cat", " ", "\n", "# by night", "[x:y:0.5]", "(red:1.2)", " AND ", ", ", "<", ">", ":", "a:b"]
)
TAGS = st.builds(
    lambda kind, name, rest: f"<{kind}:{name}{rest}>",
    st.sampled_from(["lora", "lyco"]),
    st.sampled_from([f"l{number}" for number in range(99)]),
    st.sampled_from(
        ["", ":1", ":0.5", ":-.5:2", ":te=1", ":unet=2", ":0.5:unet=-1", ":te=0:unet=1", ":1#x\n"]
    ),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES | TAGS, min_size=1, max_size=8).map("".join))
def test_tags_are_those_that_the_oracle_finds(prompt: str) -> None:
    rest, expected = a1111_networks.networks(prompt)
    job = complaint = None
    try:
        job = Job.parse({"prompt": prompt, "seed": 1, "prompt_syntax": "a1111"})
    except InvalidJobError as error:
        complaint = str(error)
    if job is None:
        # What the web UI does otherwise: the same one twice, no prompt, a tag that others made.
        assert re.search("twice|all that the prompt|once other tags|asks for|blank", complaint or "")
        return
    assert [(each.name, each.in_text_encoders, each.weight) for each in job.loras] == sorted(
        each for each in expected if any(each[1:])
    )
    assert without_comments(job.prompt).strip() == rest.strip()


def test_tags_are_added_to_the_loras_of_the_job_and_are_words_in_a_plain_one() -> None:
    job = parsed("b", prompt="a cat <lora:a:0.5>", prompt_syntax="a1111")
    assert job.loras == parsed("a=0.5; b").loras
    assert job.id == parsed("a=0.5; b", prompt="a cat", prompt_syntax="a1111").id
    assert "'a' twice" in refusal("a=0.5", prompt="a cat <lora:a:0.5>", prompt_syntax="a1111")
    assert parsed("b", prompt="a cat <lora:a:0.5>").prompt == "a cat <lora:a:0.5>"
    # In a negative prompt they are words, as there.
    negative = "<lora:a:0.5>"
    assert parsed([], negative_prompt=negative, prompt_syntax="a1111").negative_prompt == negative
