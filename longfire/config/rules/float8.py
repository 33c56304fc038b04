"""What is refused of a run whose matrices multiply 8-bit numbers."""

from collections.abc import Iterator

from longfire.config.rules.processes import BYTES
from longfire.config.run_settings import RunSettings
from longfire.config.transformers_config import TransformersConfig


def of_float8(run: RunSettings) -> Iterator[str]:
    """Devices, types and models that [float8] has no meaning for. (Whether a CUDA device has units
    for it is seen when it is chosen: device.check_float8.)"""
    if not run.float8.enable_float8_linear:
        return
    setting = "float8.enable_float8_linear = true"
    if run.model.backend == "transformers" or isinstance(run.model_config, TransformersConfig):
        yield (
            f"{setting} is about our own layers, not those of model.backend = 'transformers': set "
            "one of them to its default"
        )
        return
    if run.training.device == "cpu" and not run.float8.emulate:
        yield (
            f"{setting}: a CPU has no float8 units; set float8.emulate to true, which gives the "
            "same rounding in float32, slower than without float8"
        )
    if run.model.compute_dtype == "float32" and not run.float8.emulate:
        yield (
            f"{setting}: float8 units give products in bfloat16, but model.compute_dtype = "
            "'float32': set it to bfloat16 or auto, or float8.emulate to true"
        )
    if run.float8.enable_fsdp_float8_all_gather:
        yield from of_all_gather(run)
    if run.model_config is None:
        return
    from longfire.model import on_meta  # the matrices need torch
    from longfire.parallel import float8_layers

    model = on_meta(run.model_config.with_vocabulary(run.model_config.vocab_size or BYTES))
    yield from float8_layers.refusals(model, run.float8, run.degrees["tp"])


def of_all_gather(run: RunSettings) -> Iterator[str]:
    """Matrices that travel in few bytes are sharded ones, and fp32 before that."""
    setting = "float8.enable_fsdp_float8_all_gather = true"
    if run.degrees["dp_shard"] * run.degrees["cp"] == 1:
        yield f"{setting} is about sharded parameters, but nothing is sharded here: leave it out"
    if run.parallelism.param_gather_dtype == "bfloat16":
        yield (
            f"{setting}: parallelism.param_gather_dtype = 'bfloat16' rounds all parameters before "
            "they travel: leave one of them out"
        )
