"""Names that settings of longfire had before version 0.2."""

from longfire.config.aliases.meaning import Old

EARLIER_LONGFIRE: dict[str, Old] = {  # names that settings of longfire had before version 0.2
    "data.heldout_fraction": "data.validation_fraction",
    "data.shuffle_window_rows": "data.shuffle_window_sequences",
    "distillation.label_share": "distillation.ce_weight",
}
