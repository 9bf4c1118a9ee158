"""The directory that `ksmcore run --children` puts first in PYTHONPATH."""
