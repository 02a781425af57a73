"""Other libraries' conventions: each module needs the library of its name, which is no dependency."""
