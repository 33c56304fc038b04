"""Every setting of a run: one frozen dataclass a section; free of torch so that --help is instant.

A field is declared `setting(default, "help")`. Its type and interval are checked strictly
(config/recipe.py), its help is what `--help` prints, and its default is here and nowhere else.
Units stand in names. Old spellings live in `config/aliases/`.

declaration.py  how a setting is declared
job.py          where a run is, what it reports, what of it is traced
data.py         texts and tokens, the tokenizer
images.py       images and their augmentation, classes
model.py        the model, its attention, a teacher
training.py     batches, steps, recomputation, evaluation
float8.py       matrix products of 8-bit numbers
optimizer.py    the optimizer, its learning rate
parallelism.py  devices that share a run
checkpoint.py   checkpoints, the export
"""

from longfire.config.settings.checkpoint import Checkpoint
from longfire.config.settings.data import Data, Tokenizer
from longfire.config.settings.declaration import (
    NATURAL,
    POSITIVE,
    SHARE,
    ContextStrategyName,
    Remat,
    setting,
)
from longfire.config.settings.float8 import Float8
from longfire.config.settings.images import Classification, Images
from longfire.config.settings.job import Job, Metrics, Profiling
from longfire.config.settings.model import Attention, Distillation, Model
from longfire.config.settings.optimizer import LRScheduler, Optimizer
from longfire.config.settings.parallelism import Comm, Parallelism
from longfire.config.settings.training import ActivationCheckpoint, Eval, Training

__all__ = [
    "NATURAL",
    "POSITIVE",
    "SECTIONS",
    "SHARE",
    "ActivationCheckpoint",
    "Attention",
    "Checkpoint",
    "Classification",
    "Comm",
    "ContextStrategyName",
    "Data",
    "Distillation",
    "Eval",
    "Float8",
    "Images",
    "Job",
    "LRScheduler",
    "Metrics",
    "Model",
    "Optimizer",
    "Parallelism",
    "Profiling",
    "Remat",
    "Tokenizer",
    "Training",
    "setting",
]

SECTIONS: dict[str, type] = {
    "job": Job,
    "model": Model,
    "data": Data,
    "images": Images,
    "classification": Classification,
    "tokenizer": Tokenizer,
    "training": Training,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "parallelism": Parallelism,
    "attention": Attention,
    "float8": Float8,
    "activation_checkpoint": ActivationCheckpoint,
    "checkpoint": Checkpoint,
    "distillation": Distillation,
    "eval": Eval,
    "metrics": Metrics,
    "profiling": Profiling,
    "comm": Comm,
}
