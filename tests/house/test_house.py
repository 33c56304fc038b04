"""The house stays as docs/design.md draws it: floors, sizes, and what no file may do. Taste is tested."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from closures import FILES, HOUSE, MODULES, imports, module_of, tree

# Floors from the ground up, as section 3 of the design says: a room may import what lies below it, and its own files. Rooms of
# one floor that are listed in APART import nothing of each other. A file of a package may have a floor of its own.
FLOORS = [
    ["__init__", "auto_classes", "public"],
    [
        "errors",
        "messages",
        "plain_console",
        "work_progress",
        "regular_files",
        "json_types",
        "own_files",
        "aside",
        "lazy_table",
        "listing",
        "config",
        "training.lengths",
        "training.schedule",
        "training.plateau",
        "training.budget",
        "training.records",
        "training.console",
        "training.trackers",
        "training.slowness",
        "training.environment",
        "launch",
        "ending_signals",
        "disk",
        "ops",
        "doctor.op_cases",
        "doctor.segments",
        "doctor.cases",
        "device",
        "plural",
    ],
    ["block_execution", "row_shards"],
    ["mixers", "parallel", "data", "optim", "training.reporting", "training.traces"],
    ["training.report_page", "mlps", "images"],
    ["model", "loss", "training.tbptt", "checkpoint", "tasks", "plugins"],
    ["initialise"],
    [
        "huggingface",
        "parallel.pipeline_stage",
        "parallel.pipeline_loss",
        "parallel.pipeline_schedule",
        "parallel.pipeline",
        "parallel.apply",
    ],
    [
        "config.read_model",
        "config.run_settings",
        "config.rules",
        "config.run",
        "config.run_folder",
        "config.summary",
        "config.checks",
        "checkpoint.provenance",
    ],
    ["checkpoint.weights", "huggingface.own_class", "planner"],
    [
        "evaluation.evaluate",
        "evaluation.recall",
        "generation",
        "huggingface.export",
        "huggingface.import_",
        "huggingface.convert",
        "training.distillation",
        "training.teacher",
        "training.code_snapshot",
        "training.compiling",
        "training.text_outputs",
        "training.timing",
        "training.training_data",
        "training.run_plan",
        "training.memory_check",
        "training.stages",
        "training.step",
        "training.norms",
        "training.step_record",
    ],
    ["evaluation.lm_eval_model", "huggingface.vit_export"],
    ["training.start", "training.finish", "generation.prompts", "evaluation.scores"],
    [
        "training.setup",
        "training.validation",
        "tasks.language_modeling",
        "tasks.classification",
        "tasks.image_classification",
        "tasks.sequence_classification",
    ],
    ["training.loop", "evaluation.class_scores"],
    ["training.throughput", "doctor"],
    ["gpu_check"],
    ["cli"],
    ["__main__"],
]
# Packages whose files have floors of their own; the package itself is a docstring.
DOCSTRINGS = {"training", "evaluation"}
APART = {"mixers", "parallel", "data", "optim", "training.reporting", "training.traces"}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# File -> the private names of other libraries that it may use (None: any); the reason stands beside the use.
PRIVATE_NAMES = {
    "gpu_check/graphs.py": {"torch._dynamo"},
    "gpu_check/roofline.py": {"torch._subclasses", "torch.utils._pytree"},
    "launch.py": {"atexit._run_exitfuncs"},
    "ops/attention_blocks.py": {"torch.ops.aten._scaled_dot_product_flash_attention"},
    "ops/documents.py": {"torch._dynamo"},
    "ops/fast/float8.py": {"torch._scaled_mm"},
    "ops/fast/varlen_attention.py": {
        "torch.ops.aten._flash_attention_forward",
        "torch.ops.aten._flash_attention_backward",
    },
    "optim/clipping.py": {"_foreach_mul_"},
    "parallel/apply.py": {"torch._dynamo"},
    "planner/live_bytes.py": {
        "torch._library",
        "torch.utils._python_dispatch",
        "torch.utils._pytree",
    },
    "planner/memory.py": {"torch._subclasses"},
    "parallel/pipeline_schedule.py": {"_PipelineScheduleRuntime", "_load_csv"},
    "training/traces.py": {"_record_memory_history", "_dump_snapshot"},
}
NO_NAMES = {"utils", "util", "common", "core", "base", "components", "tools", "helpers", "misc"}
# The goal is files of 100 to 400 lines; the longest today is ops/attention_blocks.py.
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 540, 100, 10
KERNEL_LIBRARIES = {"fla", "flash_attn", "triton"}


def name_of(file: Path) -> str:
    return file.relative_to(HOUSE).as_posix()


def room_of(module: str) -> str:
    """longfire.data.text -> data; longfire.model -> model; longfire -> __init__.

    A file of a package may have a floor of its own.
    """
    inside = module.removeprefix("longfire").removeprefix(".") or "__init__"
    if inside in DOCSTRINGS:
        return "__init__"
    while inside not in FLOOR and "." in inside:
        inside = inside.rpartition(".")[0]
    return inside


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_downwards(file):
    room = room_of(module_of(file))
    assert room in FLOOR, f"{room} has no floor: give it one here and in docs/design.md"
    for module in imports(file):
        other = room_of(module)
        if other == room:
            continue
        assert FLOOR[other] <= FLOOR[room], f"{name_of(file)} imports {module}, which lies above it"
        assert not {room, other} <= APART, (
            f"{name_of(file)} imports {module}: two rooms of the second floor"
        )


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(imports(MODULES[module]) - {module}):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_says_its_purpose_and_is_of_a_size_to_read(file):
    assert ast.get_docstring(tree(file)), "the first line is a docstring with the purpose"
    assert file.read_text().startswith('"""'), "the docstring comes first"
    assert len(file.read_text().splitlines()) <= MAX_FILE_LINES
    assert not NO_NAMES & {*file.relative_to(HOUSE).with_suffix("").parts}, (
        "a name that says nothing"
    )


