"""The command `shares`: which tenants wait, and how much of the workers' time each gets."""

from __future__ import annotations

import click

from producer.cli.json_output import json_option, print_json, say
from producer.session import session
from worker.contract.plain_text import counted
from worker.state.tenants import Weights, waiting_of_tenants

#: How jobs without a tenant are shown.
_NOBODY = "(no tenant)"


@click.group()
def shares() -> None:
    """Show which tenants wait, and set how much of the workers' time each gets."""


@shares.command("list")
@json_option
def shares_list(as_json: bool) -> None:
    """List the tenants with jobs that wait, and those with a weight other than 1."""
    now = session()
    with now.queue_errors():
        weights = Weights(now.redis).all()
        waiting: dict[str, int] = {}
        for queue, count in now.fleet.waiting().items():
            of_tenants = waiting_of_tenants(now.redis, queue)
            # Read a moment later: others may have come.
            of_tenants[""] = max(0, count - sum(of_tenants.values()))
            for tenant, jobs in of_tenants.items():
                waiting[tenant] = waiting.get(tenant, 0) + jobs
    found = [
        {"tenant": tenant, "weight": weights.get(tenant, 1.0), "waiting": waiting.get(tenant, 0)}
        for tenant in sorted({*waiting, *weights})
        if waiting.get(tenant) or tenant in weights
    ]
    if as_json:
        print_json(found)
        return
    for name in [str(each["tenant"]) for each in found]:
        count = waiting.get(name, 0)
        wait = counted(count, "job waits", "jobs wait")
        say(f"{name or _NOBODY:40}  weight {weights.get(name, 1.0):<6g}  {wait}")
    if not found:
        say("No jobs wait, and no tenant has a weight other than 1.", err=True)


@shares.command("set")
@click.argument("tenant")
@click.argument("weight", type=float)
@json_option
def shares_set(tenant: str, weight: float, as_json: bool) -> None:
    """Give TENANT a WEIGHT, 0.01 to 100: how much it gets while several wait. Without one it is 1.

    TENANT is "" for jobs without one. The weight counts from the next job on. It takes a Redis user who may
    write it: a producer's may not.
    """
    now = session()
    with now.queue_errors():
        Weights(now.redis).set(tenant, weight)
    if as_json:
        print_json({"tenant": tenant, "weight": weight})
    else:
        say(f"{tenant or _NOBODY} has the weight {weight:g}")
