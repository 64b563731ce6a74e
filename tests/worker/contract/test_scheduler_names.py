"""Schedulers by the names that other programs use, and what is refused."""

from __future__ import annotations

import time

import pytest

from worker.contract.choices import ETA, SAMPLERS, SCHEDULES, NoiseSchedule, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.scheduler_names import (
    OFFERED,
    ONE_NAME,
    OWN,
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    Pair,
    pair_of,
)

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
    ("dpmpp_3m_sde_gpu", "exponential", "dpmpp_3m_sde exponential"),
    ("dpmpp_2m_sde_gpu", "karras", "dpmpp_2m_sde karras"),
    ("dpmpp_sde_gpu", "normal", "dpmpp_sde"),
    ("dpm_2_ancestral", "sgm_uniform", "dpm2_ancestral sgm_uniform"),
    ("euler", "simple", "euler simple"),
    ("euler", "beta", "euler beta"),
    ("sa_solver", "normal", "sa_solver"),
    ("ddpm", "normal", "ddpm"),
    # AUTOMATIC1111 1.10: its samplers' own schedules, and the names of its schedules.
    ("DPM++ SDE", "Automatic", "dpmpp_sde karras"),
    ("DPM++ 2M SDE", "Automatic", "dpmpp_2m_sde exponential"),
    ("DPM++ 3M SDE", "Automatic", "dpmpp_3m_sde exponential"),
    ("DPM2", "Automatic", "dpm2 karras"),
    ("DPM2 a", "Automatic", "dpm2_ancestral karras"),
    ("Heun", "Automatic", "heun"),
    ("LMS", "Automatic", "lms"),
    ("Euler", "SGM Uniform", "euler sgm_uniform"),
    ("Euler", "Align Your Steps", "euler align_your_steps"),
    ("DPM++ 2M", "Exponential", "dpmpp_2m exponential"),
    # diffusers: two options tell three samplers of one class apart.
    ("DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++)", None, "dpmpp_2m_sde"),
    (
        "DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++, solver_order=3, use_karras_sigmas=1)",
        None,
        "dpmpp_3m_sde karras",
    ),
    ("DPMSolverMultistepScheduler(use_beta_sigmas=True)", None, "dpmpp_2m beta"),
    ("EulerDiscreteScheduler(timestep_spacing=trailing)", None, "euler sgm_uniform"),
    ("HeunDiscreteScheduler", None, "heun"),
    ("KDPM2AncestralDiscreteScheduler", "karras", "dpm2_ancestral karras"),
    ("DPMSolverSinglestepScheduler", None, "dpmpp_2s"),
    # InvokeAI 5.
    *(
        (name, None, meant)
        for name, meant in {
            "deis_k": "deis karras",
            "lms_k": "lms karras",
            "heun_k": "heun karras",
            "euler_k": "euler karras",
            "kdpm_2": "dpm2",
            "kdpm_2_k": "dpm2 karras",
            "kdpm_2_a": "dpm2_ancestral",
            "kdpm_2_a_k": "dpm2_ancestral karras",
            "dpmpp_2s_k": "dpmpp_2s karras",
            "dpmpp_2m_sde_k": "dpmpp_2m_sde karras",
            "dpmpp_sde_k": "dpmpp_sde karras",
            "unipc_k": "unipc karras",
            "tcd": "tcd",
            "ddpm": "ddpm",
        }.items()
    ),
    # Civitai's names, without those that are above, and without DPM fast and DPM adaptive.
    *(
        (name, None, meant)
        for name, meant in {
            "LMS": "lms",
            "LMS Karras": "lms karras",
            "Heun": "heun",
            "DPM2": "dpm2",
            "DPM2 Karras": "dpm2 karras",
            "DPM2 a": "dpm2_ancestral",
            "DPM2 a Karras": "dpm2_ancestral karras",
            "DPM++ 2S a": "dpmpp_2s_ancestral",
            "DPM++ 2S a Karras": "dpmpp_2s_ancestral karras",
            "DPM++ SDE": "dpmpp_sde",
            "DPM++ SDE Karras": "dpmpp_sde karras",
            "DPM++ 2M SDE": "dpmpp_2m_sde",
            "DPM++ 2M SDE Karras": "dpmpp_2m_sde karras",
            "DPM++ 3M SDE": "dpmpp_3m_sde",
            "DPM++ 3M SDE Karras": "dpmpp_3m_sde karras",
            "DPM++ 3M SDE Exponential": "dpmpp_3m_sde exponential",
            "Undefined": "default",
        }.items()
    ),
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


def meaning(text: str) -> Pair:
    scheduler, _, schedule = text.partition(" ")
    return Pair(Scheduler(scheduler), NoiseSchedule(schedule or "default"))


