"""`longfire plan`: what a run holds, sends and takes, on devices that need not be here. The files
in the order of the flow:

    memory.py          what a step holds, from a forward and backward on fake tensors
    holding.py         what a process holds beside its parts
    forecast.py        a plan and what is expected of it
    planner.py         plans of a recipe, compared
    tables.py          forecasts as tables and as JSON
    longest.py         the longest sequence that fits, for each mixer
    published.py       Ring Attention's published tables
    context_tables.py  both as tables

How long each part takes is said in parallel/cost.py, which context parallelism asks as well.
"""
