"""Faults that tests must see: a line of the source becomes another one, and every named test must fail.

They stand where a fault is silent: training goes on, and a number is wrong. `run_mutants.py` tries them; a
quick test (`tests/house/test_mutants.py`) keeps the table true to the source.

A text is found by its characters, once in its file. A file that moves is changed in `FILES`, a test in
`TESTS`. A fault that no test can see because it changes nothing that counts says why in `harmless`.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

FILES = {
    "loop": "versatune_ds/engine/train.py",
    "run": "versatune_ds/engine/run.py",
    "record": "versatune_ds/engine/step_record.py",
    "prepared": "versatune_ds/engine/prepared.py",
    "state": "versatune_ds/engine/state.py",
    "phases": "versatune_ds/engine/phases.py",
    "backend": "versatune_ds/engine/backend/deepspeed_backend.py",
    "model": "versatune_ds/engine/model/packed_lm.py",
    "recompute": "versatune_ds/engine/model/recompute.py",
    "rounded": "versatune_ds/engine/backend/rounded_adamw.py",
    "families": "versatune_ds/engine/model/families.py",
    "rope": "versatune_ds/engine/model/rope.py",
    "router": "versatune_ds/engine/model/router.py",
    "sequence": "versatune_ds/engine/model/sequence.py",
    "source": "versatune_ds/engine/model/source.py",
    "adapters": "versatune_ds/engine/model/adapters.py",
    "merge": "versatune_ds/engine/checkpointing/adapter_export.py",
    "derived": "versatune_ds/config/derive.py",
    "attention": "versatune_ds/engine/model/attention.py",
    "shape": "versatune_ds/engine/model/shape.py",
    "optimizer": "versatune_ds/engine/backend/optimizer.py",
    "noise": "versatune_ds/engine/model/noise.py",
    "comparison": "versatune_ds/data/plan/comparison.py",
    "divergence": "kernels/versatune_kernels/divergence.py",
    "statistics": "versatune_ds/engine/statistics.py",
    "evaluate": "versatune_ds/engine/evaluate.py",
    "questions": "versatune_ds/engine/answers/questions.py",
    "decoding": "versatune_ds/engine/answers/decoding.py",
    "skipping": "versatune_ds/engine/skipping.py",
    "checkpoint": "versatune_ds/engine/checkpointing/folder.py",
    "saving": "versatune_ds/engine/checkpointing/saver.py",
    "host copy": "versatune_ds/engine/checkpointing/host_copy.py",
    "intervals": "versatune_ds/engine/checkpointing/due.py",
    "saved shards": "versatune_ds/engine/backend/saved_shards.py",
    "export": "versatune_ds/engine/checkpointing/hf_export.py",
    "sinks": "versatune_ds/observability/sinks.py",
    "trackers": "versatune_ds/observability/trackers.py",
    "secrets": "versatune_ds/config/secrets.py",
    "foreign": "versatune_ds/apps/move_in/foreign.py",
    "foreign training": "versatune_ds/apps/move_in/training.py",
    "push": "versatune_ds/apps/push.py",
    "judge": "versatune_ds/apps/detect/classifier.py",
    "judge's learning": "versatune_ds/apps/detect/learning.py",
    "judge's vectors": "versatune_ds/apps/detect/embedding.py",
    "local judge": "versatune_ds/apps/detect/local_model.py",
    "detection": "versatune_ds/apps/detect/run.py",
    "topics": "versatune_ds/apps/detect/topics.py",
    "throughput": "versatune_ds/observability/throughput.py",
    "records": "versatune_ds/observability/records.py",
    "repositories": "versatune_ds/data/rows/repositories.py",
    "tables": "versatune_ds/data/rows/tables.py",
    "units": "versatune_ds/data/cache/units.py",
    "conversation": "versatune_ds/data/chat/conversation.py",
    "flags": "versatune_ds/data/chat/flags.py",
    "turns": "versatune_ds/data/chat/turns.py",
    "cache": "versatune_ds/data/cache/cache.py",
    "templating": "versatune_ds/data/encode/templating.py",
    "chat encoder": "versatune_ds/data/encode/chat_encoder.py",
    "collate": "versatune_ds/data/collate.py",
    "loader": "versatune_ds/data/loader.py",
    "planner": "versatune_ds/data/plan/planner.py",
    "planner state": "versatune_ds/data/plan/state.py",
    "corpus": "versatune_ds/data/plan/corpus.py",
    "share rules": "versatune_ds/data/plan/share_rules.py",
    "packing": "versatune_ds/data/plan/packing.py",
    "order": "versatune_ds/data/plan/order.py",
    "balance": "versatune_ds/data/plan/balance.py",
    "controller": "versatune_ds/domain/controller.py",
    "guard": "versatune_ds/domain/probes/guard.py",
    "rules": "versatune_ds/strategies/rules.py",
    "simplex": "versatune_ds/strategies/simplex.py",
    "sums": "versatune_ds/domain/statistics.py",
    "stopping": "versatune_ds/domain/early_stopping.py",
    "distributed": "versatune_ds/foundations/distributed.py",
    "row kernels": "kernels/versatune_kernels/triton_kernels.py",
    "triton": "kernels/versatune_kernels/triton_backend.py",
    "chunked": "kernels/versatune_kernels/chunked.py",
    "segments": "kernels/versatune_kernels/sums.py",
    "operator": "kernels/versatune_kernels/fused_op.py",
    "loss": "kernels/versatune_kernels/loss.py",
}
TESTS = {
    "judge": "tests/apps/detect/test_sources.py",
    "classifier": "tests/apps/detect/test_classifier.py",
    "asked": "tests/apps/detect/test_local_model.py",
    "loop": "tests/engine/test_loop.py",
    "go back": "tests/engine/test_go_back.py",
    "backend": "tests/engine/test_deepspeed_backend.py",
    "phases": "tests/engine/test_phases.py",
    "isolation": "tests/engine/test_isolation.py",
    "recompute": "tests/engine/test_recompute.py",
    "states": "tests/engine/test_optimizer_states.py",
    "body": "tests/engine/test_body.py",
    "optimizer": "tests/engine/test_optimizer.py",
    "statistics": "tests/engine/test_statistics.py",
    "answers": "tests/engine/test_answers.py",
    "skipping": "tests/engine/test_skipping.py",
    "checkpoint": "tests/engine/test_checkpoint.py",
    "saving": "tests/engine/test_saving.py",
    "best": "tests/engine/test_best_checkpoint.py",
    "noise": "tests/engine/test_noise.py",
    "base kl": "tests/engine/test_base_kl.py",
    "comparison": "tests/data/test_comparison.py",
    "divergence": "tests/fused_loss/test_divergence.py",
    "average": "tests/engine/test_average.py",
    "muon": "tests/engine/test_muon.py",
    "export": "tests/engine/test_export.py",
    "reshard": "tests/engine/test_reshard.py",
    "model": "tests/engine/test_model.py",
    "families": "tests/engine/test_families.py",
    "router": "tests/engine/test_router.py",
    "sequence": "tests/engine/test_sequence.py",
    "sequence runs": "tests/engine/test_sequence_runs.py",
    "adapters": "tests/engine/test_adapters.py",
    "derived": "tests/config/test_derive.py",
    "step": "tests/engine/test_step.py",
    "sinks": "tests/observability/test_sinks.py",
    "trackers": "tests/observability/test_trackers.py",
    "import": "tests/apps/test_import_config.py",
    "push": "tests/apps/test_push.py",
    "throughput": "tests/observability/test_throughput.py",
    "records": "tests/observability/test_records.py",
    "containers": "tests/data/test_containers.py",
    "templating": "tests/data/test_templating.py",
    "conversations": "tests/data/test_conversations.py",
    "cache": "tests/data/test_cache.py",
    "weighted loop": "tests/engine/test_weighted_loop.py",
    "collate": "tests/data/test_collate.py",
    "loader": "tests/data/test_loader.py",
    "planner": "tests/data/test_planner.py",
    "packing": "tests/data/test_packing.py",
    "order": "tests/data/test_order.py",
    "balance": "tests/data/test_balance.py",
    "controller": "tests/domain/test_controller.py",
    "guard": "tests/domain/test_guard.py",
    "rules": "tests/strategies/test_rules.py",
    "simplex": "tests/strategies/test_simplex.py",
    "sums": "tests/domain/test_statistics.py",
    "stopping": "tests/domain/test_early_stopping.py",
    "foundations": "tests/foundations/test_foundations.py",
    "triton": "tests/fused_loss/test_triton.py",
    "kernel sums": "tests/fused_loss/test_sums.py",
    "float64": "tests/fused_loss/test_against_float64.py",
    "chunks": "tests/fused_loss/test_chunks.py",
    "autograd": "tests/fused_loss/test_autograd.py",
    "edges": "tests/fused_loss/test_token_edges.py",
}


class Mutant(NamedTuple):
    """One fault."""

    name: str
    file: str
    """Key of `FILES`."""
    find: str
    put: str
    tests: tuple[str, ...]
    """Node ids, as pytest takes them; all must fail."""
    harmless: str = ""
    """Why no test can see it."""

    def digest(self, tree: str) -> str:
        """Of the fault and the tree that it is put into."""
        return hashlib.sha256(repr((tuple(self), tree)).encode()).hexdigest()


MUTANTS: list[Mutant] = []


def fault(name: str, file: str, find: str, put: str, *tests: str, harmless: str = "") -> None:
    """Add a line to the table.

    Args:
        tests: `KEY::test`, KEY of `TESTS`.
    """
    split = [test.partition("::") for test in tests]
    nodes = tuple(f"{TESTS[key]}::{test}" for key, _, test in split)
    MUTANTS.append(Mutant(name, file, find, put, nodes, harmless))


# --- the loop -----------------------------------------------------------------------------------------------

PLAIN = "loop::test_every_step_is_that_of_plain_pytorch"
RATE = "loop::test_the_rate_of_the_schedule_is_applied_and_written_down"
WRITTEN = "loop::test_what_is_written_down_is_what_plain_pytorch_finds"
WINDOW = "loop::test_the_losses_that_move_the_weights_are_those_of_their_window"
HELD_OUT = "loop::test_held_out_losses_are_means_over_tokens_before_and_after_training"
NO_TRACE = "loop::test_a_skipped_step_leaves_no_trace_in_the_window_and_the_spike_guard"
NO_CHANGE = "loop::test_a_skipped_step_changes_no_parameter"
IN_A_ROW = "loop::test_skipped_steps_in_a_row_end_the_run_and_others_do_not"
RESUMED = "loop::test_a_resumed_run_ends_with_the_parameters_of_the_whole_one"

MICRO_BATCH = "backend::test_a_micro_batch_is_added_as_it_is_and_the_last_one_is_named"
STEPPED = "backend::test_a_step_is_taken_with_its_learning_rate"
SET_RATE = "        set_learning_rate(self.live.optimizer, learning_rate, self.muon_factor)\n"
TAKE_STEP = "        self.live.step()\n"
fault(
    "the learning rate is set after the step", "backend", SET_RATE + TAKE_STEP, TAKE_STEP + SET_RATE, STEPPED
)
fault("the learning rate is never set", "backend", SET_RATE, "", STEPPED)
fault(
    "the learning rate of the step after is applied",
    "loop",
    "learning_rate(run.config.optimizer, step, run",
    "learning_rate(run.config.optimizer, step + 1, run",
    PLAIN,
    RATE,
)
fault("another learning rate is written down", "record", "lr=rate,", "lr=run.config.optimizer.lr,", RATE)
fault(
    "only the first parameter group gets the learning rate",
    "optimizer",
    "for group in optimizer.param_groups:",
    "for group in optimizer.param_groups[:1]:",
    "loop::test_every_step_is_that_of_plain_pytorch",
)
fault(
    "skipped steps enter the window and the spike guard",
    "loop",
    "if applied and totals.sums is not None:",
    "if totals.sums is not None:",
    NO_TRACE,
)
fault(
    "applied steps do not enter the window",
    "loop",
    "            state.controller.observe(totals.sums)\n",
    "",
    WINDOW,
)
fault(
    "applied steps do not enter the spike guard",
    "loop",
    "            state.spikes.observe(totals.sums.total_loss())\n",
    "",
    NO_TRACE,
)
fault(
    "a skipped step's gradients stay",
    "loop",
    "        run.backend.discard()\n",
    "",
    NO_CHANGE + "[loss spike]",
    NO_CHANGE + "[non-finite gradient]",
)
fault(
    "every pack ends a step",
    "loop",
    "is_last=i == len(batches) - 1)",
    "is_last=True)",
    "loop::test_a_step_ends_with_its_last_pack",
)
fault("no pack ends a step", "loop", "is_last=i == len(batches) - 1)", "is_last=i == len(batches))", PLAIN)
fault("the first pack ends a step", "loop", "is_last=i == len(batches) - 1)", "is_last=i == 0)", PLAIN)
fault(
    "losses are divided by all tokens, not the supervised ones",
    "loop",
    "normalizer, passes = plan.loss_weight /",
    "normalizer, passes = plan.tokens /",
    PLAIN,
)
fault(
    "losses are divided by the tokens of a pack, not of the step",
    "loop",
    "model_inputs(on_device, normalizer, ",
    "model_inputs(on_device, on_device.supervised_tokens * len(batches), ",
    PLAIN,
)
fault(
    "the first pack is not counted",
    "loop",
    "            run.statistics.add(out",
    "            if i: run.statistics.add(out",
    WRITTEN,
)
fault(
    "skips are counted though applied steps lie between",
    "loop",
    "state.skipped_in_a_row + 1 if reason else 0",
    "state.skipped_in_a_row + 1 if reason else state.skipped_in_a_row",
    IN_A_ROW,
)
fault("weights move a step late", "loop", "due(done, skipped", "due(step, skipped", WINDOW)
fault(
    "weights move on skipped steps",
    "loop",
    "skipped=not applied)",
    "skipped=False)",
    "loop::test_no_weights_move_on_a_skipped_step",
)
fault(
    "the last held-out losses are not measured",
    "loop",
    " or done == run.prepared.total_steps)\n",
    ")\n",
    "loop::test_the_last_step_is_evaluated_and_saved_whatever_the_interval",
)
fault(
    "held-out losses are measured before a step",
    "loop",
    "        evaluate_when_due(run, done)\n",
    "        evaluate_when_due(run, step)\n",
    HELD_OUT,
)
fault(
    "a run that was asked to stop goes on",
    "loop",
    "if agreed.stop and not last:",
    "if False:",
    "loop::test_asked_to_stop_it_saves_and_goes_on_when_started_again",
)
fault(
    "checkpoints in the background are never published at a boundary",
    "loop",
    "        run.saver.settle(agreed)\n",
    "",
    "loop::test_checkpoints_in_the_background_are_published_while_training_goes_on",
)
fault(
    "the state of a checkpoint is that of the step before",
    "loop",
    "run.save(done)\n        if agreed",
    "run.save(step)\n        if agreed",
    "loop::test_the_last_step_is_evaluated_and_saved_whatever_the_interval",
)
fault(
    "achieved shares are counted in another unit",
    "record",
    "getattr(plan.trained.shares(), u)",
    "plan.trained.shares().samples",
    "loop::test_shares_are_those_of_the_samples_trained_on",
)
fault(
    "epochs count tokens",
    "record",
    "plan.state_after.trained.samples, run.prepared.corpus",
    "plan.state_after.trained.tokens, run.prepared.corpus",
    "loop::test_shares_are_those_of_the_samples_trained_on",
)

# --- opening and going on -----------------------------------------------------------------------------------

fault(
    "a resumed run forgets its spike guard",
    "state",
    '() if saved is None else saved["losses"]',
    "()",
    "loop::test_a_resumed_run_knows_its_earlier_losses_and_skips",
)
fault(
    "a resumed run forgets its skips in a row",
    "state",
    'int(saved["skipped_in_a_row"])',
    "0",
    "loop::test_a_resumed_run_knows_its_earlier_losses_and_skips",
)
fault(
    "a resumed run forgets its domain weights",
    "state",
    '            state.controller.load_state(saved["controller"])\n',
    "",
    RESUMED,
)
fault(
    "a resumed run begins the data anew",
    "state",
    'PlannerState.from_json(saved["planner"])',
    "state.planner",
    RESUMED,
)
fault(
    "a resumed run forgets the best evaluation",
    "state",
    '            state.early_stopping.load_state(saved["early_stopping"])\n',
    "",
    "loop::test_a_resumed_run_knows_its_best_evaluation",
)
fault(
    "a resumed run begins with new weights and moments",
    "run",
    "        folders.load_model_state(checkpoint, backend, saved)\n",
    "",
    RESUMED,
)
fault(
    "epochs are counted in samples",
    "prepared",
    "config.train.epochs * sum(corpus.num_tokens)",
    "config.train.epochs * sum(corpus.num_samples)",
    "loop::test_epochs_are_counted_in_tokens",
)
fault(
    "the probe takes samples of the run's evaluation",
    "run",
    "max_samples=config.weights.probe_samples",
    "max_samples=config.evaluation.max_samples_per_domain",
    "loop::test_the_probe_takes_its_own_number_of_samples",
)

# --- statistics and agreement -------------------------------------------------------------------------------

FLAGS = "statistics::test_what_one_rank_says_is_true_for_all_and_nothing_else"
SUMS = "statistics::test_sums_equal_the_reference_over_micro_batches"
fault("a flag needs all ranks", "statistics", "bool(n > 0)", "bool(n == 3)", FLAGS)
fault(
    "flags are shifted by one",
    "statistics",
    "np.split(buffer[count + 1 :], sizes)",
    "np.split(buffer[count:], sizes)",
    FLAGS,
)
fault("sums are not cleared", "statistics", "        self._sums.zero_()\n", "", SUMS)
fault(
    "a NaN is found again in the step after",
    "statistics",
    "        self._nonfinite.zero_()\n",
    "",
    "statistics::test_a_nan_marks_the_step_and_no_other_domain",
)
fault(
    "samples without a label are counted",
    "sums",
    "tokens.clip(0, 1)",
    "tokens.clip(1, 1)",
    SUMS,
)
fault(
    "squares of losses are not squared",
    "sums",
    "loss * loss, loss * tokens",
    "loss, loss * tokens",
    SUMS,
)
fault(
    "a NaN of one domain reaches the others",
    "statistics",
    "torch.where(of_domain & self.counts, per_sample, 0.0)",
    "(of_domain * per_sample)",
    "statistics::test_a_nan_marks_the_step_and_no_other_domain",
)
fault(
    "only a loss that is NaN everywhere is found",
    "statistics",
    "(~torch.isfinite(loss).all())",
    "(~torch.isfinite(loss).any())",
    "statistics::test_infinite_losses_whose_sums_are_finite_are_found",
)
fault("the last micro-batch counts alone", "statistics", "self._sums += sums", "self._sums = sums", SUMS)
fault(
    "ranks agree when one does",
    "distributed",
    "all_reduce_sum(votes).item() == world_size()",
    "all_reduce_sum(votes).item() > 0",
    "foundations::test_ranks_see_every_difference",
)
fault(
    "mean losses are sums",
    "sums",
    "return _divide(self.values[SumRow.LOSS_SUM], self.tokens, where=self.tokens > 0)",
    "return self.values[SumRow.LOSS_SUM] / np.maximum(self.samples, 1)",
    "sums::test_mean_is_a_ratio_of_sums_and_not_a_mean_of_means",
)
fault(
    "the standard error's n - 1 is n",
    "sums",
    "(self.samples - 1.0) * self.tokens**2",
    "self.samples * self.tokens**2",
    "sums::test_stderr_by_hand",
    HELD_OUT,
)
fault(
    "the standard error forgets the cross term",
    "sums",
    "- 2.0 * loss * self",
    "- loss * self",
    "sums::test_stderr_by_hand",
    HELD_OUT,
)
fault(
    "the total loss is a mean over domains",
    "sums",
    "return math.fsum(self.values[SumRow.LOSS_SUM]) / tokens if tokens > 0 else None",
    "return float(np.nanmean(self.mean_loss())) if tokens > 0 else None",
    WRITTEN,
)

# --- scored answers -----------------------------------------------------------------------------------------

GENERATES = "answers::test_a_model_that_takes_packs_generates_as_it_is_in_transformers"
fault(
    "the first of several turns is asked",
    "questions",
    "labels[gaps[-1] + 1]",
    "labels[gaps[0] + 1]",
    "answers::test_the_last_supervised_turn",
)
fault(
    "answers belong to other questions",
    "questions",
    "found |= zip(batch, ",
    "found |= zip(batch[::-1], ",
    "answers::test_answers_are_those_of_the_exported_model",
)
fault(
    "answers see the padding of their batch",
    "decoding",
    "attention_mask=mask",
    "attention_mask=torch.ones_like(mask)",
    f"{GENERATES}[llama]",
    "answers::test_answers_are_those_of_the_exported_model",
)
fault(
    "training goes on with the attention of generation",
    "decoding",
    "stack.callback(lm.set_attn_implementation, packed)",
    "pass",
    f"{GENERATES}[llama]",
)

# --- evaluation ---------------------------------------------------------------------------------------------

fault(
    "held-out losses are those of the training mode",
    "backend",
    "        self.live.eval()\n",
    "",
    "backend::test_an_evaluation_leaves_the_model_training_and_keeps_nothing",
)
fault(
    "after an evaluation the model does not train",
    "backend",
    "        self.live.train()\n",
    "",
    "backend::test_an_evaluation_leaves_the_model_training_and_keeps_nothing",
)
fault(
    "evaluation leaves out the last pack",
    "evaluate",
    "for i, pack in enumerate(held_out.packs):",
    "for i, pack in enumerate(held_out.packs[:-1]):",
    HELD_OUT,
)
fault(
    "evaluation takes all samples",
    "evaluate",
    "n if max_samples is None else min(n, max_samples)",
    "n",
    HELD_OUT,
)
fault(
    "evaluation takes one sample less",
    "evaluate",
    "min(n, max_samples) for",
    "min(n, max_samples - 1) for",
    HELD_OUT,
)
fault(
    "held-out samples of one domain count for the other",
    "evaluate",
    "np.full(n, d, dtype=np.int32) for d, n in enumerate(self.samples)",
    "np.full(n, len(self.samples) - 1 - d, dtype=np.int32) for d, n in enumerate(self.samples)",
    HELD_OUT,
)
fault(
    "held-out samples keep the losses of a neighbour",
    "evaluate",
    "losses[domain][samples[of_domain]] = loss[of_domain]",
    "losses[domain][samples[of_domain]] = loss[of_domain][::-1]",
    "loop::test_losses_of_single_held_out_samples_stand_in_cache_order",
)
fault(
    "held-out sizes of another domain",
    "evaluate",
    "tokens[domain][samples[of_domain]] = count[of_domain]",
    "tokens[domain][samples[of_domain]] = count[:of_domain.sum()]",
    "loop::test_losses_of_single_held_out_samples_stand_in_cache_order",
)
fault(
    "the overall loss is a mean over domains",
    "records",
    "total, tokens = total + loss * count, tokens + count",
    "total, tokens = total + loss, tokens + 1",
    "records::test_eval_loss_divides_sums_once",
    HELD_OUT,
)
fault(
    "packing efficiency is upside down",
    "records",
    "ratio(self.real_tokens, self.slot_tokens)",
    "ratio(self.slot_tokens, self.real_tokens)",
    "records::test_step_line_reads_back_and_holds_derived_rates",
)
fault(
    "attention FLOPs are not halved by the causal mask",
    "shape",
    "attention = (6.0 + again)",
    "attention = (12.0 + again)",
    "families::test_flops_by_hand",
)
fault(
    "MFU is that of one accelerator",
    "throughput",
    "(seconds * num_accelerators *",
    "(seconds *",
    "throughput::test_mfu_by_hand",
)
fault(
    "biases of the output projection are not counted",
    "families",
    "vectors += (query, key, key, hidden)",
    "vectors += (query, key, key)",
    "families::test_parameters_are_those_of_the_built_model[llama, biases]",
)
fault(
    "norms of heads are not counted",
    "families",
    "vectors += (head_size, head_size)",
    "vectors += ()",
    "families::test_parameters_are_those_of_the_built_model[qwen3]",
)
fault(
    "norms over all heads are not counted",
    "families",
    "vectors += (query, key)\n",
    "vectors += ()\n",
    "families::test_parameters_are_those_of_the_built_model[olmo2]",
)
ALTERED = "families::test_a_pack_has_the_losses_and_gradients_of_transformers_and_is_exported"
fault(
    "capped logits are not capped",
    "families",
    "return LogitRule(scale, value(family.softcap, 0.0))",
    "return LogitRule(scale)",
    f"{ALTERED}[gemma2]",
    f"{ALTERED}[gemma3_text, capped]",
)
fault(
    "the longest sample chooses the rotary frequencies of a pack",
    "model",
    "self.rotary: list[Any] = rotate_by_sample(self)",
    "",
    f"{ALTERED}[llama, dynamic rope]",
    f"{ALTERED}[phi3, longrope]",
    "isolation::test_losses_of_a_sample_are_bit_equal_whatever_its_neighbour[phi3, longrope-True]",
)
fault(
    "rotary frequencies remember the samples before",
    "rope",
    "setattr(module, name, module.original_max_seq_len)",
    "pass",
    f"{ALTERED}[llama, dynamic rope]",
)
fault(
    "the probe's neighbour stays below the turn of the frequencies",
    "backend",
    "min(2 * turn - 2,",
    "min(turn,",
    "isolation::test_a_run_probes_beyond_the_turning_length",
)
fault(
    "a window of the varlen kernel is a token too wide",
    "attention",
    "else sliding_window - 1, 0)",
    "else sliding_window, 0)",
    "isolation::test_varlen_calls_the_kernel_as_its_version_of_torch_wants",
)
fault(
    "a head that the files hold is dropped for a configuration that ties it",
    "source",
    "            config.tie_word_embeddings = False\n",
    "",
    "step::test_two_steps_equal_plain_pytorch[2-lie-packed-zero3]",
)
fault(
    "an embedding and a head that differ pass for one matrix",
    "source",
    "or not all(",
    "or not any(",
    "model::test_a_head_is_compared_to_its_last_row",
)
fault(
    "the balance loss of routers is added once a pack",
    "model",
    "extra / passes",
    "extra",
    f"{ALTERED}[qwen3_moe]",
    f"{ALTERED}[mixtral]",
)
fault(
    "routers balance padding, too",
    "router",
    "(probabilities * real.unsqueeze(-1))",
    "probabilities",
    "router::test_the_loss_is_that_of_transformers_without_padding",
)
fault(
    "experts of padding are counted",
    "router",
    "counted = real.long()",
    "counted = torch.ones_like(real).long()",
    "router::test_the_loss_is_that_of_transformers_without_padding",
)
fault(
    "what a rehearsal has counted stays",
    "statistics",
    "            routers.take()  # what a rehearsal has left\n",
    "            pass\n",
    "router::test_counts_of_a_rehearsal_are_dropped_and_those_of_a_step_go_with_its_sums",
)
fault(
    "frozen routers are still balanced",
    "model",
    "0.0 if frozen else settings.router_aux_loss",
    "settings.router_aux_loss",
    "router::test_frozen_routers_train_nothing_and_add_nothing",
)
fault(
    "routers are balanced beside an adapter",
    "model",
    'settings.router == "frozen" or settings.adapter is not None',
    'settings.router == "frozen"',
    "router::test_frozen_routers_train_nothing_and_add_nothing",
)
ADAPTED = "adapters::test_a_new_adapter_changes_nothing_yet_and_is_all_that_is_trained"
MERGED = "export::test_the_text_part_of_a_model_of_images_is_merged_alone"
fault(
    "routers and experts get adapters",
    "adapters",
    "lora_config(settings, _targets(lm, settings))",
    "lora_config(settings, settings.targets)",
    "adapters::test_of_a_mixture_all_linear_is_its_attention[qwen3_moe]",
    "adapters::test_of_a_mixture_all_linear_is_its_attention[mixtral]",
)
fault(
    "the model trains beside its adapter",
    "adapters",
    "    if started is not None:\n",
    "    lm.requires_grad_(True)\n    if started is not None:\n",
    ADAPTED,
)
fault("adapters begin as chance has it", "adapters", "    torch.manual_seed(seed)\n", "", ADAPTED)
fault(
    "dropout is left out",
    "adapters",
    "lora_dropout=settings.dropout",
    "lora_dropout=0.0",
    "adapters::test_dropout_is_of_the_adapters_input_in_training_only",
)
fault(
    "adapters are added up without their scales",
    "adapters",
    "factors[folder] * part.scaling / scale",
    "factors[folder]",
    "adapters::test_several_adapters_are_added_up_exactly",
)
fault(
    "a merge leaves the scale out",
    "merge",
    "weight.float() + scale * (b @ a)",
    "weight.float() + b @ a",
    f"{MERGED}[gemma3-lora]",
    f"{MERGED}[mistral3-dora]",
)
fault(
    "a merge leaves the lengths of rows out",
    "merge",
    "    if length is None:\n",
    "    if True:\n",
    f"{MERGED}[mistral3-dora]",
)
fault(
    "a frozen model's work counts as if it trained",
    "shape",
    "6.0 if self.trained is None else 4.0",
    "6.0",
    "families::test_a_frozen_model_has_no_product_for_the_gradients_of_its_weights",
)
fault(
    "an adapter of a reference trains at the model's rate",
    "derived",
    " * ADAPTER_RATE**change",
    "",
    "derived::test_large_references_are_trained_as_adapters",
)
fault(
    "a frozen head has a third product",
    "loss",
    "training and weight.requires_grad",
    "training",
    "autograd::test_three_products_per_chunk_and_none_for_what_is_frozen",
)
fault(
    "the export holds experts as transformers does",
    "router",
    "    if not experts_of(config):\n        yield from tensors",
    "    if True:\n        yield from tensors",
    f"{ALTERED}[qwen3_moe]",
)
fault(
    "experts that a token does not reach count as its work",
    "shape",
    "idle = self.experts.count - self.experts.active",
    "idle = 0",
    "families::test_only_experts_that_a_token_reaches_count",
)
fault(
    "scaled logits are scaled the other way",
    "families",
    "value(family.logit_factor, 1.0) / value(family.logit_divisor, 1.0)",
    "value(family.logit_divisor, 1.0) / value(family.logit_factor, 1.0)",
    f"{ALTERED}[cohere]",
    f"{ALTERED}[granite]",
)
fault(
    "logits that no row knows are trained as they are",
    "families",
    "if key not in known and",
    "if key in known and",
    "families::test_a_field_that_the_family_does_not_read_is_refused",
)
fault(
    "token weights do not reach the loss",
    "model",
    "            token_weight=token_weight,\n",
    "",
    "families::test_token_weights_reach_the_loss_and_no_sum",
)
fault(
    "the type of the logits does not reach the loss",
    "model",
    "logits_dtype=self.logits_dtype,",
    'logits_dtype="fp32",',
    "families::test_16_bit_logits_reach_the_triton_loss_and_are_refused_elsewhere",
)
fault(
    "16-bit logits are accepted where nothing holds them",
    "backend",
    'if config.model.logits_dtype == "compute" and loss.name != "triton":',
    "if False:",
    "families::test_16_bit_logits_reach_the_triton_loss_and_are_refused_elsewhere",
)
fault(
    "early stopping waits for equal losses",
    "stopping",
    "loss < self.best_loss",
    "loss <= self.best_loss",
    "stopping::test_patience",
)
fault(
    "early stopping waits one evaluation longer",
    "stopping",
    "self.waited >= self.patience",
    "self.waited > self.patience",
    "stopping::test_patience",
)
fault(
    "early stopping forgets how long it waited",
    "stopping",
    'int(state["best_step"]), int(state["waited"])',
    'int(state["best_step"]), 0',
    "stopping::test_state_goes_through_json",
)

# --- skipped steps ------------------------------------------------------------------------------------------

SPIKE = "skipping::test_a_spike_is_more_than_the_factor_times_the_median"
fault(
    "a spike is measured by the mean",
    "state",
    "loss > factor * median(earlier)",
    "loss > factor * (sum(earlier) / len(earlier))",
    SPIKE,
)
fault("a spike needs one loss less", "state", ">= MIN_LOSSES and", ">= MIN_LOSSES - 1 and", SPIKE)
fault(
    "the spike guard forgets nothing",
    "state",
    "deque(losses, maxlen=window)",
    "deque(losses)",
    "skipping::test_the_guard_knows_the_last_losses_only",
)
fault(
    "gradients that are not finite are applied",
    "skipping",
    "return None if backend.gradients_are_finite() else NONFINITE_GRADIENT",
    "return None",
    NO_CHANGE + "[non-finite gradient]",
)
fault(
    "a spike is applied",
    "skipping",
    "    if spikes.is_spike(totals.sums.total_loss()):\n        return LOSS_SPIKE\n",
    "",
    NO_CHANGE + "[loss spike]",
)
fault(
    "one skip more is allowed",
    "skipping",
    "run.state.skipped_in_a_row < run.config",
    "run.state.skipped_in_a_row <= run.config",
    IN_A_ROW,
)
fault(
    "samples of sound losses are blamed",
    "skipping",
    "if reason == NONFINITE_LOSS and is_finite:",
    "if reason == NONFINITE_LOSS and not is_finite:",
    "loop::test_the_samples_to_blame_are_named",
)
fault(
    "a sample is blamed for its length",
    "skipping",
    'entry["loss"] = loss / max(1, int(run.prepared.train[domain].supervised[sample]))',
    'entry["loss"] = loss',
    "loop::test_the_samples_to_blame_are_named",
)

fault(
    "gradients of ZeRO stage 0 are not looked at",
    "backend",
    "        if zero_stage(self.settings) > 0:\n            return True\n        gradients",
    "        return True\n        gradients",
    "backend::test_gradients_of_stage_0_are_looked_at",
)
fault(
    "discarded gradients stay",
    "backend",
    "        optimizer.zero_grad()\n",
    "",
    "backend::test_a_discarded_step_leaves_no_gradient",
)
fault(
    "DeepSpeed divides the loss by the accumulation steps",
    "backend",
    "scale_wrt_gas=False",
    "scale_wrt_gas=True",
    MICRO_BATCH,
)
fault(
    "DeepSpeed divides the model's own output by the accumulation steps",
    "backend",
    "self.live.backward(loss.clone(),",
    "self.live.backward(loss,",
    MICRO_BATCH,
)
fault(
    "DeepSpeed takes every pack for the last one",
    "backend",
    "set_gradient_accumulation_boundary(is_last)",
    "set_gradient_accumulation_boundary(True)",
    MICRO_BATCH,
)
fault(
    "a phase counts what the phases inside it took",
    "phases",
    "took - inside.pop(span.depth + 1, 0.0)",
    "took",
    "phases::test_the_time_of_a_phase_is_with_those_inside_or_without",
)

# --- the model ----------------------------------------------------------------------------------------------

fault(
    "the model attends by a mask",
    "model",
    "attention_mask=None,",
    "attention_mask=torch.ones_like(input_ids).unsqueeze(0),",
    "isolation::test_losses_of_a_sample_are_bit_equal_whatever_its_neighbour[llama-False]",
)
fault(
    "positions do not restart",
    "model",
    "position_ids=position_ids.unsqueeze(0)",
    "position_ids=torch.arange(len(input_ids)).unsqueeze(0)",
    PLAIN,
)
fault(
    "random weights ignore the seed",
    "source",
    "    torch.manual_seed(seed)\n",
    "",
    "model::test_random_weights_follow_the_seed",
)
fault(
    "every second layer is recomputed for all",
    "recompute",
    "every = policy if isinstance(policy, int) else 1",
    "every = policy if isinstance(policy, int) else 2",
    "isolation::test_checkpointed_layers_run_again_in_backward",
)
fault(
    "products are computed again in spite of selective",
    "recompute",
    '    "aten::mm",\n',
    "",
    "recompute::test_selective_computes_no_product_and_no_attention_again",
)
fault(
    "a layer's input stays where it is",
    "recompute",
    "host = tensor.detach().clone()",
    "host = tensor.detach()",
    "recompute::test_inputs_wait_in_memory_of_their_own_and_the_one_before_is_fetched_ahead",
)
fault(
    "inputs of layers are kept for ever",
    "recompute",
    "self._last = weakref.ref(held)",
    "self._last = lambda: held",
    "recompute::test_nothing_is_held_after_backward",
)
fault(
    "Liger overwrites kept products",
    "model",
    "unwanted = {*left_out, ",
    "unwanted = {",
    "body::test_liger_leaves_out_what_would_overwrite_kept_products",
)
fault(
    "moments are rounded to the nearest",
    "rounded",
    "exp_avg_sq.copy_(rounded(second))\n    root = second",
    "exp_avg_sq.copy_(second)\n    root = second",
    "states::test_small_gradients_add_up_in_a_second_moment",
)
fault(
    "bf16 weights are rounded to the nearest",
    "rounded",
    "weight.copy_(rounded(moved) if",
    "weight.copy_(moved if",
    "states::test_updates_smaller_than_a_bf16_step_are_not_lost",
)
fault(
    "rounding is biased",
    "rounded",
    "torch.randint(0, 2**16,",
    "torch.randint(0, 2**15,",
    "states::test_rounding_is_right_on_average_and_goes_to_a_neighbour",
)
fault(
    "bias correction of the second moment forgotten",
    "rounded",
    "root = second.sqrt_().div_((1 - beta2**step) ** 0.5)",
    "root = second.sqrt_()",
    "states::test_bf16_moments_follow_torchs_adamw",
)
fault(
    "a window is one token too long, one sample after the other",
    "attention",
    "triu_(1 - sliding_window)",
    "triu_(-sliding_window)",
    "isolation::test_one_sample_after_the_other_is_the_block_diagonal_mask",
)
fault(
    "rotary frequencies stay rounded",
    "model",
    "        setattr(module, attribute, value.to(getattr(module, attribute).device))\n",
    "        pass\n",
    "model::test_rotary_frequencies_survive_a_cast",
)
fault(
    "decay on vectors",
    "optimizer",
    '"weight_decay": 0.0}',
    '"weight_decay": weight_decay}',
    "optimizer::test_decay_is_for_matrices_only",
    PLAIN,
)
fault(
    "no decay on matrices",
    "optimizer",
    '"params": matrices, "weight_decay": weight_decay',
    '"params": matrices, "weight_decay": 0.0',
    "optimizer::test_decay_is_for_matrices_only",
    PLAIN,
)
fault(
    "warm-up begins at zero",
    "optimizer",
    "(step + 1) / warmup",
    "step / warmup",
    "optimizer::test_warm_up_rises_linearly_to_the_peak",
    RATE,
)
fault(
    "decay ends at zero, not at the floor",
    "optimizer",
    "(settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * decay)",
    "decay",
    RATE,
)
fault(
    "decay is measured from the first step",
    "optimizer",
    "(step - start) / (total_steps - start)",
    "step / total_steps",
    RATE,
)
fault("the settings' betas are not taken", "optimizer", '"betas": settings.betas, ', "", PLAIN)

# --- checkpoints --------------------------------------------------------------------------------------------

NEWER = "checkpoint::test_newer_ones_that_were_damaged_go_and_the_new_one_stays"
fault(
    "damaged newer checkpoints stay",
    "checkpoint",
    "if step_of(path) >= step)",
    "if step_of(path) == step)",
    NEWER,
)
fault(
    "an older checkpoint of the same step stays in the way",
    "checkpoint",
    "if step_of(path) >= step)",
    "if step_of(path) > step)",
    NEWER,
)
fault(
    "the CPU's random state is not restored",
    "checkpoint",
    '        torch.set_rng_state(states["cpu"])\n',
    "",
    "checkpoint::test_random_generators_go_on_where_they_were_with_as_many_ranks",
)
fault(
    "ranks draw the same after a change of their number",
    "checkpoint",
    "        torch.manual_seed(int(seed[:15], 16))\n",
    "        pass\n",
    "checkpoint::test_random_generators_go_on_where_they_were_with_as_many_ranks",
)
fault(
    "one checkpoint too few is kept",
    "checkpoint",
    "[settings.keep_last :]",
    "[settings.keep_last - 1 :]",
    "checkpoint::test_pruning_keeps_the_newest_and_milestones_and_what_is_needed",
    NEWER,
)
fault(
    "a wsd schedule decays from its warm-up on",
    "optimizer",
    "start = max(warmup,",
    "start = min(warmup,",
    "optimizer::test_warm_up_stays_and_decays",
)
fault(
    "the average of weights forgets as fast as it should remember",
    "optimizer",
    ".lerp_(weights, 1.0 - decay)",
    ".lerp_(weights, decay)",
    "average::test_the_average_is_in_host_memory_and_goes_when_it_is_not_asked_for_any_more",
)
fault(
    "noise falls with the length and not with its root",
    "noise",
    "lengths.clamp(min=1).rsqrt()",
    "lengths.clamp(min=1).reciprocal()",
    "noise::test_it_is_uniform_within_the_bound_of_each_sample_and_spares_padding",
)
fault(
    "noise is the same in every step",
    "noise",
    "[self.seed, step, rank_number(*rank)]",
    "[self.seed, rank_number(*rank)]",
    "noise::test_it_follows_from_seed_step_and_pack_and_not_from_the_ranks",
)
fault(
    "the KL goes from the model to the base",
    "divergence",
    "kl[rows] = (q * b.sub_(z)).sum(1)",
    "kl[rows] = (z.exp() * (z - b)).sum(1)",
    "divergence::test_the_direction_is_from_the_base",
    "divergence::test_values_and_gradients_are_those_of_float64",
)
fault(
    "the KL's gradient leaves the cap out",
    "divergence",
    "slope = scale * (1 - logits.square())",
    "slope = scale + 0 * logits",
    "divergence::test_values_and_gradients_are_those_of_float64",
)
fault(
    "the KL forgets the upstream gradient",
    "divergence",
    "d.mul_(upstream).to(ctx.dtype)",
    "d.to(ctx.dtype)",
    "divergence::test_values_and_gradients_are_those_of_float64",
)
fault(
    "the gradient of the head is that of the last chunk",
    "divergence",
    "gradient[:, block].T, x, accumulate=True,",
    "gradient[:, block].T, x, accumulate=False,",
    "divergence::test_values_and_gradients_are_those_of_float64",
)
fault(
    "a base that is a copy borrows the trained head",
    "adapters",
    "kl = kl_of(rows, None) if head is None else",
    "kl = kl_of(rows, weight.detach()) if head is not None else",
    "base kl::test_a_base_that_is_a_copy_predicts_what_the_untrained_model_does",
)
fault(
    "a base that is a copy trains along",
    "model",
    "            base.requires_grad_(False)\n",
    "",
    "base kl::test_a_base_that_is_a_copy_predicts_what_the_untrained_model_does",
)
fault(
    "every step compares the same samples",
    "comparison",
    '["kl_to_base", seed, step]',
    '["kl_to_base", seed]',
    "comparison::test_each_sample_is_chosen_with_the_probability_of_the_share",
    "comparison::test_all_or_nothing_and_other_seeds_and_steps",
)
fault(
    "a rank divides the KL by what it compares itself",
    "loader",
    "for pack, of in everyone)",
    "for pack, of in rank_packs(everyone, self.rank, self.world_size))",
    "comparison::test_ranks_and_a_resume_compare_what_one_rank_compares",
)
fault(
    "the base keeps its adapter",
    "adapters",
    "            layer._disable_adapters = True\n",
    "            pass\n",
    "base kl::test_the_model_is_whole_again_behind_the_base_and_a_rehearsal_leaves_nothing",
)
fault(
    "the KL of a step is carried into the next",
    "statistics",
    "        self._kl.zero_()\n",
    "",
    "base kl::test_a_resumed_run_compares_what_the_whole_one_does",
)
fault(
    "the chunked loss leaves the probability out of the gradient",
    "chunked",
    "        factor = factor * spec.logit_scale\n",
    "        factor = spec.logit_scale * (1.0 if row_weight is None else row_weight[:, None])\n",
    "float64::test_every_option",
)
fault(
    "the row kernel leaves the probability out",
    "row kernels",
    "token_weight *= tl.exp(-nll)",
    "token_weight *= 1.0",
    "float64::test_every_option",
)
fault(
    "matrices of Muon have the learning rate of AdamW",
    "optimizer",
    'rate * (muon_factor if group.get("use_muon") else 1.0)',
    "rate",
    "muon::test_its_matrices_have_a_learning_rate_of_their_own",
)
fault(
    "gradients are scattered where Muon needs them whole",
    "optimizer",
    '        zero["reduce_scatter"] = False\n',
    "        pass\n",
    "muon::test_deepspeed_s_reduce_scatter_is_off_where_muon_needs_that",
)
fault(
    "the model does not go back",
    "loop",
    "        run.go_back_when_overfitted(done)\n",
    "",
    "go back::test_the_model_is_again_what_it_was_at_the_best_probe",
)
fault(
    "a domain's best checkpoint is pruned",
    "checkpoint",
    "{checkpoint_name(step) for step in needed} | {noted",
    "{noted",
    "go back::test_the_model_is_again_what_it_was_at_the_best_probe",
)
fault(
    "a held domain comes back because the model went back",
    "guard",
    "if (has_risen or self.settings.go_back) and",
    "if has_risen and",
    "guard::test_it_says_where_to_go_back_to_and_what_to_keep_for_that",
)
fault(
    "the others' lowest losses outlive the return",
    "guard",
    "self._best[j], self.overfitted[j] = None, 0",
    "self.overfitted[j] = 0",
    "guard::test_it_says_where_to_go_back_to_and_what_to_keep_for_that",
)
fault(
    "a domain that others disturb counts as overfitted",
    "guard",
    "if not has_risen or (is_known and not self.falls[j].beyond(z)):",
    "if not has_risen:",
    "guard::test_a_domain_whose_training_loss_has_not_fallen_is_not_overfitted",
)
fault(
    "a window without training samples of a domain clears it",
    "guard",
    "or (is_known and not self.falls[j].beyond(z)):",
    "or not self.falls[j].beyond(z):",
    "guard::test_a_domain_whose_training_loss_has_not_fallen_is_not_overfitted",
)
fault(
    "a training loss that was not known at the best probe never is",
    "guard",
    "if is_best or math.isnan(self._trained[j].stderr):",
    "if is_best:",
    "guard::test_a_domain_whose_training_loss_has_not_fallen_is_not_overfitted",
)
fault(
    "the best checkpoint is pruned",
    "checkpoint",
    "if p.name not in kept and not",
    "if not",
    "best::test_the_best_one_outlives_the_newest_until_a_better_one_is_complete",
)
fault(
    "a lost best checkpoint stays the one to beat",
    "run",
    "        best.forget_best()\n",
    "",
    "best::test_without_its_checkpoint_another_one_becomes_the_best",
)
fault(
    "the last parameters are exported, not the best ones",
    "run",
    "            step = self.load_best()\n",
    "",
    "best::test_the_run_exports_its_best_parameters_and_not_its_last",
)
fault(
    "a resumed run evaluates again what its checkpoint knows",
    "loop",
    " or done == known:",
    ":",
    "best::test_a_resumed_run_has_the_same_best_one",
)
fault(
    "the best checkpoint is written twice",
    "saving",
    'if self._newest != note["step"]:',
    "if True:",
    "best::test_a_checkpoint_that_is_there_already_is_not_written_again",
)
fault(
    "the losses that are known stand for all",
    "stopping",
    "    if not counted or any(",
    "    counted = [c for c in counted if c[1] and c[1] > 0]\n    if not counted or any(",
    "stopping::test_what_an_evaluation_is_judged_by",
)
fault(
    "milestones are pruned",
    "checkpoint",
    "and not (milestone and step_of(p) % milestone == 0)",
    "",
    "checkpoint::test_pruning_keeps_the_newest_and_milestones_and_what_is_needed",
)
fault(
    "the oldest sound checkpoint is taken",
    "checkpoint",
    "key=lambda path: path.name, reverse=True",
    "key=lambda path: path.name",
    "checkpoint::test_newest_sound_checkpoint_is_found",
)
fault(
    "changed bytes are not noticed",
    "checkpoint",
    "if sha256_file(path) != sha256:",
    "if False:",
    "checkpoint::test_a_damaged_one_is_named_and_the_one_before_is_used[bit flipped]",
)
fault(
    "a rank looks at its first file only",
    "checkpoint",
    "sorted(files)[rank::world_size]",
    "sorted(files)[rank : rank + 1]",
    "checkpoint::test_a_damaged_one_is_named_and_the_one_before_is_used[file missing]",
)
fault(
    "what a crash left stays",
    "checkpoint",
    "        shutil.rmtree(unfinished)\n",
    "        pass\n",
    "checkpoint::test_a_new_checkpoint_removes_what_a_crash_left",
)
fault("ranks' lists stay in the checkpoint", "checkpoint", "        path.unlink()\n", "        pass\n", NEWER)
fault(
    "another precision is gone on with",
    "checkpoint",
    '("model.dtype", "another precision"),\n        ',
    "",
    "checkpoint::test_what_a_run_can_go_on_from",
)
fault(
    "a copy in the background shares the model's memory",
    "host copy",
    "storage.clone() if storage",
    "storage if storage",
    "saving::test_a_host_copy_is_apart_and_keeps_what_is_shared",
)
fault(
    "a share is listed though a file is missing",
    "saving",
    "        self._guarded(lambda: write_part(self._folder, self._written))\n",
    "        write_part(self._folder, self._written)\n",
    "saving::test_a_failed_share_keeps_its_first_problem_and_lists_nothing",
)
fault(
    "published while another rank writes",
    "saving",
    "if self._in_flight is not None and not agreed.writing:",
    "if self._in_flight is not None:",
    "saving::test_a_checkpoint_in_the_background_is_published_at_the_first_boundary_after_all_have_written",
)
fault(
    "a failed rank is not heard",
    "saving",
    "        if agreed.failed:\n",
    "        if False:\n",
    "saving::test_a_rank_that_could_not_write_says_so_at_the_boundary_and_nothing_is_published",
)
fault(
    "a failed rank says nothing",
    "saving",
    "or self._share.problem is not None\n",
    "or False\n",
    "saving::test_a_rank_that_could_not_write_says_so_at_the_boundary_and_nothing_is_published",
)
fault(
    "asked to stop, nothing is saved",
    "saving",
    "due = agreed.stop or agreed.save or",
    "due = agreed.save or",
    "saving::test_when_a_run_saves",
    "loop::test_asked_to_stop_it_saves_and_goes_on_when_started_again",
)
fault(
    "the clock's checkpoint is not written",
    "saving",
    "due = agreed.stop or agreed.save or",
    "due = agreed.stop or",
    "saving::test_when_a_run_saves",
)
fault(
    "the last step is not saved",
    "saving",
    " or (last and self.is_periodic)",
    "",
    "saving::test_when_a_run_saves",
    "loop::test_the_last_step_is_evaluated_and_saved_whatever_the_interval",
)
fault(
    "lost work is counted from the end of saving in the background",
    "saving",
    "began + stall_s if in_background else now, now)",
    "now, now)",
    "saving::test_work_since_a_checkpoint_in_the_background_is_counted_from_its_beginning",
)
fault(
    "milestones are not due",
    "intervals",
    " or (milestone and step % milestone == 0)",
    "",
    "saving::test_when_a_checkpoint_is_due_by_steps",
)
fault(
    "the bound on lost work forgets how long saving takes",
    "intervals",
    "self._safe_at + self.step_s + self.save_s >",
    "self._safe_at + self.step_s >",
    "saving::test_no_crash_loses_more_than_the_bound",
)
fault(
    "the bound on lost work forgets the next step",
    "intervals",
    "self._safe_at + self.step_s + self.save_s >",
    "self._safe_at + self.save_s >",
    "saving::test_no_crash_loses_more_than_the_bound",
)
fault(
    "stage 3: the last rank's part is padded",
    "saved shards",
    "min(part, numel - rank * part)",
    "part",
    "export::test_sizes_that_do_not_divide",
    "reshard::test_stage3_spans_find_every_element",
    harmless="whoever cuts spans asks for elements of the parameter only, and the padding lies behind them",
)
fault(
    "stage 3: parts are not padded in the flat group",
    "saved shards",
    "            offset += part\n",
    "            offset += numel // world_size\n",
    "export::test_sizes_that_do_not_divide",
    "reshard::test_stage3_spans_find_every_element",
)
fault(
    "stages 1 and 2: padding is data",
    "saved shards",
    "at = end + padding",
    "at = end",
    "reshard::test_stage2_spans_find_every_element",
)
fault(
    "a cut begins at the span's beginning",
    "saved shards",
    "offset=span.offset + low - span.start",
    "offset=span.offset",
    "reshard::test_stage2_spans_find_every_element",
    "reshard::test_stage3_spans_find_every_element",
)
fault(
    "moments are read from the weights",
    "saved shards",
    "            if kind == MASTER:\n",
    "            if True:\n",
    "reshard::test_moments_are_not_the_weights",
)
fault(
    "missing elements are not noticed",
    "saved shards",
    "if found != stop - start:",
    "if False:",
    "export::test_a_parameter_without_all_its_elements_is_refused",
)

# --- export -------------------------------------------------------------------------------------------------

fault(
    "shards grow beyond their bound",
    "export",
    "self._shard_bytes + tensor.nbytes > self.max_bytes",
    "self._shard_bytes > self.max_bytes",
    "checkpoint::test_shards_are_bounded_and_indexed",
)
fault(
    "the last shard is not written",
    "export",
    "        self._flush()\n        count",
    "        count",
    "checkpoint::test_shards_are_bounded_and_indexed",
    "checkpoint::test_one_shard_needs_no_index",
)
fault(
    "the index names other shards",
    "export",
    "weight_map.update(dict.fromkeys(names, final))",
    "weight_map.update(dict.fromkeys(self._names[0], final))",
    "checkpoint::test_shards_are_bounded_and_indexed",
)
fault(
    "the export is not rounded to its dtype",
    "export",
    "t.to(config.dtype) if t.is_floating_point() else t",
    "t",
    "export::test_sizes_that_do_not_divide",
)
fault(
    "generation stops at the tokenizer's own token",
    "export",
    "        generation.eos_token_id = tokenizer.convert_tokens_to_ids(stop)\n",
    "",
    "export::test_generation_stops_where_turns_were_trained_to_end",
)
fault(
    "the export generates without a cache",
    "export",
    'settings["use_cache"] = True',
    'settings["use_cache"] = False',
    "export::test_the_export_generates_with_a_cache",
)

# --- logs ---------------------------------------------------------------------------------------------------

fault(
    "lines after the checkpoint stay",
    "sinks",
    "        self._file.truncate(offset)\n",
    "",
    "sinks::test_resume_replaces_the_lines_after_the_checkpoint",
)
fault(
    "a torn line stays",
    "sinks",
    "            self._file.truncate(end)\n        return end",
    "        return end",
    "sinks::test_torn_last_line_is_cut_off_with_a_warning",
)
fault(
    "a resumed run starts another run of its tracker",
    "trackers",
    "        if not file.exists():\n",
    "        if True:\n",
    "trackers::test_mlflow_goes_on_in_the_same_run",
)
fault(
    "what another package says keeps values of secret variables",
    "secrets",
    '            text = text.replace(value, "***")\n',
    "            pass\n",
    "trackers::test_no_secret_in_what_is_said",
)
fault(
    "imported settings repeat a secret",
    "foreign",
    "find_secret({name: value}) is not None",
    "False",
    "import::test_llama_factory",
)
fault(
    "an imported step forgets the ranks",
    "foreign training",
    "packs_per_step=samples * ranks",
    "packs_per_step=samples",
    "import::test_llama_factory",
)
fault(
    "a pushed repository is open to all",
    "push",
    "private=not public",
    "private=False",
    "push::test_what_was_exported_lies_on_the_hub_with_its_card",
)

# --- templates ----------------------------------------------------------------------------------------------

ACROSS = "templating::test_a_token_across_the_start_of_a_turn_is_not_supervised"
MASKS = "templating::test_ids_and_mask"
SAME_MASKS = "templating::test_masks_by_heads_of_turns_equal_masks_by_offsets"
fault(
    "a token across the start of a turn is supervised (by offsets)",
    "chat encoder",
    "first = _first_token(encoding, start)",
    "first = _first_token(encoding, start, or_across=True)",
    ACROSS + "[False]",
)
fault(
    "a token across the start of a turn is supervised (by heads)",
    "chat encoder",
    "count = _first_token(head, skip)",
    "count = _first_token(head, skip, or_across=True)",
    ACROSS + "[True]",
)
fault(
    "the stop token is not supervised (by heads)",
    "chat encoder",
    "weights[anchor + count : stop + 1] = weight",
    "weights[anchor + count : stop] = weight",
    MASKS,
)
fault(
    "the stop token is not supervised (by offsets)",
    "chat encoder",
    "weights[first : stop + 1] = weight",
    "weights[first:stop] = weight",
    ACROSS + "[False]",
    SAME_MASKS,
)
fault(
    "one token too many is supervised (by offsets)",
    "chat encoder",
    "weights[first : stop + 1] = weight",
    "weights[first : stop + 2] = weight",
    SAME_MASKS,
)
fault(
    "the first token of a turn is not supervised (by heads)",
    "chat encoder",
    "weights[anchor + count : stop + 1] = weight",
    "weights[anchor + count + 1 : stop + 1] = weight",
    MASKS,
)
fault(
    "only the last turn is supervised",
    "templating",
    "if not turn.is_trained:",
    "if not turn.is_trained or turn is not turns[-1]:",
    MASKS,
)
fault(
    "heads that tokenise otherwise are trusted",
    "chat encoder",
    "is_same = head.ids[:count] == tokens[anchor : anchor + count].tolist()",
    "is_same = True",
    "templating::test_a_head_that_ends_within_a_word_is_not_trusted",
)
fault(
    "splits that were not asked for are read, too",
    "repositories",
    "for part in wanted for name in splits[part]",
    "for part in splits for name in splits[part]",
    "containers::test_splits_are_told_from_names[names2-train-read2-test (1), validation (1)]",
    "containers::test_a_saved_data_set_dict_is_read_by_its_splits",
)
fault(
    "a class label gets the name of the one before it",
    "tables",
    "else names[value]",
    "else names[value - 1]",
    "containers::test_class_labels_are_read_by_name[schema]",
    "containers::test_class_labels_are_read_by_name[README.md]",
)
fault(
    "names of class labels beside a file are no part of the key",
    "units",
    "*([file.labels] if file.labels else [])",
    "*([])",
    "containers::test_class_labels_are_read_by_name[README.md]",
)
fault(
    "pre-tokenised rows may name ids beyond the vocabulary",
    "chat encoder",
    "(row.tokens >= self.num_ids)",
    "(row.tokens > self.num_ids)",
    "templating::test_pre_tokenised_rows_are_checked",
)
fault(
    "pre-tokenised rows need no label beyond the first token",
    "chat encoder",
    "if not row.mask[1:].any():",
    "if not row.mask.any():",
    "templating::test_pre_tokenised_rows_are_checked",
)

# --- conversations and weights ------------------------------------------------------------------------------

WEIGHED = "weighted loop::test_steps_are_those_of_weighed_losses_and_both_losses_are_written_down"
LEFT_OUT = "conversations::test_tools_and_calls_that_the_template_leaves_out_are_errors"
fault(
    "the weight of a row is no factor",
    "conversation",
    "weight = factor * (unsaid if",
    "weight = (unsaid if",
    "conversations::test_a_weight_of_the_row_is_a_factor",
)
fault(
    "turns without a flag are trained on beside flagged ones",
    "conversation",
    'unsaid = 0.0 if train_on == "flagged"',
    'unsaid = 1.0 if train_on == "flagged"',
    "conversations::test_which_turns_are_trained_on",
)
fault(
    "masked means trained on",
    "flags",
    "value = 1 - value if",
    "value = value if",
    "conversations::test_a_turn_switched_off_is_context",
)
fault(
    "a fraction outweighs a flag that switches off",
    "flags",
    "    if 0 in found.values():\n        return 0.0\n",
    "",
    "conversations::test_a_turn_switched_off_is_context",
)
fault(
    "parallel calls are turns of their own",
    "turns",
    "is_bare = turn.calls and",
    "is_bare = False and",
    "conversations::test_parallel_calls_in_turns_of_their_own_are_one_turn",
)
fault(
    "text that the template leaves out is no error",
    "templating",
    "                lost = part[0]\n",
    "",
    LEFT_OUT,
    "conversations::test_thoughts_that_the_template_cannot_render_are_an_error_with_a_cure",
)
fault(
    "tools that the template leaves out are no error",
    "templating",
    "if isinstance(name, str) and name not in text:",
    "if False:",
    LEFT_OUT,
)
fault(
    "the result of a call without a stop token is trained on",
    "templating",
    "not following or following not in written or following in said",
    "True",
    "conversations::test_a_call_without_a_stop_token_trains_no_result",
)
fault(
    "an open turn learns to stop",
    "templating",
    "if turn.is_open:",
    "if False:",
    "conversations::test_an_open_turn_has_no_stop_token_to_learn",
)
fault(
    "masked thoughts are trained on",
    "templating",
    "if not chat.masks_thoughts:",
    "if chat.masks_thoughts:",
    "conversations::test_thoughts_in_the_text_are_kept_masked_or_dropped",
)
fault(
    "weights that begin in a later block stand at the first tokens",
    "cache",
    "if name not in self._sizes and masks in self._sizes:",
    "if False:",
    "cache::test_weights_begin_where_the_first_ones_come",
)
fault(
    "the weight of a first token counts in the sum",
    "cache",
    "weights[a + 1 : b]",
    "weights[a:b]",
    "cache::test_weights_begin_where_the_first_ones_come",
)
fault(
    "weights are not shifted",
    "collate",
    "np.append(weights[1:], np.float32(0))",
    "weights",
    "collate::test_weights_stand_at_the_positions_that_predict",
    WEIGHED,
)
fault(
    "a weighed loss is divided by the number of its tokens",
    "planner",
    "        if corpus.has_weights\n",
    "        if False\n",
    "planner::test_weights_of_tokens_change_the_normaliser_and_nothing_else",
    WEIGHED,
)

# --- packs that ranks share ---------------------------------------------------------------------------------

SHARED = "sequence::test_a_shared_pack_is_the_whole_one"
SHARED_STEP = "step::test_two_steps_equal_plain_pytorch"
fault(
    "losses of shared packs are averaged over groups, not ranks",
    "loop",
    "plan.loss_weight / backend.ranks.size",
    "plan.loss_weight / backend.ranks.dp.size",
    f"{SHARED_STEP}[2-untied-packed-zero3-by2]",
)
fault(
    "samples of a shared pack count once for each rank",
    "statistics",
    "of_domain & self.counts",
    "of_domain",
    f"{SHARED_STEP}[2-untied-packed-zero3-by2]",
)
fault(
    "the balance loss of a shared pack is averaged over too many packs",
    "loop",
    "len(batches) / backend.ranks.sp.size",
    "len(batches)",
    f"{SHARED_STEP}[2-experts-packed-zero3-by2]",
)
fault(
    "routers balance a rank's rows",
    "router",
    "    if group is not None:\n",
    "    if False:\n",
    f"{SHARED}[qwen3_moe by 2]",
)
fault(
    "a part of a sample chooses its rotary frequencies",
    "rope",
    "if part is not None and embeddings:",
    "if False:",
    f"{SHARED}[llama, dynamic rope by 4]",
)
fault(
    "key-value heads go to other ranks than their query heads",
    "sequence",
    "(x.repeat_interleave(copies, dim=1) for x in",
    "(x.repeat(1, copies, 1, 1) for x in",
    f"{SHARED}[wide by 3]",
)
fault(
    "a sample's loss is that of a rank's rows",
    "model",
    "return out if group is None else group.whole_samples(out)",
    "return out",
    f"{SHARED}[llama by 2]",
)
fault(
    "a skipped step names samples once for each rank",
    "skipping",
    " or run.backend.ranks.sp.rank > 0:",
    ":",
    "sequence runs::test_a_skipped_step_names_each_sample_once",
)
fault(
    "a model that mixes tokens outside of attention shares its packs",
    "backend",
    "if not error <= MAX_ISOLATION_LEAK[config.model.dtype]:",
    "if False:",
    "sequence::test_a_model_that_mixes_tokens_outside_of_attention_is_refused",
)

# --- packs and batches --------------------------------------------------------------------------------------

PACK = "collate::test_a_pack_of_two_samples_and_padding"
fault(
    "labels are not shifted",
    "collate",
    "labels[:-1][supervised[1:]] = tokens[1:][supervised[1:]]",
    "labels[:-1][supervised[1:]] = tokens[:-1][supervised[1:]]",
    PACK,
    PLAIN,
)
fault(
    "the last token of a sample predicts its neighbour's first",
    "collate",
    "    labels[ends - 1] = IGNORE_INDEX\n",
    "",
    PACK,
)
fault(
    "positions run on",
    "collate",
    "np.arange(pack_len) - np.repeat(starts, segments)",
    "np.arange(pack_len)",
    PACK,
    PLAIN,
)
fault(
    "padding belongs to the last sample",
    "collate",
    "segment_samples = np.append(segment_samples, PADDING_ID)",
    "segment_samples = np.append(segment_samples, num_samples - 1)",
    PACK,
)
fault(
    "the mask of the first sample counts for all",
    "collate",
    "weights[end - length : end] = mask",
    "weights[: len(mask)] = mask",
    PACK,
)
fault(
    "weights are compared with a tolerance",
    "loader",
    "np.array_equal(prefetch.weights, weights)",
    "np.allclose(prefetch.weights, weights)",
    "loader::test_weights_that_moved_by_one_bit_are_other_weights",
)
fault(
    "weights are not compared",
    "loader",
    "if np.array_equal(prefetch.weights, weights):",
    "if True:",
    "loader::test_no_batch_is_drawn_from_old_weights",
)
fault(
    "the loader's state is that of the prefetched step",
    "loader",
    "            self._prefetch = _Prefetch(wanted, unwanted, result)\n",
    "            self._prefetch = _Prefetch(wanted, unwanted, result)\n"
    "            self.state = result.result().plan.state_after\n",
    "loader::test_state_is_that_of_the_last_taken_step",
)
fault(
    "the caller's array is kept",
    "loader",
    "wanted = np.array(weights, dtype=np.float64)",
    "wanted = np.asarray(weights, dtype=np.float64)",
    "loader::test_a_change_of_the_callers_array_is_a_change_of_weights",
)
fault(
    "counts that differ from the plan are accepted",
    "loader",
    "if batch.supervised_tokens != planned:",
    "if False:",
    "loader::test_supervised_tokens_that_differ_from_the_plan_are_refused",
)
fault(
    "every rank takes the same packs",
    "balance",
    "(world_size - 1 - rank if micro_step % 2 else rank)",
    "(world_size - 1 - rank if micro_step % 2 else 0)",
    "balance::test_every_pack_goes_to_exactly_one_rank",
    "loader::test_ranks_share_what_one_rank_gets",
)
fault(
    "the costliest packs always go to one rank",
    "balance",
    "(world_size - 1 - rank if micro_step % 2 else rank)",
    "rank",
    "balance::test_packs_of_one_micro_step_are_neighbours_in_cost",
)

# --- the planner --------------------------------------------------------------------------------------------

STEPS = "planner::test_every_run_of_steps"
RESUME = "planner::test_a_run_resumed_from_json_equals_one_that_never_stopped"
fault("samples that did not fit are forgotten", "planner", "for i in rest)),", "for i in rest[1:])),", STEPS)
fault(
    "carried samples are drawn anew at every resume",
    "planner state",
    'carry=tuple(Carried(*map(int, entry)) for entry in value["carry"]),',
    "carry=(),",
    RESUME,
)
fault(
    "credits are forgotten between steps",
    "planner",
    "credit=tuple(credit),",
    "credit=state.credit,",
    "planner::test_shares_stay_exact_when_weights_change_every_step",
)
fault(
    "the end of a pass goes unnoticed in the order",
    "planner",
    '"pass_index": self.pass_index',
    '"pass_index": 0',
    "planner::test_seeds_and_passes_have_their_own_order",
)
fault(
    "domains share one order",
    "planner",
    '"domain": self._domain',
    '"domain": 0',
    "planner::test_the_order_of_a_domain_is_its_own",
)
fault(
    "supervised tokens are counted as tokens",
    "planner",
    "size = 1 if of_samples else supervised if by_supervised else length",
    "size = 1 if of_samples else length",
    "planner::test_shares_of_tokens_are_within_a_few_samples[supervised_tokens]",
)
fault(
    "max_epochs allows one draw more",
    "planner",
    "self.remaining = limit - state",
    "self.remaining = limit + 1 - state",
    "planner::test_limited_data_is_used_up_completely_and_no_further",
)
fault(
    "max_epochs rounds down 0.29 * 100 to 28",
    "corpus",
    "math.floor(epochs * size + 1e-6)",
    "math.floor(epochs * size)",
    "planner::test_a_fraction_of_an_epoch_is_a_whole_number_of_samples",
)
fault(
    "weight of an exhausted domain is lost",
    "share rules",
    "return [weight / total for weight in left] if total > 0 else left",
    "return left",
    "planner::test_an_exhausted_domain_gives_its_share_to_the_others",
)
fault(
    "the youngest carried sample comes first",
    "planner",
    "for step, length, domain, sample in rows",
    "for step, length, domain, sample in reversed(rows)",
    "planner::test_the_oldest_carried_sample_is_placed_first",
)
fault(
    "the domain with the smallest credit is drawn",
    "share rules",
    "if deadline[domain] < best_deadline and",
    "if -deadline[domain] < best_deadline and",
    "planner::test_every_draw_is_within_one_sample_of_its_target",
)
fault(
    "steps are a state short",
    "planner",
    "        step=state.step + 1,\n",
    "        step=state.step,\n",
    STEPS,
)
fault(
    "trained totals are those drawn",
    "planner",
    "trained=state.trained.plus(trained)",
    "trained=state.trained.plus(drawn)",
    STEPS,
)
fault(
    "the normaliser counts carried samples twice",
    "planner",
    "trained = _totals(packed, k)",
    "trained = _totals(pool, k)",
    STEPS,
)
fault(
    "carried samples are lost",
    "packing",
    "    _place_best_fit(range(num_carried), lengths, fit, packs, rest)\n",
    "",
    "packing::test_fill_packs_places_each_sample_once_within_capacity",
    "packing::test_the_oldest_carried_sample_is_always_placed",
)
fault(
    "the emptiest pack is filled",
    "packing",
    "        slot = self._slots.pop(at)\n",
    "        slot = self._slots.pop()\n",
    "packing::test_pack_all_is_best_fit_decreasing",
)
fault(
    "a pack may overflow",
    "packing",
    "at = bisect_left(self._slots, length << _BIN_BITS)",
    "at = bisect_left(self._slots, (length - 1) << _BIN_BITS)",
    "packing::test_fill_packs_places_each_sample_once_within_capacity",
)
fault(
    "an order visits samples twice",
    "order",
    "outside = outside[values[outside] >= limit]",
    "outside = outside[values[outside] > limit]",
    "order::test_visits_every_sample_once",
)
fault(
    "passes have one order",
    "order",
    '{seed} {domain} {pass_index}"',
    '{seed} {domain}"',
    "order::test_depends_on_seed_domain_and_pass",
)

# --- domain weights -----------------------------------------------------------------------------------------

GOES_ON = "controller::test_resumed_run_equals_the_uninterrupted_one"
fault(
    "the reference's standard error is ignored",
    "controller",
    "reference_stderr=reference.stderr, ",
    "",
    "controller::test_noise_of_the_reference_counts_too",
)
fault(
    "an absent domain's standard error is overwritten",
    "controller",
    "stderr = np.where(present, new_stderr, self._stderr)",
    "stderr = new_stderr",
    "controller::test_an_absent_domain_keeps_the_standard_error_of_its_loss",
)
fault(
    "an absent domain's loss is overwritten",
    "controller",
    "losses = np.where(present, new_losses, self._losses)",
    "losses = np.nan_to_num(new_losses)",
    "controller::test_absent_domain_keeps_loss_and_gamma_and_has_no_phi",
)
fault(
    "the initial weights are not restored",
    "controller",
    "self._weights, self._initial, self._window = weights, initial, window",
    "self._weights, self._window = weights, window",
    GOES_ON,
)
fault(
    "the window is not restored",
    "controller",
    "self._weights, self._initial, self._window = weights, initial, window",
    "self._weights, self._initial = weights, initial",
    GOES_ON,
)
fault(
    "the last losses are not restored",
    "controller",
    "self._losses, self._stderr = np.nan_to_num(losses), stderr\n",
    "self._stderr = stderr\n",
    GOES_ON,
)
fault(
    "the last standard errors are not restored",
    "controller",
    "self._losses, self._stderr = np.nan_to_num(losses), stderr\n",
    "self._losses = np.nan_to_num(losses)\n",
    GOES_ON,
)
fault(
    "what was measured is not restored",
    "controller",
    "        self._measured = ~np.isnan(losses)\n",
    "",
    GOES_ON,
)
fault(
    "the window is not reset by an update",
    "controller",
    "            self.drop_window()\n        self._update_count",
    "        self._update_count",
    "controller::test_window_pools_steps_and_is_reset_by_the_update",
    WINDOW,
)
fault(
    "a probe is ignored",
    "controller",
    "sums = self._checked_sums(probe.sums if isinstance(probe, SampleLosses) else probe)",
    "pass",
    "controller::test_probe_losses_replace_the_window",
)
fault(
    "a first loss counts as forgetting",
    "controller",
    "np.where(present & ~first, phi, 0.0)",
    "np.where(present, phi, 0.0)",
    "controller::test_fostering_update_by_hand",
)
fault(
    "shadow weights are applied",
    "controller",
    "        if not self._settings.shadow:\n",
    "        if True:\n",
    "controller::test_shadow_computes_and_does_not_apply",
)
fault(
    "min_tokens is passed by one less",
    "controller",
    "present = sums.tokens >= settings.min_tokens",
    "present = sums.tokens >= settings.min_tokens - 2",
    "controller::test_absent_domain_keeps_loss_and_gamma_and_has_no_phi",
)
fault(
    "domains without a standard error count",
    "controller",
    "            present &= ~np.isnan(new_stderr)  # noise",
    "            pass  # noise",
    "controller::test_noise_needs_a_standard_error",
)
fault(
    "the step limit is forgotten",
    "controller",
    "max_relative_change=change",
    "max_relative_change=None",
    "controller::test_limits_hold_and_are_explained",
)
fault(
    "skipped steps move weights",
    "controller",
    "asked = not skipped and step > 0",
    "asked = step > 0",
    "controller::test_a_skipped_step_moves_no_weights_unless_they_are_scheduled",
)
fault(
    "gamma is relative to the reference",
    "rules",
    "(losses - reference - margin) / np.maximum(losses, MIN_LOSS)",
    "(losses - reference - margin) / np.maximum(reference, MIN_LOSS)",
    "rules::test_gamma_by_hand",
)
fault(
    "phi is relative to the present loss",
    "rules",
    "(losses - previous - margin) / np.maximum(previous, MIN_LOSS)",
    "(losses - previous - margin) / np.maximum(losses, MIN_LOSS)",
    "rules::test_phi_by_hand",
)
fault(
    "standard errors add up without squares",
    "rules",
    "square = square + stderr * stderr",
    "square = square + stderr",
    "rules::test_gamma_by_hand",
    "rules::test_phi_by_hand",
)
fault(
    "the mean gate takes the target in",
    "rules",
    "math.fsum(others) / len(others)",
    "math.fsum(inputs.phi) / len(inputs.phi)",
    "rules::test_rule_by_hand",
)
fault(
    "an open gate needs less, not equal",
    "rules",
    "is_open=forgetting <= limit",
    "is_open=forgetting < limit",
    "rules::test_gates",
)
fault(
    "unmeasured domains are re-weighted",
    "rules",
    "return _foster(inputs, inputs.measured, form, sigma)",
    "return _foster(inputs, np.ones_like(inputs.measured), form, sigma)",
    "rules::test_an_unmeasured_domain_keeps_its_weight",
)
fault(
    "the floor is checked on the proposal only",
    "simplex",
    "    return project(proposed, lower, upper)\n\n\ndef entropy",
    "    return normalise(np.clip(proposed, lower, upper))\n\n\ndef entropy",
    "simplex::test_limits_hold_together",
)
fault(
    "the step limit is measured from the proposal",
    "simplex",
    "anchor = project(previous, lower, upper)",
    "anchor = project(proposed, lower, upper)",
    "simplex::test_step_limit_by_hand",
)
fault(
    "digests of unequal weights are equal",
    "simplex",
    '(np.asarray(weights, dtype="<f8") + 0.0).tobytes()',
    '(np.asarray(weights, dtype="<f4") + 0.0).tobytes()',
    "simplex::test_entropy_and_digest",
)

# --- kernels ------------------------------------------------------------------------------------------------

GOOD = "triton::test_the_kernels_are_as_good_as_torch"
FP32, FP16 = f"{GOOD}[fp32-torch.float32]", f"{GOOD}[fp32-torch.float16]"
BF16 = (f"{GOOD}[fp32-torch.bfloat16]", f"{GOOD}[compute-torch.bfloat16]")
ALL = (FP32, *BF16)
LOSS_TAIL, GRADIENT_TAIL = (f"if VOCAB_SIZE % TILE:\n{indent}last" for indent in (" " * 8, " " * 12))
fault(
    "negated gradient",
    "row kernels",
    "return tl.exp(z - top) * of_probability\n",
    "return -tl.exp(z - top) * of_probability\n",
    *ALL,
)
fault(
    "gradient 5 % too large",
    "row kernels",
    "factor = token_weight * logit_scale *",
    "factor = 1.05 * token_weight * logit_scale *",
    *ALL,
)
fault("sums off by one sample", "row kernels", "ids == segment", "ids == segment + 1", *ALL)
fault(
    "last tile of tokens dropped",
    "row kernels",
    "count = tl.zeros([TILE], tl.int64)\n    start = 0\n    while start < num_tokens:",
    "count = tl.zeros([TILE], tl.int64)\n    start = 0\n    while start + TILE < num_tokens:",
    *ALL,
    "kernel sums::test_sums_over_ragged_tiles",
)
fault(
    "tokens beyond the end are summed",
    "row kernels",
    "inside = tokens < num_tokens\n        ids =",
    "inside = tokens < num_tokens + 1\n        ids =",
    "triton::test_sums_read_no_token_beyond_the_end",
)
fault("squares are not squared", "row kernels", "value * value", "value", *ALL)
fault(
    "last tile of the vocabulary dropped from the loss",
    "row kernels",
    LOSS_TAIL,
    LOSS_TAIL.replace("VOCAB_SIZE % TILE", "VOCAB_SIZE < TILE"),
    *ALL,
)
fault(
    "last tile of the vocabulary dropped from the gradient",
    "row kernels",
    GRADIENT_TAIL,
    GRADIENT_TAIL.replace("VOCAB_SIZE % TILE", "VOCAB_SIZE < TILE"),
    *ALL,
)
fault(
    "columns beyond the vocabulary count",
    "row kernels",
    'tl.where(last < VOCAB_SIZE, z, -float("inf"))',
    "tl.where(last < VOCAB_SIZE, z, 0.0)",
    *ALL,
)
fault("label V - 1 is no class", "row kernels", "(label < VOCAB_SIZE)", "(label < VOCAB_SIZE - 1)", *ALL)
fault(
    "label V - 1 gets no gradient",
    "row kernels",
    "element_ty), mask=is_class)",
    "element_ty), mask=is_class & (label < VOCAB_SIZE - 1))",
    *ALL,
)
fault(
    "target of the neighbour",
    "row kernels",
    "tl.load(logits_ptr + label,",
    "tl.load(logits_ptr + (label + 1) % VOCAB_SIZE,",
    *ALL,
)
fault("sum of exponentials not rescaled", "row kernels", "sums * tl.exp(tops - shifts)", "sums", *ALL)
fault(
    "token weight only in the loss",
    "row kernels",
    "factor = token_weight * logit_scale",
    "factor = logit_scale",
    *ALL,
)
fault(
    "tokens of a later tile take the rows of the first",
    "row kernels",
    "seen += tl.sum(valid.to(tl.int32), 0)",
    "seen += 0",
    "triton::test_tokens_with_a_label_come_first",
)
fault(
    "a label beyond the last class passes the device's check",
    "row kernels",
    "(labels < 0) | (labels >= vocab_size)",
    "(labels < 0) | (labels > vocab_size)",
    "triton::test_the_device_asserts_what_the_host_checks",
)
fault(
    "a captured batch of all rows is put in another order",
    "row kernels",
    "tl.where(num_rows == num_tokens, tokens, rows)",
    "tl.where(num_rows < 0, tokens, rows)",
    "triton::test_rows_beyond_the_valid_ones_are_zero",
)
fault(
    "partial sums in 16 bits",
    "triton",
    "@fp32_partial_sums()\n",
    "",
    "chunks::test_products_keep_partial_sums_in_fp32",
)
fault("normalizer forgotten", "row kernels", "* tl.load(factor_ptr)", "", *ALL)
fault(
    "slope of the softcap forgotten", "row kernels", "* of_probability * _capped_slope(z, softcap)", "", *ALL
)
fault(
    "slope of the softcap forgotten at the target",
    "row kernels",
    "grad *= _capped_slope(raw_target, softcap)",
    "grad *= 1.0",
    *ALL,
)
fault("lanes are not brought to one maximum", "row kernels", "sums * tl.exp(tops - shift)", "sums", *ALL)
fault("backward forgets the last factor", "row kernels", "gradient * factor", "gradient", FP16)
fault(
    "rows without a target keep their logits in the last tile",
    "row kernels",
    "tl.store(grad_ptr + cols, zero, mask=cols < VOCAB_SIZE)",
    "tl.store(grad_ptr + cols, zero, mask=cols < VOCAB_SIZE - TILE)",
    "triton::test_rows_beyond_the_valid_ones_are_zero",
)
fault(
    "the gradient is stored beyond the row",
    "row kernels",
    "grad.to(grad_ptr.dtype.element_ty), mask=last < VOCAB_SIZE",
    "grad.to(grad_ptr.dtype.element_ty), mask=last < VOCAB_SIZE + 1",
    "triton::test_nothing_is_written_beyond_a_row",
)
fault(
    "the last tile is not scaled",
    "row kernels",
    "while start < num_elements:",
    "while start + TILE < num_elements:",
    "triton::test_every_element_is_scaled",
)
fault(
    "tiles beyond the first round are not scaled",
    "row kernels",
    "        start += tl.num_programs(0).to(tl.int64) * TILE\n",
    "        start += num_elements\n",
    "triton::test_every_element_is_scaled",
)
fault(
    "elements beyond the gradient are written",
    "row kernels",
    "scaled.to(out_ptr.dtype.element_ty), mask=inside",
    "scaled.to(out_ptr.dtype.element_ty), mask=at < num_elements + 1",
    "triton::test_every_element_is_scaled",
)
fault(
    "a zero that is pending beside NaN stays NaN",
    "row kernels",
    "tl.where(pending == 0.0, 0.0, gradient * factor)",
    "gradient * factor",
    "edges::test_normalizer_zero_gives_zero_even_beside_nan[triton-0.0]",
)
fault(
    "row offsets of 32 bits",
    "row kernels",
    "row = tl.program_id(0).to(tl.int64)",
    "row = tl.program_id(0)",
    "triton::test_offsets_beyond_2_to_the_31_elements",
)
fault(
    "the last chunk overwrites the sum",
    "triton",
    "product_(d_weight, d_z.T, x, accumulate=start > 0)",
    "product_(d_weight, d_z.T, x, accumulate=False)",
    "chunks::test_chunk_size_changes_nothing",
)
fault(
    "the last rows of a batch are left out",
    "triton",
    "for start in range(0, num_rows, chunk):",
    "for start in range(0, num_rows - num_rows % chunk, chunk):",
    "chunks::test_chunk_size_changes_nothing",
)
fault(
    "chunked: the last rows of a batch are left out",
    "chunked",
    "for start in range(0, num_rows, chunk):",
    "for start in range(0, num_rows - num_rows % chunk, chunk):",
    "chunks::test_chunk_size_changes_nothing",
)
fault(
    "chunked: the last block of the vocabulary is left out",
    "chunked",
    "for start in range(0, vocab_size, step):",
    "for start in range(0, max(1, vocab_size - step), step):",
    "float64::test_as_good_as_torch_over_a_real_vocabulary",
)
fault(
    "chunked: the last rows of a block are left out",
    "chunked",
    "for start in range(0, len(logits), step):",
    "for start in range(0, max(1, len(logits) - step), step):",
    "chunks::test_blocks_of_rows_within_a_chunk_change_nothing",
)
fault(
    "chunked: the last block overwrites d_hidden",
    "chunked",
    "accumulate=block.start > 0,",
    "accumulate=False,",
    "float64::test_as_good_as_torch_over_a_real_vocabulary",
)
fault(
    "chunked: the last chunk overwrites d_weight",
    "chunked",
    "accumulate=part.start > 0,",
    "accumulate=False,",
    "chunks::test_chunk_size_changes_nothing",
)
fault(
    "chunked: p - 1 is rounded before it is formed",
    "chunked",
    "grad.gather(1, target) - factor",
    "grad.gather(1, target).bfloat16().float() - factor",
    "float64::test_confident_targets_keep_their_gradient",
)
fault(
    "chunked: normalizer 0 beside NaN is NaN",
    "chunked",
    "gradient.masked_fill_(is_zero, 0)",
    "gradient.mul_(1)",
    "edges::test_normalizer_zero_gives_zero_even_beside_nan[chunked-0.0]",
)
fault(
    "ignored tokens are summed",
    "segments",
    "mine = (labels != ignore_index) & (ids >= 0)",
    "mine = ids >= 0",
    "kernel sums::test_sums_over_ragged_tiles",
)
fault(
    "negative ids are summed",
    "segments",
    "mine = (labels != ignore_index) & (ids >= 0)",
    "mine = labels != ignore_index",
    "kernel sums::test_sums_over_ragged_tiles",
    harmless="sorted by id they lie before the first segment, as the others lie behind the last",
)
fault(
    "the loss is summed in single precision",
    "segments",
    "values.to(torch.float64).index_select",
    "values.index_select",
    "kernel sums::test_sums_are_kept_in_float64",
)
fault(
    "a second backward scales again",
    "operator",
    "    ctx.spent = True\n",
    "",
    "autograd::test_second_backward_is_a_clear_error",
)
fault(
    "the upstream gradient is forgotten",
    "operator",
    "    scale = upstream * pending\n",
    "    scale = pending\n",
    "autograd::test_the_upstream_gradient_scales_both_gradients",
)
fault(
    "an encoder says what is unknown",
    "judge",
    "learning.strangeness(features[self.embedders[0].kind], self._known)",
    "learning.strangeness(features[self.embedders[-1].kind], self._known)",
    "classifier::test_what_is_unknown_is_said_by_the_examined_model_whatever_an_encoder_sees",
)
fault(
    "a large domain weighs more",
    "judge's learning",
    "weights[mine] = DOMAIN_WEIGHT * raw / raw.sum()",
    "weights[mine] = 1.0",
    "classifier::test_the_size_of_a_domain_is_not_its_prior",
)
fault(
    "topics weigh as much as samples",
    "judge's learning",
    "TOPICS * DOMAIN_WEIGHT / counts",
    "DOMAIN_WEIGHT / counts",
    "judge::test_the_vote_by_hand",
)
fault(
    "every known text has the same voice",
    "judge's learning",
    "(domains[:, None] == classes) * weights[:, None]",
    "(domains[:, None] == classes) * 1.0",
    "judge::test_the_vote_by_hand",
)
fault(
    "the vote is of one mean a domain",
    "judge's learning",
    "heard: Array = np.exp(near / self.warmth) @ self.voices",
    "heard: Array = np.exp(near @ self.voices / self.voices.sum(0) / self.warmth)",
    "judge::test_the_vote_by_hand",
    "judge::test_a_domain_of_two_parts_is_told_from_what_lies_between_them",
)
fault(
    "the last state that is read is one that the model normalised",
    "judge's vectors",
    "part[: highest + 1]",
    "part[:highest]",
    "judge::test_states_do_not_depend_on_the_layers_above_that_are_dropped",
)
fault(
    "no layer is dropped",
    "judge's vectors",
    "len(part) == depth:",
    "len(part) == -1:",
    "judge::test_states_do_not_depend_on_the_layers_above_that_are_dropped",
)
fault(
    "an installed encoder is not taken",
    "detection",
    "settings.encoder or packaged_encoder()",
    "settings.encoder",
    "judge::test_an_installed_encoder_is_found_and_said_and_what_is_missed_without",
)
fault(
    "a package without a model is taken for an encoder",
    "judge's vectors",
    'if folder and (folder / "model.safetensors").is_file() else',
    "if folder else",
    "judge::test_an_installed_encoder_is_found_and_said_and_what_is_missed_without",
)
fault(
    "what is said of nothing is not taken off",
    "local judge",
    "logs - self.log_prior, strict",
    "logs, strict",
    "asked::test_what_is_said_of_nothing_is_taken_off_by_hand",
)
fault(
    "texts of nothing count by their mass on names",
    "local judge",
    "np.log(softmax(logs, axis=1).mean(axis=0))",
    "np.log(np.exp(logs).mean(axis=0) / np.exp(logs).mean(axis=0).sum())",
    "asked::test_what_is_said_of_nothing_is_taken_off_by_hand",
)
fault(
    "science has no questions of mathematics",
    "topics",
    '[*maths["topics"], *maths["sentences"]]',
    'maths["topics"]',
    "judge::test_topics_are_known_given_and_of_mathematics_once",
)
