"""Which files a job uses: named in its prompts, part of its id by content."""

from __future__ import annotations

from typing import Any

import pytest

from worker.contract import infotext
from worker.contract.choices import PromptSyntax
from worker.contract.embedding_names import EmbeddingNames, Name
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import MAX_NAME, NO_FILES, FileEntry, FileIndex, Kind, name_problem
from worker.contract.job import Job
from worker.contract.job_files import files_of, lacking, unknown_warnings, with_files


def index(*names: str, digits: str = "ab", **more: Any) -> FileIndex:
    return FileIndex.of(FileEntry(kind="embedding", name=name, sha256=digits * 32, **more) for name in names)


NAMES = index("EasyNegative", "cat", "cat dog", "bad-hands-5")


def names_in(prompt: str, syntax: str = "a1111", **fields: Any) -> list[str]:
    job = Job(prompt=prompt, prompt_syntax=syntax, **{"seed": 1, "steps": 10, **fields})
    return [key.removeprefix("embedding:") for key in with_files(job, NAMES).file_hashes]


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("easynegative", ["EasyNegative"]),
        ("(EASYNEGATIVE:1.3)", ["EasyNegative"]),
        ("cat dog", ["cat dog"]),
        ("Cat  Dog, cat", ["cat", "cat dog"]),
        ("cat, dog", ["cat"]),
        ("cats, concat, category", []),
        ("a (cat) dog", ["cat"]),  # Across a change of weight there is no name.
        (r"cat \(dog", ["cat"]),
        ("bad-hands-5", ["bad-hands-5"]),
        ("bad-hands-55", ["bad-hands-5"]),  # CLIP has a token for each digit.
        ("bad-hands", []),
        ("[red:EasyNegative:0.9]", ["EasyNegative"]),
        ("[red|EasyNegative]", ["EasyNegative"]),
        ("red AND cat :0.5", ["cat"]),
        ("red # cat", []),
        ("<cat>", ["cat"]),
    ],
)
def test_a_bare_word_is_a_name_in_automatic1111s_syntax(prompt: str, names: list[str]) -> None:
    assert names_in(prompt) == names
    assert names_in("red", negative_prompt=prompt) == (names if " AND " not in prompt else ["cat"])


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("a <cat>, <EasyNegative>", ["EasyNegative", "cat"]),
        ("a<cat dog>b", ["cat dog"]),
        ("cat EasyNegative", []),
        ("<easynegative>", []),
        ("<cat", []),
    ],
)
def test_a_name_in_brackets_is_one_in_plain_prompts(prompt: str, names: list[str]) -> None:
    assert names_in(prompt, "plain") == names


def test_what_looks_like_a_name_and_is_none_is_a_warning_with_near_misses() -> None:
    job = with_files(Job(prompt="a <cat> <easynegatve> <b>, 3 < 4", seed=1), NAMES)
    assert unknown_warnings(job, NAMES) == (
        (
            "<easynegatve> in the prompt is drawn as words: there is no embedding of that name. Did you mean "
            "<EasyNegative>?"
        ),
        "<b> in the prompt is drawn as words: there is no embedding of that name.",
    )
    assert not unknown_warnings(job.model_copy(update={"prompt_syntax": PromptSyntax.A1111}), NAMES)


def test_texts_are_split_into_words_and_names_and_nothing_is_lost() -> None:
    names = EmbeddingNames(["cat", "cat dog"])
    assert names.split("a cat dog, Cat!", PromptSyntax.A1111) == [
        "a ",
        Name("cat dog"),
        ", ",
        Name("cat"),
        "!",
    ]
    assert names.split("a <cat>", PromptSyntax.PLAIN) == ["a ", Name("cat")]
    assert names.split("nothing", PromptSyntax.A1111) == ["nothing"]


def test_another_content_is_another_job_and_no_embedding_is_the_job_of_before() -> None:
    job = Job(prompt="a <cat>", seed=1)
    first, second = (with_files(job, index("cat", digits=digits)) for digits in ("aa", "bb"))
    assert len({job.id, first.id, second.id}) == 3
    assert (job.version, first.version) == (1, 3)
    assert "file_hashes" not in job.model_dump(mode="json")
    # A file that no prompt names changes nothing.
    assert with_files(job, index("dog")).id == job.id
    # A job that is sent again keeps what it was sent with.
    assert with_files(first, index("cat", digits="bb")) == first
    assert with_files(first, NO_FILES) == first
    assert with_files(first.model_copy(update={"prompt": "a cat"}), NO_FILES).file_hashes == {}


