"""aliases.py: every flag of flame on torchtitan lands in a setting or is refused with the reason; the others too."""

import pytest
from logged import logged_to

from longfire.cli import main
from longfire.config import aliases, recipe, settings
from longfire.errors import SettingsError
from longfire.training.schedule import schedule

# flag -> (a value that users give, our key); in the order of the list of what flame documents
LANDS = {
    "job.dump_folder": ("exp/x", "job.dump_folder"),
    "job.description": ("a run", "job.description"),
    "job.print_args": ("true", "job.print_args"),
    "model.config": ("x.json", "model.config"),
    "model.tokenizer_path": ("fla-hub/gla-1.3B-100B", "tokenizer.path"),
    "profiling.enable_profiling": ("true", "profiling.enable_profiling"),
    "profiling.save_traces_folder": ("profile_traces", "profiling.save_traces_folder"),
    "profiling.profile_freq": ("10", "profiling.profile_freq"),
    "profiling.enable_memory_snapshot": ("true", "profiling.enable_memory_snapshot"),
    "profiling.save_memory_snapshot_folder": (
        "memory_snapshot",
        "profiling.save_memory_snapshot_folder",
    ),
    "optimizer.name": ("AdamW", "optimizer.name"),
    "optimizer.eps": ("1e-8", "optimizer.eps"),
    "optimizer.fused": ("true", "optimizer.fused"),
    "optimizer.scheduler": ("linear", "lr_scheduler.name"),
    "optimizer.lr": ("3e-4", "optimizer.lr"),
    "optimizer.min_lr_ratio": ("0.1", "lr_scheduler.min_lr_ratio"),
    "training.batch_size": ("32", "training.batch_size"),
    "training.seq_len": ("2048", "training.seq_len"),
    "training.context_len": ("4096", "data.context_len"),
    "training.varlen": ("true", "data.varlen"),
    "training.warmup_steps": ("1024", "lr_scheduler.warmup_steps"),
    "training.gradient_accumulation_steps": ("1", "training.gradient_accumulation_steps"),
    "training.steps": ("20480", "training.steps"),
    "training.max_norm": ("1.0", "training.max_norm"),
    "training.skip_nan_inf": ("true", "training.skip_nan_inf"),
    "training.dataset": ("HuggingFaceFW/fineweb-edu,other/set", "data.dataset"),
    "training.dataset_name": ("default,", "data.dataset_name"),
    "training.dataset_split": ("train,train", "data.dataset_split"),
    "training.data_dir": (",sub", "data.data_dir"),
    "training.data_files": ("a.jsonl,b.jsonl", "data.data_files"),
    "training.data_probs": ("0.6,0.4", "data.data_probs"),
    "training.streaming": ("true", "data.streaming"),
    "training.num_workers": ("32", "data.num_workers"),
    "training.prefetch_factor": ("2", "data.prefetch_factor"),
    "training.data_parallel_replicate_degree": ("1", "parallelism.data_parallel_replicate_degree"),
    "training.data_parallel_shard_degree": ("-1", "parallelism.data_parallel_shard_degree"),
    "training.tensor_parallel_degree": ("1", "parallelism.tensor_parallel_degree"),
    "training.mixed_precision_param": ("bfloat16", "model.compute_dtype"),
    "training.compile": ("on", "training.compile"),
    "training.gc_freq": ("50", "training.gc_freq"),
    "training.seed": ("42", "training.seed"),
    "training.deterministic": ("true", "training.deterministic"),
    "metrics.log_freq": ("10", "metrics.log_freq"),
    "metrics.enable_tensorboard": ("true", "metrics.enable_tensorboard"),
    "metrics.disable_color_printing": ("true", "metrics.disable_color_printing"),
    "metrics.save_tb_folder": ("tb", "metrics.save_tb_folder"),
    "metrics.enable_wandb": ("true", "metrics.enable_wandb"),
    "experimental.pipeline_parallel_degree": ("1", "parallelism.pipeline_parallel_degree"),
    "experimental.pipeline_parallel_split_points": (
        "layers.2",
        "parallelism.pipeline_parallel_split_points",
    ),
    "experimental.context_parallel_rotate_method": (
        "allgather",
        "parallelism.context_parallel_strategy",
    ),
    "experimental.pipeline_parallel_schedule": ("GPipe", "parallelism.pipeline_parallel_schedule"),
    "experimental.pipeline_parallel_schedule_csv": (
        "x.csv",
        "parallelism.pipeline_parallel_schedule_csv",
    ),
    "experimental.pipeline_parallel_microbatches": (
        "4",
        "parallelism.pipeline_parallel_microbatches",
    ),
    "training.enable_cpu_offload": ("true", "parallelism.cpu_offload"),
    "comm.trace_buf_size": ("100", "comm.trace_buf_size"),
    "experimental.context_parallel_degree": ("1", "parallelism.context_parallel_degree"),
    "checkpoint.enable_checkpoint": ("true", "checkpoint.enable_checkpoint"),
    "checkpoint.folder": ("checkpoint", "checkpoint.folder"),
    "checkpoint.interval_type": ("seconds", "checkpoint.interval_type"),
    "checkpoint.interval": ("500", "checkpoint.interval"),
    "checkpoint.model_weights_only": ("true", "checkpoint.model_weights_only"),
    "checkpoint.export_dtype": ("bfloat16", "checkpoint.export_dtype"),
    "checkpoint.create_seed_checkpoint": ("true", "checkpoint.create_seed_checkpoint"),
    "checkpoint.async_mode": ("async_with_pinned_mem", "checkpoint.async_mode"),
    "checkpoint.keep_latest_k": ("2", "checkpoint.keep_latest_k"),
    "checkpoint.load_step": ("-1", "checkpoint.load_step"),
    "float8.enable_float8_linear": ("true", "float8.enable_float8_linear"),
    "float8.enable_fsdp_float8_all_gather": (
        "true",
        "float8.enable_fsdp_float8_all_gather",
    ),
    "comm.init_timeout_seconds": ("300", "comm.init_timeout_seconds"),
    "comm.train_timeout_seconds": ("100", "comm.train_timeout_seconds"),
}
# flag -> (what flame does by default, which is accepted; a value that is refused; a word of the reason)
REFUSED = {
    "job.use_for_integration_test": ("false", "true", "no effect in its own system"),
    "model.norm_type": ("rmsnorm", "layernorm", "model.config names"),
    "optimizer.early_step_in_backward": ("false", "true", "norm of all gradients"),
    "training.disable_loss_parallel": ("false", "true", "always shared"),
    "training.mixed_precision_reduce": ("float32", "bfloat16", "always summed in float32"),
    "metrics.rank_0_only": ("true", "false", "process 0 reports"),
    "experimental.enable_async_tensor_parallel": ("false", "true", "plain tensors"),
    "experimental.enable_compiled_autograd": ("false", "true", "not proven here"),
    "float8.scaling_type_input": ("dynamic", "delayed", "numbers at hand"),
    "float8.scaling_type_weight": ("dynamic", "delayed", "numbers at hand"),
    "float8.scaling_type_grad_output": ("dynamic", "delayed", "numbers at hand"),
    "memory_estimation.enabled": (
        "false",
        "true",
        "`longfire plan RECIPE --gpus N` estimates the memory",
    ),
    "memory_estimation.disable_fake_mode": (
        "false",
        "true",
        "`longfire plan RECIPE --gpus N` estimates the memory",
    ),
}
# What changes the speed of a step there, and no number of it
CHANGES_NO_NUMBER = ("float8.precompute_float8_dynamic_scale_for_fsdp",)
# What makes a flag ask for something
REFUSED_WITH = {"training.disable_loss_parallel": {"training.tensor_parallel_degree": "2"}}
OF_THE_COMMAND = {"-h/--help", "job.config_file"}  # tested below


