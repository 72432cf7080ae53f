"""Content-addressed files: blobs, partial uploads, read-only folders, arrays."""
