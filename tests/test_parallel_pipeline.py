"""parallel/pipeline.py, stages.py: loss and unclipped gradient of every parameter equal those of one process, in any order."""

import os

import pytest
import torch
from sets import slow_unless
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from worlds import in_processes

from longfire.config.settings import ActivationCheckpoint, Parallelism
from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.errors import SettingsError
from longfire.initialise import build, initialise
from longfire.loss import loss_of, loss_sum, losses
from longfire.model import Model
from longfire.ops.documents import Documents
from longfire.ops.sequence_noise import row_noise
from longfire.parallel.apply import reshard
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.pipeline import cut
from longfire.parallel.remat import save_memory
from longfire.parallel.sharding import sharding_of
from longfire.parallel.stages import StageLayout, cheapest, layout, read_order, refusals

SCHEDULES = [
    "GPipe",
    "1F1B",
    "LoopedBFS",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]
HYBRID = ("gla", "attention", "gla", "attention")
MODELS = {
    "hybrid": (HYBRID, {}),
    "rwkv7": (("rwkv7",) * 4, {}),
    "hgrn2": (("hgrn2",) * 4, {}),
    "tied": (HYBRID, {"tie_word_embeddings": True}),
    "all at once": (
        ("rwkv7", "hgrn2", "hgrn2", "rwkv7"),
        {
            "mlp": "gelu",
            "norm": "layernorm",
            "block": "post",
            "embed_norm": True,
            "learned_positions": True,
            "dropout": 0.2,
            "max_position_embeddings": 16,
            "embed_dropout": 0.1,
            "tie_word_embeddings": True,
        },
    ),
}
CHUNK_TOKENS, ROWS, TOKENS = 7, 1, 12


def microbatches(count: int, seed: int = 0, rows: int = ROWS) -> tuple[Batch, ...]:
    """Two documents a row, and some labels that do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (count * rows, TOKENS + 1), generator=generator)
    ends = torch.randint(3, TOKENS - 2, (count * rows, 1), generator=generator)
    tokens = torch.arange(TOKENS)[None]
    second = tokens >= ends
    labels = torch.where(tokens == ends - 1, NO_LABEL, ids[:, 1:])
    documents = Documents.from_ids(second.long() + 2 * torch.arange(count * rows)[:, None])
    return Batch(ids[:, :-1], labels, torch.where(second, tokens - ends, tokens), documents).split(
        count
    )


def noises_of(shape, batches):
    return [
        row_noise(3, number * ROWS, ROWS, TOKENS, "cpu") if shape.drops else None
        for number in range(len(batches))
    ]


def real_tokens(batches):
    return sum(batch.real_tokens() for batch in batches)


def truth(model, batches):
    """Loss and gradients of one process."""
    total = 0.0
    for batch, noise in zip(batches, noises_of(model.config, batches)):
        loss = loss_sum(model, batch, CHUNK_TOKENS, noise) / real_tokens(batches)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters()}


def cut_of(model: Model, mesh: Mesh, parallelism: Parallelism, **more):
    """The model's part on this process with the same values, and its pipeline."""
    with torch.device("meta"):
        part = Model(model.config, model.compute_dtype).to(model.compute_dtype)
    part.pipeline = cut(part, mesh, parallelism, TOKENS, **more)
    return part, part.pipeline


def fill(part: Model, model: Model) -> None:
    """Memory and the whole model's values, sharded or not."""
    part.to_empty(device="cpu")
    part.tie()
    values = dict(model.named_parameters())
    for name, parameter in part.named_parameters():
        value = values[name].data
        if isinstance(parameter, DTensor):
            rows = parameter.device_mesh.size()
            chunks = value.chunk(rows)
            here = parameter.device_mesh.get_local_rank()
            value = chunks[here] if here < len(chunks) else value[:0]
            parameter.to_local().data.copy_(value)
        else:
            parameter.data.copy_(value)


def close(got, expected, name, rounding=2e-5):
    scale = float(expected.abs().max())
    rounding = 1e-10 if expected.dtype == torch.float64 else rounding
    torch.testing.assert_close(
        got, expected, rtol=0, atol=rounding * (scale + 1e-3), msg=lambda m: f"{name}: {m}"
    )


