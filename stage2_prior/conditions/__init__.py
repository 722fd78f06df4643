"""Conditions: what an image's codes are predicted from besides other codes, such as its class or its caption."""
