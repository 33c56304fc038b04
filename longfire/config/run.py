"""A run: every setting resolved, the config of its model, and what follows from them."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longfire import launch
from longfire.checkpoint.provenance import (
    RUN_TOML,
    VIT,
    WITH_OWN_ENDS,
    Beside,
    recorded_tokenizer,
    tokenizer_beside,
    tokenizer_of_run,
)
from longfire.config import recipe as recipes
from longfire.config import settings, shipped
from longfire.config.checks import check
from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig
from longfire.config.paths import find_config, find_path, find_paths, may_be_on_hub
from longfire.config.read_model import model_config_at, read_tables
from longfire.config.rules import without_effect
from longfire.config.run_settings import RunSettings
from longfire.config.transformers_config import TransformersConfig
from longfire.errors import SettingsError
from longfire.huggingface.families import ignored_line
from longfire.huggingface.hub_models import CONFIG_FILE, config_folder, model_folder
from longfire.listing import exists, is_file
from longfire.parallel.plan import resolve_degrees
from longfire.regular_files import read_regular

logger = logging.getLogger(__name__)

DATA_JSON = "data.json"
SAVED = "# Every setting of this run, resolved. `longfire train` with this file resumes it.\n\n"
# Settings of one start, which run.toml does not keep
ONCE = ("checkpoint.load_step", "checkpoint.load_step_again")
MANY_ENTRIES = 1024  # of a vocabulary that is not one of bytes
MADE_HERE = ("bytes", "train")  # values of tokenizer.path that name no files
# Settings that a tokenizer beside weights brings with it
TOKENIZER_RULES = ("path", "add_bos", "add_eos")

Givens = Mapping[str, recipes.Given]


@dataclass(frozen=True)
class Run(RunSettings):
    """The settings of one run, composed from a recipe and the command line, or read from a run
    folder."""

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
    ) -> "Run":
        """The settings of a recipe with the overrides ({"training.steps": "20"}, as on the command
        line) in their place, checked.

        world: the processes that train it. trains: False for one process that only reads the run,
        whatever its plan of processes is. planned: model.weights need not be there yet. A run.toml
        that a run has saved belongs to the folder that it is in, also after that was moved. Raises
        SettingsError.
        """
        as_written = recipes.read_toml(recipe) if recipe else {}
        is_saved = recipe is not None and is_saved_by_a_run(recipe)
        if recipe and is_saved:
            as_written["job.dump_folder"] = recipes.Given(str(recipe.parent), str(recipe))
            for key in ONCE:  # earlier versions saved them
                as_written.pop(key, None)
        words = recipes.read_words(overrides)
        toml, command_line = recipes.both_in_own_names(as_written, words)
        sections = recipes.sections_of_own_names(toml, command_line)
        run = cls(**sections, recipe=recipe, world=world)
        if trains:
            run = replace(run, degrees=resolve_degrees(run.parallelism, world.size))
        named_batch_size = any("training.batch_size" in given for given in (toml, command_line))
        if trains and not named_batch_size:
            run = run.with_micro_batch_of_global_batch()
        run = run.with_paths_found(recipe.parent if recipe else Path()).with_config_of_hub()
        if not any("data.folder" in given for given in (toml, command_line)):
            run = run.with_folder_of_stores()
        if trains and not planned:
            run = run.with_weights_of_hub()
        # a saved run.toml records its tokenizer, which is not to name it
        is_resumed = recipe is not None and run.resumes and run.folder == recipe.parent
        givens = [command_line] if is_saved and is_resumed else [toml, command_line]
        run = run.with_tokenizer(named_tokenizer_rules(givens))
        if run.model.plugins and needs_model:
            from longfire.plugins import load_plugins  # brings the mixers, which need torch

            load_plugins(run.model.plugins)
        run = run.with_model_config(toml, command_line)
        run = run.with_length_of_images()
        for line in run.ignored_keys():
            logger.info(line)
        if run.model_config is None and needs_model:
            raise SettingsError(
                f"{recipe or 'command line'}: model.config is empty, and [model] has no keys of a "
                "model: `longfire init` writes a recipe that has them; or name a config: "
                "--model.config gla-340m, a config.json, or a folder with one"
            )
        check(run, trains, planned)
        if trains and not planned:
            run = run.with_bos_rule(named_tokenizer_rules(givens))
        if trains and needs_model and "path" not in named_tokenizer_rules([toml, command_line]):
            run.warn_of_bytes()
        if trains:
            named = command_line if is_saved else {**toml, **command_line}
            for line in without_effect.messages(run, named):
                logger.info(line)
        return run

    def with_micro_batch_of_global_batch(self) -> "Run":
        """The same run with the largest micro-batch, up to the default size, that divides
        training.global_batch_size into whole micro-batches on each process; unchanged where none
        does, which is refused later (rules/steps.py)."""
        training = self.training
        sequences, rest = divmod(training.global_batch_size, self.data_processes)
        if rest or not sequences:
            return self
        batch_size = training.batch_size
        if training.gradient_accumulation_steps:
            batch_size = max(1, sequences // training.gradient_accumulation_steps)
        while sequences % batch_size:
            batch_size -= 1
        return replace(self, training=replace(training, batch_size=batch_size))

    def with_folder_of_stores(self) -> "Run":
        """The same run with its token stores in DATA_DIR of the environment, for one that does not
        name data.folder. Stores that are in the working folder already are used there."""
        folder = launch.data_folder()
        name = self.data.folder
        if folder is None or exists(Path(name)):
            return self
        logger.info(f"DATA_DIR = {str(folder)!r}: token stores are kept in {folder / name}")
        return replace(self, data=replace(self.data, folder=str(folder / name)))

    def with_config_of_hub(self) -> "Run":
        """The same run with the downloaded config of a model of the hub that model.config names.
        Raises SettingsError where it cannot be had."""
        name = self.model.config
        if not may_be_on_hub(name):
            return self
        hint = shipped.nearest_model(name)
        folder = config_folder(name, "model.config", hint)
        return replace(self, model=replace(self.model, config=str(folder / CONFIG_FILE)))

    def with_weights_of_hub(self) -> "Run":
        """The same run with the downloaded weights of models of the hub that model.weights and
        distillation.teacher name; a run that is resumed takes weights of its own. Raises
        SettingsError where they cannot be had."""
        run = self
        if may_be_on_hub(self.model.weights) and not self.has_checkpoints:
            weights = str(model_folder(self.model.weights, "model.weights"))
            run = replace(run, model=replace(self.model, weights=weights))
        if may_be_on_hub(self.distillation.teacher):
            teacher = str(model_folder(self.distillation.teacher, "distillation.teacher"))
            run = replace(run, distillation=replace(self.distillation, teacher=teacher))
        return run

    def with_model_config(self, toml: Givens, command_line: Givens) -> "Run":
        """The same run with the config of its model: that of model.config, with the [model] keys of
        recipe and command line in its place.

        A command line that names another model.config replaces the recipe's keys too. Raises
        SettingsError.
        """
        names_config = "model.config" in command_line
        givens = [command_line] if names_config else [toml, command_line]
        tables = recipes.model_tables(*givens)
        config_path = Path(self.model.config) if self.model.config else None
        config: ModelConfig | TransformersConfig | None = None
        if not tables:
            if config_path:
                config = model_config_at(config_path, self.model.backend)
            config = with_open_classes(config, config_path)
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
        if "num_classes" not in tables:
            config = with_open_classes(config, config_path)
        return replace(self, model_config=config, model_config_source=source).with_rope_base()

    def with_length_of_images(self) -> "Run":
        """The same run with the tokens of an image as training.seq_len, where that is not given."""
        config = self.model_config
        training = self.training
        if not isinstance(config, ModelConfig) or not config.image_size:
            return self
        if training.seq_len != settings.Training.seq_len:
            return self
        return replace(self, training=replace(training, seq_len=config.image_tokens))

    def with_tokenizer(self, named: Collection[str]) -> "Run":
        """The same run with the tokenizer that is beside its weights, where none was named: of its
        own folder when it is resumed, else of model.weights, else of its teacher; with the add_bos
        and add_eos that belong to it, unless they were named."""
        beside = None if "path" in named else self.tokenizer_beside_weights()
        if beside is None:
            return self
        taken = {key: getattr(beside, key) for key in TOKENIZER_RULES if key not in named}
        return replace(self, tokenizer=replace(self.tokenizer, **taken))

    def with_bos_rule(self, named: Collection[str]) -> "Run":
        """The same run with BOS before each document where the named tokenizer's own files ask for
        it and tokenizer.add_bos is not named. A run that is resumed keeps its rule.

        Raises DataError where the tokenizer cannot be read.
        """
        if "path" not in named or "add_bos" in named or self.tokenizer.path in MADE_HERE:
            return self
        formats = self.data.record_format
        if formats and set(formats) <= set(WITH_OWN_ENDS):
            return self
        if self.resumes and is_file(self.folder / RUN_TOML):
            add_bos = recorded_tokenizer(self.folder).add_bos
            return replace(self, tokenizer=replace(self.tokenizer, add_bos=add_bos))
        from longfire.data.tokenizer import find_tokenizer  # brings the tokenizers

        tokenizer = find_tokenizer(self.tokenizer.path)
        if not tokenizer.adds_bos:
            return self
        logger.info(
            f"tokenizer.add_bos = true: the files of {self.tokenizer.path} ask for {tokenizer.bos} "
            "before each text; tokenizer.add_bos = false leaves it out"
        )
        return replace(self, tokenizer=replace(self.tokenizer, add_bos=True))

    def warn_of_bytes(self) -> None:
        """Text is trained on as bytes where no tokenizer is named: say it where the model's config
        has many more entries, so that another tokenizer is meant. (Weights have theirs beside
        them; a plan is made where they need not be.)"""
        if self.model.weights:
            return
        vocab_size = self.model_config.vocab_size if self.model_config else 0
        has_ids = "tokens" in self.data.record_format
        if self.tokenizer.path == "bytes" and vocab_size >= MANY_ENTRIES and not has_ids:
            logger.warning(
                f"no tokenizer is named, so the model learns bytes: 258 of the {vocab_size:,} "
                "entries of its vocabulary are used; name one by tokenizer.path (`bytes`, if bytes "
                "are meant)"
            )

    def tokenizer_beside_weights(self) -> Beside | None:
        """The tokenizer of the weights that the run starts with (`with_tokenizer`)."""
        if self.resumes and is_file(self.folder / RUN_TOML):
            recorded = recorded_tokenizer(self.folder)
            path = Path(recorded.path)
            is_gone = path.is_absolute() and not exists(path)
            is_own = not path.is_absolute() and exists(self.folder / path)  # of an imported run
            if is_gone or is_own or recorded.path == "train":
                return tokenizer_of_run(self.folder)
            return recorded
        for folder in (self.model.weights, self.distillation.teacher):
            if folder:
                return tokenizer_beside(Path(folder))
        return None

    def ignored_keys(self) -> list[str]:
        """A line that names the keys of model.config that have no meaning here, if it has any."""
        config = Path(self.model.config)
        if self.model.config and self.model.backend == "longfire":
            return ignored_line(read_config(config), str(config))
        return []

    @classmethod
    def of_folder(cls, folder: Path, overrides: Mapping[str, str] = {}) -> "Run":
        """The run of a run folder. Raises SettingsError where there is none, or where its model
        needs code that the caller has not named: reading a folder executes nothing that is in it or
        that it points to.
        """
        if not exists(folder / RUN_TOML):
            raise SettingsError(
                f"{folder} is no run folder: it has no {RUN_TOML}; name the job.dump_folder of a "
                "run"
            )
        saved = recipes.read_toml(folder / RUN_TOML).get("model.plugins")
        plugins = saved.value if saved and isinstance(saved.value, list) else []
        if plugins and "model.plugins" not in overrides:
            raise SettingsError(
                f"{folder}: its model is made by code of {', '.join(plugins)}; if you trust "
                f"that file, name it: --plugins {','.join(plugins)}"
            )
        return cls.compose(folder / RUN_TOML, overrides, trains=False)

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

    def with_paths_found(self, beside: Path) -> "Run":
        """The same run with absolute paths for the files that it reads: beside the recipe if they
        are there, else in the working folder."""
        model = replace(
            self.model,
            config=find_config(self.model.config, beside),
            weights=find_path(self.model.weights, beside),
            plugins=find_paths(self.model.plugins, beside),
        )
        data = replace(
            self.data,
            dataset=find_paths(self.data.dataset, beside, launch.data_folder()),
            validation=find_paths(self.data.validation, beside, launch.data_folder()),
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


def with_open_classes(
    config: ModelConfig | TransformersConfig | None, path: Path | None
) -> ModelConfig | TransformersConfig | None:
    """The config of a model of images of transformers without the number of its classes: a run has
    those of its data, and starts with a fresh head where they are others than those of its
    weights."""
    if not isinstance(config, ModelConfig) or not config.image_size or path is None:
        return config
    if read_config(path).get("model_type") != VIT:
        return config
    return replace(config, num_classes=0)


def is_saved_by_a_run(recipe: Path) -> bool:
    """Whether a recipe is the run.toml that a run wrote into its folder."""
    return recipe.name == RUN_TOML and read_regular(recipe).startswith(SAVED.encode())


def named_tokenizer_rules(givens: Sequence[Givens]) -> list[str]:
    """Those of path, add_bos and add_eos that recipe or command line name."""
    named: list[str] = []
    for key in TOKENIZER_RULES:
        if any(f"tokenizer.{key}" in given for given in givens):
            named.append(key)
    return named
