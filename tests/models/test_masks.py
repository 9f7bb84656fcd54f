"""Masks under a sliding window: what is counted are the slots that a query sees."""

from pathlib import Path

import pytest
import torch

from jam.models.heads import next_heads
from jam.models.load import load_bundle
from jam.models.masks import windowed
from tests.tiny import tiny_parent

WINDOWS = ("mistral", "qwen2", "gemma2", "gemma3_text")  # of 5 tokens, in all or some layers


def rows(text: str) -> torch.Tensor:
    """bool [1, 1, T, S] from lines of ``x`` and ``.``."""
    return torch.tensor([[[[letter == "x" for letter in line] for line in text.split()]]])


def test_a_window_without_gaps_is_a_band():
    assert torch.equal(windowed(rows("x.... xx... xxx.. xxxx. xxxxx"), 3), rows("x.... xx... xxx.. .xxx. ..xxx"))


def test_a_window_reaches_over_slots_that_are_hidden():
    """A guidance row: prefix, what the reply wrote meanwhile, then the image."""
    assert torch.equal(windowed(rows(".xx....x."), 3), rows(".xx....x."))
    assert torch.equal(windowed(rows(".xx....xx"), 3), rows("..x....xx"))


def test_packed_documents_and_other_forms():
    assert torch.equal(windowed(rows("x... xx.. ..x. ..xx"), 1), rows("x... .x.. ..x. ...x"))
    assert windowed(None, 3) is None
    for mask in (torch.ones(1, 4), torch.zeros(1, 1, 4, 4)):  # of real tokens; additive
        assert windowed(mask, 1) is mask


@pytest.mark.parametrize("family", WINDOWS)
def test_a_network_with_windows_keeps_them_under_a_mask_of_ours(tmp_path: Path, family: str):
    """transformers makes the windows itself where it is given no mask; with a cache too, token by token."""
    bundle = load_bundle(tiny_parent(tmp_path, True, 0, family), torch.float64)
    ids = torch.tensor([[0, 20, 33, 40, 50, 60, 70, 80, 90, 100, 11, 12]])
    heads, length = next_heads(ids, bundle.vocabulary), ids.shape[1]
    wanted = bundle.logits(ids, heads)[0]
    causal, positions = torch.ones(1, 1, length, length, dtype=torch.bool).tril(), torch.arange(length)[None]
    found = bundle.logits(ids, heads, attention_mask=causal, position_ids=positions)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # eager attention takes its softmax in float32
    cache, steps = None, []
    for at in (slice(0, 8), *(slice(n, n + 1) for n in range(8, length))):
        settings = {"attention_mask": causal[:, :, at, : at.stop], "position_ids": positions[:, at]}
        step, cache = bundle.logits(ids[:, at], heads[:, at], past_key_values=cache, use_cache=True, **settings)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=0, atol=1e-6)
