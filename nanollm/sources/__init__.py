"""Where text comes from, and how an answer is judged; never torch."""