def test_a_file_that_cannot_be_used_is_refused_where_it_is_named() -> None:
    broken = index("cat", problem="it is a pickle")
    with pytest.raises(InvalidJobError, match=r'The embedding "cat" cannot be used: it is a pickle\.'):
        with_files(Job(prompt="a <cat>", seed=1), broken)
    assert with_files(Job(prompt="a cat", seed=1), broken).file_hashes == {}


def test_who_lacks_a_file_lacks_its_content_whatever_its_name() -> None:
    job = with_files(Job(prompt="a <cat>", seed=1), NAMES)
    assert files_of(job) == ['embedding "cat" (ABABABABAB)']
    assert lacking(job, index("another name")) == []
    assert lacking(job, index("cat", digits="bb")) == ['embedding "cat" (ABABABABAB)']
    assert lacking(job, index("cat", problem="broken")) == files_of(job)


@pytest.mark.parametrize(
    ("hashes", "part"),
    [
        ({"cat": "ab" * 32}, "must be a kind and a name"),
        ({"embedding:cat": "AB" * 32}, "64 hexadecimal digits"),
        ({"embedding:cat": "ab"}, "64 hexadecimal digits"),
        ({f"embedding:{number}": "ab" * 32 for number in range(65)}, "has 65 files, the limit is 64"),
    ],
)
def test_hashes_that_are_none_are_refused(hashes: dict[str, str], part: str) -> None:
    with pytest.raises(InvalidJobError, match=part):
        Job.parse({"prompt": "x", "file_hashes": hashes})


def test_the_order_in_which_files_are_given_does_not_count() -> None:
    one, other = ({"embedding:a": "aa" * 32, "embedding:b": "bb" * 32} for _ in range(2))
    other = dict(reversed(other.items()))
    assert Job(prompt="x", seed=1, file_hashes=one).id == Job(prompt="x", seed=1, file_hashes=other).id


def test_infotext_names_embeddings_as_automatic1111_does_and_gives_the_job_back() -> None:
    job = with_files(
        Job(prompt="a <cat> <cat dog>", seed=1, width=64, height=64, steps=4, guidance_scale=5.0), NAMES
    )
    text = infotext.write(job)
    assert 'TI hashes: "cat: abababababab, cat dog: abababababab"' in text
    assert infotext.read(text).file_hashes == job.file_hashes
    with pytest.raises(InvalidJobError, match="no JSON object"):
        infotext.read("a\nSteps: 4, File hashes: x, Version: smallcat")


@pytest.mark.parametrize(
    "name", ["a:b", "a,b", "<a>", 'a"b', "a/b", "a(b)", "", " ", "a\nb", "x" * (MAX_NAME + 1)]
)
def test_names_that_mean_something_else_in_a_prompt_are_no_names(name: str) -> None:
    assert name_problem(name).endswith(("rename it", f"rename it, to 1 to {MAX_NAME}"))


@pytest.mark.parametrize("name", ["x ", "\u3000x", "x.safetensors"])
@pytest.mark.parametrize("kind", [Kind.LORA, Kind.VAE])
def test_a_name_that_no_job_can_ask_for_is_none(name: str, kind: Kind) -> None:
    """Fields of jobs are read without blanks around a name, and without a file's suffix."""
    field = {"loras": {name: 1}} if kind == Kind.LORA else {"vae": name}
    job = Job.parse({"prompt": "a", **field})
    assert [*(each.name for each in job.loras), job.vae][0] == "x"
    assert name_problem(name, kind).endswith("twice: rename it")


def test_a_vae_cannot_be_called_what_means_none() -> None:
    assert name_problem("None", Kind.VAE) == "its name says that there is none: rename it"
    assert not name_problem("none", Kind.LORA)


def test_brackets_are_letters_in_the_name_of_a_lora() -> None:
    assert not name_problem("add_detail (v2) [final]", Kind.LORA)
    assert name_problem("a:b", Kind.LORA).endswith("rename it")
    assert name_problem("a(b)", Kind.VAE).endswith("rename it")


def test_indexes_of_the_same_files_have_one_digest() -> None:
    assert index("a", "b").digest == index("b", "a").digest != index("a").digest
    assert NO_FILES.digest == ""
    assert NAMES.near(Kind.EMBEDDING, "EASYNEGATIV") == ["EasyNegative"]
