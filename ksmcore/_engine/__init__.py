"""The engine that users have, and its parts: who registers, who makes passes, the scanner, settings
and numbers. Locks of Python only, in this order: pass, registration; no finaliser takes them."""
