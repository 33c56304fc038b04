"""A run: every setting resolved, the config of its model, and what follows from them."""

import glob
import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import tomli_w

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
from longfire.config import settings, shipped
from longfire.config.checks import FEWEST_WORDS, check
from longfire.config.config_file import read_config
from longfire.config.model_config import (
    INIT_KEYS,
    ModelConfig,
    TransformersConfig,
    mixer_of,
    nearest,
    placed,
)
from longfire.disk import held, write_whole
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.families import class_of_export, config_from_hf, ignored_line
from longfire.huggingface.own_config import is_own_export
from longfire.parallel import stages
from longfire.parallel.axes import AXES, DATA
from longfire.parallel.plan import resolve_degrees
from longfire.plural import counted
from longfire.training import lengths
from longfire.training.reporting import check_trackers
from longfire.training.schedule import STEP_PLAN, Plan, fitting_warmup, read_plan, written

LOCK, DATA_JSON = "lock", "data.json"
SAVED = "# Every setting of this run, resolved. `longfire train` with this file resumes it.\n\n"
WORDS = (
    "embedded",
    "bytes",
    "train",
)  # of data.dataset and tokenizer.path: names of ours, never of files
ONCE = (
    "checkpoint.load_step",
    "checkpoint.load_step_again",
)  # what is asked of one start: run.toml does not keep it
TOKENIZER_RULES = ("path", "add_bos", "add_eos")  # of a tokenizer that lies beside weights


