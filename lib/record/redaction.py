"""Removes tokens, home folders and user names from reports, and control characters from what is printed.

``clean`` is for plain text; ``clean_value``, ``clean_markup`` and ``clean_notebook`` are for the texts inside a format,
whose keywords stay: a user may be called ``code`` or ``div``. Row files are not cleaned: they are the record.
"""

import html
import json
import os
import pwd
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
# A variable with such a name holds a secret; TOKENIZERS_PARALLELISM does not match.
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY)(_|$)", re.IGNORECASE)
MIN_SECRET_LENGTH = 8
# Where a token begins. Not \b: in JSON the letter of a "\n", on a terminal a colour may stand right before it.
_START = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt])|(?<=\dm))"
# Tokens recognised by their form.
TOKEN_FORMS = re.compile(
    r"(?:hf|gsk|npm|shpat|dop_v1|lin_api|whsec|[prs]k_(?:live|test))_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}"
    r"|(?:github_pat_|dckr_[op]at_|gl(?:pat|ptt|dt|rt|cbt)-|xox[a-z]-|xapp-|nvapi-|ya29\.)[\w-]{16,}|sk-[A-Za-z0-9]{20,}"
    rf"|{_START}(?:sk-(?:proj|ant|svcacct|admin|or|lf)-[\w-]{{16,}}|AIza[\w-]{{35}}|pypi-AgE[\w-]{{16,}}"
    r"|A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])|eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]{8,})"
)
# Looking for what every token has, and for names of headers, takes a tenth of the time.
LONG_WORD = re.compile(r"[\w.-]{19}")
HEADERS = ("authorization", "x-api-key", "x-auth-token", "x-access-token")
# Up to its end line; without one, as far as it goes on in base64.
PRIVATE_KEY = re.compile(
    r"""-----BEGIN[ ][A-Z0-9 ]{0,40}PRIVATE[ ]KEY(?:[ ]BLOCK)?-----(?:
    (?:[^-]|-(?!----))*+-----END[ ][A-Z0-9 ]{0,60}----- | (?:(?:\s|\\[nr]|["',])*+[A-Za-z0-9+/=]{16,}+)*+)""",
    re.VERBOSE,
)
# Credentials inside an address, in its query, and in the header of a request.
ADDRESS_CREDENTIALS = re.compile(r"(?<=\w://)[^/\s\"'<>\\]+@")
_SECRET_KEY = (
    r"(?:token|secret|passw(?:or)?d|passphrase|pwd|signature|credential|apikey|accesskeyid|(?<![a-z])(?:sig|key|auth))"
)
QUERY_CREDENTIALS = re.compile(rf"(?i)((?:[?&;]|\\u0026)[\w.-]{{0,40}}{_SECRET_KEY}=)[^&\s\"'<>\\#()\[\]{{}}`,;]+")
_COLON = r"[\"'\\]{0,2} {0,3}[:=] {0,3}[\"'\\]{0,2}"
HEADER_CREDENTIALS = re.compile(
    rf"(?i)(authorization{_COLON}(?:bearer|basic|token) +|x-(?:api-key|auth-token|access-token){_COLON})[^\s\"'\\,;]+"
)
BEARER = re.compile(r"(Bearer +)(?=[A-Za-z._~+/-]*[0-9])[\w.~+/=-]{20,}")
# Names of many machines, which identify nobody and occur in unrelated paths.
GENERIC_USERS = frozenset(
    ["root", "user", "users", "home", "data", "work", "tmp", "ubuntu", "runner", "nobody", "jovyan", "app", "mnt"]
)
MIN_USER_LENGTH = 3
# The letters of an encoded picture (PNG, JPEG, GIF, WebP, SVG) can spell anything.
_PICTURE = "base64,(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|PHN2Zy|PD94bW)[A-Za-z0-9+/=]{32,}"
PICTURES = re.compile(rf"({_PICTURE}|data:image/[\w.+-]{{1,30}};(?:{_PICTURE}|base64,))")
# Control characters, and those that a terminal does not show: marks of direction, fillers, variation selectors, tags.
CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
LINE_BREAKS = str.maketrans({"\n": r"\n", "\t": r"\t"})

