"""Telling others over HTTP that a job has ended."""
