"""A model folder as those who only run it want it: where it runs, in which numbers, prepared how.

Both doors to a model, ``jam chat`` and ``jam generate``, open it here.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from jam.errors import GenerationError
from jam.models.load import Bundle, load_bundle
from jam.shipped import model_folder

Numbers = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Running:
    """Where and how a model runs.

    Attributes:
        device: "cpu", "cuda", "cuda:N", or "auto": the first CUDA device where there is one.
        dtype: of the weights; "auto" is bfloat16 on CUDA and float32 on a CPU.
        compiled: decode through ``torch.compile`` (``jam.models.compiled``); else a CPU packs the weights.
    """

    device: str = "auto"
    dtype: Numbers = "auto"
    compiled: bool = False

    def open(self, path: Path | None) -> Bundle:
        """The model in a folder; None takes the shipped default.

        Raises:
            GenerationError: a device that is none, or is not there.
            CheckpointError: as ``load_bundle``.
        """
        device = self._device()
        wanted = {"cpu": "float32", "cuda": "bfloat16"}[device.type] if self.dtype == "auto" else self.dtype
        bundle = load_bundle(model_folder(path), getattr(torch, wanted)).to(device)
        if self.compiled:
            bundle.backend = "inductor"
        else:
            bundle.pack()  # it only runs
        return bundle

    def _device(self) -> torch.device:
        count = torch.cuda.device_count()
        if self.device == "auto":
            return torch.device("cuda" if count else "cpu")
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device, re.ASCII):
            raise GenerationError(f"device is {self.device!r:.60}; required: auto, cpu, cuda or cuda:N; change it")
        found = torch.device(self.device)
        if found.type == "cuda" and (found.index or 0) >= count:
            raise GenerationError(f"device is {self.device} and PyTorch sees {count} CUDA devices; use auto")
        return found


AUTOMATIC = Running()
