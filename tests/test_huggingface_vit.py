"""huggingface/vit.py: ViTForImageClassification to ours and back, byte for byte, with its logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

pytest.importorskip("PIL")
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig
from longfire.config.read_model import read_model_config
from longfire.config.settings import Images
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.families import config_from_hf
from longfire.huggingface.load import load_weights, model_of
from longfire.huggingface.vit import vit_config
from longfire.huggingface.vit_export import export_vit
from longfire.images.augmentation import View
from longfire.initialise import build
from longfire.model import on_meta
from longfire.tasks.class_losses import image_logits

RECIPES = Path(__file__).parents[1] / "recipes" / "models"
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module", params=[{}, {"qkv_bias": False, "num_channels": 1}])
def theirs(request, tmp_path_factory):
    """A model of transformers of which every parameter matters, and the folder where it saved itself."""
    torch.manual_seed(0)
    config = ViTConfig(**SHAPE, **request.param, num_labels=7)
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    return model, folder


def ours_of(folder, dtype=torch.float64):
    config = config_from_hf(read_config(folder), str(folder))
    return model_of(config, load_weights(folder, config), compute_dtype=dtype).to(dtype)


def test_the_logits_are_those_of_transformers_in_float64(theirs):
    model, folder = theirs
    channels = model.config.num_channels
    pixels_BCHW = torch.randn(3, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs_BN = model.double()(pixels_BCHW.double()).logits
        ours_BN = image_logits(ours_of(folder), pixels_BCHW.double())
    model.float()
    kl = F.kl_div(
        ours_BN.log_softmax(-1), theirs_BN.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert kl < 1e-10 and theirs_BN.std() > 0.1
    torch.testing.assert_close(ours_BN, theirs_BN, rtol=1e-9, atol=1e-9)


def test_the_round_trip_is_equal_byte_for_byte(theirs, tmp_path):
    _, folder = theirs
    model = ours_of(folder, torch.float32)
    compared = export_vit(model, tuple("abcdefg"), Images(), tmp_path / "hf")
    assert compared.startswith("reloaded and compared: ") and "equal byte for byte" in compared
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate("abcdefg")}
    assert config_from_hf(config, "") == model.config
    assert (tmp_path / "hf" / "SHA256SUMS").exists()


def test_what_their_class_cannot_express_is_named():
    config = config_from_hf({"model_type": "vit", **SHAPE, "id2label": {"0": "a"}}, "")
    for key, value, name in [
        ("pool", "mean", "pool = 'mean'"),
        ("norm", "rmsnorm", "norm = 'rmsnorm'"),
        ("mlp", "swiglu", "mlp = 'swiglu'"),
        ("mixers", {"attention": {"num_heads": 4, "o_bias": True, "qkv_bias": True}}, "rope"),
    ]:
        other = ModelConfig(**{**config.__dict__, key: value})
        with pytest.raises(SettingsError, match=name):
            vit_config(other, ())
    gla = {"layer_types": ("gla", "gla"), "mixers": {"gla": {"num_heads": 4}}}
    with pytest.raises(SettingsError, match="layer_types with gla"):
        vit_config(ModelConfig(**{**config.__dict__, **gla}), ())
    with pytest.raises(SettingsError, match="relative_bias"):
        config_from_hf({"model_type": "vit", "relative_bias": True}, "config.json")


def test_wrong_tensors_are_named_before_any_is_read(theirs, tmp_path):
    _, folder = theirs
    config = config_from_hf(read_config(folder), str(folder))
    tensors = load_file(folder / "model.safetensors")
    del tensors["vit.layernorm.bias"]
    tensors["more"] = torch.zeros(1)
    tensors["classifier.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path, config)
    for named in ("vit.layernorm.bias is missing", "classifier.bias has (3,)", "more is not of"):
        assert named in str(error.value)


def test_transformers_prepares_images_as_validation_does(tmp_path):
    """preprocessor_config.json: the shorter side resized, the centre, normalised."""
    from PIL import Image

    config = config_from_hf({"model_type": "vit", **SHAPE, "id2label": dict.fromkeys("abc")}, "")
    model = build(config, 0)
    images = Images(resize=20, mean=(0.4,), std=(0.3,))
    export_vit(model, tuple("abcdefg"), images, tmp_path / "hf")
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 31, 3), generator=chance, dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    ours_CHW = View(images, 16, 3, 0).of_validation(image)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
    theirs_CHW = processor(image, return_tensors="np")["pixel_values"][0]
    assert abs(ours_CHW - theirs_CHW).max() <= 1.01 / 255 / 0.3  # one step of uint8


# Of the papers: Touvron 2021 (DeiT-S, 22M) and Dosovitskiy 2021 (ViT-B, 86M), with 1000 classes.
SHIPPED = {"vit-s-16": (22_050_664, 4.6e9), "vit-b-16": (86_567_656, 17.6e9)}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_the_published_model(name):
    parameters, multiply_adds = SHIPPED[name]
    config = read_model_config(RECIPES / f"{name}.json").with_classes(1000)
    ours = on_meta(config)
    keys = vit_config(config, ())
    with torch.device("meta"):
        theirs = ViTForImageClassification(ViTConfig(**keys))
    for model in (ours, theirs):
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    flops = ours.flops_per_token(config.image_tokens) * config.image_tokens
    assert flops == pytest.approx(2 * multiply_adds, rel=0.03)
    back = config_from_hf(keys, "")
    assert replace(config, mixers=back.mixers) == back
    assert config.mixers["attention"].items() <= back.mixers["attention"].items()
