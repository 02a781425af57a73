"""The toolkit's commands: `python -m pruning COMMAND --help`.

Each is a module with a `SUMMARY`, the dataclasses whose settings are its `FLAGS`, and `execute`.
"""
