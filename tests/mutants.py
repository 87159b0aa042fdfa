"""Wrong lines of code, and the tests that notice them: `make mutants`, or `python -m tests.mutants [WORD ...]`.

Each mutant is one small mistake in a copy of the tree, against which the tests named for it are run. A mutant that they all pass has survived:
what its line says, nobody checks. So has one whose text is no longer there, until somebody looks: adapt it with the code.

Belongs here: the list, and the loop over it. Does not belong here: mutants that change nothing, so that no test could fail: an infinite float to
bfloat16 by the stochastic path (adding 16 bits to it changes none that is kept), a soft prompt's positions counted from the end of the hidden
states or of the row (they are the same ones), 65520 to fp16 by the general path (its tie goes to infinity), a 32-bit division where the divisor
alone is larger (then the quotient is 0).

Cost: a fork and its tests each, seconds, and a build of the extension for those in csrc/cpu. Words choose mutants by file or reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 600  # seconds for the tests of one mutant; who needs more has been stopped by it, in a loop without end


class Mutant(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`: `wrong` is then the case, and one of `tests` fails."""

    file: str
    wrong: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """Whether the extension has it; what else is in csrc, tests compile themselves."""
        return self.file.startswith("csrc/cpu/")


ONE = "tests/optim/test_decision.py::test_one_direction_is_decided_on_numbers_as_on_arrays"
E = "tests/optim/test_estimators.py"
J = "tests/journal/test_format.py"
M = "tests/optim/test_methods.py"
W = "tests/journal/test_writer.py"
S = "tests/finetune/test_scoring.py"
R = "tests/optim/test_rules.py"
N = "tests/kernels/test_noise_h.py"
H = "tests/kernels/test_cuda_host.py"
U = "tests/kernels/test_update.py"
C = "tests/kernels/test_cpu.py"
P = "tests/finetune/test_report.py"
AWAY = "tests/test_offload_workers.py"
SUITE = "tests/finetune/test_suite.py"
PACKED = "tests/finetune/test_packed.py"
V = "tests/finetune/test_evaluate.py"
F = "tests/finetune/test_generation.py"
UNIT = "tests/optim/test_unit.py"
TRL = "tests/finetune/test_trl.py"
TR = "tests/finetune/test_trainer.py"
D = "tests/test_distributed.py"
TEAM = "tests/finetune/test_team.py"
Q = "tests/test_quantized.py"

