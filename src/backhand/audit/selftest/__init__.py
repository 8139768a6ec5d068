"""Bugs planted in correct backward passes, to show that the audit finds them."""
