"""Models that are not a directory yet: fetched from the hub, or built anew from a config.json."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub import snapshot_download

from compresskit.errors import Fault, ModelError
from compresskit.modeling.skeleton import CONFIG, load_config, load_tokenizer, model_class

HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
HUB_IGNORED = ["*/*", "*.onnx*", "*.msgpack*"]

# What else belongs to a checkpoint besides weights: anything a reader of the model needs, and its licence.
SIDECARS = (
    "*config*.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".gguf", ".msgpack", ".onnx")


def is_config(path: Path) -> bool:
    """Whether ``path`` is a JSON file rather than a model directory."""
    return path.is_file() and path.suffix == ".json"


def fetch(spec: str, *, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """Download a model from the Hugging Face hub into its cache, or find it there.

    Args:
        spec: ``owner/name`` or ``name``.
        revision: branch, tag or commit.
        patterns: of the files to download; None takes safetensors weights and what stands beside them.

    Returns:
        Its directory in the cache.

    Raises:
        ModelError: ``spec`` looks like a path that does not exist, or the hub has no such model.
    """
    if (
        spec.startswith((".", "/", "~"))
        or spec.count("/") > 1
        or ("/" in spec and Path(spec).parent.is_dir())
    ):
        cure = "Check the path; a hub id is owner/name."
        raise ModelError(Fault(spec, "a model directory, a config.json or a hub id", "nothing there", cure))
    try:
        found = snapshot_download(
            spec, revision=revision, allow_patterns=patterns or HUB_PATTERNS, ignore_patterns=HUB_IGNORED
        )
    except Exception as error:  # the hub's client raises a dozen kinds: absent, gated, offline, timeout
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            Fault(
                spec,
                "a model directory here or a model on the Hugging Face hub",
                f"neither ({type(error).__name__}: {reason})",
                "Check the spelling; offline, download it first and give its directory.",
            )
        ) from error
    return Path(found)


def build_anew(
    config_path: Path,
    *,
    tokenizer: str | Path | None,
    out: Path | None,
    seed: int,
    trust_remote_code: bool = False,
) -> Path:
    """Write a model of ``config_path`` with random weights into a directory of its own below ``out``.

    A model that is there already is used as it is. Two processes at once both build; whoever is later finds
    the other's model in place and takes that.

    Args:
        config_path: a config.json with "architectures".
        tokenizer: directory or hub id whose tokenizer files are copied; None leaves the model without one.
        out: where the models built so far are.
        seed: the same seed gives the same bytes.
        trust_remote_code: whether code beside the config may run.

    Returns:
        ``out/KEY``; the key is made of the config's text, the tokenizer's files and the seed.

    Raises:
        ModelError: the config is unusable, ``out`` was not given, or the vocabularies do not fit.
    """
    if out is None:
        cure = "Give the directory of a checkpoint, or a build directory."
        raise ModelError(Fault(str(config_path), "a directory to build the model in", "none", cure))
    config = load_config(config_path, trust_remote_code=trust_remote_code)
    cls: Any = model_class(config, config_path.parent, trust_remote_code=trust_remote_code)
    files: list[Path] = []
    if tokenizer is not None:
        source = Path(tokenizer).expanduser()
        if not source.is_dir():
            source = fetch(str(tokenizer), patterns=["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"])
        _require_vocabulary(config_path, config.get_text_config().vocab_size, source, trust_remote_code)
        own = ("tokenizer_config.json",)
        files = [p for p in sidecars(source) if p.name in own or not p.name.endswith("config.json")]
    code = sorted(config_path.parent.glob("*.py")) if trust_remote_code else []
    target = out / _key(config_path, [*files, *code], seed)
    if target.is_dir():
        return target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config)
    partial = out / f".{target.name}.{uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        for path in files:
            shutil.copyfile(path, partial / path.name)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # else another process has just built the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _key(config_path: Path, files: list[Path], seed: int) -> str:
    """Hexadecimal digits that tell models apart: everything their bytes depend on is in them."""
    digest = hashlib.sha256(f"{seed}\n".encode())
    digest.update(hashlib.sha256(config_path.read_bytes()).digest())
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def sidecars(directory: Path) -> list[Path]:
    """The files of a checkpoint besides its weights, sorted by name."""
    found = {path for pattern in SIDECARS for path in directory.glob(pattern)}
    return sorted(p for p in found if p.is_file() and not p.name.endswith(WEIGHT_SUFFIXES))


def copy_sidecars(source: Path, out: Path) -> None:
    """Copy configuration, tokenizer, code and licence files; a file already in ``out`` is left alone.

    Args:
        source: directory of a checkpoint; links are followed.
        out: an existing directory. Each file appears whole or not at all, config.json last, so that a
            directory with a config.json is a complete model.
    """
    for path in sorted(sidecars(source), key=lambda p: (p.name == CONFIG, p.name)):
        target = out / path.name
        if not target.exists():
            partial = out / f".{path.name}.partial"
            shutil.copyfile(path, partial)
            os.replace(partial, target)


def _require_vocabulary(config_path: Path, vocab_size: int, tokenizer: Path, trust: bool) -> None:
    tokens = len(load_tokenizer(tokenizer, trust_remote_code=trust))
    if tokens > vocab_size:
        raise ModelError(
            Fault(
                f"{config_path}: vocab_size",
                f"at least {tokens}, the tokens of {tokenizer}",
                str(vocab_size),
                f"Set vocab_size to {tokens} or more, or name another tokenizer.",
            )
        )
