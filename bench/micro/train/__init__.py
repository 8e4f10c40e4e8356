"""Trains every model of the micro tier from nothing: `python -m bench.micro.train all`."""
