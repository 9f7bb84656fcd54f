"""Scores of a head's own ids are those of the whole head, forward and backward."""

import pytest
import torch
from torch import Tensor, nn

from jam.models.span_head import SpanHead, owned_slices, span_scores
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import Span, Vocabulary

SLICES = [slice(2, 5), slice(7, 8), slice(9, 13)]
OWN = [row for part in SLICES for row in range(part.start, part.stop)]


def test_owned_slices_join_neighbours() -> None:
    spans = (Span("text", 0, 3), Span("control", 3, 5), Span("image", 5, 9), Span("control", 9, 10))
    vocabulary = Vocabulary(spans, {"bos": 3})
    assert owned_slices(vocabulary, TEXT_HEAD) == [slice(0, 5), slice(9, 10)]
    assert owned_slices(vocabulary, IMAGE_HEAD) == [slice(3, 10)]


def parameters(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, 6, generator=generator, requires_grad=True)
    return x, torch.randn(13, 6, generator=generator, requires_grad=True)


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("rows", (3, 0))
def test_scores_and_gradients_are_the_whole_heads(rows: int, autocast: bool) -> None:
    results = []
    for narrow in (True, False):
        x, weight = parameters(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = span_scores(x, weight, SLICES) if narrow else nn.functional.linear(x, weight)[..., OWN]
        scores.float().square().sum().backward()
        results.append((scores, x.grad, weight.grad))
    (ours, *grads), (whole, *expected) = results
    assert ours.dtype == whole.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert ours.shape == (rows, 2, len(OWN))
    torch.testing.assert_close(ours, whole)
    tolerance = 2e-2 if autocast else 1e-6  # bfloat16 sums in another order
    for found, wanted in zip(grads, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_a_frozen_head_passes_the_gradient_on() -> None:
    x, weight = parameters(3)
    span_scores(x, weight.requires_grad_(False), SLICES).sum().backward()
    torch.testing.assert_close(x.grad, weight[OWN].sum(0).expand_as(x))


def test_one_row_without_a_batch() -> None:
    weight = parameters(3)[1]
    x = torch.ones(6, requires_grad=True)
    span_scores(x, weight, SLICES).sum().backward()
    torch.testing.assert_close(x.grad, weight[OWN].sum(0))


def test_types_that_do_not_agree_are_refused_as_elsewhere() -> None:
    x, weight = parameters(3)
    with pytest.raises(RuntimeError, match="same dtype"):
        span_scores(x, weight.bfloat16().detach().requires_grad_(), SLICES)


def test_numeric_gradient() -> None:
    x, weight = (tensor.detach().double().requires_grad_() for tensor in parameters(2))
    assert torch.autograd.gradcheck(lambda *given: span_scores(*given, SLICES), (x, weight))


def test_compiled_scores_are_the_same() -> None:
    head = SpanHead(6, 13, bias=False)
    x = parameters(3)[0].detach()
    compiled = torch.compile(lambda given: head(given, SLICES), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), head(x, SLICES))
