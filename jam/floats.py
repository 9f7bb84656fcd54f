"""Float formats of checkpoint files, as numpy arrays: bfloat16 by bit operations, since numpy has no such type.

Every computation on weights is in float32; these two functions are the way in and the way out, and the only places
where precision changes. No torch.
"""

import numpy as np

# safetensors dtype name -> numpy dtype of the stored bytes (little-endian); BF16 is kept as its bits
STORED: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
# dtype names of recipes and config.json -> safetensors names
SHORT: dict[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LONG: dict[str, str] = {short: name for name, short in SHORT.items()}


def to_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values of any shape, of the safetensors type ``dtype``, as float32. Exact but for F64.

    >>> to_float32(np.array([0x3F80, 0xC000], np.uint16), "BF16").tolist()
    [1.0, -2.0]
    """
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):  # the caller counts non-finite values and refuses them by name
        return stored.astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of any shape as stored values, rounded to nearest, ties to even; overflow becomes infinity.

    The caller must have refused NaN, whose bits the rounding could carry into another number.

    >>> [hex(bits) for bits in from_float32(np.array([1.0, 1.00390625, 1.01171875], np.float32), "BF16").tolist()]
    ['0x3f80', '0x3f80', '0x3f82']
    """
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        # adding 0x7fff rounds up above half; the kept lowest bit makes exact halves go to even
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    with np.errstate(over="ignore"):
        return values.astype(STORED[dtype])


def overflows(values: np.ndarray, dtype: str) -> int:
    """How many finite float32 values have no finite neighbour in ``dtype`` (float16 ends at 65,504)."""
    if dtype == "F16":
        return int((np.abs(values) >= 65520.0).sum())
    if dtype == "BF16":
        limit = np.uint32(0x7F7F8000)  # half way from the largest bfloat16 to infinity: rounds up, to even
        return int(((values.view(np.uint32) & np.uint32(0x7FFFFFFF)) >= limit).sum())
    return 0