MUTANTS = tuple(Mutant(*m) for m in [
    ("zo_kernels/_backends/triton.py", "a decay of one pass is its own", "kind, stochastic, n, True, factor)", "kind, stochastic, n, True, min(factor, 1))",
     ("tests/kernels/test_triton_host.py",)),
    ("zo_kernels/_backends/triton.py", "roundings have kernels of their own", "stochastic, n, True, factor)", "False, n, True, factor)",
     ("tests/kernels/test_triton_host.py",)),
    ("zo_kernels/_backends/triton.py", "a ready launch has the constants in the kernel's order",
     "for name in kernel.arg_names if name in given", "for name in given",
     ("tests/kernels/test_triton_host.py",)),
    ("zo_kernels/_backends/triton.py", "a launch is on its plan's device", "if torch._C._cuda_getDevice() != plan.device.index:", "if False:",
     ("tests/kernels/test_devices.py",)),
    ("zo_kernels/_backends/triton.py", "tables are kept for another stream's kernels", "if raw != stream and uploaded", "if raw == stream and uploaded",
     ("tests/kernels/test_devices.py",)),
    ("zo_kernels/optim/decide.py", "one direction is clipped on both sides", "g = min(max(g, -limit), limit)", "g = min(g, limit)", (ONE,)),
    ("zo_kernels/optim/decide.py", "a clipped g is said to be", "clipped = clipped or abs(g) > limit", "clipped = clipped or g > limit", (ONE,)),
    ("zo_kernels/optim/decide.py", "a group ascends", "method.rule.decide(sign * g, lr, None)", "method.rule.decide(-abs(sign) * g, lr, None)", (ONE,)),
    ("zo_kernels/optim/estimators.py", "one direction's distance is 2 eps", "(losses[0] - losses[1]) / (2 * eps)\n        return (losses[0::2]",
     "(losses[0] - losses[1]) / eps\n        return (losses[0::2]", (f"{E}::test_the_loss_of_a_step_is_what_its_losses_tell",)),
    ("zo_kernels/views/fronts.py", "a value with a gradient is noticed", "        return touched", "        return False", ("tests/optim/test_faults.py",)),
    ("zo_kernels/parameters.py", "a parameter that is frozen is noticed", "looks.TRAINED.first_change(self.held, self.stand_as) < 0",
     "looks.MEMORY.first_change(self.held, self.lie_at) < 0", ("tests/optim/test_faults.py",)),
    ("zo_kernels/views/base.py", "writes are seen in the one look", "(*self.versions, *self.lie_at)) >= 0", "(*self.versions, *self.lie_at)) > 0",
     ("tests/optim/test_faults.py",)),
    ("python/zo_finetune/frozen.py", "the cut is where trained weights are read last", "found[p] = min(called", "found[p] = max(called",
     ("tests/finetune/test_frozen.py::test_the_cut_is_before_what_reads_trained_weights",)),
    ("python/zo_finetune/frozen.py", "kept states stand at the end of their row", "row[: len(tokens)] = store", "row[-len(tokens) :] = store",
     ("tests/finetune/test_frozen.py::test_scores_are_those_without",)),
    ("python/zo_finetune/cached.py", "later blocks may read more than states", "if not torch.equal(plain, again) and", "if False and",
     ("tests/finetune/test_frozen.py::test_blocks_that_read_more_than_states_are_noticed",)),
    ("python/zo_finetune/dominant.py", "the dominant block is where activations sink most", "block = max(range", "block = min(range",
     ("tests/finetune/test_frozen.py::test_the_block_behind_which_activations_stand_out",)),
    ("python/zo_finetune/cached.py", "what runs once a step ends behind what it moves first",
     "min(self.cuts.get(name, 0) for", "max(self.cuts.get(name, 0) for",
     ("tests/finetune/test_frozen.py::test_what_lies_below_a_steps_block_runs_once_a_step",)),
    ("python/zo_finetune/cached.py", "blocks below a step's may be read twice",
     "if not torch.equal(scorer.token_log_probs(batch), scorer.token_log_probs(batch)):", "if False:",
     ("tests/finetune/test_frozen.py::test_no_forward_begins_above_blocks_that_are_read_twice",)),
    ("zo_kernels/optim/step.py", "the block that is named is the one after", "parts[blocks.at(self.steps, len", "parts[blocks.at(self.steps + 1, len",
     ("tests/optim/test_methods.py::test_an_optimizer_names_the_block_of_its_next_step",)),
    ("python/zo_finetune/inputs.py", "a look begins above matrices that it looks at",
     "if states is not None and any(map(looked_at, states.lower.blocks)):", "if False:",
     ("tests/finetune/test_inputs.py::test_a_look_begins_from_kept_states_where_all_that_it_looks_at_lies_above",)),
    ("zo_kernels/optim/estimators.py", "the loss of several queries is the first pair's",
     "without its operation\n        return torch.as_tensor(losses).mean()\n", "\n        return torch.as_tensor(losses)[:2].mean()\n",
     (f"{E}::test_the_loss_of_a_step_is_what_its_losses_tell",)),
    ("zo_kernels/optim/shaping.py", "a loss that is not finite has a rank", "torch.where(finite, ranks, torch.nan)", "ranks",
     ("tests/optim/test_shaping.py::test_equal_rewards_and_such_that_are_no_numbers",)),
    ("zo_kernels/optim/estimators.py", "a mirrored pair counts twice", "(u[0::2] - u[1::2]) / (2 * eps) if", "(u[0::2] - u[1::2]) / eps if",
     (f"{E}::test_the_loss_of_a_step_is_what_its_losses_tell",)),
    ("zo_kernels/optim/movement.py", "a step moves weights by what a rule tried", "_terms(run, replace(share, coefs=share.coefs[:1]), weights)",
     "_terms(run, share, weights)", ("tests/optim/test_movement.py::test_it_is_what_the_weights_moved",)),
    ("zo_kernels/optim/clip.py", "a quantile counts gradients that are no numbers",
     "torch.where(finite, values, torch.nan).nanquantile(self.q)", "values.quantile(self.q)",
     ("tests/optim/test_device_numbers.py::test_a_gradient_that_is_no_number_clips_no_later_step",)),
    ("zo_kernels/optim/clip.py", "a quantile is taken of too few gradients",
     "torch.where(finite.sum() >= self.least, ", "torch.where(finite.sum() >= 1, ",
     ("tests/optim/test_device_numbers.py::test_a_quantile_is_of_the_gradients_that_are_numbers",)),
    ("zo_kernels/optim/unit.py", "a step that is skipped counts in the average of g^2 on a device", "torch.where(decision.go, new, rows)", "new",
     (f"{UNIT}::test_a_step_that_is_skipped_leaves_the_average",)),
    ("zo_kernels/optim/unit.py", "the average of g^2 keeps its bias", "1 + beta * w]", "1 + 0 * beta * w]",
     (f"{UNIT}::test_a_quotient_is_bounded_and_tensors_have_the_bits_of_numbers",)),
    ("zo_kernels/optim/decide.py", "a candidate's number takes the place of what g was divided by",
     "choose(losses, before[:, : method.own]), before[:, method.own :]]", "choose(losses, before[:, : method.own]), before[:, : -method.own]]",
     (f"{UNIT}::test_s_is_recorded_behind_the_rules_numbers",)),
    ("zo_kernels/optim/decide.py", "the clipped flag is the first group's", "bool((abs(raw) > limit).any())", "bool((abs(raw[0]) > limit).any())",
     ("tests/optim/test_defects.py::test_a_clip_in_any_group_is_recorded",)),
    ("zo_kernels/journal/reader.py", "a failed step in scratch mode is read",
     "failed & ((flags & FAILED == FAILED) | skipped | (header.perturbation == \"scratch\"))", "failed & ((flags & FAILED == FAILED) | skipped)",
     (f"{J}::test_no_step_fails_in_scratch_mode",)),
    ("zo_kernels/journal/writer.py", "a failed step in scratch mode is written",
     "failed not in (\"plus\", \"minus\") or flags[0] or eps is None", "failed not in (\"plus\", \"minus\") or flags[0]",
     (f"{W}::test_bad_arguments_change_nothing",)),
    ("zo_kernels/journal/reader.py", "the last tags of a step may be beyond 2^32 when read",
     "tags + header.terms > 1 << 32", "tags > 1 << 32", (f"{J}::test_the_last_direction_has_the_last_tag",)),
    ("zo_kernels/journal/writer.py", "the last tags of a step may be beyond 2^32 when written",
     "tag + header.terms > 1 << 32:", "tag + 1 > 1 << 32:", (f"{J}::test_the_last_direction_has_the_last_tag",)),
    ("zo_kernels/views/inplace.py", "a lazy run goes ahead of its last step",
     "tag + 1 >= 1 << 32", "tag >= 1 << 32", ("tests/optim/test_lazy.py::test_the_last_step_of_all_does_not_go_ahead",)),
    ("csrc/cuda/update.cuh", "a history's coefficients come from shared memory that ends before them",
     "const Term t = k < STAGE ? terms[k] : make_term<KIND>(pass, k);", "const Term t = terms[k % STAGE];",
     ("tests/kernels/test_update.py::test_more_terms_than_shared_memory_holds",)),
    # losses, balanced batches
    ("python/zo_finetune/losses.py", "pairs of examples with the same label count", "torch.where(differ, -logsigmoid(gaps + gaps.T), 0.0).sum() / differ.sum()",
     "-logsigmoid(gaps + gaps.T).sum() / differ.sum()", ("tests/finetune/test_losses.py::test_pairs_are_those_of_a_loop",)),
    ("python/zo_finetune/losses.py", "a choice loss counts examples without a pair", "return each.sum() / (counts > 0).sum()\n\n\ndef token_loss",
     "return each.mean()\n\n\ndef token_loss", ("tests/finetune/test_losses.py::test_choices_are_those_of_a_loop",)),
    ("python/zo_finetune/data.py", "labels of a balanced batch stand in turn, so that every second one has one label",
     "places = sorted(range(start, start + self.batch_size), key=lambda k: k % n)", "places = range(start, start + self.batch_size)",
     ("tests/finetune/test_pairs.py::test_a_balanced_batch_holds_each_label_equally_often",)),
    # estimators, rules, directions, blocks
    ("zo_kernels/optim/estimators.py", "two-sided g over eps instead of 2 eps",
     "(losses[0::2] - losses[1::2]) / (2 * eps)", "(losses[0::2] - losses[1::2]) / eps",
     (f"{E}::test_the_loss_of_a_step_is_what_its_losses_tell",)),
    ("zo_kernels/optim/estimators.py", "one-sided points are at minus eps", "[[], *([(i, 1.0)]", "[[], *([(i, -1.0)]",
     (f"{M}::test_each_step_is_the_formula_of_the_losses_it_saw[one-sided-3-scratch-bf16]",)),
    ("zo_kernels/optim/estimators.py", "the curvature over eps^2 instead of 2 eps^2", "/ (2 * eps * eps)", "/ (eps * eps)",
     (f"{M}::test_steps_equal_the_float64_reference[hizoo-scratch-0.0]",)),
    ("zo_kernels/optim/estimators.py", "a forward gradient at a loss that is no number", "(losses[0, 1] + 0 * losses[0, 0])", "losses[0, 1]",
     ("tests/optim/test_defects.py::test_one_loss_that_is_no_number_is_enough[forward-inf]",)),
    ("zo_kernels/optim/rules.py", "sign(0) is 1", "(gs > 0) * 1.0 - (gs < 0) * 1.0", "(gs >= 0) * 1.0 - (gs < 0) * 1.0",
     (f"{R}::test_the_sign_of_equal_losses_is_no_step",)),
    ("zo_kernels/optim/rules.py", "a conservative step back wins a tie", "(ahead < stay) & (ahead <= back)", "(ahead < stay) & (ahead < back)",
     (f"{R}::test_a_conservative_step_is_the_best_of_three",)),
    ("zo_kernels/optim/rules.py", "a conservative step that is no better is taken", "(ahead < stay) & (ahead <= back)",
     "(ahead <= stay) & (ahead <= back)",
     (f"{R}::test_a_conservative_step_is_the_best_of_three",)),
    ("zo_kernels/optim/states.py", "a skipped step is live in a history",
     "live = share.go.double() if isinstance(share.go, Tensor) else int(share.go)", "live = 1",
     (f"{R}::test_a_skipped_step_has_no_share_in_a_recomputed_adam",)),
    ("csrc/cpu/mask.cpp", "a weight at the threshold takes no part", "return bits + 1;", "return bits;",
     (f"{M}::test_steps_equal_the_float64_reference[sparse-mezo-scratch-0.3]",)),
    ("zo_kernels/optim/directions.py", "layer scales of 11 bits", "round(mantissa * 4096) / 4096", "round(mantissa * 2048) / 2048",
     (f"{M}::test_steps_equal_the_float64_reference[layer-scale-scratch-0.3]",)),
    ("zo_kernels/optim/directions.py", "a turn's weight is not forgotten", "self.config.beta * weight + 1", "weight + 1",
     (f"{M}::test_steps_equal_the_float64_reference[layer-scale-gradient-scratch-0.3]",)),
    ("zo_kernels/optim/factored.py", "V of the run's start for ever", "v = step // self.config.every", "v = 0",
     (f"{M}::test_steps_equal_the_float64_reference[lozo-scratch-0.3]",)),
    ("zo_kernels/optim/directions.py", "a random mask for ever", "self.mask_tag = step // self.config.every", "self.mask_tag = 0",
     (f"{M}::test_steps_equal_the_float64_reference[random-sparse-scratch-0.0]",)),
    ("zo_kernels/optim/blocks.py", "the order of random blocks does not depend on the seed", "f\"block {seed} {turn}\"", "f\"block {turn}\"",
     (f"{R}::test_the_turns_of_random_blocks",)),
    ("zo_kernels/lowrank.py", "V begins where U does", "offsets=[FIRST_V] * len(v)", "offsets=[0] * len(v)",
     ("tests/kernels/test_lowrank.py::test_factors_are_noise_of_12_bits",)),
    ("zo_kernels/lowrank.py", "U on the right has the numbers of one on the left",
     "offsets=[FIRST_V * right for right in on_the_right]", "offsets=[0 for right in on_the_right]",
     (f"{M}::test_steps_equal_the_float64_reference[input-subspace-scratch-0.3]",)),
    ("zo_kernels/lowrank.py", "a sum of factors is not rounded to 12 bits",
     "                round_to_12_bits_(entry.dst)\n", "",
     ("tests/optim/test_input_subspace.py::test_a_sum_of_factors_is_that_of_the_noise_rounded_once",)),
    ("zo_kernels/optim/run.py", "every point of a step has the first direction's U",
     "        self.direction.follow(shifts, view.restore)\n", "",
     (f"{M}::test_steps_equal_the_float64_reference[lozo-3-inplace-0.3]",)),
    ("zo_kernels/optim/factored.py", "the next U is drawn while the weights stand along the last one",
     "        back()\n", "",
     ("tests/optim/test_input_subspace.py::test_the_next_u_is_drawn_after_the_weights_came_back",)),
    ("zo_kernels/optim/method.py", "the update of several directions goes back along their sum",
     "return self.rule.stateful or (self.direction.factored and self.estimator.directions > 1)", "return self.rule.stateful",
     (f"{M}::test_steps_equal_the_float64_reference[input-subspace-fzoo-inplace-0.0]",)),
    ("zo_kernels/optim/factored.py", "what is to be held still is perturbed",
     "        return self.found\n", "        return None\n",
     ("tests/optim/test_input_subspace.py::test_what_is_held_still_neither_moves_nor_decays",)),
    ("zo_kernels/optim/inputs.py", "eigenvectors keep the sign that they were found with",
     "q * largest.sign() *", "q *",
     ("tests/optim/test_inputs.py::test_factors_are_the_leading_components_with_their_power",)),
    ("zo_kernels/optim/inputs.py", "factors of inputs of another size move outputs by as much more",
     "    scale = math.sqrt(mean / float((weights.square() * top).mean()))", "    scale = 1.0",
     ("tests/optim/test_inputs.py::test_factors_are_the_leading_components_with_their_power",)),
    ("zo_kernels/journal/factors.py", "a replay takes other factors than the run's",
     "    if found.sha256 != sha256:", "    if False:",
     ("tests/optim/test_input_subspace.py::test_the_factors_lie_beside_the_journal_and_a_replay_takes_them_from_there",)),
    ("zo_kernels/lowrank.py", "noise is added to the factors of the last step", "            flat.zero_()\n", "",
     ("tests/kernels/test_lowrank.py::test_fill_keeps_v_and_the_addresses",)),
    # the journal and replays
    ("zo_kernels/journal/writer.py", "a failed step uses up its tag", "tag + (self.header.terms if failed is None else 0)", "tag + self.header.terms",
     (f"{W}::test_a_failed_step_is_tried_again_with_its_tag",)),
    ("zo_kernels/journal/reader.py", "a failed step read uses up its tag", "(0 if records[\"flags\"][-1] & FAILED else header.terms)", "header.terms",
     (f"{W}::test_a_failed_step_is_tried_again_with_its_tag",)),
    ("zo_kernels/journal/reader.py", "tags of a step with several terms may overlap when read", "np.where(failed, 0, header.terms)",
     "np.where(failed, 0, 1)",
     (f"{J}::test_tags_of_steps_do_not_overlap",)),
    ("zo_kernels/journal/reader.py", "records behind the first piece that is read are checked as if they were the first",
     "first + k, header_crc)", "k, header_crc)", (f"{J}::test_records_are_read_in_pieces",)),
    ("zo_kernels/journal/layout.py", "a checksum that does not depend on the file", "zlib.crc32(INDEX.pack(index), header_crc)",
     "zlib.crc32(INDEX.pack(index))",
     (f"{J}::test_records_have_their_place",)),
    ("zo_kernels/journal/layout.py", "a checksum that does not depend on the place", "zlib.crc32(INDEX.pack(index), header_crc)", "header_crc",
     (f"{J}::test_records_have_their_place",)),
    ("zo_kernels/journal/header.py", "a fingerprint depends on the order",
     "for name, dtype, shape, sha256 in sorted(rows, key=lambda row: row[0].encode()):",
     "for name, dtype, shape, sha256 in rows:", (f"{J}::test_fingerprint_depends_on_all_and_only_on_that",)),
    ("zo_kernels/journal/writer.py", "recover keeps more records than are good", "if len(journal) < keep:", "if False:",
     (f"{J}::test_every_flipped_bit_is_noticed",)),
    ("zo_kernels/journal/writer.py", "fsync a record late", "self._unsynced >= self.fsync_every", "self._unsynced > self.fsync_every",
     (f"{W}::test_the_policy_is_kept",)),
    ("zo_kernels/journal/writer.py", "a file that changed behind the writer is appended to", "if status.st_size != end:", "if status.st_size < end:",
     (f"{W}::test_a_file_that_changes_behind_the_writer",)),
    ("zo_kernels/journal/writer.py", "two writers share the lock", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
     (f"{W}::test_a_writer_is_not_copied",)),
    ("zo_kernels/journal/writer.py", "a failed append leaves its bytes", "                os.ftruncate(self._fd, end)\n", "                pass\n",
     (f"{W}::test_a_failed_append_is_not_recorded_and_the_last",)),
    ("zo_kernels/journal/reader.py", "zeros behind the last record are damage", "and not any(chunk):", "and False:",
     (f"{J}::test_zeros_of_a_crashed_file_system_are_a_torn_tail",)),
    ("zo_kernels/journal/header.py", "frozen weights are not compared", "    for name, entry, p in pairs:\n        if (found := digest(p)) != entry.sha256:",
     "    for name, entry, p in pairs[: len(header.parameters)]:\n        if (found := digest(p)) != entry.sha256:",
     (f"{J}::test_verify_base_names_the_first_difference",)),
    ("zo_kernels/replay.py", "a fused replay leaves out the decays behind a step", "* after[1:, None]", "* after[:-1, None]",
     ("tests/optim/test_journal_run.py::test_a_fused_replay_is_closer_to_fp32_than_the_run",)),
    ("zo_kernels/optim/run.py", "a failed first forward is replayed as two", "1 if decision.failed == \"plus\" else 2", "2",
     ("tests/optim/test_journal_run.py::test_failed_steps_are_part_of_the_record",)),
    ("zo_kernels/replay.py", "a replay up to a step takes the failed attempts behind it", "np.flatnonzero(counted)[upto - 1]) + 1]",
     "np.flatnonzero(counted)[upto - 1]) + 2]",
     ("tests/optim/test_journal_run.py::test_replay_and_resume_give_the_bits_of_the_run[scratch-torch.float32-nearest]",)),
    # the application
    ("python/zo_finetune/scoring.py", "long prompts lose their end", "return context[:head] + context[head - room :] if", "return context[:room] if",
     (f"{S}::test_long_prompts_lose_their_beginning",)),
    ("python/zo_finetune/narrow.py", "what mixes tokens is run for some of them", "return _at(forward, index, x, fill=torch.nan) + 0 * mixed",
     "return _at(forward, index, x, fill=torch.nan)", ("tests/finetune/test_frozen.py::test_what_other_positions_read_is_found",)),
    ("python/zo_finetune/narrow.py", "a batch that is scored everywhere shows nothing, and is believed", "if not (scored[:, 1:] & ~scored[:, :-1]).any():",
     "if not scored.any():", ("tests/finetune/test_frozen.py::test_what_other_positions_read_is_found",)),
    ("python/zo_finetune/scoring.py", "a head that is trained runs for the answers' words alone", "or self._trained(self._head):",
     "or False:", (f"{S}::test_contrasts_are_the_scores_but_for_a_number_of_each_example",)),
    ("python/zo_finetune/scoring.py", "a candidate's score is a sum", "self.token_log_probs(batch).sum(-1) / counts, -torch.inf)",
     "self.token_log_probs(batch).sum(-1), -torch.inf)",
     (f"{S}::test_scores_are_the_definition",)),
    ("python/zo_finetune/scoring.py", "the position before the answer's is scored", "hidden[rows, hidden.shape[1] + columns]",
     "hidden[rows, columns - 1]",
     (f"{S}::test_soft_prompts_do_not_shift_the_scored_positions",)),
    ("python/zo_finetune/scoring.py", "a packed batch is read at other tokens", "batch.point_columns] - len(places)", "batch.point_columns] - len(at)",
     (f"{PACKED}::test_losses_are_those_of_padded_rows",)),
    ("python/zo_finetune/packed.py", "positions go on from row to row", ".reshape(-1)[places][None]", ".reshape(-1)[places][None].cumsum(1)",
     (f"{PACKED}::test_log_probabilities_are_those_of_padded_rows",)),
    ("python/zo_finetune/packed.py", "the mask is that of the first tokens", '"q_offset": start, "kv_offset": start', '"q_offset": 0, "kv_offset": 0',
     (f"{PACKED}::test_log_probabilities_are_those_of_padded_rows",)),
    ("python/zo_finetune/packed.py", "a window is forgotten", "return None if made is None or torch.equal", "return None if True or torch.equal",
     (f"{PACKED}::test_log_probabilities_are_those_of_padded_rows",)),
    ("python/zo_finetune/packed.py", "all batches are packed", "self.weights * TOKEN_NS > len(lengths)", "self.weights * TOKEN_NS > -len(lengths)",
     (f"{PACKED}::test_which_lengths_pay",)),
    ("python/zo_finetune/packing.py", "rows that read each other are packed", "if not torch.equal(*others):", "if False:",
     (f"{PACKED}::test_a_model_whose_rows_are_not_by_themselves_is_noticed",)),
    ("python/zo_finetune/run.py", "a resumed run decides anew", '.get("batches", "padded")) != batches:', '.get("batches", "padded")) is None:',
     (f"{PACKED}::test_a_run_goes_on_as_it_began",)),
    ("python/zo_finetune/config.py", "a run of before packs when it goes on", "{**EARLIER, **content} if", "{**EARLIER, \"batches\": \"auto\", **content} if",
     (f"{PACKED}::test_a_run_of_before_goes_on_with_padded_batches",)),
    ("python/zo_finetune/scoring.py", "logits stay in 16 bits", "return logits.float()\n", "return logits\n",
     (f"{S}::test_a_16_bit_model_has_a_float32_loss",)),
    ("python/zo_finetune/losses.py", "the language-model loss is a mean over examples", "wide(log_probs), 0.0).sum() / there.sum()",
     "wide(log_probs), 0.0).sum() / len(there)",
     (f"{S}::test_losses",)),
    ("python/zo_finetune/scoring.py", "a masked model sees its padding", "return input_ids, mask if form == \"masked\" else None",
     "return input_ids, torch.ones_like(mask) if form == \"masked\" else None",
     (f"{S}::test_scores_do_not_depend_on_the_batch",)),
    ("python/zo_finetune/metrics/auc.py", "ties count for nothing in the AUC", "right=True)\n", "right=False)\n",
     ("tests/finetune/test_cli.py::test_auc_and_standard_error",)),
    ("python/zo_finetune/decoding/scores.py", "labels in the order of the examples, scores in that of their lengths",
     "rows = (found[k] for k in range(len(examples)))", "rows = (row for row in found.values())",
     (f"{P}::test_answers_and_labels_belong_together",)),
    ("python/zo_finetune/decoding/scores.py", "a calibrated score is a sum", "torch.where(sums == -torch.inf, sums, sums - anyway)", "sums",
     (f"{V}::test_calibrated_scores_are_differences",)),
    ("python/zo_finetune/evaluate.py", "the majority is the first label's", "counts.max().item()", "counts[0].item()",
     (f"{P}::test_answers_and_labels_belong_together",)),
    ("python/zo_finetune/incontext.py", "an example is shown with its own text", "if self._texts[place := int(draw() * len(self.pool))] != own:",
     "if (place := int(draw() * len(self.pool))) >= 0:", (f"{V}::test_no_example_is_shown_with_its_own_text",)),
    ("python/zo_finetune/incontext.py", "the same demonstrations before each example", "(self.seed << 32) + index", "self.seed << 32",
     (f"{V}::test_demonstrations_are_scored_as_by_hand",)),
    ("python/zo_finetune/intervals.py", "five seeds are taken for many",
     "    total = of_rows + max(0.0, of_seeds - both)\n", "    return 1.0\n    total = of_rows\n",
     ("tests/finetune/test_ranking.py::test_intervals_cover_what_they_say",)),
    ("python/zo_finetune/intervals.py", "the rows of two methods are drawn apart",
     "        generator = np.random.default_rng(seed)\n", "        generator = np.random.default_rng()\n",
     ("tests/finetune/test_ranking.py::test_pairing_narrows_an_interval",)),
    ("python/zo_finetune/intervals.py", "ties count for nothing in a resampled AUC",
     "for side in (\"left\", \"right\"))", "for side in (\"left\", \"left\"))",
     ("tests/finetune/test_ranking.py::test_measures_are_those_of_an_evaluation",)),
    ("python/zo_finetune/runs.py", "a learning rate is chosen by the evaluation rows",
     "numbers.append(on_dev(run_one(tried, root, common), by))", "numbers.append(run_one(tried, root, common)[\"after\"][by])",
     ("tests/finetune/test_ranking.py::test_no_choice_sees_an_evaluation_row",)),
    ("python/zo_finetune/probe.py", "a second right candidate is a wrong one", "k != train.labels[n] and k not in train.right[n]",
     "k != train.labels[n]", ("tests/finetune/test_probe.py::test_every_right_candidate_is_spared",)),
    ("python/zo_finetune/probe.py", "a candidate's state is that of the prompt", "Spot(tokens, len(tokens) - 1)", "Spot(tokens, 0)",
     ("tests/finetune/test_probe.py::test_candidates_of_their_own_share_a_score",)),
    ("python/zo_finetune/metrics/texts.py", "numbers that disagree are worth the other words", "if numbers and not numbers & said:",
     "if not numbers and not said:",
     ("tests/finetune/test_scorers.py::test_drop",)),
    ("python/zo_finetune/metrics/texts.py", "a word counts as often as it is said", "(Counter(said) & Counter(wanted)).total()",
     "sum(w in wanted for w in said)", ("tests/finetune/test_scorers.py::test_squad",)),
    ("python/zo_finetune/decoding/generate.py", "the model's folder says how to generate", "inner.generation_config = GenerationConfig()\n",
     "pass\n", (f"{F}::test_the_folders_configuration_of_generation_changes_nothing",)),
    ("python/zo_finetune/decoding/generate.py", "padding is read", "mask[row, width - len(tokens) :] = 1", "mask[row] = 1",
     (f"{F}::test_texts_are_those_of_a_plain_loop_in_every_batch",)),
    ("python/zo_finetune/decoding/generate.py", "padding in front of a prompt behind a soft one",
     "len(examples[k].prompt) if is_soft(scorer.model) else 0", "0", (f"{F}::test_texts_behind_an_adapter",)),
    ("python/zo_finetune/scoring.py", "a prompt leaves no room for its answer", "len(self.before) - new_tokens(self.max_length)", "len(self.before)",
     (f"{F}::test_a_long_prompt_leaves_room_for_the_answer",)),
    ("python/zo_finetune/objectives/metric.py", "a metric is lowered", "return 1 - self.metric", "return self.metric",
     (f"{F}::test_a_metric_as_objective_is_what_an_evaluation_measures",)),
    ("python/zo_finetune/run_folder.py", "a resumed run has its last evaluation twice", "if e[\"step\"] < steps]", "if e[\"step\"] <= steps]",
     (f"{P}::test_evaluations_of_steps_that_a_resumed_run_will_take_are_cut_off",)),
    ("python/zo_finetune/figures.py", "a running mean that begins with zeros", "/ (k + 1 - max(0, k - window + 1))", "/ window",
     (f"{P}::test_a_trailing_mean",)),
    ("python/zo_finetune/data.py", "epochs in the same order", "+ self.seed) << 32) + epoch)", "+ self.seed) << 32))",
     ("tests/finetune/test_data.py::test_a_batch_is_a_function_of_seed_and_step",)),
    ("python/zo_finetune/data.py", "a sample in the order of the file", "return sorted(range(n), key=keys.__getitem__)", "return list(range(n))",
     ("tests/finetune/test_data.py::test_the_order_is_frozen",)),
    ("python/zo_finetune/data.py", "a text of the evaluation is trained on", "self._taken.setdefault(text_of(example), part) == part", "True",
     ("tests/finetune/test_splits.py::test_no_text_is_in_two_splits",)),
    ("python/zo_finetune/keep.py", "the highest loss is the best", "e[by] if by == \"loss\" else -e[by]", "-e[by]",
     ("tests/finetune/test_keep.py::test_what_is_best",)),
    ("python/zo_finetune/keep.py", "the best weights are those of the last step", "if chosen[\"step\"] != steps:", "if chosen is None:",
     ("tests/finetune/test_keep.py::test_the_best_are_other_weights_than_the_last",)),
    ("python/zo_finetune/scoring.py", "a chat begins twice", "self._around() if self.turns is None else ([], [])", "self._around()",
     ("tests/finetune/test_chat.py::test_tokens_are_the_templates_and_none_is_there_twice",)),
    ("python/zo_finetune/formats.py", "a packed file unpacks to any size", "            content.write(piece)\n            check_size(bytes=content.tell())",
     "            content.write(piece)", ("tests/finetune/test_sources.py::test_the_bound_is_of_what_a_file_unpacks_to",)),
    ("python/zo_finetune/suite_table.py", "the error of a mean over seeds is their deviation", "statistics.stdev(scores) / math.sqrt(len(scores))",
     "statistics.stdev(scores)", (f"{SUITE}::test_the_tables_arithmetic",)),
    ("python/zo_finetune/suite_table.py", "WSC is in the mean", "t not in apart and all(", "all(", (f"{SUITE}::test_the_tables_arithmetic",)),
    ("python/zo_finetune/suite_table.py", "what only reaches the threshold has no mark", "mean <= least", "mean < least",
     (f"{SUITE}::test_the_zero_shot_column_has_no_mark_of_its_own_threshold",)),
    ("python/zo_finetune/metrics/best_threshold.py", "a line lies between rows of one margin", "right[parted].max()", "right.max()",
     (f"{SUITE}::test_the_best_threshold",)),
    ("python/zo_finetune/suite_plan.py", "a full tuning's rate is an adapter's", "return self.entry.method.name + (", "return self.entry.method.name or (",
     (f"{SUITE}::test_columns_of_ones_own",)),
    ("python/zo_finetune/ranking.py", "the spread of a whole population",
     "statistics.stdev(values) if len(values) > 1", "statistics.pstdev(values) if len(values) > 1",
     ("tests/finetune/test_ranking.py::test_above_below_and_undecided",)),
    ("zo_kernels/quantized.py", "4 bits with other scales are the same base", '"scales": scales.to(torch.bfloat16), "table"', '"table"',
     (f"{Q}::test_another_base_is_refused",)),
    ("zo_kernels/quantized.py", "8 bits with other scales are the same base", '{"codes": p.data, **(', '{"codes": p.data, **({} and ',
     (f"{Q}::test_another_base_is_refused", f"{Q}::test_a_first_forward_takes_the_scales_of_eight_bits")),
    ("zo_kernels/quantized.py", "a base in a processor's layout is another", "(codes[:, 0] << 4) | codes[:, 1]", "(codes[:, 1] << 4) | codes[:, 0]",
     (f"{Q}::test_the_layout_of_a_processor_is_no_other_base",)),
    ("zo_kernels/quantized.py", "scales that are trained stand for the base", 'changing = {"scale", "scales"}', "changing = set()",
     (f"{Q}::test_scales_alone_are_trained",)),
    ("zo_kernels/quantized.py", "a forward replaces the scales that are trained", "module.support_avx512bf16_for_cpu = False", "pass",
     (f"{Q}::test_a_forward_does_not_replace_scales_that_are_trained",)),
    ("zo_kernels/quantized.py", "a layout that does not hold a matrix is tried", "not (rows % _IN_BLOCK or columns %", "not (rows % _IN_BLOCK and columns %",
     (f"{Q}::test_matrices_that_a_processors_layout_cannot_hold_are_trained_on",)),
    ("python/zo_finetune/trl_trainers.py", "a loss of ratios to itself", 'if "old_per_token_logps" not in found:', "if False:",
     (f"{TRL}::test_grpo_is_the_hand_written_loop_and_generates_once_a_step",)),
    ("python/zo_finetune/trl_trainers.py", "answers are weighed with dropout", "with dropout_off(self.model):", "with torch.no_grad():",
     (f"{TRL}::test_grpo_is_the_hand_written_loop_and_generates_once_a_step",)),
    ("python/zo_finetune/trainer.py", "what an adapter began with is not kept", "(new := _new_weights(self.model))", "(new := {})",
     ("tests/finetune/test_trainer.py::test_an_adapter_that_nobody_seeded_goes_on_and_replays",)),
    ("python/zo_finetune/trainer.py", "a new head is taken for the base's", "if not name.startswith(f\"{body}.\")", "if name.startswith(f\"{body}.\")",
     ("tests/finetune/test_trainer.py::test_a_new_head_is_kept_and_the_body_is_not",)),
    ("zo_kernels/replay.py", "an adapter stays of the type that it was made in", "p.data = made if made.dtype != p.dtype else", "p.data =",
     ("tests/finetune/test_trainer.py::test_an_adapter_of_another_type_becomes_the_runs",)),
    ("zo_kernels/journal/start.py", "another run's starting values are taken", "if recorded.get(name) != digest(values):", "if name not in recorded:",
     ("tests/finetune/test_trainer.py::test_starting_values_that_are_not_the_runs_are_refused",)),
    ("python/zo_finetune/trainer.py", "an adapter that was loaded is another one than is trained", "if now is not p:", "if False:",
     (f"{TRL}::test_sft_of_an_adapter_on_four_bits",)),
    ("python/zo_finetune/trainer.py", "metrics are counted at every point", "if next(calls) >= own", "if next(calls) >= 2 * len(batches)",
     (f"{TRL}::test_sft_is_the_hand_written_loop_and_counts_once_a_step",)),
    ("python/zo_finetune/trainer.py", "a user's own loss is lost behind the first batch", "if own is not None:", "if False:",
     (f"{TR}::test_a_loss_that_a_user_puts_in_the_place_of_the_classs_stays",)),
    ("python/zo_finetune/trainer.py", "a rate that was not given is the last model's", "self.args.learning_rate = given", "pass",
     (f"{TR}::test_arguments_serve_two_trainers",)),
    ("python/zo_finetune/trainer.py", "losses behind a skipped step are NaN", "tr_loss.zero_()", "pass",
     (f"{TR}::test_a_skipped_step_is_nan_in_its_own_row_alone",)),
    ("python/zo_finetune/trainer.py", "a checkpoint goes on with other numbers in silence", "past[name] != mine[name]", "False",
     (f"{TR}::test_a_run_goes_on_with_the_numbers_of_its_checkpoint_and_says_so",)),
    ("zo_kernels/optim/findings.py", "unfrozen in a run, and nobody says so", "not self.steps % MEMBERS", "False",
     ("tests/optim/test_check.py::test_a_run_tells_of_parameters_that_are_unfrozen_in_it",)),
    # the noise contract and the rules, as functions and in the CUDA kernels' bodies
    ("csrc/noise.h", "the key of a round is the next round's", "0xBB67AE85u * (uint32_t)round;", "0xBB67AE85u * (uint32_t)(round + 1);",
     (f"{N}::test_philox_known_answers",)),
    ("csrc/noise.h", "ties of a coefficient's 17 bits away from zero", "(b + 0x3Fu + ((b >> 7) & 1u))", "(b + 0x40u)",
     (f"{N}::test_gaussian_coefficients_equal_reference",)),
    ("csrc/noise.h", "a coefficient of 2^-100 is dead", ">= 0x0D800000u", "> 0x0D800000u", (f"{N}::test_rademacher_coefficients",)),
    ("csrc/noise.h", "the larger subnormal halves as if they were normal", "if (a < 0x38800000u) {", "if (a < 0x38000000u) {",
     (f"{N}::test_nearest_casts_equal_torch",)),
    ("csrc/noise.h", "stochastic halves of 14 random bits", "(v >> 3)", "(v >> 2 & 0x1FFFu)", (f"{N}::test_stochastic_casts_equal_reference",)),
    ("csrc/noise.h", "an infinite half is finite", "if (mag >= 0x7C00u)", "if (mag > 0x7C00u)", (f"{N}::test_every_half_and_bfloat",)),
    ("csrc/noise.h", "a random mask swaps the halves of odd elements", "if ((i & 1) == 0) x =", "if ((i & 1) == 1) x =",
     (f"{H}::test_rows[random-mask-96]",)),
    ("csrc/noise.h", "the call of an element's other group", "2 * (i >> 5) + ((i >> 3) & 1)", "2 * (i >> 5) + ((i >> 4) & 1)",
     (f"{H}::test_rows[plain-96]",)),
    ("csrc/noise.h", "the root of a scale is not divided by", "return 1.0f / __builtin_sqrtf(x);", "return __builtin_sqrtf(1.0f / x);",
     (f"{N}::test_inverse_roots_round_twice",)),
    ("csrc/rules.h", "Adam's square is rounded in another order", "mul_rn(n.x[6], mul_rn(u, u))", "mul_rn(mul_rn(n.x[6], u), u)",
     (f"{U}::test_case[plain-cuda-body-1]",)),
    ("csrc/rules.h", "a NaN in HiZOO's diagonal becomes its least value", "h < n.x[5] ? n.x[5] : h > n.x[6] ? n.x[6] : h;",
     "h > n.x[5] ? (h > n.x[6] ? n.x[6] : h) : n.x[5];",
     (f"{U}::test_clamp_of_hizoo[cuda-body-1]",)),
    ("csrc/rules.h", "a recomputed Adam adds eps under the root", "add_rn(sqrt_rn(second), n.x[3])", "sqrt_rn(add_rn(second, n.x[3]))",
     (f"{U}::test_case[plain-cuda-body-1]",)),
    ("csrc/cuda/perturb.cuh", "a block of scales is an element longer", "if (++rest == block)", "if (++rest > block)", (f"{H}::test_rows[scale-7]",)),
    ("csrc/cuda/perturb.cuh", "a mask's octet of the odd groups", "2 * q - (q & 1) + 2 * chunk",
     "2 * q + 2 * chunk", (f"{H}::test_rows[random-mask-96]",)),
    ("csrc/cuda/perturb.cuh", "the last element of a group is outside", "numel - e < 24 ? numel - e : 24", "numel - e < 24 ? numel - e : 23",
     (f"{H}::test_rows[plain-40]",)),
    ("csrc/cuda/perturb.cuh", "a pass with a decay is a usual one", "if (end - begin == 1 && step.decay == 1.0f &&", "if (end - begin == 1 &&",
     (f"{H}::test_cases[sequence-mixed]",)),
    ("csrc/cuda/perturb.cuh", "the first term behind shared memory is left out", "int64_t far = STAGE;",
     "int64_t far = STAGE + 1;", (f"{H}::test_many_terms",)),
    ("csrc/cuda/perturb.cuh", "a low-rank direction stays in its row", "if (++column == cols) column = 0, ++row;",
     "if (++column == cols) column = 0;",
     (f"{H}::test_rows[low-rank-7]",)),
    ("csrc/cuda/perturb.cuh", "a decay that is no number counts", "    if ((as_bits(decay) & 0x7F800000u) == 0x7F800000u) decay = 1.0f;\n", "",
     (f"{H}::test_device_decay",)),
    ("csrc/cuda/update.cuh", "a masked-out weight's second state changes", "b[j] = here ? b[j] : old_second;", "(void)old_second;",
     (f"{U}::test_what_is_masked_out_only_decays[adam-torch.float32-cuda-body-1]",)),
    ("csrc/cuda/update.cuh", "go = 0 is not obeyed", "bad |= numbers.x[0] == 0.0f;", "",
     (f"{U}::test_a_pass_that_is_not_to_be_made_leaves_every_bit[adam-torch.float32-cuda-body-1]",)),
    # the CPU's kernels
    ("csrc/cpu/perturb.cpp", "the first live term names the draw of the rounding", "if (k == begin) job.rounding_tag = tag;",
     "if (c != 0 && !job.n_terms) job.rounding_tag = tag;", (f"{C}::test_a_dead_first_term_names_the_draw",)),
    ("csrc/cpu/perturb.cpp", "a decay that is no number counts", "std::isfinite(decay) && decay != 1",
     "decay != 1", (f"{C}::test_a_decay_that_is_no_number",)),
    ("csrc/cpu/update.cpp", "squares that are no numbers count", "(!history || zo::is_finite(squares[k]))", "(!history || squares)",
     (f"{U}::test_a_pass_that_is_not_to_be_made_leaves_every_bit[adam_history-torch.float32-portable]",)),
    ("csrc/cpu/simd.h", "half of a block is rounded by the calls beside", "calls.first(q + 2, tag, c + 2)", "calls.first(q + 1, tag, c + 2)",
     (f"{C}::test_whole_blocks",)),
    ("csrc/cpu/simd.h", "calls past 2^32 keep the high word of those before", "until = (q | 0xFFFFFFFFu) + 1;",
     "until = ~(uint64_t)0;", (f"{C}::test_whole_blocks",)),
    ("csrc/cpu/simd.h", "calls that pass 2^32 within a block have the high word of the first", "V::high(Which::calls(q, h))",
     "V::high(Which::calls(q & ~31ull, h))", (f"{C}::test_whole_blocks",)),
    ("csrc/cpu/simd.h", "a third term takes the words of the second", "calls.begin(q, term[1].tag);", "calls.begin(q, terms[1].tag);",
     (f"{C}::test_whole_blocks",)),
    ("csrc/cpu/simd.h", "a stochastic pass without masks forgets its decay", "lean_blocks<Weight, true, sizeof(Weight) == 2>",
     "lean_blocks<Weight, false, sizeof(Weight) == 2>", (f"{C}::test_whole_blocks",)),
    ("csrc/cpu/tile.h", "a block of scales is an element longer", "(int64_t)((b + 1) * block - i)",
     "(int64_t)((b + 1) * block - i + 1)", (f"{C}::test_case[scale-block3-portable]",)),
    ("csrc/cpu/tile.h", "the last rank is left out", "for (uint64_t rho = 0; rho < t.rank; ++rho)", "for (uint64_t rho = 0; rho + 1 < t.rank; ++rho)",
     ("tests/kernels/test_lowrank.py::test_z_is_left_times_right_transposed",)),
    ("csrc/cpu/tile.h", "bits of a mask beyond a byte's end", "8 - (in > out ? in : out)", "8 - in",
     (f"{C}::test_case[offset-odd-everything-portable]",)),
    ("csrc/cpu/update_tile.h", "a masked-out weight's second state changes", "second[p] = keep ? b : old;", "second[p] = b;",
     (f"{U}::test_what_is_masked_out_only_decays[adam-torch.float32-portable]",)),
    ("csrc/cpu/update_tile.h", "the rest of the second state is lost",
     "if (RULE == ZO_ADAM) memcpy(second + whole, last_second, (size_t)rest * sizeof(float));",
     "(void)last_second;", (f"{U}::test_case[plain-portable]",)),
    ("zo_kernels/optim/states.py", "a graph's count has the steps that were skipped", "c.count.add_(live)", "c.count.add_(1)",
     ("tests/optim/test_graph.py::test_states_are_those_without_a_graph",)),
    ("zo_kernels/optim/states.py", "groups whose parameters were counted together go on with one count",
     "count = torch.full((), float(cohort.count), dtype=torch.float64, device=device)",
     "count = torch.as_tensor(cohort.count, dtype=torch.float64)\n                    object.__setattr__(cohort, 'count', count)",
     ("tests/optim/test_graph.py::test_counts_are_of_each_parameters_own_updates",)),
    ("zo_kernels/optim/schedule.py", "a step that fails, behind graphs that were refused, stays counted", "self.run.rule.held = False", "pass",
     ("tests/optim/test_graph.py::test_eager_steps_after_a_refused_graph_count_anew",)),
    ("csrc/cpu/mask.cpp", "a limit between two halves keeps the upper one", "zo::half_to_float(nearest) > limit ? nearest", "false ? nearest",
     (f"{C}::test_magnitude_masks_of_every_half",)),
    ("csrc/cpu/mask.cpp", "a limit of -0 is a large one", "zo::as_bits(limit) & 0x7FFFFFFFu", "zo::as_bits(limit)", (f"{C}::test_magnitude_masks",)),
    ("csrc/cpu/mask_tile.h", "the first byte of a range is left to nobody", "first = (begin + 7)", "first = (begin + 8)",
     (f"{C}::test_magnitude_masks",)),
    ("csrc/cpu/perturb_avx2.cpp", "bits of 16-bit weights in the order of the lanes",
     "_mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8)", "_mm256_packs_epi16(low, high)", (f"{C}::test_magnitude_masks",)),
    ("csrc/cuda/mask.cuh", "a tile of a shard has bytes of the one before", "- (t->offset & 31) + 7) & ~(int64_t)7", "- (t->offset & 31)) & ~(int64_t)7",
     (f"{H}::test_magnitude_masks",)),
    ("csrc/cuda/mask.cuh", "bits behind the last element", "if (numel - e < 8) byte &=", "if (numel - e < 0) byte &=", (f"{H}::test_magnitude_masks",)),
    ("zo_kernels/optim/directions.py", "a mask stays when weights move", "p.data_ptr(), m.data_ptr())", "m.data_ptr())",
     ("tests/optim/test_defects.py::test_a_magnitude_mask_is_of_the_weights_that_are_there",)),
    ("zo_kernels/optim/directions.py", "a mask stays when a threshold is another", "(name, self.thresholds.get(name), p.data_ptr()", "(name, p.data_ptr()",
     ("tests/optim/test_defects.py::test_a_magnitude_mask_is_of_the_weights_that_are_there",)),
    ("csrc/cpu/perturb_portable.cpp", "a mask of a shard begins at the octet", "s[p] = kept[p + skip] ? r : d;",
     "s[p] = kept[p] ? r : d;", (f"{C}::test_case[offset-odd-everything-portable]",)),
    # how a model sees theta + c z, and which parameters there are
    ("zo_kernels/views/inplace.py", "autocast keeps copies of weights that moved in place",
     "        self.expect()\n        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, not by its version\n",
     "        self.expect()\n",
     ("tests/optim/test_views.py::test_autocast_sees_each_perturbation[llama-inplace]",)),
    ("zo_kernels/views/scratch.py", "autocast keeps copies of weights that are held",
     "        torch.clear_autocast_cache()  # it keys a weight's 16-bit copy by the tensor, and the buffer's tensors are used again\n", "",
     ("tests/optim/test_views.py::test_autocast_sees_each_perturbation[captured-scratch]",)),
    ("zo_kernels/views/scratch.py", "values that stand before held weights are made of perturbed ones",
     "        self.fronts.write()  # from clean weights\n",
     "        for shadow in self.forward.held.values():\n            self.held.perturb(shadow)\n        self.fronts.write()\n",
     ("tests/optim/test_views.py::test_autocast_sees_each_perturbation[captured-scratch]",)),
    ("zo_kernels/views/scratch.py", "autocast keeps perturbed copies of weights that are clean again",
     "        self.held.put_back()\n        torch.clear_autocast_cache()",
     "        self.held.put_back()\n        any(shifts) and torch.clear_autocast_cache()",
     ("tests/optim/test_views.py::test_autocast_sees_clean_weights_behind_perturbed_ones",)),
    ("zo_kernels/views/inplace.py", "the way back of an update forgets the decay", "(tag, -c * one.decay)", "(tag, -c)",
     (f"{M}::test_steps_equal_the_float64_reference[mezo-inplace-0.3]",)),
    ("zo_kernels/views/pieces.py", "masked rows that begin inside a byte are gathered", "(entry.mask is not None and table.shape[1] % 8)", "False",
     ("tests/optim/test_views.py::test_rows_are_gathered_a_few_at_a_time",)),
    ("zo_kernels/views/held.py", "the look at a first step goes on when the step is over", "if self.over or self.forward.inside", "if self.forward.inside",
     ("tests/optim/test_faults.py::test_a_time_limit_while_torch_has_the_look_at_a_first_step_off[scratch]",)),
    ("zo_kernels/views/held.py", "held weights are not put back", "                        shadow.param.copy_(copy)\n", "                        pass\n",
     ("tests/optim/test_views.py::test_a_penalty_on_the_parameters_sees_the_perturbation",
      "tests/optim/test_views.py::test_weights_past_the_attributes_are_held_and_said")),
    ("zo_kernels/shards.py", "a block of columns lies in rows of its width", "whole_shape[last] * steps[last]) if last", "mine[last] * steps[last]) if last",
     ("tests/test_shards.py::test_places",)),
    ("zo_kernels/shards.py", "parts of two dimensions behind the first are blocks of columns", "if any(0 < d < last for d in cut):", "if False:",
     ("tests/test_shards.py::test_what_has_no_place",)),
    ("zo_kernels/optim/workers.py", "sharded workers may have other numbers of forwards", "not self.whole and batches % self.size == 0:", "not self.whole:",
     ("tests/test_shards.py::test_workers_that_are_alike_have_as_many_forwards",)),
    ("zo_kernels/optim/workers.py", "sharded workers may find other losses", "if self.alike and shares[0]", "if not self.alike and shares[0]",
     ("tests/test_shards.py::test_workers_that_are_alike_agree",)),
    ("zo_kernels/plan.py", "rows of a block of columns are those of the block", "first = np.uint64(self.offset) + rows * np.uint64(self.pitch)",
     "first = np.uint64(self.offset) + rows * np.uint64(self.width)", (f"{C}::test_blocks_of_columns",)),
    ("zo_kernels/plan.py", "a row of a block of columns has the mask of the first", "table[:, 4] += rows * np.uint64((self.width + 7) // 8)",
     "pass", (f"{C}::test_blocks_of_columns",)),
    ("zo_kernels/update.py", "every row of a block of columns has the state of the first", "np.uint64(s.data_ptr()) + steps",
     "np.uint64(s.data_ptr())", (f"{U}::test_case[columns-portable]",)),
    ("zo_kernels/plan.py", "the entries of a part are other parameters'", "tuple(self.members[k] for k in places)", "tuple(range(len(places)))",
     ("tests/optim/test_parameters.py::test_a_plan_knows_whose_its_entries_are",)),
    ("zo_kernels/parameters.py", "a part of a tensor has the noise of its beginning", "offsets=[m.offset for m in members]", "offsets=None",
     ("tests/optim/test_parameters.py::test_a_member_that_is_a_part_of_a_tensor_has_the_noise_of_its_place",)),
    ("zo_kernels/parameters.py", "plans of offloaded blocks have the limits of the first", "scales=[scales[i] for i in places]", "scales=scales[:len(places)]",
     ("tests/test_offload.py::test_groups_have_their_limits_in_every_block",)),
    ("zo_kernels/views/away.py", "a block begins with the steps behind its place anew",
     "lines = self.missed[since - first : steps - first]", "lines = self.missed[: steps - first]",
     ("tests/test_offload.py::test_bits_are_those_of_the_resident_run[dtype0-mezo]",)),
    ("zo_kernels/views/away.py", "a block that is there is not brought up to the step", "elif slot.at != self.steps:", "elif False:",
     ("tests/test_offload.py::test_bits_are_those_of_the_resident_run[dtype0-mezo]",)),
    ("zo_kernels/views/away.py", "what was written back is not what comes", "if block.written and self.working is not None:", "if False:",
     ("tests/test_offload.py::test_bits_are_those_of_the_resident_run[dtype0-mezo]",)),
    ("zo_kernels/views/away.py", "lines go that a block has yet to make",
     "(oldest := min(b.at for b in self.blocks))", "(oldest := max(b.at for b in self.blocks))",
     ("tests/test_offload.py::test_bits_are_those_of_the_resident_run[dtype0-mezo]",)),
    ("zo_kernels/views/away.py", "a block is fetched into the slot that is in use",
     "or any(b.slot == following.slot for b in (*self.using, *self.awaited()))", "or False",
     ("tests/test_offload.py::test_a_fetched_block_takes_no_slot_that_is_in_use",)),
    ("zo_kernels/views/away.py", "nobody follows a view of a weight that is away", "self._alias(one, found[0])  # a view, which", "pass  # a view, which",
     ("tests/test_offload.py::test_checks_and_looks_see_the_weights",)),
    ("zo_kernels/views/away.py", "a backward pass reads what lies where its weights lay", "torch.autograd.graph.increment_version(gone)", "pass",
     ("tests/test_offload.py::test_a_backward_pass_never_takes_one_blocks_weights_for_anothers",)),
    ("zo_kernels/views/away.py", "two threads take each other's blocks",
     "        with self.turn:\n            if self.gate", "        with contextlib.nullcontext():\n            if self.gate",
     ("tests/test_offload.py::test_threads_that_read_one_model_take_turns",)),
    ("zo_kernels/views/reads.py", "a parameter that one thread reads is not seen in another",
     "if func not in _BY_CLASS and", "if False and",
     ("tests/test_offload.py::test_no_thread_sees_a_parameter_unwatched",)),
    ("zo_kernels/views/reads.py", "another thread sees a parameter unwatched while a function has it",
     "if func not in _BY_CLASS and", "if getattr(func, \"__module__\", \"\") != torch._tensor.__name__ and",
     ("tests/test_offload.py::test_no_thread_sees_a_parameter_unwatched[len]",)),
    ("zo_kernels/views/reads.py", "a user's own class is not asked", "    if not others:\n", "    if True:\n",
     ("tests/test_offload.py::test_activations_of_a_class_of_the_users",)),
    ("zo_kernels/optim/lockstep.py", "forwards begin to take turns while another thread's function reads",
     "with self.away.turn:", "with contextlib.nullcontext():",
     ("tests/test_offload.py::test_a_thread_in_the_middle_of_a_function_when_forwards_begin_to_take_turns",)),
    ("zo_kernels/views/away.py", "a thread is taken for a forward of the step",
     "if self.gate is not None:\n                raise", "if False:\n                raise",
     ("tests/test_offload.py::test_another_thread_is_no_forward_of_a_step",)),
    ("zo_kernels/views/visiting.py", "a perturbed read waits for no other thread",
     "with self._reading(found):\n            self._bring(found, walk",
     "with contextlib.nullcontext():\n            self._bring(found, walk",
     ("tests/test_offload.py::test_a_step_and_another_thread_take_turns",)),
    ("zo_kernels/optim/workers.py", "who brings nothing is not told", "return 0 if self.alike else", "return 0 if not self.alike else",
     ("tests/test_distributed.py::test_workers_that_bring_nothing_are_told",)),
    ("zo_kernels/views/away.py", "an array is the slot's memory", "return result.copy() if isinstance", "return result if isinstance",
     ("tests/test_offload.py::test_checks_and_looks_see_the_weights",)),
    ("zo_kernels/views/away.py", "a block that was written to stays there", "away.slots[block.slot].holds = None  # it comes", "pass  # it comes",
     ("tests/test_offload.py::test_refusals",)),
    ("zo_kernels/views/visiting.py", "the masks of a missed step are those of the next one", "if tag is not None:", "if False:",
     ("tests/test_offload.py::test_bits_are_those_of_the_resident_run[dtype0-sparse]",)),
    ("zo_kernels/views/visiting.py", "a weight read past its module is not perturbed",
     "if id(p) in self.blocks and not self.forward.inside", "if False and not self.forward.inside",
     ("tests/test_offload.py::test_refusals",)),
    ("zo_kernels/views/visiting.py", "resident weights miss their updates", "work.do(Part(self, None, self.backend))", "Part(self, None, self.backend)",
     ("tests/test_offload.py::test_groups_have_their_limits_in_every_block",)),
    ("zo_kernels/views/away.py", "what was fetched in advance counts as asked for", "slot.holds is b and slot.asked and", "slot.holds is b and",
     ("tests/test_offload.py::test_a_block_comes_once_a_step",)),
    ("zo_kernels/optim/lockstep.py", "forwards side by side share a random state", "self.rng.set(one.random)", "self.rng.set(self.forwards[0].random)",
     ("tests/test_offload.py::test_forwards_side_by_side_draw_the_same_numbers",)),
    ("zo_kernels/optim/lockstep.py", "a forward whose turn comes again has another's point",
     "            if not self.abandoned:\n                self._enter(me)", "            if False:\n                self._enter(me)",
     ("tests/test_offload.py::test_a_block_comes_once_a_step",)),
    ("zo_kernels/optim/lockstep.py", "who waits for what is there does not get its turn",
     "(not one.begun or self._served(one)):", "(not one.begun):",
     ("tests/test_offload.py::test_a_block_comes_once_a_step",)),
    ("zo_kernels/optim/lockstep.py", "what a forward raised is lost", "self.error, self.abandoned = self.error or error, True", "self.abandoned = True",
     ("tests/test_offload.py::test_a_forward_that_fails_ends_those_beside_it",)),
    ("zo_kernels/views/away.py", "a block goes while a forward waits for it", "*self.awaited()", "",
     ("tests/test_offload.py::test_no_block_goes_for_the_next_one_while_a_forward_waits_for_it",)),
    ("python/zo_finetune/scoring.py", "forwards side by side have one batch's positions", "self._points.get(threading.get_ident())",
     "next(reversed(self._points.values()), None)", ("tests/finetune/test_offload.py::test_micro_batches_side_by_side_keep_their_positions",)),
    ("zo_kernels/views/scratch.py", "at theta, resident weights are still another thread's", "self.reads.end()  # of a point", "pass  # of a point",
     ("tests/test_offload.py::test_resident_weights_are_read_at_theta_beside_other_points",)),
    ("zo_kernels/optim/evaluate.py", "workers' forwards share no visits", "if away is not None and self._beside(len(work)):", "if False:",
     (f"{AWAY}::test_a_block_comes_once_for_each_micro_batch_of_a_share",)),
    ("zo_kernels/optim/evaluate.py", "what one of a worker's forwards beside others raises stays there", "                error = raised\n        else:",
     "                raise\n        else:", (f"{AWAY}::test_a_forward_that_fails_on_one_worker",)),
    ("zo_kernels/optim/evaluate.py", "a worker's points side by side have all micro-batches", "for arguments in work[which.number][1]:",
     "for arguments in self.calls:", (f"{AWAY}::test_a_block_comes_once_for_each_micro_batch_of_a_share",)),
    ("zo_kernels/optim/evaluate.py", "nobody knows that forwards side by side drew random numbers", "or together.forwards[0].random", "or self.before",
     (f"{AWAY}::test_forwards_that_draw_random_numbers",)),
    ("zo_kernels/optim/workers.py", "both divides points before micro-batches where blocks visit", "part // points if visited else part]",
     "part // points if False else part]", (f"{AWAY}::test_a_block_comes_once_for_each_micro_batch_of_a_share",)),
    ("zo_kernels/optim/workers.py", "auto counts no visits", "for s in shares) if visited else 0", "for s in shares) if False else 0",
     (f"{AWAY}::test_a_block_comes_once_for_each_micro_batch_of_a_share",)),
    ("zo_kernels/optim/workers.py", "a worker knows of its own blocks alone", "self.visited = any([row", "any([row",
     (f"{AWAY}::test_candidates_and_a_worker_without_blocks",)),
    ("zo_kernels/views/files.py", "a file that was written to is read as it is", "if self.given and", "if False and",
     ("tests/test_offload.py::test_a_block_that_does_not_come_is_named",)),
    ("zo_kernels/views/files.py", "a file that ends early is read as it is",
     "            if got == 0:\n", "            if got == 0:\n                return\n            if False:\n",
     ("tests/test_offload.py::test_a_block_that_does_not_come_is_named",)),
    ("zo_kernels/optim/repeat.py", "a resumed run's passes go over slots",
     "if past.header.method is None and not view.defers:", "if past.header.method is None:",
     ("tests/test_offload.py::test_a_run_goes_on_from_its_journal",)),
    ("zo_kernels/parameters.py", "two names of one hash have one stream", "while stream in taken:", "while False:",
     ("tests/optim/test_parameters.py::test_collisions_are_resolved_the_same_way_whatever_is_frozen",)),
    ("zo_kernels/parameters.py", "weights of normalization layers decay", "if is_norm or attribute == \"bias\"", "if attribute == \"bias\"",
     ("tests/optim/test_parameters.py::test_no_decay_finds_every_bias_and_norm_by_class",)),
    ("zo_kernels/optim/projection.py", "a projection is not clipped from below", "return min(max(r, 1 - self.config.tau), 1 + self.config.tau)",
     "return min(r, 1 + self.config.tau)", (f"{R}::test_a_projection_is_clipped_on_both_sides",)),
    ("zo_kernels/optim/decide.py", "descent is ascent", "signs = [1.0 if g[\"maximize\"] else -1.0 for", "signs = [-1.0 if g[\"maximize\"] else 1.0 for",
     (f"{M}::test_each_step_is_the_formula_of_the_losses_it_saw[mezo-scratch-fp16]",)),
    ("zo_kernels/optim/evaluate.py", "the second forward draws other random numbers",
     "and self.after:\n                self.rng.set(self.before)\n", "and self.after:\n                pass\n",
     ("tests/optim/test_mezo.py::test_the_two_forwards_share_their_random_state_and_the_caller_keeps_one",)),
    ("zo_kernels/optim/evaluate.py", "in place a worker makes its own passes alone",
     "if point.rounds or (calls and error is None):", "if calls and error is None:",
     (f"{D}::test_bits_are_those_of_one_process",)),
    ("zo_kernels/optim/evaluate.py", "micro-batches are divided where forwards draw", "if any(drew) and parted:", "if False:",
     (f"{D}::test_forwards_that_draw_random_numbers",)),
    ("zo_kernels/optim/workers.py", "losses that do not fit a frame are lost", "more = self._gather(values[room:], max(counts) - room)",
     "more = self._gather(values[:0], max(counts) - room)", (f"{D}::test_bits_are_those_of_one_process",)),
    ("zo_kernels/optim/workers.py", "what one closure raises fails there alone", "failing = any(row[1] for row in rows)", "failing = rows[self.rank][1]",
     (f"{D}::test_what_one_closure_raises_fails_on_all[scratch]",)),
    ("zo_kernels/optim/workers.py", "what workers have in common is not compared", "if len({row[2] for row in rows}) > 1:", "if False:",
     (f"{D}::test_a_worker_with_another_run_is_named_before_the_first_step",)),
    ("zo_kernels/optim/schedule.py", "workers may train other parameters from some step on", "f\"{len(names)} parameters ({print_of(' '.join(names))})\"", "''",
     (f"{D}::test_a_worker_with_another_run_is_named_before_the_first_step",)),
    ("zo_kernels/optim/workers.py", "what all workers wrote to weights is not compared", "self.met = self.met and not self.written", "pass",
     (f"{D}::test_weights_that_are_written_to_between_steps",)),
    ("zo_kernels/optim/refresh.py", "a frozen weight that was replaced once is new at each step",
     "            self.view = None\n        return found", "            pass\n        return found",
     (f"{D}::test_weights_that_are_written_to_between_steps",)),
    ("zo_kernels/optim/workers.py", "a step that one worker cannot begin is waited for",
     "if not isinstance(error, WorkerError) and self.lost is None:", "if False:",
     (f"{D}::test_weights_that_are_written_to_between_steps",)),
    ("zo_kernels/optim/workers.py", "sharded workers do not hear of what was written on one of them", "self.written = written or \"a part\"", "pass",
     ("tests/test_shards.py::test_what_is_refused",)),
    ("zo_kernels/optim/movement.py", "how far a step moved is said of a process's part",
     "t = shards.whole(shards.as_part(m.whole, part)).reshape(-1)", "t = part",
     ("tests/test_shards.py::test_what_fsdp_can_be_told_changes_no_bit",)),
    ("zo_kernels/optim/movement.py", "who asks alone how far a step moved waits in torch", "if workers is not None and workers.alike and", "if False and",
     ("tests/test_shards.py::test_what_is_refused",)),
    ("zo_kernels/views/gathered.py", "sharded weights that were replaced are said to be not gathered", "if id(m.param) not in there", "if id(m.param) in ()",
     ("tests/test_shards.py::test_what_is_refused",)),
    ("zo_kernels/optim/saved.py", "another seed of a state is no news", "if loaded.run.seed != run.seed", "if False", ("tests/optim/test_state.py",)),
    ("zo_kernels/optim/saved.py", "a rate that a scheduler has changed is news", 'g.get("initial_lr", g["lr"])}', 'g["lr"]}', ("tests/optim/test_state.py",)),
    ("zo_kernels/checks.py", "arguments of a user's class are not its own", "    if not cls.__module__.startswith(", "    if cls.__module__.startswith(",
     ("tests/optim/test_parameters.py",)),
    ("zo_kernels/views/base.py", "parts in host memory have their forwards there", " | {shards.forwards_on(m.param) for m in self.parts}", "",
     ("tests/test_shards.py::test_generators_are_those_of_the_forwards",)),
    ("zo_kernels/offload.py", "persistent buffers of files are not read", "        module._buffers[name] = value", "        pass",
     ("tests/test_offload.py::test_what_is_written_has_every_weight",)),
    ("zo_kernels/offload.py", "what is written lacks buffers", "{**self._named, **self._buffers}", "{**self._named}",
     ("tests/test_offload.py::test_what_is_written_has_every_weight",)),
    ("zo_kernels/offload.py", "files of a deeper model are taken in silence", "    if there:\n        _left_over", "    if not there:\n        _left_over",
     ("tests/test_offload.py::test_what_a_file_and_a_model_lack_of_each_other",)),
    ("zo_kernels/views/files.py", "a file is written over the one that it is made of", '"{os.fspath(path)}.part"', '"{os.fspath(path)}"',
     ("tests/test_offload.py::test_a_file_that_cannot_be_written_leaves_what_was_there",)),
    ("zo_kernels/shards.py", "what a closure raised is hidden by FSDP's", "suppress(AttributeError)", "suppress()",
     ("tests/test_shards.py::test_a_closure_that_raises_before_the_first_forward",)),
    ("zo_kernels/optim/workers.py", "what a closure raised is lost where nobody hears of it", "            if error is None:\n                raise\n",
     "            raise\n", (f"{D}::test_a_closure_that_raises_where_nobody_hears_of_it",)),
    ("zo_kernels/optim/digests.py", "what a closure reads past batches is not compared", "if not torch.compiler.is_compiling() and not found:",
     "if False:", (f"{D}::test_a_closure_that_gives_the_model_another_batch_is_named",)),
    ("zo_kernels/optim/digests.py", "hidden states of a part of a model are compared", "value.new_empty(value.shape, device=\"meta\")", "value",
     (f"{D}::test_a_closure_that_gives_the_model_another_batch_is_named",)),
    ("zo_kernels/optim/evaluate.py", "workers that begin with other micro-batches are compared", "watched(None if parted else", "watched(",
     (f"{D}::test_a_closure_that_gives_the_model_another_batch_is_named",)),
    ("zo_kernels/optim/digests.py", "what watches a model stays there", "            handle.remove()", "            pass",
     (f"{D}::test_a_closure_that_gives_the_model_another_batch_is_named",)),
    ("zo_kernels/optim/digests.py", "batches that are objects are not compared", "if isinstance(one, (Tensor, np.ndarray)):", "if False:",
     (f"{D}::test_a_worker_with_another_run_is_named_before_the_first_step",)),
    ("zo_kernels/optim/workers.py", "who gave up for another's sake is missing too",
     "silent -= {rank for rank in silent if store.check", "silent -= {rank for rank in () if store.check",
     (f"{D}::test_a_worker_that_does_not_come_is_named",)),
    ("zo_kernels/optim/workers.py", "numbers go around a ring",
     "dist.all_to_all_single(found, mine.repeat(self.size), [*lengths], [len(mine)] * self.size, group=self._group)",
     "dist.all_gather([*found.split([*lengths])], mine, group=self._group)",
     (f"{D}::test_all_others_learn_at_once_of_one_that_is_killed[before]",)),
    ("zo_kernels/optim/workers.py", "who comes late does not wait for a name",
     "store.wait([f\"{key}missing\"], datetime.timedelta(seconds=2 * GRACE))", "store.wait([f\"{key}missing\"], datetime.timedelta(seconds=0.01))",
     (f"{D}::test_who_comes_late_to_those_that_gave_up_names_whom_they_waited_for",)),
    ("zo_kernels/optim/workers.py", "a table is in another order than that of the ranks",
     "return found.split([*lengths])", "return found.split([*lengths])[::-1]",
     (f"{D}::test_every_worker_has_the_same_table_to_the_bit[3]",)),
    ("zo_kernels/optim/workers.py", "bytes are counted as of two workers", "self.sent += 8 * size * (self.size - 1)", "self.sent += 8 * size",
     (f"{D}::test_bytes_on_the_wire[both-11]",)),
    ("zo_kernels/optim/workers.py", "a lost worker is waited for again",
     "        if self.lost is not None:\n            raise", "        if False:\n            raise",
     (f"{D}::test_a_worker_that_does_not_come_is_named",)),
    ("zo_kernels/optim/record.py", "workers go on where the first one could not record", "workers if self.opened else None, \"the record", "None, \"the record",
     (f"{D}::test_the_first_worker_writes_and_a_record_that_fails_is_nobodys_step",)),
    ("python/zo_finetune/team.py", "an evaluation's parts come in the order of the processes", "return [all_of[k] for k in range(len(parts))]",
     "return [all_of[k] for k in all_of]", (f"{TEAM}::test_two_processes_write_what_one_does",)),
    ("python/zo_finetune/run.py", "a run that torchrun starts again goes on whatever its options",
     "if name := difference(config, asdict(saved), but=lambda option: option.movable):", "if name := None:",
     (f"{TEAM}::test_a_run_that_torchrun_starts_again_is_the_same_run",)),
    ("python/zo_finetune/run.py", "other processes keep weights without the journal",
     "if keeper.best:\n            team.copied", "if False:\n            team.copied",
     (f"{TEAM}::test_two_processes_write_what_one_does",)),
    ("zo_kernels/optim/record.py", "the rule is not compared", "in self.run.method.configured().items()}", "in ()}",
     (f"{D}::test_a_worker_with_another_run_is_named_before_the_first_step",)),
    ("zo_kernels/optim/decision.py", "a skipped step decays", "decay = self.decay if go else [1.0] * groups", "decay = self.decay",
     ("tests/optim/test_views.py::test_a_non_finite_loss_skips_the_step",)),
    ("zo_kernels/optim/decision.py", "the numbers behind a rule's are every group's",
     "*([[0.0] * len(behind)] * (groups - 1))", "*([list(behind)] * (groups - 1))",
     ("tests/optim/test_decision.py::test_numbers_behind_the_rules_are_the_first_groups",)),
    ("zo_kernels/optim/decision.py", "a flushed record is read as one that was not", "flushed=bool(word & bits[\"flushed\"])", "flushed=False",
     ("tests/optim/test_decision.py::test_a_record_is_its_decision_and_a_decision_its_record",)),
    ("zo_kernels/optim/run.py", "a candidate is not perturbed again in a replay", "elif method.rule.tries and decision.go:", "elif False:",
     ("tests/optim/test_net.py::test_net[conservative-inplace-bf16-nearest]",)),
    ("zo_kernels/optim/run.py", "what joins an anchored run is not compared", "view.params.keys() - self.began",
     "view.params.keys() if not self.began else set()",
     ("tests/optim/test_anchor.py::test_weights_that_join_a_run_begin_at_the_base",)),
    ("python/zo_finetune/runs.py", "finished results are of any rows", "if known[name] != now[name]", "if known[name] == ''",
     ("tests/finetune/test_suite.py::test_a_table_is_of_one_data_set",)),
    ("python/zo_finetune/inputs.py", "the inputs of frozen matrices are looked at",
     "set(map(canonical_name, trained_weights(model)))",
     "{canonical_name(name) for name, _ in model.named_parameters()}",
     ("tests/finetune/test_inputs.py::test_a_look_begins_from_kept_states_and_is_at_what_is_trained",)),
    ("zo_kernels/optim/repeat.py", "a resumed run counts from its last step", "past.next_tag - len(past.steps) * run.method.terms", "past.next_tag",
     ("tests/optim/test_net.py::test_net[random-sparse-scratch-bf16-stochastic]",)),
    ("zo_kernels/optim/schedule.py", "a rule's candidates descend where the run ascends", "-numbers.signs[0] * losses", "losses",
     (f"{M}",)),
    ("zo_kernels/views/tangents.py", "the tangents of a forward gradient are eps z", "[(tag, 1.0) for tag, _ in shift]",
     "[(tag, c) for tag, c in shift]",
     (f"{M}::test_steps_equal_the_float64_reference[forward-scratch-0.0]",)),
    ("zo_kernels/optim/workers.py", "who is late meets those that gave up", "if store.check([gone])", "if False",
     ("tests/test_distributed.py::test_a_worker_that_does_not_come_is_named",)),
    ("python/zo_finetune/trainer.py", "a loss of several processes is as many times as large", "with once, _whole_loss(self.args),", "with once,",
     ("tests/finetune/test_trainer.py::test_two_processes_have_the_bits_of_one_with_the_same_batches",)),
    ("zo_kernels/optim/refresh.py", "a look of one worker is a write", "if view is not None and view is self.view:", "if False:",
     ("tests/test_distributed.py::test_looks_of_one_worker_between_steps_are_no_writes",)),
    ("zo_kernels/optim/refresh.py", "a look hides what was written before it", "in ids and w == k else", "in ids else",
     ("tests/test_distributed.py::test_looks_of_one_worker_between_steps_are_no_writes",)),
    ("zo_kernels/optim/refresh.py", "a look hides what is written beside it", "n if id(p) in ids and w == k else", "n if w == k else",
     ("tests/test_distributed.py::test_looks_of_one_worker_between_steps_are_no_writes",)),
    ("zo_kernels/views/buffer.py", "writes to a perturbed weight are not counted in a mode of the closure", "with torch.inference_mode(False):  # whose",
     "if True:  # whose", ("tests/optim/test_faults.py::test_a_view_of_a_weight_in_any_mode_of_the_closure",)),
    ("zo_kernels/views/buffer.py", "weights of two devices are one launch", "by_launch.setdefault((group, entry.dst.device, entry",
     "by_launch.setdefault((group, torch.device('cpu'), entry", ("tests/kernels/test_devices.py",)),
    ("zo_kernels/parameters.py", "what accelerate offloads is told as any weight without values", '"_hf_hook"', '"_no"',
     ("tests/optim/test_device_map.py::test_trained_weights_that_accelerate_offloads_are_refused",)),
    ("zo_kernels/optim/saved.py", "a whole state is taken for a part's", "if not shards.alike(t, p):", "if False:",
     ("tests/test_shards.py::test_checkpoints_and_journals_go_on_over_another_mesh",)),
    ("zo_kernels/views/gathered.py", "what FSDP keeps is perturbed again", "if part.clean and run is not None", "if run is not None",
     ("tests/test_shards.py::test_what_is_gathered_is_perturbed_once",)),
    ("zo_kernels/views/gathered.py", "a forward writes to what FSDP gathered", "if self.spoiled:", "if False:",
     ("tests/test_shards.py::test_what_is_gathered_is_perturbed_once",)),
    ("zo_kernels/views/gathered.py", "another draw of the masks reaches the parts alone", "part.entry, part.plan = part.entry.retagged(mask_tag), None", "pass",
     ("tests/test_shards.py::test_runs_have_the_bits_of_the_unsharded_run",)),
    ("zo_kernels/views/gathered.py", "what is gathered within tensor parallelism lies at the start", "self.offset, keep", "0, keep",
     ("tests/test_shards.py::test_tensor_parallel_runs_have_the_bits_of_the_same_sums",)),
    ("zo_kernels/shards.py", "FSDP takes a forward that failed for under way", "                module.reset_iter_state()", "                pass",
     ("tests/test_shards.py::test_what_is_gathered_is_perturbed_once",)),
])  # fmt: skip


