"""The narrow loss against the scores of every id."""

from pathlib import Path

import pytest
import torch

from finetune.loss import TokenLoss, cross_entropy
from finetune.order.pack import Batch, Placed, collate
from finetune.recipe import LossSection
from jam.errors import RunError
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import IMAGE_HEAD
from tests.laws.test_data_laws import tokens_of
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loss")
    text, image = tiny_pair(root)
    fused = {
        tables: tiny_cross(root / tables, text, image, gate=0.5, tables=tables) for tables in ("separate", "shared")
    }
    return {"image": image, **fused}


def batch_of() -> Batch:
    placed = [[Placed(tokens_of(seed), 3 * seed), Placed(tokens_of(seed + 1, images=1), 5)] for seed in (0, 3)]
    batch = collate(placed, [0, 0], max(sum(len(p.tokens) for p in row) for row in placed) + 2, pad=1)
    batch.weights[0, 4:20] = 0.0  # a user's turn
    return batch


def wide(bundle: Bundle, batch: Batch, softmax: str) -> torch.Tensor:
    inputs = {"attention_mask": batch.mask, "position_ids": batch.positions}
    return cross_entropy(bundle.logits(batch.ids, batch.head_ids, softmax=softmax, **inputs)[0], batch.learnt())


@pytest.mark.parametrize("name", ["image", "separate", "shared"])
@pytest.mark.parametrize("softmax", ["restricted", "joint"])
def test_the_narrow_loss_and_its_gradients_are_those_of_the_wide_one(folders, name, softmax):
    bundle, batch = load_bundle(folders[name], torch.float64), batch_of()
    if (name, softmax) == ("separate", "joint"):
        with pytest.raises(RunError, match="two heads"):
            TokenLoss(bundle, LossSection(softmax=softmax))
        return
    network = TokenLoss(bundle, LossSection(softmax=softmax))
    assert network.narrow == (softmax == "restricted")
    found, gradients = [], []
    for nats in (network(batch)[0], wide(bundle, batch, softmax)):
        bundle.model.zero_grad()
        (nats * batch.weights).sum().backward()
        found.append(nats.detach())
        gradients.append({n: p.grad.clone() for n, p in bundle.model.named_parameters() if p.grad is not None})
    assert (found[0] > 0).sum() > 50 and (found[0][batch.weights == 0] == 0).all()
    torch.testing.assert_close(found[0].double(), found[1].double(), rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys() == {n for n, _ in bundle.model.named_parameters()}
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], rtol=1e-4, atol=1e-6)


def test_a_head_that_is_no_plain_matrix_is_scored_whole(folders):
    bundle, batch = load_bundle(folders["image"], torch.float64), batch_of()
    head = bundle.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(head.out_features, dtype=torch.float64))
    network = TokenLoss(bundle, LossSection())
    assert not network.narrow
    torch.testing.assert_close(network(batch)[0], wide(bundle, batch, "restricted"))


def test_a_token_of_the_other_head_is_an_error_and_no_silent_zero(folders):
    network, batch = TokenLoss(load_bundle(folders["image"]), LossSection()), batch_of()
    batch.head_ids.copy_(1 - batch.head_ids)
    with pytest.raises(IndexError, match="out of bounds"):
        network(batch)


def test_own_codes_change_what_is_read_and_never_what_is_learnt(folders, monkeypatch):
    network, batch = TokenLoss(load_bundle(folders["image"]), LossSection(), own_codes=1.0), batch_of().learnt()
    span = network.bundle.vocabulary.image_span
    code = span.start + 3
    at = int(network.local[IMAGE_HEAD, code])
    one_hot = lambda kind, states: torch.nn.functional.one_hot(torch.full((len(states[0]),), at), 99).float() * 1e4  # noqa: E731
    monkeypatch.setattr(network, "_head", one_hot)
    torch.manual_seed(0)
    read = network.with_own_codes(batch)
    changed = read.ids != batch.ids
    learnt_code = torch.zeros_like(changed)
    learnt_code[:, 1:] = (batch.labels[:, :-1] >= span.start) & (batch.labels[:, :-1] < span.stop)
    assert changed.any() and (read.ids[changed] == code).all() and learnt_code[changed].all()
    assert torch.equal(read.labels, batch.labels) and torch.equal(read.weights, batch.weights)
    torch.manual_seed(0)
    assert torch.equal(network.with_own_codes(batch).ids, read.ids)


def test_own_codes_are_drawn_in_training_alone_and_need_a_narrow_loss(folders):
    bundle, batch = load_bundle(folders["separate"]), batch_of()
    network = TokenLoss(bundle, LossSection(), own_codes=1.0)
    plain = TokenLoss(bundle, LossSection())(batch)
    assert torch.equal(network.eval()(batch), plain)
    assert not torch.equal(network.train()(batch), plain)
    with pytest.raises(RunError, match="own_codes"):
        TokenLoss(load_bundle(folders["shared"]), LossSection(softmax="joint"), own_codes=0.5)


@pytest.mark.parametrize("name", ["image", "separate"])
def test_every_parameter_learns_after_the_first_pass_of_own_codes(folders, name):
    bundle = load_bundle(folders[name], torch.float32)
    network = TokenLoss(bundle, LossSection(), own_codes=1.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        network(batch_of())[0].sum().backward()
    gradients = {n: p.grad for n, p in bundle.model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(g.any() for n, g in gradients.items() if n.endswith(("fc1.weight", "fc2.weight")))
