"""Make Hugging Face models smaller and faster, and prove it.

    import compresskit as ck

    recipe = ck.Recipe(model="path-or-hub-id", stages=[ck.Prune("wanda", pattern="2:4"), ck.Distill()])
    print(ck.plan(recipe))
    artifact = ck.run(recipe, "out")
    print(ck.report(artifact))
    model = ck.load("out")

Names are imported when first used, so that importing the package imports no torch. Once it is imported, plain
``AutoModel*.from_pretrained`` loads what `compresskit export --to bitmask` wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.registration import install
from compresskit.registry import locate

if TYPE_CHECKING:
    from compresskit.api import bench, compress, export, foresee, load, plan, report, run
    from compresskit.artifact import Artifact, open_artifact
    from compresskit.data.spec import DataSpec
    from compresskit.distill.finetune import Finetune
    from compresskit.distill.stage import Distill
    from compresskit.quant.qat import Qat
    from compresskit.quant.qlora import Qlora
    from compresskit.quant.stage import Quantize
    from compresskit.recipe import Recipe, load_recipe
    from compresskit.sparse.stage import Prune
    from compresskit.sparse.train import SparseTrain

_HOMES = {
    "Artifact": "compresskit.artifact",
    "DataSpec": "compresskit.data.spec",
    "Distill": "compresskit.distill.stage",
    "Finetune": "compresskit.distill.finetune",
    "Prune": "compresskit.sparse.stage",
    "Qat": "compresskit.quant.qat",
    "Qlora": "compresskit.quant.qlora",
    "Quantize": "compresskit.quant.stage",
    "Recipe": "compresskit.recipe",
    "SparseTrain": "compresskit.sparse.train",
    "bench": "compresskit.api",
    "compress": "compresskit.api",
    "export": "compresskit.api",
    "foresee": "compresskit.api",
    "load": "compresskit.api",
    "load_recipe": "compresskit.recipe",
    "open_artifact": "compresskit.artifact",
    "plan": "compresskit.api",
    "report": "compresskit.api",
    "run": "compresskit.api",
}

__all__ = [
    "Artifact",
    "DataSpec",
    "Distill",
    "Finetune",
    "Prune",
    "Qat",
    "Qlora",
    "Quantize",
    "Recipe",
    "SparseTrain",
    "bench",
    "compress",
    "export",
    "foresee",
    "load",
    "load_recipe",
    "open_artifact",
    "plan",
    "report",
    "run",
]
__version__ = "0.1.0"

install()  # plain from_pretrained loads bitmask checkpoints from here on


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return locate(f"{_HOMES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
