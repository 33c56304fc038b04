"""Text from a model. The files in the order of the flow:

prompts.py   `longfire generate`: prompts from arguments, files or a terminal
generate.py  a model and prompts -> text: batches, sampling, stop strings, streaming
"""
