"""The command `tenants`: who shares the HTTP API, and what each may use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from producer.cli.json_output import json_option, moment, print_json, say
from producer.http.key_store import KeyStore
from producer.http.tenant_store import SETTINGS, Tenant, TenantStore
from producer.session import session
from worker.contract.choices import ImageFormat
from worker.contract.errors import CallerError
from worker.contract.plain_text import counted

F = TypeVar("F", bound=Callable[..., Any])

#: Takes a limit away.
NONE: Final = "none"


class _Product(int):
    """A number that was typed as a product."""

    typed: str


class _Number(click.ParamType[Any]):
    """A number; where it may be, a product such as 1024x1024x30; or `none`."""

    name = "number"

    def __init__(self, kind: type, *, is_product: bool = False) -> None:
        self._kind, self._is_product = kind, is_product

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value).strip().lower().replace(",", "").replace("_", "")
        if text == NONE:
            return NONE
        factors = text.split("x") if self._is_product else [text]
        try:
            number = math.prod(self._kind(factor) for factor in factors)
            if len(factors) > 1:
                number = _Product(number)
                number.typed = "x".join(map(str.strip, factors))
            return number
        except (ValueError, OverflowError):
            form = "a number or a product such as 1024x1024x30" if self._is_product else "a number"
            self.fail(f"{value!r} is no limit: use {form}, or {NONE}.", param, ctx)


#: The options of settings: option, parameter, type, whether it may come several times, help.
_OPTIONS: Final[tuple[tuple[str, str, Any, bool, str], ...]] = (
    ("--requests-per-s", "requests_per_s", _Number(float), False, "Requests a second in the long run."),
    ("--burst", "burst", _Number(int), False, "Requests at once; two seconds' worth when not given."),
    ("--max-queued", "max_queued", _Number(int), False, "Jobs that wait or run."),
    (
        *("--max-pixel-steps", "max_pixel_steps", _Number(int, is_product=True), False),
        "Width x height x steps of a job, such as 1024x1024x30.",
    ),
    (
        *("--max-pixel-steps-a-day", "max_pixel_steps_a_day", _Number(int, is_product=True), False),
        "Width x height x steps of all jobs of a day (UTC), such as 1024x1024x30x500.",
    ),
    ("--max-priority", "max_priority", _Number(int), False, "The highest priority, 0 to 9."),
    ("--format", "formats", click.Choice([*map(str, ImageFormat), NONE]), True, "A format that is allowed."),
    ("--model", "models", str, True, "A model that is allowed."),
    (
        *("--pictures", "pictures", str, False),
        "A word: tenants that have the same one share pictures, so that equal jobs are rendered once.",
    ),
)


def _setting_options(command: F) -> F:
    for option, parameter, kind, is_list, text in reversed(_OPTIONS):
        more = "Several times for several; `none`: all." if is_list else "`none`: no such limit."
        more = "`none`: with nobody." if parameter == "pictures" else more
        add = click.option(option, parameter, type=kind, multiple=is_list, help=f"{text} {more}")
        command = add(command)
    return command


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, by their names. Raises `CallerError`."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        value = options.get(name)
        if isinstance(value, tuple):
            if value and NONE in value and len(value) > 1:
                raise CallerError(f"--{name[:-1]} is {NONE} and something else: give one of the two.")
            if value:
                found[name] = () if value == (NONE,) else value
        elif value is not None:
            found[name] = value if value != NONE else "" if name == "pictures" else None
            if isinstance(value, _Product):
                found.setdefault("typed", {})[name] = value.typed
    return found


@click.group()
def tenants() -> None:
    """Add, change, list and remove tenants of the HTTP API."""


@tenants.command("add")
@click.argument("name")
@_setting_options
@json_option
def tenants_add(name: str, as_json: bool, **options: Any) -> None:
    """Add a tenant. Its keys are made with `smallcat keys add KEY --tenant NAME`."""
    now = session()
    with now.queue_errors():
        _print(TenantStore(now.redis).add(name, _given(options)), as_json=as_json)


@tenants.command("set")
@click.argument("name")
@_setting_options
@json_option
def tenants_set(name: str, as_json: bool, **options: Any) -> None:
    """Change a tenant's settings; those that are not given stay. Servers follow within seconds."""
    given = _given(options)
    if not given:
        raise CallerError(
            "Which setting? Give at least one option: `smallcat tenants set --help` lists them."
        )
    now = session()
    with now.queue_errors():
        _print(TenantStore(now.redis).set(name, given), as_json=as_json)


@tenants.command("list")
@json_option
def tenants_list(as_json: bool) -> None:
    """List the tenants by name, with their settings."""
    now = session()
    with now.queue_errors():
        found = TenantStore(now.redis).list()
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    for each in found:
        say(f"{each.name:20}  made {moment(each.created, '%Y-%m-%d %H:%M')}  {_settings_of(each)}")


@tenants.command("remove")
@click.argument("name")
@json_option
def tenants_remove(name: str, as_json: bool) -> None:
    """Remove a tenant that has no keys. Its jobs, pictures and usage stay."""
    now = session()
    with now.queue_errors():
        keys = [each.name for each in KeyStore(now.redis).list() if each.tenant == name]
        if keys:
            raise CallerError(
                f"{name} has {counted(len(keys), 'key')}, such as {keys[0]}: "
                "`smallcat keys revoke NAME` first."
            )
        TenantStore(now.redis).remove(name)
    print_json({"removed": name}) if as_json else say(f"{name} is removed")


def _print(tenant: Tenant, *, as_json: bool) -> None:
    if as_json:
        print_json(tenant.model_dump(mode="json"))
    else:
        say(f"{tenant.name}  {_settings_of(tenant)}")


def _settings_of(tenant: Tenant) -> str:
    """The settings that there are, in one line."""
    found = []
    for name in SETTINGS:
        value = getattr(tenant, name)
        if value in (None, (), ""):
            continue
        is_number = isinstance(value, int | float)
        shown = f"{value:,}" if is_number else value if isinstance(value, str) else ",".join(map(str, value))
        shown = tenant.typed.get(name, shown)
        found.append(f"{name.replace('_', '-')} {shown}")
    return "  ".join(found) or "without limits"
