"""The state of a run on disk. The files in the order of the flow:

checkpoint.py  who writes what, when a checkpoint counts, which one is resumed from
shards.py      tensors in files: slices written by each process, read by any
weights.py     a model from a run folder or from Hugging Face weights, to read only
provenance.py  the run folder that weights belong to, the tokenizer beside them
"""
