"""Schedulers by the names that other programs use, and what is refused."""

from __future__ import annotations

import time

import pytest

from worker.contract.choices import SAMPLERS, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.scheduler_names import OFFERED, SAMPLER_NAMES, SCHEDULE_NAMES, scheduler_of

#: What each program writes, and what it means here.
MEANT = [
    # AUTOMATIC1111 before 1.9: the schedule is part of the sampler's name.
    ("Euler a", None, "euler_ancestral"),
    ("Euler", None, "euler"),
    ("DPM++ 2M Karras", None, "dpmpp_2m_karras"),
    ("DPM++ 2M", None, "dpmpp_2m"),
    ("DDIM", None, "ddim"),
    ("PLMS", None, "pndm"),
    ("UniPC", None, "unipc"),
    ("LCM", None, "lcm"),
    # Since 1.9 it has a name of its own. "Automatic" is what the sampler's options say there: sd_samplers_
    # kdiffusion.py of 1.10 has {'scheduler': 'karras'} for DPM++ 2M, and nothing for Euler.
    ("DPM++ 2M", "Karras", "dpmpp_2m_karras"),
    ("DPM++ 2M", "Automatic", "dpmpp_2m_karras"),
    ("DPM++ 2M", "Uniform", "dpmpp_2m"),
    ("DPM++ 2M", "Normal", "dpmpp_2m"),
    ("DPM++ 2M Karras", "Automatic", "dpmpp_2m_karras"),
    ("DPM++ 2M Karras", "Karras", "dpmpp_2m_karras"),
    ("Euler a", "Automatic", "euler_ancestral"),
    ("Euler", "Uniform", "euler"),
    ("DDIM", "Automatic", "ddim"),
    ("k_euler_a", None, "euler_ancestral"),
    ("k_dpmpp_2m_ka", None, "dpmpp_2m_karras"),
    # ComfyUI 0.3: sampler_name and scheduler.
    ("euler", "normal", "euler"),
    ("euler_ancestral", "normal", "euler_ancestral"),
    ("dpmpp_2m", "karras", "dpmpp_2m_karras"),
    ("dpmpp_2m", "normal", "dpmpp_2m"),
    ("uni_pc", "normal", "unipc"),
    ("uni_pc_bh2", "normal", "unipc"),
    ("ddim", "ddim_uniform", "ddim"),
    ("ddim", "normal", "ddim"),
    ("lcm", "sgm_uniform", "lcm"),
    # k-diffusion.
    ("k_euler", None, "euler"),
    ("k_euler_ancestral", None, "euler_ancestral"),
    ("k_dpmpp_2m", None, "dpmpp_2m"),
    ("sample_dpmpp_2m", "karras", "dpmpp_2m_karras"),
    # diffusers 0.42.
    ("DDIMScheduler", None, "ddim"),
    ("EulerDiscreteScheduler", None, "euler"),
    ("EulerAncestralDiscreteScheduler", None, "euler_ancestral"),
    ("PNDMScheduler", None, "pndm"),
    ("UniPCMultistepScheduler", None, "unipc"),
    ("LCMScheduler", None, "lcm"),
    ("DPMSolverMultistepScheduler", None, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", "karras", "dpmpp_2m_karras"),
    ("DPMSolverMultistepScheduler(use_karras_sigmas=True)", None, "dpmpp_2m_karras"),
    ("DPMSolverMultistepScheduler(algorithm_type='dpmsolver++', solver_order=2)", None, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler(algorithm_type='dpmsolver++')", "Karras", "dpmpp_2m_karras"),
    ("DPMSolverMultistepScheduler use_karras_sigmas=true", None, "dpmpp_2m_karras"),
    # InvokeAI 5, and "plms" of its first versions.
    ("dpmpp_2m_k", None, "dpmpp_2m_karras"),
    ("unipc", None, "unipc"),
    ("euler_a", None, "euler_ancestral"),
    ("pndm", None, "pndm"),
    ("plms", None, "pndm"),
    # Ours, in whatever case and with whatever between the words.
    ("default", None, "default"),
    ("dpmpp-2m karras", None, "dpmpp_2m_karras"),
    ("EULER A", None, "euler_ancestral"),
    # One of the two columns alone.
    (None, "euler_a", "euler_ancestral"),
    ("", "DPM++ 2M Karras", "dpmpp_2m_karras"),
    (None, "Automatic", "default"),
    (None, None, "default"),
]


@pytest.mark.parametrize(("sampler", "schedule", "meant"), MEANT)
def test_a_scheduler_is_read_by_the_name_that_a_program_writes(
    sampler: str | None, schedule: str | None, meant: str
) -> None:
    assert scheduler_of(sampler, schedule) is Scheduler(meant)
    if schedule is None and sampler:
        assert Job.parse({"prompt": "x", "scheduler": sampler}).scheduler is Scheduler(meant)


#: Samplers and schedules of these programs that are not offered.
ABSENT = ["DPM++ SDE Karras", "DPM++ 2M SDE", "dpmpp_2m_sde_gpu", "heun", "k_lms", "DPM2 a", "DPM++ 3M SDE"]
ABSENT += ["HeunDiscreteScheduler", "deis", "kdpm_2_a", "tcd", "Restart", "euler_cfg_pp", "DPM adaptive"]


@pytest.mark.parametrize("sampler", ABSENT)
def test_a_sampler_that_is_not_offered_is_refused_with_what_is(sampler: str) -> None:
    with pytest.raises(InvalidJobError, match="use one of default, ddim, euler") as error:
        scheduler_of(sampler, "karras")
    assert sampler in str(error.value)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        *(("eulr", "euler"), ("euelr", "euler"), ("Eulr a", "euler_ancestral"), ("ddmi", "ddim")),
        *(("dpmp_2m", "dpmpp_2m"), ("unpic", "unipc"), ("defualt", "default")),
    ],
)
def test_a_misspelt_sampler_names_the_one_that_is_near(misspelt: str, meant: str) -> None:
    with pytest.raises(InvalidJobError, match=f'did you mean "{meant}"\\? Use one of default, ddim'):
        scheduler_of(misspelt)


