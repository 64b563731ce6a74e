"""What botocore raises, as errors of ours: one sentence with the cause and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import botocore.exceptions

from worker.contract.errors import PermanentStorageError, StorageError

_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_RIGHTS = (
    "give these keys s3:PutObject and s3:GetObject on it, and s3:ListBucket, without which S3 refuses also "
    "what is missing; a bucket that enforces encryption or an ACL needs SMALLCAT_S3_SSE or SMALLCAT_S3_ACL"
)
_EXPIRED = "get new keys; from the files and services that boto3 knows a worker reads them by itself"
_FULL = "make room on the storage"
_ACCOUNT = "ask whoever has the account"
_KMS = "check SMALLCAT_S3_SSE_KMS_KEY_ID, and that these keys may use it"

#: Answers that trying again does not change, and what to do about each.
_PERMANENT: Final = {
    "NoSuchBucket": "create it, or set S3_BUCKET",
    "404": "create it, or set S3_BUCKET",
    "AccessDenied": _RIGHTS,
    "AccessForbidden": _RIGHTS,
    "403": _KEYS,
    "401": _KEYS,
    "Forbidden": _KEYS,
    "Unauthorized": _KEYS,
    "UnauthorizedAccess": _KEYS,
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "InvalidClientTokenId": "check AWS_ACCESS_KEY_ID",
    "UnrecognizedClientException": "check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "AuthorizationHeaderMalformed": "check AWS_REGION",
    "RequestTimeTooSkewed": "set this machine's clock",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": "check AWS_SESSION_TOKEN",
    "InvalidIdentityToken": _EXPIRED,
    "InvalidSecurity": _KEYS,
    "IDPRejectedClaim": _EXPIRED,
    "AllAccessDisabled": _ACCOUNT,
    "AccountProblem": _ACCOUNT,
    "NotSignedUp": _ACCOUNT,
    "UserSuspended": _ACCOUNT,
    "InvalidPayer": _ACCOUNT,
    "AccessControlListNotSupported": "unset SMALLCAT_S3_ACL",
    "InsufficientStorage": _FULL,
    "507": _FULL,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
}
#: Codes about a KMS key that will not do. A service that is throttled or fails is none of them.
_KMS_REFUSAL: Final = re.compile("KMS.*(Disabled|NotFound|Invalid|Denied|NotConfigured|Unsupported)")
#: Codes with which S3 says that these keys may not do this: also, without s3:ListBucket, of a missing object.
DENIED: Final = frozenset({"AccessDenied", "AccessForbidden", "403", "Forbidden"})
#: botocore has no keys, or cannot get those that its configuration names.
_NO_KEYS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.UnknownCredentialError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.MetadataRetrievalError,
    botocore.exceptions.RefreshWithMFAUnsupportedError,
    botocore.exceptions.NoAuthTokenError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.UnknownTokenProviderError,
    botocore.exceptions.SSOError,
    botocore.exceptions.LoginError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.ConfigNotFound,
    botocore.exceptions.InvalidConfigError,
)


@contextmanager
def storage_errors(bucket: str) -> Iterator[None]:
    """Turn what botocore raises inside into one `StorageError`; `PermanentStorageError` where it lasts."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code, message = code_of(error), error.response["Error"].get("Message", "")
        if remedy := _remedy(error):
            raise PermanentStorageError(
                f'The bucket "{bucket}" refuses ({code} {message}): {remedy}.'
            ) from error
        raise StorageError(f'The bucket "{bucket}" fails ({code} {message}).') from error
    except _NO_KEYS as error:
        raise PermanentStorageError(
            f"The bucket needs keys ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StorageError(
            f'The bucket "{bucket}" is out of reach ({error}): check AWS_ENDPOINT_URL_S3.'
        ) from error
    except RuntimeError as error:
        # botocore's own, of a credential process or file that hands out keys which have expired.
        if "credentials" not in str(error):
            raise
        raise PermanentStorageError(f"The bucket needs keys ({error}): {_EXPIRED}.") from error


def code_of(error: botocore.exceptions.ClientError) -> str:
    """S3's code, such as NoSuchKey; of a HEAD, which has no body, the HTTP status."""
    return str(error.response["Error"].get("Code", ""))


def is_no_bucket(error: StorageError) -> bool:
    """Whether there is no bucket of the name."""
    cause = error.__cause__
    return isinstance(cause, botocore.exceptions.ClientError) and code_of(cause) == "NoSuchBucket"


def _remedy(error: botocore.exceptions.ClientError) -> str | None:
    code = code_of(error)
    if _KMS_REFUSAL.search(code):
        return _KMS
    if code in _PERMANENT:
        return _PERMANENT[code]
    # A server's own word for a refusal.
    is_refusal = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (401, 403)
    return f"{_KEYS}, and their rights" if is_refusal else None
