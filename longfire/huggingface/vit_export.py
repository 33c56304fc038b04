"""A model of images -> a folder that transformers loads as ViTForImageClassification; it is written
aside, read again and compared before it gets its name."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longfire.aside import folder_aside
from longfire.checkpoint.provenance import classes_of_run
from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.weights import newest_weights, refuse_not_finite
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.settings import Images
from longfire.disk import put_in_place
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.checksums import write_checksums
from longfire.huggingface.comparing import check, quiet_transformers
from longfire.huggingface.export import check_replaceable, sync_files, write_json
from longfire.huggingface.load import model_of
from longfire.huggingface.vit import ARCHITECTURE, vit_config, vit_weights
from longfire.huggingface.vit_images import PREPROCESSOR, preprocessor_of
from longfire.huggingface.weight_files import SINGLE
from longfire.model import Model
from longfire.tasks.class_losses import image_logits

KL_NATS = 1e-10  # promise 9
IMAGES = 2  # that logits are compared on


def export_vit(model: Model, classes: tuple[str, ...], images: Images, folder: Path) -> str:
    """Write the model with its fp32 weights, the names of its classes and what its images pass.
    Returns what was compared.

    An earlier export in the folder is replaced, and only when the new one is complete. Raises
    SettingsError where their class cannot express the model or the folder holds anything else,
    CheckpointError where a comparison fails or the disk is full.
    """
    config = vit_config(model.config, classes)
    check_replaceable(folder)
    try:
        with folder_aside(folder) as aside:
            weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
            theirs = vit_weights(weights, model.config)
            save_file(theirs, aside / SINGLE, {"format": "pt"})
            write_json(aside / "config.json", config)
            write_json(aside / PREPROCESSOR, preprocessor_of(model.config, images))
            compared = compare_vit(model, theirs, aside)
            (aside / "README.md").write_text(card(folder.name, classes, compared), encoding="utf-8")
            write_checksums(aside)
            sync_files(aside)
            put_in_place(aside, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the export could not be written ({error}); nothing that was there has "
            "changed"
        ) from error
    return compared


def export_vit_run(
    folder: Path, step: int, out: Path, dtype: str = "", plugins: tuple[str, ...] = ()
) -> str:
    """Export the checkpoint of this step (-1: the newest complete one) of a run on images. Raises
    as `export_vit`."""
    if dtype not in ("", "float32"):
        raise SettingsError(
            f"--dtype {dtype}: models of images are exported in float32: leave it out"
        )
    overrides = {"model.plugins": ",".join(plugins)} if plugins else {}
    run = Run.of_folder(folder, overrides)
    classes = classes_of_run(folder)
    config = run.known_model_config
    assert isinstance(config, ModelConfig), "a model of images is ours"
    config = config.with_classes(len(classes))
    vit_config(
        config, classes
    )  # what their class cannot express is refused before weights are read
    checkpoints = run.folder / run.checkpoint.folder
    if step < 0:
        step, weights = newest_weights(checkpoints)
    else:
        weights = load_model_weights(checkpoints / f"step-{step}")
    refuse_not_finite(weights, str(checkpoints / f"step-{step}"))
    return export_vit(model_of(config, weights), classes, run.images, out)


def compare_vit(model: Model, written: dict[str, Tensor], folder: Path) -> str:
    """Read the folder again, as tensors and by the class of transformers. Raises CheckpointError
    where bytes differ, or KL between our logits and theirs is not below 1e-10 nats in float64."""
    read = load_file(folder / SINGLE)
    for name, tensor in written.items():
        check(read[name].equal(tensor), f"{name} is not what was written")
    ours_BN, theirs_BN = both_logits(model, folder)
    log_ours = ours_BN.log_softmax(-1)
    kl = F.kl_div(theirs_BN.log_softmax(-1), log_ours, log_target=True, reduction="batchmean")
    check(float(kl) < KL_NATS, f"logits of {ARCHITECTURE} differ from ours: KL {float(kl):.1e}")
    return (
        f"reloaded and compared: {len(written)} tensors equal byte for byte; logits of {IMAGES} "
        f"images: {ARCHITECTURE} KL {float(kl):.1e}"
    )


@torch.no_grad()
def both_logits(model: Model, folder: Path) -> tuple[Tensor, Tensor]:
    """Our logits and those of transformers' class, of random images in float64."""
    from transformers import ViTForImageClassification

    config = model.config
    shape = (IMAGES, config.image_channels, config.image_size, config.image_size)
    pixels_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    ours = Model(config, torch.float64).double().eval()
    ours.load_state_dict(model.state_dict())
    with quiet_transformers():
        theirs = ViTForImageClassification.from_pretrained(
            folder, dtype=torch.float64, local_files_only=True
        )
    return image_logits(ours, pixels_BCHW), theirs.eval()(pixels_BCHW).logits


def card(name: str, classes: tuple[str, ...], compared: str) -> str:
    """README.md of an export, with the front matter that the hub reads."""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: image-classification",
            "tags: [longfire, vit]",
            "---",
            "",
            f"# {name}",
            "",
            f"{ARCHITECTURE} of {len(classes)} classes, trained with longfire.",
            "",
            f"Checked: {compared}.",
            "",
        ]
    )
