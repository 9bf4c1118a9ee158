"""Two forms of the tests that take long: a short one always, the long one where it is asked for."""

import os

LONG = os.environ.get("KSMCORE_STRESS", "0") not in ("", "0")
