"""How the model lies on the ranks: whole on each (one process, DDP), or sharded (FSDP2; ZeRO-3 is in zero.py).

``accelerate launch`` says which, by its config. The sharding is torch's own ``fully_shard``, called here, so that
processes on a CPU run the very code that GPUs run (accelerate shards on GPUs only) and tables keep float32.

A checkpoint holds whole tensors under their names, whatever the engine: ``weight`` and ``moments`` give them one by
one, ``put_weight`` and ``put_moments`` take them back. All four are for every rank at once.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from jam.errors import RunError


@dataclass(frozen=True)
class Whole:
    """A tensor of a checkpoint: what it will be, and a call of every rank that gives it, whole and on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def whole(tensor: Tensor) -> Whole:
    """A tensor or its shards."""

    def read() -> Tensor:
        full = tensor.detach()
        return (full.full_tensor() if isinstance(full, DTensor) else full).cpu().contiguous()

    return Whole(tuple(tensor.shape), tensor.dtype, read)


def laid_as(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as another one lies: of its type, on its device, sharded as it is."""
    full = full.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # every rank has it whole


class Engine:
    """The model whole on every rank: one process, or DDP."""

    name = "DDP"
    shards = False
    averages = True  # keeps train.ema
    tries = True  # runs single documents outside of a step

    def __init__(self, accelerator: Accelerator, bf16: bool):
        self.accelerator, self.bf16 = accelerator, bf16

    def wrap(self, network: nn.Module, build: Callable[[], Optimizer]) -> tuple[nn.Module, Optimizer]:
        """The network as training calls it, and its optimizer, which ``build`` makes of its parameters."""
        self.raw = build()
        return self.accelerator.prepare(network, self.raw)

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around one forward and backward pass. Gradients go between ranks on the last one of a step."""
        precision = torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bf16)
        with precision, nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, limit: float) -> float:
        """The norm of all gradients, which are scaled to at most ``limit``."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def weight(self, parameter: Tensor) -> Whole:
        return whole(parameter)

    @torch.no_grad()
    def put_weight(self, parameter: Tensor, full: Tensor) -> None:
        parameter.copy_(laid_as(full, parameter))

    def moments(self, parameter: nn.Parameter) -> dict[str, Whole]:
        """The optimizer's state of a parameter; empty before its first step."""
        return {key: whole(value) for key, value in self.raw.state.get(parameter, {}).items()}

    def put_moments(self, parameter: nn.Parameter, full: dict[str, Tensor]) -> None:
        # a count of steps stays where torch keeps it, on the CPU
        self.raw.state[parameter] = {
            key: value if value.dim() == 0 else laid_as(value, parameter) for key, value in full.items()
        }


