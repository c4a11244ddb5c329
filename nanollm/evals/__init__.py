"""Evaluation: how good a model is, how sure that is, and what of the test stands in the training text."""
