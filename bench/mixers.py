"""Training throughput of every mixer at one width: tokens/s of forward and backward, and FLOP/s beside the fastest of its class.

Goal: within 15 % of the fastest of its class. A class is what has the same recurrence to compute; within one, mixers
differ in gates, convolutions and sizes, so that what is compared are FLOP/s of what the mathematics needs (Model.flops_per_token).
"""

import torch
from measure import alternate, arguments, medians, print_table, write_result

from longfire.config.model_config import ModelConfig
from longfire.initialise import build
from longfire.mixers import MIXERS
from longfire.model import Model
from longfire.ops.cross_entropy import linear_cross_entropy

CLASSES = {
    "softmax": {"attention": {"num_heads": 8}},
    "decay of a head, or none": {
        "linear_attention": {"num_heads": 4},
        "retention": {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0},
        "mamba2": {"head_dim": 64, "state_size": 64},
    },
    "decay of a channel": {"gla": {"num_heads": 4}, "hgrn2": {"expand_ratio": 128}},
    "two passes": {"gsa": {"num_heads": 4}},
    "delta rule": {
        "delta_net": {"num_heads": 4},
        "gated_delta_net": {"num_heads": 4, "head_dim": 128, "expand_v": 1.0},
    },
    "delta rule, decay of a channel": {"kda": {"num_heads": 4, "head_dim": 128}},
    "diagonal plus low rank": {"rwkv7": {"head_dim": 64}},
    "selective scan": {"mamba": {}},
}


def made(mixer: str, settings: dict, hidden: int, layers: int) -> Model:
    mlp = {"mamba": "none", "mamba2": "none", "rwkv7": "channel_mix"}.get(mixer, "swiglu")
    return build(
        ModelConfig(hidden, layers, (mixer,), {mixer: settings}, vocab_size=4096, mlp=mlp), 0
    )


def forward_backward(model: Model, ids_BT: torch.Tensor) -> None:
    hidden_ND = model(ids_BT).flatten(0, 1)
    linear_cross_entropy(hidden_ND, model.head.weight, ids_BT.flatten()).backward()
    model.zero_grad()


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], hidden=512, layers=4, rows=2, tokens=1024, repeats=5
    )
    if options.quick:
        options.hidden, options.layers, options.rows, options.tokens, options.repeats = (
            256,
            1,
            1,
            128,
            1,
        )
    missing = MIXERS.keys() - {mixer for mixers in CLASSES.values() for mixer in mixers}
    assert not missing, f"give {missing} a class"
    ids_BT = torch.randint(4096, (options.rows, options.tokens))
    models = {
        m: made(m, given, options.hidden, options.layers)
        for mixers in CLASSES.values()
        for m, given in mixers.items()
    }
    runs = {
        name: lambda model=model: forward_backward(model, ids_BT) for name, model in models.items()
    }
    times = medians(alternate(runs, options.repeats))
    rows = []
    for kind, mixers in CLASSES.items():
        flops = {
            m: 3 * models[m].flops_per_token(options.tokens) * ids_BT.numel() / times[m]
            for m in mixers
        }
        for mixer in mixers:
            rows.append(
                {
                    "class": kind,
                    "mixer": mixer,
                    "parameters": sum(p.numel() for p in models[mixer].parameters()),
                    "tokens/s": ids_BT.numel() / times[mixer],
                    "GFLOP/s": flops[mixer] / 1e9,
                    "of the class's best": flops[mixer] / max(flops.values()),
                    "goal": ">= 0.85",
                    "reached": flops[mixer] >= 0.85 * max(flops.values()),
                }
            )
    print_table("mixers", rows)
    sizes = {
        "hidden": options.hidden,
        "layers": options.layers,
        "rows": options.rows,
        "tokens": options.tokens,
    }
    write_result("mixers", {"rows": rows, "sizes": sizes}, options.quick)


if __name__ == "__main__":
    main()
