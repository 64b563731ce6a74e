"""Traces of jobs, by OpenTelemetry: `attempts` is the worker's door, `submissions` that of producers."""