# Where a style, a script or a tag of HTML begins and may end; what is between them is text.
MARKUP_START = re.compile(r"<(?:(?P<raw>style|script)\b|/?[a-z][\w-]*(?=[\s/>]))", re.IGNORECASE)
TAG_START = re.compile(r"</?[a-z][\w-]*(?=[\s/>])", re.IGNORECASE)
RAW_END = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in ("style", "script")}
TAG_STOP = re.compile("[>\"']")
# html.unescape cannot read it, and it is no character.
LONG_NUMBER = re.compile("&#[0-9]{4000,}+")
ATTRIBUTE = re.compile(r"""(\s)([\w:-]+)(\s*=\s*)("[^"]*"|'[^']*')""")
# Attributes whose values are keywords, CSS, or names inside the page.
FORMAT_ATTRIBUTES = frozenset(
    ["class", "id", "style", "type", "role", "for", "name", "rel", "scope", "lang", "headers", "d", "media", "xmlns"]
)
STRING_BODY = {quote: re.compile(rf"(?:[^{quote}\\\n]|\\.)*+") for quote in "\"'"}
# Keys of a notebook's metadata that hold keywords.
FORMAT_METADATA = frozenset(["kernelspec", "language_info"])

Rule = Callable[[str], str]


def clean(text: str) -> str:
    """``text`` without tokens and user name, with ``~`` for the home folder; pictures stay."""
    return _cleaner()(text)


def clean_notebook(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook of format 4, as JSON, with its sources, outputs and metadata's values cleaned."""
    change = _cleaner()
    metadata = notebook["metadata"]
    kept = {name: metadata[name] for name in FORMAT_METADATA & metadata.keys()}
    cells = [_clean_cell(cell, change) for cell in notebook["cells"]]
    return {**notebook, "cells": cells, "metadata": {**clean_value(metadata, change=change), **kept}}


def _clean_cell(cell: dict[str, Any], change: Rule) -> dict[str, Any]:
    in_markup = cell["cell_type"] == "markdown"
    source = _clean_lines(cell["source"], lambda text: clean_markup(text, change) if in_markup else change(text))
    if "outputs" not in cell:
        return {**cell, "source": source}
    return {**cell, "source": source, "outputs": [_clean_output(output, change) for output in cell["outputs"]]}


def _clean_output(output: dict[str, Any], change: Rule) -> dict[str, Any]:
    """A stream has ``text``, an error ``evalue`` and ``traceback``, every other output ``data``."""
    found = {name: _clean_lines(output[name], _cleaner(lines=True)) for name in ("text", "evalue") if name in output}
    found |= {"traceback": [change(line) for line in output["traceback"]]} if "traceback" in output else {}
    if "data" in output:
        found["data"] = {kind: _clean_data(kind, data, change) for kind, data in output["data"].items()}
        found["metadata"] = clean_value(output["metadata"], change=change)
    return {**output, **found}


def _clean_data(kind: str, data: Any, change: Rule) -> Any:
    """Data of the MIME type ``kind``: text, lines of text, or JSON; encoded pictures stay."""
    if kind.startswith("image/") and kind != "image/svg+xml":
        return data
    if kind == "application/javascript":
        return _clean_lines(data, lambda text: _clean_script(text, change))
    if kind in ("text/html", "text/markdown", "image/svg+xml"):
        return _clean_lines(data, lambda text: clean_markup(text, change))
    return clean_value(data, change=change) if kind.endswith("json") else _clean_lines(data, change)


def _clean_lines(text: str | list[str], change: Rule) -> str | list[str]:
    # On disk a text is a list of lines; a secret may span several.
    return change(text) if isinstance(text, str) else change("".join(text)).splitlines(keepends=True)


def clean_value(value: Any, keep: Collection[str] = (), change: Rule | None = None) -> Any:
    """A JSON value with every text in it cleaned (by ``change``), except the values of the keys ``keep``."""
    change = change or _cleaner()
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key in keep else clean_value(item, keep, change) for key, item in value.items()}
    return [clean_value(item, keep, change) for item in value] if isinstance(value, list | tuple) else value


