"""Tests left to the longer suites because of their measured time; one that is not named here is in the core suite.

The core suite answers within minutes; `.ci/run` adds the tests marked `slow`; those marked `nightly` repeat on further
models, or for longer, what others assert, and run with `make nightly`. Times come from `pytest --durations=0`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

#: Beginnings of test names that take several seconds, most of it in a whole run or an ONNX export.
SLOW = (
    "tests/cli/test_measure.py::test_a_copied_run_is_measured_without_the_models_source",
    "tests/cli/test_measure.py::test_what_cannot_run_here_is_built_and_never_passes",
    "tests/cli/test_measure.py::test_with_the_source_accuracy_is_measured",
    "tests/stages/test_interrupts.py::test_an_interrupted_run_says_how_to_go_on_and_goes_on",
    "tests/stages/test_sweep.py::test_one_machine_needs_no_code_of_clusters",
    "tests/stages/test_sweep.py::test_a_sweep_is_scored_once_and_every_run_stands_alone",
    "tests/engines/test_tensorrt.py::test_an_exported_graph_declares_its_dynamic_dimensions",
    "tests/engines/test_torch.py::test_the_program_runs_without_our_code_and_without_the_models",
    "tests/engines/test_openvino.py::test_nncf_reports_nothing_over_the_network",
    "tests/export/test_export.py::test_every_batch_and_length_up_to_the_maximum",
    "tests/export/test_export.py::test_the_same_model_gives_the_same_file",
    "tests/export/test_external_data.py::test_a_run_ships_and_is_measured_elsewhere_with_two_files_per_graph",
    "tests/export/test_external_data.py::test_the_same_numbers_as_one_file_in_every_precision",
    "tests/fidelity/test_hybrids.py::test_a_hybrid_goes_the_whole_way_to_its_graph",
    "tests/fidelity/test_images.py::",
    "tests/fidelity/test_labels.py::",
    "tests/fidelity/test_sentence_transformers.py::test_embeddings[bert",
    "tests/fidelity/test_sentence_transformers.py::test_scores_of_pairs",
    "tests/formats/test_folders.py::",
    "tests/fuzz/test_runs.py::test_commands_on_a_folder_that_fits_its_manifest",
    "tests/pruning/test_token_merging.py::test_onnxruntime_computes_it_at_any_batch[bert",
    "tests/pruning/test_token_merging.py::test_onnxruntime_computes_it_at_any_batch[deit",
    "tests/repair/test_relu.py::test_looking_through_the_relu_helps_behind_it[resnet-torchvision]",
    "tests/robust/test_trouble.py::test_an_artefact_that_vanishes_between_stages",
    "tests/scoring/test_optin.py::test_few_probes_rank_as_many_do[bert]",
    "tests/scoring/test_optin.py::test_few_probes_rank_as_many_do[resnet-timm]",
    "tests/scoring/test_shards.py::test_another_number_of_threads_is_float32_rounding",
    "tests/stages/test_finetune_run.py::",
    "tests/stages/test_latency_run.py::test_a_run_by_the_clock",
    "tests/stages/test_merging_run.py::",
    "tests/stages/test_openvino_run.py::test_four_engines_are_measured_and_served_by_its_own_backend[int8",
    "tests/stages/test_openvino_run.py::test_other_commands_find_what_the_run_quantised",
    "tests/stages/test_openvino_run.py::test_fp32_is_served_by_a_model_of_the_python_backend",
    "tests/stages/test_pipeline.py::test_a_convolutional_network_of_the_users_own[True-False]",
    "tests/stages/test_pipeline.py::test_a_convolutional_network_of_the_users_own[rescale-False]",
    "tests/stages/test_pipeline.py::test_a_python_source_runs_through",
    "tests/stages/test_pipeline.py::test_a_run_from_recipe_to_report[bert_recipe]",
    "tests/stages/test_pipeline.py::test_a_run_from_recipe_to_report[classifier_recipe]",
    "tests/stages/test_pipeline.py::test_force_does_everything_again",
    "tests/stages/test_pipeline.py::test_gauss_newton_is_a_choice_of_the_recipe",
    "tests/stages/test_pipeline.py::test_the_smallest_model_that_keeps_the_accuracy",
    "tests/stages/test_pipeline.py::test_without_repair_the_onnx_is_the_masked_model",
    "tests/stages/test_precision_run.py::test_four_engines_are_built_measured_and_reported[fp8",
    "tests/stages/test_precision_run.py::test_four_engines_are_built_measured_and_reported[int8-more2",
    "tests/stages/test_precision_run.py::test_four_engines_are_built_measured_and_reported[int8-more3",
    "tests/studies/test_folder.py::test_commands_find_their_siblings_from_the_root",
    "tests/test_docs_code.py::test_the_commands_and_python_of_a_page_run",
    "tests/test_examples.py::test_a_quick_example_runs",
    "tests/test_recipes.py::test_every_recipe_prunes_a_small_stand_in[cifar_vgg16]",
    "tests/test_segmentation.py::test_a_run_from_scenes_to_a_served_model",
    "tests/test_text_tasks.py::test_a_run_from_recipe_to_report",
    "tests/units/test_topology.py::test_the_repair_brings_the_output_back[hrnet]",
    "tests/workdir/test_scratch.py::test_exports_do_not_add_up_in_memory",
    "tests/studies/test_cpu_engines.py::test_all_forms_of_a_small_run",
)

#: Beginnings of names of tests that repeat, on further models or many times, what quicker ones assert.
NIGHTLY = (
    "tests/cli/test_first_hour.py::test_init_run_and_load_with_a_model_of_ones_own[encoder]",
    "tests/distributed/test_ray.py::test_a_sweep_of_a_users_model_and_images_on_this_machines_workers",
    "tests/distributed/test_ray.py::test_a_users_model_and_images_travel_as_values",
    "tests/distributed/test_ray.py::test_a_worker_that_hangs_is_replaced_and_the_run_gives_up_in_the_end",
    "tests/engines/test_torch.py::test_compiled_it_computes_the_same",
    "tests/robust/test_replay.py::",
    "tests/robust/test_resume.py::test_fifty_kills_end_as_an_undisturbed_run",
    "tests/robust/test_soak.py::",
    "tests/stages/test_finetune_run.py::test_a_run_of_the_text_tower[siglip]",
    "tests/stages/test_interrupts.py::test_every_stage_can_be_interrupted[15]",
    "tests/stages/test_latency_run.py::test_a_run_by_the_clock[classifier_recipe]",
    "tests/stages/test_latency_run.py::test_tokens_that_a_schedule_merges_are_in_the_table",
    "tests/test_docs_code.py::test_what_takes_longer_runs_too",
    "tests/test_examples.py::test_an_example_runs[01_quickstart.sh]",
    "tests/test_examples.py::test_an_example_runs[06_sweep.sh]",
    "tests/test_real_models.py::",
    "tests/test_recipes.py::test_every_recipe_prunes_a_small_stand_in[segmentation/mask2former_cityscapes]",
    "tests/triton/test_minilm.py::",
)


#: A time in seconds since 1970, after which tests of the longer suites are skipped: `.ci/run` sets it, because machines
#: that run it differ by a factor of three, and it must end within its limit on all of them.
UNTIL = "OPTIN_EXPORT_TESTS_UNTIL"
LEFT_OUT = "left out: the time that .ci/run has on this machine is over"
LONGER = ("slow", "shared_data", "ray", "rtx", "triton", "browser")


def too_late(marks: Iterable[str], until: str | None, now: float) -> bool:
    """Whether a test with these marks is left out."""
    return bool(until) and now > float(until or 0) and any(mark in LONGER for mark in marks)


#: Names of the lists that fit no test, if every test was collected.
UNUSED = pytest.StashKey[list[str]]()


def mark_tiers(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Mark tests by the two lists."""
    unused = {*SLOW, *NIGHTLY} if config.args == config.getini("testpaths") else set()
    for item in items:
        for names, mark in ((SLOW, pytest.mark.slow), (NIGHTLY, pytest.mark.nightly)):
            if found := [name for name in names if item.nodeid.startswith(name)]:
                unused.difference_update(found)
                item.add_marker(mark)
    config.stash[UNUSED] = sorted(unused)
