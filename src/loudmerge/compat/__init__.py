"""The version-compatibility matrix: cells of transformers x peft x trl, what each shows, and one table.

Developer-side: nothing of the merge imports it. `nox -s matrix` runs `python -m loudmerge.compat`.
"""