def sections(*, reported=None, **overrides):
    with logged_to(reported if reported is not None else []):
        return recipe.sections(recipe.read_words(overrides))


def setting(given, key):
    section, name = key.split(".")
    return getattr(given[section], name)


def test_the_two_tables_are_the_whole_list():
    count = len(LANDS) + len(REFUSED) + len(CHANGES_NO_NUMBER) + len(OF_THE_COMMAND)
    assert count == 110 - 25 + 1
    assert not LANDS.keys() & REFUSED.keys()


@pytest.mark.parametrize("flag", LANDS)
def test_a_flag_of_flame_lands_in_a_setting(flag):
    value, key = LANDS[flag]
    reported = []
    landed = setting(sections(reported=reported, **{flag: value}), key)
    assert aliases.as_text(landed) == value or float(value) == landed
    assert reported == ([] if flag == key else [f"{flag} = {value!r} is now {key} = {value!r}"])


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_without_a_meaning_here_is_refused_unless_it_asks_for_nothing(flag):
    harmless, refused, reason = REFUSED[flag]
    reported = []
    assert sections(reported=reported, **{flag: harmless}) == sections()
    assert len(reported) == 1 and "changes nothing here" in reported[0]
    with pytest.raises(SettingsError, match=reason) as error:
        sections(**{flag: refused}, **REFUSED_WITH.get(flag, {}))
    assert (
        flag in str(error.value)
        and repr(refused) in str(error.value)
        and "leave it out" in str(error.value)
    )


def test_flags_are_accepted_where_other_settings_make_them_harmless():
    """Flame's own usage line has both."""
    assert sections(**{"training.disable_loss_parallel": "true"}) == sections()
    unclipped = sections(**{"training.max_norm": "0"})
    early = {"training.max_norm": "0", "optimizer.early_step_in_backward": "true"}
    assert sections(**early) == unclipped