def is_kernel(function: ast.FunctionDef) -> bool:
    """Kernels take the address of each tensor, its strides and its constants, one by one."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    return (
        node
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_are_short_and_take_few_arguments(file):
    for function in functions(file):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{function.name}: {lines} lines"
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        count = len([a for a in arguments if a.arg not in ("self", "cls")])
        if is_kernel(function):
            continue
        assert count <= MAX_ARGUMENTS, f"{function.name}: {count} arguments"


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_read_can_run_code(file):
    for name, call in calls(file):
        line = f"{name_of(file)}:{call.lineno}"
        assert name not in ("eval", "exec", "compile"), line
        if name == "torch.load":
            assert any(
                k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords
            ), line
    for node in ast.walk(tree(file)):
        modules = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [getattr(node, "module", None) or ""]
        )
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(modules), (
                name_of(file)
            )


def assigned(file: Path) -> Iterator[ast.Attribute]:
    """Attributes that a file assigns to."""
    for node in ast.walk(tree(file)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        yield from (target for target in targets if isinstance(target, ast.Attribute))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_behaviour_is_changed_at_run_time(file):
    """What a layer's devices decide is data that its forward reads (docs/design.md, section 5)."""
    for target in assigned(file):
        line = f"{name_of(file)}:{target.lineno} assigns {ast.unparse(target)}"
        assert target.attr not in ("forward", "__class__", "__call__"), line