def prepare() -> None:
    """What all tests import besides the project itself, so that a fork has it."""
    for package in ("hypothesis", "numpy", "pytest", "torch", "datasets", "peft", "transformers"):
        if importlib.util.find_spec(package):
            importlib.import_module(package)


def run(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status and its last line, from a fork of this process in `tree`; -9 where the time was up."""
    said = tree / "said.txt"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = _test(tree, tests, said)
        finally:
            os._exit(status)
    begun, ended = time.monotonic(), 0
    while not ended:
        time.sleep(0.05)
        ended, state = os.waitpid(child, os.WNOHANG)
        if not ended and time.monotonic() - begun > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -9, "no end"
    lines = [line for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return os.waitstatus_to_exitcode(state), (lines or ["nothing was said"])[-1]


def _test(tree: Path, tests: list[str], said: Path) -> int:
    """In the fork: nothing of the project may come from elsewhere than `tree`."""
    import pytest

    with said.open("w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    places = [str(tree), str(tree / "python")]
    os.chdir(tree)
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    os.environ["COMMIT"] = "mutant"  # the copy is no repository
    sys.dont_write_bytecode = True  # two mutants of one second and size would be one to it
    sys.path[:] = [*places, *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "python", tree))]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", "benchmarks", "zo_kernels", "zo_finetune")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    found = importlib.util.find_spec("zo_kernels")
    if found is None or not str(found.origin).startswith(str(tree)):
        print(f"zo_kernels would come from {found and found.origin}")
        return 98
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *tests]))


def build(tree: Path) -> str:
    """The compiler's complaint; empty if there is none."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext",
     "--inplace"], cwd=tree, env={**os.environ, "ZO_KERNELS_CUDA": "0"}, capture_output=True, text=True
    )  # fmt: skip
    return "" if done.returncode == 0 else (done.stderr or done.stdout)[-500:] or "no message"


