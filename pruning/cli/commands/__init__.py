"""The toolkit's commands: `python -m pruning COMMAND --help`.

Each is a module with a function `execute`; `cli/command_table.py` lists their flags.
"""
