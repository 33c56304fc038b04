"""What a run is: its settings, its model, and what follows from them. Free of torch, so that
`--help` is instant. The files in the order of the flow:

    settings.py      every setting with its default and help: frozen dataclasses, one for each section
    aliases/         the spellings of earlier frameworks -> our settings, or the reason why not
    model_config.py  a model: config.json or [model] of a recipe, read strictly
    config_file.py   a config.json on disk: JSON errors with file and line
    shipped.py       recipes and model configs that are installed with longfire, by name
    paths.py         paths are local: a URL in a setting or option is refused
    recipe.py        TOML, then the command line -> typed sections, strictly
    options.py       options of commands beside the settings of a run: sampling, scoring
    run.py           Run: all settings of one run, resolved
    checks.py        what of a run is refused before a device is touched, each with the fix
"""
