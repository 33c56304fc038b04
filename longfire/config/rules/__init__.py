"""The rules of checks.py, a file for each owner:

processes.py       plans that are not proven, settings without a meaning for so many processes
steps.py           the batch, the steps, the length of sequences
lengths.py         lengths that change over time, and the segments of long sequences
model.py           parts that the model lacks, settings that do not go together, the optimizer
float8.py          matrix products of 8-bit numbers
data.py            data, and the files that a run reads and writes
tasks.py           what the task of a run does not read or cannot do
without_effect.py  settings that change nothing in a run, which are no error
"""