@pytest.mark.parametrize(("sampler", "schedule", "meant"), MEANT)
def test_a_scheduler_is_read_by_the_name_that_a_program_writes(
    sampler: str | None, schedule: str | None, meant: str
) -> None:
    assert pair_of(sampler, schedule) == meaning(meant)
    if sampler:
        given = {"scheduler": sampler} | ({"schedule": schedule} if schedule else {})
        job = Job.parse({"prompt": "x", **given})
        assert (job.scheduler, job.schedule) == meaning(meant)


#: Samplers of these programs that are not offered.
ABSENT = ["DPM fast", "DPM adaptive", "Restart", "euler_cfg_pp", "dpmpp_2m_sde_heun", "heunpp2", "ipndm_v"]
ABSENT += ["dpmpp_2s_ancestral_cfg_pp", "DPM++ 2M SDE Heun", "res_multistep", "dpmpp_3m_k"]


@pytest.mark.parametrize("sampler", ABSENT)
def test_a_sampler_that_is_not_offered_is_refused_with_what_is(sampler: str) -> None:
    with pytest.raises(InvalidJobError, match="use one of default, ddim, euler") as error:
        pair_of(sampler, "karras")
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
        pair_of(misspelt)


@pytest.mark.parametrize("other", ["DPM++ 3M", "ipndm"])
def test_another_sampler_is_no_misspelling(other: str) -> None:
    with pytest.raises(InvalidJobError, match="use one of default, ddim"):
        pair_of(other)


#: What AUTOMATIC1111 1.10 makes a sampler with: modules/sd_samplers_kdiffusion.py.
AUTOMATIC = dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpm2", "dpm2_ancestral"), "karras")
AUTOMATIC["dpmpp_2s_ancestral"] = "karras"
AUTOMATIC |= dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential")


def test_every_schedule_goes_with_every_sampler_or_is_refused_by_name() -> None:
    """The kind: none is dropped, in either of the two places where it can stand."""
    for sampler, names in SAMPLER_NAMES.items():
        for schedule, spellings in SCHEDULE_NAMES.items():
            asked = AUTOMATIC.get(sampler, "default") if schedule == "automatic" else schedule
            expected = Pair(sampler, NoiseSchedule.DEFAULT)
            if (sampler, asked) in ONE_NAME:
                expected = Pair(ONE_NAME[sampler, asked], NoiseSchedule.DEFAULT)
            elif asked in OFFERED[sampler]:
                expected = Pair(sampler, NoiseSchedule(asked))
            is_offered = asked == "default" or asked in OFFERED[sampler] or (sampler, asked) in OWN
            for spelling in spellings:
                for way in ((names[0], spelling), (f"{names[0]} {spelling}", None)):
                    if is_offered:
                        assert pair_of(*way) == expected
                    else:
                        with pytest.raises(InvalidJobError, match=r"which is not offered: with|name the sch"):
                            pair_of(*way)


def test_what_is_offered() -> None:
    """Every sampler has its line, and no schedule twice."""
    assert {*OFFERED, *ONE_NAME.values()} == set(Scheduler) == {*SAMPLER_NAMES, *ONE_NAME.values()}
    assert all(len(set(schedules)) == len(schedules) for schedules in OFFERED.values())
    assert NoiseSchedule.DEFAULT not in {each for schedules in OFFERED.values() for each in schedules}
    assert set(NoiseSchedule) <= set(SCHEDULE_NAMES)
    assert set(NoiseSchedule) == set(SCHEDULES)


def test_a_pair_that_has_one_name_is_the_job_of_that_name() -> None:
    """As jobs, ids and messages of the first version have it."""
    ways = [
        {"scheduler": "dpmpp_2m_karras"},
        {"scheduler": "dpmpp_2m", "schedule": "karras"},
        {"scheduler": "DPM++ 2M Karras"},
        {"scheduler": "DPM++ 2M Karras", "schedule": "default"},
        {"scheduler": "dpmpp_2m_karras", "schedule": "Karras"},
    ]
    jobs = [Job.parse({"prompt": "x", "seed": 1, **way}) for way in ways]
    assert {(job.scheduler, job.schedule, job.version) for job in jobs} == {("dpmpp_2m_karras", "default", 1)}
    assert len({job.id for job in jobs}) == 1
    assert "schedule" not in jobs[1].model_dump(mode="json")


def test_a_schedule_needs_its_scheduler_and_is_part_of_the_job() -> None:
    plain, karras, beta = (
        Job.parse({"prompt": "x", "seed": 1, "scheduler": "heun", "schedule": schedule})
        for schedule in ("default", "Karras", NoiseSchedule.BETA)
    )
    assert len({plain.id, karras.id, beta.id}) == 3
    assert Job.parse(karras.model_dump(mode="json")) == karras
    with pytest.raises(InvalidJobError, match="'default' with the schedule 'karras': name the scheduler too"):
        Job.parse({"prompt": "x", "schedule": "karras"})


