"""The two lists of pins are one: conda's environment.yml and pip's requirements.txt."""

import re

import yaml

from lib.artifacts import PROJECT_ROOT

REQUIREMENTS = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8")
ENVIRONMENT = (PROJECT_ROOT / "environment.yml").read_text(encoding="utf-8")


def test_both_files_pin_the_same_versions_in_the_same_order():
    pins = [line for line in REQUIREMENTS.splitlines() if line and not line.startswith("#")]
    (pip,) = (entry["pip"] for entry in yaml.safe_load(ENVIRONMENT)["dependencies"] if isinstance(entry, dict))
    assert pip == pins
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", pin) for pin in pins)


def test_each_pin_has_its_reason():
    lines = [line for line in ENVIRONMENT.splitlines() if "==" in line and not line.startswith("#")]
    assert lines and all(re.search(r"==\S+\s+# \w", line) for line in lines)
