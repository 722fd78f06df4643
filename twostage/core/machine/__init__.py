"""The process and its machine: commands, launchers, devices, memory, signals, progress."""
