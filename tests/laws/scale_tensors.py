"""What the ranks of tests/laws/test_scale_tensors.py do: networks whose matrices are shared out score as whole ones."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from finetune.scale.engines import start_processes
from jam.errors import CheckpointError
from jam.models.cross import JamCrossForCausalLM
from jam.models.load import load_bundle
from tests.finetune.test_loss import batch_of


def scores(folders: str) -> None:
    """Args: folders: a JSON map of model folders to the least share of their numbers that is shared out."""
    start_processes()
    batch = batch_of()
    given = {"attention_mask": batch.mask, "position_ids": batch.positions}
    for folder, least in json.loads(folders).items():
        whole, shared = (load_bundle(Path(folder), torch.float64, tp_plan=plan) for plan in (None, "auto"))
        parameters = list(shared.model.parameters())
        own = sum(p.numel() for p in parameters if isinstance(p, DTensor))
        assert own > least * sum(p.numel() for p in parameters), folder
        with torch.no_grad():
            found, expected = (one.logits(batch.ids, batch.head_ids, **given)[0] for one in (shared, whole))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if isinstance(shared.model, JamCrossForCausalLM):
        with pytest.warns(FutureWarning):  # transformers' older way to ask
            again = JamCrossForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto")
        with torch.no_grad():
            torch.testing.assert_close(again(batch.ids).logits, whole.model(batch.ids).logits, rtol=1e-9, atol=1e-9)


def refused(folder: str) -> None:
    start_processes()
    with pytest.raises(CheckpointError, match="2 key-value heads over 4 processes"):
        load_bundle(Path(folder), tp_plan="auto")
