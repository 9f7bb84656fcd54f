"""Laws of the networks (docs/decisions.md): what a fresh fusion preserves, causality, packing, caches, padding.

Everything runs in float64 on tiny models whose cross blocks do something (non-zero gates), except where the law is
about zero gates. Equalities are to 1e-9; causality is exact.
"""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

from jam.models.cross import JamCrossForCausalLM
from jam.models.heads import next_heads
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD, render
from tests.tiny import tiny_document, tiny_pair
from tests.tiny_cross import tiny_cross

EXACT = {"rtol": 0, "atol": 0}
NUMERIC = {"rtol": 1e-9, "atol": 1e-9}
# transformers computes Llama's norms, and the softmax of eager attention, in float32 whatever the model's dtype
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}
PAIRS = {
    "opt": {},
    "llama": {"family": "llama"},
    "unequal": {
        "text_family": "llama",
        "text_num_hidden_layers": 5,
        "image_hidden_size": 48,
        "image_num_hidden_layers": 3,
    },  # layers are left over after the last exchange
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {name: tiny_pair(tmp_path_factory.mktemp(name), **changes) for name, changes in PAIRS.items()}


@pytest.fixture(scope="module")
def gated(folders: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Fused models with open gates, and the image parent alone as the plain single-table model."""
    root = tmp_path_factory.mktemp("gated")
    bundles = {
        name: load_bundle(tiny_cross(root / name, *pair, gate=0.5), torch.float64) for name, pair in folders.items()
    }
    return bundles | {"plain": load_bundle(folders["opt"][1], torch.float64)}


def using(bundle: Bundle, attention: str) -> Bundle:
    bundle.model.set_attn_implementation(attention)
    return bundle


def ids_of(bundle: Bundle, seed: int = 0, images: int = 1) -> torch.Tensor:
    tokens = render(tiny_document(seed, images), bundle.vocabulary, bundle.text)
    return torch.from_numpy(tokens.ids).long()[None]


@torch.no_grad()
def scores(bundle: Bundle, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return bundle.logits(ids, next_heads(ids, bundle.vocabulary), **kwargs)[0]


# ---------------------------------------------------------------- step 0: zero gates


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_zero_gates_keep_both_parents(folders: dict, tmp_path: Path, name: str) -> None:
    text, image = folders[name]
    fused = load_bundle(tiny_cross(tmp_path / "fused", text, image), torch.float64)
    llm, painter = load_bundle(text, torch.float64), load_bundle(image, torch.float64)

    words = torch.tensor([[0, *fused.text.encode("the cat and the other one on it"), 2]])
    own = llm.vocabulary.size
    kept = scores(fused, words)[..., :own]
    torch.testing.assert_close(kept, llm.model(words).logits, **NUMERIC)  # (a)
    assert kept.std() > 0.5, "logits of no spread would agree with anything"

    span = fused.vocabulary.image_span
    bare = torch.tensor([[0, 3, 5, *range(span.start, span.start + 4), 5, 2]])
    for ids in (bare, ids_of(fused, images=2)):  # (b) image and control ids, (c) caption and image
        heads = next_heads(ids, fused.vocabulary)
        expected = painter.logits(ids, heads)[0]
        at = heads == IMAGE_HEAD
        assert at.sum() >= 5
        torch.testing.assert_close(scores(fused, ids)[at], expected[at], **NUMERIC)


@torch.no_grad()
def test_open_gates_change_both_heads(folders: dict, gated: dict, tmp_path: Path) -> None:
    closed = load_bundle(tiny_cross(tmp_path / "fused", *folders["opt"]), torch.float64)
    ids = ids_of(closed)
    heads = next_heads(ids, closed.vocabulary)
    moved = (scores(closed, ids) - scores(gated["opt"], ids)).abs().amax(-1)
    assert moved[heads == TEXT_HEAD].min() > 1e-3
    assert moved[heads == IMAGE_HEAD].min() > 1e-3


def test_gates_learn_at_step_zero_and_the_rest_after_it(folders: dict, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_cross(tmp_path / "fused", *folders["opt"]), torch.float64)
    model: JamCrossForCausalLM = bundle.model
    ids = ids_of(bundle)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name.startswith("cross.")}
    gates = {name for name in parameters if name.endswith("gate")}
    assert len(gates) == 2 * len(model.cross) > 2

    model(ids, labels=ids).loss.backward()
    for name, parameter in parameters.items():
        assert parameter.grad.abs().max() > 0 if name in gates else not parameter.grad.any(), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in parameters.items():
        assert parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------- causality, packing


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_no_position_sees_the_next(gated: dict, name: str) -> None:
    bundle = gated[name]
    ids = ids_of(bundle)
    heads = next_heads(ids, bundle.vocabulary)
    before = bundle.logits(ids, heads)[0]
    for at in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, at] = 40 + at
        after = bundle.logits(changed, heads)[0]
        torch.testing.assert_close(after[:, :at], before[:, :at], **EXACT)
        assert (after[:, at] - before[:, at]).abs().max() > 1e-3


@torch.no_grad()
def test_every_cross_block_takes_part(gated: dict) -> None:
    """Else causality and packing of a dead block would be proven."""
    bundle = gated["opt"]
    ids = ids_of(bundle)
    before = scores(bundle, ids)
    for exchange in bundle.model.cross:
        for block in (exchange.text, exchange.image):
            kept = block.gate.clone()
            block.gate.zero_()
            assert (scores(bundle, ids) - before).abs().max() > 1e-3
            block.gate.copy_(kept)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*PAIRS, "plain"])
@torch.no_grad()
def test_packed_documents_equal_separate_ones(gated: dict, name: str, attention: str) -> None:
    bundle = using(gated[name], attention)
    tolerance = NUMERIC if attention == "sdpa" and name in ("opt", "plain") else ROUNDED
    documents = [ids_of(bundle, seed, images) for seed, images in ((1, 1), (2, 0), (3, 2))]
    offsets = (0, 17, 100)  # learned positions need not start at 0
    lengths = [ids.shape[1] for ids in documents]
    packed = torch.cat(documents, 1)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) + offset for n, offset in zip(lengths, offsets, strict=True)])[None]
    mask = (owner[:, None] == owner[None]).tril()[None, None]
    together = scores(bundle, packed, attention_mask=mask, position_ids=positions)
    for ids, part, offset in zip(documents, together.split(lengths, 1), offsets, strict=True):
        alone = scores(bundle, ids, position_ids=torch.arange(ids.shape[1])[None] + offset)
        torch.testing.assert_close(part, alone, **tolerance)
    leaky = scores(bundle, packed, position_ids=positions)
    assert (leaky - together)[:, lengths[0] :].abs().max() > 1e-3


# ---------------------------------------------------------------- caches, padding, batches


def left_padded(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    rows = [ids_of(bundle, seed, images) for seed, images in ((1, 1), (2, 2), (3, 0))]
    width = max(ids.shape[1] for ids in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=1) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return ids, mask, rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*PAIRS, "plain"])
@torch.no_grad()
def test_left_padding_and_batching_change_nothing(gated: dict, name: str, attention: str) -> None:
    bundle = using(gated[name], attention)
    if attention == "eager":  # transformers' eager mask in float64 is -inf in its float32 softmax: NaN in padding rows
        bundle = replace(bundle, model=deepcopy(bundle.model).float())
    ids, mask, rows = left_padded(bundle)
    assert mask.sum(1).unique().numel() == 3, "rows of one length would prove nothing"
    batch = scores(bundle, ids, attention_mask=mask)
    tolerance = NUMERIC if attention == "sdpa" and name in ("opt", "plain") else ROUNDED
    for row, together in zip(rows, batch, strict=True):
        torch.testing.assert_close(together[None, -row.shape[1] :], scores(bundle, row), **tolerance)
    assert torch.isfinite(batch).all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["2D", "4D"])
@pytest.mark.parametrize("name", [*PAIRS, "plain"])
@torch.no_grad()
def test_caches_equal_no_cache(gated: dict, name: str, kind: str, form: str) -> None:
    """Prefill of 5 tokens, a chunk of 3, then token by token, on left-padded rows."""
    bundle = using(gated[name], "sdpa")
    ids, mask, _ = left_padded(bundle)
    heads = next_heads(ids, bundle.vocabulary)
    expected = bundle.logits(ids, heads, attention_mask=mask)[0]
    width = ids.shape[1]
    config = bundle.model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=width + 6)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    square = (mask[:, None, None, :].bool() & torch.ones(width, width).tril().bool()).contiguous()
    steps = [0, 5, 8, *range(9, width + 1)]
    parts = []
    for start, stop in pairwise(steps):
        seen = {"attention_mask": mask[:, :stop]}
        if form == "4D":
            seen = {"attention_mask": square[:, :, start:stop, :stop], "position_ids": positions[:, start:stop]}
        logits, cache = bundle.logits(
            ids[:, start:stop], heads[:, start:stop], past_key_values=cache, use_cache=True, **seen
        )
        parts.append(logits)
    real = mask.bool()
    tolerance = NUMERIC if name in ("opt", "plain") else ROUNDED
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], **tolerance)


@torch.no_grad()
def test_one_compiled_step_serves_every_position(tmp_path: Path) -> None:
    """The whole step is one graph (traced without a compiler, on few layers: tracing is what takes time)."""
    pair = tiny_pair(tmp_path, text_family="llama", text_num_hidden_layers=2, image_num_hidden_layers=2)
    bundle = load_bundle(tiny_cross(tmp_path / "fused", *pair, gate=0.5), torch.float64)
    ids = ids_of(bundle)[:, :11]
    heads = next_heads(ids, bundle.vocabulary)
    step = torch.compile(bundle.model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=bundle.model.config, max_cache_len=16)
    parts = []
    for at in range(11):
        parts.append(
            step(
                input_ids=ids[:, at : at + 1],
                attention_mask=(torch.arange(16) <= at)[None, None, None],
                position_ids=torch.tensor([[at]]),
                past_key_values=cache,
                head_ids=heads[:, at : at + 1],
                use_cache=True,
            ).logits
        )
    torch.testing.assert_close(torch.cat(parts, 1), scores(bundle, ids), **ROUNDED)


@torch.no_grad()
def test_every_attention_has_its_own_slot(gated: dict) -> None:
    for name in PAIRS:
        model = gated[name].model
        slots = [module.layer_idx for module in model.modules() if "layer_idx" in vars(module)]
        assert sorted(slots) == list(range(model.config.num_hidden_layers)), name
