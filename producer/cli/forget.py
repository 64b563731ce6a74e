"""The command `forget`: for requests to delete what is kept of somebody."""

from __future__ import annotations

import datetime
import sys

import click

from producer.cli.forgetting import COUNTED, Forget
from producer.cli.json_output import json_option, print_json, say
from producer.http.caller import tenant_mark
from producer.http.key_store import KeyStore
from producer.http.tenant_store import TenantStore
from producer.session import Session, session
from worker.contract.errors import CallerError, UnknownJobError
from worker.contract.explain import short
from worker.contract.job_checks import tenant_name
from worker.state.forgetting import Scope
from worker.state.hashes import JOB_ID
from worker.state.usage import day_of


@click.command()
@click.option("--tenant", help="All jobs of this tenant, with their pictures, and its runs.")
@click.option("--job", help="The job of this id.")
@click.option("--before", help="All jobs that were submitted before this day (UTC), as 2026-11-28.")
@click.option("--dry-run", is_flag=True, help="Remove nothing: say what there is.")
@json_option
def forget(tenant: str | None, job: str | None, before: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove jobs for good: pictures in all versions, records, prompts, metadata, messages and runs.

    Interrupted, it goes on when it is called again.
    """
    now = session()
    scope = _scope(now, tenant, job, before)
    with now.queue_errors():
        if tenant and (keys := [each.name for each in KeyStore(now.redis).list() if each.tenant == tenant]):
            say(f"note  {tenant} has keys still, such as {keys[0]}, and may submit meanwhile.", err=True)
    done = Forget(now, scope, is_dry=dry_run, tell=lambda text: say(f"note  {text}", err=True))()
    if job and not done.kept and not any(done.counts.values()):
        raise UnknownJobError(f"There is nothing of job {job}: its id is wrong, or it was forgotten already.")
    if as_json:
        print_json({"scope": scope.name, "dry_run": dry_run, **done.counts, "kept": done.kept})
    else:
        found = [(what, count) for what, count in done.counts.items() if count]
        say(f"{'Would remove' if dry_run else 'Removed'}{':' if found else ' nothing: there is nothing.'}")
        for what, count in found:
            say(f"{count:>9,}  {COUNTED[what]}")
        if not scope.job and not dry_run:
            say("note  HTTP servers delete the files of these runs within a minute.", err=True)
        for said in done.kept[:20]:
            say(f"kept  {said}", err=True)
    if done.kept:
        sys.exit(1)


def _scope(now: Session, tenant: str | None, job: str | None, before: str | None) -> Scope:
    """What is to be forgotten. Raises `CallerError`."""
    if len([each for each in (tenant, job, before) if each is not None]) != 1:
        raise CallerError("Forget what? Give one of --tenant, --job and --before.")
    if job is not None:
        if not JOB_ID.fullmatch(job):
            raise CallerError(f"job is {short(job)}: an id has 32 hexadecimal digits in lower case.")
        return Scope(job=job)
    if before is not None:
        day = day_of(before, "before")
        midnight = datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC)
        if midnight > datetime.datetime.now(datetime.UTC):
            raise CallerError(f"before is {before}, which is to come: name a day that has begun (UTC).")
        return Scope(before=midnight.timestamp())
    try:
        name = tenant_name(tenant or "")
    except ValueError as error:
        raise CallerError(f"tenant {error}.") from None
    if not name:
        raise CallerError("tenant is empty: name a tenant, or give --before.")
    with now.queue_errors():
        known = TenantStore(now.redis).find(name)
    if known is not None and known.pictures:
        raise CallerError(
            f"{name} shares pictures with others, as {known.owner}: forget its jobs one by one with --job, "
            f"or those of all that share with --tenant {known.owner}."
        )
    return Scope(tenant=name, mark=tenant_mark(name))