def test_todays_words_of_flame_for_the_learning_rate():
    """The words of its README of 2025."""
    words = {"lr_scheduler.decay_type": "cosine", "lr_scheduler.lr_min": "0.2"}
    given = sections(**words)["lr_scheduler"]
    assert given.name == "cosine" and given.min_lr_ratio == 0.2
    last_part = sections(**words, **{"lr_scheduler.decay_ratio": "0.3"})["lr_scheduler"]
    assert last_part.name == "wsd" and last_part.decay_shape == "cosine"
    assert last_part.decay_ratio == 0.3


def test_todays_words_of_flame_for_optimizer_sharding_and_first_weights():
    """Its config_manager.py of 2025."""
    given = sections(
        reported=[],
        **{
            "model.name": "fla",
            "optimizer.implementation": "foreach",
            "training.fsdp_reshard_after_forward": "default",
            "checkpoint.initial_load_path": "weights",
            "checkpoint.initial_load_model_weights_only": "true",
            "checkpoint.last_save_model_weights_only": "true",
            "metrics.save_for_all_ranks": "false",
        },
    )
    assert not given["optimizer"].fused and given["model"].weights == "weights"
    assert given["parallelism"].reshard_after_forward == "auto"
    assert given["checkpoint"].model_weights_only
    never = sections(reported=[], **{"training.fsdp_reshard_after_forward": "never"})
    assert never["parallelism"].reshard_after_forward == "never"
    whole = {"checkpoint.no_initial_load_model_weights_only": "true"}
    assert sections(reported=[], **whole) == sections()
    with pytest.raises(SettingsError, match="weights alone"):
        sections(reported=[], **whole, **{"checkpoint.initial_load_path": "weights"})
    with pytest.raises(SettingsError, match="none of|not one of fused"):
        sections(**{"optimizer.implementation": "cuda"})


def test_numbers_of_ring_attention_with_accumulation():
    """Its steps count micro-batches: an update is so many of them."""
    given = sections(
        **{
            "optimizer.accumulate_gradient_steps": "4",
            "total_steps": "1000",
            "save_model_freq": "100",
            "train_dataset.json_dataset.batch_size": "8",
            "eval_steps": "2",
            "log_freq": "50",
        }
    )
    assert given["training"].steps == 250 and given["training"].global_batch_size == 32
    assert given["checkpoint"].interval == 25 and given["checkpoint"].keep_latest_k == 1
    assert given["eval"].interval == 13 and given["eval"].tokens == 2 * 8 * 1024


def test_help_and_config_file_belong_to_the_command(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["train", "-h"])
    assert "--training.seq_len" in capsys.readouterr().out
    assert main(["train", "--job.config_file", "no-such.toml"]) == 2
    assert "no-such.toml: no such recipe" in capsys.readouterr().err


def test_every_alias_ends_in_a_setting_that_exists():
    for spelling, old in aliases.ALIASES.items():
        assert spelling not in recipe.SETTINGS, f"{spelling} is a setting of its own"
        if isinstance(old, str):
            assert old in recipe.SETTINGS, spelling
        elif isinstance(old, aliases.Refused | aliases.Dropped):
            assert len(old.reason) > 10, spelling
    assert aliases.VALUES.keys() <= recipe.SETTINGS.keys()


def test_no_spelling_means_two_things():
    tables = (
        aliases.EARLIER_LONGFIRE,
        aliases.FLAME_ACCELERATE,
        aliases.FLAME_TORCHTITAN,
        aliases.FLASH_ATTENTION,
        aliases.RING_ATTENTION,
    )
    assert sum(map(len, tables)) == len(aliases.ALIASES)


def test_the_line_of_flame_on_accelerate():
    """As `train.sh` takes it, with its default scheduler."""
    line = "type=gla lr=3e-4 scheduler=cosine_with_min_lr batch=32 update=1 warmup=1024 steps=20480 context=2048 gpus=1 nodes=1"
    line += " path=exp/gla-340M-10B project=fla model=configs/gla_340M.json data=HuggingFaceFW/fineweb-edu name=sample-10BT"
    line += " cache=data/HuggingFaceFW/fineweb-edu/sample-10BT/train seed=42 save=2048 limit=1 logging=32 preprocessing=32 workers=32"
    line += " optim=adamw_torch_fused decay=0.01 beta1=0.9 beta2=0.95 norm=1.0"
    given = sections(**dict(word.split("=") for word in line.split()))
    wanted = {
        "optimizer.lr": 3e-4,
        "lr_scheduler.name": "cosine",
        "training.batch_size": 32,
        "lr_scheduler.warmup_steps": 1024,
        "training.gradient_accumulation_steps": 1,
        "training.steps": 20480,
        "training.seq_len": 2048,
        "job.dump_folder": "exp/gla-340M-10B",
        "metrics.wandb_project": "fla",
        "model.config": "configs/gla_340M.json",
        "data.dataset": ("HuggingFaceFW/fineweb-edu",),
        "data.dataset_name": ("sample-10BT",),
        "checkpoint.interval": 2048,
        "checkpoint.keep_latest_k": 1,
        "metrics.log_freq": 32,
        "data.num_workers": 32,
        "optimizer.name": "AdamW",
        "optimizer.weight_decay": 0.01,
        "training.max_norm": 1.0,
    }
    assert {key: setting(given, key) for key in wanted} == wanted
    assert setting(sections(scheduler="warmup_stable_decay"), "lr_scheduler.name") == "wsd"
    with pytest.raises(SettingsError, match=r"gpus = '8'.*: 1. Processes .*scripts/train.sh"):
        sections(gpus="8")