@dataclass(frozen=True)
class Run:
    """The settings of one run, a section an attribute. `shape` is None only for commands that need
    no model.

    model_config_source: where the shape is written: a config.json, or [model] of the recipe. recipe: the
    file that the settings were read from. world: the processes that train together; degrees: how
    many along each axis of the mesh.
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
        """The recipe, then the overrides ({"training.steps": "20"}, as the command line spells
        them), checked whole.

        world: the processes that train it. Who only reads it (not `trains`) is one process,
        whatever its plan says. What is only planned may start from weights that are not here yet. A
        run.toml that a run saved belongs to the folder it lies in, wherever that was moved. Raises
        SettingsError.
        """
        toml = recipes.read_toml(recipe) if recipe else {}
        is_saved = bool(
            recipe
            and recipe.name == RUN_TOML
            and recipe.read_text(encoding="utf-8").startswith(SAVED)
        )
        if recipe and is_saved:
            toml["job.dump_folder"] = recipes.Given(str(recipe.parent), str(recipe))
            toml = {
                key: given for key, given in toml.items() if key not in ONCE
            }  # kept there by versions before
        words = recipes.read_words(overrides)
        given = recipes.sections(toml, words, note=note)
        run = cls(**given, recipe=recipe, world=world)
        if trains:
            run = replace(run, degrees=resolve_degrees(run.parallelism, world.size))
        run = run.with_paths_found(recipe.parent if recipe else Path(), note)
        # a run.toml that a run saved records its tokenizer; who resumes it names none by that
        is_recorded = is_saved and run.goes_on and run.folder == recipe.parent
        naming = [words] if is_recorded else [toml, words]
        named = [
            key
            for key in TOKENIZER_RULES
            if any(recipes.names(said, f"tokenizer.{key}") for said in naming)
        ]
        run = run.with_tokenizer(named)
        if run.model.plugins and needs_model:
            from longfire.plugins import load_plugins  # brings the mixers, which need torch

            load_plugins(run.model.plugins)
        run = run.with_model_config(toml, words)
        for line in run.ignored_keys():
            note(line)
        if run.model_config is None and needs_model:
            raise SettingsError(
                f"{recipe or 'command line'}: model.config is empty, and [model] has no keys of a model: `longfire init` "
                "writes a recipe that has them; or name a config: --model.config gla-340m, a config.json, or a folder with one"
            )
        check(run, trains, planned)
        return run

    def with_model_config(
        self, toml: Mapping[str, recipes.Given], words: Mapping[str, recipes.Given]
    ) -> "Run":
        """The same run with the config of its model: that of model.config, with the [model] keys of
        recipe and command line over it.

        A command line that names another model.config takes the place of the recipe's keys too.
        Raises SettingsError.
        """
        givens = [words] if recipes.names(words, "model.config") else [toml, words]
        tables = recipes.model_tables(*givens)
        if not tables:
            config = self.model_config_in(Path(self.model.config)) if self.model.config else None
            return replace(
                self, model_config=config, model_config_source=self.model.config
            ).with_base()
        if self.model.backend == "transformers":
            raise SettingsError(
                f"model.{next(iter(tables))} is a key of longfire's own models, but model.backend = 'transformers' takes the whole "
                "model from model.config: leave it out"
            )
        places = [f"{self.recipe}, [model]"] if recipes.model_tables(*givens[:-1]) else []
        places += [recipes.COMMAND_LINE] if recipes.model_tables(words) else []
        place = " and ".join(places)
        config = read_tables(tables, place, Path(self.model.config) if self.model.config else None)
        return replace(self, model_config=config, model_config_source=place).with_base()

    def with_tokenizer(self, named: Collection[str]) -> "Run":
        """The same run with the tokenizer that lies beside its weights, where none was named: of
        its own folder when it goes on, else of model.weights, else of its teacher; with the add_bos
        and add_eos that belong to it, unless they were named."""
        beside = None if "path" in named else self.tokenizer_beside_weights()
        if beside is None:
            return self
        taken = {key: getattr(beside, key) for key in TOKENIZER_RULES if key not in named}
        return replace(self, tokenizer=replace(self.tokenizer, **taken))

    def tokenizer_beside_weights(self) -> Beside | None:
        """See `with_tokenizer`."""
        if self.goes_on and (self.folder / RUN_TOML).is_file():
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
        """A line that names the keys of model.config that were passed over, if there are."""
        config = Path(self.model.config)
        return (
            ignored_line(read_config(config), str(config))
            if self.model.config and self.model.backend == "longfire"
            else []
        )

    @classmethod
    def of_folder(
        cls, folder: Path, overrides: Mapping[str, str] = {}, note: Callable[[str], None] = print
    ) -> "Run":
        """The run that lives in a folder. Raises SettingsError where there is none, or where its
        model needs code that was not named by the caller: reading a folder runs nothing that lies
        there or that it points to.
        """
        if not (folder / RUN_TOML).exists():
            raise SettingsError(
                f"{folder} is no run folder: it has no {RUN_TOML}; name the job.dump_folder of a run"
            )
        plugins = recipes.read_toml(folder / RUN_TOML).get("model.plugins")
        if plugins and plugins.value and "model.plugins" not in overrides:
            raise SettingsError(
                f"{folder}: its model is made by code of {', '.join(plugins.value)}; if you trust that file, name it: "
                f"--plugins {','.join(plugins.value)}"
            )
        return cls.compose(folder / RUN_TOML, overrides, trains=False, note=note)

    @property
    def folder(self) -> Path:
        return Path(self.job.dump_folder)

    @property
    def tokenizer_folder(self) -> Path:
        """The copy of the tokenizer that the run trains with; there from its first step on."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def words(self) -> int:
        """How many words the model will have, without touching data."""
        if self.model_config.vocab_size:
            return self.model_config.vocab_size
        if self.tokenizer.path == "train":
            return self.tokenizer.train_vocab_size
        from longfire.data import tokenizer_training  # brings the tokenizers

        return tokenizer_training.load(self.tokenizer, (), (), self.data).vocab_size

    @property
    def data_processes(self) -> int:
        """Processes, or groups of them, with rows of their own."""
        return prod(self.degrees[axis] for axis in DATA)

    @property
    def accumulation(self) -> int:
        """Microbatches of a step."""
        rows_at_once = self.training.batch_size * self.data_processes
        return self.training.gradient_accumulation_steps or max(
            1, self.training.global_batch_size // rows_at_once
        )

    @property
    def microbatches(self) -> int:
        """Parts that a process's rows of a step go in: those of accumulation, with a pipeline as
        many as keep its stages busy."""
        if self.degrees["pp"] == 1:
            return self.accumulation
        asked = self.parallelism.pipeline_parallel_microbatches
        return asked or max(
            self.accumulation, len(stages.placement(self.degrees["pp"], self.parallelism))
        )

    @property
    def sequences_per_step(self) -> int:
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
        return (
            -(-self.training.tokens // self.tokens_per_step)
            if self.training.tokens
            else self.training.steps
        )

    def with_base(self) -> "Run":
        """The same run with the base of rotary positions that its settings name, where they name
        one."""
        later = any(word.count(":") > 1 for word in self.training.seq_len_schedule)
        if not isinstance(self.model_config, ModelConfig) or not (self.model.rope_theta or later):
            return self
        return replace(self, model_config=self.model_config_with_base(self.model.rope_theta))

    def model_config_with_base(self, theta: float) -> ModelConfig | TransformersConfig:
        """The model's config with this base, 0: its own."""
        return lengths.with_base(self.model_config, theta, self.training.seq_len)

    def model_config_after(self, step: int) -> ModelConfig | TransformersConfig:
        """The config of the model that this run has after so many steps: with the base that it was
        last trained with."""
        theta = lengths.stage_of_model(self.training, step).rope_theta
        return self.model_config_with_base(theta) if theta else self.model_config

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
        return tokens / self.tokens_per_step if tokens else self.lr_scheduler.warmup_steps

    @property
    def warmup_steps(self) -> float:
        """The same, cut to what fits into the run where its steps are known."""
        asked = self.asked_warmup_steps
        return (
            asked if self.is_planned else fitting_warmup(self.steps, asked, self.lr_scheduler.name)
        )

    def with_plan(self, plan: Plan) -> "Run":
        """The same run with the plan of its steps as it is now."""
        return replace(self, training=replace(self.training, step_plan=written(plan)))

    def model_config_in(self, path: Path) -> ModelConfig | TransformersConfig:
        """The shape in a config.json, ours or, with model.backend, one that transformers reads.
        Raises SettingsError."""
        if self.model.backend == "longfire":
            return read_model_config(path)
        from longfire.huggingface import transformers_model

        config = read_config(path)
        if "model_type" not in config:
            raise SettingsError(
                f"{path}: model_type is missing; model.backend = 'transformers' takes a config.json of theirs"
            )
        return transformers_model.read_model_config(config, str(path))

    def with_paths_found(self, beside: Path, note: Callable[[str], None]) -> "Run":
        """The same run with every file that it reads made absolute: beside the recipe if it is
        there, else in the working folder."""
        dataset, validation = (
            tuple(found(entry, beside) for entry in entries)
            for entries in (self.data.dataset, self.data.validation)
        )
        return replace(
            self,
            model=replace(
                self.model,
                config=found_config(self.model.config, beside, note),
                weights=found(self.model.weights, beside),
                plugins=tuple(found(file, beside) for file in self.model.plugins),
            ),
            data=replace(self.data, dataset=dataset, validation=validation),
            tokenizer=replace(self.tokenizer, path=found(self.tokenizer.path, beside)),
            distillation=replace(
                self.distillation, teacher=found(self.distillation.teacher, beside)
            ),
        )

    def settings(self) -> dict[str, dict[str, Any]]:
        """Every setting by section, as TOML has it."""
        return {section: asdict(getattr(self, section)) for section in settings.SECTIONS}

    def save(self) -> None:
        """Write config.json and run.toml, each at once, so that `longfire train <folder>/run.toml`
        starts the same run again.

        Raises SettingsError when the folder holds the checkpoints of a run with another model or
        another schedule of lengths, CheckpointError when it cannot be written.
        """
        assert self.model_config is not None, "a run without a model has no folder"
        self.refuse_another_model()
        self.refuse_another_schedule()
        self.write(self.folder)

    def write(self, folder: Path) -> None:
        """config.json and run.toml into this folder. Raises CheckpointError."""
        keep(folder / "config.json", json.dumps(self.model_config.to_dict(), indent=1) + "\n")
        keep(folder / RUN_TOML, SAVED + tomli_w.dumps(self.to_keep()))

    @contextmanager
    def begun(self, note: Callable[[str], None] = print) -> Iterator[None]:
        """Hold the run folder while this process trains into it, with the settings saved and what
        they change text.

        Two processes would mix their records and remove each other's half-written checkpoints.
        Raises SettingsError if another one holds it or a tracker that is asked for is not
        installed, and as `save` does.
        """
        check_trackers(self.metrics)
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(self.folder / LOCK, self.refuse_another_process))
            except OSError as e:  # not ours to write, or a file system without locks
                raise unwritable(self.folder / LOCK, e) from e
            changes = self.changes()
            self.save()
            for change in changes:
                note(change)
            yield

    def refuse_another_process(self, holder: str) -> None:
        raise SettingsError(
            f"job.dump_folder = {str(self.folder)!r} is being trained into by {holder}: wait for that run, stop it, or name "
            "another folder"
        ) from None

    def to_keep(self) -> dict[str, dict[str, Any]]:
        """Every setting as run.toml has it: the same from whatever folder it is read."""
        kept = self.settings()
        kept["model"]["config"] = "config.json"
        if (
            Path(self.tokenizer.path).absolute() == self.tokenizer_folder.absolute()
        ):  # of an imported run
            kept["tokenizer"]["path"] = self.tokenizer_folder.name
        kept["job"]["dump_folder"] = str(self.folder.absolute())
        kept["data"]["folder"] = str(Path(self.data.folder).absolute())
        kept["model"]["weights"] = inside(self.folder, self.model.weights)
        for key in ONCE:
            section, _, name = key.partition(".")
            kept[section][name] = recipes.SETTINGS[key].default
        return kept

    @property
    def has_checkpoints(self) -> bool:
        return any((self.folder / self.checkpoint.folder).glob("step-*"))

    @property
    def goes_on(self) -> bool:
        """Whether the run begins with a checkpoint of its own folder."""
        return self.checkpoint.enable_checkpoint and self.has_checkpoints

    def previous_settings(self) -> dict[str, dict[str, Any]]:
        """The settings of the run in this folder, by section; none where no run has been started
        yet."""
        started = (
            self.folder / DATA_JSON
        ).exists()  # an imported run has a checkpoint before it has been started
        if not started or not self.has_checkpoints or not (self.folder / RUN_TOML).exists():
            return {}
        return tomllib.loads((self.folder / RUN_TOML).read_text(encoding="utf-8"))

    def changes(self) -> list[str]:
        """What differs from the settings that the run was saved with; a run that goes on says so,
        since a slip is easily made."""
        there = self.previous_settings()
        no_choice = {"dump_folder"} | (
            {STEP_PLAN.partition(".")[2]} if self.training.max_seconds else set()
        )
        here = tomllib.loads(tomli_w.dumps(self.to_keep()))  # as TOML has it: lists, not tuples
        return [
            f"changed since this run was last started: {section}.{key} = {value!r}, was {there[section][key]!r}"
            for section, keys in here.items()
            for key, value in keys.items()
            if key in there.get(section, {})
            and value != there[section][key]
            and key not in no_choice
        ]

    def refuse_another_model(self) -> None:
        config = self.folder / "config.json"
        if not config.exists() or not self.has_checkpoints:
            return
        there, here = self.model_config_in(config).to_dict(), self.model_config.to_dict()
        differs = [
            f"{key} is {there.get(key)} there and {here.get(key)} here"
            for key in {**there, **here}
            if there.get(key) != here.get(key) and key not in INIT_KEYS
        ]
        if differs:
            raise SettingsError(
                f"job.dump_folder = {str(self.folder)!r} holds checkpoints of another model: {'; '.join(differs)}. "
                "Name another folder, or the model's own config (and model.rope_theta as the run was begun with)"
            )

    def refuse_another_schedule(self) -> None:
        """What earlier steps were trained with is read from its settings, and the order of a
        stage's rows from where it ends."""
        begun = self.previous_settings()
        there, here = (
            begun.get("training", {}).get("seq_len_schedule", []),
            list(self.training.seq_len_schedule),
        )
        if begun and here != there:
            raise SettingsError(
                f"training.seq_len_schedule = {here}, but the run in {self.folder} was begun with {there}: go on with that, or begin "
                f"another run from its weights (model.weights = {str(self.folder)!r}, another job.dump_folder)"
            )


