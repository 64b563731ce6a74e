"""The command `usage`: what tenants have used, for those who bill them."""

from __future__ import annotations

import click

from producer.cli.json_output import json_option, print_json, say
from producer.http.usage_table import as_csv, period
from producer.session import session
from worker.contract.errors import CallerError
from worker.state.usage import read_usage


@click.command()
@click.option("--tenant", help="Of this tenant alone.")
@click.option("--since", default="", help="The first day (UTC), as 2026-11-01; the month's when not given.")
@click.option("--until", default="", help="The last day; today when not given.")
@click.option("--csv", "is_csv", is_flag=True, help="Print a table as CSV.")
@json_option
def usage(tenant: str | None, since: str, until: str, is_csv: bool, as_json: bool) -> None:
    """Show pictures, GPU seconds and bytes by tenant and day. Days are kept for 400."""
    if is_csv and as_json:
        raise CallerError("--csv and --json are two forms: give one of them.")
    now = session()
    first, last = period(since, until)
    with now.queue_errors():
        found = read_usage(now.redis, first, last, tenant)
    if as_json:
        print_json([each._asdict() for each in found])
        return
    if is_csv:
        for line in as_csv(found).splitlines():
            say(line)
        return
    for each in found:
        made = f"{each.images:>9,} pictures  {each.cached:>9,} cached"
        say(
            f"{each.day}  {each.tenant:20}  {made}  {each.gpu_s:>12,.1f} GPU s  {each.bytes / 1e6:>10,.1f} MB"
        )
    if not found:
        say(f"No tenant has used anything from {first} to {last}.", err=True)
