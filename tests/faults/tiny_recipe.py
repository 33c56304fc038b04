"""A model and a recipe that train within a second, for tests that hurt commands."""

SHAPE = """{"model_type": "longfire", "hidden_size": 16, "num_hidden_layers": 2, "layer_types": ["gla", "attention"],
"intermediate_size": 24, "gla": {"num_heads": 2}, "attention": {"num_heads": 2}, "tie_word_embeddings": true}"""
RECIPE = """
[job]
dump_folder = "run"
[model]
config = "shape.json"
compute_dtype = "float32"
[data]
dataset = ["text.txt"]
validation_fraction = 0
num_workers = 1
prefetch_factor = 0
[training]
seq_len = 16
batch_size = 2
steps = 12
threads = 1
compile = "off"
[lr_scheduler]
warmup_steps = 2
[checkpoint]
interval = 2
[eval]
at_end = false
[metrics]
report = false
[comm]
init_timeout_seconds = 60
train_timeout_seconds = 60
"""
