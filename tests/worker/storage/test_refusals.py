"""What botocore raises is one sentence with the cause and the remedy, by whether trying again may help."""

from __future__ import annotations

import inspect
from typing import Any

import botocore.exceptions
import pytest

from worker.contract.errors import PermanentStorageError, StorageError
from worker.storage.refusals import storage_errors

#: Errors of botocore about keys that it does not have or cannot get; what their texts need.
_FILLING = {
    name: name
    for name in ("provider", "error_msg", "cred_var", "name", "profile", "path", "env_var", "config_key")
}


def client_error(code: str, status: int) -> botocore.exceptions.ClientError:
    answer: Any = {"Error": {"Code": code, "Message": "told"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


def raised(error: Exception) -> StorageError:
    with pytest.raises(StorageError) as caught, storage_errors("pictures"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("code", "status", "remedy"),
    [
        ("AccessDenied", 403, "s3:PutObject"),
        ("AccessDenied", 403, "SMALLCAT_S3_SSE"),
        ("ExpiredToken", 400, "get new keys"),
        ("ExpiredTokenException", 400, "get new keys"),
        ("TokenRefreshRequired", 400, "get new keys"),
        ("InvalidToken", 400, "AWS_SESSION_TOKEN"),
        ("InvalidAccessKeyId", 403, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "AWS_SECRET_ACCESS_KEY"),
        ("RequestTimeTooSkewed", 403, "clock"),
        ("AllAccessDisabled", 403, "account"),
        ("AccessControlListNotSupported", 400, "unset SMALLCAT_S3_ACL"),
        ("KMS.DisabledException", 400, "SMALLCAT_S3_SSE_KMS_KEY_ID"),
        ("KMS.NotFoundException", 400, "SMALLCAT_S3_SSE_KMS_KEY_ID"),
        ("KMS.KMSInvalidStateException", 400, "SMALLCAT_S3_SSE_KMS_KEY_ID"),
        ("XMinioKMSKeyNotFound", 400, "SMALLCAT_S3_SSE_KMS_KEY_ID"),
        ("NoSuchBucket", 404, "create it, or set S3_BUCKET"),
        ("XMinioStorageFull", 507, "make room"),
        # A HEAD has no body; a server may have a word of its own.
        ("403", 403, "AWS_ACCESS_KEY_ID"),
        ("YouShallNotPass", 403, "their rights"),
        ("YouShallNotPass", 401, "their rights"),
    ],
)
def test_a_refusal_lasts_and_names_the_remedy(code: str, status: int, remedy: str) -> None:
    error = raised(client_error(code, status))
    assert isinstance(error, PermanentStorageError)
    assert str(error).startswith(f'The bucket "pictures" refuses ({code} told): ')
    assert remedy in str(error)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("SlowDown", 503),
        ("InternalError", 500),
        ("KMS.ThrottlingException", 400),
        ("KMS.InternalException", 500),
        ("Odd", 400),
    ],
)
def test_what_is_no_refusal_may_pass(code: str, status: int) -> None:
    assert type(raised(client_error(code, status))) is StorageError


def about_keys() -> list[type[botocore.exceptions.BotoCoreError]]:
    """botocore's errors of keys, tokens and logins, by their names: a new one fails below."""
    words = ("Credential", "Token", "SSO", "Login", "MetadataRetrieval", "Profile")
    return [
        each
        for name, each in vars(botocore.exceptions).items()
        if inspect.isclass(each)
        and issubclass(each, botocore.exceptions.BotoCoreError)
        and any(word in name for word in words)
    ]


@pytest.mark.parametrize("kind", about_keys(), ids=lambda kind: kind.__name__)
def test_keys_that_botocore_cannot_get_are_keys_that_are_missing(
    kind: type[botocore.exceptions.BotoCoreError],
) -> None:
    error = raised(kind(**_FILLING))
    assert isinstance(error, PermanentStorageError)
    assert str(error).startswith("The bucket needs keys (")
    assert str(error).endswith("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")


def test_keys_that_are_handed_out_expired_are_told_so() -> None:
    """botocore raises a plain RuntimeError for them (botocore 1.44, RefreshableCredentials)."""
    error = raised(
        RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired.")
    )
    assert isinstance(error, PermanentStorageError)
    assert "get new keys" in str(error)


def test_what_is_no_error_of_botocores_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="something else"), storage_errors("pictures"):
        raise RuntimeError("something else")


def test_a_server_out_of_reach_may_come_back() -> None:
    error = raised(botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"))
    assert type(error) is StorageError
    assert str(error).endswith("check AWS_ENDPOINT_URL_S3.")
