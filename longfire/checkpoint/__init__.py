"""The state of a run on disk. The files in the order of the flow:

state.py       all that a step changes, and which part of it each process writes
shards.py      tensors in files: slices written by each process, read by any
slices.py      whether the parts of each tensor make it up
folder.py      one checkpoint: its files and names, and whether it is complete
host_copies.py what a save in the background writes, copied beside the computation
restoring.py   which checkpoint a run resumes from, and reading it into the state
best.py       the validation losses of a run's steps, and which checkpoints have the lowest
saving.py      the checkpoints of a run: when one is saved, who writes what, which are kept
weights.py     a model from a run folder or from Hugging Face weights, to read only
provenance.py  the run folder that weights belong to, the tokenizer beside them
"""
