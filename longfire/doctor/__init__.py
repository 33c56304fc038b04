"""`longfire doctor`: every fast op against its reference on this machine.

op_cases.py  what a way to call an op is, and what rounding may explain
segments.py  recurrences of parts of sequences, beside the references
cases/       the ways to call every op, with random inputs
check.py     the comparison, forward and backward, as a table
"""
