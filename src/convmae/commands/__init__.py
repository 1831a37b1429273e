"""One file a command: a function with typed arguments is the Python API, the command line and the YAML schema in one."""