def verdict(tree: Path, m: Mutant) -> tuple[str, str]:
    """("killed", by which test), ("survived", ...) or ("broken", why): it does not apply, does not compile, its tests do not run."""
    path = tree / m.file
    text = path.read_text(encoding="utf-8")
    if text.count(m.old) != 1:
        return "broken", f"its text occurs {text.count(m.old)} times in {m.file}"
    try:
        path.write_text(text.replace(m.old, m.new), encoding="utf-8")
        if m.compiled and (complaint := build(tree)):
            return "broken", complaint
        status, last = run(tree, list(m.tests))
    finally:
        path.write_text(text, encoding="utf-8")
    if status == 0:
        return "survived", last
    return ("killed", last) if status == 1 or status < 0 else ("broken", f"pytest ended with {status}: {last}")


def outdated(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Those whose text does not occur once."""
    return [m for m in mutants if (ROOT / m.file).read_text(encoding="utf-8").count(m.old) != 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants with one of these in their file or reason")
    parser.add_argument("--list", action="store_true", help="print them, and which of them do not apply; run nothing")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in f"{m.file} {m.wrong}" for w in options.words)]
    if options.list:
        lost = outdated(chosen)
        for m in chosen:
            print(f"{m.file}: {m.wrong}" + (" (DOES NOT APPLY)" if m in lost else ""))
        return 1 if lost else 0
    prepare()
    started, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info"), symlinks=True
        )
        if any(m.compiled for m in chosen) and (complaint := build(tree)):
            print(f"the extension does not build: {complaint}")
            return 2
        original = {p.name: p.read_bytes() for p in (tree / "zo_kernels").glob("*.so")}
        status, last = run(tree, sorted({test for m in chosen for test in m.tests}))
        if status != 0:
            print(f"without any mutant the tests named do not pass: {last}")
            return 2
        print(f"without a mutant: {last}", flush=True)
        for m in chosen:
            begun = time.monotonic()
            result, why = verdict(tree, m)
            for name, data in original.items():
                if (tree / "zo_kernels" / name).read_bytes() != data:
                    (tree / "zo_kernels" / name).write_bytes(data)
            results.append(result)
            print(
                f"{result:9}{time.monotonic() - begun:5.0f} s  {m.file}: {m.wrong}"
                + ("" if result == "killed" else f"\n    {why}"),
                flush=True,
            )
    counts = {result: results.count(result) for result in ("killed", "survived", "broken")}
    print(", ".join(f"{n} {result}" for result, n in counts.items()), f"of {len(results)} in {time.monotonic() - started:.0f} s")
    return 0 if counts["killed"] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
