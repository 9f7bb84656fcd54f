"""A model driven layer by layer is the model, for every family, with windows shorter than the text and with a cache."""

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, sliding_window_overlay

from jam.models.families import FAMILIES
from jam.models.tower import Tower, network_class
from jam.models.traits import windows
from tests.tiny import randomize, tiny_config

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("chameleon", {"swin_norm": True}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False}),
]


def build(family: str, changes: dict) -> torch.nn.Module:
    config = tiny_config(family, vocab_size=96, attn_implementation="eager", **changes)
    model = network_class(family)(config).double().eval()
    randomize(model, 0)
    return model


def drive(model: torch.nn.Module, ids: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
    tower, past = Tower(model), 0 if cache is None else cache.get_seq_length()
    positions = torch.arange(past, past + ids.shape[1])[None].expand_as(ids)
    x = tower.embed(tower.rows(ids), positions)

    def masks(window: int | None) -> torch.Tensor | None:
        overlay = None if window is None else sliding_window_overlay(window)
        return create_causal_mask(model.config, x, None, cache, and_mask_function=overlay)

    for index, inputs in enumerate(tower.inputs(x, positions, masks)):
        x = tower.run(index, x, cache, **inputs)
    return tower.scores(model.lm_head(tower.finish(x)))


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_model_driven_layer_by_layer_is_the_model(family: str, changes: dict):
    model, ids = build(family, changes), torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(ids).logits
        torch.testing.assert_close(drive(model, ids), wanted, rtol=1e-9, atol=1e-9)
        cache = DynamicCache()
        pieces = [drive(model, part, cache) for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:])]
        # transformers' eager attention takes its softmax in float32, which rounds other numbers of keys differently
        torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-4, atol=1e-5)
    if any(windows(model.config.to_dict())):
        assert (wanted - build(family, changes | {"sliding_window": 64})(ids).logits).abs().max() > 1e-3
