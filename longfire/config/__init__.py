"""What a run is: its settings, its model, and what follows from them. Free of torch, so that
`--help` is instant. The files in the order of the flow:

    settings/        every setting with its default and help: a frozen dataclass for each section
    aliases/         the spellings of earlier frameworks -> our settings, or the reason why not
    strict.py        tables of settings, read strictly: unknown names, types, what is missing
    model_config.py  a model: its settings, checked
    taught_layers.py which layers of a student learn from a teacher
    model_rules.py   the rules that such settings must keep
    init_rules.py    how its parameters may begin
    own_settings.py  the table of a mixer or an MLP -> its own dataclass
    own_keys.py      the keys of a config.json, or of [model] of a recipe -> a model's settings
    transformers_config.py the same of a model that is made by a class of transformers
    config_file.py   a config.json on disk: JSON errors with file and line
    shipped.py       recipes and model configs that are installed with longfire, by name
    paths.py         paths are local: a URL in a setting or option is refused
    values.py        a value as the type of its setting, inside its interval
    named_options.py settings that a part from a table declares for itself, as a dataclass
    recipe.py        TOML, then the command line -> typed sections, strictly
    options.py       options of commands beside the settings of a run: sampling, scoring
    read_model.py    the config of a model, read from a file, from a recipe, or from both
    run_settings.py  all settings of one run, and the numbers that follow from them
    run.py           Run: the same composed from a recipe and the command line, or from a run folder
    run_folder.py    the settings of a run in its folder: saved, compared, held by one process
    rules/           the rules, a file for each owner
    summary.py       a run in lines for the console: model, steps, learning rate
    checks.py        the rules that every run must keep, checked before a device is touched
"""
