"""Where data and models are looked for, and what is said where they are not found."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from lib.record.paths import expand_home, project_path

Asset = TypeVar("Asset")


def load_or_reason(load: Callable[..., Asset], *arguments: object) -> tuple[Asset | None, str]:
    """What ``load(*arguments)`` gives and an empty reason, or None and why it cannot be had here.

    Args:
        load: a function of ``lib.prepare.datasets``.

    Raises:
        AssetError: it was found but is not what it has to be.
    """
    try:
        return load(*arguments), ""
    except AssetUnavailable as error:
        return None, str(error)


ASSETS_VARIABLE = "ASSETS_DIR"


Origin = Literal["bundled", "data/raw", "assets folder", "local folder", "local file", "hub", "url"]


class AssetError(Exception):
    """A data set or model is not what it has to be; the text names it, what was expected, and what mends it."""


class AssetUnavailable(AssetError):
    """A data set or model cannot be had here (absent, no network, offline); the text says how to bring it."""


def own_path(path: str) -> Path:
    return project_path(expand_home(path)).resolve()


def assets_folder(assets_dir: str) -> Path | None:
    named = assets_dir or os.environ.get(ASSETS_VARIABLE, "")
    if named and not own_path(named).is_dir():
        raise AssetError(
            f"assets folder {named!r} is not a folder: mend --assets or {ASSETS_VARIABLE}, or leave it out"
        )
    return own_path(named) if named else None


def hub_is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def failure_reason(error: Exception) -> str:
    """Kind and first line of a library's error, with anything that looks like a token taken out."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable):
            text = text.replace(os.environ[variable], "***")
    return re.sub(r"\bhf_\w+", "***", text)
