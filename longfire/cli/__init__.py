"""The command line: `longfire COMMAND`. What a command needs is imported inside it, so that
`--help` is instant.

    entry.py      the entry point: an error is one message on stderr and an exit code
    __main__.py   `python -m longfire.cli` is `longfire`
    failures.py   errors that are not of longfire's classes: the machine's, and our own faults
    lasting_output.py  output of `train`, which goes on when its reader has ended
    commands.py   the table of the commands
    arguments.py  what their parsers share: a recipe, every setting, help by section
    old_words.py  --help-old: the words of earlier systems and what they mean here
    torchrun.py   torchrun for scripts/train.sh: errors of longfire without its traceback

    init.py       a starter recipe; docs/model_config.md
    starter.py    the recipe that `init` writes, by kind and size of model
    model_keys.py every key of a model config, as a page
    prepare.py    text -> token stores
    train.py      a recipe -> a run folder
    eval.py       a model, text or tasks -> numbers
    generate.py   a model, prompts -> text
    report.py     a run folder -> report.html
    export.py     a checkpoint -> Hugging Face weights
    import_.py    Hugging Face weights -> a run folder (`import` is a keyword of Python)
    convert.py    a model -> another architecture with every matching weight
    plan.py       a recipe -> what it would hold, send and take on devices that are not here
    bench.py      a recipe -> tokens per second on this machine
    doctor.py     every op compared with its reference on this machine
    gpu_check.py  one GPU checked and measured in 20 minutes
"""

from longfire.cli.entry import main, program

__all__ = ["main", "program"]
