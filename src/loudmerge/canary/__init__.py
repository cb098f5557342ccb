"""The canary: reads upstream's source and says, guard by guard, what of it still holds.

guards.py is the data model, sources.py where upstream's code comes from, rules.py what can be asserted,
run.py the verdicts, plugin.py the same under pytest. No upstream code runs in this process.
"""
