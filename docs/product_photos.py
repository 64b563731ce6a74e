"""Puts each cut-out of a folder before each background that a prompt describes.

    python docs/product_photos.py cut-outs/ photos/ "a {name} on a marble table, soft light"

`{name}` is the file's name in words: "red sneaker" of red-sneaker.png. The pictures and manifest.jsonl are in
photos/ then; `smallcat gallery photos/manifest.jsonl` makes a page of them.
Run it again, after a fault or with more cut-outs: equal jobs are one job, and what is drawn is not drawn
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from smallcat import CallerError, InvalidJobError, JobError, JobHandle, SmallcatError, submit_job

#: Files that are taken. A JPEG is never a cut-out: the manifest says so.
ENDINGS = (".png", ".webp", ".jpg", ".jpeg")
#: Fields of every job (docs/job-fields.md). At this priority jobs of people who wait go first.
FIELDS: dict[str, Any] = {"mask": "alpha", "seed": 1, "priority": 3}


def main() -> int:
    """The command line. Returns the exit code: 1 where a picture is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cut_outs", type=Path, help="folder of pictures that are transparent around a product"
    )
    parser.add_argument("photos", type=Path, help="folder for the results")
    parser.add_argument("prompts", nargs="+", help="the whole picture in words")
    asked = parser.parse_args()
    if not asked.cut_outs.is_dir():
        parser.error(f"there is no folder {asked.cut_outs}: name the one that your cut-outs are in")
    files = sorted(each for each in asked.cut_outs.glob("*") if each.suffix.lower() in ENDINGS)
    if not files:
        parser.error(f"there is no {' or '.join(ENDINGS)} file in {asked.cut_outs}: put your cut-outs there")
    asked.photos.mkdir(parents=True, exist_ok=True)

    # All are queued before the first is waited for, so that workers draw them in batches.
    sent = [
        (file, number, *submitted(file, text))
        for file in files
        for number, text in enumerate(asked.prompts, 1)
    ]
    missing = 0
    lines = []
    for file, number, line, handle in sent:
        if handle is not None:
            line |= finished(handle, asked.photos / f"{file.stem}-{number}.png")
        if line["state"] != "done":
            missing += 1
            print(f"{file.name}: {line['error']}", file=sys.stderr)
        lines.append(json.dumps({"image": file.name, **line}) + "\n")
    # In one step, at the end: until then, and after a fault, the manifest of an earlier run stays whole.
    draft = asked.photos / "manifest.jsonl.part"
    draft.write_text("".join(lines), encoding="utf-8")
    draft.replace(asked.photos / "manifest.jsonl")
    print(f"{len(sent) - missing} of {len(sent)} pictures are in {asked.photos}")
    return 1 if missing else 0


def submitted(file: Path, text: str) -> tuple[dict[str, Any], JobHandle | None]:
    """The manifest's line of a job, and its handle; None where it is refused."""
    prompt = text.replace("{name}", " ".join(file.stem.replace("-", " ").replace("_", " ").split()))
    line = {"prompt": prompt, "seed": FIELDS["seed"]}
    try:
        handle = submit_job(prompt, image=file, **FIELDS)
    except InvalidJobError as error:
        return line | {"state": "rejected", "error": str(error)}, None
    return line | {"id": handle.id}, handle


def finished(handle: JobHandle, path: Path) -> dict[str, Any]:
    """What became of a job whose picture goes to `path`."""
    try:
        result = handle.result()
    except (CallerError, JobError) as error:
        return {"state": "failed", "error": str(error)}
    path.write_bytes(result.data())
    return {"state": "done", "uri": result.uri, "path": str(path)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SmallcatError as fault:
        # A service is out of reach: none of the other jobs would fare better.
        sys.exit(str(fault))