def test_continual_training_is_recognised_by_what_model_points_at(tmp_path):
    assert sections(model=str(tmp_path))["model"].weights == ""
    (tmp_path / "model.safetensors").touch()
    assert sections(model=str(tmp_path))["model"].weights == str(tmp_path)


def test_what_ringattention_says_of_computing():
    """The README's own `update_llama_config`, and the same words alone."""
    line = "dict(max_sequence_length=131072,scan_attention=True,scan_query_chunk_size=2048,scan_key_chunk_size=4096,remat_attention="
    line += "'nothing_saveable',scan_mlp=True,scan_mlp_chunk_size=2048,remat_mlp='nothing_saveable',remat_block='nothing_saveable',"
    line += "scan_layers=True,attention_type='blockwise',param_scan_axis=0,mesh_dim='1,1,4,64')"
    given = sections(update_llama_config=line)
    assert given["parallelism"].mesh_dim == "1,1,4,64"
    assert given["attention"] == settings.Attention("blockwise", 2048, 4096)
    assert given["training"].mlp_chunk_size == 2048
    assert given["activation_checkpoint"] == settings.ActivationCheckpoint("block")
    alone = {
        "mesh_dim": "1,1,4,64",
        "scan_attention": "True",
        "scan_query_chunk_size": "2048",
        "scan_key_chunk_size": "4096",
        "scan_mlp_chunk_size": "2048",
        "remat_block": "nothing_saveable",
        "remat_mlp": "",
    }
    assert sections(**alone) == given
    both = sections(
        update_llama_config="dict(remat_mlp='checkpoint_dots', remat_attention='checkpoint_dots', scan_mlp=True)"
    )
    assert both["activation_checkpoint"] == settings.ActivationCheckpoint(
        "attention+mlp", ("matmuls",)
    )
    assert both["training"].mlp_chunk_size == 1024
    off = sections(
        update_llama_config="dict(scan_attention=False, scan_mlp=False, scan_query_chunk_size=8, scan_mlp_chunk_size=8)"
    )
    assert off == sections()
    assert sections(attention_type="standard")["attention"].kind == "vanilla"


@pytest.mark.parametrize(
    ("spelling", "value", "reported"),
    [
        (
            "update_llama_config",
            "dict(number_of_layers=4)",
            "number_of_layers: the config of a model is in the file",
        ),
        ("update_llama_config", "dict(scan_mlp=f())", "is not written dict"),
        (
            "update_llama_config",
            "dict(remat_mlp='checkpoint_dots', remat_attention='nothing_saveable')",
            "one policy",
        ),
        ("attention_type", "flash", "standard, ring_standard, blockwise"),
        ("scan_mlp", "True", "training.mlp_chunk_size says how many"),
        (
            "remat_mlp",
            "save_some",
            "activation_checkpoint.mode = 'mlp' and, as activation_checkpoint.policy",
        ),
        ("activation_checkpoint.selective_ac_option", "all", "every n-th block"),
    ],
)
def test_what_is_said_of_computing_and_cannot_be(spelling, value, reported):
    with pytest.raises(SettingsError, match=reported):
        sections(**{spelling: value})


def test_selective_recomputation_of_torchtitan():
    reported = []
    words = {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
    }
    assert sections(reported=reported, **words)[
        "activation_checkpoint"
    ] == settings.ActivationCheckpoint("block", ("matmuls",))
    assert len(reported) == 2


def test_a_checkpoint_is_named_by_its_step():
    assert sections(checkpoint="exp/gla/checkpoint-8192")["checkpoint"].load_step == 8192
    with pytest.raises(SettingsError, match="names no step"):
        sections(checkpoint="exp/gla")


