"""Measuring trained models: what is measured, the networks that judge, and the report."""