def check(part, pipeline, model, batches, mine=None, **tolerance):
    """One step of the pipeline against one process; gradients that lie on several stages are compared on each."""
    loss, gradients = truth(model, batches)
    mine = batches if mine is None else mine
    noises = [
        noise
        for batch, noise in zip(batches, noises_of(model.config, batches))
        if any(batch is m for m in mine)
    ]
    words = real_tokens(batches)
    got = pipeline.step(mine, noises, lambda m, h, b: loss_of(m, h, b, CHUNK_TOKENS) / words)
    got = pipeline.mesh.sum(got, "dp_shard")
    close(got, loss, "loss")
    for name, parameter in part.named_parameters():
        gradient = (
            parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        )
        close(gradient, gradients[name], name, **tolerance)


def double(model: Model) -> Model:
    model.compute_dtype = torch.float64
    for block in model.layers:
        block.inner = torch.float64
    return model.double()


def one_case(rank, model, schedule, count, points=(), file=""):
    mesh = Mesh.of_degrees({"pp": torch.distributed.get_world_size()}, "cpu")
    parallelism = Parallelism(
        pipeline_parallel_schedule=schedule,
        pipeline_parallel_split_points=points,
        pipeline_parallel_schedule_csv=file,
    )
    part, pipeline = cut_of(model, mesh, parallelism)
    fill(part, model)
    check(part, pipeline, model, microbatches(count))
    names = sorted(name for name, _ in part.named_parameters())
    return names, [name for name in names if sharding_of(part, name).is_copy]


IN_CI = {(kind, "1F1B") for kind in MODELS} | {("all at once", schedule) for schedule in SCHEDULES}
QUICK = {
    ("tied", "1F1B"),
    ("rwkv7", "1F1B"),
    ("all at once", "Interleaved1F1B"),
    ("all at once", "ZBVZeroBubble"),
}


def marks_of(kind: str, schedule: str) -> list[pytest.MarkDecorator]:
    if (kind, schedule) in QUICK:
        return []
    return [pytest.mark.slow if (kind, schedule) in IN_CI else pytest.mark.matrix]


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        pytest.param(kind, schedule, marks=marks_of(kind, schedule))
        for kind in MODELS
        for schedule in SCHEDULES
    ],
)
def test_gradients_are_those_of_one_process(kind, schedule, tiny_model):
    types, changes = MODELS[kind]
    model = double(tiny_model(*types, **changes))
    found = in_processes(2, one_case, model, schedule, 4)
    names = {name for name, _ in model.named_parameters()}
    assert set(found[0][0]) | set(found[1][0]) == names
    assert sorted([*found[0][0], *found[1][0]]) == sorted([*names, *found[0][1], *found[1][1]]), (
        "a copy has one owner"
    )


@pytest.mark.parametrize(
    ("kind", "schedule"),
    slow_unless(
        lambda kind, schedule: kind == "hgrn2",
        [("rwkv7", "1F1B"), ("hgrn2", "1F1B"), ("tied", "GPipe")],
    ),
)
def test_four_processes_with_a_layer_each(kind, schedule, tiny_model):
    types, changes = MODELS[kind]
    in_processes(4, one_case, double(tiny_model(*types, **changes)), schedule, 5)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["tied", "hgrn2", "all at once"])
@pytest.mark.parametrize(
    "schedule", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
)
def test_deeper_models_in_more_stages(schedule, kind, tiny_model):
    types, changes = MODELS[kind]
    in_processes(4, one_case, double(tiny_model(*types * 2, **changes)), schedule, 8)


def test_stages_begin_where_they_are_asked_to(tiny_model):
    names = in_processes(2, one_case, double(tiny_model(*HYBRID)), "1F1B", 3, ("layers.1",))[0][0]
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0"}


CSV = {
    "one by one": "0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n",
    "halves, three stages": "0F0,0F1,2F0,2I0,2F1,2I1,0B0,0B1,2W0,2W1\n,1F0,1F1,1I0,1I1,1W0,1W1\n",
}


