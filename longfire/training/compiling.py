"""Whether torch.compile pays: it costs about a minute, and on a CPU gains about a third of the
time."""

from collections.abc import Callable
from dataclasses import replace

import torch

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.run import Run
from longfire.data.batch import Batch
from longfire.device import wait
from longfire.initialise import build
from longfire.launch import cxx_compiler
from longfire.loss import loss_sum
from longfire.model import Model

PAYS_SECONDS = 600  # a shorter run loses more to the compiler than it gains
# FLOP/s of any CPU that trains: a run that is too short, or long enough, at both is not measured
SLOWEST_FLOPS = 1e9
FASTEST_FLOPS = 2e13
# Of a trial: about a tenth of a second, with at least and at most so many tokens
TRIAL_FLOPS = 1e10
TRIAL_TOKENS = (32, 512)

Rate = Callable[[], float]  # measures FLOP/s


def compile_decision(
    run: Run, flops_per_token: float, device: torch.device, rate: Rate
) -> tuple[bool, str]:
    """Whether to compile the blocks, and why.

    flops_per_token: of the forward. rate: FLOP/s at which this model trains eagerly here; called
    only where it decides.
    """
    mixers = {mixer_of(name) for name in run.known_model_config.layer_types}
    if run.training.tbptt_segments > 1 and "attention" in mixers:
        return False, "segments of a softmax layer see different numbers of keys"
    if run.training.compile == "off":
        return False, "asked for by training.compile"
    compiler = cxx_compiler()
    if device.type == "cpu" and compiler is None:
        return False, "no C++ compiler found (CXX, c++, g++, clang++), so the run goes on eager"
    if run.training.compile == "on":
        return True, "asked for by training.compile"
    if device.type == "cuda":
        return True, "CUDA"
    limit = run.training.max_seconds
    if 0 < limit < PAYS_SECONDS:
        return False, f"training.max_seconds = {limit:g} is too short to pay for compiling"
    flops = 3 * flops_per_token * run.steps * run.tokens_per_step / run.world.size
    if flops / SLOWEST_FLOPS < PAYS_SECONDS:
        return False, "the run is too short to pay for compiling"
    is_surely_long = flops / FASTEST_FLOPS > PAYS_SECONDS
    seconds = flops / (FASTEST_FLOPS if is_surely_long else rate())
    if limit:
        seconds = min(seconds, limit)
    if seconds < PAYS_SECONDS:
        why = f"the run takes some {seconds:.0f} s, by a trial of its layers"
        return False, f"{why}: too short to pay for compiling"
    return True, f"the run takes more than {PAYS_SECONDS // 60} min eager, compiled with {compiler}"


def eager_rate(run: Run, model: Model) -> float:
    """FLOP/s of forward and backward of a model on random tokens. The rate of a matrix product
    would be too high: recurrent mixers, norms and the loss run at a fraction of it."""
    batch = trial_batch(model, run)
    device = model.embed.weight.device
    trial(model, batch, run.training.loss_chunk_tokens)  # the first allocates
    begun = wait(device)
    trial(model, batch, run.training.loss_chunk_tokens)
    flops = 3 * model.flops_per_token(batch.ids_BT.shape[1]) * batch.ids_BT.numel()
    return flops / (wait(device) - begun)


def sample_of(config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device) -> Model:
    """A model like this one, with one layer of each type: what `eager_rate` measures instead of all
    of them. Of a classifier, or of a model of images, the layers between the ends of a language
    model."""
    kinds = tuple(dict.fromkeys(config.layer_types))
    sample = replace(
        config,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        image_size=0,
        num_classes=0,
    )
    return build(sample, seed, device, dtype)


def trial_batch(model: Model, run: Run) -> Batch:
    """Random sequences, as long as those of the run where a trial may have so many tokens."""
    fewest, most = TRIAL_TOKENS
    tokens = int(TRIAL_FLOPS / (3 * model.flops_per_token(fewest)))
    tokens = min(max(tokens, fewest), most)
    seq_len = min(run.training.seq_len, tokens)
    size = (min(run.training.batch_size, max(1, tokens // seq_len)), seq_len)
    # its own generator: the random numbers of the run stay as they are
    generator = torch.Generator().manual_seed(run.training.seed)
    ids_BT = torch.randint(model.config.vocab_size, size, generator=generator)
    return Batch(ids_BT, ids_BT, torch.arange(seq_len).expand(size))


def trial(model: Model, batch: Batch, chunk_tokens: int) -> None:
    """One forward and backward."""
    loss_sum(model, batch.to(model.embed.weight.device), chunk_tokens).backward()
    model.zero_grad()
