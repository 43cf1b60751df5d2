"""For every row of docs/training.md the tests on several processes that say what it does."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "training.md").read_text(encoding="utf-8").partition("\n## ")[0]
TESTS: Mapping[str, tuple[str, ...]] = {
    "data parallel": ("engines::test_losses_agree_step_by_step",),
    "mixed precision": ("engines::test_both_ranks_compute_in_few_bits_and_skip_the_same_steps",),
    "gradient accumulation": ("engines::test_losses_agree_step_by_step",),
    "model parallel": (
        "mesh_engines::test_losses_agree_step_by_step",
        "mesh_engines::test_a_rank_keeps_its_part_of_the_bytes",
        "pipeline_engines::test_losses_are_one_processs_step_by_step",
        "pipeline_engines::test_each_rank_keeps_its_share_of_the_parameters",
    ),
    "DeepSpeed": (
        "engines::test_parameter_bytes_per_rank",
        "offload_engines::test_deepspeed_really_offloads_and_our_optimizer_steps",
    ),
    "overlap of communication and compute": (
        "offload_engines::test_exchanges_begin_before_the_backward_pass_ends",
    ),
    "checkpointing of activations": ("memory_engines::test_nothing_changes",),
    "adaptive batch size": (
        "backoff_ranks::test_both_ranks_do_the_same",
        "noise_engines::test_ranks_grow_as_one_process_does",
    ),
    "asynchronous updates": (
        "local_sgd::test_losses_and_weights_are_those_of_the_papers_steps",
        "local_sgd::test_nothing_is_said_between_exchanges",
        "zenflow_engine::test_only_chosen_columns_move_between_late_updates",
        "zenflow_engine::test_losses_and_weights_are_those_of_the_papers_steps",
    ),
    "quantised training": (
        "engines::test_products_in_int8_stay_near_and_keep_zeros",
        "qat_engines::test_losses_agree_step_by_step",
        "qlora_engines::test_losses_agree_step_by_step",
    ),
    "adapters": (
        "few_engines::test_losses_agree_step_by_step",
        "few_engines::test_zeros_stay_and_nothing_else_moves",
    ),
    "distillation": (
        "teacher_engines::test_losses_are_those_of_a_whole_teacher",
        "chain_engines::test_the_chain_ends_as_in_one_process",
    ),
    "load balancing": (
        "sentence_engines::test_losses_agree_step_by_step",
        "shared_ranks::test_the_slower_rank_has_fewer_rows_of_the_same_steps",
    ),
    "adaptive optimisers": ("optimizer_engines::test_losses_agree_step_by_step",),
    "sparse training": ("zero_engines::test_the_saved_zeros_are_those_asked_for",),
    "caching": ("cached_teacher::test_two_ranks_read_one_cache",),
    "data loading": ("engines::test_rows_that_are_read_ahead_are_the_same",),
    "hybrid parallelism": (
        "mesh_engines::test_the_engine_that_ran_is_the_one_asked_for",
        "mesh_engines::test_a_rank_keeps_its_part_of_the_bytes",
    ),
}
"""Row -> file and test."""


def test_every_row_has_its_tests() -> None:
    assert list(TESTS) == re.findall(r"^\| (?!strategy )(.+?) \|", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("test", sorted(set(chain(*TESTS.values()))))
def test_it_is_there_among_those_of_several_processes(test: str) -> None:
    name, _, function = test.partition("::")
    tree = ast.parse((HERE / f"test_{name}.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    of_file = [line for line in map(ast.unparse, tree.body) if line.startswith("pytestmark = ")]
    marks = " ".join([*map(ast.unparse, found.decorator_list), *of_file])
    assert "pytest.mark.distributed" in marks
    assert not re.search(r"\b(skip|skipif|xfail)\b", marks + ast.unparse(found))
