"""The toolkit's commands: `python -m pruning COMMAND --help`.

Each is a module with a `SUMMARY`, its flags (`add_flags`) and what it does with them (`execute`).
"""
