"""`longfire plan`: what a run holds, sends and takes, on devices that need not be here. The files
in the order of the flow:

    live_bytes.py      the bytes that live after each operation of a computation
    part.py            a part of a model, run forward and backward on fake tensors
    listener.py        what a mixer asks of the operations along a sequence
    cut_sequence.py    those operations on a process's piece of a sequence
    memory.py          every part of a model, measured for one process's share
    forecast.py        a plan and what is expected of it
    holding.py         what a process holds beside its parts
    teacher.py         what a teacher adds to all of this
    measured_run.py    what plans of one run are made of, each measured once
    peak.py            what a process holds in a step, moment by moment
    step_time.py       how long a step takes
    planner.py         plans of a recipe, compared
    tables.py          forecasts as tables and as JSON
    longest.py         the longest sequence that fits, for each mixer
    published.py       Ring Attention's published tables
    context_tables.py  both as tables

How long each part takes is in parallel/cost.py, which context parallelism asks as well.
"""
