"""A run: every setting resolved, the config of its model, and what follows from them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path

from longfire import launch
from longfire.checkpoint.provenance import (
    RUN_TOML,
    TOKENIZER_FOLDER,
    Beside,
    recorded_tokenizer,
    tokenizer_beside,
    tokenizer_of_run,
)
from longfire.config import recipe as recipes
from longfire.config import settings
from longfire.config.checks import check
from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig, TransformersConfig
from longfire.config.paths import find_config, find_path, find_paths
from longfire.config.read_model import model_config_at, read_tables
from longfire.errors import SettingsError
from longfire.huggingface.families import ignored_line
from longfire.parallel import stages
from longfire.parallel.axes import AXES, DATA
from longfire.parallel.plan import resolve_degrees
from longfire.training import lengths
from longfire.training.schedule import Plan, fitting_warmup, read_plan, written

DATA_JSON = "data.json"
SAVED = "# Every setting of this run, resolved. `longfire train` with this file resumes it.\n\n"
# Settings of one start, which run.toml does not keep
ONCE = ("checkpoint.load_step", "checkpoint.load_step_again")
# Settings that a tokenizer beside weights brings with it
TOKENIZER_RULES = ("path", "add_bos", "add_eos")

Givens = Mapping[str, recipes.Given]


@dataclass(frozen=True)
class Run:
    """The settings of one run, a section an attribute.

    model_config: None only for commands that need no model. model_config_source: where it is
    written: a config.json, or [model] of the recipe. recipe: the file that the settings were read
    from. world: the processes that train together. degrees: how many along each axis of the mesh.
    """

    job: settings.Job
    model: settings.Model
    data: settings.Data
    tokenizer: settings.Tokenizer
    training: settings.Training
    optimizer: settings.Optimizer
    lr_scheduler: settings.LRScheduler
    parallelism: settings.Parallelism
    attention: settings.Attention
    activation_checkpoint: settings.ActivationCheckpoint
    checkpoint: settings.Checkpoint
    distillation: settings.Distillation
    eval: settings.Eval
    metrics: settings.Metrics
    profiling: settings.Profiling
    comm: settings.Comm
    model_config: ModelConfig | TransformersConfig | None = None
    model_config_source: str = ""
    recipe: Path | None = None
    world: launch.World = launch.ALONE
    degrees: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))

    @classmethod
    def compose(
        cls,
        recipe: Path | None,
        overrides: Mapping[str, str],
        *,
        needs_model: bool = True,
        trains: bool = True,
        planned: bool = False,
        world: launch.World = launch.ALONE,
        note: Callable[[str], None] = print,
    ) -> "Run":
        """The settings of a recipe with the overrides ({"training.steps": "20"}, as on the command
        line) in their place, checked.

        world: the processes that train it. trains: False for one process that only reads the run,
        whatever its plan of processes is. planned: model.weights need not be there yet. A run.toml
        that a run has saved belongs to the folder that it is in, also after that was moved. Raises
        SettingsError.
        """
        toml = recipes.read_toml(recipe) if recipe else {}
        is_saved = recipe is not None and is_saved_by_a_run(recipe)
        if recipe and is_saved:
            toml["job.dump_folder"] = recipes.Given(str(recipe.parent), str(recipe))
            for key in ONCE:  # earlier versions saved them
                toml.pop(key, None)
        command_line = recipes.read_words(overrides)
        sections = recipes.sections(toml, command_line, note=note)
        run = cls(**sections, recipe=recipe, world=world)
        if trains:
            run = replace(run, degrees=resolve_degrees(run.parallelism, world.size))
        run = run.with_paths_found(recipe.parent if recipe else Path(), note)
        # a saved run.toml records its tokenizer, which is not to name it
        is_resumed = recipe is not None and run.resumes and run.folder == recipe.parent
        givens = [command_line] if is_saved and is_resumed else [toml, command_line]
        run = run.with_tokenizer(named_tokenizer_rules(givens))
        if run.model.plugins and needs_model:
            from longfire.plugins import load_plugins  # brings the mixers, which need torch

            load_plugins(run.model.plugins)
        run = run.with_model_config(toml, command_line)
        for line in run.ignored_keys():
            note(line)
        if run.model_config is None and needs_model:
            raise SettingsError(
                f"{recipe or 'command line'}: model.config is empty, and [model] has no keys of a "
                "model: `longfire init` writes a recipe that has them; or name a config: "
                "--model.config gla-340m, a config.json, or a folder with one"
            )
        check(run, trains, planned)
        return run

    def with_model_config(self, toml: Givens, command_line: Givens) -> "Run":
        """The same run with the config of its model: that of model.config, with the [model] keys of
        recipe and command line in its place.

        A command line that names another model.config replaces the recipe's keys too. Raises
        SettingsError.
        """
        names_config = recipes.names(command_line, "model.config")
        givens = [command_line] if names_config else [toml, command_line]
        tables = recipes.model_tables(*givens)
        config_path = Path(self.model.config) if self.model.config else None
        config: ModelConfig | TransformersConfig | None = None
        if not tables:
            if config_path:
                config = model_config_at(config_path, self.model.backend)
            run = replace(self, model_config=config, model_config_source=self.model.config)
            return run.with_rope_base()
        if self.model.backend == "transformers":
            raise SettingsError(
                f"model.{next(iter(tables))} is a key of longfire's own models, but model.backend "
                "= 'transformers' takes the whole model from model.config: leave it out"
            )
        places: list[str] = []
        if recipes.model_tables(*givens[:-1]):
            places.append(f"{self.recipe}, [model]")
        if recipes.model_tables(command_line):
            places.append(recipes.COMMAND_LINE)
        source = " and ".join(places)
        config = read_tables(tables, source, config_path)
        return replace(self, model_config=config, model_config_source=source).with_rope_base()

    def with_tokenizer(self, named: Collection[str]) -> "Run":
        """The same run with the tokenizer that is beside its weights, where none was named: of its
        own folder when it is resumed, else of model.weights, else of its teacher; with the add_bos
        and add_eos that belong to it, unless they were named."""
        beside = None if "path" in named else self.tokenizer_beside_weights()
        if beside is None:
            return self
        taken = {key: getattr(beside, key) for key in TOKENIZER_RULES if key not in named}
        return replace(self, tokenizer=replace(self.tokenizer, **taken))

    def tokenizer_beside_weights(self) -> Beside | None:
        """The tokenizer of the weights that the run starts with (`with_tokenizer`)."""
        if self.resumes and (self.folder / RUN_TOML).is_file():
            recorded = Beside(**recorded_tokenizer(self.folder))
            path = Path(recorded.path)
            is_gone = path.is_absolute() and not path.exists()
            is_own = not path.is_absolute() and (self.folder / path).exists()  # of an imported run
            if is_gone or is_own or recorded.path == "train":
                return tokenizer_of_run(self.folder)
            return recorded
        for folder in (self.model.weights, self.distillation.teacher):
            if folder:
                return tokenizer_beside(Path(folder))
        return None

    def ignored_keys(self) -> list[str]:
        """A line that names the keys of model.config that have no meaning here, if there are any."""
        config = Path(self.model.config)
        if self.model.config and self.model.backend == "longfire":
            return ignored_line(read_config(config), str(config))
        return []

    @classmethod
    def of_folder(
        cls, folder: Path, overrides: Mapping[str, str] = {}, note: Callable[[str], None] = print
    ) -> "Run":
        """The run of a run folder. Raises SettingsError where there is none, or where its model
        needs code that the caller has not named: reading a folder executes nothing that is in it or
        that it points to.
        """
        if not (folder / RUN_TOML).exists():
            raise SettingsError(
                f"{folder} is no run folder: it has no {RUN_TOML}; name the job.dump_folder of a "
                "run"
            )
        plugins = recipes.read_toml(folder / RUN_TOML).get("model.plugins")
        if plugins and plugins.value and "model.plugins" not in overrides:
            raise SettingsError(
                f"{folder}: its model is made by code of {', '.join(plugins.value)}; if you trust "
                f"that file, name it: --plugins {','.join(plugins.value)}"
            )
        return cls.compose(folder / RUN_TOML, overrides, trains=False, note=note)

    @property
    def known_model_config(self) -> ModelConfig | TransformersConfig:
        """The config of the model, of a run that was composed with one."""
        assert self.model_config is not None, "composed with needs_model = False"
        return self.model_config

    @property
    def folder(self) -> Path:
        return Path(self.job.dump_folder)

    @property
    def tokenizer_folder(self) -> Path:
        """The copy of the tokenizer that the run trains with; there from its first step on."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def vocab_size(self) -> int:
        """The vocabulary size that the model will have, without reading data."""
        vocab_size = self.known_model_config.vocab_size
        if vocab_size:
            return vocab_size
        if self.tokenizer.path == "train":
            return self.tokenizer.train_vocab_size
        from longfire.data import tokenizer_training  # brings the tokenizers

        return tokenizer_training.load(self.tokenizer, (), (), self.data).vocab_size

    @property
    def data_processes(self) -> int:
        """Processes, or groups of them, that train on sequences of their own."""
        return prod(self.degrees[axis] for axis in DATA)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each process."""
        if self.training.gradient_accumulation_steps:
            return self.training.gradient_accumulation_steps
        sequences_at_once = self.training.batch_size * self.data_processes
        return max(1, self.training.global_batch_size // sequences_at_once)

    @property
    def microbatches(self) -> int:
        """Parts in which a process computes its sequences of a step: those of accumulation; with a
        pipeline as many as keep its stages busy."""
        pipeline_degree = self.degrees["pp"]
        if pipeline_degree == 1:
            return self.accumulation
        if self.parallelism.pipeline_parallel_microbatches:
            return self.parallelism.pipeline_parallel_microbatches
        pipeline_stages = stages.placement(pipeline_degree, self.parallelism)
        return max(self.accumulation, len(pipeline_stages))

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a step on all processes."""
        return self.training.batch_size * self.accumulation * self.data_processes

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.training.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, with training.max_seconds at most; training.tokens
        counts in whole steps, the last one begun is done."""
        if self.training.step_plan and not self.training.max_seconds:
            return read_plan(self.training.step_plan)[-1].total_steps
        return self.asked_steps

    @property
    def asked_steps(self) -> int:
        """The steps that training.steps or training.tokens ask for; of a run with a plan the most
        it may have."""
        if self.training.tokens:
            return -(-self.training.tokens // self.tokens_per_step)
        return self.training.steps

    def with_rope_base(self) -> "Run":
        """The same run with the RoPE base that its settings name, where they name one."""
        later = any(word.count(":") > 1 for word in self.training.seq_len_schedule)
        if not isinstance(self.model_config, ModelConfig) or not (self.model.rope_theta or later):
            return self
        return replace(self, model_config=self.model_config_with_base(self.model.rope_theta))

    def model_config_with_base(self, theta: float) -> ModelConfig:
        """The config of the model with this RoPE base; 0: with its own."""
        config = self.known_model_config
        assert isinstance(config, ModelConfig), "asked of our own models only"
        return lengths.with_base(config, theta, self.training.seq_len)

    def model_config_after(self, step: int) -> ModelConfig | TransformersConfig:
        """The config of the model after so many steps: with the RoPE base that it was last trained
        with."""
        theta = lengths.stage_of_model(self.training, step).rope_theta
        if theta:
            return self.model_config_with_base(theta)
        return self.known_model_config

    @property
    def is_planned(self) -> bool:
        """Whether the steps are those of a plan: one that is made as the run goes, or one that is
        given."""
        return bool(self.training.max_seconds or self.training.step_plan)

    @property
    def asked_warmup_steps(self) -> float:
        """The warm-up that the settings ask for, in steps; a fraction where it is given in
        tokens."""
        tokens = self.lr_scheduler.warmup_tokens
        if tokens:
            return tokens / self.tokens_per_step
        return self.lr_scheduler.warmup_steps

    @property
    def warmup_steps(self) -> float:
        """The same, shortened to what fits into the run where its steps are known."""
        asked = self.asked_warmup_steps
        if self.is_planned:
            return asked
        return fitting_warmup(self.steps, asked, self.lr_scheduler.name)

    def with_plan(self, plan: Plan) -> "Run":
        """The same run with the plan of its steps as it is now."""
        return replace(self, training=replace(self.training, step_plan=written(plan)))

    def with_paths_found(self, beside: Path, note: Callable[[str], None]) -> "Run":
        """The same run with absolute paths for the files that it reads: beside the recipe if they
        are there, else in the working folder."""
        model = replace(
            self.model,
            config=find_config(self.model.config, beside, note),
            weights=find_path(self.model.weights, beside),
            plugins=find_paths(self.model.plugins, beside),
        )
        data = replace(
            self.data,
            dataset=find_paths(self.data.dataset, beside),
            validation=find_paths(self.data.validation, beside),
        )
        tokenizer = replace(self.tokenizer, path=find_path(self.tokenizer.path, beside))
        teacher = find_path(self.distillation.teacher, beside)
        return replace(
            self,
            model=model,
            data=data,
            tokenizer=tokenizer,
            distillation=replace(self.distillation, teacher=teacher),
        )

    def settings(self) -> dict[str, dict[str, object]]:
        """Every setting by section, as TOML has it."""
        return {section: asdict(getattr(self, section)) for section in settings.SECTIONS}

    @property
    def has_checkpoints(self) -> bool:
        return any((self.folder / self.checkpoint.folder).glob("step-*"))

    @property
    def resumes(self) -> bool:
        """Whether the run starts from a checkpoint of its own folder."""
        return self.checkpoint.enable_checkpoint and self.has_checkpoints


def is_saved_by_a_run(recipe: Path) -> bool:
    """Whether a recipe is the run.toml that a run wrote into its folder."""
    return recipe.name == RUN_TOML and recipe.read_text(encoding="utf-8").startswith(SAVED)


def named_tokenizer_rules(givens: Sequence[Givens]) -> list[str]:
    """Those of path, add_bos and add_eos that recipe or command line name."""
    named: list[str] = []
    for key in TOKENIZER_RULES:
        if any(recipes.names(given, f"tokenizer.{key}") for given in givens):
            named.append(key)
    return named