@pytest.mark.parametrize("order", CSV)
def test_an_order_from_a_file(order, tmp_path, tiny_model):
    file = tmp_path / "order.csv"
    file.write_text(CSV[order])
    in_processes(
        2, one_case, double(tiny_model(*HYBRID, tie_word_embeddings=True)), "1F1B", 2, (), str(file)
    )


def sharded_case(rank, model, schedule, remat):
    mesh = Mesh.of_degrees({"pp": 2, "dp_shard": 2}, "cpu")
    part, pipeline = cut_of(
        model, mesh, Parallelism(pipeline_parallel_schedule=schedule), halves=not remat
    )
    for block in part.layers if remat else ():
        save_memory(block, ActivationCheckpoint(remat))
    shared_out(pipeline, mesh)
    fill(part, model)
    batches, here = microbatches(8), mesh.rank("dp_shard")
    check(part, pipeline, model, batches, mine=batches[4 * here : 4 * here + 4])
    first = {name: p.grad.full_tensor() for name, p in part.named_parameters()}
    batch = microbatches(1, seed=5, rows=4)[0]
    agrees(pipeline.losses(batch, CHUNK_TOKENS), losses(model, batch, CHUNK_TOKENS))
    reshard(part)
    assert all(isinstance(p, DTensor) for p in part.parameters())
    for p in part.parameters():
        p.grad = None
    model.zero_grad()
    check(part, pipeline, model, batches, mine=batches[4 * here : 4 * here + 4])
    for name, p in part.named_parameters():
        assert torch.equal(p.grad.full_tensor(), first[name]), f"{name}: the same step again"


def shared_out(pipeline, mesh):
    """As parallel/apply.py shards: blocks, then what remains of each stage."""
    inner = {"mesh": mesh.device_mesh["dp_shard"], "reshard_after_forward": False}
    for stage in pipeline.stages:
        for module in (*stage.layers, stage):
            fully_shard(module, **inner)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def agrees(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], expected[1])


SHARDED = [("tied", "1F1B", "block"), ("all at once", "GPipe", ""), ("hybrid", "ZBVZeroBubble", "")]


@pytest.mark.parametrize(
    ("kind", "schedule", "remat"),
    slow_unless(lambda kind, schedule, remat: kind == "tied", SHARDED),
)
def test_sharded_inside(kind, schedule, remat, tiny_model):
    types, changes = MODELS[kind]
    in_processes(4, sharded_case, double(tiny_model(*types, **changes)), schedule, remat)


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kind", "remat"),
    [("rwkv7", ""), ("hybrid", "block"), ("rwkv7", "mlp"), ("hybrid", "attention")],
)
def test_sharded_inside_whatever_the_order(kind, schedule, remat, tiny_model):
    types, changes = MODELS[kind]
    in_processes(4, sharded_case, double(tiny_model(*types, **changes)), schedule, remat)


def recomputed_case(rank, model, schedule, remat):
    mesh = Mesh.of_degrees({"pp": 2}, "cpu")
    part, pipeline = cut_of(
        model, mesh, Parallelism(pipeline_parallel_schedule=schedule), halves=False
    )
    for block in part.layers:
        save_memory(block, ActivationCheckpoint(remat))
    fill(part, model)
    check(part, pipeline, model, microbatches(4))


@pytest.mark.parametrize(
    ("kind", "schedule", "remat"),
    [
        ("rwkv7", "1F1B", "block"),
        ("hgrn2", "ZBVZeroBubble", "block"),
        ("rwkv7", "DualPipeV", "mlp"),
    ],
)
def test_recomputed_activations(kind, schedule, remat, tiny_model):
    types, changes = MODELS[kind]
    in_processes(2, recomputed_case, double(tiny_model(*types, **changes)), schedule, remat)


def evaluated_case(rank, model, schedule):
    """Evaluation of rows of other shapes between steps, which stay as they were."""
    mesh = Mesh.of_degrees({"pp": 2}, "cpu")
    part, pipeline = cut_of(model, mesh, Parallelism(pipeline_parallel_schedule=schedule))
    fill(part, model)
    for rows in (4, 3):
        batch = microbatches(1, seed=rows, rows=rows)[0]
        agrees(pipeline.losses(batch, CHUNK_TOKENS), losses(model, batch, CHUNK_TOKENS))
    check(part, pipeline, model, microbatches(4))
    for p in part.parameters():
        p.grad = None
    model.zero_grad()
    check(part, pipeline, model, microbatches(6, seed=1))


