"""How good a model is. The files in the order of the flow:

evaluate.py       loss, perplexity, bits per byte of validation documents, by source and position
recall.py         does it find again what it read: MQAR's pairs, a needle in real text
lm_eval_model.py  a model as lm-eval sees it (extra `eval`)
scores.py         `longfire eval`: which of these, as tables, JSON and pictures
class_scores.py   `longfire eval` of a classifier: accuracy, and the classes of files
"""
