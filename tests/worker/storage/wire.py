"""What goes over the wire to S3, noted by the right that it needs, and refused as AWS refuses."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import urllib3
from botocore.awsrequest import AWSResponse
from botocore.httpsession import URLLib3Session

#: The rights that a request needs, by method, for a key and for the bucket.
_OBJECT = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
_BUCKET = {"GET": "s3:ListBucket", "HEAD": "s3:ListBucket"}
#: What a header of PutObject needs besides.
_HEADERS = {
    "x-amz-acl": "s3:PutObjectAcl",
    "x-amz-object-lock-mode": "s3:PutObjectRetention",
    "x-amz-object-lock-retain-until-date": "s3:PutObjectRetention",
}
EVERYTHING = frozenset(
    {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket", "s3:PutObjectAcl"}
    | {"s3:PutObjectRetention"}
)


class Wire:
    """Between botocore and its server, in this process. The bucket is in the path, not in the host."""

    def __init__(self) -> None:
        #: What these keys may do, as IAM names it.
        self.rights = EVERYTHING
        #: Keys that are refused in spite of the rights: they hold one of these words.
        self.refused_keys: tuple[str, ...] = ()
        #: What is answered instead of AccessDenied: status and code.
        self.refusal = (403, "AccessDenied")
        #: The rights that the requests needed so far, and of what: IAM's name and ARN.
        self.needed: list[tuple[str, str]] = []
        #: Method, URL and headers of each request.
        self.requests: list[tuple[str, str, Mapping[str, str]]] = []
        #: Answers in the place of the server, or returns None.
        self.answer: Callable[[Any], AWSResponse | None] = lambda request: None

    @property
    def used(self) -> set[str]:
        """The rights that the requests needed so far."""
        return {right for right, _ in self.needed}

    def send(self, real: Callable[[Any], Any], request: Any) -> Any:
        """Answer a request: with a refusal, or as `real` does."""
        headers = {
            name.lower(): value.decode() if isinstance(value, bytes) else str(value)
            for name, value in request.headers.items()
        }
        self.requests.append((request.method, request.url, headers))
        if (made := self.answer(request)) is not None:
            return made
        parts = urlsplit(request.url)
        is_key = len(parts.path.split("/", 2)) == 3 and parts.path.split("/", 2)[2] != ""
        if not is_key and "list-type" not in parse_qs(parts.query) and request.method == "GET":
            return real(request)
        needed = {(_OBJECT if is_key else _BUCKET)[request.method]}
        if request.method == "PUT":
            needed |= {right for header, right in _HEADERS.items() if header in headers}
        where = unquote(parts.path.strip("/"))
        self.needed += [(right, f"arn:aws:s3:::{where}") for right in sorted(needed)]
        if needed - self.rights or any(word in parts.path for word in self.refused_keys):
            return self.refuse(request)
        response = real(request)
        # As AWS does: who may not list, is not told what is missing.
        if response.status_code == 404 and "s3:ListBucket" not in self.rights and is_key:
            return self.refuse(request)
        return response

    def refuse(self, request: Any) -> AWSResponse:
        """The refusal, without a body where there can be none."""
        status, code = self.refusal
        body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
        return response_of(request, status, {}, b"" if request.method == "HEAD" else body)


def response_of(request: Any, status: int, headers: Mapping[str, str], body: bytes = b"") -> AWSResponse:
    """An answer of a server's."""
    raw = urllib3.HTTPResponse(io.BytesIO(body), dict(headers), status, preload_content=False)
    return AWSResponse(request.url, status, raw.headers, raw)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """All requests of this process to S3 from now on."""
    made, real = Wire(), URLLib3Session.send
    monkeypatch.setattr(
        URLLib3Session, "send", lambda self, request: made.send(lambda it: real(self, it), request)
    )
    return made
