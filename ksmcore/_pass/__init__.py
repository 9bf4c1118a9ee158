"""The path of a span of pages, from the survey to the merged run; `scan` alone knows all of it.
What it works on is the engine's `state`; the caller holds the engine's lock, and not the GIL.
Words: span, batch, intent, run, stretch, quiet page."""