def test_the_line_of_ring_attention():
    """With one device's mesh."""
    given = sections(
        **{
            "mesh_dim": "1,1,1,1",
            "dtype": "bf16",
            "total_steps": "480000",
            "log_freq": "200",
            "save_model_freq": "0",
            "save_milestone_freq": "1000",
            "load_llama_config": "7b.json",
            "update_llama_config": "",
            "load_dataset_state": "",
            "load_checkpoint": "params::/weights",
            "tokenizer.vocab_file": "tokenizer.json",
            "optimizer.type": "adamw",
            "optimizer.adamw_optimizer.weight_decay": "0.1",
            "optimizer.adamw_optimizer.lr": "1.5e-4",
            "optimizer.adamw_optimizer.lr_warmup_steps": "2000",
            "train_dataset.type": "json",
            "train_dataset.text_processor.fields": "text",
            "train_dataset.json_dataset.path": "data.jsonl",
            "train_dataset.json_dataset.seq_length": "32768",
            "train_dataset.json_dataset.batch_size": "64",
            "train_dataset.json_dataset.tokenizer_processes": "16",
            "checkpointer.save_optimizer_state": "True",
        }
    )
    wanted = {
        "model.compute_dtype": "bfloat16",
        "training.steps": 480000,
        "metrics.log_freq": 200,
        "checkpoint.interval": 0,
        "checkpoint.milestone_interval": 1000,
        "model.config": "7b.json",
        "model.weights": "/weights",
        "tokenizer.path": "tokenizer.json",
        "optimizer.name": "AdamW",
        "optimizer.weight_decay": 0.1,
        "optimizer.lr": 1.5e-4,
        "lr_scheduler.warmup_steps": 2000,
        "data.text_field": ("text",),
        "data.dataset": ("data.jsonl",),
        "training.seq_len": 32768,
        "training.global_batch_size": 64,
        "data.num_workers": 16,
        "checkpoint.model_weights_only": False,
    }
    assert {key: setting(given, key) for key in wanted} == wanted
    with pytest.raises(SettingsError, match="min_lr_ratio = end_lr / lr"):
        sections(**{"optimizer.adamw_optimizer.end_lr": "1.5e-5"})
    assert sections(mesh_dim="1,64,4,1")["parallelism"].mesh_dim == "1,64,4,1"


def test_the_line_of_flash_attention():
    """The line of its README, whose batch is global."""
    given = sections(
        **{
            "trainer.devices": "1",
            "trainer.precision": "bf16",
            "datamodule.batch_size": "64",
            "resume": "True",
        }
    )
    assert given["model"].compute_dtype == "bfloat16" and given["training"].batch_size == 64
    with pytest.raises(SettingsError, match="an experiment is a recipe with settings"):
        sections(experiment="owt/gpt2s-flash")


def test_an_alias_and_its_new_name_together_are_an_error():
    with pytest.raises(
        SettingsError, match=r"training\.warmup_steps and lr_scheduler\.warmup_steps both mean"
    ):
        sections(**{"training.warmup_steps": "5", "lr_scheduler.warmup_steps": "6"})


def test_what_a_bare_flag_means():
    assert aliases.bare_value("training.compile") == "on"
    assert aliases.bare_value("training.streaming") == "true"
    assert aliases.bare_value("float8.enable_float8_linear") == "true"
    assert aliases.bare_value("training.pin_memory") == "true"
    assert aliases.bare_value("training.dataset") == "" and aliases.bare_value("type") == ""


@pytest.mark.parametrize(("theirs", "ours"), [("allgather", "allgather"), ("alltoall", "ring")])
def test_torchtitans_all_to_all_of_keys_and_values_is_a_ring(theirs, ours):
    given = sections(reported=[], **{"experimental.context_parallel_rotate_method": theirs})
    assert given["parallelism"].context_parallel_strategy == ours
    with pytest.raises(SettingsError, match="allgather, alltoall"):
        sections(reported=[], **{"experimental.context_parallel_rotate_method": "ring"})


@pytest.mark.parametrize("flag", [*CHANGES_NO_NUMBER, "float8.force_recompute_fp8_weight_in_bwd"])
def test_words_about_how_float8_weights_travel_are_accepted_with_the_reason(flag):
    assert aliases.bare_value(flag) == "true"
    for value in ("true", "false"):
        reported: list[str] = []
        assert sections(reported=reported, **{flag: value}) == sections()
        (message,) = reported
        assert message.startswith(f"{flag} = {value!r} sets nothing: ")


@pytest.mark.parametrize("name", ["float8", "quantize.linear.float8"])
def test_torchtitans_converter_of_float8(name):
    reported: list[str] = []
    given = sections(reported=reported, **{"model.converters": name})["float8"]
    assert given == settings.Float8(enable_float8_linear=True)
    assert reported == [f"model.converters = {name!r} is now float8.enable_float8_linear = 'true'"]
    both = {"model.converters": name, "float8.enable_float8_linear": "true"}
    assert sections(reported=[], **both)["float8"] == given
    with pytest.raises(SettingsError, match="keep one of them"):
        sections(reported=[], **both | {"float8.enable_float8_linear": "false"})
    with pytest.raises(SettingsError, match="'mx' is not supported"):
        sections(reported=[], **{"model.converters": "float8,mx"})