def clean_markup(text: str, change: Rule | None = None) -> str:
    """HTML, or Markdown with HTML in it, cleaned in its text, attributes and string literals of scripts."""
    change = change or _cleaner()
    if _clean_escaped(text, change) == text:
        return text  # nearly always
    pieces, at = [], 0
    for start, end in _markup_spans(text):
        pieces += [_clean_escaped(text[at:start], change), _clean_tag(text[start:end], change)]
        at = end
    return "".join([*pieces, _clean_escaped(text[at:], change)])


def _markup_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each style, script and tag; no pattern, because what never ends would be read again and again."""
    tag_end, at, endless = _tag_ends(text), 0, set[str]()
    while start := MARKUP_START.search(text, at):
        raw, end = (start["raw"] or "").lower(), None
        if raw and raw not in endless:
            if closing := RAW_END[raw].search(text, start.end()):
                end = closing.end()
            else:
                endless.add(raw)
        if end is None and (tag := TAG_START.match(text, start.start())):
            end = tag_end(tag.end())
        if end is not None:
            yield start.start(), end
        at = end or start.end()


def _tag_ends(text: str) -> Callable[[int], int | None]:
    """A function: a place inside a tag -> where that tag ends, past quoted values; None if nothing ends it."""
    stops = [stop.start() for stop in TAG_STOP.finditer(text)]
    ends: list[int | None] = [None] * (len(stops) + 1)
    latest: dict[str, int] = {}
    for index in range(len(stops) - 1, -1, -1):
        mark = text[stops[index]]
        if mark == ">":
            ends[index] = stops[index] + 1
        elif mark in latest:
            ends[index] = ends[latest[mark] + 1]
        latest[mark] = index
    return lambda place: ends[bisect_left(stops, place)]


def _clean_tag(tag: str, change: Rule) -> str:
    if tag[:6].lower() == "<style":
        return tag
    if tag[:7].lower() == "<script":
        return _clean_script(tag, change)
    return ATTRIBUTE.sub(lambda found: _clean_attribute(*found.groups(), change), tag)


def _clean_attribute(space: str, name: str, equals: str, quoted: str, change: Rule) -> str:
    if name.lower() not in FORMAT_ATTRIBUTES and not name.lower().endswith("-mime-type"):
        # Without its quotes, which would make any value look quoted.
        quoted = f"{quoted[0]}{_clean_escaped(quoted[1:-1], change)}{quoted[0]}"
    return f"{space}{name}{equals}{quoted}"


def _clean_script(script: str, change: Rule) -> str:
    # What is not a string is code.
    pieces, at, open_until = [], 0, {'"': 0, "'": 0}
    for found in re.finditer("[\"']", script):
        quote, start = found[0], found.end()
        if start <= max(at, open_until[quote]):
            continue
        end = STRING_BODY[quote].match(script, start).end()
        if script.startswith(quote, end):
            pieces += [script[at:start], change(script[start:end]), quote]
            at = end + 1
        else:
            # No quote of this kind before there begins a string that ends.
            open_until[quote] = end
    return "".join([*pieces, script[at:]])


def _clean_escaped(text: str, change: Rule) -> str:
    """``text`` of HTML, also cleaned of what is written with entities."""
    cleaned = change(text)
    if "&" not in cleaned:
        return cleaned
    plain = html.unescape(LONG_NUMBER.sub("\ufffd", cleaned))
    again = change(plain)
    return cleaned if again == plain else html.escape(again)


def visible(text: str) -> str:
    """``text`` for a terminal, cleaned; control characters, which could hide what was printed, are spelled out."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), clean(text))


def one_line(text: str) -> str:
    """As ``visible``, with line ends and tabs spelled out too: a name, an id or a status cannot forge a line."""
    return visible(text).translate(LINE_BREAKS)


def _cleaner(lines: bool = False) -> Rule:
    """Made once for many texts, as it reads the environment; ``lines``: also a line that is only the user's name."""
    rules = _rules(*_machine(), lines)

    def clean_text(text: str) -> str:
        pieces = PICTURES.split(text)
        # re.split puts the text between the pictures at even places.
        pieces[::2] = [reduce(lambda text, rule: rule(text), rules, piece) for piece in pieces[::2]]
        return "".join(pieces)

    return clean_text


