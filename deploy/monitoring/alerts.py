"""The alerts: when each fires, and what its reader is to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Alert:
    """One alert, and its part of the runbook."""

    #: Its name; in small letters also the anchor in the runbook.
    name: str
    #: PromQL that has a result while it should fire, and for how long it must have.
    expr: str
    lasts: str
    #: critical: somebody must come now. warning: in working hours.
    severity: Literal["critical", "warning"]
    #: One sentence: what is so.
    summary: str
    #: What it means for those who wait for pictures.
    meaning: str
    #: What to look at and to do, in order.
    steps: tuple[str, ...]


_NO_WORKERS = (
    '(sum by (model) (smallcat_queue_jobs_waiting{model!="default"}) > 0 '
    "unless sum by (model) (smallcat_workers) > 0) "
    'or (sum by (model) (smallcat_queue_jobs_waiting{model="default"}) > 0 '
    "unless on () sum(smallcat_workers) > 0)"
)
_FAILED_SHARE = (
    'sum(increase(smallcat_jobs_total{outcome="failed"}[15m])) >= 5 and '
    'sum(increase(smallcat_jobs_total{outcome="failed"}[15m])) > '
    '0.05 * sum(increase(smallcat_jobs_total{outcome=~"failed|rendered|cached"}[15m]))'
)
_RETRIED_SHARE = (
    'sum(increase(smallcat_jobs_total{outcome="retried"}[15m])) >= 5 and '
    'sum(increase(smallcat_jobs_total{outcome="retried"}[15m])) > '
    "0.1 * sum(increase(smallcat_attempts_total[15m]))"
)
#: By its name, or because it has answered with our metrics within the hour, whatever the job is called.
_TARGET_DOWN = (
    '(up{job=~"(.+/)?smallcat.*"} == 0) or (up == 0 and on (job, instance) '
    'last_over_time({__name__=~"smallcat_build_info|smallcat_webhooks_given_up"}[1h]))'
)

ALERTS = (
    Alert(
        "SmallcatRedisAway",
        "max(smallcat_redis_up) == 0",
        "1m",
        "critical",
        "Redis does not answer smallcat's metrics exporter.",
        "Nobody can submit or follow jobs. Workers keep what they render, and go on when Redis answers.",
        (
            "Run `smallcat doctor` where the exporter runs: it says what is at fault.",
            (
                "Look whether Redis runs, and whether its memory or its disk is full. A full Redis "
                "refuses writes."
            ),
            "After its return check that jobs go on: `smallcat_queue_oldest_seconds` falls.",
        ),
    ),
    Alert(
        "SmallcatRedisFull",
        "max(smallcat_redis_memory_ratio) > 0.9",
        "5m",
        "critical",
        "Redis uses more than 90% of its maxmemory.",
        "When it is full, nobody can submit jobs. Workers go on, lose nothing, and make room.",
        (
            "`smallcat doctor` says how full it is, and what waits. Start more workers where jobs wait.",
            "Raise its maxmemory at once where the machine has room: `CONFIG SET maxmemory`.",
            "Find what takes the room, and what to do about it: [a full Redis](recovery.md#a-full-redis).",
        ),
    ),
    Alert(
        "SmallcatNoQueueFigures",
        "absent(smallcat_redis_up)",
        "5m",
        "critical",
        "`smallcat metrics` is not scraped: nobody sees the queues.",
        (
            "Jobs go on. But a fleet that is scaled by these figures is not scaled, and the alerts "
            "on queues see nothing."
        ),
        (
            "Look whether the exporter (`smallcat metrics --port 9090`) runs, and at its log.",
            (
                "Look at Prometheus' page of targets: its error says whether the port or the "
                "network is at fault."
            ),
        ),
    ),
    Alert(
        "SmallcatTargetDown",
        _TARGET_DOWN,
        "5m",
        "warning",
        "A worker, the exporter or a sender of webhooks does not answer Prometheus.",
        "It may have ended, or start: a first start takes minutes. The others take its jobs.",
        (
            (
                "Look at the process and the end of its log: a worker that cannot start says why in "
                "its last line."
            ),
            "Where it runs, check `SMALLCAT_METRICS_PORT` and the network between Prometheus and it.",
            (
                "Where it is gone for good, remove it from Prometheus' configuration. A target whose job is "
                "not called `smallcat...` is forgotten an hour after its last answer."
            ),
        ),
    ),
    Alert(
        "SmallcatNoWorkers",
        _NO_WORKERS,
        "10m",
        "critical",
        "Jobs wait for a model that no worker serves.",
        "These jobs wait until a worker for the model comes. None is lost.",
        (
            "`smallcat doctor` lists the models that are served. A worker that is paused does not count.",
            (
                "Where the fleet is scaled: look whether the autoscaler asked for workers, and "
                "whether nodes are there."
            ),
            (
                "Where workers start and end again, their last line says why: the setting, its "
                "value, the remedy."
            ),
            "Where nobody will serve that model: cancel the jobs.",
        ),
    ),
    Alert(
        "SmallcatJobsWaitLong",
        "max by (model, tenants) (smallcat_queue_oldest_seconds) > 900",
        "5m",
        "warning",
        "The oldest job of a model has waited for more than 15 minutes.",
        (
            "The fleet has more work than it can do. A large prompt file that is meant to wait can "
            "be the reason, too."
        ),
        (
            "Look at the dashboard: do pictures a second fall, or do submissions rise?",
            "Start more workers of the model, or raise the most that the autoscaler may start.",
            "Submit files with a lower priority: live jobs pass them.",
            "Where one tenant fills the queue: set its weight or its limits.",
        ),
    ),
    Alert(
        "SmallcatJobsFail",
        _FAILED_SHARE,
        "5m",
        "critical",
        "More than 5% of jobs failed in the last 15 minutes.",
        "Those who sent them get an error in the place of a picture.",
        (
            "The dashboard's panel of failures has the class of each error: see [errors](errors.md).",
            "`smallcat failed list` has the jobs, `smallcat failed show ID` each attempt with its text.",
            "Where one model or one worker is at fault, stop that worker: the others take its jobs.",
            "When it is mended: `smallcat failed retry ID`.",
        ),
    ),
    Alert(
        "SmallcatAttemptsFail",
        _RETRIED_SHARE,
        "10m",
        "warning",
        "More than 10% of attempts failed and are made again.",
        "Jobs take longer. They fail if their last attempt fails, too.",
        (
            "Read the workers' logs: each failed attempt is one line with its error.",
            "Look whether one worker alone has them: a GPU that is failing shows so first.",
        ),
    ),
    Alert(
        "SmallcatWorkerPaused",
        "smallcat_paused == 1",
        "5m",
        "critical",
        "A worker takes no jobs, because the bucket refuses its pictures.",
        "Its jobs are back in the queue. Where all workers share the rights, nothing is rendered.",
        (
            "`smallcat doctor` on that machine says what the bucket refuses.",
            (
                "Give the worker its rights again, or make room: a full bucket refuses, too. The "
                "worker goes on by itself."
            ),
        ),
    ),
    Alert(
        "SmallcatWorkerStuck",
        "smallcat_jobs_in_flight > 0 and on (job, instance) increase(smallcat_step_seconds_count[10m]) == 0",
        "5m",
        "critical",
        "A worker has jobs in flight, and made no step for 10 minutes.",
        "These jobs do not move. The worker's own watchdog ends it after `SMALLCAT_JOB_TIMEOUT_S`.",
        (
            "Ask its `/ready` and `/live`: they give the reason.",
            "Where the storage is slow or away, jobs wait for their upload: see that first.",
            "Where the GPU hangs (`nvidia-smi` does not answer), kill the worker: its jobs go to others.",
        ),
    ),
    Alert(
        "SmallcatOutOfMemory",
        "increase(smallcat_out_of_memory_total[30m]) > 5",
        "0m",
        "warning",
        "A worker ran out of the GPU's memory again and again.",
        "Jobs are tried again in smaller batches, so they take longer. Those that do not fit alone fail.",
        (
            "Look whether another process uses the GPU: `nvidia-smi`.",
            "Lower `SMALLCAT_MAX_BATCH`, or serve sizes that fit: `smallcat_gpu_memory_bytes` has the peaks.",
        ),
    ),
    Alert(
        "SmallcatMessagesSetAside",
        "sum by (reason) (increase(smallcat_messages_set_aside_total[15m])) > 0",
        "0m",
        "warning",
        "A worker set a message aside, from which it could not read a job or which came back too often.",
        "Unreadable: something else writes into the queues. Poison: workers died each time that they had it.",
        (
            "`smallcat failed list --unreadable` has each with the reason.",
            "For poison, read the logs of the workers that died: their names are in the job's attempts.",
        ),
    ),
    Alert(
        "SmallcatRedeliveries",
        "sum(increase(smallcat_redeliveries_total[15m])) > 10 and "
        "sum(increase(smallcat_redeliveries_total[15m])) > 0.2 * sum(increase(smallcat_attempts_total[15m]))",
        "10m",
        "warning",
        "More than a fifth of jobs had been with another worker before.",
        "Workers end in the middle of jobs, or lose their leases. Work is done twice.",
        (
            (
                "Look how often workers start: a deployment that goes on and on, spot nodes that "
                "are taken away, a crash."
            ),
            (
                "Where none ended: leases run out. Look whether Redis was away for longer than "
                "`SMALLCAT_LEASE_S`."
            ),
        ),
    ),
    Alert(
        "SmallcatUploadsSlow",
        "histogram_quantile(0.95, sum by (le) (rate(smallcat_uploaded_seconds_bucket[10m]))) > 15",
        "10m",
        "warning",
        "One upload in twenty takes longer than 15 seconds.",
        "Pictures come late. Workers hold more jobs, and render fewer once all slots wait for the storage.",
        (
            "Look at the storage's own page of its state, and at the network to it.",
            "Look into the workers' logs: each request that is tried again is a line.",
        ),
    ),
    Alert(
        "SmallcatJobsForNewerWorkers",
        "sum by (version) (smallcat_queue_jobs_parked) > 0",
        "30m",
        "warning",
        "Jobs wait for a worker of a newer version.",
        "Producers were upgraded before workers. These jobs wait until one worker is upgraded.",
        (
            "Upgrade a worker: it takes these jobs.",
            "`smallcat failed list --parked` lists them; `smallcat failed drop --parked ID` gives them up.",
        ),
    ),
    Alert(
        "SmallcatWebhooksWait",
        "max(smallcat_webhooks_waiting) > 1000",
        "15m",
        "warning",
        "More than 1,000 notifications wait to be sent.",
        "Receivers learn late how their jobs ended. The jobs are not concerned.",
        (
            "`smallcat webhooks list --waiting` shows to which hosts, and their last errors.",
            "Where all wait: look whether a sender runs and reaches the receivers.",
            "Where one host is slow, the others are not held up: tell its owner.",
        ),
    ),
    Alert(
        "SmallcatWebhooksGivenUp",
        'sum(increase(smallcat_webhooks_total{ended="failed"}[1h])) > 0',
        "0m",
        "warning",
        "A notification was given up after its last attempt.",
        "A receiver was not told how a job ended. It is kept for 30 days.",
        (
            "`smallcat webhooks list` has its host and the last error.",
            "When the receiver is mended: `smallcat webhooks retry ID`.",
        ),
    ),
)
