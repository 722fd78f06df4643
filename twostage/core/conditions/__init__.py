"""Conditions: what a model knows about an image besides its pixels or codes, such as its class or its caption."""
