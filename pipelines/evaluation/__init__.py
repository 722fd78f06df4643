"""What `evaluate` is made of: measurements, their protocol, the table and the report."""
