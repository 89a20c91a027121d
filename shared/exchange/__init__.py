"""Datasets of other toolkits: what they say becomes a dataset of ours, and ours is written as they read it.

`EXCHANGE.md` beside `FORMAT.md` says what the others store, what of it is known and what is not.
"""
