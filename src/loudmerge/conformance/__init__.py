"""The conformance suite: golden bases and adapters, what their merge must be, and a runner for any merge
command.

The data is conformance/ of the source tree.
`python -m loudmerge.conformance --command "mytool {base} {adapter} {out}"`
prints a scorecard; `pytest --conformance-command …` runs one test for each case.
"""
