"""The HTTP doors: one file per resource, thin."""
