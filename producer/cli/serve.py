"""The commands `serve` and `keys`: the HTTP API, and who may call it."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import Any

import click

from producer.cli.json_output import json_option, print_json, say
from producer.cli.webhooks import counting
from producer.http.key_store import DEFAULT_SCOPES, SCOPES, KeyStore
from producer.session import session
from worker.contract.errors import CallerError
from worker.contract.settings import ServerSettings, server_settings, webhook_settings


@click.command()
@click.option("--host", help="Address to listen on; 127.0.0.1 when not given.")
@click.option("--port", type=click.IntRange(1, 65_535), help="Port to listen on; 8000 when not given.")
@click.option("--no-auth", is_flag=True, help="Ask for no key. Only on a loopback address.")
@click.option("--access-log", is_flag=True, help="Log each request: its path, never its body.")
@click.option(
    "--webhooks", is_flag=True, help="Tell webhooks, too, as `webhooks run` does with workers' rights."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65_535),
    help="With --webhooks: serve Prometheus metrics of the notifications on this port.",
)
def serve(
    host: str | None,
    port: int | None,
    no_auth: bool,
    access_log: bool,
    webhooks: bool,
    metrics_port: int | None,
) -> None:
    """Serve the HTTP API until Ctrl-C."""
    if metrics_port is not None and not webhooks:
        raise CallerError(f"--metrics-port {metrics_port} is for the sender of webhooks: add --webhooks.")
    try:
        from producer.http import server
        from producer.webhooks.sender import in_background
    except ModuleNotFoundError as error:
        raise CallerError(f'{error.name} is not installed: pip install "smallcat[http]".') from None
    given = {"http_host": host, "http_port": port}
    values = server_settings().model_dump() | {name: value for name, value in given.items() if value}
    sending = None
    if webhooks:
        now = session(redis_retry_s=2)
        sending = in_background(now, webhook_settings(), counting(now, metrics_port))
    server.serve(ServerSettings(**values), is_open=no_auth, access_log=access_log, beside=sending)


@click.group()
def keys() -> None:
    """Make, list and revoke keys of the HTTP API."""


@keys.command("add")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    help="What the key may do; several times for several. submit and read when not given.",
)
@click.option(
    "--tenant", default="", help="Whose key it is: see `smallcat tenants`. Nobody's when not given."
)
@json_option
def keys_add(name: str, scopes: tuple[str, ...], tenant: str, as_json: bool) -> None:
    """Make a key and print it: this once, for only its hash is kept."""
    now = session()
    with now.queue_errors():
        key = KeyStore(now.redis).add(name, scopes or DEFAULT_SCOPES, tenant)
    print_json({"name": name, "key": key} | ({"tenant": tenant} if tenant else {})) if as_json else say(key)


@keys.command("list")
@json_option
def keys_list(as_json: bool) -> None:
    """List the keys by name, with their scopes, their tenant and their last use.

    While a key is rotated there are two of its name, and each line says which one it is.
    """
    now = session()
    with now.queue_errors():
        found = KeyStore(now.redis).list()
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
        return
    newest = {each.name: each for each in found}  # The older one of a name is the first.
    count = collections.Counter(each.name for each in found)
    for each in found:
        tenant = f"  tenant {each.tenant}" if each.tenant else ""
        times = f"made {_time(each.created)}  used {_time(each.used)}"
        which = "newer" if each is newest[each.name] else "older: --drop-old revokes it"
        note = f"  {which}" if count[each.name] > 1 else ""
        say(f"{each.name:20}  {','.join(each.scopes):20}  {times}{tenant}{note}")


@keys.command("rotate")
@click.argument("name")
@click.option("--drop-old", is_flag=True, help="Revoke the older one: its users have the new one.")
@json_option
def keys_rotate(name: str, drop_old: bool, as_json: bool) -> None:
    """Make a new key beside the old one of NAME, and print it: this once.

    Both are valid until --drop-old, and what one has submitted is the other's, too.
    """
    now = session()
    with now.queue_errors():
        store = KeyStore(now.redis)
        if not drop_old:
            key = store.rotate(name)
            print_json({"name": name, "key": key}) if as_json else say(key)
            return
        count = store.drop_old(name)
    text = f"the older key {name} is revoked" if count else f"{name} has one key alone"
    print_json({"name": name, "revoked": count}) if as_json else say(text)


@keys.command("revoke")
@click.argument("name")
@json_option
def keys_revoke(name: str, as_json: bool) -> None:
    """Revoke a key, both while it is rotated. Servers refuse it within seconds."""
    now = session()
    with now.queue_errors():
        KeyStore(now.redis).revoke(name)
    done: dict[str, Any] = {"revoked": name}
    print_json(done) if as_json else say(f"{name} is revoked")


def _time(seconds: int | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
