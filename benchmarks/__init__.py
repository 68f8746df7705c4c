"""How fast the service is, as ratios of runs that were interleaved in one call.

python -m benchmarks            all parts, one table
python -m benchmarks --json     the same as JSON, alone on stdout
python -m benchmarks charge floor_post      some parts
python -m benchmarks.open_loop --help       one load at a fixed rate, on a service that runs

Every part runs for some seconds per round, the parts take turns, and there are several rounds; a
ratio is the median of the rounds' ratios. Absolute figures depend on the machine and its mood.

open_loop.py and load.py are the load of tests/edge/test_overload.py as well.

A part that fails is shown, with what its processes said, and takes no further turn; the others go
on, and the exit code is 1. A new part is a class in the list of benchmarks/__main__.py.
"""
