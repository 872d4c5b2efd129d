"""Test cases that `pytest` leaves out and `pytest -m slow` runs.

Each repeats, with another option, model or method, what a case that always runs shows of one. A pattern is matched with the
names of tests; beside it stands which faults only the slow cases would find.
"""

from fnmatch import fnmatchcase

SLOW = {
    # checkpoints: one case of each method, of student rollouts and of each optimizer stays
    "test_resumed_runs_end_the_same[[]*-options[1345]]": "a resumed state of one more option of the method trajectories",
    "test_resumed_runs_end_the_same[[]*-options[678]]": "a resumed state of one more adapter or optimizer",
    "test_resumed_runs_end_the_same[[]*-options1[0123]]": "a resumed state of one more option with many prompts",
    "test_twice_interrupted[[]trajectories]": "a second checkpoint that differs by method",
    "test_what_somebody_puts_into_the_folder_stays[[]*step-1*": "another name of the user's file",
    "test_what_somebody_puts_into_the_folder_stays[[]*step-copy*": "another name of the user's file",
    "test_a_damaged_buffer_is_made_again[[]junk]": "another kind of damage",
    "test_states_that_do_not_fit[[]denoiser]": "a state that fits by mistake, by method",
    "test_states_that_do_not_fit[[]contrastive]": "a state that fits by mistake, by method",
    "test_synonyms_stay_of_a_run_that_is_done[[]denoiser]": "the same source of batches with another learner",
    "test_a_filling_of_the_buffer_ends_at_its_step_and_resumes_with_the_same_bits[[]1*]": "a signal at another step",
    # training: every method stays, not with every family
    "test_whole_runs_of_small_models[[]layers-sd-options[123]]": "layers with one more option",
    "test_whole_runs_of_small_models[[]layers-sdxl*": "layers of a second U-Net",
    "test_whole_runs_of_small_models[[]denoiser-[fpc]*": "denoiser with one more transformer",
    "test_the_loss_is_the_guided_one*[[]{}-denoiser]": "the plain loss of the denoiser: the mapped and the pushed one stay",
    "test_the_loss_is_the_guided_one*owl*-layers]": "the mapped loss of layers: the denoiser's stays",
    "test_the_loss_is_the_guided_one*rose*-denoiser]": "the pushed loss of the denoiser: that of layers stays",
    "test_it_goes_on_where_it_stood[[]denoiser-False]": "a buffer that is not kept: that of layers stays",
    "test_a_signal_ends_it_after_the_step[[]contrastive]": "a signal in another source of batches",
    "test_a_signal_ends_it_after_the_step[[]denoiser]": "a signal in the same source with another learner",
    "test_a_loss_that_is_no_number_is_said[[][dc]*": "the same loop with another source",
    "test_nothing_is_lost_if_it_is_interrupted_while_samples_are_collected[[]trajectories]": "another source of batches",
    "test_it_is_known_which_concept_a_sample_shows[[]{}-2]": "two predictions of a step where three are checked",
    "test_what_does_not_name_the_concept_is_guided_away*[[]v_prediction]": "v where ε is checked",
    # waits for the device: one case of each method stays
    "test_so_it_is_where_the_teacher_is_asked_in_every_step*guidance*": "a read by the host with --unprompted-guidance",
    "test_so_it_is_where_the_teacher_is_asked_in_every_step[[]denoiser-{'adapter*": "a read by the host without an adapter",
    "test_in_every_family[[]sdxl]": "a read by the host in one more family",
    "test_in_every_family[[]sana]": "a read by the host in one more family",
    "test_in_every_family[[]pixart]": "a read by the host in one more family",
    "test_the_host_reads_the_loss_and_nothing_else[[]True]": "a read by the host with one more option",
    "test_the_host_reads_the_loss_and_nothing_else[[]none]": "a read by the host with one more option",
    # graphs: that of a quantized base stays
    "test_every_batch_size_is_served_by_the_same_graphs[[]student*": "a graph more with student rollouts",
    "test_every_batch_size_is_served_by_the_same_graphs[[]none*": "a graph more without an adapter",
    # processes: one method with many prompts stays
    "test_so_do_two_with_many_prompts[[]denoiser]": "two processes with another learner",
    "test_so_do_two_with_rollouts_by_the_student": "two processes with student rollouts",
    # families: two or three stay, one of them with several text encoders
    "test_every_family[[]*[axew2]]": "an evaluation of one more family; .ci/run has them all with the lowest versions",
    "test_every_family[[]flux*]": "an evaluation of one more family; .ci/run has them all with the lowest versions",
    "test_every_family_runs_in_half_precision_without_autocast[[]s[da]*": "half precision in one more family",
    "test_all_that_each_familys_pipeline_reads_is_there[[]sana]": "a missing file in one more family",
    "test_half_precision_and_little_memory[[]none-*": "16 bits without quantisation in one more family",
    "test_every_kind_of_student_trains_saves_and_merges[[]full-lokr]": "the full scope with LoKr: LoHa stays",
    "test_every_kind_of_student_trains_saves_and_merges[[]selfattn*": "another scope with student rollouts",
    "test_what_is_trained_in_channels_last_is_saved_as_usual[[]esd-u-none-0.0001]": "the 8-bit optimizer stays",
    # plans: a dtype of each adapter stays
    "test_every_adapter_in_every_dtype_and_scope_has_a_plan[[]*-bfloat16]": "a plan in another dtype",
    "test_nfe_of_the_methods_with_many_prompts*[[]denoiser]": "the same count with another learner",
    "test_the_config_of_a_run_holds_what_its_method_reads*[[]contrastive]": "a config of a method that others do not share",
    # FLOPs: one case of each method stays
    "test_the_work_of_a_run_is_what_pytorch_counts[[]denoiser-{'gra*": "the second forward pass of gradient checkpointing",
    "test_the_work_of_a_run_is_what_pytorch_counts[[]trajectories-{'*": "calls that student rollouts or full weights make",
    "test_a_plan_says_at_most_what_a_run_does[[]denoiser]": "calls of the same source with another learner",
    # a whole run on the emulated GPU: one of each method stays
    "test_other_methods[[]layers-float32*": "two devices that meet in small batches with --unprompted-guidance",
    "test_other_methods[[]denoiser-float16*": "two devices that meet in small batches of the denoiser",
    "test_as_on_the_cpu[[]float32-student*": "two devices that meet in student rollouts",
    "test_as_on_the_cpu[[]float32-1-*": "two devices that meet in samples that pass one by one",
    "test_as_on_the_cpu[[]bfloat16-none-*": "two devices that meet without an adapter",
    "test_other_methods[[]layers-float16-True]": "two devices that meet in layers with --offload",
    # kernels: the oldest and the newest architecture, the one of benchmarks, and AMD's stay
    "test_compiles_into_wide_loads*[[]cuda-86-*": "a spill on one more architecture",
    "test_compiles_into_wide_loads*[[]cuda-89-*": "a spill on one more architecture",
    "test_compiles_into_wide_loads*[[]cuda-80-*": "a spill on one more architecture",
    "test_compiles_into_wide_loads*[[]cuda-100-*": "a spill on one more architecture",
    "test_matches_the_formula[[](300*dtype[12]]": "many samples in another dtype; other shapes have all dtypes",
    # families again
    "test_half_precision_and_little_memory[[]nf4-*e*]": "NF4 in one more family: SD3, SDXL and Sana stay",
    "test_half_precision_and_little_memory[[]nf4-pixart]": "NF4 in one more family",
    "test_half_precision_and_little_memory[[]nf4-chroma]": "NF4 in one more family",
    "test_adapter_and_merged_weights_in_plain_diffusers[[]*,*": "names of weights with another scheduler",
    "test_adapter_and_merged_weights_in_plain_diffusers[[]sdxl turbo]": "names of weights with another scheduler",
    "test_adapter_and_merged_weights_in_plain_diffusers[[]sd3 without T5]": "names of weights of a model without T5",
    "test_a_transformer_in_shards_merges_into_one_file[[]f*": "shards of one more family",
    "test_a_transformer_in_shards_merges_into_one_file[[]p*": "shards of one more family",
    "test_what_a_teacher_that_is_right_teaches_is_right[[][sfz][dl-]*": "the teacher in one more family",
    # memory
    "test_every_adapter_in_every_dtype_and_scope_has_a_plan[[]lo[hk]*": "a plan for LoHa and LoKr",
    "test_predicted_and_allocated_memory_of_a_step[[]s[da]*-True]": "gradient checkpointing in one more family",
    "test_predicted_and_allocated_memory_of_a_step[[]z-image*": "memory of a step in one more family",
    "test_the_way_down[[]rollout-options5*": "less memory in a rollout of other options",
    # what differs by an option that another case has
    "test_so_it_is_where_the_teacher_is_asked_in_every_step[[]denoiser*": "a read by the host in denoiser",
    "test_in_every_family[[]flux dev]": "a read by the host in one more family",
    "test_a_full_disk_at_the_end_costs_nothing[[][cd]*": "the same loop with another source",
    "test_the_teacher_knows_which_words_are_synonyms[[]denoiser]": "the same probe among fewer candidates",
    "test_a_plan_says_at_most_what_a_run_does[[]trajectories]": "a plan's calls of trajectories; those of layers stay",
    "test_signals_leave_a_checkpoint_and_say_so[[]15]": "SIGTERM where SIGINT is tested",
    "test_every_encoding_takes_every_name*latin*": "one more encoding",
    "test_every_encoding_takes_every_name*ascii*": "one more encoding",
    "test_every_encoding_takes_every_name*utf-16*": "one more encoding",
    "test_float8_is_the_weight_times_its_scale_rounded_once[[]*-kind1]": "the second float8 type",
}


def slow_pattern(name: str) -> str | None:
    """Return the pattern of `SLOW` that matches the name of a test with its parameters, if there is one."""
    return next((pattern for pattern in SLOW if fnmatchcase(name, pattern)), None)
