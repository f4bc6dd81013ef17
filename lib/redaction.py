"""What never leaves this machine in a report: tokens, home folders, user names; and what never reaches a terminal.

``clean`` is put over every text that is saved for others (filled notebooks, HTML, manifests, messages); ``visible``
over what is printed. Knows nothing about the files that it is used on. Row files are not cleaned: they are the record.
"""

import os
import pwd
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

HIDDEN = "***"
# A value of the environment is a secret by its variable's name; TOKENIZERS_PARALLELISM is none.
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY)(_|$)", re.IGNORECASE)
MIN_SECRET_LENGTH = 8
# Tokens by their own form, for those that stand in no variable; and credentials inside an address.
# No \b in front: in the JSON of a notebook the letter of a "\n" stands right before what begins a line.
TOKEN_FORMS = re.compile(r"(hf_[A-Za-z0-9]{16,}|gh[opsu]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,})")
ADDRESS_CREDENTIALS = re.compile(r"(https?://)[^/\s@\"'<>\\]+@")
# Names of many machines: they tell nothing about a person, and stand in paths of their own.
GENERIC_USERS = frozenset(
    ["root", "user", "users", "home", "data", "work", "tmp", "ubuntu", "runner", "nobody", "jovyan", "app", "mnt"]
)
MIN_USER_LENGTH = 3
# A picture's letters can spell anything.
PICTURES = re.compile(r"(base64,[A-Za-z0-9+/=]+)")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Rule = Callable[[str], str]


def clean(text: str) -> str:
    """``text`` without tokens, home folder (``~`` in its place) and user name; pictures are left as they are."""
    rules = _rules(*_machine())
    pieces = PICTURES.split(text)
    # re.split gives what was between the pictures at the even places.
    pieces[::2] = [_apply(rules, piece) for piece in pieces[::2]]
    return "".join(pieces)


def clean_value(value: Any) -> Any:
    """A JSON value with every text in it cleaned, keys included."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean_value(key): clean_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_value(item) for item in value]
    return value


def visible(text: str) -> str:
    r"""``text`` for a terminal: cleaned, and control characters shown (``\x1b``) in place of obeyed.

    A model's output or a file name could else move the cursor, set the title or hide what was printed. Line breaks and
    tabs stay.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), clean(text))


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for rule in rules:
        text = rule(text)
    return text


def _machine() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(secrets, home folders, user names) of this process; read anew each time, tests and kernels change them."""
    secrets = {
        value for name, value in os.environ.items() if len(value) >= MIN_SECRET_LENGTH and SECRET_NAME.search(name)
    }
    account = _account()
    homes = {str(Path.home()), *([account.pw_dir] if account else [])}
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")}
    users |= {account.pw_name} if account else set()
    # Longest first: a secret or a home that begins like another one goes whole.
    kept_homes = sorted((home for home in homes if len(home.strip("/")) >= 2), key=len, reverse=True)
    kept_users = sorted(user for user in users if len(user) >= MIN_USER_LENGTH and user.lower() not in GENERIC_USERS)
    return tuple(sorted(secrets, key=len, reverse=True)), tuple(kept_homes), tuple(kept_users)


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        # A container may run under a number that no account has.
        return None


@lru_cache(maxsize=8)
def _rules(secrets: tuple[str, ...], homes: tuple[str, ...], users: tuple[str, ...]) -> tuple[Rule, ...]:
    found = [_replacing(re.escape(secret), HIDDEN) for secret in secrets]
    found += [lambda text: TOKEN_FORMS.sub(HIDDEN, text), lambda text: ADDRESS_CREDENTIALS.sub(rf"\1{HIDDEN}@", text)]
    # Relative paths climb to the root and come down again: a home folder behind some `..` is `~` too.
    found += [_replacing(rf"(?:\.\.)?(?:/\.\.)*{re.escape(home)}(?![\w-])", "~") for home in homes]
    found += [_replacing(_user_pattern(re.escape(user)), "user") for user in users]
    return tuple(found)


def _user_pattern(user: str) -> str:
    # Only as part of a path or an address, or as a whole value: a person of an exercise may have the same name.
    return rf"(?<=[/\\~_=]){user}(?![\w-])|(?<=['\"]){user}(?=['\"\\])|{user}(?=@)"


def _replacing(pattern: str, replacement: str) -> Rule:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text)
