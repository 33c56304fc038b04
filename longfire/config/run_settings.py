"""The settings of a run, resolved: an attribute for each section, and the numbers that follow."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Self

from longfire import launch
from longfire.checkpoint.provenance import TOKENIZER_FOLDER
from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.config.transformers_config import TransformersConfig
from longfire.listing import paths_in
from longfire.parallel import stages
from longfire.parallel.axes import AXES, DATA
from longfire.training import lengths
from longfire.training.schedule import Plan, fitting_warmup, read_plan, written


@dataclass(frozen=True)
class RunSettings:
    """The settings of one run, an attribute for each section.

    model_config: None only for commands that need no model. model_config_source: where it is
    written: a config.json, or [model] of the recipe. recipe: the file that the settings were read
    from. world: the processes that train together. degrees: how many along each axis of the mesh.
    """

    job: settings.Job
    model: settings.Model
    data: settings.Data
    images: settings.Images
    classification: settings.Classification
    tokenizer: settings.Tokenizer
    training: settings.Training
    optimizer: settings.Optimizer
    lr_scheduler: settings.LRScheduler
    parallelism: settings.Parallelism
    attention: settings.Attention
    float8: settings.Float8
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

    def with_rope_base(self) -> Self:
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

    @property
    def uses_average(self) -> bool:
        """Whether the average of the weights is what is evaluated and exported."""
        return self.eval.ema and self.optimizer.ema_decay > 0

    def with_plan(self, plan: Plan) -> Self:
        """The same run with the plan of its steps as it is now."""
        return replace(self, training=replace(self.training, step_plan=written(plan)))

    def settings(self) -> dict[str, dict[str, object]]:
        """Every setting by section, as TOML has it."""
        return {section: asdict(getattr(self, section)) for section in settings.SECTIONS}

    @property
    def has_checkpoints(self) -> bool:
        return bool(paths_in(self.folder / self.checkpoint.folder, "step-*"))

    @property
    def resumes(self) -> bool:
        """Whether the run starts from a checkpoint of its own folder."""
        return self.checkpoint.enable_checkpoint and self.has_checkpoints
