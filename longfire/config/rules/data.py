"""What is refused of a run about its data, and about the files that it reads and writes."""

from collections.abc import Iterator
from pathlib import Path

from longfire.config.run_settings import RunSettings

LISTS = ("dataset_name", "dataset_split", "data_dir", "data_files", "text_field", "record_format")


def of_data(run: RunSettings) -> Iterator[str]:
    """Lists with an entry for each source are as long as data.dataset; the order is possible."""
    data = run.data
    count = len(data.dataset)
    if not count or not all(data.dataset):
        yield (
            f"data.dataset = {list(data.dataset)} names no source, or an empty one: name files, "
            "folders or hub datasets"
        )
    for name in LISTS:
        values = getattr(data, name)
        if len(values) not in (0, 1, count):
            yield (
                f"data.{name} has {len(values)} entries for {count} sources: give one, or one "
                "for each (`a,,b` leaves the second empty)"
            )
    if data.data_probs and len(data.data_probs) != count:
        yield (
            f"data.data_probs has {len(data.data_probs)} entries for {count} sources: give one "
            "for each, or none for equal shares"
        )
    if any(share <= 0 for share in data.data_probs):
        yield (
            f"data.data_probs = {list(data.data_probs)}: each share must be positive; leave a "
            "source out that should have none"
        )
    if data.streaming and data.shuffle == "global":
        yield (
            'data.shuffle = "global" permutes the whole store, whose length data.streaming does '
            'not know: use "window" or "auto"'
        )


def of_records(run: RunSettings) -> Iterator[str]:
    """Settings of records are read by some source."""
    data = run.data
    count = len(data.dataset)
    named = data.record_format or ("",)
    if data.fields or data.fields_from_record:
        key = "data.fields" if data.fields else "data.fields_from_record"
        value = data.fields or data.fields_from_record
        named = tuple(name or "fields" for name in named)
        if "fields" not in named:
            yield (
                f"{key} = {value!r} is read of no source: data.record_format = "
                f"{list(data.record_format)} has no `fields`; leave one of them out"
            )
    if data.document_end and "tokens" not in named:
        yield (
            f"data.document_end = {data.document_end!r} is read of no source: it is for records "
            "of ids, data.record_format = tokens; set that, or leave it out"
        )
    if len(named) == 1:
        named *= count
    for entry, name in zip(data.dataset, named):
        if entry == "embedded" and name not in ("", "text"):
            yield (
                f"data.dataset = embedded holds text, and it is to be read as {name} "
                "(data.record_format, data.fields): name a source of your own"
            )


def of_validation(run: RunSettings) -> Iterator[str]:
    """What is evaluated is there, and is not trained on."""
    data = run.data
    has_validation = data.validation_fraction or data.validation
    if not has_validation and (run.eval.at_end or run.eval.interval):
        yield (
            "data.validation_fraction = 0 leaves nothing to evaluate: raise it, name texts in "
            "data.validation, or set eval.at_end = false and eval.interval = 0"
        )
    both: list[str] = []
    for entry in data.validation:
        if entry in data.dataset and (entry == "embedded" or Path(entry).exists()):
            both.append(entry)
    if both:
        yield (
            f"data.validation names {', '.join(both)}, which data.dataset trains on: leave it "
            "out of one of them"
        )
    if data.validation and not all(data.validation):
        yield f"data.validation = {list(data.validation)} has an empty entry: leave it out"
    if data.validation_seed >= 0 and data.streaming:
        yield (
            "data.validation_seed draws documents by their numbers, and how many a stream has is "
            "not known: set data.streaming = false, or leave data.validation_seed out"
        )
    if run.eval.compare_xz and not run.eval.at_end:
        yield "eval.compare_xz compares with the last evaluation: set eval.at_end = true"


