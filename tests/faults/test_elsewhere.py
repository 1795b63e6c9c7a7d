# ruff: noqa: E501
"""Rows whose tests live with what they are about."""

from table import elsewhere

_ROWS = (
    ("D1", "a swap that does not take", "no result", "failed", "tests/engine/test_swap.py::test_a_copy_that_did_not_happen_is_caught"),
    ("D3", "activations that are not finite", "refused, the engine discarded", "rejected:nonfinite_activations",
     "tests/test_worker.py::test_a_model_that_overflows_is_refused_wherever_it_does"),
    ("D4", "noise of batching", "measured, and taken off", "noise floor", "tests/test_sweep.py::test_base_against_itself_in_another_batching_is_exactly_zero"),
    ("D5", "ties, and fewer active features than k", "the lowest index; -1 where inactive", "ok",
     "tests/kernels/test_reference.py::test_selection_is_stable_whatever_ties"),
    ("D6", "an SAE of another base", "usage error", "usage error", "tests/test_gate.py::test_a_base_at_its_bounds_passes_and_beyond_them_is_refused_by_name"),
    ("D7", "an SAE's file that is torn or foreign", "usage error", "usage error", "tests/test_sae_spec.py::test_damaged_weights_are_refused_before_use"),
    ("D8", "prompts too long, special tokens within text", "cut and counted; never scored", "ok", "tests/test_suites.py::test_prompts_are_cut_and_counted"),
    ("D14", "a bit that flips on the device", "no result", "failed", "tests/engine/test_swap.py::test_a_bit_that_flips_on_the_device_during_the_swap_gives_no_result"),
    ("D15", "a candidate that hangs", "given up after cluster.unit_timeout_s", "failed", "tests/test_driver.py::test_a_candidate_that_hangs_is_given_up"),
    ("E1", "a kill at any step of a commit", "absent or whole", "ok", "tests/test_store.py::test_a_kill_at_any_step_leaves_the_unit_absent_or_whole"),
    ("E5", "two writers of one unit", "one wins", "ok", "tests/test_store.py::test_of_many_writers_exactly_one_wins"),
    ("E6", "two sweeps at once", "the second is told who the first is", "exit 2",
     "tests/test_lease.py::test_the_second_of_two_processes_is_told_who_the_first_is"),
    ("E7", "a disk that is full while a shard is written", "nothing partial is seen", "ok", "tests/test_store.py::test_a_failed_write_leaves_nothing_and_can_be_tried_again"),
    ("E9", "a shard that is torn, or lost a bit", "computed again", "ok", "tests/test_store.py::test_a_damaged_shard_is_refused_and_a_new_attempt_repairs_it"),
    ("E12", "a filesystem without hard links", "named", "usage error", "tests/test_store.py::test_a_filesystem_without_hard_links_is_named"),
    ("E18", "nothing to audit", "exit 3", "exit 3", "tests/test_sweep.py::test_an_empty_folder_is_nothing_to_audit"),
    ("E20", "downloads that do not fit on the disk", "others make room, or deferred:disk", "deferred:disk",
     "tests/hub/test_fetch.py::test_the_least_recently_used_makes_room_and_what_is_in_use_does_not"),
    ("E22", "secrets in arguments, environments, texts", "nowhere", "ok", "tests/hub/test_fetch.py::test_neither_arguments_nor_environment_of_the_child_hold_the_token"),
    ("E23", "a Ray dashboard that others reach without a token", "`doctor` says so", "wrong",
     "tests/test_doctor.py::test_E23_a_dashboard_that_others_reach_without_a_token_is_wrong"),
    ("E24", "`python -O`", "refused", "usage error", "tests/test_door.py::test_assertions_must_be_on"),
    ("E25", "a package below its security floor", "`doctor` says so", "wrong",
     "tests/test_doctor.py::test_a_version_below_its_floor_is_wrong_and_says_why"),
    ("E26", "a kill while a finding is acknowledged", "that line alone is lost", "ok",
     "tests/test_acknowledgement.py::test_a_kill_at_any_byte_loses_that_line_alone"),
    ("E27", "another site that points its name at a page served here", "refused", "421", "tests/report/test_serve.py::test_only_this_machine_s_names_are_answered"),
    ("F8", "markup, ten-megabyte tokens, hidden letters in texts", "escaped and shortened", "ok", "tests/report/test_html.py::test_text_from_strangers_stays_text"),
    ("F9", "a report of 100,000 models", "at most 5 MB, open in 2 s", "ok", "tests/report/test_large.py::test_it_is_small_and_opens_quickly"),
    ("F10", "Neuronpedia cannot be reached", "links stay; labels from a local export, else from the suites", "ok",
     "tests/test_labels.py::test_a_label_is_the_explanation_where_there_is_one_else_the_evidence"),
    ("F12", "a name that a spreadsheet takes for a formula", "saved as text", "ok",
     "tests/report/test_figures_csv.py::test_what_a_stranger_wrote_is_no_formula"),
    ("F11", "names with markup, mentions, placeholders in SARIF, JUnit, Markdown; the same finding in another sweep",
     "valid by their schemas, text alone; the same fingerprint", "ok",
     "tests/report/test_machine.py::test_a_fingerprint_follows_name_weights_rule_and_suite_alone"),
)  # fmt: skip
for _row, _what, _demanded, _seen, _test in _ROWS:
    elsewhere(_row, _what, demanded=_demanded, seen=_seen, test=_test)
