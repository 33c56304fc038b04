"""The door to Hugging Face: families.py (their name <-> our name, one table each), load.py (in), convert.py (out, checked)."""
