"""smallcat by its own name: `import smallcat; smallcat.submit_job("a small cat").result().url()`.

It has the public names of `producer`, and is the command `smallcat`. Its packages are called `producer` and
`worker`, which other people's files may be called as well: this module then says so.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from producer import *  # noqa: F403

    #: The version of the package.
    __version__: str


def name_conflict() -> str | None:
    """Why `producer` or `worker` is not smallcat's own, and the remedy; None where both are."""
    loaded = sys.modules.get("producer")
    spec = None if loaded else importlib.util.find_spec("producer")
    found = getattr(loaded, "__file__", None) if loaded else spec and spec.origin
    if found and Path(found).resolve() != Path(__file__).resolve().parent / "producer" / "__init__.py":
        return f'{found} hides smallcat\'s own package "producer": rename it, or start from another folder.'
    import producer

    return producer.name_conflict()


def main() -> NoReturn:
    """Run the command line."""
    from producer.cli.main import main as run

    run()


def _is_command() -> bool:
    """Whether this process was started as the command, and not by a program that imports smallcat."""
    return __name__ == "__main__" or Path(sys.argv[0]).stem.lower() == "smallcat"


if _conflict := name_conflict():
    if not _is_command():
        raise ImportError(_conflict)
    print(f"smallcat: {_conflict}", file=sys.stderr)
    sys.exit(2)


def _imported(name: str) -> object:
    """The public names of `producer`, which imports each when it is first used."""
    import producer

    if name == "__all__":
        return producer.__all__
    if name == "__version__":
        return _version()
    if name not in producer.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(producer, name)


def _version() -> str:
    """The version of the installed package; "unknown" in a checkout that is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("smallcat")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


if not TYPE_CHECKING:  # A type checker would take every name for one that there is.
    __getattr__ = _imported


def __dir__() -> list[str]:
    import producer

    return sorted({*globals(), *producer.__all__, "__version__"})


if __name__ == "__main__":
    main()
