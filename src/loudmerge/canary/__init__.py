"""The canary: reads upstream's source and says, guard by guard, what of it still holds.

guards.py is the data model, upstream/ where upstream's code comes from, rules/ what can be asserted, run.py
the verdicts, plugin.py the same under pytest. No upstream code runs in this process.
"""
