"""For each alert: series at which it fires, and series at which it does not, as promtool writes them.

A sample a minute. `0+1x30` is 0, 1, ... 30; `5x30` is 5, thirty-one times; `_x30` is no sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Series = dict[str, str]
_JOBS = "smallcat_jobs_total"
_BUCKETS = ("1", "15", "60", "+Inf")


@dataclass(frozen=True)
class Example:
    """When an alert fires, and when not, 30 minutes after the first sample."""

    fires: Series
    quiet: Series
    #: The labels that it has then, beside those of the rule.
    labels: dict[str, str] = field(default_factory=dict)


def _uploads(counts: tuple[int, ...]) -> Series:
    """Uploads a minute up to each bucket's seconds."""
    return {
        f'smallcat_uploaded_seconds_bucket{{le="{le}"}}': f"0+{count}x30"
        for le, count in zip(_BUCKETS, counts, strict=True)
    }


EXAMPLES = {
    "SmallcatRedisAway": Example({"smallcat_redis_up": "0x30"}, {"smallcat_redis_up": "0x29 1"}),
    "SmallcatRedisFull": Example(
        {"smallcat_redis_memory_ratio": "0.8 0.95x30"},
        {"smallcat_redis_memory_ratio": "0.95x27 0.89x3"},
    ),
    "SmallcatNoQueueFigures": Example({"up": "1x30"}, {"smallcat_redis_up": "0x30"}),
    "SmallcatTargetDown": Example(
        # Of a job of another name that has answered until lately, as an annotation's.
        {
            'up{job="pods", instance="a"}': "1x20 0x10",
            'smallcat_build_info{job="pods", instance="a", model="sdxl"}': "1x20 _x10",
            'up{job="pods", instance="b"}': "1x30",
        },
        {
            'up{job="smallcat/smallcat", instance="a"}': "1x30",
            'up{job="other", instance="a"}': "0x30",
            'up{job="worker", instance="b"}': "0x30",
            'smallcat_build_info{job="smallcat/smallcat", instance="a"}': "1x30",
        },
        {"job": "pods", "instance": "a"},
    ),
    "SmallcatNoWorkers": Example(
        {
            'smallcat_queue_jobs_waiting{model="sdxl", revision="1"}': "3x30",
            'smallcat_workers{model="sdxl", revision="1"}': "0x30",
            'smallcat_workers{model="sd15", revision="1"}': "4x30",
        },
        {
            # Any worker takes jobs that name no model.
            'smallcat_queue_jobs_waiting{model="default", revision=""}': "3x30",
            'smallcat_queue_jobs_waiting{model="sdxl", revision=""}': "3x30",
            'smallcat_workers{model="sdxl", revision="1"}': "1x30",
        },
        {"model": "sdxl"},
    ),
    "SmallcatJobsWaitLong": Example(
        {'smallcat_queue_oldest_seconds{model="sdxl", revision="1", tenants="yes"}': "0+60x30"},
        {'smallcat_queue_oldest_seconds{model="sdxl", revision="1", tenants="yes"}': "800x30"},
        {"model": "sdxl", "tenants": "yes"},
    ),
    "SmallcatJobsFail": Example(
        {
            f'{_JOBS}{{outcome="failed", reason="RenderError"}}': "0+2x30",
            f'{_JOBS}{{outcome="rendered", reason=""}}': "0+10x30",
        },
        {
            f'{_JOBS}{{outcome="failed", reason="RenderError"}}': "0+2x30",
            f'{_JOBS}{{outcome="rendered", reason=""}}': "0+100x30",
        },
    ),
    "SmallcatAttemptsFail": Example(
        {
            f'{_JOBS}{{outcome="retried", reason="RenderError"}}': "0+2x30",
            "smallcat_attempts_total": "0+10x30",
        },
        {
            f'{_JOBS}{{outcome="retried", reason="RenderError"}}': "0+2x30",
            "smallcat_attempts_total": "0+100x30",
        },
    ),
    "SmallcatWorkerPaused": Example(
        {'smallcat_paused{instance="a"}': "1x30"},
        {'smallcat_paused{instance="a"}': "0x30"},
        {"instance": "a"},
    ),
    "SmallcatWorkerStuck": Example(
        {
            'smallcat_jobs_in_flight{job="worker", instance="a"}': "8x30",
            'smallcat_step_seconds_count{job="worker", instance="a"}': "100x30",
            'smallcat_jobs_in_flight{job="worker", instance="b"}': "0x30",
            'smallcat_step_seconds_count{job="worker", instance="b"}': "100x30",
        },
        {
            'smallcat_jobs_in_flight{job="worker", instance="a"}': "8x30",
            'smallcat_step_seconds_count{job="worker", instance="a"}': "0+100x30",
        },
        {"job": "worker", "instance": "a"},
    ),
    "SmallcatOutOfMemory": Example(
        {'smallcat_out_of_memory_total{instance="a"}': "0+1x30"},
        {'smallcat_out_of_memory_total{instance="a"}': "0x10 2x19"},
        {"instance": "a"},
    ),
    "SmallcatMessagesSetAside": Example(
        {'smallcat_messages_set_aside_total{reason="poison"}': "0x25 1x5"},
        {'smallcat_messages_set_aside_total{reason="poison"}': "1x30"},
        {"reason": "poison"},
    ),
    "SmallcatRedeliveries": Example(
        {"smallcat_redeliveries_total": "0+4x30", "smallcat_attempts_total": "0+10x30"},
        {"smallcat_redeliveries_total": "0+1x30", "smallcat_attempts_total": "0+10x30"},
    ),
    "SmallcatUploadsSlow": Example(_uploads((10, 80, 100, 100)), _uploads((90, 99, 100, 100))),
    "SmallcatJobsForNewerWorkers": Example(
        {'smallcat_queue_jobs_parked{version="4"}': "2x30"},
        {'smallcat_queue_jobs_parked{version="4"}': "2x29 0"},
        {"version": "4"},
    ),
    "SmallcatWebhooksWait": Example(
        {"smallcat_webhooks_waiting": "1001x30"}, {"smallcat_webhooks_waiting": "1000x30"}
    ),
    "SmallcatWebhooksGivenUp": Example(
        {'smallcat_webhooks_total{ended="failed"}': "0x25 1x5"},
        {
            'smallcat_webhooks_total{ended="failed"}': "0x30",
            'smallcat_webhooks_total{ended="later"}': "0+1x30",
        },
    ),
}
