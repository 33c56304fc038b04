"""`longfire doctor`: every fast op against its reference on this machine.

op_cases.py  ways to call every op, with random inputs, and what rounding may explain
check.py     the comparison, forward and backward, as a table
"""
