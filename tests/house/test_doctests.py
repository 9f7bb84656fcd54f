"""Every example in a docstring of ours runs."""

import doctest
import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_examples_in_docstrings_hold():
    attempted = 0
    for top in ("jam", "merge", "finetune"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if ">>> " in path.read_text():
                name = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
                result = doctest.testmod(importlib.import_module(name))
                assert result.failed == 0, name
                attempted += result.attempted
    assert attempted > 20
