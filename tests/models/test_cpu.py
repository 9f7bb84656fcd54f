"""A packed network scores as the dense one, and only runs."""

from pathlib import Path

import pytest
import torch

from jam.decode.engine import generate
from jam.decode.options import SamplingOptions
from jam.document import Document, TextPart
from jam.models.cpu import WIDE, Rows, is_packed, pack, wide_attention
from jam.models.load import Bundle, load_bundle
from tests.decode.bundles import cross_bundle, plain_bundle
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross

PROMPTS = [Document((TextPart("draw a cat", "user"),)), Document((TextPart("on the"),))]


def forced_scores(bundle: Bundle, steps: int = 6) -> torch.Tensor:
    """Scores of text and codes along fixed tokens, prefill and steps of both streams."""
    from jam.decode.slots import Fed, Slots

    slots = Slots(bundle, [[0, 6, 70, 80], [0, 90]], steps, [0, 3])
    slots.prefill()
    found = [slots.text_scores([0, 1]).flatten()]
    flags = {flag: torch.tensor([flag, flag]) for flag in (True, False)}
    for step in range(steps):
        token = 5 if step == 0 else bundle.vocabulary.image_span.start + step
        slots.feed(torch.tensor([token, token]), Fed(flags[step == 0], flags[step > 0], flags[False]))
        scores = slots.code_scores([0, 1])
        found += [scores.full.flatten(), scores.nothing.flatten(), slots.text_scores([0, 1]).flatten()]
    return torch.cat(found).double()


@pytest.mark.parametrize("make", [plain_bundle, cross_bundle])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_packed_scores_are_the_dense_ones(tmp_path: Path, make, dtype: torch.dtype, tolerance: float) -> None:
    bundle = make(tmp_path, dtype=dtype)
    dense = forced_scores(bundle)
    # in float64, so that the distance of both from the truth can be told
    truth = forced_scores(make(tmp_path / "again", dtype=torch.float64))
    if not bundle.pack():
        pytest.skip(f"this CPU packs no {dtype}")
    packed = forced_scores(bundle)
    seen = truth > torch.finfo(dtype).min / 2
    largest = truth[seen].abs().max()
    assert (packed - dense)[seen].abs().max() <= tolerance * largest
    assert (packed - truth)[seen].abs().max() <= 1.5 * (dense - truth)[seen].abs().max() + 1e-6 * largest


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "olmo2", "chameleon"])
def test_a_packed_family_says_the_same(tmp_path: Path, family: str) -> None:
    bundle = plain_bundle(tmp_path, torch.float32, family=family)
    options = SamplingOptions(max_tokens=30, min_images=1, text_temperature=0.0, image_temperature=0.0)
    dense = list(generate(bundle, PROMPTS, options))
    before = bundle.model.config._attn_implementation
    assert bundle.pack() and is_packed(bundle.model)
    assert list(generate(bundle, PROMPTS, options)) == dense
    assert bundle.model.config._attn_implementation == (before if before == "eager" else WIDE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("families", [("gemma2", "opt"), ("llama", "gemma2")])
def test_a_tower_keeps_the_attention_that_it_needs(tmp_path: Path, families: tuple[str, str], dtype) -> None:
    """Gemma2's is eager, which is not widened: its keys stay in its own type, in a network of their own too."""
    text, image = tiny_pair(tmp_path, text_family=families[0], image_family=families[1])
    bundle = load_bundle(tiny_cross(tmp_path / "fused", text, image, gate=0.5), dtype)
    ways = [tower.config._attn_implementation for tower in (bundle.model.text, bundle.model.image)]
    assert sorted(ways) == ["eager", "sdpa"]
    options = SamplingOptions(max_tokens=30, min_images=1, text_temperature=0.0, image_temperature=0.0)
    dense = list(generate(bundle, PROMPTS, options))
    if not bundle.pack():
        pytest.skip(f"this CPU packs no {dtype}")
    found = [tower.config._attn_implementation for tower in (bundle.model.text, bundle.model.image)]
    assert found == [WIDE if way == "sdpa" else "eager" for way in ways]
    packed = list(generate(bundle, PROMPTS, options))
    assert dtype == torch.bfloat16 or packed == dense


def test_an_eager_network_of_half_precision_is_packed_too(tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path, torch.bfloat16, family="gemma2")
    if not bundle.pack():
        pytest.skip("this CPU packs no bfloat16")
    assert list(generate(bundle, PROMPTS, SamplingOptions(max_tokens=20, min_images=1)))


def test_the_dense_weights_are_let_go(tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path, torch.float32, family="llama")
    assert bundle.pack()
    kept = {name for name, weight in bundle.model.named_parameters() if weight.ndim == 2 and weight.numel()}
    assert kept == {"model.embed_tokens.weight"}  # and the head that is tied to it


def test_what_cannot_be_packed_stays_as_it_is(tmp_path: Path) -> None:
    bundle = plain_bundle(tmp_path, torch.float64, family="llama")
    before = forced_scores(bundle)
    assert not bundle.pack() and not is_packed(bundle.model)
    assert torch.equal(forced_scores(bundle), before)
    assert not pack(torch.nn.ReLU())


def test_rows_are_a_slice_of_the_map() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=draw) for shape in ((40, 24), (40,), (3, 5, 24)))
    whole = torch.nn.functional.linear(x, weight, bias)
    for packed in (False, True):
        found = Rows(weight[7:19], bias[7:19], packed)(x)
        assert torch.allclose(found, whole[..., 7:19], atol=1e-5)


def test_wide_attention_is_attention() -> None:
    draw = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    query, key, value = (torch.randn(2, heads, 3, 8, generator=draw) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    truth = wide_attention(module, query.double(), key.double(), value.double(), mask)[0]
    half = wide_attention(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)[0]
    assert truth.dtype == torch.float64 and half.dtype == torch.bfloat16
    assert (half.double() - truth).abs().max() < 0.05
