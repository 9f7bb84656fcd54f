"""One exchange against its formula, written out position by position and head by head."""

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from jam.models.exchange import CrossBlock, Exchange

TEXT, IMAGE, TOKENS = 8, 12, 5


def exchange() -> Exchange:
    config = PreTrainedConfig(attn_implementation="sdpa")
    config.num_hidden_layers = 2
    blocks = CrossBlock(config, TEXT, IMAGE, 2, 4, 0), CrossBlock(config, IMAGE, TEXT, 3, 4, 1)
    both = Exchange(*blocks).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.1)
    return both


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def formula(block: CrossBlock, x: Tensor, y: Tensor, heads: int) -> Tensor:
    """x [T, D], y [T, E] -> new x."""
    width = x.shape[1] // heads
    queries = torch.stack([block.q_proj.weight @ rms(row, block.norm_self.weight) for row in x])
    keys = torch.stack([block.k_proj.weight @ rms(row, block.norm_other.weight) for row in y])
    values = torch.stack([block.v_proj.weight @ rms(row, block.norm_other.weight) for row in y])
    rows = []
    for t in range(len(x)):
        parts = []
        for head in range(heads):
            at = slice(head * width, (head + 1) * width)
            weights = (keys[: t + 1, at] @ queries[t, at] / math.sqrt(width)).softmax(0)
            parts.append(weights @ values[: t + 1, at])
        a = block.out_proj.weight @ torch.cat(parts)
        inner = block.fc1.weight @ rms(x[t] + a, block.norm_ffn.weight)
        delta = a + block.fc2.weight @ (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
        rows.append(x[t] + math.tanh(block.gate.item()) * delta)
    return torch.stack(rows)


def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float64) for width in (TEXT, IMAGE))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_both_directions_read_the_states_from_before(attention: str) -> None:
    both = exchange()
    both.text.config._attn_implementation = attention
    both.image.config._attn_implementation = attention
    x, y = states()
    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.float64).masked_fill_(
        torch.ones(TOKENS, TOKENS).triu(1).bool(), torch.finfo(torch.float64).min
    )
    new_x, new_y = both(x, y, mask if attention == "eager" else None)
    torch.testing.assert_close(new_x[0], formula(both.text, x[0], y[0], 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_y[0], formula(both.image, y[0], x[0], 3), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_closed_gate_is_the_identity() -> None:
    both = exchange()
    both.text.gate.zero_()
    x, y = states()
    new_x, new_y = both(x, y)
    assert torch.equal(new_x, x) and not torch.equal(new_y, y)


@torch.no_grad()
def test_keys_of_each_direction_are_kept_in_its_own_slot() -> None:
    both = exchange()
    x, y = states()
    whole = both(x, y)
    cache = DynamicCache(config=both.text.config)
    steps = [both(x[:, t : t + 1], y[:, t : t + 1], None, cache) for t in range(TOKENS)]
    for side in (0, 1):
        torch.testing.assert_close(torch.cat([step[side] for step in steps], 1), whole[side], rtol=1e-9, atol=1e-9)
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 3]
