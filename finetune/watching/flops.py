"""Model FLOPs of training, and what a device could do: MFU.

PaLM (arXiv 2204.02311, appendix B) counts 6 N + 12 L H Q T a token: two for each weight of a matrix in the forward
pass, two for the gradient of its input, two for its own; and for L attention layers of H heads of width Q four a pair
of tokens forward, eight backward, causal or not. Here

- T is a document's own length: attention inside a document of n tokens costs 12 H Q n^2 a layer, padding nothing
  (a sliding window is not looked at);
- every matrix that a token passes counts: of both towers, of cross-attention in both directions, of adapters;
- a matrix costs what is done with it. Trained: 6. Frozen: 4, its input's gradient still passes through it. Frozen with
  nothing trained below it: 2, there is no gradient to pass. The same for attention: 12 or 4. Which it is, is seen in
  the first forward pass, not derived from names;
- a head counts where something is learnt, over the ids that its softmax runs over.

Tables, norms and the optimizer count nothing; what is done twice to save memory (``train.checkpointing``) or to draw
the model's own codes counts once: it is the model's work, not the machine's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finetune.recipe import FinetuneRecipe
from finetune.watching.measure import PAIRS, TOKENS
from jam.models.cross import JamCrossForCausalLM
from jam.models.load import Bundle
from jam.models.span_head import owned_slices
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD

# Dense TFLOP/s by a part of torch's name for the device, the first that fits: bfloat16 on tensor cores with float32
# sums, and float32 outside of them. From NVIDIA's data sheets, whose bfloat16 figures "with sparsity" are twice these:
# B200 (HGX B200), H200, H100, A100, L40S, L40, L4, A10, RTX 6000 Ada, RTX A6000; from its architecture papers Ada
# (RTX 4090) and GA102 (RTX 3090); AMD's of MI300X.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 75.0),
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 311.9, 19.5),
    ("L40S", 362.1, 91.6),
    ("L40", 181.1, 90.5),
    ("L4", 121.0, 30.3),
    ("A10", 125.0, 31.2),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("MI300X", 1307.4, 163.4),
)


def known_peak(device: str, precision: str) -> float | None:
    """TFLOP/s of a device by torch's name for it; None for one that is not in the table, or a setting that is not.

    >>> known_peak("NVIDIA H100 80GB HBM3", "bf16"), known_peak("NVIDIA A100-SXM4-40GB", "fp32")
    (989.4, 19.5)
    """
    words = device.replace("-", " ").split()
    if {"Ti", "SUPER", "D", "Laptop", "MIG"} & {*words}:
        return None  # others, or a part of one
    for name, bf16, fp32 in PEAKS:
        if all(part in words for part in name.split()):
            return bf16 if precision == "bf16" else fp32
    return None


def peak_of(recipe: FinetuneRecipe, device: torch.device) -> float | None:
    """TFLOP/s of one device: what the recipe says, else the table's."""
    if recipe.log.peak_tflops is not None or device.type != "cuda":
        return recipe.log.peak_tflops
    if recipe.train.precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return None  # matrices then go through tensor cores, partly
    return known_peak(torch.cuda.get_device_name(device), recipe.train.precision)


@dataclass(frozen=True)
class Work:
    """FLOPs of forward and backward: of one token, of one pair of tokens of a document, of one row of each head."""

    token: float
    pair: float
    rows: tuple[float, float]

    def of(self, counts: Sequence[float], sums: Tensor) -> float:
        """Of what ``finetune.watching.measure.count`` and ``finetune.loss.sums`` found."""
        rows = sum(cost * float(count) for cost, count in zip(self.rows, sums[:2, 1], strict=True))
        return self.token * counts[TOKENS] + self.pair * counts[PAIRS] + rows


@dataclass
class WorkMeter:
    """Looks at a network's first forward pass in training."""

    bundle: Bundle
    joint: bool
    _seen: dict[str, tuple[nn.Linear, bool]] = field(default_factory=dict)
    _hooks: list = field(default_factory=list)
    _work: Work | None = None  # once the first step is done

    def __post_init__(self) -> None:
        for name, module in self.bundle.model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in name.split("."):
                self._hooks.append(module.register_forward_pre_hook(self._look(name)))

    def _look(self, name: str):
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            flows = inputs[0].requires_grad or self._seen.get(name, (module, False))[1]
            self._seen[name] = (module, flows)  # a pass before it may have been without gradients

        return hook

    def work(self) -> Work:
        """What the first step showed; from then on nothing is looked at."""
        if self._work is None:
            for hook in self._hooks:
                hook.remove()
            token = pair = 0.0
            for name, (module, flows) in self._seen.items():
                token += 2 * module.in_features * module.out_features * (1 + flows + module.weight.requires_grad)
                if name.removesuffix(".base_layer").split(".")[-1] in ("o_proj", "out_proj"):  # it reads attention
                    pair += 4 * module.in_features * (3 if flows else 1)
            self._work = Work(token, pair, (self._head(TEXT_HEAD), self._head(IMAGE_HEAD)))
        return self._work

    def _head(self, kind: int) -> float:
        model, vocabulary = self.bundle.model, self.bundle.vocabulary
        cross = isinstance(model, JamCrossForCausalLM)
        if cross and model.config.tables == "shared":
            weight = model.shared.embed.weight
        else:
            owner = model if not cross else model.text if kind == TEXT_HEAD else model.image
            weight = owner.get_output_embeddings().weight
        ids = vocabulary.size if self.joint else sum(part.stop - part.start for part in owned_slices(vocabulary, kind))
        below = any(
            parameter.requires_grad for name, parameter in model.named_parameters() if "lm_head" not in name.split(".")
        )
        return 2.0 * weight.shape[1] * ids * (1 + below + weight.requires_grad)
