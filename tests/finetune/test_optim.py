"""The schedule, the parameter groups and the choice of optimizer."""

import pytest
import torch

from finetune.optim import MuonWithAdamW, build_optimizer, learning_rate
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


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    network = torch.nn.ModuleDict({"embed": torch.nn.Embedding(7, 4), "inner": torch.nn.Linear(4, 6)})
    network["lm_head"] = torch.nn.Linear(6, 7, bias=False)
    return network


def test_muon_takes_the_inner_matrices_and_leaves_tables_heads_and_vectors_to_adamw():
    network = small_network()
    optimizer = build_optimizer(network, OptimSection(name="muon", weight_decay=0.2))
    by_part = {
        part: [p for g in optimizer.param_groups if g["part"] == part for p in g["params"]]
        for part in ("muon", "adamw")
    }
    assert by_part["muon"] == [network["inner"].weight]
    assert {id(p) for p in by_part["adamw"]} == {
        id(p) for p in (network["embed"].weight, network["inner"].bias, network["lm_head"].weight)
    }
    assert [g["weight_decay"] for g in optimizer.param_groups if g["part"] == "muon"] == [0.2]


def test_without_a_matrix_muon_is_plain_adamw():
    assert type(build_optimizer(torch.nn.Embedding(3, 2), OptimSection(name="muon"))) is torch.optim.AdamW


def test_muon_with_adamw_steps_as_the_two_apart_and_survives_its_own_state_dict():
    """The pair shares one state: equal to torch's two optimizers run side by side, before and after a reload."""

    def gradients(network: torch.nn.Module, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    ours, apart = small_network(), small_network()
    section = OptimSection(name="muon", lr=0.01, weight_decay=0.0)
    optimizer = build_optimizer(ours, section)
    muon = torch.optim.Muon([apart["inner"].weight], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in apart.parameters() if p is not apart["inner"].weight]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, betas=section.betas, eps=section.eps)
    for step in range(4):
        if step == 2:
            saved = optimizer.state_dict()
            optimizer = build_optimizer(ours, section)
            optimizer.load_state_dict(saved)
            assert isinstance(optimizer, MuonWithAdamW)
        gradients(ours, step)
        gradients(apart, step)
        optimizer.step()
        muon.step()
        adamw.step()
        for one, other in zip(ours.parameters(), apart.parameters(), strict=True):
            assert torch.equal(one, other)


def test_only_the_chosen_rows_of_a_table_learn():
    network = small_network()
    groups = ({"match": "embed", "lr_mul": 1.0, "rows": [[1, 3], [6, 7]]},)
    optimizer = build_optimizer(network, OptimSection(name="muon", weight_decay=0.5, lr=0.1, groups=groups))
    before = network["embed"].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        network["lm_head"](network["inner"](network["embed"](torch.arange(7)))).square().sum().backward()
        optimizer.step()
    changed = (network["embed"].weight != before).any(1)
    assert changed.tolist() == [False, True, True, False, False, False, True]


@pytest.mark.parametrize(("match", "rows"), [("inner.weight", [[0, 2]]), ("embed", [[0, 8]])])
def test_rows_are_of_a_table_and_inside_it(match: str, rows: list):
    groups = ({"match": match, "lr_mul": 1.0, "rows": rows},)
    with pytest.raises(RunError, match="name rows of a table or a head"):
        build_optimizer(small_network(), OptimSection(groups=groups))
