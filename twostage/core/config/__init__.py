"""Typed configuration: sections, YAML files, ``key=value`` overrides, and their error messages."""