class Fsdp2(Engine):
    """Parameters, gradients and optimizer sharded over the ranks by layer; the root is head and loss as well.

    Under bf16 the layers are gathered in bfloat16 and their gradients summed in float32; tables, heads and final norms,
    the root's own, stay float32 as autocast has them on one device.
    """

    name = "FSDP2"
    shards = True

    def __init__(self, accelerator: Accelerator, bf16: bool):
        super().__init__(accelerator, bf16)
        self.plugin = FullyShardedDataParallelPlugin()  # reads what accelerate launch has set
        if self.plugin.fsdp_version != 2:
            raise RunError(
                f"fsdp_version is {self.plugin.fsdp_version}; 2 is required, set it in accelerate's config "
                "(recipes/launch/fsdp2.yaml)"
            )

    def wrap(self, network: nn.Module, build: Callable[[], Optimizer]) -> tuple[nn.Module, Optimizer]:
        layers = sharded_layers(network, self.plugin.transformer_cls_names_to_wrap)
        offload = self.plugin.cpu_offload or OffloadPolicy()
        shared: dict[str, Any] = {"mesh": self._mesh(), "offload_policy": offload}
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if self.bf16 else {}
        precision = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
        for layer in layers:
            self._fill(layer)
            fully_shard(layer, mp_policy=precision, reshard_after_forward=self.plugin.reshard_after_forward, **shared)
        # torch warns of layers that return views; nobody here writes into what a layer returned
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        self._fill(network)
        kept = network.state_dict(keep_vars=True).values()
        for buffer in (one for one in kept if not isinstance(one, nn.Parameter)):
            buffer.copy_(self._first_ranks(buffer))
        fully_shard(network, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **shared)
        self.raw = build()
        return network, self.raw

    @torch.no_grad()
    def _fill(self, unit: nn.Module) -> None:
        """Gives what does not lie in shards yet the first rank's numbers, on the device. The other ranks have shapes
        alone, so that the model stands once in main memory and one unit of it whole on a device."""
        filled: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
        for module in unit.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                if isinstance(old, DTensor):
                    continue
                if old not in filled:
                    filled[old] = nn.Parameter(self._first_ranks(old.detach()), old.requires_grad)
                setattr(module, name, filled[old])

    def _first_ranks(self, tensor: Tensor) -> Tensor:
        device = self.accelerator.device
        found = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        dist.broadcast(found, 0)
        return found

    def _mesh(self) -> DeviceMesh:
        """One dimension; two where accelerate's parallelism config asks for replicas of the shards (HSDP)."""
        count, device = self.accelerator.num_processes, self.accelerator.device.type
        if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
            return init_device_mesh(device, (count,), mesh_dim_names=("shard",))
        asked = ParallelismConfig()
        replicas, parts = asked.dp_replicate_size, asked.dp_shard_size
        if replicas * parts != count or asked.total_size != count:
            raise RunError(
                f"parallelism_config asks for {replicas} replicas of {parts} shards; their product must be the "
                f"{count} processes, and nothing but dp_replicate_size and dp_shard_size above 1"
            )
        return init_device_mesh(device, (replicas, parts), mesh_dim_names=("replicate", "shard"))

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        # always between ranks: gradients that wait for the last micro-batch would lie whole on every rank
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()


def sharded_layers(network: nn.Module, names: list[str] | None = None) -> list[nn.Module]:
    """Modules that are gathered one at a time: both towers' layers and the exchanges.

    Args:
        names: of their classes; by default those that the models say must not be split.

    Raises:
        RunError: no module is of such a class.
    """
    wanted = set(names or ())
    if not names:
        models = [module for module in network.modules() if isinstance(module, PreTrainedModel)]
        wanted = {name for model in models for name in model._no_split_modules or ()}
    found = [module for module in network.modules() if type(module).__name__ in wanted]
    if not found:
        raise RunError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(sorted(wanted)) or 'nothing'}, which this model has "
            "not; leave it out, the model knows its layers"
        )
    return found


def start_processes() -> Accelerator:
    """Device and process group as the launcher has set them; one process without one.

    accelerate is not told of shards, which it would make on GPUs alone, nor of a precision, which it would keep for the
    whole process.

    Raises:
        RunError: DeepSpeed is asked for and not there.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise RunError("accelerate's config asks for DeepSpeed, which is not installed; pip install deepspeed")
    with _hidden("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())


@contextmanager
def _hidden(*variables: str) -> Iterator[None]:
    found = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


def asks_fsdp2(accelerator: Accelerator) -> bool:
    """Whether the model will be sharded by FSDP2, so that the first rank alone has to read it."""
    return accelerator.num_processes > 1 and _asked("ACCELERATE_USE_FSDP")


def engine_for(accelerator: Accelerator, bf16: bool) -> Engine:
    """The engine that ``accelerate launch`` asked for; whole models without it."""
    if asks_fsdp2(accelerator):
        return Fsdp2(accelerator, bf16)
    if accelerator.num_processes > 1 and _asked("ACCELERATE_USE_DEEPSPEED"):
        from finetune.scale.zero import Zero3  # imports deepspeed, which is no dependency

        return Zero3(accelerator, bf16)
    return Engine(accelerator, bf16)


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
