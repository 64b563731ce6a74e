"""What is asked of a new job and not of a stored one.

A job is new where it comes in: by `submit_job`, the command line, the HTTP API, a prompt file. It is stored
where it lies in a message, a record or a manifest: an earlier release took it by the limits that it had, and
it stays readable, with its id. So a limit that became narrower is `NarrowedTo`, and a check that came later
than its field is `of_new_jobs`. What no model can draw, a worker refuses when it has the job.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

#: The limits of new jobs, which runs of prompt files keep: another number whenever one becomes narrower.
LIMITS: Final = 1
#: pydantic's context where a job is new.
NEW: Final = {"is_new": True}
#: For each kind of limit: its attribute, what a value must be to it, pydantic's finding, JSON Schema's name.
_KINDS: Final[dict[type, tuple[str, Callable[[Any, Any], bool], Any, str]]] = {
    Ge: ("ge", operator.ge, "greater_than_equal", "minimum"),
    Gt: ("gt", operator.gt, "greater_than", "exclusiveMinimum"),
    Le: ("le", operator.le, "less_than_equal", "maximum"),
    Lt: ("lt", operator.lt, "less_than", "exclusiveMaximum"),
}


def of_new_jobs(check: Callable[[Any, ValidationInfo], Any]) -> AfterValidator:
    """`check` as an annotation that holds for new jobs alone."""

    def run(value: Any, info: ValidationInfo) -> Any:
        return check(value, info) if info.context == NEW else value

    return AfterValidator(run)


@dataclass(frozen=True)
class NarrowedTo:
    """A limit of new jobs, as an annotation beside the field's first one, which holds for stored ones.

    In the field's JSON schema it stands in `allOf`.
    """

    limit: Ge | Gt | Le | Lt

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        attribute, is_within, finding, _ = _KINDS[type(self.limit)]
        limit = getattr(self.limit, attribute)

        def check(value: Any, info: core_schema.ValidationInfo) -> Any:
            if info.context == NEW and value is not None and not is_within(value, limit):
                raise PydanticKnownError(finding, {attribute: limit})
            return value

        return core_schema.with_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        attribute, _, _, name = _KINDS[type(self.limit)]
        found = handler(schema)
        return found | {"allOf": [*found.get("allOf", []), {name: getattr(self.limit, attribute)}]}
