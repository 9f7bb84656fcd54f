"""Sampling on vocabularies of four: what stays, what is drawn how often, what is refused."""

import math

import pytest
import torch

from jam.decode import sampling
from jam.errors import GenerationError

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
INF = math.inf


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero().flatten().tolist()


def draws(logits: torch.Tensor, count: int = 20_000) -> torch.Tensor:
    """Relative frequencies under the generator that the decoder uses, one row and many positions."""
    uniforms = torch.tensor([sampling.uniform(3, 1, position) for position in range(count)], dtype=torch.float64)
    ids = sampling.sample(logits.expand(count, -1), uniforms)
    return torch.bincount(ids, minlength=logits.shape[-1]) / count


@pytest.mark.parametrize(("p", "ids"), [(0.4, [0]), (0.5, [0]), (0.51, [0, 1]), (0.79, [0, 1]), (0.96, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_ids_that_reach_p(p: float, ids: list[int]) -> None:
    assert kept(sampling.top_p(LOGITS, p)) == ids


def test_top_p_never_removes_everything() -> None:
    assert kept(sampling.top_p(LOGITS, 1e-9)) == [0]


@pytest.mark.parametrize(
    ("k", "ids"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3]), (None, [0, 1, 2, 3])]
)
def test_top_k(k: int | None, ids: list[int]) -> None:
    assert kept(sampling.top_k(LOGITS, k)) == ids


def test_rows_are_shaped_apart() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    assert [kept(row) for row in sampling.top_p(rows, 0.6)] == [[0, 1], [2, 3]]
    assert [kept(row) for row in sampling.top_k(rows, 1)] == [[0], [3]]


def test_no_ops_are_exact() -> None:
    """top-p 1, top-k off, temperature 1 and guidance 1 return the same bits, also where a running sum would round."""
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(0))
    other = torch.randn_like(logits)
    for same in (
        sampling.top_p(logits, 1.0),
        sampling.top_k(logits, None),
        sampling.temperature(logits, 1.0),
        sampling.cfg(logits, other, 1.0),
    ):
        assert torch.equal(same, logits)
    assert torch.equal(sampling.cfg(logits, other, 0.0), other)


def test_temperature_zero_is_argmax_for_any_uniform() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0]).expand(5, 4)
    uniforms = torch.tensor([0.0, 0.3, 0.5, 0.7, 1 - 2**-24])
    assert sampling.sample(sampling.temperature(logits, 0.0), uniforms).tolist() == [1] * 5  # the first of equals


def test_masked_ids_are_never_drawn_at_either_end() -> None:
    logits = torch.tensor([-INF, 0.0, -INF, 0.0, -INF]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sampling.sample(logits, uniforms).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("total", [1 / 3, 0.7, 1.1, 1e-300, 1e300])
def test_the_largest_uniform_stays_inside(total: float) -> None:
    """u * total may round up to the total, one past the last id; the last possible id is drawn instead."""
    logits = torch.tensor([0.1, 0.2, 0.3, -INF]) * total
    logits[3] = -INF
    assert sampling.sample(logits[None], torch.tensor([math.nextafter(1, 0)], dtype=torch.float64)).item() <= 2


def test_frequencies_follow_the_probabilities() -> None:
    """20,000 draws: a standard error is at most 0.0036; the bound is four of them."""
    assert torch.allclose(draws(LOGITS), LOGITS.exp().float(), atol=0.0145)


def test_temperature_flattens_as_a_power() -> None:
    expected = LOGITS.exp() ** 0.5
    assert torch.allclose(draws(sampling.temperature(LOGITS, 2.0)), (expected / expected.sum()).float(), atol=0.0145)


def test_cd_k_with_alpha_zero_samples_the_ratio() -> None:
    expert, amateur = torch.softmax(LOGITS, -1), torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64)
    expected = (expert / amateur) / (expert / amateur).sum()
    assert torch.allclose(torch.softmax(sampling.cd_k(expert, amateur, 0.0, 1), -1), expected, atol=1e-12)
    assert torch.allclose(draws(sampling.cd_k(expert, amateur, 0.0, 1)), expected.float(), atol=0.0145)


