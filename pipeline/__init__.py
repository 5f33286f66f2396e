"""The data path of one worker: row -> prompt -> tokens -> completion -> row.

Nothing in this package knows of Ray, of jobs or of a command line.
"""
