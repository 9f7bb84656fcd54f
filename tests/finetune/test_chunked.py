"""The loss in chunks against the one whose scores stand whole, and z-loss against plain autograd."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import finetune.loss as loss_module
from finetune.chunked import chunked_nats, plain_nats
from finetune.loss import TokenLoss
from finetune.order.pack import Batch
from finetune.recipe import FinetuneRecipe, LossSection
from finetune.run import run_finetune
from jam.models.heads import allowed_ids
from jam.models.load import Bundle, load_bundle
from tests.finetune.test_loss import batch_of
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import final_weights, log_lines
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross

Z = 0.3
SLICES = [slice(2, 9), slice(20, 31)]


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize(("rows", "chunk"), [(11, 4), (8, 4), (3, 7), (0, 4)])
def test_chunks_are_plain_autograd_in_float64(cap, rows, chunk):
    torch.manual_seed(0)
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 6, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(18, (rows,)), torch.randn(2, rows, dtype=torch.float64)
    scores = torch.cat([x @ weight[part].T for part in SLICES], -1)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    found = []
    for nats, log_z in (plain_nats(scores, targets), chunked_nats(x, weight, SLICES, targets, cap, chunk)):
        loss = (nats * upstream[0]).sum() + Z * (log_z.square() * upstream[1]).sum()
        found.append([nats, log_z, *torch.autograd.grad(loss, [x, weight])])
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, rtol=0, atol=1e-9)
    if rows:
        expected = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
        assert_close(found[1][0], expected, rtol=0, atol=1e-9)
        assert_close(found[1][1], scores.exp().sum(-1).log(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, weight = torch.randn(5, 6, requires_grad=frozen != "x"), torch.randn(33, 6, requires_grad=frozen != "weight")
    chunked_nats(x, weight, SLICES, torch.zeros(5, dtype=torch.long), None, 2)[0].sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chunked")
    text, image = tiny_pair(root)
    capped = {"family": "gemma2", "final_logit_softcapping": 2.0}  # of logits near 2: it bends them
    gemma_text, gemma_image = tiny_pair(root / "gemma2", **capped)
    untied = tiny_pair(root / "untied", tie_word_embeddings=False)[1]
    return {
        "tied": image,
        "untied": untied,
        "capped": gemma_image,
        "separate": tiny_cross(root / "separate", text, image, gate=0.5),
        "shared": tiny_cross(root / "shared", text, image, gate=0.5, tables="shared"),
        "capped towers": tiny_cross(root / "capped", gemma_text, gemma_image, gate=0.5),
    }


def gradients(bundle: Bundle, loss: LossSection, batches: list[Batch], bf16: bool = False) -> dict[str, torch.Tensor]:
    """Found nats and squares, and every parameter's gradient, summed over micro-batches."""
    bundle.model.zero_grad()
    network, found = TokenLoss(bundle, loss), {}
    for number, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = network(batch)
        (out[0] + Z * out[1]).mul(batch.weights).sum().backward()
        found[f"nats {number}"] = out.detach()
    return found | {name: parameter.grad.clone() for name, parameter in bundle.model.named_parameters()}


NAMES = ["tied", "untied", "capped", "separate", "shared", "capped towers"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_head_learns_in_chunks_as_it_does_whole(folders, name):
    bundle, batches = load_bundle(folders[name], torch.float64), [batch_of().rows(0, 1), batch_of().rows(1, 2)]
    whole, parts = (gradients(bundle, LossSection(chunk=chunk, z=Z), batches) for chunk in (None, 7))
    assert whole["nats 0"].dtype == torch.float64 and (whole["nats 0"] > 0).sum() > 30
    assert whole.keys() == parts.keys()
    for key, tensor in whole.items():
        assert_close(parts[key], tensor, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_auto_takes_as_many_positions_as_make_so_many_scores(folders, monkeypatch):
    bundle, batch, asked = load_bundle(folders["tied"]), batch_of(), []

    def noted(*given):
        asked.append(given[-1])
        return chunked_nats(*given)

    monkeypatch.setattr(loss_module, "chunked_nats", noted)
    words, codes = (int(one.sum()) for one in allowed_ids(bundle.vocabulary))
    for scores in (7 * words, 3 * codes):  # of the first, all codes fit into one chunk; of the second, not one word
        monkeypatch.setattr(loss_module, "SCORES", scores)
        TokenLoss(bundle, LossSection())(batch)
    assert words > 3 * codes and asked == [7, 1, 3]
    monkeypatch.setattr(loss_module, "SCORES", 2**26)  # all of it in one: nothing is made twice
    TokenLoss(bundle, LossSection())(batch)
    assert len(asked) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_head_without_rows_gets_zeros(folders, name):
    bundle, batch = load_bundle(folders[name], torch.float64), batch_of()
    words = dataclasses.replace(batch, labels=batch.labels.masked_fill(batch.head_ids == 1, -1))
    whole, parts = (gradients(bundle, LossSection(chunk=chunk, z=Z), [words]) for chunk in (None, 7))
    for key, tensor in whole.items():  # every parameter has a gradient, or gradients() would have failed
        assert_close(parts[key], tensor, rtol=0, atol=1e-9)
    if "image.lm_head.weight" in parts:
        assert not parts["image.lm_head.weight"].any() and parts["text.lm_head.weight"].any()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_differs_by_its_rounding_alone(folders, name):
    bundle, batches = load_bundle(folders[name]), [batch_of()]
    exact = gradients(bundle, LossSection(chunk=None, z=Z), batches)
    whole, parts = (gradients(bundle, LossSection(chunk=chunk, z=Z), batches, bf16=True) for chunk in (None, 7))
    for key, tensor in exact.items():
        norm = tensor.norm() + 1e-6
        off = [float((other[key].float() - tensor).norm() / norm) for other in (whole, parts)]
        assert off[1] <= 1.5 * off[0] + 5e-3, (key, off)  # no worse than the plain one
        assert off[1] < 0.3, (key, off)


def test_z_loss_is_logged_apart_and_moves_the_weights(tmp_path):
    tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    runs = {}
    for z in (0.0, 0.5):
        raw["loss"]["z"], raw["output_dir"] = z, str(tmp_path / f"z{z}")
        runs[z] = run_finetune(FinetuneRecipe.model_validate(raw))
    plain, held = (log_lines(run.parent)[-1] for run in runs.values())
    assert "loss/z" not in plain and held["loss/z"] > 0
    assert held["loss"] == pytest.approx(plain["loss"], rel=0.1)  # without the term, which is larger
    assert held["loss/z"] > 0.5 * held["loss"]
    weights = [final_weights(run) for run in runs.values()]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_z_loss_under_one_softmax_is_that_of_its_own_normaliser(folders):
    bundle, batch = load_bundle(folders["tied"], torch.float64), batch_of()
    found = TokenLoss(bundle, LossSection(softmax="joint", z=1e-5))(batch)
    inputs = {"attention_mask": batch.mask, "position_ids": batch.positions}
    logits, _ = bundle.logits(batch.ids, batch.head_ids, softmax="joint", **inputs)
    expected = logits.logsumexp(-1).square() * (batch.learnt().labels >= 0)
    assert_close(found[1], expected, rtol=0, atol=1e-9)
