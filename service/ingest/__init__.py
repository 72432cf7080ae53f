"""Checking what users send before anything is loaded."""