def found(name: str, beside: Path) -> str:
    """A file, folder or glob as an absolute path if it exists beside the recipe or in the working
    folder; else the name itself (a dataset of the hub, or a path whose reader will say that it is
    missing)."""
    if not name or name in WORDS:
        return name
    for folder in (beside, Path()):
        path = (folder / Path(name).expanduser()).absolute()
        if path.exists() or (glob.has_magic(name) and glob.glob(str(path), recursive=True)):
            return str(path)
    return name


def inside(folder: Path, path: str) -> str:
    """A path as run.toml has it: relative where it lies inside the run folder, so that both can be
    moved together."""
    place = Path(path).absolute()
    return (
        place.relative_to(folder.absolute()).as_posix()
        if path and folder.absolute() in place.parents
        else path
    )


def found_config(name: str, beside: Path, note: Callable[[str], None]) -> str:
    """The model config of this name: a file or folder as `found` finds it, else one that comes with
    longfire, which is noted."""
    path, known = found(name, beside), shipped.model_config(name) if name else None
    if path != name or Path(name).exists() or known is None:
        return path
    note(f"model.config = {name}: {known}, which comes with longfire")
    return str(known)


def keep(path: Path, text: str) -> None:
    """Write a file of the run folder, whole. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as e:
        raise unwritable(path, e) from e


def unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; free some space or name another job.dump_folder"
    )


def read_model_config(path: Path) -> ModelConfig:
    """The shape in a config.json, ours or a Hugging Face family's, with every mixer's own settings
    checked.

    Raises SettingsError naming the file.
    """
    return model_config_of(read_config(path), str(path / "config.json" if path.is_dir() else path))


def read_tables(tables: dict[str, Any], place: str, config: Path | None) -> ModelConfig:
    """The shape that the [model] tables of a recipe describe: alone, or over those of a
    config.json. Raises SettingsError."""
    if config is None:
        return model_config_of(tables, place, toml=True)
    return model_config_of(
        laid_over(read_model_config(config).to_dict(), tables), f"{config} with {place}", toml=True
    )


def laid_over(config: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config.json with others over them; the tables of mixers are joined key by key.

    Another depth repeats the config's own pattern of layers; another width has its own default
    width of the MLP.
    """
    types = config["layer_types"]
    period = next(
        n
        for n in range(1, len(types) + 1)
        if len(types) % n == 0 and types == types[:n] * (len(types) // n)
    )
    out = {**config, "layer_types": types[:period]}
    if "hidden_size" in tables or "mlp" in tables:
        out.pop("intermediate_size")
    for name, value in tables.items():
        out[name] = {**out.get(name, {}), **value} if isinstance(value, dict) else value
    unused = [
        name
        for name in config
        if isinstance(config[name], dict) and name not in (*out["layer_types"], *tables)
    ]
    return {name: value for name, value in out.items() if name not in unused}


def model_config_of(config: dict[str, Any], where: str, toml: bool = False) -> ModelConfig:
    """The shape that these keys describe, ours or a Hugging Face family's. Raises SettingsError
    naming the place.

    (The mixers need torch, which is slow to import and not needed to read settings.)
    """
    from longfire.mixers import MIXERS
    from longfire.mixers.mixer import read_mixer_config

    if config.get("model_type", "longfire") == "longfire" and not is_own_export(config):
        model_config = ModelConfig.from_dict(config, where, tuple(MIXERS), toml)
    else:
        with placed(where):
            model_config = config_from_hf(config, where)
    for name in dict.fromkeys(model_config.layer_types):
        if mixer_of(name) not in MIXERS:
            raise SettingsError(
                f"{where}: layer_types names {name!r}, which is no mixer of ours ({', '.join(MIXERS)})"
                f"{nearest(mixer_of(name), MIXERS)}"
            )
        mixer, table = MIXERS[mixer_of(name)], model_config.mixers.get(name, {})
        read_mixer_config(mixer, name, table, model_config.hidden_size, where, toml)
    if unused := [name for name in model_config.mixers if name not in model_config.layer_types]:
        table = f"[model.{unused[0]}]" if toml else f"the table {unused[0]!r}"
        raise SettingsError(
            f"{where}: {table} is not used: layer_types has {', '.join(dict.fromkeys(model_config.layer_types))}; name it there, or "
            "remove the table"
        )
    return model_config


def summary(run: Run) -> list[str]:
    """What a step, the warm-up and the run are, in steps and in tokens (S0-46: watch them when any
    setting changes)."""
    rows, tokens = run.sequences_per_step, run.tokens_per_step
    config = run.model_config
    mixers = ", ".join(
        f"{config.layer_types.count(name)} {name}" for name in dict.fromkeys(config.layer_types)
    )
    decay = (
        f", decay in the last {run.lr_scheduler.decay_ratio:.0%}"
        if run.lr_scheduler.name == "wsd"
        else ""
    )
    return [
        f"shape: {counted(config.num_hidden_layers, 'layer')} ({mixers}), hidden size {config.hidden_size}, {run.model_config_source}",
        f"step: {counted(tokens, 'token')} = {counted(rows, 'row')} of {run.training.seq_len:,}: "
        f"{run.microbatches} microbatch(es) of "
        f"{run.training.batch_size * run.accumulation // run.microbatches} on {describe_plan(run)}",
        length_line(run),
        *lengths.describe(run.training, rows, run.steps),
        f"learning rate: {run.optimizer.lr:g}, {run.lr_scheduler.name}{decay}, {warmup_line(run)}"
        f"{describe_lr_scales(run.optimizer)}",
        *([f"export: {export_line(config)}"] if run.checkpoint.export else []),
    ]


def export_line(config: ModelConfig | TransformersConfig) -> str:
    """Which class an export is loaded with."""
    if isinstance(config, TransformersConfig):
        return f"as it is, with the class of transformers that it has ({config.model_type})"
    return f"as {class_of_export(config.with_vocabulary(config.vocab_size or FEWEST_WORDS))}"


def length_line(run: Run) -> str:
    """How long the run is, in steps and tokens, or in seconds and at most so many steps."""
    steps = f"{counted(run.steps, 'step')} = {counted(run.steps * run.tokens_per_step, 'token')}"
    if run.training.max_seconds:
        return f"run: as many steps as {run.training.max_seconds:g} s of training allow, at most {steps}"
    return f"run: {steps}" + (", as training.step_plan says" if run.training.step_plan else "")


def warmup_line(run: Run) -> str:
    """The warm-up in steps and tokens, and why it is not the one that was asked for where it is too
    long for the run."""
    warmup, asked = run.warmup_steps, run.asked_warmup_steps
    text = f"warm-up {steps_text(warmup)} = {counted(round(warmup * run.tokens_per_step), 'token')}"
    if run.is_planned:
        return f"{text}, at most a fifth of the run"
    if warmup < asked:
        return f"{text} (a fifth of the run, which is no longer than the {steps_text(asked)} asked for)"
    return text


def steps_text(steps: float) -> str:
    """Steps of a warm-up, which may be a fraction."""
    return counted(int(steps), "step") if steps == int(steps) else f"{steps:,.10g} steps"


def describe_lr_scales(optimizer: settings.Optimizer) -> str:
    """The roles whose learning rate is another multiple of optimizer.lr."""
    scales = {
        "embedding": optimizer.embedding_lr_scale,
        "head": optimizer.head_lr_scale,
        "matrices": optimizer.matrix_lr_scale,
        "other": optimizer.other_lr_scale,
    }
    different = [f"{role} x {scale:g}" for role, scale in scales.items() if scale != 1]
    return f"; {', '.join(different)}" if different else ""


def describe_plan(run: Run) -> str:
    """Processes, and along which axes they lie."""
    axes = " x ".join(f"{run.degrees[axis]} {axis}" for axis in AXES if run.degrees[axis] > 1)
    return f"{run.world.size} processes ({axes})" if axes else "1 process"
