"""Codes of images, made once: kept by the hash of tokenizer and images."""

import uuid
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError

import numpy as np
from PIL import Image

from finetune.data.shards import hash_network
from jam.assets import cache_dir
from jam.errors import DataError
from jam.shards import sync_path
from jam.tokens.image import ImageTokenizer

Progress = Callable[[str, int, int], None]  # what, done, total


def encode_cached(
    tokenizer: ImageTokenizer, keys: list[str], open_one: Callable[[int], Image.Image], progress: Progress | None = None
) -> np.ndarray:
    """Codes [N, codes_per_image] of N images, cached by the tokenizer's weights and the images' keys; uint16, or uint32
    of a codebook that has more."""
    fingerprint = hash_network(tokenizer)
    for key in keys:
        fingerprint.update(key.encode() + b"\0")
    dtype = np.dtype(np.uint16 if tokenizer.codebook_size <= 1 << 16 else np.uint32)
    path = cache_dir() / f"codes-{fingerprint.hexdigest()[:24]}.npy"
    shape = len(keys), tokenizer.codes_per_image
    if (cached := _read_codes(path, shape, dtype, tokenizer.codebook_size)) is not None:
        return cached
    chunks = []
    for at in range(0, len(keys), 64):
        chunks.append(tokenizer.encode([open_one(i) for i in range(at, min(at + 64, len(keys)))]).astype(dtype))
        if progress:
            progress("tokenising images", min(at + 64, len(keys)), len(keys))
    codes = np.concatenate(chunks) if chunks else np.zeros(shape, dtype)
    _write_codes(path, codes)
    return codes


def _read_codes(path: Path, shape: tuple[int, int], dtype: np.dtype, codebook_size: int) -> np.ndarray | None:
    """Cached codes; None if there are none, or the file is damaged, which a power cut can do: they are made anew."""
    try:
        with path.open("rb") as handle:
            codes = np.lib.format.read_array(handle, allow_pickle=False)  # np.load would also open archives
    except (FileNotFoundError, EOFError, ValueError, TokenError, MemoryError):  # numpy's ways to say damaged
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the cache must be readable, or set JAM_CACHE to another") from None
    fits = codes.shape == shape and codes.dtype == dtype and (codes < codebook_size).all()
    return codes if fits else None


def _write_codes(path: Path, codes: np.ndarray) -> None:
    """Raises DataError, and leaves nothing, when the cache cannot be written."""
    temporary = path.with_suffix(
        f".tmp-{uuid.uuid4().hex}.npy"
    )  # machines may share the folder, and numbers of processes
    try:
        np.save(temporary, codes)
        sync_path(temporary)  # a hole of zeros would be read as codes
        temporary.replace(path)
    except OSError as error:  # numpy reports a full disk without an error number
        raise DataError(
            f"{path}: the codes of the images could not be kept ({error.strerror or 'disk full'}); room for "
            f"{codes.nbytes} bytes is required, free some or set JAM_CACHE to another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
