"""Text from a model. The files in the order of the flow:

prompts.py       `longfire generate`: prompts from arguments, files or a terminal
generate.py      a model and prompts -> text, whole or in pieces
continuation.py  a text while it is generated
steps.py         a forward over each prompt, then one token of all texts at a time
draw.py          the next id from its logits
reader.py        text from ids while they are drawn, up to a stop
"""
