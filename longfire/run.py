"""A run: every setting resolved, the shape of its model, and what follows from them; checked before data or device is touched."""

import glob
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import tomli_w

from longfire import launch, settings
from longfire import recipe as recipes
from longfire.disk import held, write_whole
from longfire.errors import CheckpointError, SettingsError
from longfire.hub.families import shape_from_config
from longfire.parallel import stages
from longfire.parallel.axes import AXES, DATA
from longfire.parallel.plan import resolve_degrees
from longfire.shape import ForeignShape, ModelShape, mixer_of, read_config

RUN_TOML, LOCK, DATA_JSON = "run.toml", "lock", "data.json"
SAVED = "# Every setting of this run, resolved. `longfire train` with this file goes on with it.\n\n"
WORDS = ("embedded", "bytes", "train")  # of data.dataset and tokenizer.path: names of ours, never of files


@dataclass(frozen=True)
class Run:
    """The settings of one run, a section an attribute. `shape` is None only for commands that need no model.

    recipe: the file it was read from. world: the processes that train together; degrees: how many along each axis of the mesh.
    """

    job: settings.Job
    model: settings.Model
    data: settings.Data
    tokenizer: settings.Tokenizer
    training: settings.Training
    optimizer: settings.Optimizer
    lr_scheduler: settings.LRScheduler
    parallelism: settings.Parallelism
    activation_checkpoint: settings.ActivationCheckpoint
    checkpoint: settings.Checkpoint
    distillation: settings.Distillation
    eval: settings.Eval
    metrics: settings.Metrics
    profiling: settings.Profiling
    comm: settings.Comm
    shape: ModelShape | ForeignShape | None = None
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
        world: launch.World = launch.ALONE,
        note: Callable[[str], None] = print,
    ) -> "Run":
        """The recipe, then the overrides ({"training.steps": "20"}, as the command line spells them), checked whole.

        world: the processes that train it. Who only reads it (not `trains`) is one process, whatever its plan says.
        A run.toml that a run saved belongs to the folder it lies in, wherever that was moved. Raises SettingsError.
        """
        toml = recipes.read_toml(recipe) if recipe else {}
        if recipe and recipe.name == RUN_TOML and recipe.read_text(encoding="utf-8").startswith(SAVED):
            toml["job.dump_folder"] = recipes.Given(str(recipe.parent), str(recipe))
        given = recipes.sections(toml, recipes.read_words(overrides), note=note)
        run = cls(**given, recipe=recipe, world=world)
        if trains:
            run = replace(run, degrees=resolve_degrees(run.parallelism, world.size))
        run = run.with_paths_found(recipe.parent if recipe else Path())
        if run.model.plugins and needs_model:
            from longfire.plugins import load_plugins  # brings the mixers, which need torch

            load_plugins(run.model.plugins)
        if run.model.config:
            run = replace(run, shape=run.shape_in(Path(run.model.config)))
        elif needs_model:
            raise SettingsError(
                "model.config is empty: name a config.json, or a folder that holds one, in the recipe's [model] or "
                "as --model.config"
            )
        check(run, trains)
        return run

    @classmethod
    def of_folder(cls, folder: Path, overrides: Mapping[str, str] = {}, note: Callable[[str], None] = print) -> "Run":
        """The run that lives in a folder. Raises SettingsError where there is none, or where its model needs code that was not
        named by the caller: reading a folder runs nothing that lies there or that it points to.
        """
        if not (folder / RUN_TOML).exists():
            raise SettingsError(f"{folder} is no run folder: it has no {RUN_TOML}; name the job.dump_folder of a run")
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
        return self.folder / "tokenizer"

    @property
    def words(self) -> int:
        """How many words the model will have, without touching data."""
        if self.shape.vocab_size:
            return self.shape.vocab_size
        if self.tokenizer.path == "train":
            return self.tokenizer.train_vocab_size
        from longfire.data import tokenizer  # brings the tokenizers

        return tokenizer.load(self.tokenizer, (), (), self.data).vocab_size

    @property
    def data_processes(self) -> int:
        """Processes, or groups of them, with rows of their own."""
        return prod(self.degrees[axis] for axis in DATA)

    @property
    def accumulation(self) -> int:
        """Microbatches of a step."""
        rows_at_once = self.training.batch_size * self.data_processes
        return self.training.gradient_accumulation_steps or max(1, self.training.global_batch_size // rows_at_once)

    @property
    def microbatches(self) -> int:
        """Parts that a process's rows of a step go in: those of accumulation, with a pipeline as many as keep its stages busy."""
        if self.degrees["pp"] == 1:
            return self.accumulation
        asked = self.parallelism.pipeline_parallel_microbatches
        return asked or max(self.accumulation, len(stages.placement(self.degrees["pp"], self.parallelism)))

    @property
    def rows_per_step(self) -> int:
        return self.training.batch_size * self.accumulation * self.data_processes

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.training.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; training.tokens counts in whole steps, the last one begun is done."""
        return -(-self.training.tokens // self.tokens_per_step) if self.training.tokens else self.training.steps

    @property
    def warmup_steps(self) -> float:
        """The warm-up in steps; a fraction where it is given in tokens."""
        tokens = self.lr_scheduler.warmup_tokens
        return tokens / self.tokens_per_step if tokens else self.lr_scheduler.warmup_steps

    def shape_in(self, path: Path) -> ModelShape | ForeignShape:
        """The shape in a config.json, ours or, with model.backend, one that transformers reads. Raises SettingsError."""
        if self.model.backend == "longfire":
            return read_shape(path)
        from longfire.hub import foreign  # brings transformers

        config = read_config(path)
        if "model_type" not in config:
            raise SettingsError(
                f"{path}: model_type is missing; model.backend = 'transformers' takes a config.json of theirs"
            )
        return foreign.read_shape(config, str(path))

    def with_paths_found(self, beside: Path) -> "Run":
        """The same run with every file that it reads made absolute: beside the recipe if it is there, else in the working folder."""
        dataset = tuple(found(entry, beside) for entry in self.data.dataset)
        return replace(
            self,
            model=replace(
                self.model,
                config=found(self.model.config, beside),
                weights=found(self.model.weights, beside),
                plugins=tuple(found(file, beside) for file in self.model.plugins),
            ),
            data=replace(self.data, dataset=dataset),
            tokenizer=replace(self.tokenizer, path=found(self.tokenizer.path, beside)),
            distillation=replace(self.distillation, teacher=found(self.distillation.teacher, beside)),
        )

    def settings(self) -> dict[str, dict[str, Any]]:
        """Every setting by section, as TOML has it."""
        return {section: asdict(getattr(self, section)) for section in settings.SECTIONS}

    def save(self) -> None:
        """Write config.json and run.toml, each at once, so that `longfire train <folder>/run.toml` starts the same run again.

        Raises SettingsError when the folder holds the checkpoints of a run with another model, CheckpointError when it cannot be
        written.
        """
        assert self.shape is not None, "a run without a model has no folder"
        self.refuse_another_model()
        self.write(self.folder)

    def write(self, folder: Path) -> None:
        """config.json and run.toml into this folder. Raises CheckpointError."""
        keep(folder / "config.json", json.dumps(self.shape.to_dict(), indent=1) + "\n")
        keep(folder / RUN_TOML, SAVED + tomli_w.dumps(self.to_keep()))

    @contextmanager
    def begun(self, note: Callable[[str], None] = print) -> Iterator[None]:
        """Hold the run folder while this process trains into it, with the settings saved and what they change told.

        Two processes would mix their records and remove each other's half-written checkpoints. Raises SettingsError if another
        one holds it, and as `save` does.
        """
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
        if Path(self.tokenizer.path).absolute() == self.tokenizer_folder.absolute():  # of an imported run
            kept["tokenizer"]["path"] = self.tokenizer_folder.name
        kept["job"]["dump_folder"] = str(self.folder.absolute())
        kept["data"]["folder"] = str(Path(self.data.folder).absolute())
        return kept

    @property
    def has_checkpoints(self) -> bool:
        return any((self.folder / self.checkpoint.folder).glob("step-*"))

    def changes(self) -> list[str]:
        """What differs from the settings that the run was saved with; a run that goes on says so, since a slip is easily made."""
        started = (self.folder / DATA_JSON).exists()  # an imported run has a checkpoint before it has been started
        if not started or not self.has_checkpoints or not (self.folder / RUN_TOML).exists():
            return []
        there = tomllib.loads((self.folder / RUN_TOML).read_text(encoding="utf-8"))
        here = tomllib.loads(tomli_w.dumps(self.to_keep()))  # as TOML has it: lists, not tuples
        return [f"changed since this run was last started: {section}.{key} = {value!r}, was {there[section][key]!r}"
                for section, keys in here.items() for key, value in keys.items()
                if key in there.get(section, {}) and value != there[section][key] and key != "dump_folder"]  # fmt: skip

    def refuse_another_model(self) -> None:
        config = self.folder / "config.json"
        if not config.exists() or not self.has_checkpoints:
            return
        there, here = self.shape_in(config).to_dict(), self.shape.to_dict()
        differs = [f"{key} is {there.get(key)} there and {here.get(key)} here" for key in {**there, **here}
                   if there.get(key) != here.get(key)]  # fmt: skip
        if differs:
            raise SettingsError(
                f"job.dump_folder = {str(self.folder)!r} holds checkpoints of another model: {'; '.join(differs)}. "
                "Name another folder, or the model's own config"
            )


def found(name: str, beside: Path) -> str:
    """A file, folder or glob as an absolute path if it exists beside the recipe or in the working folder; else the name itself
    (a dataset of the hub, or a path whose reader will say that it is missing)."""
    if not name or name in WORDS:
        return name
    for folder in (beside, Path()):
        path = (folder / Path(name).expanduser()).absolute()
        if path.exists() or (glob.has_magic(name) and glob.glob(str(path), recursive=True)):
            return str(path)
    return name


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


def read_shape(path: Path) -> ModelShape:
    """The shape in a config.json, ours or a Hugging Face family's, with every mixer's own settings checked.

    Raises SettingsError naming the file. (The mixers need torch, which is slow to import and not needed to read settings.)
    """
    from longfire.mixers import MIXERS
    from longfire.mixers.mixer import read_mixer_shape

    config = read_config(path)
    where = str(path / "config.json" if path.is_dir() else path)
    if config.get("model_type", "longfire") == "longfire":
        shape = ModelShape.from_dict(config, where, tuple(MIXERS))
    else:
        shape = shape_from_config(config, where)
    for name in dict.fromkeys(shape.layer_types):
        if mixer_of(name) not in MIXERS:
            near = get_close_matches(mixer_of(name), MIXERS, 1)
            raise SettingsError(
                f"{where}: layer_types names {name!r}, which is no mixer of ours ({', '.join(MIXERS)})"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        read_mixer_shape(MIXERS[mixer_of(name)], name, shape.mixers.get(name, {}), shape.hidden_size)
    return shape


def check(run: Run, trains: bool = True) -> None:
    """Raises SettingsError with everything that cannot be, each with its mend: what needs no data and no device to be seen. Who only
    reads a run does not ask whether its plan and batch suit the processes that are here now."""
    problems = [
        *(of_plan(run) if trains else ()),
        *(of_batch(run) if trains else ()),
        *of_length(run),
        *of_model(run),
        *of_backend(run),
        *of_data(run),
        *of_files(run),
    ]
    if problems:
        raise SettingsError("\n".join(problems))


def of_plan(run: Run) -> Iterator[str]:
    """The plan is one that is proven, and what is asked of many processes makes sense for them."""
    many, parallelism = run.world.size > 1, run.parallelism
    if run.degrees["pp"] > 1 and run.shape:
        yield from stages.refusals(
            run.shape, run.degrees["pp"], parallelism, run.microbatches, bool(run.distillation.teacher)
        )
        if (rows := run.training.batch_size * run.accumulation) % run.microbatches:
            yield (
                f"parallelism.pipeline_parallel_microbatches: {rows} rows of a process do not divide into {run.microbatches}: take a "
                "divisor, or another training.batch_size"
            )
    if run.degrees["tp"] > 1 and run.shape:
        yield from of_shared_matrices(run)
    for key in ("cpu_offload", "param_gather_dtype"):
        value = getattr(parallelism, key)
        if value != getattr(settings.Parallelism, key) and run.data_processes == 1:
            yield f"parallelism.{key} = {value!r} is about sharded parameters, but nothing is sharded here: leave it out"
    if not many:
        return
    if run.distillation.teacher:
        yield f"distillation.teacher = {run.distillation.teacher!r} is not supported with {run.world.size} processes yet: start one"
    if run.model.backend == "transformers" and run.data_processes != run.world.size:
        yield "model.backend = 'transformers' knows nothing of the model's inside: only data_parallel degrees may be above 1"
    if run.model.backend == "transformers":
        from longfire.hub.foreign import dropouts  # transformers is imported already: it read the shape

        for key, share in dropouts(run.shape).items():
            yield f"{key} = {share} of {run.model.config}: their dropout differs with the processes; set it to 0, or start one"
    for key, wanted in {
        "checkpoint.export": run.checkpoint.export,
        "eval.sample_prompt": run.eval.sample_prompt,
    }.items():
        if wanted and not run.checkpoint.enable_checkpoint:
            yield f"{key} reads the last checkpoint when several processes train, but enable_checkpoint = false: set it to true"
    if run.checkpoint.create_seed_checkpoint:
        yield "checkpoint.create_seed_checkpoint is made by one process (any number goes on from it): start one"


def of_shared_matrices(run: Run) -> Iterator[str]:
    """What of the model so many processes cannot share: its parts say it."""
    from longfire.model import on_meta  # the parts need torch
    from longfire.parallel import tensor

    if isinstance(run.shape, ForeignShape):
        return  # refused as such
    model = on_meta(run.shape.with_vocabulary(run.shape.vocab_size or 256))  # bytes, the fewest
    sequence, length = run.parallelism.sequence_parallel, run.training.seq_len
    yield from tensor.refusals(model, run.degrees["tp"], sequence, length, bool(run.distillation.teacher))


def of_batch(run: Run) -> Iterator[str]:
    """A global batch is what was asked for to the row, or an error; never rounded."""
    training, processes = run.training, run.data_processes
    rows, wanted = training.batch_size, training.global_batch_size
    at_once = rows * processes
    if not wanted:
        return
    if wanted % at_once:
        below, above = wanted // at_once * at_once, (wanted // at_once + 1) * at_once
        multiples = f"{below} or {above}" if below else f"{above}"
        share = wanted // processes if wanted % processes == 0 else 0
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        near = sorted({*[d for d in divisors if d < rows][-1:], *[d for d in divisors if d > rows][:1]})
        yield (
            f"training.global_batch_size = {wanted} is no multiple of batch_size x processes = {rows} x {processes} = {at_once}, "
            f"and it is never rounded: take {multiples}"
            + (f", or a training.batch_size of {' or '.join(map(str, near))}" if near else "")
        )
    elif training.gradient_accumulation_steps and run.rows_per_step != wanted:
        yield (
            f"training.gradient_accumulation_steps = {training.gradient_accumulation_steps} x batch_size {rows} x processes "
            f"{processes} = {run.rows_per_step} rows, but training.global_batch_size = {wanted}: leave one of them out, or set "
            f"gradient_accumulation_steps to {wanted // at_once}"
        )


def of_length(run: Run) -> Iterator[str]:
    """Warm-up and decay fit into the run; rows fit the model and its documents."""
    scheduler, seq_len, key = run.lr_scheduler, run.training.seq_len, "lr_scheduler.warmup_steps"
    given, longest = scheduler.warmup_steps, run.steps
    if scheduler.warmup_tokens:
        key, given, longest = "lr_scheduler.warmup_tokens", scheduler.warmup_tokens, run.steps * run.tokens_per_step
    if given > longest:
        yield f"{key} = {given} is longer than the run, {longest} ({run.steps} steps): set it to at most {longest}"
    elif scheduler.name == "wsd" and run.warmup_steps + scheduler.decay_ratio * run.steps > run.steps:
        yield (
            f"lr_scheduler.decay_ratio = {scheduler.decay_ratio} takes {scheduler.decay_ratio * run.steps:g} of {run.steps} steps, "
            f"and {key} = {given} more than the rest: shorten one of them"
        )
    limit = run.shape.max_position_embeddings if run.shape else 0
    positional = run.shape and (run.shape.learned_positions or "attention" in map(mixer_of, run.shape.layer_types))
    if limit and seq_len > limit and positional:
        yield (
            f"training.seq_len = {seq_len} is longer than max_position_embeddings = {limit} of {run.model.config}: shorten it, or "
            "raise that number (rotary positions extrapolate, learned ones cannot)"
        )
    if run.data.context_len and not run.data.varlen:
        yield f"data.context_len = {run.data.context_len} splits documents, which only data.varlen = true keeps apart: set that too"
    if run.data.context_len > seq_len:
        yield f"data.context_len = {run.data.context_len} is longer than a row, training.seq_len = {seq_len}: set it to 0 for no limit"


def of_model(run: Run) -> Iterator[str]:
    """What is asked of the model's parts needs the parts."""
    if run.shape and run.shape.mlp == "none" and run.activation_checkpoint.mode == "mlp":
        yield "activation_checkpoint.mode = 'mlp', but this model's blocks have no MLP: take attention, block or none"


def of_backend(run: Run) -> Iterator[str]:
    """A model of transformers is one piece: what asks for parts of it, or for parts of ours, is refused."""
    if run.model.backend == "longfire":
        return
    told = "model.backend = 'transformers' knows nothing of the model's inside"
    if run.activation_checkpoint.mode != "none":
        yield f"activation_checkpoint.mode = {run.activation_checkpoint.mode!r} computes parts again, but {told}: set it to none"
    if run.model.kernels != "auto":
        yield f"model.kernels = {run.model.kernels!r} chooses among kernels of ours, but {told}: leave it at auto"
    if run.distillation.teacher:
        yield f"distillation.teacher = {run.distillation.teacher!r} compares mixers and hidden states, but {told}: leave it out"


def of_data(run: Run) -> Iterator[str]:
    """Parallel lists are as long as data.dataset; what is evaluated is held out; the order exists."""
    data, count = run.data, len(run.data.dataset)
    if not count or not all(data.dataset):
        yield f"data.dataset = {list(data.dataset)} names no source, or an empty one: name files, folders or hub datasets"
    for name in ("dataset_name", "dataset_split", "data_dir", "data_files", "text_field"):
        values = getattr(data, name)
        if len(values) not in (0, 1, count):
            yield (
                f"data.{name} has {len(values)} entries for {count} sources: give one, or one for each (`a,,b` leaves the second "
                "empty)"
            )
    if data.data_probs and len(data.data_probs) != count:
        yield f"data.data_probs has {len(data.data_probs)} entries for {count} sources: give one for each, or none for equal shares"
    if any(share <= 0 for share in data.data_probs):
        yield f"data.data_probs = {list(data.data_probs)}: each share must be positive; leave a source out that should have none"
    if data.streaming and data.shuffle == "global":
        yield 'data.shuffle = "global" permutes the whole store, whose length data.streaming does not know: use "window" or "auto"'
    if not data.heldout_fraction and (run.eval.at_end or run.eval.interval):
        yield (
            "data.heldout_fraction = 0 leaves nothing to evaluate: hold some documents out, or set eval.at_end = false and "
            "eval.interval = 0"
        )
    if run.eval.compare_xz and not run.eval.at_end:
        yield "eval.compare_xz compares with the last evaluation: set eval.at_end = true"
    words = run.shape.vocab_size if run.shape else 0
    if run.tokenizer.path == "train" and words and words < run.tokenizer.train_vocab_size:
        yield (
            f"tokenizer.train_vocab_size = {run.tokenizer.train_vocab_size} is more than vocab_size = {words} of "
            f"{run.model.config}: lower it, or set vocab_size to 0 there (as many as the tokenizer has)"
        )


def of_files(run: Run) -> Iterator[str]:
    """What a new run starts from is there; combinations of the checkpoint's settings; folders inside the run folder stay inside."""
    checkpoint, weights = run.checkpoint, run.model.weights
    if weights and not Path(weights).is_dir() and not run.has_checkpoints:
        yield f"model.weights = {weights!r} is no folder: name one that holds Hugging Face weights (safetensors and config.json)"
    teacher = run.distillation.teacher
    if teacher and not Path(teacher).is_dir():
        yield f"distillation.teacher = {teacher!r} is no folder: name a run folder or one of Hugging Face weights"
    if not checkpoint.enable_checkpoint:
        for name in ("create_seed_checkpoint", "model_weights_only"):
            if getattr(checkpoint, name):
                yield f"checkpoint.{name} = true saves a checkpoint, but checkpoint.enable_checkpoint = false: set one of them right"
        if checkpoint.load_step >= 0:
            yield f"checkpoint.load_step = {checkpoint.load_step} loads a checkpoint, but enable_checkpoint = false: set one right"
    if checkpoint.create_seed_checkpoint and checkpoint.model_weights_only:
        yield "checkpoint.create_seed_checkpoint makes a start to resume from, which model_weights_only cannot be: choose one"
    if checkpoint.create_seed_checkpoint and checkpoint.load_step > 0:
        yield f"checkpoint.create_seed_checkpoint saves step 0, load_step = {checkpoint.load_step} asks for another: choose one"
    inside = (
        "checkpoint.folder",
        "metrics.save_tb_folder",
        "profiling.save_traces_folder",
        "profiling.save_memory_snapshot_folder",
    )
    for key in inside:
        section, name = key.split(".")
        folder = Path(getattr(getattr(run, section), name))
        if folder.is_absolute() or ".." in folder.parts or not folder.parts:
            yield f"{key} = {str(folder)!r} must be a folder inside the run folder: a relative path without .."


def summary(run: Run) -> list[str]:
    """What a step, the warm-up and the run are, in steps and in tokens (S0-46: watch them when any setting changes)."""
    rows, tokens = run.rows_per_step, run.tokens_per_step
    warmup = run.warmup_steps
    shape = run.shape
    mixers = ", ".join(f"{shape.layer_types.count(name)} {name}" for name in dict.fromkeys(shape.layer_types))
    decay = f", decay in the last {run.lr_scheduler.decay_ratio:.0%}" if run.lr_scheduler.name == "wsd" else ""
    return [
        f"shape: {shape.num_hidden_layers} layers ({mixers}), hidden size {shape.hidden_size}, {run.model.config}",
        f"step: {tokens:,} tokens = {rows:,} rows of {run.training.seq_len:,}: {run.microbatches} microbatch(es) of "
        f"{run.training.batch_size * run.accumulation // run.microbatches} on {plan_told(run)}",
        f"run: {run.steps:,} steps = {run.steps * tokens:,} tokens",
        f"learning rate: {run.optimizer.lr:g}, {run.lr_scheduler.name}{decay}, warm-up {warmup:,.10g} steps = "
        f"{round(warmup * tokens):,} tokens",
    ]


def plan_told(run: Run) -> str:
    """Processes, and along which axes they lie."""
    axes = " x ".join(f"{run.degrees[axis]} {axis}" for axis in AXES if run.degrees[axis] > 1)
    return f"{run.world.size} processes ({axes})" if axes else "1 process"