@pytest.mark.parametrize(("kind", "schedule"), [("tied", "1F1B"), ("rwkv7", "ZBVZeroBubble")])
def test_evaluation_and_steps_of_another_size(kind, schedule, tiny_model):
    types, changes = MODELS[kind]
    in_processes(2, evaluated_case, tiny_model(*types, **changes), schedule)


def half_case(rank, model, expected):
    mesh = Mesh.of_degrees({"pp": 2}, "cpu")
    with torch.device("meta"):
        part = Model(model.config, torch.bfloat16)
    pipeline = cut(part, mesh, Parallelism(), TOKENS)
    fill(part, model)
    batches = microbatches(2)
    got = pipeline.step(batches, (None, None), lambda m, h, b: loss_of(m, h, b, CHUNK_TOKENS))
    assert got.item() == pytest.approx(expected[0], rel=1e-6)
    for name, parameter in part.named_parameters():
        close(parameter.grad, expected[1][name], name)


@pytest.mark.parametrize("changes", [{}, {"residual_in_fp32": True}])
def test_bf16_travels_and_rounds_as_on_one_process(changes, tiny_config):
    model = build(tiny_config("rwkv7", "rwkv7", **changes), 0, compute_dtype=torch.bfloat16)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    batches, total = microbatches(2), 0.0
    for batch in batches:
        loss = loss_sum(model, batch, CHUNK_TOKENS)
        loss.backward()
        total += loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    in_processes(2, half_case, model, (total, gradients))


