"""Lines of options, as AUTOMATIC1111's script "Prompts from file or textbox" reads them, also after a prompt.

    --prompt "a small cat" --negative_prompt "blurry" --steps 30 --seed 7 --width 512 --cfg_scale 7
    a small cat --steps 30

The options are split into words as by a shell. The two prompts take all words up to the next option.

An option is two dashes and a letter at the start of a word, outside quotes. Where a word processor made one
dash of the two, it is an option if its name is one, or nearly. Other dashes are text. Words are parted by
whatever looks like a blank, as pasted text has it, or by one that has no width; and quotes may be curly.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex

from producer.prompts.entries import LineError
from producer.prompts.fields import SIZE, is_meaningless, meaning_of, misspelt, near_miss, sides_of
from producer.prompts.lines import lines_of
from producer.prompts.sources import Source
from worker.contract.errors import PromptFileError
from worker.contract.job import JOB_FIELDS

#: Characters of options in a line, at most: several times what a job can hold.
MAX_OPTIONS = 64_000
#: What typing two dashes becomes: hyphens, dashes and minus signs of Unicode.
_DASHES = "\u2010-\u2015\u2212\u2e3a\u2e3b\ufe58\uff0d"
#: Blanks without width, which part words as all of Unicode's do.
_NO_WIDTH = "\u200b\u2060\ufeff"
_BLANKS = rf"\s{_NO_WIDTH}"
_ALL_BLANKS = _NO_WIDTH + "".join(each for each in map(chr, range(0x3001)) if each.isspace())
_MAYBE = re.compile(rf"(?<![^{_BLANKS}])(?:--|[{_DASHES}])")
_OPTION = re.compile(rf"(?<![^{_BLANKS}])(--|-?[{_DASHES}][-{_DASHES}]?)([A-Za-z][^{_BLANKS}=]*)")
#: A text in quotes, an option, or a blank. A quote that is not closed goes to the end, which takes no second
#: try.
_PART = re.compile(rf""""(?:\\.|[^"\\])*+(?:"|\\?$)|'[^']*+(?:'|$)|{_OPTION.pattern}|[{_BLANKS}]""")
_CURLY = str.maketrans(dict.fromkeys("“”„", '"'))
#: A text in curly single quotes. One of them within a word is an apostrophe.
_CURLY_SINGLE = re.compile(rf"(?<![^{_BLANKS}=])[‘‚]([^‘‚'\"]*?)[’‘](?![^{_BLANKS}])")
#: Before a text in quotes: it is no option, whatever it begins with.
_TEXT = "\0"


def has_options(line: str) -> bool:
    """Whether there may be options in a line."""
    return ("--" in line or not line.isascii()) and _MAYBE.search(line) is not None


@functools.lru_cache(64)
def has_a1111_options(source: Source) -> bool:
    """Whether a text file has options in any line: AUTOMATIC1111's script takes such files.

    A file that cannot be read has none: reading it says so.
    """
    if source.format != "txt":
        return False
    with contextlib.suppress(PromptFileError), source.open() as stream:
        return any(_gives_options(text) for _, text in lines_of(source.name, stream) if isinstance(text, str))
    return False


def _gives_options(line: str) -> bool:
    return (
        has_options(line)
        and not line.lstrip().startswith("#")
        and any(
            _is_option(dashes, name) and (meaning_of(name) or is_meaningless(name))
            for dashes, name in _OPTION.findall(line)
        )
    )


def options_of(line: str, *, extra: bool = False) -> list[tuple[str, str]]:
    """The names and values that a line of text gives; a prompt before the options is the first of them.

    `extra` permits unknown options after a prompt. Raises `LineError` that says what is wrong and what to do.
    """
    start = next((each.start() for each in _OPTION.finditer(line) if _is_option(*each.groups())), None)
    if start is None:
        return [("prompt", line)]
    if len(line) - start > MAX_OPTIONS:
        raise LineError(
            "", f"Its options have {len(line) - start:,} characters, the limit is {MAX_OPTIONS:,}."
        )
    try:
        words = _words(line[start:])
    except ValueError as error:
        raise _bad(f"{error}: put quotes around texts.") from None
    pairs: list[tuple[str, str]] = []
    if prompt := line[:start].strip(_ALL_BLANKS):
        pairs.append(("prompt", prompt))
    at = 0
    while at < len(words):
        name, value, at = _next(words, at)
        if prompt and not extra and meaning_of(name) is None and not is_meaningless(name):
            if near := near_miss(name):
                raise LineError(meaning_of(near) or "", misspelt(name[:60], near))
            known = ", ".join(each.a1111_option for each in JOB_FIELDS.values() if each.a1111_option)
            raise _bad(
                f"there is no option --{name[:60]}, known are {known}. "
                'Where it is text, write --prompt "..." with quotes.'
            )
        if prompt and meaning_of(name) == SIZE and sides_of(value) is None:
            raise _bad(
                f"--{name} is {value[:60]}, which is no size such as 512x768. "
                'Where it is text, write --prompt "..." with quotes.'
            )
        pairs.append((name, value))
    return pairs


def _next(words: list[str], at: int) -> tuple[str, str, int]:
    """The option at place `at`, its value, and the place after it."""
    word = words[at]
    at += 1
    if not _starts_option(word):
        raise _bad(
            f'"{word.removeprefix(_TEXT)[:60]}" stands where an option should: put quotes around texts.'
        )
    name, equals, value = word[2:].partition("=")
    if not equals:
        if at == len(words) or _starts_option(words[at]):
            raise _bad(f"--{name[:60]} has no value: give it one.")
        value = words[at]
        at += 1
    texts = [value]
    if (field := JOB_FIELDS.get(meaning_of(name) or "")) is not None and field.is_prompt:
        while at < len(words) and not _starts_option(words[at]):
            texts.append(words[at])
            at += 1
    return name, " ".join(texts).replace(_TEXT, ""), at


def _is_option(dashes: str | None, name: str) -> bool:
    """Whether a word that begins with dashes is an option."""
    if dashes is None:
        return False
    return dashes == "--" or bool(meaning_of(name) or is_meaningless(name) or near_miss(name))


def _starts_option(word: str) -> bool:
    return word.startswith("--") and word[2:3].isalpha()


def _words(options: str) -> list[str]:
    """The words of options as a shell splits them. Raises `ValueError` for a quote that is not closed."""
    if _TEXT in options:
        raise ValueError("there is the control character U+0000")
    if '"' not in options:
        options = _CURLY_SINGLE.sub(r'"\1"', options.translate(_CURLY))

    def normal(match: re.Match[str]) -> str:
        dashes, name = match.groups()
        if dashes is not None:
            return f"--{name}" if _is_option(dashes, name) else match[0]
        return match[0][0] + _TEXT + match[0][1:] if match[0][0] in "\"'" else " "

    return shlex.split(_PART.sub(normal, options))


def _bad(reason: str) -> LineError:
    return LineError("", f"The options cannot be read: {reason}")
