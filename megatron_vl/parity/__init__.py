"""Does every layout compute what the reference computed? The engine behind tools/check_parity.py."""
