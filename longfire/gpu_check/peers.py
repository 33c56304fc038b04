"""The peers: the same model as a class of transformers or fla, in the loop that a reader would
write around it."""

import importlib
import importlib.util
import statistics

import torch
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.device import wait
from longfire.errors import MachineError
from longfire.gpu_check.model_runs import config_of
from longfire.gpu_check.stage import Work
from longfire.huggingface.families import class_of_export, config_to_hf
from longfire.huggingface.transformers_model import with_infinities

WARMUP_STEPS = 2
LR = 1e-4


def peer_of(config: ModelConfig, device: torch.device) -> tuple[str, str]:
    """(the class that has this model, why it cannot run here: empty if it can)."""
    name = class_of_export(config)
    if " of fla" not in name:
        return name, ""
    if importlib.util.find_spec("fla") is None:
        return name, "fla is not installed: pip install 'longfire[cuda]'"
    if importlib.util.find_spec("fla.models") is None:
        return name, "fla has no models: pip install flash-linear-attention"
    if device.type != "cuda":
        return name, "fla's kernels need CUDA"
    return name, ""


def made(config: ModelConfig, seq_len: int, device: torch.device) -> nn.Module:
    """The peer's model with fp32 parameters. Raises MachineError where its class has another
    number of parameters than ours would lead to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if " of fla" in class_of_export(config):
        importlib.import_module("fla.models")  # which makes its classes known to transformers
    written = written_config(config, seq_len)
    model_type = str(written.pop("model_type"))
    theirs = AutoConfig.for_model(model_type, **written)
    theirs.use_cache = False
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    if not isinstance(model, nn.Module):
        raise MachineError(f"{model_type}: its class is no torch module")
    return model.train()


def written_config(config: ModelConfig, seq_len: int) -> dict[str, object]:
    """The keys of the peer's config. Infinity is a number: transformers' table for it is one of
    files, and classes do not compute with it."""
    return with_infinities(config_to_hf(config, length=seq_len))


class PlainLoop:
    """Steps of a model: autocast to bf16 on CUDA, its own loss, clipped gradients, torch's fused
    AdamW; eager, as its class is."""

    def __init__(self, run: Run, work: Work) -> None:
        self.device = work.device
        config = config_of(run)
        self.model = made(config, run.training.seq_len, self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        generator = torch.Generator().manual_seed(0)
        size = run.training.batch_size, run.training.seq_len
        self.ids_BT = torch.randint(config.vocab_size, size, generator=generator).to(self.device)

    def step(self) -> Tensor:
        """One update; the loss before it."""
        is_cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_cuda):
            loss: Tensor = self.model(input_ids=self.ids_BT, labels=self.ids_BT).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def seconds_of_step(self, steps: int) -> float:
        """The median of `steps` steps after the warm-up."""
        for _ in range(WARMUP_STEPS):
            self.step()
        seconds: list[float] = []
        for _ in range(steps):
            begun = wait(self.device)
            self.step()
            seconds.append(wait(self.device) - begun)
        return statistics.median(seconds)
