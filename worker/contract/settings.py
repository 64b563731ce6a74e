"""The settings of a worker, a producer and the HTTP API: a frozen class for each, read from the environment.

`worker_settings()`, `producer_settings()` and `server_settings()` are its only readers. An unknown
`SMALLCAT_*` name is an error that names the nearest one; so is a value outside its limits.
Credentials, endpoint and region of the bucket are boto3's own `AWS_*` variables and are not read here.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from worker.contract.errors import SettingsError
from worker.contract.given_file import at_home
from worker.contract.gpu_share import GpuShare
from worker.contract.job_checks import MAX_TENANT, tenant_name
from worker.contract.job_parameters import MAX_GUIDANCE, MAX_STEPS
from worker.contract.limits import limits_of, requirement
from worker.contract.redis_url import RedisURL
from worker.contract.redis_url import hidden as hidden
from worker.contract.webhook import Hosts

#: The variables of fields that are not set by `SMALLCAT_` and the field's name.
_OTHER_NAMES = {
    "redis_url": "REDIS_URL",
    "s3_bucket": "S3_BUCKET",
    "s3_prefix": "S3_PREFIX",
    "use_memory_efficient_attention": "USE_MEMORY_EFFICIENT_ATTENTION",
}


#: Fields whose values are shown nowhere.
_SECRET = ("redis_url", "http_key", "webhook_secret", "kernel_cache_key")

#: Seconds that a setting may be, at most: a year. A lock can wait for much longer.
_YEAR_S = 31_536_000


def _tenant(value: str) -> str:
    try:
        return tenant_name(value)
    except ValueError:
        raise ValueError(f"must be 1 to {MAX_TENANT} lower-case letters, digits and hyphens") from None


def _redis_url(value: str) -> str:
    RedisURL.parse(value)
    return value


def _prefix(value: str) -> str:
    """A key prefix without slashes at its ends; no part may be empty or climb up."""
    value = value.strip("/")
    if any(part in ("", ".", "..") for part in value.split("/")) and value:
        raise ValueError('may not hold empty, "." or ".." parts')
    if not value.isprintable() or "\\" in value:
        raise ValueError("may not hold backslashes or control characters")
    return value


def _header(value: str) -> str:
    """What goes into a header of HTTP: printable ASCII, at most 1,000 characters."""
    if not (value.isascii() and value.isprintable()) or len(value) > 1_000:
        raise ValueError("must be printable ASCII of at most 1,000 characters")
    return value.strip()


def _keys(value: str) -> str:
    """One key or two, of at least 32 printable characters each."""
    keys = value.split()
    if not 1 <= len(keys) <= 2 or not all(len(key) >= 32 and key.isprintable() for key in keys):
        raise ValueError("must be one key of at least 32 characters, or two, separated by a blank")
    return value


def _folder_or_prefix(value: str) -> str:
    """A path, or s3://BUCKET/PREFIX."""
    bucket, _, prefix = value.removeprefix("s3://").partition("/")
    is_prefix = value.startswith("s3://") and bucket and _prefix(prefix)
    if "://" in value and not is_prefix:
        raise ValueError("must be a folder that workers share, such as /mnt/kernels, or s3://BUCKET/PREFIX")
    return value


def _networks(value: str) -> str:
    """Addresses and networks, separated by commas."""
    for part in filter(None, map(str.strip, value.split(","))):
        try:
            ipaddress.ip_network(part)
        except ValueError:
            raise ValueError(f"must be addresses or networks, and {part!r} is neither") from None
    return value


def _gpu_share(value: str) -> str:
    if value:
        GpuShare.parse(value)
    return value


def _hosts(value: str) -> str:
    Hosts.parse(value)
    return value