@pytest.mark.parametrize("other", ["ddpm", "DPM++ 2S", "DPM++ 3M", "ipndm", "lms", "k_lms", "sample_lms"])
def test_another_sampler_is_no_misspelling(other: str) -> None:
    with pytest.raises(InvalidJobError, match="use one of default, ddim"):
        scheduler_of(other)


def test_every_schedule_goes_with_every_sampler_or_is_refused_by_name() -> None:
    """The kind: none is dropped, in either of the two places where it can stand."""
    own = {"": None, "automatic": None}
    for sampler, names in SAMPLER_NAMES.items():
        for schedule, spellings in SCHEDULE_NAMES.items():
            for spelling in spellings:
                ways = [(names[0], spelling), (f"{names[0]} {spelling}", None)]
                for way in ways:
                    if schedule in own:
                        expected = {"automatic": {Scheduler.DPMPP_2M: Scheduler.DPMPP_2M_KARRAS}}
                        assert scheduler_of(*way) is expected.get(schedule, {}).get(sampler, sampler)
                    elif (sampler, schedule) in OFFERED:
                        assert scheduler_of(*way) is OFFERED[sampler, schedule]
                    else:
                        with pytest.raises(InvalidJobError, match="which is not offered"):
                            scheduler_of(*way)


def test_what_is_offered() -> None:
    """The list to extend: a new schedule is a line of `OFFERED` and a line here."""
    assert {(str(start), schedule, str(end)) for (start, schedule), end in OFFERED.items()} == {
        ("dpmpp_2m", "karras", "dpmpp_2m_karras"),
        ("ddim", "ddim_uniform", "ddim"),
        ("lcm", "sgm_uniform", "lcm"),
    }
    assert {*SAMPLER_NAMES, *OFFERED.values()} == set(Scheduler)


@pytest.mark.parametrize("scheduler", Scheduler)
def test_our_own_names_and_automatic1111s_are_read(scheduler: Scheduler) -> None:
    assert scheduler_of(scheduler) is scheduler_of(SAMPLERS[scheduler]) is scheduler


@pytest.mark.parametrize(
    ("sampler", "schedule", "sentence"),
    [
        (
            "DPM++ 2M",
            "Exponential",
            "scheduler is 'DPM++ 2M' with the schedule 'Exponential', which is not offered: use normal or ",
        ),
        ("euler", "my own", "scheduler is 'euler' with the schedule 'my own', which is not offered"),
        (
            "DPM++ 2M Karras",
            "Exponential",
            "scheduler is 'DPM++ 2M Karras' with the schedule 'Exponential': use",
        ),
        ("karras", None, "scheduler is 'karras', which is a schedule: name the sampler too"),
        (None, "Karras", "scheduler is 'Karras', which is a schedule: name the sampler too"),
        ("euler_k", None, "scheduler is 'euler_k' with the schedule 'karras', which is not offered"),
        (
            "DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++)",
            None,
            "scheduler has the option 'algorithm_type=sde-dpmsolver++', which is not offered: leave it out.",
        ),
        (
            "DPMSolverMultistepScheduler(use_beta_sigmas=True)",
            None,
            "scheduler is 'DPMSolverMultistepScheduler(use_beta_sigmas=True)' with the schedule 'beta'",
        ),
        (
            "EulerDiscreteScheduler(timestep_spacing=trailing)",
            None,
            "scheduler has the option 'timestep_spacing",
        ),
    ],
)
def test_the_sentence_names_the_value_and_the_remedy(
    sampler: str | None, schedule: str | None, sentence: str
) -> None:
    with pytest.raises(InvalidJobError) as error:
        scheduler_of(sampler, schedule)
    assert str(error.value).startswith(sentence)


def test_a_huge_name_is_refused_at_once() -> None:
    started = time.process_time()
    for huge in ("a" * 10**6, "k_" * 10**6, "DDIMScheduler(" + "a=" * 10**6, " " * 10**6 + "x"):
        for pair in ((huge, None), ("euler", huge)):
            with pytest.raises(InvalidJobError) as error:
                scheduler_of(*pair)
            assert len(str(error.value)) < 400
    assert time.process_time() - started < 2
