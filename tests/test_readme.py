"""README and docs/: the tree is complete, links lead somewhere, flags and presets are there, and numbers right."""

import re

import pytest

from lib.driver.cli import build_parser
from lib.params import load_params
from lib.record.paths import PROJECT_ROOT
from lib.stats import (
    effective_size,
    minimum_detectable_difference,
    paired_interval,
    paired_test,
    wilson_interval,
)

PAGES = [PROJECT_ROOT / name for name in ("README.md", "docs/method.md", "docs/reference.md", "docs/layout.md")]
README, METHOD, REFERENCE, LAYOUT = (page.read_text(encoding="utf-8") for page in PAGES)
PRESETS = ("simple", "medium", "strong")


def test_every_module_stands_under_its_folder():
    tree = LAYOUT.partition("\n    driver/")[2].partition("Made by a run")[0]
    found: dict[str, set[str]] = {}
    folder = "driver"
    for line in tree.splitlines()[1:]:
        if named := re.match(r"    (\w+)/", line):
            folder = named[1]
        elif re.match(r" {17}\S", line):
            found.setdefault(folder, set()).update(re.findall(r"\w+", line))
    lib = PROJECT_ROOT / "lib"
    folders = {path.parent for path in lib.rglob("__init__.py")} - {lib}
    assert found == {one.name: {path.stem for path in one.glob("*.py")} - {"__init__"} for one in folders}
    assert len(LAYOUT.splitlines()) <= 45


def test_the_tree_of_the_readme_is_what_ls_shows():
    entries = re.findall(r"^      (\w+)(/|\.py) ", README, re.MULTILINE)
    lib = PROJECT_ROOT / "lib"
    there = {path.name for path in lib.iterdir() if not path.name.startswith("_")}
    assert {f"{name}{end}".rstrip("/") for name, end in entries} == there and len(there) <= 14


def test_links_and_pictures_are_there():
    links = [(page, name) for page in PAGES for name in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))]
    named = [page.parent / name for page, name in links if "://" not in name]
    assert len(named) >= 3 and all(path.exists() for path in named), named
    # Whoever begins with the README finds every other page.
    assert all(page in named for page in PAGES[1:])


def test_every_flag_that_is_named_exists():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    named = set(re.findall(r"`(?:run_all\.py )?(--[a-z0-9-]+)", README + REFERENCE))
    # Of pip in the cell for Colab, which stands in no code span.
    assert len(named) > 15 and named <= known, named - known


@pytest.mark.parametrize("path", sorted((PROJECT_ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_named(path):
    assert re.search(rf"[|`] ?{path.stem} ?[|`]", README)


def test_the_presets_table_holds_the_values_of_the_presets():
    presets = [load_params(PROJECT_ROOT / "params" / f"{name}.yaml") for name in PRESETS]

    def cells(title, *values):
        row = next(line for line in README.splitlines() if line.startswith(f"| {title} |"))
        assert row.strip("| ").split(" | ")[1:4] == list(values)

    cells("few-shot examples", *(str(preset.fewshot_k) for preset in presets))
    cells("baseline accuracy / safety", *(f"{p.baseline_accuracy} / {p.baseline_safety}" for p in presets))
    cells("LoRA r / alpha / dropout", *(f"{p.lora_r} / {p.lora_alpha} / {p.lora_dropout:g}" for p in presets))
    assert all(f"`{preset.published_adapter}`" in README for preset in presets)
    assert all(part in README for part in presets[2].train_file_url.removeprefix("https://").rsplit("/", 1))


def half_width(low, high):
    return 100 * (high - low) / 2


def test_the_widths_of_rates_and_differences_are_computed_ones():
    text = " ".join(README.split())
    pattern = (
        r"(\d+) questions give one rate to ±([\d.]+) points, a difference of independent ones to ±([\d.]+)\. Paired, "
        r"it is ±([\d.]+) \(80 % power from about (\d+)\) if (\d+) % of questions change outcome, ±([\d.]+) \((\d+)\) "
        r"if (\d+) % of (\d+) prompts do"
    )
    (found,) = re.findall(pattern, text)
    num_questions, one, two, paired, shown, share, paired_prompts, shown_prompts, share_prompts, num_prompts = map(
        float, found
    )
    width = half_width(*wilson_interval(num_questions / 2, num_questions))
    assert (width, width * 2**0.5) == pytest.approx((one, two), abs=0.05)
    assert num_prompts == 240
    # 216 prompts once and 12 twice, as MLCommons' class set has them.
    size = effective_size([*range(228), *range(12)])
    for total, moved, expected, detectable in (
        (num_questions, share, paired, shown),
        (size, share_prompts, paired_prompts, shown_prompts),
    ):
        each = moved / 200 * total
        assert half_width(*paired_interval(each, each, total)) == pytest.approx(expected, abs=0.05)
        assert 100 * minimum_detectable_difference(int(total), moved / 100) == pytest.approx(detectable, abs=0.5)


def test_no_picture_is_read_by_overlapping_intervals():
    assert not re.search(r"intervals\s+(that\s+)?overlap", README)
    (caption,) = re.findall(r"(-[\d.]+) points,\s+95 % interval (-[\d.]+) to ([\d.]+), no change shown", README)
    found = paired_test(24 * [False], [True] + 23 * [False])
    assert [100 * value for value in (found.difference, found.low, found.high)] == pytest.approx(
        [float(number) for number in caption], abs=0.05
    )


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) < 1350


def test_the_picture_is_small():
    assert (PROJECT_ROOT / "docs" / "accuracy_safety.png").stat().st_size < 100_000


def test_every_promise_of_security_names_tests_that_exist():
    table = (
        (PROJECT_ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("| --- | --- |\n")[2].partition("\n\n")[0]
    )
    promises = [line.strip("| ").split(" | ") for line in table.splitlines() if not line.startswith("| **")]
    assert len(promises) > 20
    for promise, tests in promises:
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", tests)
        assert named and "TODO" not in tests, f"no test guards: {promise}"
        for file, name in named:
            assert f"\ndef {name}(" in (PROJECT_ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"
