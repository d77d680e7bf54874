"""What was asked: the YAML file, checked, and from there transformed into plans and trials."""
