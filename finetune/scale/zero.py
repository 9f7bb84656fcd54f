"""ZeRO-3 through DeepSpeed, which is no dependency: weights, gradients and optimizer sharded over the ranks.

FSDP2 (finetune.scale.engines) does the same without it; this is for those who run DeepSpeed already. Weights are
gathered and gradients summed in float32, also under bf16, whose arithmetic is autocast's as on one device.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.scale.engines import Engine, Whole, whole
from jam.errors import RunError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero3(Engine):
    """DeepSpeed's engine behind the same calls; it clips and steps at once, in ``clip``."""

    name = "ZeRO-3"
    shards = True
    averages = False
    tries = False

    def __init__(self, accelerator: Accelerator, bf16: bool):
        super().__init__(accelerator, bf16)
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage != "3" or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise RunError(
                f"DeepSpeed with zero_stage {stage}; zero_stage: 3 without a deepspeed_config_file is required, as "
                "recipes/launch/zero3.yaml has it; for whole models use DDP"
            )

    def wrap(self, network: nn.Module, build: Callable[[], Optimizer]) -> tuple[nn.Module, Optimizer]:
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
        self.raw = build()
        zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        for part in ("optimizer", "param"):
            device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            if device != "none":
                zero[f"offload_{part}"] = {"device": device}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # its own account of samples, which nothing here reads
            "gradient_accumulation_steps": 1,  # where a step ends is said in backward
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        model, optimizer, *_ = deepspeed.initialize(model=network, optimizer=self.raw, config=config)
        self.model = model
        return model, _Stepped(optimizer)

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def clip(self, model: nn.Module, limit: float) -> float:
        self.model.optimizer.clip_grad = limit
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def weight(self, parameter: Tensor) -> Whole:
        if not hasattr(parameter, "ds_shape"):  # a buffer
            return whole(parameter)

        def read() -> Tensor:
            with GatheredParameters([parameter]):
                return parameter.detach().cpu().clone()

        return Whole(tuple(parameter.ds_shape), parameter.dtype, read)

    @torch.no_grad()
    def put_weight(self, parameter: Tensor, full: Tensor) -> None:
        if not hasattr(parameter, "ds_shape"):
            parameter.copy_(full)
            return
        with GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(full.to(parameter.device, parameter.dtype))
        if parameter.requires_grad:  # the copy that the optimizer steps
            own = safe_get_local_fp32_param(parameter)
            safe_set_local_fp32_param(parameter, _part(full, own))

    def moments(self, parameter: nn.Parameter) -> dict[str, Whole]:
        steps = self._steps()
        if steps is None:
            return {}
        found = {key: Whole(tuple(parameter.ds_shape), torch.float32, self._reader(parameter, key)) for key in _MOMENTS}
        return {"step": whole(steps), **found}

    def _reader(self, parameter: nn.Parameter, key: str) -> Callable[[], Tensor]:
        return lambda: safe_get_full_optimizer_state(parameter, key).detach().cpu().contiguous()

    def _steps(self) -> Tensor | None:
        """Adam's count, which all parameters share; None before the first step."""
        states = [state for state in self.model.optimizer.optimizer.state.values() if "step" in state]
        return states[0]["step"] if states else None

    def put_moments(self, parameter: nn.Parameter, full: dict[str, Tensor]) -> None:
        inner = self.model.optimizer.optimizer
        for flat in self.model.optimizer.fp32_partitioned_groups_flat:
            if not inner.state[flat]:  # Adam makes it in its first step
                inner.state[flat] = {key: torch.zeros_like(flat) for key in _MOMENTS}
            inner.state[flat]["step"] = full["step"].clone()
        for key in _MOMENTS:
            own = safe_get_local_optimizer_state(parameter, key)
            safe_set_local_optimizer_state(parameter, _part(full[key], own), key)


def _part(full: Tensor, own: Tensor) -> Tensor:
    """This rank's part of a tensor, flat and as long as ``own``: the last ranks' end in padding, which DeepSpeed's own
    way to set a whole tensor (0.19.8) does not allow for."""
    start = own.numel() * dist.get_rank()
    found = full.flatten()[start : start + own.numel()].to(own.device, own.dtype)
    return torch.cat([found, found.new_zeros(own.numel() - len(found))]).view_as(own)


class _Stepped:
    """DeepSpeed's optimizer, which has stepped when the loop asks it to."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Nothing: see ``Zero3.clip``."""
