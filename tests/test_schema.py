"""The JSON Schema takes what compresskit takes, and refuses what no method has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from compresskit.api import plan
from compresskit.errors import CompressKitError
from compresskit.methods import FAMILIES, Family
from compresskit.methods.page import as_recipe
from compresskit.recipe import STAGES, recipe_from
from compresskit.schema import recipe_schema
from compresskit.yaml12 import parse_yaml
from tests.conftest import ROOT
from tests.tiny import tiny_llama

DOCS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
EXAMPLES = [text for text, kind in re.findall(r"`(?:- )?((\w+): \{.*?\})`", DOCS) if kind in STAGES]
SEVERAL = """\
model: some/model
data: {source: text.jsonl, column: story}
tokenizer: other/model
evaluation: held-out.txt
export: gguf
stages:
  - finetune
  - prune: {pattern: 0.5, ignore: lm_head, allocation: global, recover: null, options: {}}
  - prune: {method: cut, layers: 3, ffn: 0.5, heads: 2, importance: taylor, milliseconds: 7}
  - sparse_train: {loss: cross_entropy, pattern: 2:4, method: srste, pull: 0}
  - qat: {loss: [forward_kl, {method: jsd, beta: 0.3, top_k: null}], features: squarehead}
  - distill:
      loss: {method: pairwise, weight: 2}
      features: [{method: relation, of: qq, layers: {0: 1, 3: 7}}, {method: hidden_mse, layers: last_2}]
      teacher_placement: {method: server, url: http://localhost:8000/v1, model: NAME, retries: 0}
      alignment: none
      on_policy: {fraction: 1}
  - finetune: {trainable: dora, data: {sources: {a.jsonl: 0.7, b.jsonl: {weight: 0.3, column: text}}}}
  - quantize: {method: awq, overrides: {"*.down_proj": w8a16}, gptq: true}
"""
BAD = (
    "prune: {method: wnada}",
    "prune: {method: sparsegpt, dampnig: 0.1}",
    "prune: {method: wanda, damping: 0.1}",
    "prune: {damping: 0.1}",
    "prune: {method: sparsegpt, damping: 2}",
    "prune: {method: cut, parameters: 0.5, importance: tailor}",
    "prune: {method: cut, layers: half}",
    "prune: {allocation: owls}",
    "prune: {allocation: {method: owl, spred: 0.1}}",
    "prune: {allocation: {spread: 0.1}}",
    "prune: {method: [wanda]}",
    "quantize: {method: rtn, damping: 0.1}",
    "quantize: {options: 3}",
    "sparse_train: {method: gradual, pull: 0.1}",
    "distill: {loss: forward_kll}",
    "distill: {loss: [forward_kl, {method: jsd, bta: 0.3}]}",
    "distill: {stepz: 3}",
    "distill: {teacher_placement: {method: server, model: NAME}}",
    "distill: {teacher_placement: null}",
    "distill: {on_policy: {fraction: 0.5, top_k: 3}}",
    "finetune: {trainable: laura}",
    "qat: {loss: pairwise}",
    "prun",
)


@pytest.fixture(scope="module")
def schema() -> Any:
    found = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("schema") / "model")


def read(text: str) -> Any:
    """YAML as an editor hands it to the schema: keys are text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list) else value

    return plain(parse_yaml(text, "here")[0])


def around(stage: str) -> Any:
    return read(f"model: MODEL\nstages:\n  - {stage}\n")


def test_recipes_that_run_are_taken_as_written_and_as_written_down(schema: Any) -> None:
    readme = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    kept = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").rglob("*.yaml"))]
    assert readme
    for text in (*readme, *kept, SEVERAL):
        schema.validate(read(text))
        schema.validate(recipe_from(parse_yaml(text, "here")[0], {}).to_json())


@pytest.mark.parametrize("stage", EXAMPLES)
def test_every_stage_of_the_docs_is_taken(stage: str, schema: Any) -> None:
    schema.validate(around(stage))


def test_there_are_stages_in_the_docs() -> None:
    assert {as_recipe(family).removeprefix("- ") for family in FAMILIES} < set(EXAMPLES)


@pytest.mark.parametrize("stage", BAD)
def test_what_nothing_knows_is_refused_as_a_plan_refuses_it(stage: str, schema: Any, model: Path) -> None:
    written = around(stage) | {"model": str(model)}
    assert not schema.is_valid(written)
    with pytest.raises(CompressKitError) as caught:
        plan(recipe_from(written, {}))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_every_name_is_taken_and_a_field_of_no_method_is_not(family: Family, schema: Any) -> None:
    for name, cls in family.classes():
        needed = {"url": "http://localhost:8000/v1", "model": "NAME"} if name == "server" else {}
        if family.of:
            good, bad = {"method": family.of, family.key: name}, {"method": family.of, family.key: f"{name}_"}
        elif family.is_beside:
            good = {family.key: name}
            bad = good | {"no_such_field": 1}
        else:
            good = {family.key: {"method": name, **needed}}
            bad = {family.key: {"method": name, **needed, "no_such_field": 1}}
        for kind in family.stages:
            assert schema.is_valid({"model": "m", "stages": [{kind: good}]}), (kind, name, cls)
            assert not schema.is_valid({"model": "m", "stages": [{kind: bad}]}), (kind, name, cls)
