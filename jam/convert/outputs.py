"""Tensors of a converted checkpoint: each knows its blocks of rows and makes them when they are written.

A block is a slice of a pickle's rows, or several put together; no tensor is ever held whole, but for codebooks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jam.byte_bar import byte_bar
from jam.checkpoint import row_blocks
from jam.convert.pickles import PickledTensor, Pickles
from jam.errors import CheckpointError
from jam.floats import STORED
from jam.models.family import Family
from jam.shards import ShardWriter, TensorSpec

BLOCK = 1 << 22  # elements: large enough that asking another process costs little


@dataclass(frozen=True)
class Output:
    """A tensor to be written, and its blocks along the first axis in the tensor's own type.

    Raises:
        CheckpointError: a tensor without elements, or of a type that is no plain float.
    """

    spec: TensorSpec
    blocks: Callable[[], Iterator[np.ndarray]]

    def __post_init__(self) -> None:
        spec = self.spec
        if spec.dtype not in STORED:
            raise CheckpointError(
                f"tensor {spec.name} is {spec.dtype}; {', '.join(STORED)} are read, convert a checkpoint of float "
                "weights"
            )
        if 0 in spec.shape:
            raise CheckpointError(
                f"tensor {spec.name} is {list(spec.shape)}, without a number in it; whole weights are required, "
                "restore the checkpoint"
            )


def check_shapes(outputs: Sequence[Output], family: Family, config: dict, where: str) -> None:
    """Raises CheckpointError unless the tensors are exactly those of the family in this configuration."""
    sizes = family.sizes(config, where)
    expected = {name: family.shape(sizes, axes) for name, axes in family.tensors(config).items()}
    shapes = {output.spec.name: output.spec.shape for output in outputs}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{where}: {name} is {shapes.get(name, 'missing')}, a model of family {family.model_type} and these "
                f"sizes has {expected.get(name, 'none')}; a whole checkpoint of one model is required, restore it"
            )


def copied(pickles: Pickles, name: str, tensor: PickledTensor, rows: slice | None = None) -> Output:
    """A tensor, or a range of its rows, as it is."""
    first, last, _ = (rows or slice(None)).indices(tensor.shape[0] if tensor.shape else 1)
    shape = (last - first, *tensor.shape[1:]) if tensor.shape else ()

    def blocks() -> Iterator[np.ndarray]:
        for block in row_blocks(shape, BLOCK):
            yield pickles.raw(tensor, slice(first + block.start, first + block.stop))

    return Output(TensorSpec(name, tensor.dtype, shape), blocks)


def stacked(name: str, parts: Sequence[Output]) -> Output:
    """Parts under each other: along the first axis."""
    shape = (sum(part.spec.shape[0] for part in parts), *parts[0].spec.shape[1:])

    def blocks() -> Iterator[np.ndarray]:
        for part in parts:
            yield from part.blocks()

    return Output(TensorSpec(name, parts[0].spec.dtype, shape), blocks)


def beside(pickles: Pickles, name: str, tensors: Sequence[PickledTensor]) -> Output:
    """Matrices side by side: along the second axis."""
    shape = (tensors[0].shape[0], sum(tensor.shape[1] for tensor in tensors))

    def blocks() -> Iterator[np.ndarray]:
        for block in row_blocks(shape, BLOCK):
            yield np.concatenate([pickles.raw(tensor, block) for tensor in tensors], axis=1)

    return Output(TensorSpec(name, tensors[0].dtype, shape), blocks)


def made(name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Output:
    """A small tensor, made whole."""
    return Output(TensorSpec(name, dtype, shape), lambda: iter([make()]))


class Bar:
    """Bytes written, on a terminal only; use as a context manager."""

    def __init__(self, total: int):
        self.progress = byte_bar("converting")
        self.task = self.progress.add_task("converting", total=total)

    def write(self, writer: ShardWriter, outputs: Sequence[Output]) -> None:
        """Every output's blocks, in order."""
        for output in outputs:
            for block in output.blocks():
                writer.append(output.spec.name, block)
                self.progress.advance(self.task, block.nbytes)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
