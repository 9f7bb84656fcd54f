"""The worked examples in docstrings hold."""

import doctest
from types import ModuleType

import pytest

from jam import generate, terminal
from jam.decode import sampling


@pytest.mark.parametrize("module", [sampling, generate, terminal], ids=lambda module: module.__name__)
def test_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
