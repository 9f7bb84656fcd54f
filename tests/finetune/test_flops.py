"""Model FLOPs equal what torch counts of a pass without padding; peaks are of the right device."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.lora import adapt
from finetune.loss import TokenLoss, sums
from finetune.optim import build_optimizer
from finetune.order.pack import Placed, collate
from finetune.recipe import LoraSection, LossSection, OptimSection
from finetune.watching.flops import WorkMeter, known_peak, peak_of
from finetune.watching.measure import count
from jam.models.load import load_bundle
from tests.laws.test_data_laws import recipe_for, tokens_of
from tests.tiny import tiny_pair, tiny_vocabulary
from tests.tiny_cross import tiny_cross


def folder_of(name: str, tmp: Path) -> Path:
    text, image = tiny_pair(tmp, **({} if name in ("separate", "shared") else {"family": name}))
    return tiny_cross(tmp / "fused", text, image, gate=0.5, tables=name) if name in ("separate", "shared") else image


@pytest.mark.parametrize(
    ("name", "frozen", "lora"),
    [
        ("opt", None, False),
        ("opt", "layers", False),
        ("llama", None, False),
        ("separate", None, False),
        ("separate", r"^(?!cross\.)", False),
        ("separate", None, True),
        ("opt", None, True),
    ],
)
def test_the_formula_counts_what_torch_counts(tmp_path, name, frozen, lora):
    bundle = load_bundle(folder_of(name, tmp_path))
    bundle.model.set_attn_implementation("eager")
    bundle.model.train()
    if lora:
        adapt(bundle, LoraSection(r=2), seed=0)
    groups = [{"match": frozen, "lr_mul": 0.0}] if frozen else []
    build_optimizer(bundle.model, OptimSection(groups=groups), adapters=lora)
    tokens = tokens_of(0, images=1)
    sequences = [[Placed(tokens, 0)], [Placed(tokens, 3)]]  # a document a row: torch counts masked pairs as well
    batch = collate(sequences, [0, 0], len(tokens), pad=1)
    network, meter = TokenLoss(bundle, LossSection(chunk=None)), WorkMeter(bundle, joint=False)
    with FlopCounterMode(display=False) as counter:
        nats = network(batch)[0]
        nats.sum().backward()
    work = meter.work()
    counts = count(sequences, [0, 0], [True], len(tokens), tiny_vocabulary(images=True)).tolist()
    ours = work.of(counts, sums(nats, batch, 1))
    assert ours == pytest.approx(counter.get_total_flops(), rel=2e-3)  # rotations are products for torch
    if name == "opt":
        assert ours == counter.get_total_flops()


def test_what_is_frozen_below_all_that_learns_costs_the_forward_pass_alone(tmp_path):
    _, image = tiny_pair(tmp_path, tie_word_embeddings=False)
    bundle = load_bundle(image)
    found = {}
    for name, groups in (("all", []), ("head", [{"match": "^(?!lm_head)", "lr_mul": 0.0}])):
        build_optimizer(bundle.model, OptimSection(groups=groups))
        meter = WorkMeter(bundle, joint=False)
        batch = collate([[Placed(tokens_of(0, images=1), 0)]], [0], 64, pad=1)
        TokenLoss(bundle, LossSection())(batch)
        found[name] = meter.work()
    assert found["all"].token == 3 * found["head"].token
    assert found["all"].pair == 3 * found["head"].pair == 3 * 4 * 4 * 32  # 4 layers of width 32
    assert found["all"].rows[0] == pytest.approx(1.5 * found["head"].rows[0])


@pytest.mark.parametrize(
    ("device", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 51.2),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA A100-SXM4-80GB", 311.9, 19.5),
        ("NVIDIA L40S", 362.1, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 3090", 71.0, 35.6),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA A10G", None, None),
        ("Some Device", None, None),
    ],
)
def test_peaks_by_the_name_of_the_device(device, bf16, fp32):
    assert (known_peak(device, "bf16"), known_peak(device, "fp32")) == (bf16, fp32)


def test_a_cpu_has_a_peak_only_if_it_is_said(tmp_path):
    recipe = recipe_for(tmp_path)
    assert peak_of(recipe, torch.device("cpu")) is None
    said = type(recipe).model_validate(recipe.model_dump() | {"log": {"peak_tflops": 0.5}})
    assert peak_of(said, torch.device("cpu")) == 0.5