class Settings(BaseModel):
    """The settings that workers and producers share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Redis, for the queue and the jobs' records: redis://, rediss://, unix:// or redis+sentinel://.
    redis_url: Annotated[str, AfterValidator(_redis_url)] = Field(
        default="redis://localhost:6379/0", repr=False
    )
    #: Bucket for the pictures. A worker needs it. A producer needs it for `--download` and for jobs whose
    #: record expired; without it the addresses are taken from the records.
    s3_bucket: str = ""
    #: Key prefix in the bucket, for sharing it with other things.
    s3_prefix: Annotated[str, AfterValidator(_prefix)] = ""
    #: How an address names the bucket: virtual (bucket.host), path (host/bucket), auto: virtual on AWS.
    s3_addressing: Literal["auto", "virtual", "path"] = "auto"
    #: Encryption that each object asks for. Not set: the bucket's own. AES256 is SSE-S3, aws:kms is SSE-KMS.
    s3_sse: Literal["", "AES256", "aws:kms", "aws:kms:dsse"] = ""
    #: Id, ARN or alias of the KMS key, with aws:kms. Not set: the account's own for S3.
    s3_sse_kms_key_id: Annotated[str, AfterValidator(_header)] = ""
    #: Canned ACL of each object: bucket-owner-full-control in another account's bucket. Not set: none.
    s3_acl: Literal[
        "",
        "private",
        "public-read",
        "public-read-write",
        "authenticated-read",
        "aws-exec-read",
        "bucket-owner-read",
        "bucket-owner-full-control",
    ] = ""
    #: Cache-Control of each object, such as "public, max-age=31536000, immutable". Not set: none.
    s3_cache_control: Annotated[str, AfterValidator(_header)] = ""
    #: Object Lock mode of each object. Not set: the bucket's own retention.
    s3_object_lock: Literal["", "GOVERNANCE", "COMPLIANCE"] = ""
    #: Days, 1 to 36500, that each object is retained, with SMALLCAT_S3_OBJECT_LOCK.
    s3_object_lock_days: int | None = Field(default=None, ge=1, le=36_500)
    #: Seconds, > 0, that a job's record stays in Redis after its last change (default: 7 days); that of a job
    #: that is done stays for an hour at most, and is in the bucket.
    record_ttl_s: int = Field(default=604_800, gt=0, le=_YEAR_S)
    #: Seconds, >= 1, until a dead worker's jobs go to another one. The same on every worker of a queue.
    lease_s: float = Field(default=30, ge=1, le=_YEAR_S)
    #: How a process that stays writes its log: human, or json: an object a line.
    log: Literal["human", "json"] = "human"
    #: Port, 1 to 65535, of `/live`, `/ready` and `/startup` of a process that stays. Not set: none.
    health_port: int | None = Field(default=None, ge=1, le=65_535)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.s3_sse_kms_key_id and not self.s3_sse.startswith("aws:kms"):
            raise SettingsError(
                f"SMALLCAT_S3_SSE_KMS_KEY_ID needs SMALLCAT_S3_SSE=aws:kms, and that is {self.s3_sse!r}."
            )
        if bool(self.s3_object_lock) != bool(self.s3_object_lock_days):
            raise SettingsError("SMALLCAT_S3_OBJECT_LOCK and SMALLCAT_S3_OBJECT_LOCK_DAYS need each other.")
        return self

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable that sets `field`."""
        return _OTHER_NAMES.get(field, f"SMALLCAT_{field.upper()}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """The settings that `environment` has. An empty value counts as not set.

        Raises `SettingsError` that names the variable, its value and what it must be.
        """
        _refuse_misspelt(environment)
        values: dict[str, Any] = {
            field: environment[cls.variable(field)]
            for field in cls.model_fields
            if environment.get(cls.variable(field))
        }
        try:
            return cls(**values)
        except ValidationError as error:
            finding = error.errors(include_url=False)[0]
            field = str(finding["loc"][0])
            limits = limits_of(cls.model_fields[field].metadata) if field in cls.model_fields else ""
            rule = requirement(finding, limits).removeprefix("Value error, ")
            shown = "***" if field in _SECRET else repr(finding["input"])
            raise SettingsError(f"{cls.variable(field)} has the value {shown}. It {_must(rule)}.") from None


class ProducerSettings(Settings):
    """The settings of a process that submits jobs."""

    #: Replicas of Redis, >= 0, that have a job before `submit_job` returns.
    wait_replicas: int = Field(default=0, ge=0, le=1_000)
    #: Seconds, > 0, that `submit_job` tries to reach Redis before it gives up.
    submit_timeout_s: float = Field(default=5, gt=0, le=_YEAR_S)
    #: Whose jobs it submits, where several share workers: 1 to 40 lower-case letters, digits and hyphens.
    tenant: Annotated[str, AfterValidator(_tenant)] = ""
    #: Hosts that webhooks may lead to, separated by commas, such as hooks.example.com, *.example.com or
    #: 10.1.0.0/16. Not set: every public host. One that is listed by its name or address may be private, and
    #: be spoken to by http. For those who submit, and for the sender.
    webhook_hosts: Annotated[str, AfterValidator(_hosts)] = ""


class ServerSettings(ProducerSettings):
    """The settings of `smallcat serve`, whose options override them."""

    #: Address that the HTTP API listens on. Others than loopback are for a proxy that speaks TLS.
    http_host: str = "127.0.0.1"
    #: Port of the HTTP API, 1 to 65535.
    http_port: int = Field(default=8_000, ge=1, le=65_535)
    #: Addresses or networks of proxies whose X-Forwarded headers are believed, separated by commas.
    http_trusted_proxies: Annotated[str, AfterValidator(_networks)] = ""
    #: Megabytes, 1 to 1000, of a request with jobs.
    http_max_body_mb: int = Field(default=16, ge=1, le=1_000)
    #: Megabytes, 1 to 100000, of an uploaded prompt file.
    http_max_upload_mb: int = Field(default=512, ge=1, le=100_000)
    #: Connections at once, >= 1; more are answered by 503.
    http_max_connections: int = Field(default=4_000, ge=1)
    #: Folder for uploaded prompt files and their manifests; each queue has one of its own in it. Not set: one
    #: among the system's temporary files.
    http_data_dir: str = ""
    #: Whether prompts may stand in the server's log.
    http_log_prompts: bool = False
    #: Address of the HTTP API, for its clients: the embedded stack sets it.
    http_url: str = ""
    #: Key of the HTTP API, for its clients: the embedded stack sets it.
    http_key: str = Field(default="", repr=False)


class WebhookSettings(ProducerSettings):
    """The settings of `smallcat webhooks`, which sends notifications."""

    #: What signs the notifications of jobs that are no tenant's: whsec_ and base64, as
    #: `smallcat webhooks secret` makes it. Two, separated by a blank, while one replaces the other.
    webhook_secret: str = Field(default="", repr=False)
    #: Folder with such secrets: a file for each tenant, by its name, and `_default`.
    webhook_secrets_dir: str = ""
    #: Seconds, 1 to 60, that a receiver may take to answer.
    webhook_timeout_s: float = Field(default=15, ge=1, le=60)


class WorkerSettings(Settings):
    """The settings of a worker."""

    #: Hub id, folder or single .safetensors file. Not set: the bundled model.
    model: str = ""
    #: The name jobs ask for. Not set: the hub id, or the folder's or file's name.
    model_name: str = ""
    #: Branch, tag or commit of a hub id. Not set: its main branch.
    model_revision: str = ""
    #: Folder with configs (no weights needed) for a single file, in place of those that come with smallcat.
    model_config_dir: str = ""
    #: VAE in place of the model's own, such as TAESD: folder, .safetensors file or hub id. It is part of the
    #: model's revision.
    model_vae: str = ""
    #: Steps for jobs that do not say. Not set: the model's, else 30.
    default_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    #: Guidance for jobs that do not say. Not set: the model's, else 7.5.
    default_guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)
    #: 1: the worker renders what is queued for its model and revision, and new jobs mean other workers.
    retiring: bool = False
    #: How prompts of jobs are read that do not say: plain, or a1111.
    default_prompt_syntax: Literal["plain", "a1111"] = "plain"
    #: Folder or s3:// prefix of embeddings (textual inversion, .safetensors) that prompts may name.
    embeddings: str = ""
    #: VAEs that jobs may name: folders, files, s3:// prefixes and hub ids, separated by commas.
    vaes: str = ""
    #: LoRAs that jobs may name: folders, files, s3:// prefixes and hub ids, separated by commas. Those of the
    #: bundled model are offered beside them where that is served, but for one whose name a file here has.
    loras: str = ""
    #: Memory of the device in which LoRAs are kept, such as 2GiB or 512MB. Not set: chosen at start from what
    #: the model leaves free.
    lora_memory: ByteSize | None = Field(default=None, ge=0)
    #: Disk space for LoRAs, VAEs and embeddings fetched from buckets, in the cache, such as 100GiB. Not set:
    #: half of what is free.
    file_disk: ByteSize | None = Field(default=None, ge=0)
    #: Where to run: auto takes a GPU where there is one.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    #: Memory of the GPU that this worker may use in all: a share, such as 0.45, or a size, such as 11GiB, so
    #: that several workers fit on one. Not set: what is free.
    gpu_memory: Annotated[str, AfterValidator(_gpu_share)] = ""
    #: Arithmetic: auto is fp16 on a GPU, fp32 on a CPU.
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    #: Precision of the UNet's linear layers: fp8, on GPUs that have it, takes half the memory for them and
    #: less time, and is part of the model's revision. fp16 is as SMALLCAT_DTYPE says.
    precision: Literal["fp16", "fp8"] = "fp16"
    #: Attention backend. One asked for by name that does not work stops the start.
    attention: Literal["auto", "xformers", "sdpa", "naive"] = "auto"
    #: 0 is SMALLCAT_ATTENTION=naive, 1 is xformers, as in PhotoRoom's post of 2022. SMALLCAT_ATTENTION wins.
    use_memory_efficient_attention: Literal["0", "1"] | None = None
    #: Whether a GPU runs compiled steps, with about twice the throughput. Until those are compiled, which
    #: takes minutes at the first start, uncompiled ones serve.
    compile: bool = True
    #: Whether a worker takes its first job only when its default size is compiled, as in exact mode.
    compile_first: bool = False
    #: Whether a job's picture is the same to the bit, whatever else is in the batch, on one kind of GPU.
    exact: bool = False
    #: Folder for compiled kernels, measured choices, and files that were fetched from buckets.
    cache_dir: str = "~/.cache/smallcat"
    #: Folder or s3://BUCKET/PREFIX of compiled code that workers share, with the key below. Not set: each
    #: compiles for itself.
    kernel_cache: Annotated[str, AfterValidator(_folder_or_prefix)] = ""
    #: What signs that code, 32 characters or more, which only workers may have: who knows it can run code on
    #: them. Two, separated by a blank, while one replaces the other.
    kernel_cache_key: Annotated[str, AfterValidator(_keys)] = Field(default="", repr=False)
    #: Rows in one forward of the UNet, 1 to 256; a guided job takes two. Not set: measured at start.
    max_batch: int | None = Field(default=None, ge=1, le=256)
    #: Whether the safety checker of a model that ships one looks at every picture.
    safety_checker: bool = True
    #: Whether files say in XMP that a trained model made them (IPTC's Digital Source Type).
    mark_as_generated: bool = True
    #: Seconds, > 0, that a job may spend in the engine.
    job_timeout_s: float = Field(default=600, gt=0, le=_YEAR_S)
    #: Times, >= 1, that a job is tried before it is set aside.
    max_attempts: int = Field(default=3, ge=1)
    #: Seconds, >= 0, that a starting worker waits for Redis and the bucket before it refuses to start.
    start_timeout_s: float = Field(default=30, ge=0, le=_YEAR_S)
    #: Seconds, >= 0, that a stopping worker continues the jobs in flight before it gives them back.
    drain_s: float = Field(default=30, ge=0, le=_YEAR_S)
    #: Seconds, > 0, that a picture's upload is tried again while the storage fails, before the job fails.
    upload_timeout_s: float = Field(default=600, gt=0, le=_YEAR_S)
    #: Port of the Prometheus metrics, 1 to 65535. Not set: none.
    metrics_port: int | None = Field(default=None, ge=1, le=65_535)

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, with a leading tilde replaced by the user's home."""
        return at_home(Path(self.cache_dir))

    @property
    def attention_backend(self) -> Literal["auto", "xformers", "sdpa", "naive"]:
        """The attention backend that either variable asks for."""
        if self.attention != "auto" or self.use_memory_efficient_attention is None:
            return self.attention
        return "xformers" if self.use_memory_efficient_attention == "1" else "naive"


def worker_settings(environment: Mapping[str, str] | None = None) -> WorkerSettings:
    """A worker's settings from the environment. Raises `SettingsError`."""
    return WorkerSettings.from_environment(os.environ if environment is None else environment)


def producer_settings(environment: Mapping[str, str] | None = None) -> ProducerSettings:
    """A producer's settings from the environment. Raises `SettingsError`."""
    return ProducerSettings.from_environment(os.environ if environment is None else environment)


def server_settings(environment: Mapping[str, str] | None = None) -> ServerSettings:
    """The settings of the HTTP API from the environment. Raises `SettingsError`."""
    return ServerSettings.from_environment(os.environ if environment is None else environment)


def webhook_settings(environment: Mapping[str, str] | None = None) -> WebhookSettings:
    """The settings of the sender of notifications from the environment. Raises `SettingsError`."""
    return WebhookSettings.from_environment(os.environ if environment is None else environment)


def variables() -> dict[str, type[Settings]]:
    """Every variable that is read, and the class that reads it."""
    sides: tuple[type[Settings], ...] = (
        *(WorkerSettings, WebhookSettings, ServerSettings, ProducerSettings, Settings),
    )
    return {side.variable(field): side for side in sides for field in side.model_fields}


def _refuse_misspelt(environment: Mapping[str, str]) -> None:
    known = variables()
    for name in environment:
        if name.startswith("SMALLCAT_") and name not in known:
            # Compared without the prefix, which alone would make any name look near.
            tails = [each.removeprefix("SMALLCAT_") for each in known if each.startswith("SMALLCAT_")]
            near = difflib.get_close_matches(name.removeprefix("SMALLCAT_"), tails, 1)
            hint = f"Did you mean SMALLCAT_{near[0]}?" if near else "docs/settings.md has all names."
            raise SettingsError(f"There is no setting {name}. {hint}")


def _must(rule: str) -> str:
    return rule if rule.startswith(("must", "may")) else f"must be {rule}"
