"""The parts of a call's memory that can be counted exactly, counted."""

from pathlib import Path

import pytest
import torch

from jam.decode.memory import DecodeMemory, decode_memory
from jam.models.cpu import attention_dtype
from jam.models.load import Bundle, load_bundle
from jam.models.slot_cache import SlotCache
from tests.decode.bundles import cross_bundle, plain_bundle
from tests.tiny import tiny_pair

ROWS, PROMPT, ROOM = 3, 5, 7


def buffers(bundle: Bundle, rows: int, slots: int) -> int:
    """Bytes of a real cache after a forward."""
    cache = SlotCache(rows, slots, attention_dtype(bundle.model)).at(0, 1)
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    with torch.inference_mode():
        bundle.readout().states(ids, torch.ones(rows, 1, 1, 1, dtype=torch.bool), ids, cache)
    return cache.bytes


@pytest.mark.parametrize("make", [plain_bundle, cross_bundle])
@pytest.mark.parametrize(("dtype", "packed"), [(torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_the_cache_is_as_large_as_it_says(make, dtype: torch.dtype, packed: bool, tmp_path: Path) -> None:
    bundle = make(tmp_path, dtype)
    if packed and not bundle.pack():
        pytest.skip("nothing is packed here")
    found = decode_memory(bundle, ROWS, PROMPT, ROOM, prompts=2)
    assert found.cache == buffers(bundle, ROWS, PROMPT + ROOM)
    assert found.started == buffers(bundle, 2, PROMPT)


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3"])  # grouped keys, wide heads, one matrix for all three
def test_families_with_other_keys(family: str, tmp_path: Path) -> None:
    _, image = tiny_pair(tmp_path, image_family=family)
    bundle = load_bundle(image)
    assert decode_memory(bundle, ROWS, PROMPT, ROOM).cache == buffers(bundle, ROWS, PROMPT + ROOM)


@pytest.mark.parametrize("make", [plain_bundle, cross_bundle])
def test_weights_and_heads_are_what_the_network_holds(make, tmp_path: Path) -> None:
    bundle = make(tmp_path, torch.float32)
    tensors = {id(part): part for part in (*bundle.model.parameters(), *bundle.model.buffers())}
    tensors |= {id(part): part for part in bundle.image.network.state_dict(keep_vars=True).values()}
    held = sum(part.nbytes for part in tensors.values())
    before = decode_memory(bundle, ROWS, PROMPT, ROOM)
    assert (before.weights, before.heads) == (held, 0)
    if not bundle.pack():
        pytest.skip("nothing is packed here")
    after = decode_memory(bundle, ROWS, PROMPT, ROOM)
    assert after.weights == held  # packed, a matrix takes what it took
    assert after.heads > 0 and after.peak - after.heads == before.peak


def test_prefill_and_step_take_turns() -> None:
    assert DecodeMemory(1, 2, 4, 8, 16, 32).peak == 1 + 2 + 4 + 32
    assert DecodeMemory(1, 2, 4, 8, 64, 32).peak == 1 + 2 + 8 + 64
