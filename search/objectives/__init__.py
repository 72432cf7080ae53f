"""What plans are solved for: one objective, one file."""
