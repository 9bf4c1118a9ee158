"""An engine behind its lock, as Python sees it: each method takes the lock for as long as it
touches the state, and runs no Python code meanwhile. The census, the way back, copies, numbers."""
