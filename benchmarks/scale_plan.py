"""What fusing two 7B parents asks of 8 and of 256 GPUs: memory, traffic and time, by arithmetic alone.

``python -m benchmarks.scale_plan`` prints the tables of docs/scale.md. Nothing is measured here: MFU, the share of a
GPU's peak that a run reaches, is a parameter, and so is the price of a GPU's hour.

Parents: OPT's build at CM3Leon-7B's size (12 D^2 parameters a layer, one tied table). GB are 10^9 bytes.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

PEAK = 989e12  # dense bfloat16 of an H100 or H200 SXM, FLOP/s (NVIDIA's data sheet)
NVLINK = 450e9  # bytes/s a direction inside a machine (same sheet)
NETWORK = 50e9  # bytes/s of a GPU's own 400 Gb/s card
MACHINE = 8  # GPUs
GB = 1e9


@dataclass(frozen=True)
class Model:
    """A fused model by its sizes.

    Attributes:
        width: D of every stream.
        streams: residual streams: 2 for ``cross``.
        layers: of each stream.
        exchanges: of ``cross``, two blocks of 12 D^2 each.
        vocabulary: rows of each stream's tied table.
        positions: rows of each stream's learned positions.
    """

    name: str
    width: int
    streams: int
    layers: int
    exchanges: int
    vocabulary: int
    positions: int = 4096

    @property
    def layer(self) -> int:
        """Parameters of a layer, and of one block of an exchange but for its norms and gate."""
        return 12 * self.width**2

    @property
    def root(self) -> int:
        """Parameters outside of the layers: tables, with OPT's two spare rows of positions."""
        return self.streams * (self.vocabulary + self.positions + 2) * self.width

    @property
    def small(self) -> int:
        """Norms and gates of the exchanges; the parents' own norms have no parameters."""
        return self.exchanges * 2 * (3 * self.width + 1)

    @property
    def parameters(self) -> int:
        return self.root + self.small + (self.streams * self.layers + 2 * self.exchanges) * self.layer

    @property
    def largest_unit(self) -> int:
        """Parameters that are gathered at once: an exchange, or a layer."""
        return self.layer * (2 if self.exchanges else 1)

    def flops(self, length: int) -> float:
        """Of one token, forward and backward, without what checkpointing does again: 6 a parameter that multiplies
        (Kaplan et al., arXiv 2001.08361, section 2.1), 6 T D a causal attention; one head a token."""
        blocks = self.streams * self.layers + 2 * self.exchanges
        return 6 * (blocks * self.layer + self.vocabulary * self.width) + 6 * length * self.width * blocks


CROSS = Model("cross, every 2 layers", 4096, 2, 32, 16, 56_320)
WIDTH = Model("width", 8192, 1, 32, 0, 56_320)


@dataclass(frozen=True)
class Setting:
    """How it is trained: FSDP2 inside a machine, replicas of that between machines (HSDP)."""

    gpus: int
    micro: int = 2
    length: int = 4096
    chunk: int = 1024
    shards: int = MACHINE

    @property
    def tokens(self) -> int:
        """Of one pass on one GPU."""
        return self.micro * self.length


def memory(model: Model, at: Setting) -> dict[str, float]:
    """GB on one GPU at the top of a step, under bf16 and checkpointing of layers (dtypes: finetune.scale.engines)."""
    share, unit = model.parameters / at.shards, model.largest_unit
    blocks = model.streams * model.layers + 2 * model.exchanges
    parts = {
        "weights, float32, sharded": 4 * share,
        "gradients, float32, sharded": 4 * share,
        "Adam, two of float32, sharded": 8 * share,
        "tables whole, and their gradients, float32": 8 * model.root,
        "two units gathered, bfloat16": 2 * 2 * unit,
        "a unit's gradients, bfloat16, and their float32 sum": 6 * unit,
        "states kept, one a block, float32": 4 * at.tokens * model.width * blocks,
        "a unit made again: 34 bytes a token and width": 34 * at.tokens * model.width * (2 if model.exchanges else 1),
        "scores of one chunk, bfloat16 and twice float32": 10 * at.chunk * model.vocabulary,
    }
    return {name: value / GB for name, value in parts.items()}


