"""One file a command: a function with typed arguments is Python API, command line and YAML schema in one."""