def compiled_case(rank, model, schedule):
    mesh = Mesh.of_degrees({"pp": 2}, "cpu")
    part, pipeline = cut_of(
        model, mesh, Parallelism(pipeline_parallel_schedule=schedule), halves=False
    )
    for block in part.layers:
        block.compile(dynamic=False)
    fill(part, model)
    check(part, pipeline, model, microbatches(2), rounding=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_compiled_blocks(schedule, tiny_model):
    in_processes(
        2, compiled_case, tiny_model("rwkv7", "rwkv7", "gla", "gla"), schedule, timeout_seconds=900
    )


def started_case(rank, shape):
    mesh = Mesh.of_degrees({"pp": 2}, "cpu")
    with torch.device("meta"):
        part = Model(shape)
    cut(part, mesh, Parallelism(), TOKENS)
    part.to_empty(device="cpu")
    part.tie()
    initialise(part, 0)
    return {name: p.detach().numpy() for name, p in part.named_parameters()}


def test_a_part_begins_as_the_whole_model(tiny_config):
    shape = tiny_config("rwkv7", "gla", "hgrn2", "rwkv7", tie_word_embeddings=True)
    whole = dict(build(shape, 0).named_parameters())
    for part in in_processes(2, started_case, shape):
        assert all((whole[name].detach().numpy() == value).all() for name, value in part.items())


@pytest.mark.parametrize(
    ("types", "changes", "schedule", "message"),
    [
        (HYBRID, {"tie_word_embeddings": True}, "DualPipeV", "embed.weight"),
        (("hgrn2",) * 4, {}, "LoopedBFS", "shared.hgrn2"),
    ],
)
def test_a_sharded_parameter_of_two_stages_on_one_process_is_refused(
    types, changes, schedule, message, tiny_config
):
    with torch.device("meta"):
        model = Model(tiny_config(*types, **changes))
    mesh = Mesh({**ALONE.degrees, "pp": 2, "dp_shard": 2})
    with pytest.raises(SettingsError, match=message):
        cut(model, mesh, Parallelism(pipeline_parallel_schedule=schedule), TOKENS)


def test_stages_of_equal_cost():
    assert cheapest([0, 1, 1, 1, 1, 2], 2) == [0, 3]
    assert cheapest([0, 1, 1, 1, 1, 0], 2) == [0, 2]
    assert cheapest([5, 1, 1, 1, 1, 0], 2) == [0, 1]
    assert cheapest([0, 1, 1, 1, 0], 3) == [0, 1, 2]


def test_placement():
    def placed(schedule, **more):
        return layout(
            [0.0] + [1.0] * 8 + [0.0], 2, Parallelism(pipeline_parallel_schedule=schedule, **more)
        )

    assert placed("1F1B") == StageLayout((range(4), range(4, 8)), (0, 1))
    assert placed("Interleaved1F1B").processes == (0, 1, 0, 1)
    assert placed("ZBVZeroBubble").processes == (0, 1, 1, 0)
    points = ("layers.1", "layers.2", "layers.3", "layers.4", "layers.7")
    assert placed("LoopedBFS", pipeline_parallel_split_points=points).on(1) == [1, 3, 5]


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ({"schedule": "1F1b"}, 4, "schedule = '1F1b' is none of GPipe, 1F1B"),
        ({"schedule": "1F1B"}, 1, "1 microbatches a step are fewer than the 2 stages"),
        ({"schedule": "DualPipeV"}, 3, "fewer than the 4 stages"),
        ({"schedule": "Interleaved1F1B"}, 5, "in 2 rounds of equal size"),
        ({"schedule": "1F1B", "split_points": ("layers.9",)}, 4, "from layers.1 to layers.3"),
        ({"schedule": "1F1B", "split_points": ("norm",)}, 4, "a stage begins with a layer"),
        (
            {"schedule": "1F1B", "split_points": ("layers.1", "layers.2")},
            4,
            "makes 3 stages for 2 processes",
        ),
        (
            {"schedule": "LoopedBFS", "split_points": ("layers.1", "layers.2")},
            4,
            "makes 3 stages for 2 processes",
        ),
        (
            {"schedule": "ZBVZeroBubble", "split_points": ("layers.1",)},
            4,
            "takes two a process, which are 4",
        ),
        ({"schedule_csv": "none.csv"}, 4, "cannot be read"),
        ({"schedule_csv": "0F0,0B0\n1F0,1B0\n"}, 4, "orders 1; make them equal"),
        ({"schedule_csv": "0F0,0B0\n1F0\n"}, 1, "is no order of forwards and backwards"),
        ({"schedule_csv": "0F0,0B0,1F0,1B0\n"}, 1, "has stages on 1 processes"),
    ],
)
def test_what_cannot_run_is_reported_before(settings, count, message, tmp_path, tiny_config):
    settings = {f"pipeline_parallel_{key}": value for key, value in settings.items()}
    if "\n" in settings.get("pipeline_parallel_schedule_csv", ""):
        (tmp_path / "order.csv").write_text(settings["pipeline_parallel_schedule_csv"])
        settings["pipeline_parallel_schedule_csv"] = str(tmp_path / "order.csv")
    reasons = list(refusals(tiny_config(*HYBRID), 2, Parallelism(**settings), count))
    assert any(message in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"0F0,0B0\n1F0,1B0\n\xff", "is no text in UTF-8"),
        (b"0F999999,0B999999\n999999F0,999999B0\n", "is no order"),  # 10^12 pairs are not listed
        (b"0F" + b"9" * 5000, "is no order"),
        (b"", "is no order"),
    ],
)
def test_an_order_of_odd_bytes_is_an_error(content, problem, tmp_path):
    file = tmp_path / "order.csv"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=problem):
        read_order(str(file))


def test_an_order_in_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "order.csv")
    with pytest.raises(SettingsError, match="it is a FIFO"):
        read_order(str(tmp_path / "order.csv"))


def test_a_teacher_sees_whole_models(tiny_config):
    assert "distillation.teacher" in next(
        refusals(tiny_config(*HYBRID), 2, Parallelism(), 4, distilled=True)
    )


def test_more_stages_than_layers_are_reported(tiny_config):
    reasons = refusals(
        tiny_config(*HYBRID), 4, Parallelism(pipeline_parallel_schedule="LoopedBFS"), 8
    )
    assert ["8 stages of 4 layers" in reason for reason in reasons] == [True]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_can_run_is_not_refused(schedule, tiny_config):
    assert not list(
        refusals(tiny_config(*HYBRID), 2, Parallelism(pipeline_parallel_schedule=schedule), 4)
    )
