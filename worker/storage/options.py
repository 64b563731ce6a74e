"""How objects are put into the bucket and how it is addressed, as the settings say."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.contract.settings import Settings

#: Seconds that a test object is retained, where pictures are: as good as not, but it needs the same right.
TEST_RETENTION_S = 60


@dataclass(frozen=True)
class BucketOptions:
    """What each request or each object of a bucket has in common. The defaults add nothing to a request."""

    #: auto, virtual (https://BUCKET.HOST/KEY) or path (https://HOST/BUCKET/KEY).
    addressing: str = "auto"
    #: x-amz-server-side-encryption: "", AES256, aws:kms or aws:kms:dsse.
    sse: str = ""
    #: The KMS key's id, ARN or alias; "" is the account's own key for S3.
    sse_kms_key_id: str = ""
    #: Canned ACL; "" sends none.
    acl: str = ""
    #: Cache-Control; "" sends none.
    cache_control: str = ""
    #: Object Lock: "", GOVERNANCE or COMPLIANCE.
    object_lock: str = ""
    #: Days, >= 1, that an object is retained, with `object_lock`.
    object_lock_days: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> BucketOptions:
        """The options that the settings ask for."""
        return cls(
            addressing=settings.s3_addressing,
            sse=settings.s3_sse,
            sse_kms_key_id=settings.s3_sse_kms_key_id,
            acl=settings.s3_acl,
            cache_control=settings.s3_cache_control,
            object_lock=settings.s3_object_lock,
            object_lock_days=settings.s3_object_lock_days,
        )

    def for_inputs(self) -> BucketOptions:
        """Those of the files that jobs begin with.

        They are nobody's but the job's, and go when no job needs them: none is public or locked, whatever
        pictures are.
        """
        acl = "" if self.acl.startswith(("public", "authenticated")) else self.acl
        return replace(self, acl=acl, cache_control="", object_lock="", object_lock_days=None)

    def put_parameters(self, now: datetime.datetime, *, is_test: bool = False) -> Mapping[str, Any]:
        """The parameters of PutObject beside bucket, key and body; a test object is retained for a minute."""
        parameters: dict[str, Any] = {
            "ServerSideEncryption": self.sse,
            "SSEKMSKeyId": self.sse_kms_key_id,
            "ACL": self.acl,
            "CacheControl": self.cache_control,
        }
        if self.object_lock and self.object_lock_days:
            retained = datetime.timedelta(days=self.object_lock_days)
            if is_test:
                retained = datetime.timedelta(seconds=TEST_RETENTION_S)
            parameters |= {"ObjectLockMode": self.object_lock, "ObjectLockRetainUntilDate": now + retained}
        return {name: value for name, value in parameters.items() if value}
