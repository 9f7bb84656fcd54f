"""The schedule and the parameter groups."""

import pytest
import torch

from finetune.loop import build_optimizer, learning_rate
from finetune.recipe import OptimSection
from jam.errors import RunError


def test_the_schedule_warms_up_peaks_and_ends_where_it_should():
    optim = OptimSection(lr=1.0, warmup=10, schedule="cosine", final_lr_ratio=0.1)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert max(rates) == rates[9] == pytest.approx(rates[10]) and rates[-1] == pytest.approx(0.1, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    share = OptimSection(lr=1.0, warmup=0.1, schedule="linear", final_lr_ratio=0.0)
    assert learning_rate(share, 9, 100) == 1.0 and learning_rate(share, 55, 100) == pytest.approx(0.5)


def test_groups_scale_freeze_and_spare_vectors_from_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False))
    optim = OptimSection(
        weight_decay=0.2, groups=({"match": r"^0\.weight", "lr_mul": 5.0}, {"match": "^1", "lr_mul": 0})
    )
    groups = build_optimizer(model, optim).param_groups
    assert {(g["factor"], g["weight_decay"], len(g["params"])) for g in groups} == {(5.0, 0.2, 1), (1.0, 0.0, 1)}
    assert not model[1].weight.requires_grad
    with pytest.raises(RunError, match="freeze every parameter"):
        build_optimizer(model, OptimSection(groups=({"match": ".", "lr_mul": 0},)))
