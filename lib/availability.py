"""Whether something can be had here, as a value and not as an exception: notebooks hold no ``try``.

Only what is absent becomes a reason. Data that is there and wrong stays an error, and so does every other failure.
"""

from collections.abc import Callable
from typing import TypeVar

from lib.assets import AssetUnavailable

Asset = TypeVar("Asset")


def load_or_reason(load: Callable[..., Asset], *arguments: object) -> tuple[Asset | None, str]:
    """What ``load(*arguments)`` gives and an empty reason, or None and why it cannot be had here.

    Args:
        load: a function of ``lib.assets``.

    Raises:
        AssetError: it was found but is not what it has to be.
    """
    try:
        return load(*arguments), ""
    except AssetUnavailable as error:
        return None, str(error)
