"""flash-attention's `experiment=GROUP/NAME`: the recipe that is this run, and what differs from
it."""

from typing import NamedTuple

from longfire.errors import SettingsError


class Experiment(NamedTuple):
    """A shipped recipe, and the settings of the command line that make it this experiment."""

    recipe: str
    overrides: dict[str, str]


GPT2_RATES = {"s": "6e-4", "m": "1.5e-4", "l": "1.5e-4", "xl": "1.5e-4"}
GPT3_RATES = {"s": "6e-4", "m": "3e-4", "l": "2.5e-4", "xl": "2e-4", "2.7b": "1.6e-4"}
LARGE = ("xl", "2.7b")
KERNELS = ("-flash", "-hf")  # both are the same model; its kernels are chosen by the device here
SHORT = ("-30B", "-60B")  # named after about as many tokens as their steps have
SHORT_STEPS = 60_000


def experiment(name: str) -> Experiment:
    """The run of an experiment, as owt/gpt2s-flash or pile/gpt3xl-flash-rotary-8k. Raises
    SettingsError with the names that there are."""
    group, _, rest = name.partition("/")
    model, *variants = variants_of(rest)
    size = model[4:]
    if group == "owt" and model.startswith("gpt2") and size in GPT2_RATES and not variants:
        return gpt2(size)
    is_known = set(variants) <= {"-rotary", "-8k", "-hdim128", *SHORT}
    if group == "pile" and model.startswith("gpt3") and size in GPT3_RATES and is_known:
        return gpt3(size, variants)
    raise SettingsError(
        f"experiment = {name!r} is not one of owt/gpt2{{s,m,l,xl}}-flash, "
        "pile/gpt3{s,m,l,xl,2.7B}-flash, the latter also with -hdim128 (2.7B), -rotary, -8k, -30B "
        "and -60B behind; `longfire train --help` lists the recipes"
    )


def variants_of(name: str) -> list[str]:
    """gpt3xl-flash-rotary-8k -> [gpt3xl, -rotary, -8k]."""
    model, *parts = name.replace("gpt3-2.7B", "gpt32.7b").split("-")
    return [model, *(f"-{part}" for part in parts if f"-{part}" not in KERNELS)]


def gpt2(size: str) -> Experiment:
    overrides = {"model.config": f"gpt2-{size}", "optimizer.lr": GPT2_RATES[size]}
    return named_after(Experiment("gpt2-s-owt", overrides), f"gpt2-{size}-owt")


def gpt3(size: str, variants: list[str]) -> Experiment:
    """Its large models take twice the sequences in a step and half the steps; sequences of 8,192
    tokens are a quarter as many. The variants -30B and -60B are of 60,000 steps, whose decay ends
    with the last."""
    config = f"gpt3-{size}"
    for variant in ("-hdim128", "-rotary", "-8k"):
        if variant in variants:
            config += variant
    is_large = size in LARGE
    sequences = 512 if is_large else 256
    seq_len = 2048
    if "-8k" in variants:
        sequences //= 4
        seq_len = 8192
    steps = 400_000 if is_large else 800_000
    warmup_steps = 4_000 if is_large else 8_000
    overrides = {
        "model.config": config,
        "optimizer.lr": GPT3_RATES[size],
        "training.seq_len": str(seq_len),
        "training.global_batch_size": str(sequences),
        "training.steps": str(steps),
        "lr_scheduler.warmup_steps": str(warmup_steps),
        "lr_scheduler.decay_end_step": str(steps * 3 // 4),
    }
    if is_large:
        overrides["eval.interval"] = "1000"
        overrides["checkpoint.milestone_interval"] = "12500"
    if set(SHORT) & set(variants):
        overrides["training.steps"] = str(SHORT_STEPS)
        overrides["lr_scheduler.decay_end_step"] = "0"
        overrides["lr_scheduler.warmup_steps"] = str(SHORT_STEPS // 100)
    if size != "s" or "-8k" in variants:
        overrides["training.batch_size"] = "1"
    return named_after(Experiment("gpt3-s-pile", overrides), f"{config}-pile")


def named_after(run: Experiment, name: str) -> Experiment:
    """The same with a run folder of its own."""
    return Experiment(run.recipe, {**run.overrides, "job.dump_folder": f"runs/{name}"})
