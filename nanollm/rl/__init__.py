"""The model improves by its own replies: sample, grade, compare, learn."""