def test_torchtitans_other_words_of_float8_are_the_same():
    given = sections(
        **{
            "float8.recipe_name": "rowwise",
            "float8.filter_fqns": "output,mlp",
            "float8.emulate": "true",
        }
    )["float8"]
    assert given == settings.Float8(
        recipe_name="rowwise", filter_fqns=("output", "mlp"), emulate=True
    )


def test_what_flame_s_own_files_say_and_does_nothing_there_is_accepted():
    """Values as its TOML files have them."""
    reported: list[str] = []
    given = sections(
        reported=reported,
        **{
            "model.norm_type": "fused_rmsnorm",
            "model.converters": "",
            "model.print_after_conversion": "false",
            "experimental.custom_model_path": "",
            "checkpoint.exclude_from_loading": "",
            "activation_checkpoint.mode": "none",
            "activation_checkpoint.selective_ac_option": "2",
            "activation_offload.mode": "none",
            "fault_tolerance.enable": "false",
            "fault_tolerance.group_size": "0",
        },
    )
    assert given["activation_checkpoint"].mode == "none"
    with pytest.raises(SettingsError, match="MAX_RESTARTS"):
        sections(**{"fault_tolerance.enable": "true", "fault_tolerance.group_size": "2"})
    every_second = sections(
        **{
            "activation_checkpoint.mode": "selective",
            "activation_checkpoint.selective_ac_option": "2",
        }
    )["activation_checkpoint"]
    assert every_second == settings.ActivationCheckpoint("block", layer_interval=2)


def test_words_of_flash_attention_s_own_files():
    given = sections(
        reported=[],
        **{
            "train.optimizer.betas": "[0.9, 0.98]",
            "datamodule.shuffle": "False",
            "datamodule.pin_memory": "True",
            "callbacks.model_checkpoint_progress.every_n_train_steps": "500",
            "logger.wandb.mode": "offline",
            "datamodule.detokenize": "False",
        },
    )
    assert (given["optimizer"].beta1, given["optimizer"].beta2) == (0.9, 0.98)
    assert given["data"].shuffle == "none"
    assert given["checkpoint"].milestone_interval == 500, "saved beside the others, and kept"
    with pytest.raises(SettingsError, match="is not two numbers"):
        sections(**{"train.optimizer.betas": "0.9"})


def test_what_flash_attention_s_files_say_of_records_and_ends():
    given = sections(
        reported=[],
        **{
            "logger": "[wandb,csv]",
            "callbacks.speed_monitor.verbose": "True",
            "callbacks.early_stopping": "null",
            "callbacks.model_checkpoint.every_n_train_steps": "1000",
            "callbacks.model_checkpoint_progress.every_n_train_steps": "50000",
            "callbacks.model_checkpoint_progress.save_top_k": "-1",
            "trainer.check_val_every_n_epoch": "null",
            "trainer.deterministic": "True",
            "eval.log_on_step": "True",
            "data_dir": "stores",
        },
    )
    assert given["metrics"].enable_wandb and given["training"].deterministic
    assert given["checkpoint"].interval == 1000 and given["data"].folder == "stores"
    assert given["checkpoint"].milestone_interval == 50000
    for word, value, reason in (
        ("trainer.max_epochs", "3", "training.steps ends a run"),
        ("callbacks.early_stopping.patience", "3", "training.steps ends a run"),
        ("callbacks.model_checkpoint.dirpath", "x", "job.dump_folder"),
        ("logger", "mlflow", "none of wandb"),
        ("mode", "debug", "a trial"),
    ):
        with pytest.raises(SettingsError, match=reason):
            sections(reported=[], **{word: value})


def test_keys_of_flash_attention_s_model():
    words = {"n_embd": "64", "n_layer": "3", "n_head": "4", "rotary_emb_fraction": "0.5"}
    words |= {"residual_in_fp32": "False", "mlp_checkpoint_lvl": "[0,1,2]", "fused_mlp": "True"}
    found: dict[str, object] = {}
    given = {f"model.config.{word}": value for word, value in words.items()}
    for word, value in given.items():
        found |= aliases.translate(word, value, "a line", given)[0]
    assert found == {
        "model.hidden_size": "64",
        "model.intermediate_size": 256,
        "model.num_hidden_layers": "3",
        "model.attention.num_heads": "4",
        "model.attention.rope": "default",
        "model.attention.rotary_fraction": "0.5",
        "model.learned_positions": "false",
        "model.residual_in_fp32": "False",
        "activation_checkpoint.mode": "mlp",
        "activation_checkpoint.layers": "1,2",
    }
    for key, value in found.items():  # each is a setting or a key of a model
        recipe.read_words({key: str(value)})
    with pytest.raises(SettingsError, match="levels are 0, 1 and 2"):
        aliases.translate("model.config.mlp_checkpoint_lvl", "3", "a line", {})


