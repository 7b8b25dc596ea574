"""Which variants of tests run for every commit."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

# The architectures that are tested for every commit: a plain one, biases and a tied head, two alternating kinds of
# layers, transposed matrices, experts, and no attention at all.
FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "mixtral", "mamba")


def nightly_but(commit: Collection[str], names: Iterable[str]) -> list[Any]:
    """Names as parameters of a test, all nightly except those of ``commit``."""
    return [name if name in commit else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def architectures(names: Iterable[str]) -> list[Any]:
    """Architectures as parameters of a test, all nightly except for six families."""
    return nightly_but(FAMILIES, names)


# The variants of a test that run for every commit, by id. The others are nightly, because they take seconds and what
# they would find is also found by one of these, or by another test that is named.
COMMIT_VARIANTS: dict[str, Collection[str]] = {
    "test_answers_kept::test_the_best_keep_their_answers_and_no_others": ("5-1", "3-2"),
    "test_change::test_it_is_that_of_the_plain_formula": (
        "dtype0-task_arithmetic", "dtype0-dare_linear", "dtype1-ties", "dtype1-linear",
    ),
    "test_coarse_to_fine::test_killed_at_every_write_it_is_the_same_search": ("generational",),
    "test_combined::test_intervals_hold_the_truth_all_at_once_as_often_as_they_say": (
        "True-True-mix0", "False-False-mix1",
    ),
    "test_commands::test_the_status_of_a_search_that_has_not_ended_says_how_to_go_on": ("interrupted", "running"),
    "test_control::test_two_end_it_in_the_midst_of_a_computation": ("numbers1",),
    "test_decoding::test_out_of_memory_halves_the_rows_and_goes_on": (
        "table-auto-0", "table-12-7", "batches-auto-7", "batches-12-0",
    ),
    "test_descents::test_a_search_that_is_killed_at_any_write_is_the_same": ("1-True",),
    "test_differences::test_a_source_alone_has_its_own_settings_and_a_merge_those_of_the_tokenizers_source": (
        "rotary base", "eps of norms", "kinds of attention", "experts for a token", "the order of blocks",
    ),
    "test_diversity::test_four_of_a_population_solve_more_together_than_four_of_chance": ("settings1",),
    "test_driver::test_killed_at_every_write_and_resumed_it_is_the_same_search": ("cma", "tpe"),
    "test_evaluators_function::test_a_file_that_ends_as_it_is_loaded_is_refused": (
        "exit", "the process", "never",
    ),
    "test_evaluators_function::test_a_function_that_takes_all_memory_is_ended_and_the_next_call_is_answered": (
        "after an answer", "a process that it starts",
    ),
    "test_evaluators_function::test_however_it_ends_the_next_call_is_answered": (
        "exit", "the process", "never",
    ),
    "test_faults_outside::test_a_source_that_changes_stops_the_search_before_anything_of_it_counts": (
        "overwritten", "tokenizer",
    ),
    # Every method is held to its contract, and run whole by test_every_tensor_is_what_its_method_makes_of_it.
    "test_merging_device::test_a_device_makes_what_the_compiled_passes_make": (
        "linear", "slerp", "ties", "dare_ties", "della", "sce", "gram", "tsv", "cabs",
    ),
    "test_merging_device::test_the_definitions_compile_without_a_break": ("ties", "della"),
    "test_merging_materialise::test_an_adapter_is_folded_into_a_tensor_once_to_plan_and_once_to_make": (
        "linear", "slerp", "task_arithmetic", "ties", "dare_ties", "della", "sce", "gram", "tsv", "pcb",
    ),
    "test_model_references::test_every_command_scores_the_same": ("lora-float32",),
    "test_object_storage::test_an_upload_that_breaks_anywhere_shows_no_model_and_is_gone_on_with": ("s3",),
    "test_picks::test_the_number_that_decides_stands_in_every_place_alike": ("mix0",),
    "test_prompts::test_an_item_beyond_the_context_is_told_and_costs_itself": (
        "likelihood-search", "mgsm-held_out", "lm_eval-search",
    ),
    "test_refits::test_killed_at_any_transaction_it_is_the_search_that_was_not": ("generational-True",),
    "test_service_browser::test_a_page_is_sound_in_light_in_dark_and_on_a_phone": ("each-search", "each-new"),
    "test_service_browser::test_html_in_texts_is_shown_as_text": ("search",),
    "test_service_limits::test_a_number_of_the_dashboard_that_is_none_is_refused": ("x", "1e3"),
    "test_steady::test_killed_at_every_write_it_goes_on_and_loses_nothing": ("race, screen and constraint",),
    "test_steady::test_with_one_worker_a_killed_search_is_the_same_search": ("race with item response",),
    "test_store_outage::test_messages_cut_anywhere_change_nothing": tuple(
        f"{first}-{when}" for first in (0, 18) for when in ("before", "after")
    ),
}  # fmt: skip

# Contract tests that run for every commit only for these classes: one for each library or each kernel.
COMMIT_CLASSES: dict[str, Collection[str]] = {
    "test_same_in_another_process": ("TestCma", "TestTpe", "TestCatCma"),  # which starts a process
    "test_finite_in_gives_finite_out": (  # which compiles passes for every number of sources
        "TestLinear", "TestSlerp", "TestKarcher", "TestDareTies", "TestDella", "TestSce", "TestRam", "TestTsv",
    ),
}  # fmt: skip


def mark_variants(items: Sequence[pytest.Item], whole: bool) -> None:
    """Mark as nightly all variants that ``COMMIT_VARIANTS`` and ``COMMIT_CLASSES`` do not name.

    Args:
        items: the collected tests.
        whole: whether complete files were collected. If none of a test's named variants exists then, all run for every
            commit, with a warning: the test was changed, and the table was not.
    """
    variants: dict[str, dict[str, pytest.Item]] = {}
    for item in items:
        name, _, variant = item.name.rstrip("]").partition("[")
        if (test := f"{item.path.stem}::{name}") in COMMIT_VARIANTS:
            variants.setdefault(test, {})[variant] = item
        if name in COMMIT_CLASSES and item.parent is not None and item.parent.name not in COMMIT_CLASSES[name]:
            item.add_marker("nightly")
    for test, found in variants.items():
        if whole and not found.keys() & set(COMMIT_VARIANTS[test]):
            warnings.warn(f"tests/helpers_tiers.py names no variant of {test} that there is", stacklevel=1)
            continue
        for variant, item in found.items():
            if variant not in COMMIT_VARIANTS[test]:
                item.add_marker("nightly")
