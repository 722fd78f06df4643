"""Typed configuration: sections, YAML files, ``key=value`` overrides."""
