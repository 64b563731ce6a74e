"""How a line becomes jobs."""

from __future__ import annotations

from typing import Any

import pytest

from producer.prompts.reader import Entry
from producer.prompts.variants import Variants


def prompts(variants: Variants, *, line: int = 1, file: int = 0, **fields: Any) -> list[dict[str, Any]]:
    return [variant.fields for variant in variants.expand(Entry(line, fields), file)]


def test_command_line_fields_are_defaults_for_every_line() -> None:
    variants = Variants(defaults={"steps": 5, "negative_prompt": "dark", "metadata": {"a": 1, "b": 1}})
    [fields] = prompts(variants, prompt="cat", steps=9, metadata={"b": 2})
    assert (fields["steps"], fields["negative_prompt"]) == (9, "dark")
    assert fields["metadata"] == {"a": 1, "b": 2}


def test_a_sample_of_a_huge_prompt_is_drawn_without_expanding_it() -> None:
    many = "{" + "|".join(map(str, range(50))) + "}"
    drawn = prompts(Variants(sample=5), prompt=" ".join([many] * 20))
    assert len({fields["prompt"] for fields in drawn}) == 5


def test_images_give_seeds_that_depend_on_the_line_alone() -> None:
    twice = [prompts(Variants(images=3), line=4, prompt="cat") for _ in range(2)]
    assert twice[0] == twice[1]
    others = [
        prompts(Variants(images=3), line=5, prompt="cat"),
        prompts(Variants(images=3), prompt="dog"),
    ]
    others.append(prompts(Variants(images=3), line=4, file=1, prompt="cat"))
    seeds = [fields["seed"] for group in (twice[0], *others) for fields in group]
    assert len(set(seeds)) == len(seeds) == 12
    # What else a line says, and what is crossed, leaves its seeds alone: pictures stay comparable.
    assert prompts(Variants(images=3), line=4, prompt="cat", steps=9)[0]["seed"] == twice[0][0]["seed"]


@pytest.mark.parametrize(
    ("variants", "fields", "seeds"),
    [
        (Variants(images=3, seed_start=7), {}, [7, 8, 9]),
        (Variants(images=2, seed_start=7), {"seed": 40}, [40, 41]),
        (Variants(images=2, defaults={"seed": 5}), {}, [5, 6]),
        (Variants(images=2), {"seed": "many"}, ["many", "many"]),
        (Variants(grid={"seed": [1, 2]}, images=1), {}, [1, 2]),
    ],
)
def test_seeds_start_where_the_options_put_them(
    variants: Variants, fields: dict[str, Any], seeds: list[object]
) -> None:
    assert [each["seed"] for each in prompts(variants, prompt="cat", **fields)] == seeds


def test_a_grid_crosses_values_with_the_same_seed_in_each_cell() -> None:
    variants = Variants(images=2, grid={"steps": [20, 30], "guidance_scale": [5.0, 7.5]})
    found = list(variants.expand(Entry(1, {"prompt": "cat", "steps": 9}), 0))
    assert [variant.grid for variant in found[:4]] == [
        {"steps": steps, "guidance_scale": guidance} for steps in (20, 30) for guidance in (5.0, 7.5)
    ]
    assert len({variant.fields["seed"] for variant in found[:4]}) == 1
    assert len(found) == 8
    assert all(variant.fields["steps"] == variant.grid["steps"] for variant in found)


def test_both_prompts_vary_and_literal_leaves_them() -> None:
    fields = {"prompt": "{a|b}", "negative_prompt": "{c|d}"}
    found = prompts(Variants(), **fields)
    assert [(each["prompt"], each["negative_prompt"]) for each in found] == [
        ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")
    ]  # fmt: skip
    [left] = prompts(Variants(literal=True), **fields)
    assert left["prompt"] == "{a|b}"