def traffic(model: Model, at: Setting) -> dict[str, float]:
    """GB that one GPU receives in one pass: layers are gathered twice in bfloat16, gradients are summed in float32."""
    inside, replicas = (at.shards - 1) / at.shards, at.gpus // at.shards
    layers = model.parameters - model.root
    return {
        "gathers": inside * (2 * 2 * layers + 4 * model.root) / GB,
        "reduce-scatter": inside * 4 * model.parameters / GB,
        "between machines": 2 * (replicas - 1) / replicas * 4 * model.parameters / at.shards / GB,
    }


def speed(model: Model, at: Setting, mfu: float) -> float:
    """Tokens per second of all GPUs, at a share of their peak that somebody has to measure."""
    return at.gpus * mfu * PEAK / model.flops(at.length)


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def report(gpus: list[int], mfus: list[float], micro: int, price: float, tokens: float) -> Iterator[str]:
    """The document's tables."""
    models = [CROSS, WIDTH]
    at = Setting(gpus[0], micro)
    names = [model.name for model in models]
    sizes = [
        ["parameters, 10^9", *(f"{m.parameters / 1e9:.2f}" for m in models)],
        ["of them tables, 10^9", *(f"{m.root / 1e9:.2f}" for m in models)],
        [f"FLOP a token at {at.length}, 10^9", *(f"{m.flops(at.length) / 1e9:.1f}" for m in models)],
    ]
    yield from table(["", *names], sizes)
    yield ""
    found = [memory(model, at) for model in models]
    rows = [[part, *(f"{one[part]:.1f}" for one in found)] for part in found[0]]
    rows.append(["**sum**", *(f"**{sum(one.values()):.1f}**" for one in found)])
    rows.append(["with train.ema", *(f"{sum(one.values()) + one[next(iter(one))]:.1f}" for one in found)])
    yield from table([f"GB on a GPU, {at.shards} shards, {micro} x {at.length} tokens", *names], rows)
    yield ""
    rows = []
    for count in gpus:
        for model in models:
            at, moved = Setting(count, micro), traffic(model, Setting(count, micro))
            whole = traffic(model, Setting(count, micro, shards=count))
            inside = (moved["gathers"] + moved["reduce-scatter"]) * GB / NVLINK
            across = moved["between machines"] * GB / NETWORK
            flat = "-" if count == MACHINE else f"{(whole['gathers'] + whole['reduce-scatter']) * GB / NETWORK:.2f}"
            pass_ = at.tokens * model.flops(at.length) / (mfus[len(mfus) // 2] * PEAK)
            figures = [f"{value:.1f}" for value in moved.values()]
            rows.append([str(count), model.name, *figures, f"{inside:.2f}", f"{across:.2f}", flat, f"{pass_:.2f}"])
    head = ["GPUs", "model", "GB gathered", "GB reduce-scattered", "GB between machines"]
    head += ["s on NVLink", "s on the network", "s if sharded over all", f"s of a pass at MFU {mfus[len(mfus) // 2]}"]
    yield from table(head, rows)
    yield ""
    rows = []
    for count in gpus:
        for model in models:
            rates = [speed(model, Setting(count, micro), mfu) for mfu in mfus]
            hours = [tokens / rate / 3600 for rate in rates]
            cells = [
                f"{rate:,.0f}; {hour / 24:.1f} d; {count * hour * price / 1e3:,.0f} k"
                for rate, hour in zip(rates, hours, strict=True)
            ]
            rows.append([str(count), model.name, *cells])
    unit = f"tokens/s; days and cost of {tokens / 1e9:g} x 10^9 tokens at {price:g} a GPU hour"
    yield from table(["GPUs", "model", *(f"MFU {mfu}" for mfu in mfus)], rows)
    yield ""
    yield f"Cells: {unit}. Arithmetic, not measured."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 256])
    parser.add_argument("--mfu", type=float, nargs="+", default=[0.3, 0.4, 0.5])
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU for an hour, in whatever money")
    parser.add_argument("--tokens", type=float, default=50e9)
    given = parser.parse_args()
    print("\n".join(report(given.gpus, given.mfu, given.micro, given.price, given.tokens)))


if __name__ == "__main__":
    main()