def of_tokenizer(run: RunSettings) -> Iterator[str]:
    """A tokenizer that is trained fits the model."""
    vocab_size = run.model_config.vocab_size if run.model_config else 0
    trained = run.tokenizer.train_vocab_size
    if run.tokenizer.path == "train" and vocab_size and vocab_size < trained:
        yield (
            f"tokenizer.train_vocab_size = {trained} is more than vocab_size = {vocab_size} of "
            f"{run.model_config_source}: lower it, or set vocab_size to 0 there (as many as the "
            "tokenizer has)"
        )


def of_start(run: RunSettings) -> Iterator[str]:
    """The weights and the teacher that a run starts with are there."""
    weights = run.model.weights
    teacher = run.distillation.teacher
    if weights and not Path(weights).is_dir() and not run.has_checkpoints:
        yield (
            f"model.weights = {weights!r} is no folder: name one that holds Hugging Face weights "
            "(safetensors and config.json), a run folder, a checkpoint in one, or a model of the "
            "hub as OWNER/NAME"
        )
    if teacher and not Path(teacher).is_dir():
        yield (
            f"distillation.teacher = {teacher!r} is no folder: name a run folder or one of "
            "Hugging Face weights"
        )
    if teacher and Path(teacher).resolve() == Path(run.job.dump_folder).resolve():
        yield (
            f"distillation.teacher = {teacher!r} is the folder of the run itself "
            "(job.dump_folder), so that each start would have another teacher: name another folder "
            "for one of them"
        )


def of_best_checkpoints(run: RunSettings) -> Iterator[str]:
    """The best checkpoints are those of the lowest validation loss, which must be measured."""
    best = run.checkpoint.keep_best_k
    if not best:
        return
    if not run.eval.interval:
        yield (
            f"checkpoint.keep_best_k = {best} follows the validation loss, and eval.interval = 0 "
            "measures none during training: set eval.interval"
        )
    if not run.data.validation and not run.data.validation_fraction:
        yield (
            f"checkpoint.keep_best_k = {best} follows the validation loss, but "
            "data.validation_fraction = 0 keeps no text for it: raise it, or set data.validation"
        )


def of_checkpoints(run: RunSettings) -> Iterator[str]:
    """Settings of checkpoints that do not go together."""
    checkpoint = run.checkpoint
    if not checkpoint.enable_checkpoint:
        for name in ("create_seed_checkpoint", "model_weights_only"):
            if getattr(checkpoint, name):
                yield (
                    f"checkpoint.{name} = true saves a checkpoint, but "
                    "checkpoint.enable_checkpoint = false: set one of them right"
                )
        if checkpoint.load_step >= 0:
            yield (
                f"checkpoint.load_step = {checkpoint.load_step} loads a checkpoint, but "
                "enable_checkpoint = false: set one right"
            )
    if checkpoint.load_step_again and checkpoint.load_step < 0:
        yield (
            "checkpoint.load_step_again = true goes back to checkpoint.load_step once more, "
            "which is not set: set it"
        )
    if checkpoint.create_seed_checkpoint and checkpoint.model_weights_only:
        yield (
            "checkpoint.create_seed_checkpoint makes a start to resume from, which "
            "model_weights_only cannot be: choose one"
        )
    if checkpoint.create_seed_checkpoint and checkpoint.load_step > 0:
        yield (
            f"checkpoint.create_seed_checkpoint saves step 0, load_step = {checkpoint.load_step} "
            "asks for another: choose one"
        )


def of_folders(run: RunSettings) -> Iterator[str]:
    """Folders inside the run folder stay inside."""
    inside = (
        "checkpoint.folder",
        "metrics.save_tb_folder",
        "profiling.save_traces_folder",
        "profiling.save_memory_snapshot_folder",
    )
    for key in inside:
        section, name = key.split(".")
        folder = Path(getattr(getattr(run, section), name))
        if folder.is_absolute() or ".." in folder.parts or not folder.parts:
            yield (
                f"{key} = {str(folder)!r} must be a folder inside the run folder: a relative "
                "path without .."
            )
