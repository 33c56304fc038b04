"""`longfire gpu-check`: what a machine's one GPU computes, and how fast, stage by stage. The files
in the order of the flow:

    stage.py         what a stage is given and what it finds
    findings.py      an error of one measurement is a finding, and the next one runs
    model_runs.py    the models of the published sizes, at full and at small size, as runs
    facts.py         the card, the versions, the speed of a matrix product and of a copy
    joined_products.py one product in the place of several: q, k, v, and gate and up
    op_checks.py     every op beside its reference, at small and at recipe sizes
    graphs.py        a block of each mixer: graphs, recompilations, kernels, waits of the host
    short_run.py     the quickstart in short runs, one of them killed and resumed
    peers.py         the same models of transformers or fla in a plain loop
    speed.py         tokens a second of each model, beside its peer
    kernel_kinds.py  the kinds of kernels, and what the device does of each
    step_profile.py  one profiled step by kind of kernel, beside the roofline
    roofline.py      counted FLOPs and bytes of a step, and the seconds they take at least
    saving.py        what a checkpoint costs the training
    long_row.py      one sequence of 32,768 tokens
    goals.py         the summary against the goals of speed
    stages.py        the table of the stages, in their order
    processes.py     a stage in a process of its own, with a time limit
    check.py         all stages: the table on the console, and a JSON line for each
"""
