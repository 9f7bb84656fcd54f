"""Float formats of checkpoint files, as numpy arrays: bfloat16 by bit operations, since numpy has no such type.

Every computation on weights is in float32; ``to_float32`` and ``from_float32`` are the way in and the way out, and the
only places where precision changes. They are made for blocks that stay in a core's cache. No torch.
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
        bits = stored.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
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
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        return rounded.astype("<u2")
    with np.errstate(over="ignore"):
        return values.astype(STORED[dtype])


_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00}  # all ones: infinity or NaN


def all_finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether no stored value is NaN or infinite, read off the bits.

    >>> all_finite(np.array([0x3F80, 0xFF80], np.uint16), "BF16")
    False
    """
    if dtype in _EXPONENT and stored.size:
        # as whole numbers, positive infinity and NaN are the largest with a sign, negative ones the largest without
        positive, negative = stored.view(np.int16).max(), stored.view(np.uint16).max()
        return bool(positive < _EXPONENT[dtype] and negative < _EXPONENT[dtype] + 0x8000)
    return bool(np.isfinite(stored).all())


def not_finite(stored: np.ndarray, dtype: str) -> int:
    """How many stored values are NaN or infinite."""
    if dtype in _EXPONENT:
        return int(((stored.view(np.uint16) & np.uint16(0x7FFF)) >= _EXPONENT[dtype]).sum())
    return int((~np.isfinite(stored)).sum())
