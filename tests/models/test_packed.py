"""Attention by document against attention to whole rows under a mask."""

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.loss import TokenLoss
from finetune.order.pack import Batch, Placed, collate
from finetune.recipe import LossSection
from jam.models.families import FAMILIES
from jam.models.load import Bundle, load_bundle
from jam.models.packed import DOCUMENTS, NO_MASK, Documents, document_attention
from tests.laws.test_data_laws import tokens_of
from tests.tiny import tiny_pair, tiny_parent
from tests.tiny_cross import tiny_cross

WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3_text")


def batch_of() -> Batch:
    rows = [[tokens_of(0), tokens_of(1, images=1)], [tokens_of(2, images=2)], [tokens_of(n) for n in (3, 4, 5)]]
    placed = [[Placed(tokens, 2 * place) for place, tokens in enumerate(row)] for row in rows]
    longest = max(sum(len(one.tokens) for one in row) for row in placed)
    return collate(placed, [0, 0, 1], longest + 3, pad=1)


def gradients(bundle: Bundle, batch: Batch, attention: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    bundle.model.set_attn_implementation(attention)
    bundle.model.train()
    bundle.model.zero_grad()
    nats = TokenLoss(bundle, LossSection())(batch)[0]
    (nats * batch.weights).sum().backward()
    return nats.detach(), {n: p.grad.clone() for n, p in bundle.model.named_parameters() if p.grad is not None}


def equal_under(bundle: Bundle, oracle: str) -> None:
    near = 1e-5 if oracle == "eager" else 1e-9  # eager takes its softmax in float32
    batch = batch_of()
    wanted, found = (gradients(bundle, batch, attention) for attention in (oracle, DOCUMENTS))
    assert (wanted[0] > 0).sum() > 50
    torch.testing.assert_close(found[0], wanted[0], rtol=near, atol=near)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=10 * near, atol=10 * near, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_the_same_as_under_a_mask(tmp_path: Path, family: str):
    more = {"sliding_window": 5} if family in WINDOWED else {}
    bundle = load_bundle(tiny_parent(tmp_path, True, 0, family, **more), torch.float64)
    equal_under(bundle, "eager" if family == "gemma2" else "sdpa")


@pytest.mark.parametrize("tables", ["separate", "shared"])
def test_two_towers_and_their_exchanges_learn_the_same(tmp_path: Path, tables: str):
    text, image = tiny_pair(tmp_path)
    equal_under(load_bundle(tiny_cross(tmp_path / "f", text, image, gate=0.5, tables=tables), torch.float64), "sdpa")


def test_scores_of_every_id_read_the_documents_too(tmp_path: Path):
    bundle, batch = load_bundle(tiny_parent(tmp_path, True, 0, "llama"), torch.float64), batch_of()
    wanted = TokenLoss(bundle, LossSection(softmax="joint"))(batch)
    bundle.model.set_attn_implementation(DOCUMENTS)
    torch.testing.assert_close(TokenLoss(bundle, LossSection(softmax="joint"))(batch), wanted)


def test_a_token_sees_its_own_document_alone(tmp_path: Path):
    """Exactly: nothing of another document moves a state, through self- and cross-attention."""
    text, image = tiny_pair(tmp_path)
    bundle = load_bundle(tiny_cross(tmp_path / "f", text, image, gate=0.5), torch.float64)
    bundle.model.set_attn_implementation(DOCUMENTS)
    batch = batch_of()
    documents = Documents.of(batch.owners)

    def states() -> torch.Tensor:
        found = bundle.model.states(batch.ids, NO_MASK, batch.positions, documents=documents)
        return torch.cat(found, -1)

    before, second = states(), batch.owners[0] == 1
    place = int(second.nonzero()[0, 0])
    batch.ids[0, place] = 7
    moved = (states() != before).any(-1)
    assert moved[0, place] and not moved[0, ~second].any() and not moved[1:].any()


def test_without_documents_it_is_transformers_attention(tmp_path: Path):
    for family, near in (("llama", 1e-9), ("gemma2", 1e-4)):  # whose scores SDPA cannot cap, and eager in float32
        bundle, ids = load_bundle(tiny_parent(tmp_path / family, True, 0, family), torch.float64), batch_of().ids
        wanted = bundle.model(ids).logits
        bundle.model.set_attn_implementation(DOCUMENTS)
        torch.testing.assert_close(bundle.model(ids).logits, wanted, rtol=0, atol=near)


def test_positions_are_laid_out_once_and_found_again():
    generator = np.random.default_rng(0)
    for _ in range(50):
        owners = np.sort(generator.integers(0, 9, (3, int(generator.integers(1, 80)))), 1)
        documents = Documents.of(torch.from_numpy(owners))
        at = documents.take[documents.real]
        assert sorted(at.tolist()) == list(range(owners.size))
        assert torch.equal(documents.take[documents.back], torch.arange(owners.size))
        assert sum(count * length for count, length in documents.groups) == len(documents.take)
        assert len(documents.take) <= owners.size * 8 / 7
        assert [length for _, length in documents.groups] == sorted({n for _, n in documents.groups}, reverse=True)


def test_bfloat16_on_a_cpu_stays_near_the_exact_result():
    """Short documents there have a way of their own."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 16, dtype=torch.float64) for heads in (4, 2, 2))
    owners = torch.tensor([[0] * 13 + [1] * 27, [0] * 25 + [1] * 14 + [-1]])
    documents = Documents.of(owners)
    wanted, _ = document_attention(torch.nn.Module(), q, k, v, None, documents=documents)
    half = (part.bfloat16() for part in (q, k, v))
    found, _ = document_attention(torch.nn.Module(), *half, None, documents=documents)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.03)
