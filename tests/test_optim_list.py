"""Which test here stands for which test of torch's TestOptimRenewed, and which are left out."""

import importlib

import pytest
from torch.testing._internal.common_optimizers import optim_db

CONTRACT, GROUPS, STATES, SCHEDULERS = (
    f"test_optim_{name}" for name in ("contract", "groups", "checkpoints", "schedulers")
)
FLAGS = (CONTRACT, "test_flags_are_refused")
STATE = (STATES, "test_states_are_deterministic_and_loaded_as_they_were")
STATE_HOOKS = (STATES, "test_hooks_of_state_dicts")
STEP_HOOKS = (GROUPS, "test_hooks_around_a_step")
SCHEDULED = (SCHEDULERS, "test_the_schedulers_of_torchs_database_train")
TORCHS = {
    "test_can_load_from_to_named_state_dict": (
        GROUPS,
        "test_named_parameters_make_the_same_steps",
    ),
    "test_can_load_older_state_dict": (STATES, "test_groups_of_another_version_are_refused"),
    "test_complex": (CONTRACT, "test_complex_layers_follow_torchs_adamw"),
    "test_complex_2d": (CONTRACT, "test_complex_layers_follow_torchs_adamw"),
    "test_deepcopy_copies_all_public_attrs": ("test_odd_inputs", "test_copies_are_refused"),
    "test_errors": (CONTRACT, "test_wrong_arguments_are_refused"),
    "test_foreach_matches_forloop": FLAGS,
    "test_forloop_goes_right_direction": (CONTRACT, "test_the_loss_goes_down"),
    "test_fused_error_on_params_on_meta": (STATES, "test_states_load_into_another_device"),
    "test_fused_matches_forloop": (CONTRACT, "test_layouts_that_differ_make_the_same_steps"),
    "test_load_nontensor_step": (STATES, "test_steps_saved_as_numbers_load"),
    "test_load_state_dict_post_hook": STATE_HOOKS,
    "test_load_state_dict_pre_hook_and_prepend": STATE_HOOKS,
    "test_load_state_dict_pre_post_hook": STATE_HOOKS,
    "test_mixed_device_dtype": (CONTRACT, "test_mixed_dtypes_in_one_group"),
    "test_non_empty_state": (CONTRACT, "test_steps_are_torchs"),
    "test_optimizer_can_be_printed": (GROUPS, "test_an_optimizer_can_be_printed"),
    "test_param_group_with_lrscheduler_goes_right_direction": SCHEDULED,
    "test_param_groups_lr": (GROUPS, "test_groups_have_their_own_settings"),
    "test_param_groups_weight_decay": (GROUPS, "test_groups_have_their_own_settings"),
    "test_rosenbrock_sparse": ("test_odd_inputs", "test_sparse_gradients_are_refused"),
    "test_save_load_equality_with_weights_only": STATE,
    "test_set_default_dtype_works_with_foreach": (
        "test_odd_inputs",
        "test_the_default_dtype_does_not_matter",
    ),
    "test_state_dict_deterministic": STATE,
    "test_state_dict_post_hook": STATE_HOOKS,
    "test_state_dict_pre_hook": STATE_HOOKS,
    "test_state_dict_pre_post_hook": STATE_HOOKS,
    "test_step_all_hooks": STEP_HOOKS,
    "test_step_is_noop_for_zero_grads": (
        CONTRACT,
        "test_zero_gradients_at_first_change_nothing",
    ),
    "test_step_is_noop_when_params_have_no_grad": (
        CONTRACT,
        "test_parameters_without_gradient_stay",
    ),
    "test_step_post_hook": STEP_HOOKS,
    "test_step_pre_hook": STEP_HOOKS,
    "test_tensor_lr": (CONTRACT, "test_tensor_lr"),
}
_GPU = "wants a GPU"
_KERNELS = "which kernel torch chooses is not for us to test"
LEFT_OUT = {
    "test_cpu_load_state_dict": _GPU,
    "test_defaults_changed_to_foreach": _KERNELS,
    "test_foreach_large_tensor": _GPU,
    "test_forloop_goes_right_direction_multigpu": _GPU,
    "test_fused_cpu_matches_cuda": _GPU,
    "test_fused_does_not_step_if_foundinf": "a GradScaler leaves the step out itself, as with SGD",
    "test_fused_large_tensor": _GPU,
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "checks the database itself",
    "test_peak_memory_foreach": _GPU,
    "test_second_order_optims_return_consistent_types": "concerns LBFGS alone",
    "test_state_dict_with_cuda_params": _GPU,
}


def test_every_test_that_torchs_database_names_is_covered_or_left_out():
    named = {
        decorator.test_name
        for info in optim_db
        for decorator in info.decorators
        if decorator.cls_name == "TestOptimRenewed" and decorator.test_name
    }
    assert len(named) > 15
    assert named <= TORCHS.keys() | LEFT_OUT.keys()
    assert not TORCHS.keys() & LEFT_OUT.keys()


@pytest.mark.parametrize("name", TORCHS)
def test_what_covers_a_test_of_torch_is_there(name):
    module, test = TORCHS[name]
    assert callable(getattr(importlib.import_module(f"tests.{module}"), test))
