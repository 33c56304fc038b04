"""Decoding, one token at a time: ours against transformers' generate on the same Llama weights; recurrent mixers at two contexts.

SmolLM2-135M's shape (30 layers, 576 wide, 9 heads of which 3 for keys, 49,152 words, tied) with random weights, fp32, one row, greedy,
behind a prompt of 4,096 tokens that both sides have seen before the clock starts. Goal: tokens/s at least 1.5x.

A model with a state should take as long for a token behind 65,536 tokens as behind 1,024: within 5 %. Both are measured in turn on the
same model, each behind tokens that it has really seen.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import alternate, arguments, medians, print_table, write_result

from longfire.config.model_config import ModelConfig
from longfire.config.options import Sampling
from longfire.generation.continuation import Continuation
from longfire.generation.steps import feed, steps
from longfire.huggingface.load import load_weights, model_config_in, model_of
from longfire.initialise import build
from longfire.mixers.cache import Cache
from longfire.mixers.cache_rows import memory_bytes, selected
from longfire.model import Model

FULL = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
QUICK = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}
RECURRENT = {"gla": {"num_heads": 4}, "gated_delta_net": {"num_heads": 4, "head_dim": 64}}
SPEED, FLAT = 1.5, 1.05


def greedy(model: Model, ids: list[int], seen: Cache, tokens: int) -> Callable[[], list[int]]:
    """Continue ids, whose last is not in the cache yet; each call on a copy of it."""

    def run() -> list[int]:
        row = Continuation(ids, Sampling(max_new_tokens=tokens, temperature=0))
        return [drawn for _, drawn in steps(model, [row], selected(seen, [0]))]

    return run


def both_sides(
    size: dict[str, int], context: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """A row a side, and whether they wrote the same."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **size,
        tie_word_embeddings=True,
        max_position_embeddings=2 * context,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        shape = model_config_in(Path(folder))
        ours = model_of(shape, load_weights(folder, shape))
    ids = torch.randint(size["vocab_size"], (1, context + 1))
    with torch.no_grad():
        past = theirs(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        seen = Cache()
        feed(ours, ids[0, :-1].tolist(), seen)

    def peer() -> list[int]:
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(past),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, ids.shape[1] :].tolist()

    ours_run = greedy(ours, ids[0].tolist(), seen, tokens)
    same = ours_run() == peer()
    found = medians(alternate({"ours": ours_run, "peer": peer}, repeats, warmup=0))
    return [
        {
            "side": side,
            "context": context,
            "tokens/s": tokens / s,
            "ms a token": 1000 * s / tokens,
            "same text": same,
        }
        for side, s in found.items()
    ]


def recurrent(
    name: str, contexts: tuple[int, int], tokens: int, repeats: int, layers: int
) -> list[dict[str, Any]]:
    """ms a token of one model behind a short and a long prompt."""
    shape = ModelConfig(
        hidden_size=384,
        num_hidden_layers=layers,
        layer_types=(name,),
        mixers={name: RECURRENT[name]},
        vocab_size=4096,
    )
    model, chance = build(shape, 0), torch.Generator().manual_seed(0)
    runs, caches = {}, {}
    with torch.no_grad():
        for context in contexts:
            ids = torch.randint(4096, (context + 1,), generator=chance).tolist()
            caches[context] = Cache()
            feed(model, ids[:-1], caches[context])
            runs[context] = greedy(model, ids, caches[context], tokens)
    times = alternate(
        runs, repeats, warmup=1
    )  # few tokens a turn: a slow moment of the machine falls on both
    ratio = statistics.median(long / short for short, long in zip(*times.values()))
    return [
        {
            "mixer": name,
            "context": context,
            "ms a token": 1000 * medians(times)[context] / tokens,
            "cache bytes": memory_bytes(caches[context]),
            "to the short one": 1.0 if context == contexts[0] else ratio,
            "goal": f"<= {FLAT}",
            "reached": context == contexts[0] or ratio <= FLAT,
        }
        for context in contexts
    ]


def main() -> None:
    options = arguments(__doc__.splitlines()[0], context=4096, long=65536, tokens=32, repeats=7)
    size, context, contexts, layers = FULL, options.context, (1024, options.long), 6
    if options.quick:
        size, context, contexts, layers, options.tokens, options.repeats = (
            QUICK,
            256,
            (64, 512),
            2,
            8,
            2,
        )
    rows = both_sides(size, context, options.tokens, options.repeats)
    print_table("decoding", rows)
    speed = rows[0]["tokens/s"] / rows[1]["tokens/s"]
    ratios = [
        {
            "what": "tokens/s, ours / transformers",
            "ratio": speed,
            "goal": f">= {SPEED}",
            "reached": speed >= SPEED,
        }
    ]
    print_table("ours / peer", ratios)
    flat = [
        row
        for name in RECURRENT
        for row in recurrent(name, contexts, 8, 6 * options.repeats, layers)
    ]
    print_table("recurrent mixers", flat)
    write_result(
        "decode", {"size": size, "rows": rows, "ratios": ratios, "flat": flat}, options.quick
    )


if __name__ == "__main__":
    main()