def test_words_of_easylm_that_its_defaults_have():
    reported: list[str] = []
    sections(
        reported=reported,
        **{
            "train_dataset.json_dataset.tokenizer_parallel_chunk_size": "32",
            "train_dataset.json_dataset.start_seek_loc": "0",
            "checkpointer.float_dtype": "bf16",
            "log_all_worker": "False",
            "jax_distributed.initialize_jax_distributed": "True",
        },
    )
    assert len(reported) == 5
    with pytest.raises(SettingsError, match="the position in the data is part of a checkpoint"):
        sections(**{"train_dataset.json_dataset.start_seek_loc": "1000"})


def test_a_decay_by_the_square_root_says_which_share_of_the_run_it_takes():
    """torchtitan decays over all that follows the warm-up where no share is given; here wsd would
    take a tenth."""
    words = {"lr_scheduler.decay_type": "sqrt"}
    given = sections(reported=[], **words, **{"lr_scheduler.decay_ratio": "0.5"})["lr_scheduler"]
    assert (given.name, given.decay_shape, given.decay_ratio) == ("wsd", "sqrt", 0.5)
    with pytest.raises(SettingsError, match=r"give lr_scheduler\.decay_ratio"):
        sections(**words)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({"train/scheduler": "invsqrt"}, {"name": "inverse_sqrt", "min_lr_ratio": 0.0}),
        ({"train/scheduler": "poly-warmup"}, {"name": "polynomial", "power": 1.0}),
        (
            {"train/scheduler": "step", "train.scheduler.step_size": "50"},
            {"name": "step", "step_size": 50, "gamma": 0.1, "min_lr_ratio": 0.0},
        ),
        (
            {"train/scheduler": "multi-step", "train.scheduler.milestones": "[5, 9]"},
            {"name": "multistep", "milestones": (5, 9)},
        ),
        ({"train/scheduler": "plateau"}, {"name": "plateau", "gamma": 0.2, "patience": 20}),
        (
            {"train/scheduler": "plateau", "train.scheduler.patience": "3"},
            {"name": "plateau", "gamma": 0.2, "patience": 3},
        ),
        (
            {
                "train/scheduler": "cosine-warmup-timm",
                "train.optimizer.lr": "4e-4",
                "train.scheduler.lr_min": "1e-4",
                "train.scheduler.t_initial": "1000",
                "train.scheduler.warmup_t": "10",
                "train.scheduler.warmup_prefix": "True",
                "train.scheduler.warmup_lr_init": "0.0",
            },
            {"name": "cosine", "min_lr_ratio": 0.25, "decay_end_step": 1010, "warmup_steps": 10},
        ),
        ({"scheduler": "inverse_sqrt"}, {"name": "inverse_sqrt", "min_lr_ratio": 0.0}),
        ({"scheduler": "polynomial"}, {"name": "polynomial", "min_lr_ratio": 0.0}),
        ({"scheduler": "reduce_lr_on_plateau"}, {"name": "plateau", "patience": 10}),
    ],
)
def test_schedules_of_flash_attention_and_transformers(words, wanted):
    given = sections(**words)["lr_scheduler"]
    assert {name: getattr(given, name) for name in wanted} == wanted


def test_a_floor_of_the_rate_needs_the_peak():
    with pytest.raises(SettingsError, match=r"train.scheduler.lr_min = '1e-5' is a share"):
        sections(**{"train.scheduler.lr_min": "1e-5"})


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({"optimizer": "fusedlamb"}, {"name": "LAMB"}),
        ({"train/optimizer": "adamw-apex-zero"}, {"name": "AdamW"}),
        (
            {
                "optimizer": "sgd",
                "train.optimizer.momentum": "0.9",
                "train.optimizer.nesterov": "True",
            },
            {"name": "SGD", "options": ("momentum=0.9", "nesterov=true")},
        ),
        ({"optimizer.type": "adafactor"}, {"name": "Adafactor"}),
        ({"optimizer.type": "adamw"}, {"name": "AdamW"}),
        ({"optimizer.adamw_optimizer.bf16_momentum": "True"}, {"momentum_dtype": "bfloat16"}),
        ({"optimizer.adamw_optimizer.bf16_momentum": "False"}, {"momentum_dtype": "float32"}),
        ({"optim": "adafactor"}, {"name": "Adafactor"}),
    ],
)
def test_optimizers_of_the_four_frameworks(words, wanted):
    given = sections(**words)["optimizer"]
    assert {name: getattr(given, name) for name in wanted} == wanted


