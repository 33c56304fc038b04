"""Whether a class of transformers separates the documents of a packed sequence."""

import torch

from longfire.errors import SettingsError
from longfire.huggingface.transformers_model import TransformersModel

# What fp32 may differ by between a packed document and the same alone, relative to the largest
# logit.
TOLERANCE = 1e-4
LENGTHS = (9, 15)  # of two documents, in tokens


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # two lengths that never come again
def check_documents_separate(model: TransformersModel) -> None:
    """data.varlen packs documents that must not see each other. No class documents whether it
    separates them where positions begin anew, so it is tried: two documents in a sequence against
    each alone, with the very model that will be trained. Where the first document would change
    nothing even if it were seen, the test shows nothing, and that is refused too.

    Raises SettingsError.
    """
    device = next(model.parameters()).device
    name = type(model.theirs).__name__
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (1, sum(LENGTHS)), generator=generator)
    ids_BT = ids_BT.to(device)
    tried = TransformersModel(model.config, model.theirs)  # fp32
    alone_BTV = torch.cat([tried(part) for part in ids_BT.split(LENGTHS, 1)], 1)
    joined_BTV = tried(ids_BT)
    scale = alone_BTV.abs().max()
    if not (joined_BTV - alone_BTV).abs().max() > 100 * TOLERANCE * scale:
        raise SettingsError(
            f"data.varlen: with its initial weights {name} gives the same whether it sees earlier "
            "documents or not, so it cannot be shown that it separates them; begin from trained "
            "weights (model.weights), or set data.varlen = false"
        )
    packed_BTV = joined_BTV
    if tried.takes_positions:
        positions_BT = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(device)
        packed_BTV = tried.call(ids_BT, positions_BT)
    difference = ((packed_BTV - alone_BTV).abs().max() / scale).item()
    if not difference <= TOLERANCE:
        raise SettingsError(
            f"data.varlen: {name} lets a document see the one before it in its sequence (logits "
            f"differ by {difference:.1e} of the largest), so packed documents would not be "
            "separate; set data.varlen = false, or use a model that longfire has itself"
        )
