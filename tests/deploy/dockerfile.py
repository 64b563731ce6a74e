"""The Dockerfile, read: what each target runs, and what each RUN line does."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field

from tests.deploy.processes import DEPLOY

DOCKERFILE = DEPLOY / "Dockerfile"


@dataclass
class Stage:
    """One stage, with what it has from the one that it is made from."""

    base: str
    #: Every instruction of its own and of the stages below it: (name, argument).
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, name: str) -> str:
        """The argument of the last instruction of that name; empty where there is none."""
        return next((argument for each, argument in reversed(self.instructions) if each == name), "")

    @property
    def command(self) -> list[str]:
        """What a container runs: ENTRYPOINT and CMD, in exec form."""
        return [*json.loads(self.last("ENTRYPOINT") or "[]"), *json.loads(self.last("CMD") or "[]")]

    @property
    def entrypoint(self) -> list[str]:
        """Its ENTRYPOINT."""
        return list(json.loads(self.last("ENTRYPOINT") or "[]"))

    @property
    def environment(self) -> dict[str, str]:
        """What its ENV lines set."""
        words = [word for name, value in self.instructions if name == "ENV" for word in shlex.split(value)]
        return dict(word.split("=", 1) for word in words)


def instructions() -> list[tuple[str, str]]:
    """The instructions in their order, without comments, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found = re.findall(r"^([A-Z]+) (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [(name, re.sub(r"\s+", " ", argument).strip()) for name, argument in found]


def stages() -> dict[str, Stage]:
    """The stages by name."""
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for name, argument in instructions():
        if name == "FROM":
            base, name_of = re.fullmatch(r"(\S+) AS (\S+)", argument).groups()  # type: ignore[union-attr]
            below = found.get(base)
            current = Stage(base, [] if below is None else list(below.instructions))
            # A stage made from an image begins with that image's own entrypoint, which is none here.
            found[name_of] = current
        elif current is not None:
            if name == "ENTRYPOINT":
                # As Docker: a new ENTRYPOINT forgets the CMD of the stages below.
                current.instructions = [each for each in current.instructions if each[0] != "CMD"]
            current.instructions.append((name, argument))
    return found