def test_cd_k_with_a_uniform_amateur_is_conditional_sampling() -> None:
    expert = torch.softmax(LOGITS, -1)
    scores = sampling.cd_k(expert, torch.full_like(expert, 0.25), 0.0, 3)
    assert torch.allclose(torch.softmax(scores, -1), expert, atol=1e-12)


def test_cd_k_with_k_one_is_contrastive_decoding() -> None:
    """Ids at or above alpha times the best: 0.5 and 0.3 of the threshold 0.25; k = 3 lowers it to 0.075."""
    expert, amateur = torch.softmax(LOGITS, -1), torch.full_like(LOGITS, 0.25)
    assert kept(sampling.cd_k(expert, amateur, 0.5, 1)) == [0, 1]
    assert kept(sampling.cd_k(expert, amateur, 0.5, 3)) == [0, 1, 2]


def test_cd_k_gives_no_score_to_what_the_expert_excludes() -> None:
    expert, amateur = torch.tensor([0.7, 0.3, 0.0]), torch.tensor([0.5, 0.0, 0.5])
    scores = sampling.cd_k(expert, amateur, 0.0, 1)
    assert kept(scores) == [0, 1] and not scores.isnan().any()


def test_guidance_survives_masked_logits() -> None:
    """Models mask with the lowest finite number; the blend of two such rows is still finite where it counts."""
    low = torch.finfo(torch.float32).min
    blended = sampling.cfg(torch.tensor([1.0, low]), torch.tensor([0.0, low]), 3.0)
    assert blended[0] == 3.0 and not blended.isnan().any()


def test_uniforms_depend_on_seed_row_and_position_alone() -> None:
    keys = [(s, r, p) for s in (0, 1, 2**63 - 1) for r in (0, 1, 7) for p in (0, 1, 2, 1000)]
    values = [sampling.uniform(*key) for key in keys]
    assert len(set(values)) == len(keys)
    assert values == [sampling.uniform(*key) for key in keys]
    assert all(0 <= value < 1 for value in values)


def test_uniforms_of_neighbouring_rows_are_uncorrelated() -> None:
    rows = torch.tensor([[sampling.uniform(0, row, position) for position in range(2000)] for row in range(4)])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 0.09  # four standard errors of 2,000 pairs
    assert (rows.mean(1) - 0.5).abs().max() < 0.026


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sampling.temperature(LOGITS, -0.1), ["temperature is -0.1", "at least 0"]),
        (lambda: sampling.temperature(LOGITS, math.nan), ["temperature is nan"]),
        (lambda: sampling.top_p(LOGITS, 0.0), ["top_p is 0.0", "above 0 and at most 1"]),
        (lambda: sampling.top_p(LOGITS, 1.2), ["top_p is 1.2"]),
        (lambda: sampling.top_k(LOGITS, 0), ["top_k is 0", "at least 1"]),
        (lambda: sampling.cfg(LOGITS, LOGITS, INF), ["guidance_scale is inf"]),
        (lambda: sampling.cd_k(LOGITS.exp(), LOGITS.exp(), 1.5, 1), ["alpha is 1.5", "[0, 1]"]),
        (lambda: sampling.cd_k(LOGITS.exp(), LOGITS.exp(), 0.5, 5), ["k is 5", "from 1 to 4"]),
        (lambda: sampling.uniform(-1, 0, 0), ["seed is -1"]),
    ],
)
def test_bad_values_are_refused_with_the_number(call, words: list[str]) -> None:
    with pytest.raises(GenerationError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


def test_beams_wide_enough_find_the_likeliest_sequence() -> None:
    """A chain over three ids: four steps of search against all 81 sequences."""
    chain = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1) * 3
    chain = chain.log_softmax(-1)
    everything = torch.cartesian_prod(*[torch.arange(3)] * 4)
    first = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    totals = first[everything[:, 0]] + sum(chain[everything[:, n], everything[:, n + 1]] for n in range(3))
    for width in (27, 100):
        scores, ids = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.int64)
        for step in range(4):
            logits = first[None] if step == 0 else chain[ids[:, -1]]
            scores, beams, new = sampling.extend_beams(scores, logits, width if step < 3 else 1)
            ids = torch.cat([ids[beams], new[:, None]], dim=1)
        assert ids.tolist() == [everything[totals.argmax()].tolist()]
        torch.testing.assert_close(scores[0], totals.max())
