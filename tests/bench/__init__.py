"""`make bench`: the project's performance targets, measured on this machine and written to docs/benchmarks.md.

Not collected by pytest: how fast a machine is today is no property of the code. What the numbers are compared with
(ceilings, verdicts, the page) is arithmetic, and has unit tests in tests/unit/test_bench_table.py.
"""