def _machine() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(secrets, home folders, user names) of this process; read each time, because tests and kernels change them."""
    secrets = {
        value for name, value in os.environ.items() if len(value) >= MIN_SECRET_LENGTH and SECRET_NAME.search(name)
    }
    account = _account()
    homes = {home_folder(), *([account.pw_dir] if account else [])}
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")}
    users |= {account.pw_name} if account else set()
    # Longest first: one may begin with another.
    kept_homes = sorted((home for home in homes if len(home.strip("/")) >= 2), key=len, reverse=True)
    kept_users = sorted(user for user in users if len(user) >= MIN_USER_LENGTH and user.lower() not in GENERIC_USERS)
    return tuple(sorted(secrets, key=len, reverse=True)), tuple(kept_homes), tuple(kept_users)


def home_folder() -> str:
    """The user's home folder; "" where HOME is not set and the user has no account, as in some containers."""
    try:
        return str(Path.home())
    except RuntimeError:
        return ""


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None  # a container may run under a number without an account


@lru_cache(maxsize=8)
def _rules(secrets: tuple[str, ...], homes: tuple[str, ...], users: tuple[str, ...], lines: bool) -> tuple[Rule, ...]:
    spellings = dict.fromkeys(spelling for secret in secrets for spelling in _spellings(secret))
    found = [_replacing(secret, re.escape(secret), HIDDEN) for secret in sorted(spellings, key=len, reverse=True)]
    found += [_hide_tokens, _replacing("PRIVATE KEY", PRIVATE_KEY, HIDDEN)]
    found += [_replacing("://", ADDRESS_CREDENTIALS, f"{HIDDEN}@"), _replacing("=", QUERY_CREDENTIALS, rf"\1{HIDDEN}")]
    found += [_hide_headers, _replacing("Bearer", BEARER, rf"\1{HIDDEN}")]
    found += [_replacing(home, _home_pattern(home), "~") for home in homes]
    found += [_replacing(user, _user_pattern(re.escape(user)), "user") for user in users]
    found += [_replacing(user, rf"(?m)^{re.escape(user)}$", "user") for user in users if lines]
    return tuple(found)


def _hide_tokens(text: str) -> str:
    return TOKEN_FORMS.sub(HIDDEN, text) if LONG_WORD.search(text) else text


def _hide_headers(text: str) -> str:
    lowered = text.lower()
    return HEADER_CREDENTIALS.sub(rf"\1{HIDDEN}", text) if any(name in lowered for name in HEADERS) else text


def _spellings(secret: str) -> list[str]:
    """``secret`` as it is, and as JSON, Python and addresses spell it."""
    json_texts = (json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    return [secret, *json_texts, repr(secret)[1:-1], quote(secret, safe="")]


def _home_pattern(home: str) -> str:
    # Relative paths climb to the root and come down again: a home folder behind some `..` is `~` too. A home such as
    # /code is neither the end of an element nor a folder inside another one; it may follow a "\n" or a colour.
    place = r"(?<!<)" if home.count("/") > 1 else r"(?:(?<![\w<.-])|(?<=\\[nrt])|(?<=\dm))"
    return rf"(?:(?<!\.\./)\.\.(?:/\.\.)*+|{place}){re.escape(home)}(?![\w-])"


def _user_pattern(user: str) -> str:
    # Only as part of a path or an address, or as a complete value: a person of an exercise may have the same name. Not
    # `</code>` nor LaTeX's `\text{`.
    path = rf"(?<=[/~_=])(?<!</)(?<!<\\/){user}(?![\w-])|(?<=\\){user}(?=[\\'\"<]|$)"
    return rf"{path}|(?<=['\"]){user}(?=['\"\\])|{user}(?=@)"


def _replacing(part: str, pattern: str | re.Pattern[str], replacement: str) -> Rule:
    # Looking for a part of what the pattern finds takes a hundredth of the time.
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text) if part in text else text
