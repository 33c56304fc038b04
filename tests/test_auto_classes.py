"""auto_classes.py: `import longfire` registers our class with transformers, whichever is imported first, and imports nothing."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from longfire.huggingface.families import config_to_hf
from longfire.huggingface.own_config import LONGFIRE
from longfire.huggingface.tensors import to_theirs


@pytest.fixture
def folder(tmp_path, tiny_model):
    model = tiny_model("gla", "kda")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    save_file(
        to_theirs(LONGFIRE, model.config, dict(model.state_dict())),
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    return tmp_path


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_longfire_imports_neither_transformers_nor_torch():
    heavy = "import sys, longfire; print([m for m in ('transformers', 'torch', 'numpy') if m in sys.modules])"
    assert python(heavy).strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import longfire\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM\nimport longfire",
        "from transformers import AutoConfig\nimport longfire\nfrom transformers import AutoModelForCausalLM",
        "import longfire.huggingface.own_class.model\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "import longfire, transformers\nAutoConfig, AutoModelForCausalLM = transformers.AutoConfig, transformers.AutoModelForCausalLM",
    ],
)
def test_it_is_registered_in_any_order(folder, imports):
    code = (
        f"{imports}\nprint(type(AutoConfig.from_pretrained({str(folder)!r})).__name__, "
        f"type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    )
    assert python(code).split() == ["LongfireConfig", "LongfireForCausalLM"]


@pytest.mark.slow
def test_the_config_alone_needs_no_model(folder):
    code = (
        "import sys, longfire\nfrom transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r})\n"
        "print(type(config).__name__, 'longfire.model' in sys.modules)"
    )
    assert python(code).split() == ["LongfireConfig", "False"]
