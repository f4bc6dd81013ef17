"""Where data and models are looked for, and the errors where they are not found."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from lib.record.paths import expand_home, project_path
from lib.record.redaction import HIDDEN, clean

ASSETS_VARIABLE = "ASSETS_DIR"
Asset = TypeVar("Asset")
Origin = Literal["bundled", "data/raw", "assets folder", "local folder", "local file", "hub", "url"]


@dataclass(frozen=True)
class Place:
    """Where a model or data set lies, or would come from; looked up without the network, its content unread."""

    name: str
    found: Path | None  # None where it is not on this disk
    origin: Origin | None = None  # of what was found
    address: str = ""  # where it would be downloaded from; empty where nowhere
    target: Path | None = None  # the file that a download is kept in; None for the hub's cache


class AssetError(Exception):
    """A data set or model is not what it has to be; the message names it, what was expected and the remedy."""


class AssetUnavailable(AssetError):
    """A data set or model is absent and cannot be fetched; the message says how to bring it."""


def load_or_reason(load: Callable[..., Asset], *arguments: object) -> tuple[Asset | None, str]:
    """``load(*arguments)`` and "", or None and why it is unavailable; AssetError if it is not what it has to be."""
    try:
        return load(*arguments), ""
    except AssetUnavailable as error:
        return None, str(error)


def own_path(path: str) -> Path:
    return project_path(expand_home(path)).resolve()


def assets_folder(assets_dir: str) -> Path | None:
    named = assets_dir or os.environ.get(ASSETS_VARIABLE, "")
    if named and not own_path(named).is_dir():
        raise AssetError(f"assets folder {named!r} is not a folder: fix --assets or {ASSETS_VARIABLE}, or leave it out")
    return own_path(named) if named else None


def place_of(file: Path) -> Place:
    """Of a file that a person brings, wherever it is."""
    return Place(file.name, file if file.is_file() else None, "local file", target=file)


def hub_is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def failure_reason(error: Exception) -> str:
    """Kind and first line of a library's error, without anything that looks like a token."""
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return re.sub(r"\bhf_\w+", HIDDEN, clean(text))
