"""What the manifest of an artifact says, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.artifact import Artifact
from compresskit.errors import Fault, ModelError

Json = Any


def write_artifact(artifact: Artifact) -> str:
    """Its model, each stage with checks, figures and layers, its warnings, and what it was made with."""
    manifest = artifact.manifest
    stages = manifest["stages"]
    many = "" if len(stages) == 1 else "s"
    lines = [f"{artifact.directory}: {manifest['recipe']['model']} after {len(stages)} stage{many}"]
    for stage in stages:
        lines += _stage(stage)
    lines += [f"warning: {warning}" for warning in manifest["warnings"]]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return "\n".join([*lines, f"made with {versions}"])


def require_whole(artifact: Artifact) -> None:
    """Raise ModelError unless every file has the bytes that the manifest lists; reads all of them."""
    if damaged := artifact.damaged():
        got = f"others in {', '.join(damaged)}"
        cure = "Make the artifact again from its recipe.yaml."
        raise ModelError(Fault(str(artifact.directory), "the bytes the manifest lists", got, cure))


def _stage(stage: Mapping[str, Json]) -> list[str]:
    checks = ", ".join(f"{kind} {c['kept']}/{c['checked']}" for kind, c in stage["checks"].items())
    lines = [f"\n{stage['name']}: promises kept: {checks}"]
    lines += [f"  {name}: {_figure(value)}" for name, value in stage["result"]["metrics"].items()]
    layers = stage["result"]["layers"]
    if layers:
        width = max(len(layer["name"]) for layer in layers)
        lines.append(f"  {'layer':<{width}}  zeros   bits  error")
    for layer in layers:
        error = layer["relative_error"]
        shown = "" if error is None else f"{error:.2e}"
        line = f"  {layer['name']:<{width}}  {layer['zero_fraction']:6.1%}  {layer['bits']:5.3g}  {shown}"
        lines.append(f"{line}  {layer['note']}".rstrip())
    return lines


def _figure(value: Json) -> str:
    """A figure of a stage; those that belong together stand side by side."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_figure(part)}" for name, part in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
