"""The process and its machine: commands, launchers, processes, memory, signals, progress."""
