"""One module per verb: a frozen Config and run(config) -> what it made."""
