"""Optimizers: a table of rules, each of which declares what the rest of longfire asks of it. A new
one is a new file and one line of the table (CONTRIBUTING.md, "An optimizer").

contract.py  what a rule declares: updates by role, what each needs whole, its state, proven plans
moments.py   the mean of gradients and of their squares, for rules that are no classes of torch
adam_bfloat16.py Adam and AdamW whose mean of gradients is kept in bfloat16
adam.py      Adam and AdamW
sgd.py       stochastic gradient descent with momentum
lamb.py      LAMB: Adam's step, scaled by the length of each tensor
adafactor.py Adafactor: means of squared gradients by rows and columns
table.py     the table: optimizer.name -> rule
refusals.py  the plans that a rule is refused under
average.py   a moving average of the weights
groups.py    parameters by role, their groups, the optimizer on them
state.py     what an optimizer keeps, as a checkpoint has it
clipping.py  the norm of all gradients, and gradients no longer than a norm
"""

from longfire.optim.average import averages_in_place, update_averages
from longfire.optim.clipping import clip_gradients
from longfire.optim.groups import (
    make_optimizer,
    parameter_groups,
    roles,
    set_learning_rate,
    updates_of,
)
from longfire.optim.table import OPTIMIZERS, rule_of

__all__ = [
    "OPTIMIZERS",
    "averages_in_place",
    "clip_gradients",
    "make_optimizer",
    "parameter_groups",
    "roles",
    "rule_of",
    "set_learning_rate",
    "update_averages",
    "updates_of",
]