def test_errors_of_a_pair_stand_beside_those_of_other_fields() -> None:
    with pytest.raises(InvalidJobError) as error:
        Job.parse({"prompt": "", "scheduler": "Euler a Karras", "steps": 500})
    assert "prompt is empty" in str(error.value)
    assert "steps is 500" in str(error.value)
    assert "scheduler is 'Euler a Karras' with the schedule 'karras', which is not off" in str(error.value)


def test_an_eta_is_for_the_schedulers_that_take_one_and_its_default_is_none() -> None:
    for name in Scheduler:
        given = {"prompt": "x", "seed": 1, "scheduler": name}
        plain = Job.parse(given)
        if name not in ETA:
            with pytest.raises(
                InvalidJobError, match=r"eta is 0\.5, but it is not for .* use ddim or tcd or eu"
            ):
                Job.parse(given | {"eta": 0.5})
            continue
        half, default = Job.parse(given | {"eta": 0.5}), Job.parse(given | {"eta": ETA[name]})
        assert (half.version, default.id) == (3, plain.id)
        assert half.id != plain.id
        assert default == plain
        assert Job.parse(half.model_dump(mode="json")) == half
    with pytest.raises(InvalidJobError, match="not for the model's own scheduler"):
        Job.parse({"prompt": "x", "eta": 0})


def test_align_your_steps_has_as_many_steps_as_diffusers_has_noise_levels() -> None:
    given = {"prompt": "x", "scheduler": "euler", "schedule": "AYS"}
    assert Job.parse(given | {"steps": 10}).schedule is NoiseSchedule.ALIGN_YOUR_STEPS
    assert Job.parse(given).steps is None
    with pytest.raises(
        InvalidJobError, match=r'schedule is "align_your_steps", which has 10 steps, .* is 20'
    ):
        Job.parse(given | {"steps": 20})


@pytest.mark.parametrize("scheduler", Scheduler)
def test_our_own_names_and_automatic1111s_are_read(scheduler: Scheduler) -> None:
    assert pair_of(scheduler) == pair_of(SAMPLERS[scheduler])
    assert Job.parse({"prompt": "x", "scheduler": scheduler}).scheduler is scheduler


@pytest.mark.parametrize(
    ("sampler", "schedule", "sentence"),
    [
        (
            "Euler a",
            "Exponential",
            "scheduler is 'Euler a' with the schedule 'Exponential', which is not offered: with euler_ancest",
        ),
        ("euler", "my own", "scheduler is 'euler' with the schedule 'my own', which is not offered"),
        (
            "DPM++ 2M Karras",
            "Exponential",
            "scheduler is 'DPM++ 2M Karras' with the schedule 'Exponential': use",
        ),
        ("karras", None, "scheduler is 'karras', which is a schedule: name the sampler too"),
        (None, "Karras", "scheduler is 'Karras', which is a schedule: name the sampler too"),
        ("ddim_k", None, "scheduler is 'ddim_k' with the schedule 'karras', which is not offered"),
        (
            "DPMSolverMultistepScheduler(algorithm_type=dpmsolver)",
            None,
            "scheduler has the option 'algorithm_type=dpmsolver', which is not offered: leave it out.",
        ),
        (
            "DPMSolverMultistepScheduler(solver_order=3)",
            None,
            "scheduler has the option 'solver_order=3', which is not offered: leave it out.",
        ),
        (
            "PNDMScheduler(use_beta_sigmas=True)",
            None,
            "scheduler is 'PNDMScheduler(use_beta_sigmas=True)' with the schedule 'beta', which is not",
        ),
        (
            "EulerDiscreteScheduler(timestep_spacing=leading)",
            None,
            "scheduler has the option 'timestep_spacing",
        ),
    ],
)
def test_the_sentence_names_the_value_and_the_remedy(
    sampler: str | None, schedule: str | None, sentence: str
) -> None:
    with pytest.raises(InvalidJobError) as error:
        pair_of(sampler, schedule)
    assert str(error.value).startswith(sentence)


def test_a_huge_name_is_refused_at_once() -> None:
    started = time.process_time()
    for huge in ("a" * 10**6, "k_" * 10**6, "DDIMScheduler(" + "a=" * 10**6, " " * 10**6 + "x"):
        for pair in ((huge, None), ("euler", huge)):
            with pytest.raises(InvalidJobError) as error:
                pair_of(*pair)
            assert len(str(error.value)) < 500
    assert time.process_time() - started < 2
