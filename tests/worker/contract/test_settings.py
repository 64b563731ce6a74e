"""What the environment may set: every variable, its limits, and the error where it is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from worker.contract.errors import SettingsError
from worker.contract.settings import (
    ProducerSettings,
    Settings,
    WorkerSettings,
    hidden,
    producer_settings,
    variables,
    worker_settings,
)

#: For every variable: a value, what it becomes, and values that are refused with a part of the sentence.
#: A variable that is missing here fails `test_every_variable_is_tested`.
TABLE: dict[str, tuple[str, object, list[tuple[str, str]]]] = {
    "REDIS_URL": (
        "rediss://u:p%40ss@redis.example:7000/3",
        "rediss://u:p%40ss@redis.example:7000/3",
        [
            ("localhost:6379", "must look like redis://"),
            ("http://localhost", "must look like redis://"),
            ("redis://", "must look like redis://"),
            ("redis://h:99999", "must look like redis://"),
            ("redis://h:port", "must look like redis://"),
            ("redis://h:6379/queue", "The database is a number"),
            ("redis://[::1", "must look like redis://"),
        ],
    ),
    "S3_BUCKET": ("pictures", "pictures", []),
    "S3_PREFIX": (
        "/a/b/",
        "a/b",
        [
            ("a//b", 'may not hold empty, "." or ".." parts'),
            ("../b", 'may not hold empty, "." or ".." parts'),
            ("a/./b", 'may not hold empty, "." or ".." parts'),
            ("a\\b", "may not hold backslashes"),
            ("a\nb", "may not hold backslashes or control characters"),
        ],
    ),
    "SMALLCAT_S3_ADDRESSING": ("path", "path", [("dns", "'auto', 'virtual' or 'path'")]),
    "SMALLCAT_S3_SSE": ("aws:kms", "aws:kms", [("kms", "'AES256', 'aws:kms' or 'aws:kms:dsse'")]),
    "SMALLCAT_S3_SSE_KMS_KEY_ID": ("alias/pictures", "alias/pictures", [("a\nb", "printable ASCII")]),
    "SMALLCAT_S3_ACL": ("bucket-owner-read", "bucket-owner-read", [("public", "'public-read'")]),
    "SMALLCAT_S3_CACHE_CONTROL": (
        "max-age=60",
        "max-age=60",
        [("ä", "printable ASCII"), ("a" * 1_001, "1,000")],
    ),
    "SMALLCAT_S3_OBJECT_LOCK": ("COMPLIANCE", "COMPLIANCE", [("governance", "'GOVERNANCE' or 'COMPLIANCE'")]),
    "SMALLCAT_S3_OBJECT_LOCK_DAYS": (
        "7",
        7,
        [("0", "must be 1 to 36,500."), ("36501", "must be 1 to 36,500.")],
    ),
    "SMALLCAT_RECORD_TTL_S": (
        "60",
        60,
        [("0", "must be above 0 and up to 31,536,000."), ("x", "valid integer"), ("9" * 30, "")],
    ),
    "SMALLCAT_LEASE_S": (
        "2.5",
        2.5,
        [("0.5", "must be 1 to 31,536,000."), ("inf", "must be 1 to 31,536,000."), ("nan", "")],
    ),
    "SMALLCAT_WAIT_REPLICAS": ("2", 2, [("-1", "must be 0 to 1,000."), ("x", "valid integer")]),
    "SMALLCAT_TENANT": (
        "a-1",
        "a-1",
        [("A", "must be 1 to 40 lower-case"), ("..", "must be"), ("a" * 41, "must be")],
    ),
    "SMALLCAT_SUBMIT_TIMEOUT_S": (
        "0.5",
        0.5,
        [("0", "must be above 0 and up to 31,536,000."), ("inf", "must be above 0 and up to 31,536,000.")],
    ),
    "SMALLCAT_WEBHOOK_HOSTS": (
        "*.example.com, hooks.internal:8080, 10.0.0.0/8",
        "*.example.com, hooks.internal:8080, 10.0.0.0/8",
        [
            ("https://a.example.com", "must be hosts such as"),
            ("a.example.com:0", "is none"),
            ("*x.com", "is none"),
            ("10.0.0.1/8", "is none"),
            ("a b", "is none"),
        ],
    ),
    "SMALLCAT_WEBHOOK_SECRET": ("whsec_x", "whsec_x", []),
    "SMALLCAT_WEBHOOK_SECRETS_DIR": ("/secrets", "/secrets", []),
    "SMALLCAT_WEBHOOK_TIMEOUT_S": (
        "2.5",
        2.5,
        [("0.5", "must be 1 to 60."), ("61", "must be 1 to 60."), ("nan", "")],
    ),
    "SMALLCAT_MODEL": ("a/model", "a/model", []),
    "SMALLCAT_MODEL_NAME": ("mine", "mine", []),
    "SMALLCAT_MODEL_REVISION": ("main", "main", []),
    "SMALLCAT_MODEL_CONFIG_DIR": ("/configs", "/configs", []),
    "SMALLCAT_PRECISION": ("fp8", "fp8", [("int8", "'fp16' or 'fp8'")]),
    "SMALLCAT_MODEL_VAE": ("madebyollin/taesd", "madebyollin/taesd", []),
    "SMALLCAT_DEFAULT_STEPS": ("150", 150, [("0", "must be 1 to 150."), ("151", "must be 1 to 150.")]),
    "SMALLCAT_DEFAULT_GUIDANCE_SCALE": ("30", 30.0, [("-1", "must be 0 to 30."), ("31", "must be 0 to 30.")]),
    "SMALLCAT_DEVICE": ("cpu", "cpu", [("gpu", "'auto', 'cuda' or 'cpu'")]),
    "SMALLCAT_GPU_MEMORY": (
        "11GiB",
        "11GiB",
        [
            (wrong, "must be a share of the GPU's memory, above 0 and at most 1, such as 0.45, or a size")
            for wrong in ("0", "1.5", "-0.5", "11", "much", "1 parsec", "0GiB", "nan", "50%", "1e400GiB")
        ],
    ),
    "SMALLCAT_DTYPE": ("bf16", "bf16", [("fp8", "'auto', 'fp16', 'bf16' or 'fp32'")]),
    "SMALLCAT_ATTENTION": ("sdpa", "sdpa", [("flash", "'auto', 'xformers', 'sdpa' or 'naive'")]),
    "SMALLCAT_DEFAULT_PROMPT_SYNTAX": ("a1111", "a1111", [("comfyui", "'plain' or 'a1111'")]),
    "USE_MEMORY_EFFICIENT_ATTENTION": ("0", "0", [("yes", "'0' or '1'"), ("2", "'0' or '1'")]),
    "SMALLCAT_COMPILE": ("0", False, [("perhaps", "valid boolean")]),
    "SMALLCAT_COMPILE_FIRST": ("1", True, [("perhaps", "valid boolean")]),
    "SMALLCAT_KERNEL_CACHE": (
        "/shared",
        "/shared",
        [("s3://b", "or s3://BUCKET/PREFIX"), ("https://b/kernels", "must be a folder that workers share")],
    ),
    "SMALLCAT_KERNEL_CACHE_KEY": (
        "a" * 32,
        "a" * 32,
        [("a" * 31, "at least 32 characters"), (" ".join("a" * 32 for _ in range(3)), "or two")],
    ),
    "SMALLCAT_EMBEDDINGS": ("/embeddings", "/embeddings", []),
    "SMALLCAT_LORAS": ("/loras,s3://b/loras", "/loras,s3://b/loras", []),
    "SMALLCAT_LORA_MEMORY": ("2GiB", 2 << 30, [("much", "value and unit"), ("2parsecs", "byte unit")]),
    "SMALLCAT_FILE_DISK": ("100GiB", 100 << 30, [("much", "value and unit"), ("-1", "value and unit")]),
    "SMALLCAT_VAES": ("/vaes,stabilityai/sd-vae-ft-mse", "/vaes,stabilityai/sd-vae-ft-mse", []),
    "SMALLCAT_EXACT": ("1", True, [("perhaps", "valid boolean")]),
    "SMALLCAT_CACHE_DIR": ("/cache", "/cache", []),
    "SMALLCAT_MAX_BATCH": ("256", 256, [("0", "must be 1 to 256."), ("257", "must be 1 to 256.")]),
    "SMALLCAT_RETIRING": ("1", True, [("perhaps", "valid boolean")]),
    "SMALLCAT_SAFETY_CHECKER": ("0", False, [("perhaps", "valid boolean")]),
    "SMALLCAT_MARK_AS_GENERATED": ("0", False, [("perhaps", "valid boolean")]),
    "SMALLCAT_JOB_TIMEOUT_S": (
        "1.5",
        1.5,
        [("0", "must be above 0 and up to 31,536,000."), ("inf", "must be above 0 and up to 31,536,000.")],
    ),
    "SMALLCAT_MAX_ATTEMPTS": ("1", 1, [("0", "must be at least 1.")]),
    "SMALLCAT_START_TIMEOUT_S": (
        "0",
        0.0,
        [("-1", "must be 0 to 31,536,000."), ("inf", "must be 0 to 31,536,000.")],
    ),
    "SMALLCAT_DRAIN_S": ("0", 0.0, [("-1", "must be 0 to 31,536,000."), ("inf", "must be 0 to 31,536,000.")]),
    "SMALLCAT_UPLOAD_TIMEOUT_S": (
        "9",
        9.0,
        [("0", "must be above 0 and up to 31,536,000."), ("inf", "must be above 0 and up to 31,536,000.")],
    ),
    "SMALLCAT_HTTP_HOST": ("0.0.0.0", "0.0.0.0", []),  # noqa: S104 - it only is a value here
    "SMALLCAT_HTTP_PORT": (
        "65535",
        65_535,
        [("0", "must be 1 to 65,535."), ("65536", "must be 1 to 65,535.")],
    ),
    "SMALLCAT_HTTP_TRUSTED_PROXIES": (
        "10.0.0.0/8, ::1",
        "10.0.0.0/8, ::1",
        [("proxy", "'proxy' is neither"), ("*", "must be addresses or networks")],
    ),
    "SMALLCAT_HTTP_MAX_BODY_MB": ("1", 1, [("0", "must be 1 to 1,000."), ("1001", "must be 1 to 1,000.")]),
    "SMALLCAT_HTTP_MAX_UPLOAD_MB": (
        "9",
        9,
        [("0", "must be 1 to 100,000."), ("100001", "must be 1 to 100,000.")],
    ),
    "SMALLCAT_HTTP_MAX_CONNECTIONS": ("9", 9, [("0", "must be at least 1.")]),
    "SMALLCAT_HTTP_DATA_DIR": ("/data", "/data", []),
    "SMALLCAT_HTTP_LOG_PROMPTS": ("1", True, [("perhaps", "valid boolean")]),
    "SMALLCAT_HTTP_URL": ("http://127.0.0.1:8000", "http://127.0.0.1:8000", []),
    "SMALLCAT_HTTP_KEY": ("k", "k", []),
    "SMALLCAT_LOG": ("json", "json", [("xml", "'human' or 'json'"), ("JSON", "'human' or 'json'")]),
    "SMALLCAT_HEALTH_PORT": (
        "65535",
        65_535,
        [("0", "must be 1 to 65,535."), ("65536", "must be 1 to 65,535.")],
    ),
    "SMALLCAT_METRICS_PORT": (
        "65535",
        65_535,
        [("0", "must be 1 to 65,535."), ("65536", "must be 1 to 65,535.")],
    ),
}


#: What else must be set for a variable to be of use.
NEEDS = {
    "SMALLCAT_S3_SSE_KMS_KEY_ID": {"SMALLCAT_S3_SSE": "aws:kms"},
    "SMALLCAT_S3_OBJECT_LOCK": {"SMALLCAT_S3_OBJECT_LOCK_DAYS": "7"},
    "SMALLCAT_S3_OBJECT_LOCK_DAYS": {"SMALLCAT_S3_OBJECT_LOCK": "GOVERNANCE"},
}


def field_of(side: type[Settings], variable: str) -> str:
    return next(field for field in side.model_fields if side.variable(field) == variable)


def test_every_variable_is_tested() -> None:
    assert set(TABLE) == set(variables())


@pytest.mark.parametrize("variable", TABLE)
def test_a_variable_sets_its_field(variable: str) -> None:
    side = variables()[variable]
    value, becomes, _ = TABLE[variable]
    settings = side.from_environment(NEEDS.get(variable, {}) | {variable: value})
    assert getattr(settings, field_of(side, variable)) == becomes
    assert settings != side.from_environment({})


@pytest.mark.parametrize("variable", TABLE)
def test_an_empty_value_counts_as_not_set(variable: str) -> None:
    side = variables()[variable]
    assert side.from_environment({variable: ""}) == side.from_environment({})


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [(variable, value, part) for variable, (_, _, wrong) in TABLE.items() for value, part in wrong],
)
def test_a_wrong_value_is_refused_with_its_name_and_its_limit(variable: str, value: str, part: str) -> None:
    with pytest.raises(SettingsError) as caught:
        variables()[variable].from_environment({variable: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{variable} has the value ")
    assert part in sentence
    assert "It must be must" not in sentence


@pytest.mark.parametrize("side", [worker_settings, producer_settings])
@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("SMALLCAT_MAX_BATHC", "SMALLCAT_MAX_BATCH"), ("SMALLCAT_ATENTION", "SMALLCAT_ATTENTION")],
)
def test_a_misspelt_name_stops_either_side_and_names_the_near_miss(
    side: object, misspelt: str, meant: str
) -> None:
    assert callable(side)
    with pytest.raises(SettingsError) as caught:
        side({misspelt: "1"})
    assert str(caught.value) == f"There is no setting {misspelt}. Did you mean {meant}?"


@pytest.mark.parametrize("variable", NEEDS)
def test_settings_that_need_each_other_are_refused_alone(variable: str) -> None:
    value, _, _ = TABLE[variable]
    for side in (WorkerSettings, ProducerSettings):
        with pytest.raises(SettingsError) as caught:
            side.from_environment({variable: value})
        assert variable in str(caught.value)
        for other in NEEDS[variable]:
            assert other in str(caught.value)


def test_a_kms_key_needs_kms() -> None:
    environment = {"SMALLCAT_S3_SSE": "AES256", "SMALLCAT_S3_SSE_KMS_KEY_ID": "x"}
    with pytest.raises(SettingsError, match="needs SMALLCAT_S3_SSE=aws:kms, and that is 'AES256'"):
        worker_settings(environment)


def test_a_name_far_from_all_is_sent_to_the_table() -> None:
    with pytest.raises(
        SettingsError, match=r"There is no setting SMALLCAT_SUNSHINE\. docs/settings\.md has all names\."
    ):
        worker_settings({"SMALLCAT_SUNSHINE": "1"})


def test_the_variables_of_the_other_side_are_no_misspellings() -> None:
    everything = {variable: value for variable, (value, _, _) in TABLE.items()}
    assert worker_settings(everything)
    assert producer_settings(everything)


def test_other_peoples_variables_are_not_looked_at() -> None:
    assert worker_settings({"PATH": "/bin", "AWS_REGION": "x", "NOT_SMALLCAT_X": "1"}) == WorkerSettings()


SECRET_URLS = [
    "redis://:hunter2@host:6379/0",
    "redis://user:hunter2@host:6379/0",
    "redis://:hunter2@host:port",
    "http://:hunter2@host",
    "redis://:hunter2@host/queue",
    # Python's own error repeats the address.
    "redis://:hunter2\u2100x@host:6379",
    "redis://:hunter2#x@host:6379",
    "redis://:hunter2@[::x]:6379",
    "redis://[hunter2",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_password_is_never_shown(url: str) -> None:
    try:
        settings = producer_settings({"REDIS_URL": url})
    except SettingsError as error:
        shown = [str(error), repr(error), repr(error.__cause__)]
    else:
        shown = [repr(settings), str(settings), hidden(settings.redis_url)]
    assert not any("hunter2" in text for text in shown)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@h:1/2", "redis://:***@h:1/2"),
        ("rediss://u:secret@h", "rediss://u:***@h"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://h/0?password=secret", "redis://h/0"),
    ],
)
def test_an_address_is_shown_as_it_is_but_for_the_password(url: str, shown: str) -> None:
    assert producer_settings({"REDIS_URL": url}).redis_url == url
    assert hidden(url) == shown


@pytest.mark.parametrize(
    ("environment", "backend"),
    [
        ({}, "auto"),
        ({"USE_MEMORY_EFFICIENT_ATTENTION": "1"}, "xformers"),
        ({"USE_MEMORY_EFFICIENT_ATTENTION": "0"}, "naive"),
        ({"USE_MEMORY_EFFICIENT_ATTENTION": "1", "SMALLCAT_ATTENTION": "sdpa"}, "sdpa"),
    ],
)
def test_attention_can_be_asked_for_in_two_ways(environment: dict[str, str], backend: str) -> None:
    assert worker_settings(environment).attention_backend == backend


def test_the_process_environment_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLCAT_MAX_BATCH", "3")
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "4")
    assert worker_settings().max_batch == 3
    assert producer_settings().submit_timeout_s == 4


@pytest.mark.parametrize("side", [WorkerSettings, ProducerSettings])
def test_settings_are_frozen(side: type[Settings]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        side().s3_bucket = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    "url",
    [
        "redis://one:6379/0;redis://two:6379/0",  # Celery's failover list
        "redis://one;two",
        "redis://:p%2Cw@one:6379/0;rediss://:p%2Cw@two:6379/0",
        "redis://one:6379/0; redis://two:6379/0",
        "redis://one:6379,redis://two:6379",
        "redis://one:6379,two:6379/0",
        "redis://:hunter2@one:6379,two:6379/0",
        "redis://u:hunter2@one:6379,u:hunter2@two:6379/0",
        "redis://[::1]:6379,[::2]:6379/0",
    ],
)
@pytest.mark.parametrize("side", [worker_settings, producer_settings])
def test_several_redis_addresses_are_refused_with_the_remedy(side: Callable[..., object], url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        side({"REDIS_URL": url})
    assert str(caught.value) == (
        "REDIS_URL has the value ***. It must be one address. Several are Sentinel's: "
        "redis+sentinel://host:port,host:port/service/db."
    )


@pytest.mark.parametrize("password", ["a,b", "a;b", ";", "a;b@c,d", "x%3Bredis"])
def test_a_password_may_hold_commas_and_semicolons(password: str) -> None:
    url = f"redis://:{password}@host:6379/0"
    assert producer_settings({"REDIS_URL": url}).redis_url == url
