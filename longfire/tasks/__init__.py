"""What a run learns: what a record is, what the loss is, what is measured. The files in the order
of the flow:

contract.py                 what a task declares and does
table.py                    the table: job.task -> task
language_modeling.py        text: the next token
class_losses.py             a model's answer for a record, its loss, what is counted
classification.py           what tasks of classes share: loss, accuracy, names of classes
image_classification.py     images: their class
sequence_classification.py  texts: their class
"""
