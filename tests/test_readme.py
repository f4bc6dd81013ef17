"""The README's tree is complete, its links lead somewhere, and its flags and presets are there."""

import re

import pytest

from lib.artifacts import PROJECT_ROOT
from run_all import build_parser

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (PROJECT_ROOT / "docs" / "method.md").read_text(encoding="utf-8")


def test_every_module_has_its_line_and_every_line_its_module():
    told = re.findall(r"^    lib/(\w+)\.py +\S", README, re.MULTILINE)
    found = {path.stem for path in (PROJECT_ROOT / "lib").glob("*.py")} - {"__init__"}
    assert sorted(told) == sorted(found)


def test_links_and_pictures_are_there():
    named = [name for name in re.findall(r"\]\(([^)]+)\)", README + METHOD) if "://" not in name]
    assert len(named) >= 3 and all((PROJECT_ROOT / name).exists() for name in named), named


def test_every_flag_that_is_named_exists():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    named = set(re.findall(r"`(?:run_all\.py )?(--[a-z0-9-]+)", README))
    # Of pip in the cell for Colab, which stands in no code span.
    assert len(named) > 15 and named <= known, named - known


@pytest.mark.parametrize("path", sorted((PROJECT_ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_told(path):
    assert re.search(rf"[|`] ?{path.stem} ?[|`]", README)


def test_the_picture_is_small():
    assert (PROJECT_ROOT / "docs" / "accuracy_safety.png").stat().st_size < 100_000
