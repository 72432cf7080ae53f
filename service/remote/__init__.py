"""The parts of the Python client: transport, uploads, handles."""