def test_a_schedule_of_flash_attention_by_its_own_word():
    given = sections(**{"scheduler": "plateau", "train.scheduler.factor": "0.3"})["lr_scheduler"]
    assert (given.name, given.gamma, given.patience) == ("plateau", 0.3, 20)


def test_the_optimizer_palm_brings_its_rate_and_decay():
    """optax: rate(step) = lr / 0.01 / sqrt(max(step, warmup)), decay(step) = decay / 1e-4 * rate ** 2."""
    words = {"optimizer.type": "palm", "optimizer.palm_optimizer.lr": "0.02"}
    words |= {
        "optimizer.palm_optimizer.lr_warmup_steps": "4",
        "optimizer.palm_optimizer.weight_decay": "3e-4",
    }
    given = sections(reported=[], **words)
    peak, scheduler = given["optimizer"].lr, given["lr_scheduler"]
    rates = [peak * schedule(step, 40, scheduler.warmup_steps, scheduler) for step in range(40)]
    assert rates == pytest.approx([2 / max(step, 4) ** 0.5 for step in range(40)], rel=1e-12)
    assert given["optimizer"].weight_decay == pytest.approx(3.0)
    assert given["optimizer"].options[2:] == (
        *("momentum=0.9", "decay_exponent=0.99", "decay_scale=rate_squared"),
    )
    with pytest.raises(SettingsError, match="without optimizer.type = palm"):
        sections(**{"optimizer.palm_optimizer.lr": "0.02"})


def test_ring_attention_s_adamw_with_the_scale_of_parameters_is_adafactor():
    word = "optimizer.adamw_optimizer.multiply_by_parameter_scale"
    options = ("factored=false", "clip_threshold=0", "momentum=0.8", "decay_exponent=0.95")
    options = (*options, "decay_scale=rate")
    for words in ({"optimizer.type": "adamw"}, {}):
        words = {**words, word: "True", "optimizer.adamw_optimizer.b1": "0.8"}
        given = sections(reported=[], **words)["optimizer"]
        assert (given.name, given.options) == ("Adafactor", options)
        assert given.beta1 == settings.Optimizer().beta1, "Adafactor has none"
    off = sections(reported=[], **{word: "False", "optimizer.type": "adamw"})["optimizer"]
    assert off == settings.Optimizer()


def test_best_checkpoints_of_flash_attention():
    words = {"monitor": "val/loss", "mode": "min", "save_last": "True", "save_top_k": "3"}
    given = sections(**{f"callbacks.model_checkpoint.{key}": words[key] for key in words})
    assert (given["checkpoint"].keep_best_k, given["checkpoint"].keep_latest_k) == (3, 1)
    every = sections(**{"callbacks.model_checkpoint.save_top_k": "-1"})["checkpoint"]
    assert (every.keep_best_k, every.keep_latest_k) == (0, 0)
    with pytest.raises(SettingsError, match="lowest validation loss"):
        sections(**{"callbacks.model_checkpoint.monitor": "val/acc"})


def test_the_average_of_flash_attention():
    words = {"callbacks.ema.decay": "0.99", "callbacks.ema.use_num_updates": "False"}
    assert sections(**words)["optimizer"].ema_decay == 0.99
    words = {"callbacks": "[ema]", "callbacks.ema.decay": "0.99"}
    assert sections(**words)["optimizer"].ema_decay == 0.99
    with pytest.raises(SettingsError, match="ema needs its decay"):
        sections(callbacks="[default, ema]")


def test_metrics_and_callbacks_of_flash_attention():
    given = sections(**{"metrics": "[perplexity, num-tokens, acc]"})["metrics"]
    assert given.accuracy and not sections(**{"metrics": "[ppl,num-tokens]"})["metrics"].accuracy
    words = {"callbacks": "[default, norm-monitor]", "trainer.log_every_n_steps": "20"}
    assert sections(**words)["metrics"].norms_freq == 20
    assert sections(**{"callbacks": "[default]"})["metrics"].norms_freq == 0
    assert sections(**{"callbacks.norm_monitor": "null"})["metrics"].norms_freq == 0
    with pytest.raises(SettingsError, match="acctop5 is none of acc"):
        sections(**{"metrics": "[acctop5]"})


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("model.compute_dtype", "float16"),
        ("trainer.precision", "16"),
        ("trainer.precision", "16-mixed"),
        ("dtype", "fp16"),
        ("training.mixed_precision_param", "float16"),
    ],
)
def test_float16_is_refused_with_the_reason_and_the_type_to_take(spelling, value):
    with pytest.raises(SettingsError, match="a scale of the loss.*Write bfloat16") as error:
        sections(**{spelling: value})
    assert f"{spelling} = {value!r}" in str(error.value)
