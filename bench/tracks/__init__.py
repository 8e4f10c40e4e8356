"""The tracks: each module is the stage order of one cell, as straight-line code."""
