"""Code that comes with a model or adapter, tried in a child process with limits before this process runs it.

Regular expressions in an adapter's configuration and chat templates may run without end or take all memory, and not all
of them can be interrupted.
"""

import multiprocessing
import os
import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from lib.record.files import read_json

# A usual template takes a hundredth of a second.
LIMIT_S = 10
LIMIT_BYTES = 500_000_000
# Only Linux has it: elsewhere time alone is limited.
STATM = Path("/proc/self/statm")
MAX_PATTERN_CHARACTERS = 100_000
# As peft puts the strings of an adapter's configuration into regular expressions.
PATTERN_KEYS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
TURNS = [
    {"role": "system", "content": "Count to 7.\nThen stop."},
    {"role": "user", "content": "Now, 1 or 2?"},
    {"role": "assistant", "content": "1\n\n2 <b>3</b>"},
]


class TrialError(Exception):
    """What was tried takes too long, too much memory, or is not allowed; the text goes on after a name."""


def within(seconds: float, function: Callable[..., object], *arguments: Any) -> None:
    """Call ``function`` in a forked child; TrialError if it takes ``seconds``, too much memory, or kills the child.

    What it raises is left to the real call. It must use neither torch nor tokenizers, whose threads a fork lacks.
    """
    child = multiprocessing.get_context("fork").Process(
        target=_limited, args=(seconds, function, *arguments), daemon=True
    )
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
    if child.exitcode != 0:
        raise TrialError(f"takes over {seconds} s or {LIMIT_BYTES // 10**6} MB")


def _limited(seconds: float, function: Callable[..., object], *arguments: Any) -> None:
    status = 1
    try:
        _limit(resource.RLIMIT_CPU, int(seconds) + 1)
        if STATM.exists():
            used = int(STATM.read_text().split()[0]) * resource.getpagesize()
            _limit(resource.RLIMIT_AS, used + LIMIT_BYTES)
        function(*arguments)
        status = 0
    except MemoryError:
        pass
    except Exception:
        status = 0
    finally:
        # Nothing of the parent's is flushed, closed or removed.
        os._exit(status)


def _limit(kind: int, most: int) -> None:
    # A limit that is lower already stays, and not every system has each: the trial runs anyway, and ends in time.
    with suppress(ValueError, OSError):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def try_template(render: Callable[..., object], template: str) -> None:
    """Try ``render(messages, add_generation_prompt=...)`` on some conversations; TrialError as ``within``."""
    if len(template) > MAX_PATTERN_CHARACTERS:
        raise TrialError(f"is over {MAX_PATTERN_CHARACTERS} characters long")
    if _has_power(template):
        raise TrialError("holds a power (**), which cannot be interrupted; remove it")
    within(LIMIT_S, _render_all, render)


def _has_power(template: str) -> bool:
    # A ** that follows a bracket or comma unpacks arguments.
    try:
        tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return False
    return any(after == ("operator", "**") and before[1] not in ("(", ",") for before, after in pairwise(tokens))


def _render_all(render: Callable[..., object]) -> None:
    for turns in (TURNS[1:2], TURNS[:2], TURNS, TURNS[1:], [*TURNS, TURNS[1]]):
        for add_generation_prompt in (False, True):
            try:
                render(turns, add_generation_prompt=add_generation_prompt)
            except jinja2.TemplateError:
                continue  # some refuse a system turn


def try_patterns(config_file: Path, module_names: Sequence[str]) -> None:
    """Try the regular expressions of an adapter's configuration on the model's modules; TrialError as ``within``."""
    patterns = list(_patterns(read_json(config_file)))
    if sum(map(len, patterns)) > MAX_PATTERN_CHARACTERS:
        raise TrialError(f"holds over {MAX_PATTERN_CHARACTERS} characters of module names")
    if patterns:
        within(LIMIT_S, _match_all, patterns, [*module_names, *(f"base_model.model.{name}" for name in module_names)])


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    for key, form in PATTERN_KEYS.items():
        value = config.get(key) or ()
        # A list of target or excluded modules holds names, not patterns.
        named = [value] if isinstance(value, str) else () if form == "{}" else value
        yield from (form.format(text) for text in named if isinstance(text, str))


def _match_all(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in map(re.compile, patterns):
        for name in names:
            pattern.match(name)
            pattern.fullmatch(name)