# What may read JSON by itself, and why; everything else asks own_files.py, which names what is damaged.
OTHER_READERS = {
    "own_files.py": "the reader",
    "data/json_files.py": "documents of the user, a million lines of them",
    "data/token_bytes.py": "what a tokenizer in memory says of itself",
    "data/token_templates.py": "what a tokenizer in memory says of itself",
    "data/losses.py": "what a tokenizer in memory says of itself",
    "data/workers.py": "what our own process sent",
    "data/prepare.py": "what our own process sent",
}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_json_and_toml_are_read_in_one_place(file):
    if name_of(file) in OTHER_READERS:
        return
    readers = ("json.load", "json.loads", "tomllib.load", "tomllib.loads")
    for name, call in calls(file):
        assert name not in readers, (
            f"{name_of(file)}:{call.lineno} {name}: own_files.py reads JSON and TOML"
        )
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("json", "tomllib"), name_of(file)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_environment_is_read_in_one_place(file):
    if name_of(file) == "launch.py":
        return
    for node in ast.walk(tree(file)):
        is_read = isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "os.environ",
            "os.getenv",
        )
        assert not is_read, (
            f"{name_of(file)}:{node.lineno} reads the environment: launch.py does that"
        )
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"} & {a.name for a in node.names}


# Every error of a kernel, or of a measurement, is a row of its table.
FINDINGS = {"doctor/check.py", "gpu_check/findings.py"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_error_is_swallowed(file):
    if name_of(file) in FINDINGS:
        return
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            names = set(re.findall(r"\w+", caught))
            raises_on = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert names, f"{name_of(file)}:{node.lineno} a bare except"
            assert not names & {"Exception", "BaseException"} or raises_on, (
                f"{name_of(file)}:{node.lineno} except {caught}"
            )


def foreign(file: Path) -> set[str]:
    """Names that a file binds to modules of other libraries (and of Python): np, torch, F ..."""
    bound = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            bound |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("longfire"):
            bound |= {a.asname or a.name for a in node.names}
    return bound


def private_uses(file: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of another library: an attribute path from an imported name, or an import."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign(file):
                yield node.lineno, ast.unparse(node)
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("longfire"):
            modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for module in modules:
            if any(is_private(part) for part in module.split(".")):
                yield node.lineno, module


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_private_names_of_other_libraries_stand_on_one_list(file):
    allowed = PRIVATE_NAMES.get(name_of(file), set())
    for line, used in private_uses(file):
        known = (
            allowed is None or any(name in used for name in allowed) or used == "os._exit"
        )  # public: Python documents it
        assert known, (
            f"{name_of(file)}:{line} uses {used}: its library may change it any day; see PRIVATE_NAMES"
        )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_ops_know_kernel_libraries(file):
    if room_of(module_of(file)) == "ops":
        return
    for node in ast.walk(tree(file)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & KERNEL_LIBRARIES, (
            f"{name_of(file)}:{node.lineno}"
        )


OF_AN_EXTRA = (
    "ops/fast/custom_ops.py",
    "ops/fast/fla_functions.py",
    "ops/fast/slot_kernels.py",
    "ops/fast/kernels.py",
    "ops/fast/attention_kernels.py",
    "ops/fast/loss_kernels.py",
    "ops/fast/scan_kernels.py",
    "evaluation/lm_eval_model.py",
)  # themselves imported only where the extra was asked for
PROJECT = tomllib.loads((HOUSE.parent / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {
    **packages_distributions(),
    "fla": ["fla-core"],
}  # fla need not be installed where this runs


def names_of(requirements: list[str]) -> set[str]:
    return {
        re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        for requirement in requirements
    }


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_what_is_imported_is_a_dependency(file):
    """Who installs longfire without extras can run every command; an extra is imported only where it was asked for."""
    always = names_of(PROJECT["dependencies"])
    optional = always.union(*map(names_of, PROJECT["optional-dependencies"].values()))
    for node in ast.walk(tree(file)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        declared = (
            always if node in tree(file).body and name_of(file) not in OF_AN_EXTRA else optional
        )
        for name in (
            {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"longfire"}
        ):
            known = {
                distribution.lower().replace("_", "-")
                for distribution in DISTRIBUTIONS.get(name, [name])
            }
            assert known & declared, (
                f"{name_of(file)}:{node.lineno} imports {name}, no dependency in pyproject.toml"
            )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_promise_left_in_code(file):
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b", file.read_text())


# Files that open others by themselves, and which: all that a user can name or bring is opened by
# regular_files, where a FIFO, a device or a socket is an error and not waited for.
OPENERS = {
    "regular_files": "",
    "aside": "a lock of its own",
    "checkpoint/shards": "writes its own file",
    "cli/entry": "/dev/null",
    "cli/failures": "writes its own file",
    "cli/lasting_output": "/dev/null",
    "disk": "a folder, to flush it",
    "gpu_check/check": "writes its own file",
    "gpu_check/processes": "its own files",
    "gpu_check/short_run": "its own files",
    "images/decoding": "bytes in memory",
    "ending_signals": "descriptors",
    "training/code_snapshot": "files of the package, without following links",
    "training/environment": "/proc",
    "training/memory_check": "/sys",
    "training/reporting": "no file",
}
OPENING = {"open", "read_text", "read_bytes"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_opened_by_regular_files(file):
    if name_of(file).removesuffix(".py") in OPENERS:
        return
    for node in ast.walk(tree(file)):
        if not isinstance(node, ast.Call):
            continue
        of_name = isinstance(node.func, ast.Name) and node.func.id == "open"
        of_object = isinstance(node.func, ast.Attribute) and node.func.attr in OPENING
        assert not of_name and not of_object, (
            f"{name_of(file)}:{node.lineno} opens a file: use longfire.regular_files"
        )


LISTING = ("glob", "rglob", "iterdir", "walk", "scandir", "listdir", "exists", "is_file", "is_dir")
# A checkpoint that is not seen is passed over for an older one; data are left out, or made anew.
NOTHING_IS_PASSED_OVER = (
    "checkpoint/",
    "config/run.py",
    "config/run_folder.py",
    "data/cards.py",
    "data/folders.py",
    "data/jobs.py",
    "data/splits.py",
    "data/store_writer.py",
    "data/tokenizer_sources.py",
    "huggingface/hub_models.py",
    "huggingface/weight_files.py",
    "training/records.py",
    "training/start.py",
    "aside.py",
    "disk.py",
    "own_files.py",
)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_folders_are_listed_by_listing(file):
    """Others leave out what cannot be read, and nobody sees that it is missing."""
    if name_of(file) == "listing.py":
        return
    is_strict = name_of(file).startswith(NOTHING_IS_PASSED_OVER)
    for name, call in calls(file):
        module, _, function = name.rpartition(".")
        forbidden = LISTING if is_strict else LISTING[:6]
        by_other = function in forbidden and module not in ("", "ast", "listing")
        assert not by_other, f"{name_of(file)}:{call.lineno} {name}: use longfire.listing"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_transformers_reads_a_folder_without_the_network(file):
    """It takes a folder that it cannot see for a name of the hub."""
    for name, call in calls(file):
        if name.endswith(".from_pretrained"):
            given = {keyword.arg for keyword in call.keywords}
            assert "local_files_only" in given, f"{name_of(file)}:{call.lineno}"


LIGHT = [
    "__init__",
    "auto_classes",
    "public",
    "errors",
    "ending_signals",
    "launch",
    "cli/*",
    "config/**/*",
    "huggingface/__init__",
    "huggingface/families*",
    "huggingface/family*",
    "huggingface/own_config",
    "huggingface/own_class/__init__",
]


@pytest.mark.parametrize("pattern", LIGHT)
def test_the_light_rooms_import_nothing_heavy_at_their_top(pattern):
    heavy = {"torch", "numpy", "transformers", "datasets", "rich", "tokenizers", "pyarrow"}
    files = list(HOUSE.glob(f"{pattern}.py"))
    assert files, pattern
    for file in files:
        for node in tree(file).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & heavy, (
                f"{name_of(file)} imports {names} at its top"
            )


PACKAGES = sorted(file.parent for file in HOUSE.rglob("__init__.py") if file.parent != HOUSE)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_docstring_of_a_package_lists_its_files(package):
    """Each once, on a line of its own, and none that is gone."""
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    listed = re.findall(r"^ *(\w+\.py) ", doc, re.M)
    files = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(files)
